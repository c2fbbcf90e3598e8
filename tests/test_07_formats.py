"""FORMATS: what is decoded is what was stored; stated error bounds; awkward shapes and weights; the policy; solvers
against slow oracles. The tables are enumerated, so that a new row is tested by standing there."""

import functools
import math
import statistics

import pytest
import torch
from conftest import small_config
from hypothesis import given, settings
from hypothesis import strategies as st

from train_gpt import (
    FORMATS,
    POLICY_KEYS,
    SCALE_LEVELS,
    SCALE_RATIO,
    SCALE_SPAN,
    SOLVERS,
    ArtifactSettings,
    CheckError,
    ConfigError,
    Route,
    as_rows,
    decode_levels,
    encode_levels,
    entropy_bits,
    group_count,
    make_grid,
    parse_policy,
    pick_route,
    project,
    prune_ones,
    solve,
    upper_factor,
)

SHAPES = [(1, 1), (1, 7), (5, 1), (3, 130), (8, 96), (192,), (4, 3, 17)]
GROUPS = [0, 4, 32, 128]
GRIDS = [name for name, form in FORMATS.items() if form.measure]
WHOLE = [name for name in GRIDS if name.startswith(("int", "uint"))]
SCALED = [*GRIDS, "sherry"]
HALVES = {"fp16": 2.0 ** -11, "bf16": 2.0 ** -8}
CASES = [(name, group) for name in FORMATS for group in (GROUPS if name in SCALED else [0])]


def gaussian(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rows_of_scales(shape):
    """Rows from 1e-6 to 1e3 times a Gaussian."""
    weight = gaussian(shape, 3)
    return weight * torch.logspace(-6, 3, len(weight)).view(-1, *[1] * (weight.ndim - 1))


def with_outlier(shape):
    weight = gaussian(shape, 1) * 0.02
    weight.view(-1)[weight.numel() // 2] = 3e4
    return weight


def with_zero_row(shape):
    weight = gaussian(shape, 2) * 0.05
    weight[len(weight) // 2] = 0.0
    return weight


KINDS = {"gaussian": lambda shape: gaussian(shape) * 0.02, "zero": torch.zeros,
         "one value": lambda shape: torch.full(shape, -0.37), "tiny": lambda shape: torch.full(shape, 1e-38),
         "outlier": with_outlier, "scales": rows_of_scales, "zero row": with_zero_row,
         "positive": lambda shape: gaussian(shape, 5).abs() + 0.5}


def every_weight():
    for shape in SHAPES:
        for kind, make in KINDS.items():
            yield f"{kind} {shape}", make(shape)


def spread(scales, columns, group):
    """Scales (R, G) at every column (R, C)."""
    return scales.repeat_interleave(group or columns, 1)[:, :columns]


def steps_of(coded, columns, group):
    """The step (R, C) of every weight, in fp64."""
    return spread(decode_levels(coded.sides, coded.unit, coded.ratio).double(), columns, group)


# -- round trips


@pytest.mark.parametrize("name, group", CASES)
def test_decoding_what_was_encoded_is_the_projection_bit_for_bit(name, group):
    form, route = FORMATS[name], Route(name, group)
    for case, weight in every_weight():
        before = weight.clone()
        coded = form.encode(weight, route)
        decoded = form.decode(coded, route, tuple(weight.shape))
        assert decoded.shape == weight.shape and decoded.dtype == torch.float32, case
        assert torch.isfinite(decoded).all(), case
        assert torch.equal(decoded, project(weight, route)) and torch.equal(weight, before), case
        again = form.encode(weight, route)
        assert torch.equal(coded.codes, again.codes) and coded[2:] == again[2:], case
        assert all(torch.equal(coded.sides[side], again.sides[side]) for side in again.sides), case
        assert coded.codes.dtype == (torch.int16 if name in HALVES else torch.int8), case
        assert form.low <= int(coded.codes.min()) and int(coded.codes.max()) <= form.high, case
        assert type(coded.unit) is float and type(coded.ratio) is float, case
        assert all(side.dtype == torch.int8 for side in coded.sides.values()), case
        assert set(coded.sides) <= {"levels", "groups", "zeros"}
        for side, part in coded.sides.items():
            rows, columns = as_rows(weight).shape
            columns += -columns % 4 if name == "sherry" else 0
            assert part.shape == (rows, 1 if side == "levels" else group_count(columns, group)), case


@pytest.mark.parametrize("sigmas", [3.0, 12.85])
@pytest.mark.parametrize("name", GRIDS)
def test_a_clip_in_deviations_round_trips_too(name, sigmas):
    form = FORMATS[name]
    for group in GROUPS:
        route = Route(name, group, sigmas=sigmas)
        for case, weight in every_weight():
            coded = form.encode(weight, route)
            assert torch.isfinite(form.decode(coded, route, tuple(weight.shape))).all(), case
            assert form.low <= int(coded.codes.min()) and int(coded.codes.max()) <= form.high, case


@pytest.mark.parametrize("name", FORMATS)
def test_projection_does_not_depend_on_layout_or_gradient(name):
    """A transposed view, a leaf with a gradient and a contiguous copy are the same weight."""
    weight = gaussian((24, 16), 4)
    turned = weight.T.contiguous().T
    assert torch.equal(project(turned, Route(name, 8)), project(weight, Route(name, 8)))
    with torch.no_grad():
        assert torch.equal(project(torch.nn.Parameter(weight.clone()), Route(name, 8)), project(weight, Route(name, 8)))


@pytest.mark.parametrize("name", [*HALVES, "fp8"])
def test_projecting_twice_changes_nothing(name):
    for case, weight in every_weight():
        once = project(weight, Route(name))
        assert torch.equal(project(once, Route(name)), once), case


# -- error bounds


@pytest.mark.parametrize("name, group", [(name, group) for name in WHOLE for group in GROUPS])
def test_error_is_at_most_half_a_step(name, group):
    """Where the grid ends at the largest value. Scales are rounded up but for 1e-4 of a level, which the ends of the
    grid may feel."""
    form, route = FORMATS[name], Route(name, group)
    for case, weight in every_weight():
        coded = form.encode(weight, route)
        wide = as_rows(weight).double()
        step = steps_of(coded, wide.shape[1], group)
        error = (wide - as_rows(form.decode(coded, route, tuple(weight.shape))).double()).abs()
        short = (form.high - form.low) * (coded.ratio ** 1e-4 - 1)
        # fp32 products round what is decoded by 2^-24 of its size, up to 255 steps.
        assert (error <= step * (0.5 * (1 + 1e-6) + (short if name.startswith("uint") else 0) + 2.0 ** -16)).all(), case


@pytest.mark.parametrize("name", HALVES)
def test_halves_keep_their_relative_precision(name):
    for case, weight in every_weight():
        error = (weight - project(weight, Route(name))).abs()
        least = torch.finfo({"fp16": torch.float16, "bf16": torch.bfloat16}[name]).smallest_normal
        assert (error <= HALVES[name] * weight.abs().clamp_min(least)).all(), case


def test_fp8_keeps_three_bits_above_its_subnormals():
    for case, weight in every_weight():
        unit = FORMATS["fp8"].encode(weight, Route("fp8")).unit
        largest = float(weight.abs().max())
        assert math.log2(unit).is_integer() and (224 < largest / unit <= 448 or largest < 1e-30)
        error = (weight.double() - project(weight, Route("fp8")).double()).abs()
        assert (error <= weight.double().abs().clamp_min(unit * 2.0 ** -6) * 2.0 ** -4 * (1 + 1e-6)).all(), case


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("scale", ["absmean", "rms", "nonzero"])
def test_ternary_values_are_nought_or_the_scale(scale, group):
    """The pattern is that of the threshold, the scale within half a level of what its name says."""
    for case, weight in every_weight():
        route = Route("ternary", group, scale=scale, tau=0.5)
        coded = FORMATS["ternary"].encode(weight, route)
        wide, found = as_rows(weight).double(), as_rows(project(weight, route)).double()
        step = steps_of(coded, wide.shape[1], group)
        assert ((found.abs() == step) | (found == 0)).all() and (found.sign() * wide.sign() >= 0).all(), case
        if case.startswith("gaussian"):
            for start in range(0, wide.shape[1], group or wide.shape[1]):
                part = slice(start, start + (group or wide.shape[1]))
                size, kept = wide[:, part].abs(), found[:, part] != 0
                base = size.square().mean(1).sqrt() if scale == "rms" else size.mean(1)
                assert torch.equal(kept, size > 0.5 * base[:, None]), case
                wanted = (size * kept).sum(1) / kept.sum(1) if scale == "nonzero" else base
                assert ((step[:, start] / wanted).log().abs() <= 0.501 * math.log(coded.ratio)).all(), case


@pytest.mark.parametrize("group", GROUPS)
def test_binary_values_have_the_size_of_the_groups_mean(group):
    for case, weight in every_weight():
        route = Route("binary", group)
        coded = FORMATS["binary"].encode(weight, route)
        wide, found = as_rows(weight).double(), as_rows(project(weight, route)).double()
        step = steps_of(coded, wide.shape[1], group)
        assert torch.equal(found.abs(), step) and (found.sign() == torch.where(wide < 0, -1.0, 1.0)).all(), case
        if case.startswith(("gaussian", "one value", "positive")):
            for start in range(0, wide.shape[1], group or wide.shape[1]):
                mean = wide[:, start:start + (group or wide.shape[1])].abs().mean(1)
                assert ((step[:, start] / mean).log().abs() <= 0.501 * math.log(coded.ratio)).all(), case


@pytest.mark.parametrize("group", GROUPS)
def test_sherry_drops_the_smallest_of_every_four(group):
    for case, weight in every_weight():
        wide, found = as_rows(weight), as_rows(project(weight, Route("sherry", group)))
        full = wide.shape[1] // 4 * 4
        blocks, decoded = (part[:, :full].reshape(len(wide), -1, 4) for part in (wide, found))
        assert ((decoded == 0).sum(2) == 1).all(), case
        dropped = blocks.abs().masked_fill(decoded != 0, math.inf).amin(2)
        assert torch.equal(dropped, blocks.abs().amin(2)), case
        assert ((decoded.sign() == torch.where(blocks < 0, -1.0, 1.0)) | (decoded == 0)).all(), case


def test_sherrys_scale_is_the_mean_of_its_real_survivors():
    """Also in a row that is no multiple of four: what was added to fill it up is no survivor."""
    found = {}
    for columns in range(1, 9):
        coded = FORMATS["sherry"].encode(torch.full((3, columns), 0.5), Route("sherry"))
        step = decode_levels(coded.sides, coded.unit, coded.ratio)
        found[columns] = round(float(step.max()), 3)
    assert set(found.values()) == {0.5}, found


@pytest.mark.parametrize("name", SCALED)
def test_a_small_row_beside_a_large_one_is_at_most_lifted_to_the_span(name):
    """The scales of one tensor span 2^20: what lies below that may vanish, or be lifted to the smallest scale."""
    weight = gaussian((2, 64), 6)
    weight[0] *= 1e-6
    weight[1] *= 1e3
    found = project(weight, Route(name)).abs().amax(1)
    assert found[0] <= 1.2 * found[1] / SCALE_SPAN


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", [name for name in WHOLE if name.startswith("uint")])
def test_uint_has_a_code_for_zero(name, group):
    """Zero is a point of the asymmetric grid, on either side of which the weights may lie."""
    for shift in (-3.0, -0.5, 0.0, 0.1, 2.0):
        weight = gaussian((6, 130), 8) + shift
        weight[:, ::7] = 0.0
        assert (project(weight, Route(name, group))[:, ::7] == 0).all()


@pytest.mark.parametrize("name", [name for name in WHOLE if name.startswith("int")])
@pytest.mark.parametrize("group", [0, 32])
def test_the_step_follows_k(name, group):
    """SDClip: the grid ends at k deviations, and twice the k is twice every step, within one level."""
    weight, form = gaussian((16, 256), 9) * 0.02, FORMATS[name]
    single, double = (steps_of(form.encode(weight, Route(name, group, sigmas=k)), 256, group) for k in (6.0, 12.0))
    assert ((double / single).log() - math.log(2)).abs().max() <= math.log(SCALE_RATIO) * 1.001
    parts = weight.double().view(16, -1, group or 256)
    wanted = spread(6.0 * parts.std(2, correction=0) / form.high, 256, group)
    assert (single / wanted).log().min() >= -1e-5
    assert (single / wanted).log().max() <= math.log(SCALE_RATIO) * 1.001


def test_stretch_is_a_factor_on_every_step():
    weight = gaussian((16, 256), 10)
    for name in WHOLE:
        plain, wide = (steps_of(FORMATS[name].encode(weight, Route(name, stretch=factor)), 256, 0)
                       for factor in (1.0, 1.7))
        assert torch.allclose(wide / plain, torch.tensor(1.7, dtype=torch.float64), rtol=0.021), name


def test_a_quantile_is_of_the_rows_magnitudes():
    weight = gaussian((4, 1001), 11, torch.float64)
    coded = FORMATS["int4"].encode(weight, Route("int4", quantile=0.9))
    ends = steps_of(coded, 1001, 0)[:, 0] * 7
    wanted = weight.abs().sort(1).values[:, 900]
    assert (ends / wanted).log().min() >= -1e-5 and (ends / wanted).log().max() <= math.log(1.0201)


@pytest.mark.parametrize("kind", ["int", "uint"])
def test_more_bits_mean_less_error(kind):
    weight = gaussian((16, 256))
    errors = [(project(weight, Route(f"{kind}{bits}", 64)) - weight).norm() for bits in range(2, 9)]
    assert all(a > 1.7 * b for a, b in zip(errors, errors[1:], strict=False))


def test_fine_columns_have_a_finer_grid_and_the_rest_the_same():
    weight, route = gaussian((8, 96), 12), Route("int4", 32, sigmas=3.0)
    fine = route._replace(fine=(40, 72, 7))
    plain, found = project(weight, route), project(weight, fine)
    inside = torch.zeros(96, dtype=torch.bool)
    inside[40:72] = True
    assert torch.equal(found[:, ~inside], plain[:, ~inside])
    ends = 7 * steps_of(FORMATS["int4"].encode(weight, route), 96, 32)
    beyond = (weight.abs() > ends) & inside  # both grids have the same ends
    assert beyond.any() and torch.allclose(found[beyond].abs().double(), ends[beyond], rtol=1e-5)
    kept = (weight.abs() < ends)[:, inside]
    errors = [((part - weight)[:, inside] * kept).norm() for part in (found, plain)]
    assert errors[0] < errors[1] * 7 / 63 * 1.5
    assert FORMATS["int4"].encode(weight, fine).codes.abs().max() > 7


def test_halves_refuse_what_they_cannot_hold():
    with pytest.raises(CheckError, match="does not fit fp16, whose largest value is 65504"):
        project(torch.tensor([1e6]), Route("fp16"))
    assert torch.isfinite(project(torch.tensor([1e6]), Route("bf16"))).all()


# -- scale levels


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 9), st.integers(-20, 20), st.integers(0, 10 ** 6),
       st.booleans())
def test_scale_levels_are_near_what_was_wanted(rows, groups, decades, order, seed, up):
    """Any span, any order of magnitude: up to half a level away, or (up) never below and less than one level above;
    what is 2^20 times smaller than the largest counts as that."""
    random = torch.rand((rows, groups), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wanted = 10.0 ** (order + decades * (random - 1))
    sides, unit, ratio = encode_levels(wanted, up)
    assert sides["levels"].shape == (rows, 1) and sides["levels"].min() >= 0
    assert all(side.dtype == torch.int8 for side in sides.values()) and ("groups" in sides) == (groups > 1)
    assert 1 <= ratio < 2 and 0 < unit * ratio ** SCALE_LEVELS < 1e30
    found = decode_levels(sides, unit, ratio)
    assert found.shape == (rows, groups) and found.dtype == torch.float32
    floor = wanted.clamp_min(float(wanted.max()) / SCALE_SPAN)
    away = (found.double() / floor).log() / math.log(ratio)
    low, high = (-2e-4, 1 + 1e-3) if up else (-0.501, 0.501)
    assert low <= float(away.min()) and float(away.max()) <= high


def test_scale_levels_of_zeros_are_positive_and_finite():
    for up in (True, False):
        sides, unit, ratio = encode_levels(torch.zeros(3, 4), up)
        found = decode_levels(sides, unit, ratio)
        assert unit > 0 and (found > 0).all() and torch.isfinite(found).all()


def test_scale_levels_decode_from_integers_and_products_alone():
    """Level n is unit * ratio^n, multiplied out one by one in fp64: the same bits on any machine."""
    unit, ratio, value, wanted = 0.25, float(torch.tensor(1.02)), 0.25, []
    for _ in range(SCALE_LEVELS):
        wanted.append(value)
        value *= ratio
    found = decode_levels({"levels": torch.arange(SCALE_LEVELS, dtype=torch.int8)[:, None]}, unit, ratio)
    assert torch.equal(found[:, 0], torch.tensor(wanted, dtype=torch.float64).float())
    beyond = {"levels": torch.tensor([[127], [0]], dtype=torch.int8), "groups": torch.tensor([[1, 127], [-1, 0]],
                                                                                             dtype=torch.int8)}
    assert torch.isfinite(decode_levels(beyond, unit, ratio)).all()


# -- the policy


def artifact(**more):
    return small_config(**more).artifact


POLICY = "*.down.weight: int5 group=64 k=3.5 solver=nearest codec=brotli; embedding: ternary tau=0.7 scale=rms ;; " \
         "blocks.?.mixer.q.weight: uint3"


def test_policy_reads_every_key():
    assert parse_policy(POLICY) == (
        ("*.down.weight", {"format": "int5", "group": 64, "sigmas": 3.5, "solver": "nearest", "codec": "brotli"}),
        ("embedding", {"format": "ternary", "tau": 0.7, "scale": "rms"}),
        ("blocks.?.mixer.q.weight", {"format": "uint3"}))
    assert parse_policy("") == parse_policy(" ; ") == ()
    assert {field for field, _, _ in POLICY_KEYS.values()} < set(Route._fields)


@given(st.lists(st.tuples(st.sampled_from(["*", "matrix", "blocks.*.up.weight"]), st.sampled_from([*FORMATS]),
                          st.floats(0, 99), st.integers(0, 999), st.sampled_from(["absmean", "rms", "nonzero"]),
                          st.sampled_from([*SOLVERS])), min_size=1, max_size=4))
def test_policy_round_trips(rows):
    text = ";".join(f"{pattern}: {name} k={k!r} group={group} scale={scale} solver={solver}"
                    for pattern, name, k, group, scale, solver in rows)
    assert parse_policy(text) == tuple(
        (pattern, {"format": name, "sigmas": k, "group": group, "scale": scale, "solver": solver})
        for pattern, name, k, group, scale, solver in rows)


@pytest.mark.parametrize("row, said", [
    ("int8", "must be a pattern, a colon"), (": int8", "must be a pattern, a colon"),
    ("matrix:", "must be a pattern, a colon"), ("matrix int8", "must be a pattern, a colon"),
    ("matrix: int9", "int9 is not a format"), ("matrix: int1", "int1 is not a format"),
    ("matrix: uint16", "uint16 is not a format"), ("matrix: float8", "float8 is not a format"),
    ("matrix: k=x", "k=x: must be a number"), ("matrix: k=nan", "k=nan: must be a number"),
    ("matrix: k=inf", "k=inf: must be a number"), ("matrix: k=-1", "k=-1: must be a number, not negative"),
    ("matrix: group=1.5", "group=1.5: must be a whole number"), ("matrix: group=-4", "group=-4: must be a whole"),
    ("matrix: group=", "group=: must be a whole number"), ("matrix: tau=-0.1", "tau=-0.1: must be a number"),
    ("matrix: scale=max", "scale=max: must be absmean, rms or nonzero"),
    ("matrix: solver=magic", "solver=magic: must be nearest or gptq"),
    ("matrix: codec=rar", "codec=rar: must be"), ("matrix: bits=4", "bits=4: must be one of k, group")])
def test_a_bad_policy_names_its_row(row, said):
    for text in (row, f"embedding: int8; {row}; gain: bf16"):
        with pytest.raises(ConfigError) as caught:
            parse_policy(text)
        assert str(caught.value).startswith(f"POLICY={row}: ") and said in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


def test_the_settings_are_rows_of_the_policy():
    plain = artifact(MATRIX_BITS=6, EMBED_BITS=7, MATRIX_CLIP_SIGMAS=12, ATTN_CLIP_SIGMAS=13, MLP_CLIP_SIGMAS=11.5,
                     EMBED_CLIP_SIGMAS=20, GROUP_SIZE=32, SOLVER="gptq", GAIN_FORMAT="bf16", CLIP_QUANTILE=0.99)
    q, up, other, embedding, gain = (pick_route(name, role, plain) for name, role in (
        ("blocks.0.mixer.q.weight", "matrix"), ("blocks.1.mlp.up.weight", "matrix"), ("other", "matrix"),
        ("tok_emb", "embedding"), ("blocks.0.attn_scale", "gain")))
    assert [route.sigmas for route in (q, up, other, embedding)] == [13, 11.5, 12, 20]
    assert [route.format for route in (q, up, other, embedding, gain)] == ["int6", "int6", "int6", "int7", "bf16"]
    assert {(route.group, route.solver, route.quantile) for route in (q, up, other, embedding)} == {(32, "gptq", 0.99)}
    assert gain.solver == "nearest" and gain.group == 0 and gain.codec == "auto"
    half = artifact(MLP_CLIP_SIGMAS=9, MATRIX_CLIP_SIGMAS=5)
    assert pick_route("blocks.0.mixer.q.weight", "matrix", half).sigmas == 5
    assert pick_route("blocks.0.mlp.up.weight", "matrix", half).sigmas == 9


def test_the_users_row_wins_field_by_field_and_the_first_one_first():
    chosen = artifact(POLICY="*.q.weight: k=9; *.mixer.*: int4 k=7 codec=zlib; matrix: group=16; embedding: uint5",
                      MATRIX_BITS=6, ATTN_CLIP_SIGMAS=3, MATRIX_CLIP_SIGMAS=2, SOLVER="gptq")
    q = pick_route("blocks.0.mixer.q.weight", "matrix", chosen)
    assert (q.sigmas, q.format, q.codec, q.group, q.solver) == (9, "int4", "zlib", 16, "gptq")
    k = pick_route("blocks.0.mixer.k.weight", "matrix", chosen)
    assert (k.sigmas, k.format, k.codec, k.group) == (7, "int4", "zlib", 16)
    up = pick_route("blocks.0.mlp.up.weight", "matrix", chosen)
    assert (up.sigmas, up.format, up.codec, up.group) == (2, "int6", "auto", 16)
    assert pick_route("tok_emb", "embedding", chosen).format == "uint5"
    plain = artifact(POLICY="tok_*: fp8", SOLVER="nearest")
    assert pick_route("tok_emb", "embedding", plain).format == "fp8"


def test_solving_a_format_without_a_grid_is_a_mistake_only_where_it_was_asked_for():
    name = "blocks.0.mlp.up.weight"
    for kind in set(FORMATS) - set(GRIDS):
        with pytest.raises(ConfigError, match=f"{name}: {kind} has no grid for solver=gptq"):
            pick_route(name, "matrix", artifact(POLICY=f"matrix: {kind} solver=gptq"))
        plain = artifact(POLICY=f"matrix: {kind} solver=nearest", SOLVER="gptq")
        assert pick_route(name, "matrix", plain).format == kind
    assert pick_route(name, "matrix", artifact(MATRIX_FORMAT="sherry", SOLVER="gptq")).solver == "nearest"


def test_another_format_for_one_tensor_does_not_need_another_solver():
    """SOLVER=gptq is for what has a grid; a row that gives one tensor a format without one did not ask for it."""
    assert pick_route("tok_emb", "embedding", artifact(POLICY="embedding: fp8", SOLVER="gptq")).solver == "nearest"


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_can_be_chosen_by_policy(name):
    assert pick_route("x", "matrix", artifact(POLICY=f"matrix: {name}", SOLVER="nearest")).format == name


# -- solvers


EYE = functools.partial(torch.eye, dtype=torch.float64)


def case(rho, seed=0, rows=128, columns=256, samples=2048):
    """Gaussian weights (R, C), and the moments (C, C) of an AR(1) process over the columns; fp64."""
    noise, x = gaussian((samples, columns), seed, torch.float64), torch.empty(samples, columns, dtype=torch.float64)
    x[:, 0] = noise[:, 0]
    for column in range(1, columns):
        x[:, column] = rho * x[:, column - 1] + math.sqrt(1 - rho ** 2) * noise[:, column]
    return gaussian((rows, columns), 1000 + seed, torch.float64), x.T @ x


def grid_of(weight, route):
    form = FORMATS[route.format]
    return make_grid(form.measure(weight, route, form.bits), route, weight.shape[1], form.low, form.high)


def solved(solver, weight, route, hessian, **more):
    return SOLVERS[solver](weight, grid_of(weight, route), hessian, ArtifactSettings(**more))


def output_error(weight, route, hessian, codes):
    """tr(E H E^T)."""
    error = weight - grid_of(weight, route).value(codes)
    return float(((error @ hessian) * error).sum())


GPTQ_ROUTES = [Route("int4"), Route("int5", sigmas=3.0), Route("int6", 32), Route("int2"), Route("uint4", 64),
               Route("uint3", sigmas=2.5), Route("ternary", 32), Route("ternary", scale="nonzero", tau=0.7),
               Route("binary", 16), Route("int4", fine=(16, 48, 7)), Route("int8", stretch=8.0)]


def shown(route):
    return ",".join(f"{key}={value}" for key, value in route._asdict().items()
                    if value != Route._field_defaults.get(key))


def oracle(weight, grid, hessian, damping=0.01):
    """GPTQ as the paper writes it, with the inverse written out: a column is rounded, its error over the inverse's
    diagonal is taken from all later columns, and the inverse loses a column (arXiv 2210.17323, equations 2 and 3)."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    inverse = torch.linalg.inv(hessian + damping * hessian.diagonal().mean() * EYE(len(hessian)))
    rest, codes = weight.clone(), torch.zeros_like(weight)
    for place, column in enumerate(order):
        own = grid.columns(slice(column, column + 1))
        codes[:, column:column + 1] = own.snap(rest[:, column:column + 1])
        error = (rest[:, column] - own.value(codes[:, column:column + 1])[:, 0]) / inverse[column, column]
        later = order[place + 1:]
        rest[:, later] -= error[:, None] * inverse[column, later]
        inverse = inverse - inverse[:, column:column + 1] @ inverse[column:column + 1] / inverse[column, column]
    return codes


def cholesky_oracle(weight, grid, hessian, damping=0.01):
    """The same through the upper Cholesky factor of the explicit inverse, row by row and column by column."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    damped = (hessian + damping * hessian.diagonal().mean() * EYE(len(hessian)))[order][:, order]
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    rest, codes = weight[:, order].clone(), torch.zeros_like(weight)
    for place in range(weight.shape[1]):
        own = grid.columns(order[place:place + 1])
        code = own.snap(rest[:, place:place + 1])
        codes[:, order[place]] = code[:, 0]
        error = (rest[:, place:place + 1] - own.value(code)) / upper[place, place]
        rest[:, place + 1:] -= error * upper[place, place + 1:]
    return codes


@pytest.mark.parametrize("route", GPTQ_ROUTES, ids=shown)
@pytest.mark.parametrize("slow", [oracle, cholesky_oracle])
def test_gptq_equals_the_slow_oracle(route, slow):
    weight, hessian = case(0.8, 3, rows=24, columns=64, samples=512)
    hessian = hessian * torch.linspace(0.5, 2, 64)[:, None].sqrt() * torch.linspace(0.5, 2, 64).sqrt()
    wanted = slow(weight, grid_of(weight, route), hessian)
    for block in (1, 7, 64, 128):
        assert torch.equal(solved("gptq", weight, route, hessian, gptq_block=block), wanted), block


@pytest.mark.parametrize("route", GPTQ_ROUTES, ids=shown)
def test_gptq_on_a_diagonal_hessian_is_nearest(route):
    weight = gaussian((32, 96), 5, torch.float64)
    hessian = torch.diag(gaussian((96,), 6, torch.float64).square() + 0.1)
    assert torch.equal(solved("gptq", weight, route, hessian), solved("nearest", weight, route, hessian))


@pytest.mark.parametrize("route", GPTQ_ROUTES, ids=shown)
def test_gptq_is_better_than_nearest(route):
    ratios = []
    for seed in range(6):
        weight, hessian = case(0.7, seed, rows=32, columns=96, samples=512)
        ratios.append(output_error(weight, route, hessian, solved("gptq", weight, route, hessian))
                      / output_error(weight, route, hessian, solved("nearest", weight, route, hessian)))
    assert statistics.mean(ratios) < 1, ratios


@pytest.mark.parametrize("rho, most", [(0.9, 0.27), (0.8, 0.43)])
def test_gptq_on_correlated_inputs_reaches_the_promised_ratio(rho, most):
    """Median of 20 seeds, 128x256, 2,048 samples, grids that end at the largest value of the row (CLIP_QUANTILE=1)."""
    ratios = {4: [], 5: [], 6: []}
    for seed in range(20):
        weight, hessian = case(rho, seed)
        for bits, found in ratios.items():
            route = Route(f"int{bits}")
            errors = [output_error(weight, route, hessian, solved(solver, weight, route, hessian))
                      for solver in ("gptq", "nearest")]
            found.append(errors[0] / errors[1])
    assert all(statistics.median(found) <= most for found in ratios.values()), ratios


@pytest.mark.parametrize("route", GPTQ_ROUTES, ids=shown)
def test_columns_without_input_cost_nothing(route):
    """Their value is zero where the grid has one, nothing is pushed out of or into them, and nothing is NaN."""
    weight, hessian = case(0.8, 1, rows=16, columns=64, samples=512)
    dead = torch.zeros(64, dtype=torch.bool)
    dead[[0, 5, 20, 63]] = True
    hessian[dead] = hessian[:, dead] = 0
    codes = solved("gptq", weight, route, hessian)
    grid = grid_of(weight, route)
    assert torch.isfinite(codes).all()
    if route.format != "binary":
        assert (grid.value(codes)[:, dead] == 0).all()
    # The others come out as if the dead columns were not there; a dead one counts 1 in the mean that damps.
    alive = ~dead
    sure = hessian.clone()
    sure[dead, dead] = sure.diagonal().mean()
    error = (weight - grid.value(codes))[:, alive]
    wanted = (weight - grid.value(oracle(torch.where(dead, 0.0, weight), grid, sure)))[:, alive]
    costs = [float(((part @ hessian[alive][:, alive]) * part).sum()) for part in (error, wanted)]
    assert costs[0] == pytest.approx(costs[1], rel=0.05)


@pytest.mark.parametrize("dead", [False, True])
def test_gptq_does_not_depend_on_the_unit_of_the_hessian(dead):
    """A power of two times the Hessian is the same question; with and without columns that saw no input."""
    weight, hessian = case(0.9, 2, rows=32, columns=64, samples=512)
    if dead:
        hessian[:4] = hessian[:, :4] = 0
    wanted = solved("gptq", weight, Route("int4"), hessian)
    for factor in (2.0 ** -24, 2.0 ** 24):
        assert torch.equal(solved("gptq", weight, Route("int4"), hessian * factor), wanted), factor


def test_no_input_at_all_is_no_fault():
    weight = gaussian((8, 16), 1, torch.float64)
    assert torch.isfinite(solved("gptq", weight, Route("int4"), torch.zeros(16, 16, dtype=torch.float64))).all()


@pytest.mark.parametrize("damping", [0.01, 1e-4, 1e-8])
def test_fewer_samples_than_columns_are_no_fault(damping):
    """fp32 moments of a handful of tokens: the damping makes them invertible, or one line says that it is too small."""
    x = gaussian((60, 256), 2) * torch.logspace(0, 3, 256)
    weight = gaussian((16, 256), 3, torch.float64)
    try:
        found = solved("gptq", weight, Route("int4"), x.T @ x, gptq_damping=damping)
    except (ConfigError, CheckError) as error:
        assert "GPTQ_DAMPING" in str(error) and damping < 1e-6
        return
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("damping", [0.01, 1e-8, 1.0])
def test_upper_factor_inverts_the_damped_hessian(damping):
    hessian = case(0.9, 4, columns=96)[1]
    upper = upper_factor(hessian, damping)
    assert torch.equal(upper, upper.triu()) and (upper.diagonal() > 0).all()
    damped = hessian + damping * hessian.diagonal().mean() * EYE(96)
    assert torch.allclose(upper.T @ upper @ damped, EYE(96), atol=1e-9)
    wanted = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert torch.allclose(upper, wanted, rtol=1e-6, atol=1e-12)


def entropy(codes):
    return entropy_bits(codes.to(torch.int8).numpy()) / codes.numel()


@pytest.mark.parametrize("route", [Route("int4", sigmas=6.0), Route("int6", sigmas=13.0), Route("int5", 64),
                                   Route("uint4", sigmas=6.0), Route("uint5")], ids=shown)
@pytest.mark.parametrize("kind", ["centred", "shifted", "lopsided"])
def test_rate_rounding_buys_bits_with_error(route, kind):
    """Entropy falls with the rate, the error grows by less than the same entropy costs through wider steps."""
    weight, hessian = case(0.5, 7, rows=64, columns=128, samples=1024)
    weight = {"centred": weight, "shifted": weight + 0.4, "lopsided": weight + 3}[kind]
    if kind == "lopsided":  # a grid with a zero point, on which neither zero nor the middle is where the weights are
        weight[:, 0] = 12.0
    found = [solved("gptq", weight, route, hessian, rate_rounding=rate) for rate in (0.0, 1.0, 3.0)]
    bits = [entropy(codes) for codes in found]
    assert bits[0] > bits[1] > bits[2], bits
    if kind == "lopsided":  # the outlier is clipped, and wider steps clip less of it
        costs = [output_error(weight, route, hessian, codes) for codes in found]
        assert costs[1] <= 1.02 * costs[0], costs
        return
    wider = next(wide for factor in range(102, 200, 2) for wide in [route._replace(stretch=factor / 100)]
                 if entropy(solved("gptq", weight, wide, hessian)) <= bits[1])
    errors = [output_error(weight, wide, hessian, codes) for wide, codes in
              ((route, found[1]), (wider, solved("gptq", weight, wider, hessian)))]
    assert errors[0] <= 1.02 * errors[1], errors


@pytest.mark.parametrize("route", [Route("int4", sigmas=6.0), Route("ternary", 32), Route("int5", 64, sigmas=10.0)],
                         ids=shown)
@pytest.mark.parametrize("share", [0.0, 0.003, 0.1, 0.5, 1.0])
def test_pruning_zeroes_the_promised_share_of_ones_and_picks_cheap_ones(route, share):
    weight, hessian = case(0.8, 8, rows=48, columns=128, samples=1024)
    grid, codes = grid_of(weight, route), solved("gptq", weight, route, hessian)
    before = codes.clone()
    pruned = prune_ones(weight, codes, grid, hessian, share)
    changed, ones = pruned != codes, codes.abs() == 1
    assert torch.equal(codes, before) and int(changed.sum()) == int(share * int(ones.sum()))
    assert (codes[changed].abs() == 1).all() and (pruned[changed] == 0).all()
    if 0 < share <= 0.1:
        places = ones.flatten().nonzero()[:, 0]
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
        other = codes.clone(memory_format=torch.contiguous_format)
        other.view(-1)[places[order[:int(changed.sum())]]] = 0
        costs = [output_error(weight, route, hessian, part) for part in (pruned, other)]
        assert costs[0] < costs[1], costs


def test_pruning_one_code_picks_the_very_cheapest():
    """Against every single change, tried one by one."""
    weight, hessian = case(0.8, 9, rows=6, columns=24, samples=256)
    route = Route("ternary")
    grid, codes = grid_of(weight, route), solved("gptq", weight, route, hessian)
    ones = (codes.abs() == 1).flatten().nonzero()[:, 0].tolist()
    costs = {}
    for place in ones:
        other = codes.clone(memory_format=torch.contiguous_format)
        other.view(-1)[place] = 0
        costs[place] = output_error(weight, route, hessian, other)
    pruned = prune_ones(weight, codes, grid, hessian, 1.5 / len(ones))
    assert (pruned != codes).flatten().nonzero()[:, 0].tolist() == [min(costs, key=costs.get)]


# -- solve: format, solver and pruning together


@pytest.mark.parametrize("name", FORMATS)
def test_solving_by_nearest_is_the_projection(name):
    """So that weights trained with QAT are stored as they were trained, Hessian or not."""
    weight, hessian = gaussian((24, 64), 2), case(0.8, 3, columns=64)[1].float()
    for given_hessian in (None, hessian):
        coded = solve(weight, Route(name, 16), given_hessian, ArtifactSettings())
        assert torch.equal(FORMATS[name].decode(coded, Route(name, 16), (24, 64)), project(weight, Route(name, 16)))


@pytest.mark.parametrize("name", GRIDS)
def test_a_solved_tensor_decodes_to_the_solvers_points(name):
    weight, hessian = gaussian((24, 64), 2), case(0.8, 3, columns=64)[1].float()
    route = Route(name, 16, solver="gptq")
    coded = solve(weight, route, hessian, ArtifactSettings())
    form, wide = FORMATS[name], weight.double()
    codes = solved("gptq", wide, route, hessian)
    assert torch.equal(coded.codes.double(), codes) and coded.codes.dtype == torch.int8
    assert torch.equal(form.decode(coded, route, (24, 64)), grid_of(wide, route).value(codes.float()))
    with pytest.raises(ConfigError, match="SOLVER=gptq: no input of this tensor was seen"):
        solve(weight, route, None, ArtifactSettings())


def test_pruning_leaves_tensors_alone_that_saw_no_input_or_have_no_ones():
    """PRUNE_ONES is for what calibration has seen; a gain on a grid is stored as without it."""
    weight, hessian = gaussian((24, 64), 2), case(0.8, 3, columns=64)[1].float()
    pruning = ArtifactSettings(prune_ones=0.2)

    def plain(weight, name, group=0):
        return FORMATS[name].encode(weight, Route(name, group)).codes
    for name in ("uint4", "sherry", "fp8", "fp16"):
        assert torch.equal(solve(weight, Route(name), hessian, pruning).codes, plain(weight, name))
    pruned = solve(weight, Route("ternary", 16), hessian, pruning).codes
    before = plain(weight, "ternary", 16)
    assert int((pruned != before).sum()) == int(0.2 * int(before.abs().sum()))
    gain = gaussian((64,), 3)
    assert torch.equal(solve(gain, Route("int8"), None, pruning).codes, plain(gain, "int8"))
