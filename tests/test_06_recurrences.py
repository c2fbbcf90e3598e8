"""KERNELS, the recurrences: chunked forms against their token loops, in values, final states and all gradients; what
they are in closed form; strong decay, gates at their limits, states carried on, causality, documents."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, small_config

import train_gpt
from train_gpt import (
    KERNELS,
    Context,
    ModelSettings,
    Picked,
    Sites,
    document_index,
    ends,
    kernels_of,
    make_delta_fla,
    make_spans,
    pick_kernels,
)

NAMES = ["delta", "mlstm", "titans", "deep"]
BATCH, HEADS, KEY, VALUE = 2, 2, 6, 10
CHUNK = 16  # of deep, whose chunks are part of what it computes
LIMITS = {torch.float64: 1e-11, torch.float32: 5e-4}


def inputs(name, length, dtype=torch.float64, seed=0, gates=None):
    """Inputs of a recurrence with gradients; `gates` overrides all gates with a constant."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def gate(scale=1.0):
        found = torch.rand(BATCH, length, HEADS, generator=generator, dtype=torch.float64) * scale
        return found if gates is None else torch.full_like(found, gates)
    q, k = (F.normalize(draw(BATCH, length, HEADS, KEY), dim=-1) for _ in range(2))
    v = draw(BATCH, length, HEADS, VALUE)
    more = {"delta": lambda: [gate(2.0), -2 * gate()],
            "mlstm": lambda: [4 * draw(BATCH, length, HEADS), 4 * draw(BATCH, length, HEADS) + 2],
            "titans": lambda: [1 - 0.2 * gate(), 0.95 * gate(), gate()],
            "deep": lambda: [1 - 0.2 * gate(), 0.95 * gate(), gate() / CHUNK, draw(HEADS, 8, KEY) / KEY ** 0.5,
                             draw(HEADS, VALUE, 8) / 8 ** 0.5]}[name]()
    return [x.to(dtype).requires_grad_() for x in (q, k, v, *more)]


def parts(name, state):
    """A state as tensors that are the same however it is scaled."""
    if name == "mlstm":
        return [state[0] * (state[1] - state[1].detach().amax()).exp()[..., None, None]]
    return [state] if isinstance(state, torch.Tensor) else list(state)


def results(name, function, held, where=None, size=CHUNK):
    """Output, final state and the gradients of both together."""
    out, state = function(*held, where, None, size)
    found = [out, *parts(name, state)]
    loss = sum((x * torch.arange(x.numel(), dtype=x.dtype).reshape(x.shape).cos()).sum() for x in found)
    return [x.detach() for x in (*found, *torch.autograd.grad(loss, held))]


def documents(length, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(BATCH, length, generator=generator) < 0.06).cumsum(1).int()


@pytest.mark.parametrize("where", [None, "documents", "spans"])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", NAMES)
def test_chunks_are_the_token_loop(name, dtype, where):
    """Largest error over largest value, of outputs, final states and every gradient; ragged and whole chunks."""
    kernel = KERNELS[name]
    for length in (150, 128, 5):
        docs = None if where is None else documents(length)
        for size in (CHUNK,) if name == "deep" else (CHUNK, 64):
            held = inputs(name, length, dtype)
            wanted = results(name, kernel.reference, held, docs, size)
            if where == "spans":
                # The rows behind each other, as one packed row.
                breaks = torch.nonzero(F.pad(docs[:, 1:] != docs[:, :-1], (1, 0), value=True).flatten())[1:, 0]
                flat = [x.detach().flatten(0, 1)[None].requires_grad_() if x.shape[0] == BATCH and x.shape[:2] == (
                    BATCH, length) else x for x in held]
                spans = make_spans(breaks.numpy(), BATCH * length, length, torch.device("cpu"))
                if name == "deep" and length % CHUNK:
                    continue
                got = kernel.twins["chunked"].make()(*flat, spans, None, size)[0]
                assert (got.view_as(wanted[0]) - wanted[0]).abs().max() <= LIMITS[dtype] * wanted[0].abs().max()
                continue
            got = results(name, kernel.twins["chunked"].make(), held, docs, size)
            for place, (a, b) in enumerate(zip(wanted, got, strict=True)):
                assert torch.isfinite(b).all()
                assert (a - b).abs().max() <= LIMITS[dtype] * a.abs().max().clamp_min(1e-12), place


@pytest.mark.parametrize("name", NAMES)
def test_a_row_in_two_parts_goes_on_from_its_state(name):
    chunked = KERNELS[name].twins["chunked"].make()
    held, length, first = inputs(name, 96), 96, 48
    by_token = [place for place, x in enumerate(held) if x.shape[:2] == (BATCH, length)]

    def part(rows):
        return [x[:, rows] if place in by_token else x for place, x in enumerate(held)]
    whole, state = chunked(*held, None, None, CHUNK)
    one, carried = chunked(*part(slice(0, first)), None, None, CHUNK)
    two, after = chunked(*part(slice(first, None)), None, carried, CHUNK)
    assert torch.allclose(torch.cat([one, two], 1), whole, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(parts(name, state), parts(name, after), strict=True))
    # It goes into the row's first document only.
    docs = torch.zeros(BATCH, length - first, dtype=torch.int32)
    docs[:, 20:] = 1
    other, _ = chunked(*part(slice(first, None)), docs, carried, CHUNK)
    loop, _ = KERNELS[name].reference(*part(slice(first, None)), docs, carried, CHUNK)
    assert torch.allclose(other, loop, atol=1e-11) and torch.allclose(other[:, :20], two[:, :20], atol=1e-12)
    alone, _ = chunked(*part(slice(first + 20, None)), None, None, CHUNK)
    if name != "deep":
        assert torch.allclose(other[:, 20:], alone, atol=1e-11)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("gates", [0.0, 1.0])
@pytest.mark.parametrize("name", ["delta", "titans", "deep"])
def test_gates_at_their_limits_stay_finite_and_right(name, gates, dtype):
    kernel, held = KERNELS[name], inputs(name, 80, dtype, gates=gates)
    wanted, got = (results(name, function, held, documents(80)) for function in (
        kernel.reference, kernel.twins["chunked"].make()))
    for a, b in zip(wanted, got, strict=True):
        assert torch.isfinite(b).all() and (a - b).abs().max() <= LIMITS[dtype] * a.abs().max().clamp_min(1e-6)


@pytest.mark.parametrize("name", ["delta", "mlstm"])
def test_strong_decay_stays_finite(name):
    """A logarithm of -20 a token: nothing overflows on the way, and only the own token is left."""
    held = inputs(name, 128, torch.float32)
    with torch.no_grad():
        held[4].fill_(-20.0)
        if name == "mlstm":
            held[3].fill_(0.0)
    for function in (KERNELS[name].reference, KERNELS[name].twins["chunked"].make()):
        found = results(name, function, held)
        assert all(torch.isfinite(x).all() for x in found)
    if name == "delta":
        q, k, v, beta, _ = (x.detach() for x in held)
        own = beta[..., None] * v * (q * k).sum(-1, keepdim=True) / KEY ** 0.5
        assert torch.allclose(found[0], own, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_no_token_moves_what_stands_before_it_nor_another_document(name):
    chunked = KERNELS[name].twins["chunked"].make()
    held, docs = [x.detach() for x in inputs(name, 70)], documents(70)
    before, _ = chunked(*held, docs, None, CHUNK)
    for t in (0, 15, 16, 33, 69):
        changed = [x.clone() for x in held]
        for x in changed:
            if x.shape[:2] == (BATCH, 70):
                x[:, t] += 0.3
        after, _ = chunked(*changed, docs, None, CHUNK)
        assert torch.equal(before[:, :t], after[:, :t])
        for row in range(BATCH):
            other = docs[row] != docs[row, t]
            assert torch.equal(before[row, other], after[row, other])
            assert not torch.equal(before[row, t], after[row, t])


def test_delta_writes_what_its_key_then_reads():
    """Strength 1, unit key: the next read with that key is the value. Strength 2 turns what was there around."""
    k = F.normalize(torch.randn(1, 1, 1, KEY, dtype=torch.float64), dim=-1).expand(1, 2, 1, KEY)
    v = torch.randn(1, 2, 1, VALUE, dtype=torch.float64)
    for beta, wanted in (([1.0, 1.0], v[:, 1]), ([1.0, 2.0], 2 * v[:, 1] - v[:, 0])):
        strength = torch.tensor(beta, dtype=torch.float64).view(1, 2, 1)
        out, _ = KERNELS["delta"].reference(k * KEY ** 0.5, k, v, strength, None)
        assert torch.allclose(out[:, 1], wanted)


def test_exact_step_of_the_delta_rule_is_the_matrix_exponential():
    """EFLA: with strength (1 - e^(-beta |k|^2)) / |k|^2 one step solves dS = -k k^T S + k v^T over beta."""
    k, v, state = (torch.randn(*shape, dtype=torch.float64) for shape in ((KEY,), (VALUE,), (KEY, VALUE)))
    beta, length = 0.7, k.square().sum()
    strength = (-torch.expm1(-beta * length) / length).view(1, 1, 1)
    _, after = KERNELS["delta"].reference(*(x[None, None, None] for x in (k, k, v)), strength, None, None,
                                          state[None, None])
    system = torch.zeros(KEY + 1, KEY + 1, dtype=torch.float64)
    system[:KEY, :KEY] = -torch.outer(k, k)
    for column in range(VALUE):
        system[:KEY, KEY] = k * v[column]
        exact = (torch.matrix_exp(beta * system) @ torch.cat([state[:, column], torch.ones(1, dtype=torch.float64)]))
        assert torch.allclose(after[0, 0, :, column], exact[:KEY], atol=1e-12)


def test_mlstm_is_the_parallel_form_whatever_its_scale():
    """The sum over all earlier tokens with its weights in closed form; a state that holds nothing has no scale."""
    q, k, v, enter, forget = (x.detach() for x in inputs("mlstm", 40))
    kept = F.logsigmoid(forget).cumsum(1)
    weight = (kept[:, :, None] - kept[:, None] + enter[:, None]).masked_fill(
        ~torch.ones(40, 40, dtype=torch.bool).tril()[None, :, :, None], -torch.inf)
    top = weight.amax(2)
    scores = torch.einsum("bthc,bshc->btsh", q, k) / KEY ** 0.5 * (weight - top[:, :, None]).exp()
    wanted = torch.einsum("btsh,bshc->bthc", scores, v) / torch.maximum(scores.sum(2).abs(), (-top).exp())[..., None]
    for function in (KERNELS["mlstm"].reference, KERNELS["mlstm"].twins["chunked"].make()):
        assert torch.allclose(function(q, k, v, enter, forget, None, None, CHUNK)[0], wanted, atol=1e-12)
        zero = torch.zeros(BATCH, HEADS, KEY, VALUE + 1, dtype=torch.float64)
        for scale in (0.0, -50.0):
            state = zero, torch.full((BATCH, HEADS), scale, dtype=torch.float64)
            assert torch.allclose(function(q, k, v, enter, forget, None, state, CHUNK)[0], wanted, atol=1e-12)


def test_titans_without_momentum_and_forgetting_is_the_delta_rule():
    q, k, v, keep, _, rate = (x.detach() for x in inputs("titans", 50))
    out, _ = KERNELS["titans"].twins["chunked"].make()(q, k, v, torch.ones_like(keep), torch.zeros_like(keep), rate,
                                                       None, None, CHUNK)
    wanted, _ = KERNELS["delta"].reference(q * KEY ** 0.5, k, v, rate, None)
    assert (out - wanted).abs().max() < 1e-4  # the momentum's floor is 1e-6


def test_deep_memory_is_gradient_descent():
    """One token: the step is autograd's gradient of the squared error; then what was learned fades, not the start."""
    q, k, v, keep, momentum, rate, first, second = (x.detach() for x in inputs("deep", 1))
    w1, w2 = (w.expand(BATCH, *w.shape).clone().requires_grad_() for w in (first, second))
    told = torch.einsum("bhvf,bhf->bhv", w2, F.silu(torch.einsum("bhfk,bhk->bhf", w1, k[:, 0])))
    slopes = torch.autograd.grad((told - v[:, 0]).square().sum(), (w1, w2))
    _, state = KERNELS["deep"].reference(q, k, v, keep, momentum, rate, first, second)
    for slope, found in zip(slopes, state, strict=False):
        assert torch.allclose(found, -rate[:, 0, :, None, None] * slope)
    zero = torch.zeros_like(rate)
    _, later = KERNELS["deep"].reference(q, k, v, 0.5 + zero, zero, zero, first, second, None, state)
    assert torch.allclose(later[0], 0.5 * state[0], atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2])
def test_memories_neither_die_nor_blow_up_over_a_long_document(depth):
    """The layer's own gates, at the start and at their limits, over 2,048 tokens: all alike, near alike, and random."""
    config = small_config(PRESET="baseline", STACK="T", TITANS_DEPTH=depth)
    model = make_model(config, 1)
    mixer, generator = model.blocks[0].mixer, torch.Generator().manual_seed(0)
    with torch.no_grad():
        mixer.v.weight.mul_(8)
        for raw in (0.0, 30.0):
            mixer.gates.zero_()
            mixer.momentum_bias.fill_(raw)
            mixer.rate_bias.fill_(raw)
            mixer.forget_bias.fill_(-4.0 if raw == 0 else -30.0)
            for spread in (0.0, 0.05, 5.0):
                n = torch.randn(1, 1, 32, generator=generator).expand(1, 2048, 32)
                n = n + spread * torch.randn(1, 2048, 32, generator=generator)
                context = Context(None, None, None, None)
                q, k, v = (mixer.read(part, n, context, Sites(*Sites._fields), None) for part in "qkv")
                gates = F.linear(n, mixer.gates).unflatten(-1, (3, -1)).unbind(-2)
                out = mixer.recall(q, k, v, list(gates), context)
                assert torch.isfinite(out).all() and out.abs().max() < 100 * v.abs().max().clamp_min(1), (raw, spread)
                assert out[:, -256:].abs().mean() > 1e-2 * out[:, :256].abs().mean(), (raw, spread)


def test_every_recurrence_is_tested():
    """What else only some models need stands in test_09_hybrid.py."""
    assert {name for name in KERNELS if name not in Picked._fields} == {*NAMES, "experts", "written", "recalled"}


def test_ends_are_those_of_the_row():
    x = torch.arange(24).view(1, 1, 3, 8)
    assert ends(x, 24).tolist() == [[[7, 15, 23]]] and ends(x, 19).tolist() == [[[7, 15, 18]]]


def test_kernels_follow_the_stack():
    assert kernels_of(ModelSettings(stack="A")) == ["attention", "mean_nats", "mlp"]
    assert kernels_of(ModelSettings(stack="G2 X D T"))[3:] == ["delta", "mlstm", "titans"]
    assert kernels_of(ModelSettings(stack="T", titans_depth=2))[3:] == ["deep"]
    picked, lines = pick_kernels("auto", torch.device("cpu"), settings=ModelSettings(stack="A D"))
    assert set(picked.others) == {"delta"} and not picked.packed
    assert lines[-1] == "kernel:delta chunked (fla: needs a GPU)"


def test_packed_rows_need_every_recurrence_to_take_them(monkeypatch):
    """Attention of variable length gives way where a recurrence wants rows, and says so."""
    kernels = {name: kernel._replace(twins={form: twin._replace(unusable=lambda *_: None, make=lambda: None)
                                            for form, twin in kernel.twins.items()})
               for name, kernel in KERNELS.items()}
    for name, kernel in kernels.items():
        monkeypatch.setitem(KERNELS, name, kernel)
    for stack, packed in (("A", True), ("A D", True), ("A D X", False), ("T", False)):
        picked, lines = pick_kernels("auto", torch.device("cpu"), settings=ModelSettings(stack=stack))
        assert picked.packed is packed, stack
    assert lines[0] == ("kernel:attention sdpa (fa3: chunked titans does not take packed rows; varlen: chunked titans "
                        "does not take packed rows)")


def test_unrolled_recurrences_are_not_compiled_for_every_length(monkeypatch):
    """An evaluator asks in many lengths: a stack of attention is compiled for all of them, one of chunks is not."""
    asked = []
    monkeypatch.setattr(train_gpt, "make_compiled", lambda function, on, **_: asked.append(on) or function)
    for stack in ("A2", "A D", "T2"):
        config = small_config(PRESET="baseline", STACK=stack)
        train_gpt.make_guest("contiguous", make_model(config), config, train_gpt.World(), compiled=True)
    assert asked == [True, False, False]


@pytest.mark.parametrize("gated", [False, True])
def test_the_way_to_flash_linear_attention(monkeypatch, gated):
    """With a stand-in of its two functions: layout, scale, gates, spans, gradients, and one graph for the compiler."""
    seen = []

    def compute(q, k, v, beta, g, starts):
        where = None
        if starts is not None:
            where = torch.bucketize(torch.arange(q.shape[1]), starts, right=True)[None]
        out, state = KERNELS["delta"].reference(q.double(), k.double(), v.double(), beta.double(),
                                                None if g is None else g.double(), where)
        return out, state if starts is None else state.repeat(len(starts) - 1, 1, 1, 1)

    class StandIn(torch.autograd.Function):  # as the library's: one function with a backward of its own
        @staticmethod
        def forward(ctx, q, k, v, beta, g, starts):
            ctx.held = [x if x is None else x.detach() for x in (q, k, v, beta, g)], starts
            out, state = compute(q, k, v, beta, g, starts)
            return out.to(q.dtype), state.float()

        @staticmethod
        def backward(ctx, grad, _):
            (q, k, v, beta, g), starts = ctx.held
            leaves = [x for x in (q, k, v, beta, g) if x is not None]
            _, pull = torch.func.vjp(lambda *x: compute(*x[:4], x[4] if gated else None, starts)[0], *leaves)
            found = [x.to(leaf.dtype) for x, leaf in zip(pull(grad.double()), leaves, strict=True)]
            return (*found, *([] if gated else [None]), None)

    def stand_in(q, k, v, beta, scale, output_final_state, cu_seqlens=None, g=None):
        seen.append(cu_seqlens)
        assert cu_seqlens is None or len(q) == 1  # as the library wants it
        assert q.dtype == v.dtype == torch.bfloat16 and scale == KEY ** -0.5 and output_final_state
        assert (g is not None) == gated
        return StandIn.apply(q, k, v, beta, g, cu_seqlens)
    for name, part in (("fla", {}), ("fla.ops", {}), ("fla.ops.delta_rule", {"chunk_delta_rule": stand_in}),
                       ("fla.ops.gated_delta_rule", {"chunk_gated_delta_rule": stand_in})):
        module = types.ModuleType(name)
        vars(module).update(part)
        monkeypatch.setitem(sys.modules, name, module)
    make_delta_fla.cache_clear()
    rule = make_delta_fla()
    held = [x.detach()[:1].float() for x in inputs("delta", 30)]
    held[4:] = held[4:] if gated else []
    breaks = torch.tensor([0, 7, 19])
    spans = make_spans(breaks[1:].numpy(), 30, 30, torch.device("cpu"))
    docs = spans.docs(torch.Size((1, 30)))

    def run(function, where):
        leaves = [x.clone().requires_grad_() for x in held]
        out, _ = function(*leaves, *([] if gated else [None]), where)
        return [out.detach().float(), *torch.autograd.grad(out.float().square().sum(), leaves)]
    wanted = run(KERNELS["delta"].reference, docs)
    for got in (run(rule, spans), run(torch.compile(rule, fullgraph=True, backend="aot_eager"), spans)):
        assert all((a - b).norm() <= 0.03 * a.norm() for a, b in zip(wanted, got, strict=True))
    assert all(x is not None for x in seen)
    # Rows behind each other, as an evaluator asks on a GPU.
    rows = [x.unflatten(1, (2, 15)).flatten(0, 1) for x in held]
    both = make_spans(torch.tensor([7, 15, 19]).numpy(), 30, 15, torch.device("cpu"))
    out, _ = rule(*rows, *([] if gated else [None]), both)
    cut, _ = KERNELS["delta"].reference(*rows, *([] if gated else [None]), both.docs(torch.Size((2, 15))))
    assert out.shape == rows[2].shape and (out.float() - cut).norm() < 0.03 * cut.norm()
    plain = run(rule, None)
    assert seen[-1] is None and (plain[0] - run(KERNELS["delta"].reference, None)[0]).norm() < 0.03 * plain[0].norm()
    several = run(rule, document_index(torch.ones(1, 30, dtype=torch.long)))
    assert seen[-1] is None and torch.isfinite(several[0]).all()
    make_delta_fla.cache_clear()
