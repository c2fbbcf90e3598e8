"""FORMATS: what is decoded is what was stored; error bounds; awkward shapes."""

import pytest
import torch

from train_gpt import FORMATS, CheckError, Clip, decode_grid, encode_grid

GRIDS = [name for name, form in FORMATS.items() if name.startswith("int")]
SHAPES = [(1, 1), (3, 7), (5, 64), (1, 200)]
CLIPS = [Clip(0.0, 0.9999984), Clip(0.0, 1.0), Clip(3.0, 1.0), Clip(12.85, 1.0)]


def weights(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("clip", CLIPS)
def test_decoding_is_stable_and_on_the_grid(name, shape, clip):
    form = FORMATS[name]
    coded = form.encode(weights(shape), form.bits, clip)
    decoded = form.decode(coded)
    assert decoded.shape == shape and decoded.dtype == torch.float32 and torch.isfinite(decoded).all()
    if coded.scales is not None:
        top = 2 ** (form.bits - 1) - 1
        assert coded.codes.dtype == torch.int8 and coded.codes.abs().max() <= top
        assert coded.scales.shape == (shape[0],) and coded.scales.dtype == torch.float16


@pytest.mark.parametrize("name", GRIDS)
def test_error_is_at_most_half_a_step_inside_the_clip(name):
    form, weight = FORMATS[name], weights((6, 300))
    coded = form.encode(weight, form.bits, Clip(0.0, 1.0))
    step = coded.scales.float()[:, None]
    # The fp16 scale may be rounded down, so the largest weight may lie a little beyond the last point.
    end = step * (2 ** (form.bits - 1) - 1)
    assert ((weight.clamp(-end, end) - decode_grid(coded)).abs() <= step * 0.5 * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", FORMATS)
def test_zero_and_constant_rows(name):
    form = FORMATS[name]
    weight = torch.stack([torch.zeros(9), torch.full((9,), 0.5), torch.full((9,), -1e-9)])
    decoded = form.decode(form.encode(weight, form.bits, Clip(3.0, 1.0)))
    assert torch.isfinite(decoded).all() and (decoded[0] == 0).all()
    assert torch.allclose(decoded[1], torch.full((9,), 0.5), rtol=1e-3)


def test_more_bits_mean_less_error():
    weight = weights((16, 256))
    errors = [(FORMATS[name].decode(FORMATS[name].encode(weight, FORMATS[name].bits, Clip(0.0, 1.0))) - weight).norm()
              for name in GRIDS]
    assert all(a > 1.7 * b for a, b in zip(errors, errors[1:], strict=False))


def test_clip_in_deviations_sets_the_step():
    weight = weights((4, 4096))
    coded = encode_grid(weight, 6, Clip(12.85, 1.0))
    wanted = 12.85 * weight.double().std(dim=1, correction=0) / 31
    assert torch.allclose(coded.scales.double(), wanted, rtol=1e-3)


def test_fp16_refuses_what_it_cannot_hold():
    with pytest.raises(CheckError, match="65504"):
        FORMATS["fp16"].encode(torch.tensor([1e6]), 16, Clip(0.0, 1.0))
