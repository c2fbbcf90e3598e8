"""KERNELS, Triton's twins: value and gradients against the references, in Triton's interpreter without a GPU, and at
real sizes on one. The interpreter has to be chosen before Triton is imported, so its cases run in one subprocess."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
import train_gpt as kernels  # noqa: E402

CPU = torch.device("cpu")
# Relative norm errors of value and gradients. fp32: sums in another order, and the slope of tanh by way of 1 - tanh^2,
# which cancels where logits saturate. bf16: eight bits in every operand, on both sides.
TOLERANCE = {"float32": 5e-6, "bfloat16": 1.5e-2}
FACTOR = 1.7  # upstream of every gradient, so that a forgotten factor shows

# rows, vocabulary, width, softcap, scale of the logits, logits a chunk (0: all at once)
NATS = [(1, 16, 8, 30.0, 1.0, 0), (37, 77, 24, 0.0, 1.0, 0), (37, 1000, 24, 30.0, 1.0, 5000),
        (1, 2048, 96, 0.0, 40.0, 0), (37, 77, 8, 30.0, 40.0, 1), (5, 20000, 8, 30.0, 1.0, 0),
        (5, 20000, 8, 0.0, 40.0, 0)]
# shape of x without its width, width, hidden, slope, by TMA where strides allow
MLP = [((1,), 8, 16, 0.5, True), ((3, 50), 24, 77, 0.0, True), ((300,), 96, 520, 0.5, True),
       ((300,), 96, 520, 0.5, False), ((2, 70), 65, 300, 0.3, False)]


def nats_case(rows, vocabulary, width, softcap, scale, chunk, dtype, device=CPU):
    """Inputs with gradients, and the rest; targets repeat."""
    generator = torch.Generator().manual_seed(rows + vocabulary)
    hidden = torch.randn(rows, width, generator=generator)
    embedding = torch.randn(vocabulary, width, generator=generator) * scale / width**0.5
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets[rows // 2:] = targets[0]
    return [hidden.to(device, dtype), embedding.to(device)], (targets.to(device), softcap)


def mlp_case(shape, width, hidden, slope, tma, dtype, device=CPU):
    generator = torch.Generator().manual_seed(width + hidden)
    x = torch.randn(*shape, width, generator=generator)
    up = torch.randn(hidden, width, generator=generator) / width**0.5
    down = torch.randn(width, hidden, generator=generator) / hidden**0.5
    return [x.to(device, dtype), up.to(device), down.to(device)], (slope,)


def results(function, inputs, rest):
    """Value and gradients under a fixed upstream that differs from place to place."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = function(*inputs, *rest)
    weight = FACTOR * (1 + torch.arange(out.numel(), device=out.device) % 7).reshape(out.shape).to(out.dtype) / 4
    (out * weight).sum().backward()
    return [out.detach(), *(tensor.grad for tensor in inputs)]


def errors(wanted, got):
    """Relative norm errors, one a tensor; infinite where a value is not finite or a shape or dtype is another."""
    return [((w.double() - g.double()).norm() / w.double().norm().clamp_min(1e-12)).item()
            if w.shape == g.shape and w.dtype == g.dtype and g.isfinite().all() else float("inf")
            for w, g in zip(wanted, got, strict=True)]


def poison():
    """Every torch.empty, empty_like and new_empty of a float dtype comes filled with NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        plain = getattr(owner, name)

        def filled(*args, plain=plain, **kwargs):
            out = plain(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() and out.device.type == "cpu" else out

        setattr(owner, name, filled)


def widen_dots():
    """The interpreter multiplies the bit patterns of bf16 as integers; here its operands become fp32 first."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder
    plain = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        wide = [self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)]
        return plain(self, *wide, *rest)

    InterpreterBuilder.create_dot = create_dot


def in_interpreter():
    """Every case in every dtype; prints a JSON object: the case -> its errors."""
    kernels.triton_twins()
    widen_dots()
    found = {}

    def both(hidden, embedding, up, down):
        bent = kernels.mlp_triton(hidden * 2, up, down, 0.5)
        return kernels.mean_nats_triton(bent + hidden, embedding, *rest) * 3

    (hidden, embedding), rest = nats_case(9, 77, 24, 30.0, 1.0, 0, torch.float32)
    (_, up, down), _ = mlp_case((9,), 24, 48, 0.5, True, torch.float32)
    inputs = [hidden, embedding, up, down]
    wanted = results(both, inputs, ())
    for backend in ("eager", "aot_eager"):  # a graph break would raise
        torch.compiler.reset()
        found[backend] = errors(wanted, results(torch.compile(both, fullgraph=True, backend=backend), inputs, ()))
    kernels.triton_twins.__wrapped__()  # as a second copy of the file would: the operations are there already
    operations = torch.ops.sixteen
    half = [hidden.bfloat16(), embedding, up, down]
    for name, args in (("mean_nats", (half[0], half[1], *rest)), ("mlp", (half[0], half[2], half[3], 0.5)),
                       *(("mlp_back", (half[0], half[0], half[2], half[3], *(half[0].new_zeros(9, 48),) * 2, 0.5, on))
                         for on in (True, False))):
        torch.library.opcheck(getattr(operations, name).default, args,
                              test_utils=("test_schema", "test_faketensor"))
    # Weights that want no gradient: none is made, and the input's is the same.
    x = hidden.clone().requires_grad_()
    loose = [torch.autograd.grad(f(x, up, down, 0.5).square().sum(), x)[0]
             for f in (kernels.mlp_reference, kernels.mlp_triton)]
    found["frozen"] = errors(loose[:1], loose[1:])
    poison()
    for dtype in TOLERANCE:
        for case in NATS:
            kernels.CHUNK_LOGITS = case[-1] or 2**26
            inputs, rest = nats_case(*case, getattr(torch, dtype))
            found[f"mean_nats {case} {dtype}"] = errors(results(kernels.mean_nats_reference, inputs, rest),
                                                        results(kernels.mean_nats_triton, inputs, rest))
        for case in MLP:
            kernels.MLP_TILE["TMA"] = case[-1]
            inputs, rest = mlp_case(*case, getattr(torch, dtype))
            found[f"mlp {case} {dtype}"] = errors(results(kernels.mlp_reference, inputs, rest),
                                                  results(kernels.mlp_triton, inputs, rest))
    print(json.dumps(found))


@pytest.fixture(scope="module")
def interpreted():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, for its interpreter")
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=240, cwd=ROOT,
                          env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name, case", [*(("mean_nats", case) for case in NATS), *(("mlp", case) for case in MLP)])
def test_twin_equals_reference_in_the_interpreter(interpreted, name, case, dtype):
    assert max(interpreted[f"{name} {case} {dtype}"]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_operations_do_not_break_a_graph(interpreted, backend):
    assert max(interpreted[backend]) <= TOLERANCE["float32"]


PACKED = """
import importlib.util, json, sys
sys.path.insert(0, sys.argv[1])
import torch, train_gpt as golf
config = golf.load_config(["PRESET=caseops", "OVERLAY="], {}, gpus=0)
open(sys.argv[2], "wb").write(golf.pack_self(config))
spec = importlib.util.spec_from_file_location("packed_gpt", sys.argv[2])
packed = importlib.util.module_from_spec(spec)
sys.modules["packed_gpt"] = packed
spec.loader.exec_module(packed)
packed.triton_twins()
x, up, down = torch.randn(5, 16), torch.randn(24, 16), torch.randn(16, 24)
bent = packed.mlp_triton(x, up, down, 0.5), golf.mlp_reference(x, up, down, 0.5)
targets = torch.randint(0, 24, (5,))
nats = packed.mean_nats_triton(x, up, targets, 30.0), golf.mean_nats_reference(x, up, targets, 30.0)
print(json.dumps([float((got - wanted).norm() / wanted.norm()) for got, wanted in (bent, nats)]))
"""


def test_the_packed_file_has_working_kernels(tmp_path):
    """Packing must leave Triton what it reads from the source: names, constants, annotations."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, for its interpreter")
    done = subprocess.run([sys.executable, "-c", PACKED, str(ROOT), str(tmp_path / "packed_gpt.py")],
                          capture_output=True, text=True, timeout=240, cwd=ROOT,
                          env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    assert max(json.loads(done.stdout.splitlines()[-1])) < 5e-6


def test_frozen_weights_get_no_gradient(interpreted):
    assert max(interpreted["frozen"]) <= TOLERANCE["float32"]


def test_importing_the_file_does_not_import_triton():
    code = f"import sys; import {kernels.__name__}; print('triton' in sys.modules, hasattr(torch.ops.sixteen, 'mlp'))"
    path = str(ROOT)
    done = subprocess.run([sys.executable, "-c", "import torch; " + code], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": path})
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_reasons(monkeypatch):
    assert kernels.triton_unusable(CPU) == "needs a GPU"
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    assert kernels.triton_unusable(cuda) == "needs triton and a C compiler"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: name)
    assert kernels.triton_unusable(cuda) == "needs compute capability 8.0 or later (this is 7.5)"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert kernels.triton_unusable(cuda) is None
    assert kernels.triton_unusable(cuda, 9, 10) == "needs compute capability 9.0 to 10.x (this is 12.0)"


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("softcap, scale", [(30.0, 1.0), (0.0, 1.0), (30.0, 40.0)])
@pytest.mark.parametrize("rows, vocabulary", [(98304, 1024), (20011, 8192), (777, 1000), (64, 20000)])
def test_mean_nats_on_the_gpu(rows, vocabulary, softcap, scale):
    """bf16 against the reference in fp32 on the same numbers."""
    if reason := kernels.triton_unusable(torch.device("cuda")):
        pytest.skip(reason)
    kernels.triton_twins()
    cuda = torch.device("cuda")
    (hidden, embedding), rest = nats_case(rows, vocabulary, 512, softcap, scale, 0, torch.bfloat16, cuda)
    embedding = embedding.bfloat16().float()
    wanted = results(kernels.mean_nats_reference, [hidden.float(), embedding], rest)
    got = results(kernels.mean_nats_triton, [hidden, embedding], rest)
    wanted[1] = wanted[1].to(torch.bfloat16)
    assert max(errors(wanted, got)) <= TOLERANCE["bfloat16"]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("shape, width, hidden", [((48, 2048), 512, 2048), ((3, 1001), 512, 1536), ((77,), 65, 300)])
def test_mlp_on_the_gpu(shape, width, hidden, tma, monkeypatch):
    """bf16 against the reference in fp32 on the same numbers."""
    if reason := kernels.triton_unusable(torch.device("cuda"), 9, 10):
        pytest.skip(reason)
    kernels.triton_twins()
    monkeypatch.setitem(kernels.MLP_TILE, "TMA", tma)
    inputs, rest = mlp_case(shape, width, hidden, 0.5, tma, torch.bfloat16, torch.device("cuda"))
    inputs = [inputs[0], *(weight.bfloat16().float() for weight in inputs[1:])]
    wanted = results(kernels.mlp_reference, [inputs[0].float(), *inputs[1:]], rest)
    got = results(kernels.mlp_triton, inputs, rest)
    assert got[2].dtype is got[3].dtype is torch.float32
    assert max(errors([t.to(g.dtype) for t, g in zip(wanted, got, strict=True)], got)) <= TOLERANCE["bfloat16"]


if __name__ == "__main__":
    in_interpreter()
