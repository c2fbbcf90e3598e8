"""PACKED: two bits a weight and back, the kernel against the reference, bytes, and the same model with and without."""

import copy
import stat

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, small_config

import train_gpt as gpt
from tools import packed
from tools.generate import Options, Remembering, continue_text

KERNEL = packed.load_kernel()
needs_kernel = pytest.mark.skipif(KERNEL.product is None, reason=KERNEL.line)
# (rows, columns), group: whole and ragged groups, groups that are no whole blocks, one group for all.
SHAPES = [((8, 128), 64), ((5, 300), 128), ((3, 70), 0), ((7, 96), 24), ((4, 32), 128), ((1, 1), 0), ((6, 260), 65),
          ((6, 192), 128), ((5, 164), 100), ((3, 400), 300)]


def matrix(shape, group, seed=0, scale="absmean"):
    """Weights as the ternary format stores them."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    # Rows of other sizes, so that there are several scales.
    return gpt.project(weight * torch.linspace(0.1, 3, shape[0])[:, None], gpt.Route("ternary", group, scale=scale))


def trits_of(shape, group, seed=0):
    return packed.to_trits(matrix(shape, group, seed), group)


def near(found, weight, x, steps=4):
    """Whether a product differs from the exact one by rounding only."""
    wide = F.linear(x.double(), weight.double())
    room = F.linear(x.double().abs(), weight.double().abs()) * steps * torch.finfo(torch.float32).eps
    return bool(((found.double() - wide).abs() <= room + 1e-30).all())


@pytest.mark.parametrize(("shape", "group"), SHAPES)
def test_codes_come_back(shape, group):
    codes = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(1)).to(torch.int8)
    held = packed.pack_codes(codes, group)
    assert torch.equal(packed.unpack_codes(held, shape[1], group), codes)
    size = packed.group_size(shape[1], group)
    blocks = sum(-(-min(size, shape[1] - start) // packed.BLOCK) for start in range(0, shape[1], size))
    assert held.dtype == torch.uint8 and held.shape == (shape[0], blocks * packed.LANES)


@pytest.mark.parametrize("scale", ["absmean", "rms", "nonzero"])
@pytest.mark.parametrize(("shape", "group"), SHAPES)
def test_values_are_those_of_the_format_to_the_bit(shape, group, scale):
    weight = matrix(shape, group, scale=scale)
    trits = packed.to_trits(weight, group)
    assert torch.equal(packed.weights_of(trits.codes, trits.scales, trits.columns, group), weight)
    assert len(trits.table) <= 128 and trits.scales.dtype == torch.float32
    linear = gpt.Linear(shape[1], shape[0], 0.0)
    assert torch.equal(packed.pack_linear(linear, weight, group).weight, weight)


def test_what_is_not_ternary_is_not_packed():
    assert packed.to_trits(torch.randn(4, 64), 0) is None
    assert packed.to_trits(matrix((4, 128), 64), 0) is None  # two scales in a row
    weight = matrix((4, 128), 64)
    weight[2, 5] = weight.abs().max() / 2
    assert packed.to_trits(weight, 64) is None
    assert packed.pack_linear(gpt.Linear(128, 4, 0.0), weight, 64) is None
    many = torch.arange(1.0, 300.0)[:, None] * torch.ones(299, 64)
    assert packed.to_trits(many, 64) is None and packed.to_trits(many[:250], 64) is not None


@needs_kernel
@pytest.mark.parametrize("small", [0, packed.SMALL])
@pytest.mark.parametrize(("shape", "group"), [*SHAPES, ((96, 768), 128)])
def test_kernel_is_the_reference(shape, group, small, monkeypatch):
    """For every number of rows that it takes, on one thread and, where small is 0, on those that there are."""
    monkeypatch.setattr(packed, "SMALL", small)
    weight, trits = matrix(shape, group, 3), trits_of(shape, group, 3)
    for count in range(1, packed.FEW_ROWS + 1):
        x = torch.randn(count, shape[1], generator=torch.Generator().manual_seed(count))
        found = KERNEL.product(trits, x)
        reference = packed.matvec_reference(trits.codes, trits.scales, x, group)
        assert found.shape == reference.shape == (count, shape[0])
        assert near(found, weight, x) and near(reference, weight, x)
    assert not near(KERNEL.product(trits, x) + 1e-3 * weight.abs().max(), weight, x)


@needs_kernel
def test_kernel_runs_on_several_threads(monkeypatch):
    monkeypatch.setattr(packed, "SMALL", 0)
    weight, trits = matrix((96, 768), 128), trits_of((96, 768), 128)
    x = torch.randn(3, 768)
    one = KERNEL.product(trits, x)
    monkeypatch.setattr(packed.torch, "get_num_threads", lambda: 3)
    assert torch.equal(KERNEL.product(trits, x), one) and near(one, weight, x)


@needs_kernel
def test_kernel_takes_strided_rows_and_half_floats():
    weight, trits = matrix((16, 128), 64), trits_of((16, 128), 64)
    x = torch.randn(128, 3).T
    assert near(KERNEL.product(trits, x), weight, x)
    half = x.to(torch.bfloat16)
    found = KERNEL.product(trits, half)
    assert found.dtype == torch.bfloat16
    # The weights are cast as everywhere else; what is left is the rounding of the result.
    wide = F.linear(half.double(), weight.to(torch.bfloat16).double())
    assert torch.allclose(found.double(), wide, rtol=2 ** -8, atol=1e-5)


def test_a_real_layer_takes_at_most_0_15_of_bf16():
    """Feed-forward and projection of the preset `ternary`, and of a width that is no whole number of groups."""
    for shape in ((3072, 768), (768, 3072), (768, 768), (768, 192), (192, 192)):
        linear = gpt.Linear(shape[1], shape[0], 0.0)
        made = packed.pack_linear(linear, matrix(shape, 128), 128, packed.Kernel(None, ""))
        held = sum(buffer.numel() * buffer.element_size() for buffer in made.buffers())
        assert held <= 0.15 * 2 * shape[0] * shape[1]
        assert sum(1 for _ in made.parameters()) == 0


@pytest.mark.parametrize("kernel", [packed.Kernel(None, "none"), pytest.param(KERNEL, marks=needs_kernel)])
def test_drop_in(kernel):
    """The forward of Linear, with its low-rank path, rounded inputs and deltas; to the bit where nothing but the
    reference is used."""
    weight = matrix((24, 96), 32)
    linear = gpt.Linear(96, 24, 0.0)
    with torch.no_grad():
        linear.weight.copy_(weight)
    linear.path, linear.rounds = gpt.LowRank(96, 24, 4), True
    torch.manual_seed(0)
    for parameter in linear.path.parameters():
        torch.nn.init.normal_(parameter)
    made = packed.pack_linear(linear, weight, 32, kernel)
    deltas = {"here": gpt.Delta(torch.randn(1, 2, 96), torch.randn(1, 24, 2))}
    for shape in ((1, 1, 96), (2, 3, 96), (2, 40, 96)):
        x = torch.randn(shape)
        for own in (None, deltas):
            found, wanted = made(x, "here", own), linear(x, "here", own)
            assert found.shape == wanted.shape
            exact = kernel.product is None or x.numel() > packed.FEW_ROWS * 96
            assert torch.equal(found, wanted) if exact else torch.allclose(found, wanted, atol=1e-4, rtol=1e-5)
        assert not torch.allclose(made(x, "here", deltas), made(x, "there", deltas))


# ---- the compiler


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


@pytest.mark.parametrize("compiler", [None, "fails", "is no compiler", "absent"])
def test_without_a_compiler_one_line_says_so(compiler, tmp_path):
    made = {"fails": "exit 1", "is no compiler": "exit 0"}.get(compiler)
    path = compiler and (script(tmp_path / "cc", made) if made else str(tmp_path / "absent"))
    found = packed.compile_kernel(tmp_path / "cache", path)
    assert found.product is None and "unpacked" in found.line and len(found.line.splitlines()) == 1
    linear, weight = gpt.Linear(64, 8, 0.0), matrix((8, 64), 0)
    x = torch.randn(1, 1, 64)
    assert torch.equal(packed.pack_linear(linear, weight, 0, found)(x, "", None), F.linear(x, weight))


@needs_kernel
def test_the_kernel_is_compiled_once_and_without_openmp_where_there_is_none(tmp_path):
    real = packed.shutil.which("cc") or packed.shutil.which("gcc") or packed.shutil.which("clang")
    log = tmp_path / "log"
    compiler = script(tmp_path / "cc", f'echo "$*" >>{log}\ncase "$*" in *openmp*) exit 1 ;; esac\nexec {real} "$@"')
    trits = trits_of((8, 128), 64)
    x = torch.randn(1, 128)
    for _ in range(2):
        found = packed.compile_kernel(tmp_path / "cache", compiler)
        assert torch.equal(found.product(trits, x), KERNEL.product(trits, x))
    calls = [line for line in log.read_text().splitlines() if "-shared" in line]
    assert ["openmp" in line for line in calls] == [True, False]
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".so"]


# ---- whole models


def ternary_model(**more):
    """A shaken model with its ternary matrices at their stored values, its routes, and all its weights."""
    config = small_config(**more)
    model = make_model(config, 1, shake=0.1)
    routes = gpt.routes_of(model, config.artifact)
    weights = {name: gpt.project(parameter, routes[name]) for name, parameter in model.named_parameters()}
    gpt.load_weights(model, weights, "test")
    return model.requires_grad_(False), routes, weights


MODELS = {"ternary": {"PRESET": "ternary"}, "chimera": {"PRESET": "chimera"}, "jamone": {"PRESET": "jamone"},
          "radial": {"PRESET": "radial"}, "fused": {"PRESET": "baseline", "MATRIX_FORMAT": "ternary"},
          "paths": {"PRESET": "ternary", "HGF_RANK": 2, "ACT_INT8": 1},
          "experts": {"PRESET": "ternary", "MOE_EXPERTS": 2, "EXTRA_NORMS": 0}}


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_model_says_the_same(name):
    model, routes, weights = ternary_model(**MODELS[name])
    plain = copy.deepcopy(model)
    found = packed.pack_model(model, routes, weights)
    wanted = [name for name, module in plain.named_modules() if isinstance(module, gpt.Linear)
              and routes[f"{name}.weight"].format == "ternary"]
    assert found.names == tuple(wanted) and len(wanted) >= 6 and found.left == ()
    assert all(isinstance(model.get_submodule(name), packed.PackedLinear) for name in wanted)
    assert found.plain_bytes == sum(2 * weights[f"{name}.weight"].numel() for name in wanted)
    tokens = torch.randint(4, 384, (1, 12), generator=torch.Generator().manual_seed(2))
    for length in (12, 3):  # by the reference, and by the kernel where there is one
        logits = [held.logits(gpt.make_forward(held, -1)(tokens[:, :length], None)) for held in (plain, model)]
        assert torch.allclose(*logits, atol=1e-3, rtol=1e-4) and logits[0].std() > 0.01
    prompt, options = [gpt.BOS, 20, 30, 40], Options(tokens=16, greedy=True)
    texts = [continue_text(Remembering(held, gpt.make_forward(held, -1)), prompt, options, lambda token: None)
             for held in (plain, model)]
    assert texts[0] == texts[1] and len(texts[0]) > 3


@needs_kernel
def test_fused_feed_forwards_take_the_kernel(monkeypatch):
    """Whose matrices nothing asks for by their names any more."""
    model, routes, weights = ternary_model(**MODELS["fused"])
    packed.pack_model(model, routes, weights)
    used = []
    monkeypatch.setattr(packed.PackedLinear, "weight", property(lambda self: used.append(self)))
    gpt.make_forward(model, -1)(torch.tensor([[1, 5]]), None)
    assert used == []


def test_a_matrix_that_is_not_as_its_route_says_stays():
    model, routes, weights = ternary_model(PRESET="ternary")
    name = next(name for name, route in routes.items() if route.format == "ternary")
    weights[name] = weights[name] + 0.01 * torch.randn(weights[name].shape)
    found = packed.pack_model(model, routes, weights)
    assert found.left == (name.removesuffix(".weight"),) and found.left[0] not in found.names
    assert isinstance(model.get_submodule(found.left[0]), gpt.Linear)


def test_a_model_without_ternary_matrices_is_left_alone():
    model = make_model(small_config(PRESET="baseline"))
    routes = gpt.routes_of(model, small_config(PRESET="baseline").artifact)
    found = packed.pack_model(model, routes, dict(model.named_parameters()))
    assert (found.names, found.bytes, found.share) == ((), 0, 0.0)
