"""KERNELS: every fast twin equals its reference in value and gradient; references equal naive formulas."""

import math

import numpy as np
import pytest
import torch

from train_gpt import (
    BOS,
    KERNELS,
    ModelSettings,
    attention_mask,
    attention_reference,
    attention_sdpa,
    document_index,
    make_spans,
    pick_dtype,
    pick_kernels,
    row_spans,
    soft_logits,
    span_breaks,
)

CPU = torch.device("cpu")


def attention_inputs(dtype, length=13, masked=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, length, 4, 6, generator=generator, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(2, length, 2, 6, generator=generator, dtype=dtype, requires_grad=True) for _ in range(2))
    tokens = torch.randint(0, 4, (2, length), generator=generator)
    return (q, k, v), (attention_mask(document_index(tokens), tokens.shape) if masked else None,)


def nats_inputs(dtype, rows=1100, seed=0, cap=None):
    """A cap that is a pair is learned: an input with a gradient."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 8, generator=generator, dtype=dtype, requires_grad=True)
    embedding = torch.randn(17, 8, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 17, (rows,), generator=generator)
    if isinstance(cap, tuple):
        return (hidden, embedding, torch.tensor(cap, dtype=dtype, requires_grad=True)), (targets,)
    return (hidden, embedding), (targets, *([] if cap is None else [cap]))


def mlp_inputs(dtype, shape=(2, 5), width=8, hidden=12, slope=0.5):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*size, generator=generator, dtype=dtype, requires_grad=True) for size in
            ((*shape, width), (hidden, width), (width, hidden))], (slope,)


def in_order(name, inputs, rest):
    """The arguments of an operation: the targets of mean_nats stand before a learned cap."""
    return (*inputs[:2], *rest, *inputs[2:]) if name == "mean_nats" else (*inputs, *rest)


CASES = [("attention", lambda dtype: attention_inputs(dtype)),
         ("attention", lambda dtype: attention_inputs(dtype, length=1)),
         ("attention", lambda dtype: attention_inputs(dtype, length=31, masked=False)),
         *[("mean_nats", lambda dtype, rows=rows, cap=cap: nats_inputs(dtype, rows, cap=cap))
           for rows in (1, 512, 1100) for cap in (0.0, 3.0, (3.0, 5.0))],
         ("mlp", lambda dtype: mlp_inputs(dtype)), ("mlp", lambda dtype: mlp_inputs(dtype, (1,), 3, 5, 0.0))]


def usable_twins(name, device=CPU, dtype=torch.float32):
    """The twins of an operation that this machine can run, made."""
    return [twin.make() for twin in KERNELS[name].twins.values() if not twin.unusable(device, dtype, ModelSettings())]


@pytest.mark.parametrize("name, make", CASES)
def test_twins_equal_the_reference(name, make):
    kernel = KERNELS[name]
    for twin in usable_twins(name):
        check_twin(name, kernel, twin, make)


def check_twin(name, kernel, twin, make):
    results = []
    for function in (kernel.reference, twin):
        inputs, rest = make(torch.float32)
        out = function(*in_order(name, inputs, rest))
        weight = torch.arange(out.numel(), dtype=out.dtype).reshape(out.shape).cos()
        (out * weight).sum().backward()
        results.append([out.detach(), *(tensor.grad for tensor in inputs)])
    for place, (wanted, got) in enumerate(zip(*results, strict=True)):
        scale = wanted.abs().max().clamp_min(1e-3)
        tolerance = kernel.gradient_tolerance if place else kernel.value_tolerance
        assert torch.isfinite(got).all()
        assert (wanted - got).abs().max() / scale <= tolerance, place


@pytest.mark.parametrize("length", [33, 300])
def test_bf16_attention_is_as_near_as_bf16_allows(length):
    """Both ways the fast twin takes in bf16, against the fp32 reference on the same numbers."""
    kernel, results = KERNELS["attention"], []
    for function, dtype in ((kernel.reference, torch.float32), (attention_sdpa, torch.bfloat16)):
        inputs, (mask,) = attention_inputs(torch.float32, length=length)
        cast = [tensor.detach().bfloat16().to(dtype).requires_grad_() for tensor in inputs]
        out = function(*cast, mask)
        out.float().square().sum().backward()
        results.append([out.detach().float(), *(tensor.grad.float() for tensor in cast)])
    for wanted, got in zip(*results, strict=True):
        assert (wanted - got).norm() / wanted.norm() < 0.02


def test_every_kernel_has_a_case():
    """Those of recurrences stand in test_06_recurrences.py, those of the feed-forward's parts in test_09_hybrid.py."""
    elsewhere = {"delta", "mlstm", "titans", "deep", "experts", "written", "recalled"}
    assert {name for name, _ in CASES} | elsewhere == set(KERNELS)


def test_attention_reference_is_the_textbook_sum():
    (q, k, v), (mask,) = attention_inputs(torch.float64)
    out = KERNELS["attention"].reference(q, k, v, mask)
    for b, h, t in [(0, 0, 0), (1, 3, 7), (0, 2, 12)]:
        seen = [s for s in range(13) if mask[b, 0, t, s]]
        assert max(seen) <= t
        weights = [math.exp((q[b, t, h] @ k[b, s, h // 2]).item() / math.sqrt(6)) for s in seen]
        wanted = sum(w * v[b, s, h // 2] for w, s in zip(weights, seen, strict=True)) / sum(weights)
        assert torch.allclose(out[b, t, h], wanted, atol=1e-12)


def test_mean_nats_reference_is_the_textbook_mean():
    (hidden, embedding), (targets,) = nats_inputs(torch.float64, rows=5)
    logits = 3 * torch.tanh(hidden @ embedding.T / 3)
    wanted = -(logits.softmax(-1)[torch.arange(5), targets]).log().mean()
    assert torch.allclose(KERNELS["mean_nats"].reference(hidden, embedding, targets, 3.0), wanted, atol=1e-12)
    assert torch.allclose(soft_logits(hidden, embedding, 3.0), logits)
    raw = hidden @ embedding.T
    two = torch.where(raw > 0, 3 * torch.tanh(raw / 3), 2 * torch.tanh(raw / 2))
    assert torch.allclose(soft_logits(hidden, embedding, torch.tensor([3.0, 2.0], dtype=torch.float64)), two)


def test_spans_say_the_same_as_document_numbers():
    """A packed row of N tokens: its spans, and the mask that they stand for, against a count by hand."""
    tokens = np.array([7, 5, BOS, 4, 4, 4, 4, 4, BOS, BOS, 6])
    assert span_breaks(tokens, 3, True).tolist() == [2, 5, 8, 9] and span_breaks(tokens, 4, False).tolist() == [4, 8]
    spans = make_spans(span_breaks(tokens, 3, True), 11, 3, CPU)
    assert len(spans.starts) == 64 and spans.starts[:7].tolist() == [0, 2, 5, 8, 9, 11, 11]
    docs = spans.docs(torch.Size((1, 11)))
    assert docs.tolist() == [[1, 1, 2, 2, 2, 3, 3, 3, 4, 5, 5]]
    assert torch.equal(attention_mask(spans, torch.Size((1, 11))), attention_mask(docs, docs.shape))
    rows = np.array([[0, 0, 1], [1, 1, 2], [2, -1, -1]])
    assert row_spans(rows, CPU).starts[:8].tolist() == [0, 2, 3, 5, 6, 7, 9, 9]
    assert len(make_spans(np.arange(1, 64), 99, 3, CPU).starts) == 128


def test_reference_choice_is_honoured_and_said():
    picked, lines = pick_kernels("reference", CPU)
    assert picked.attention is KERNELS["attention"].reference and all("KERNELS=reference" in line for line in lines)
    picked, lines = pick_kernels("auto", CPU)
    assert picked.attention is attention_sdpa and not picked.packed
    assert lines[0] == "kernel:attention sdpa (fa3: needs a GPU; varlen: needs a GPU)"
    assert "chunked" in lines[1] and picked.mean_nats.__name__ == "mean_nats_chunked"


def test_dtype_choice():
    assert pick_dtype("float32", CPU) is torch.float32
    assert pick_dtype("auto", CPU) in (torch.float32, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_sdpa_equals_reference_on_the_gpu():
    (q, k, v), (mask,) = attention_inputs(torch.float32, length=67)
    wanted = attention_reference(q, k, v, mask)
    got = attention_sdpa(q.cuda(), k.cuda(), v.cuda(), mask.cuda()).cpu()
    assert (wanted - got).abs().max() <= 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", ["fa3", "varlen"])
def test_packed_attention_equals_reference_on_the_gpu(name):
    """bf16 against fp32 on the same numbers, value and gradients, documents of every length from 1."""
    device, twin = torch.device("cuda"), KERNELS["attention"].twins[name]
    if reason := twin.unusable(device, torch.bfloat16, ModelSettings()):
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, 700, heads, 64, generator=generator).bfloat16() for heads in (8, 4, 4)]
    tokens = np.full(700, 5)
    tokens[[0, 1, 2, 10, 200, 201, 460]] = BOS
    breaks, results = span_breaks(tokens, 128, True), []
    for function, dtype in ((attention_reference, torch.float32), (twin.make(), torch.bfloat16)):
        inputs = [tensor.to(device, dtype).requires_grad_() for tensor in drawn]
        spans = make_spans(breaks, 700, 128, device)
        where = attention_mask(spans, torch.Size((1, 700))) if function is attention_reference else spans
        out = function(*inputs, where)
        out.float().square().sum().backward()
        results.append([out.detach().float(), *(tensor.grad.float() for tensor in inputs)])
    for wanted, got in zip(*results, strict=True):
        assert (wanted - got).norm() / wanted.norm() < 0.02
