"""KERNELS: every fast twin equals its reference in value and gradient; references equal naive formulas."""

import math

import pytest
import torch

from train_gpt import KERNELS, attention_mask, document_index, pick_dtype, pick_kernels, soft_logits

CPU = torch.device("cpu")


def attention_inputs(dtype, length=13, masked=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, length, 6, generator=generator, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(2, 2, length, 6, generator=generator, dtype=dtype, requires_grad=True) for _ in range(2))
    tokens = torch.randint(0, 4, (2, length), generator=generator)
    return (q, k, v), (attention_mask(document_index(tokens)) if masked else None,)


def nats_inputs(dtype, rows=1100, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 8, generator=generator, dtype=dtype, requires_grad=True)
    embedding = torch.randn(17, 8, generator=generator, dtype=dtype, requires_grad=True)
    return (hidden, embedding), (torch.randint(0, 17, (rows,), generator=generator),)


CASES = [("attention", lambda dtype: attention_inputs(dtype)),
         ("attention", lambda dtype: attention_inputs(dtype, length=1)),
         ("attention", lambda dtype: attention_inputs(dtype, length=31, masked=False)),
         *[("mean_nats", lambda dtype, rows=rows, cap=cap: (nats_inputs(dtype, rows)[0],
                                                            (*nats_inputs(dtype, rows)[1], cap)))
           for rows in (1, 512, 1100) for cap in (0.0, 3.0)]]


@pytest.mark.parametrize("name, make", CASES)
def test_twin_equals_reference(name, make):
    kernel = KERNELS[name]
    results = []
    for function in (kernel.reference, kernel.fast):
        inputs, rest = make(torch.float32)
        out = function(*inputs, *rest)
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
    for function, dtype in ((kernel.reference, torch.float32), (kernel.fast, torch.bfloat16)):
        inputs, (mask,) = attention_inputs(torch.float32, length=length)
        cast = [tensor.detach().bfloat16().to(dtype).requires_grad_() for tensor in inputs]
        out = function(*cast, mask)
        out.float().square().sum().backward()
        results.append([out.detach().float(), *(tensor.grad.float() for tensor in cast)])
    for wanted, got in zip(*results, strict=True):
        assert (wanted - got).norm() / wanted.norm() < 0.02


def test_every_kernel_has_a_case():
    assert {name for name, _ in CASES} == set(KERNELS)


def test_attention_reference_is_the_textbook_sum():
    (q, k, v), (mask,) = attention_inputs(torch.float64)
    out = KERNELS["attention"].reference(q, k, v, mask)
    for b, h, t in [(0, 0, 0), (1, 3, 7), (0, 2, 12)]:
        seen = [s for s in range(13) if mask[b, 0, t, s]]
        assert max(seen) <= t
        weights = [math.exp((q[b, h, t] @ k[b, h // 2, s]).item() / math.sqrt(6)) for s in seen]
        wanted = sum(w * v[b, h // 2, s] for w, s in zip(weights, seen, strict=True)) / sum(weights)
        assert torch.allclose(out[b, h, t], wanted, atol=1e-12)


def test_mean_nats_reference_is_the_textbook_mean():
    (hidden, embedding), (targets,) = nats_inputs(torch.float64, rows=5)
    logits = 3 * torch.tanh(hidden @ embedding.T / 3)
    wanted = -(logits.softmax(-1)[torch.arange(5), targets]).log().mean()
    assert torch.allclose(KERNELS["mean_nats"].reference(hidden, embedding, targets, 3.0), wanted, atol=1e-12)
    assert torch.allclose(soft_logits(hidden, embedding, 3.0), logits)


def test_reference_choice_is_honoured_and_said():
    picked, lines = pick_kernels("reference", CPU)
    assert picked.attention is KERNELS["attention"].reference and all("KERNELS=reference" in line for line in lines)
    picked, lines = pick_kernels("auto", torch.device("cuda"))
    assert picked.mean_nats is KERNELS["mean_nats"].reference and "(" in lines[1]


def test_dtype_choice():
    assert pick_dtype("float32", CPU) is torch.float32
    assert pick_dtype("auto", CPU) in (torch.float32, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_sdpa_equals_reference_on_the_gpu():
    kernel = KERNELS["attention"]
    (q, k, v), (mask,) = attention_inputs(torch.float32, length=67)
    wanted = kernel.reference(q, k, v, mask)
    got = kernel.fast(q.cuda(), k.cuda(), v.cuda(), mask.cuda()).cpu()
    assert (wanted - got).abs().max() <= 1e-4
