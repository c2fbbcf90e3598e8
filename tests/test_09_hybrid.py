"""KERNELS, LAYERS and MODEL: experts, what text writes in place, exit and depth at evaluation, blocks computed again,
texts read in pieces."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import PIECES_OF_TEXT, Pieces, events, launch, make_model, small_config, small_words

import train_gpt
from tools.generate import memory_unusable
from train_gpt import (
    BOS,
    EVALUATORS,
    KERNELS,
    LOAD_SHARE,
    ConfigError,
    Context,
    Depths,
    Grammar,
    Memory,
    Optimizer,
    Sites,
    Taught,
    document_index,
    expert_width,
    forward_flops,
    grammar_features,
    knot_fields,
    load_config,
    main,
    make_forward,
    make_guest,
    make_loss,
    parse_stack,
    plan_blocks,
    plan_phase,
    plan_text,
    row_spans,
    site_shapes,
    weight_sites,
    written_shares,
)

MOE = {"PRESET": "baseline", "STACK": "A{moe=4} A", "MLP_MULT": 4, "MOE_TOPK": 2}
INPLACE = {"PRESET": "baseline", "STACK": "A2", "INPLACE_LAYERS": "1", "INPLACE_CHUNK": 4}
KNOT = {"PRESET": "baseline", "STACK": "K A"}
HYBRID = {"PRESET": "chimera", "STACK": "G{moe=4} (X A)*1..4~2 A", "INPLACE_LAYERS": "3", "INPLACE_CHUNK": 4}


def tokens_of(rows, length, seed=1, begins=True):
    tokens = torch.randint(4, 384, (rows, length), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = BOS if begins else tokens[:, 0]
    return tokens


def flat_grads(value, inputs):
    weights = torch.arange(value.numel(), dtype=value.dtype).reshape(value.shape).cos()
    return torch.autograd.grad((value * weights).sum() + 0 * sum(x.sum() for x in inputs), inputs)


# -- experts


def expert_inputs(each, seed=0, lost=None):
    """Tokens, matrices, choices and shares; `lost` is an expert that nobody chooses."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_()
    x, ups, downs = draw(37, 16), draw(5, 24, 16), draw(5, 16, 24)
    scores = torch.rand(37, 5, generator=generator)
    if lost is not None:
        scores[:, lost] = -1
    shares, chosen = scores.topk(each)
    return [x, ups, downs, shares.requires_grad_()], chosen


@pytest.mark.parametrize("lost", [None, 0, 4])
@pytest.mark.parametrize("each", [1, 2, 5])
def test_sorted_tokens_find_what_all_through_all_find(each, lost):
    if each == 5 and lost is not None:
        return
    found = []
    for function in (KERNELS["experts"].reference, KERNELS["experts"].twins["grouped"].make()):
        (x, ups, downs, shares), chosen = expert_inputs(each, lost=lost)
        out = function(x, ups, downs, chosen, shares, lambda hidden: F.relu(hidden).square())
        found.append([out, *flat_grads(out, [x, ups, downs, shares])])
    for wanted, got in zip(*found, strict=True):
        assert torch.allclose(wanted, got, atol=1e-4 * float(wanted.detach().abs().max()))
    if lost is not None:
        assert found[1][2][lost].abs().sum() == 0


def test_each_token_gets_its_own_experts():
    (x, ups, downs, shares), chosen = expert_inputs(2)
    out = KERNELS["experts"].reference(x, ups, downs, chosen, shares, torch.tanh)
    for token in (0, 7, 36):
        wanted = sum(share * (downs[expert] @ torch.tanh(ups[expert] @ x[token]))
                     for share, expert in zip(shares[token], chosen[token], strict=True))
        assert torch.allclose(out[token], wanted, atol=1e-4)


def test_parts_are_as_wide_together_as_the_whole():
    config = small_config(**MOE)
    plan = plan_blocks(config.model)
    assert (plan[0].experts, plan[0].hidden, expert_width(config.model, plan[0]), plan[1].experts) == (4, 128, 24, 0)
    model = make_model(config)
    assert sum(p.numel() for name, p in model.blocks[0].mlp.named_parameters() if "weight" in name) == 2 * 32 * 5 * 24
    assert "blocks 0: 4 experts of 24, 2 a token, beside 24 for all" in plan_text(config.model)
    whole, split = (forward_flops(c.model, 384, make_model(c).phases[0], 64) for c in (
        small_config(**{**MOE, "STACK": "A2"}), config))
    assert whole - split == 4 * 32 * (128 - 72) - 2 * 32 * 4


@pytest.mark.parametrize("more", [{"MOE_TOPK": 1}, {"MOE_TOPK": 2}, {"MOE_SHARED": 0}, {"EXTRA_NORMS": 1},
                                  {"MLP_ACT": "gelu"}])
def test_a_watched_model_is_the_same_and_every_expert_has_its_sites(more):
    """With taps experts go one by one, over zeros where a token is another one's."""
    config = small_config(**{**MOE, **more})
    model, tokens = make_model(config, 2, shake=0.2), tokens_of(2, 23)
    forward, seen = make_forward(model, 0), {}
    sites = [site for name, own in weight_sites(model).items() if ".mlp.routed." in name for site in own]
    assert sorted(sites) == sorted(f"v0.{part}{expert}" for part in ("up", "down") for expert in range(4))
    assert {site: shape for site, shape in site_shapes(model, 0).items() if site in sites} == {
        **{f"v0.up{e}": (32, expert_width(config.model, plan_blocks(config.model)[0])) for e in range(4)},
        **{f"v0.down{e}": (expert_width(config.model, plan_blocks(config.model)[0]), 32) for e in range(4)}}

    def tap(site):
        def watch(y, x):
            seen[site] = (x.reshape(-1, x.shape[-1]).abs().sum(1) > 0).sum().item()
            return y
        return watch
    plain, watched = forward(tokens, None), forward(tokens, None, {site: tap(site) for site in sites})
    assert torch.allclose(plain, watched, atol=1e-5)
    # As many tokens reach the experts as choices are made.
    assert sum(seen[f"v0.up{expert}"] for expert in range(4)) == tokens.numel() * config.model.moe_topk


def test_biases_choose_but_never_weigh():
    model, tokens = make_model(small_config(**MOE), 2, shake=0.2), tokens_of(2, 23)
    before = make_forward(model, 0)(tokens, None)
    with torch.no_grad():
        model.blocks[0].mlp.biases += 0.5
    assert torch.equal(make_forward(model, 0)(tokens, None), before)
    with torch.no_grad():
        model.blocks[0].mlp.biases[0] += 10
    after = make_forward(model, 0)(tokens, None)
    assert not torch.equal(after, before)
    chosen, shares = model.blocks[0].mlp.choose(torch.randn(9, 32), "none", None)
    assert (chosen == 0).any(1).all() and torch.allclose(shares.sum(1), torch.ones(9)) and float(shares.max()) < 1


def test_a_single_choice_is_weighed_by_its_score():
    """Else the router of one expert a token would never learn."""
    model = make_model(small_config(**{**MOE, "MOE_TOPK": 1}), 2, shake=0.2)
    tokens = tokens_of(2, 23)
    loss = make_loss(model, 0)(tokens, tokens.roll(-1, 1), None)
    assert torch.autograd.grad(loss, model.blocks[0].mlp.router)[0].abs().sum() > 0


def test_the_gradient_of_biases_is_the_load_and_nothing_in_the_norm():
    model, tokens = make_model(small_config(**MOE), 2, shake=0.2), tokens_of(4, 23)
    seen = []
    mlp = model.blocks[0].mlp
    plain = mlp.picked
    mlp.picked = lambda scores: seen.append(plain(scores)) or seen[-1]
    loss = make_loss(model, 0)(tokens, tokens.roll(-1, 1), None)
    grads = dict(zip(("biases", "router"), torch.autograd.grad(loss, [mlp.biases, mlp.router]), strict=True))
    load = seen[0].flatten().bincount(minlength=4).float() / tokens.numel()
    assert torch.allclose(grads["biases"], LOAD_SHARE * (load - load.mean()))
    assert grads["biases"].norm() < 1e-3 * grads["router"].norm()


def test_balancing_makes_a_skewed_load_even():
    """Sixteen experts, two a token, scores that favour some: the imbalance falls by its steps alone."""
    config = small_config(**{**MOE, "STACK": "A{moe=16}", "MLP_MULT": 5, "MOE_GAMMA": 5e-3})
    model = make_model(config, 1)
    mlp = model.blocks[0].mlp
    assert isinstance(mlp, train_gpt.Experts)
    with torch.no_grad():
        mlp.router.copy_(torch.randn(16, 32, generator=torch.Generator().manual_seed(5)) * 0.2)
        mlp.router[:, 0] += torch.linspace(-1, 1, 16)
    optimizer = Optimizer(model, config.optim, train_gpt.make_world({}), torch.float32)
    found, generator = [], torch.Generator().manual_seed(2)
    for _ in range(150):
        n = torch.randn(2048, 32, generator=generator)
        n[:, 0] = 1
        scores = F.linear(n, mlp.router).sigmoid() + mlp.biases
        found.append(mlp.tell(scores.detach())["imbalance"])
        _, shares = mlp.choose(n, "none", None)
        model.zero_grad()
        mlp.biases.grad, = torch.autograd.grad(shares.sum(), mlp.biases)
        optimizer.step(1.0, 0.9)
    assert found[0] > 1.5 and sum(found[-10:]) / 10 < 0.3


def test_passes_that_a_row_does_not_make_are_no_load():
    """Of rows with one pass of up to four, the blocks still compute: what experts they would choose counts for
    nothing."""
    config = small_config(PRESET="sixteen", STACK="A (A{moe=4})*1..4~2 A", LOOP_STATE="exact", LOOP_SKIPS=0, MLP_MULT=4)
    model, tokens = make_model(config, 2, shake=0.2), tokens_of(2, 23)
    plan = plan_phase(config.model, 0.0, deepest=True)
    firsts = [step.visit for step in plan.steps if step.turn and step.turn.first]
    grads = {}
    for kind, passes in (("one", [1, 1]), ("mixed", [4, 1]), ("all", [4, 4])):
        keep = torch.zeros(len(plan.steps), 2)
        for row, count in enumerate(passes):
            keep[firsts[:count], row] = 1
        loss = make_loss(model, plan)(tokens, tokens.roll(-1, 1), None, None, keep)
        grads[kind], = torch.autograd.grad(loss, model.blocks[1].mlp.biases)
    alone = make_loss(model, plan_phase(config.model, 0.0, passes=1))(tokens, tokens.roll(-1, 1), None)
    wanted, = torch.autograd.grad(alone, model.blocks[1].mlp.biases)
    assert torch.allclose(grads["one"], wanted, atol=1e-10)
    assert not torch.allclose(grads["mixed"], grads["all"], atol=1e-9)


def test_experts_train_squeeze_and_score_and_ranks_agree(mini, tmp_path):
    """Counts of all ranks rule the biases: two ranks do what one does. GPTQ on the inputs of each expert."""
    words = small_words(mini, tmp_path, **MOE, ITERATIONS=6, MOE_GAMMA=0.05, VAL_LOSS_EVERY=3)
    found = []
    for processes in (1, 2):
        done = launch([*words, f"RUN_ID=r{processes}", "STAGES=train"], processes)
        assert done.returncode == 0, done.stderr
        held = train_gpt.load_checkpoint(tmp_path / f"r{processes}" / "checkpoint.pt").weights
        found.append(([event["train_loss"] for event in events(tmp_path / f"r{processes}", "step")],
                      held["blocks.0.mlp.biases"]))
    assert found[0][0] == pytest.approx(found[1][0], abs=2e-5)
    assert torch.equal(found[0][1], found[1][1]) and found[0][1].abs().max() > 0
    assert main([*words, "RUN_ID=whole", "SOLVER=gptq", "GPTQ_SEQUENTIAL=1", "EVAL=contiguous,ttt", "AUDIT=1",
                 "AUDIT_TOKENS=200"], {}) == 0
    told = events(tmp_path / "whole", "parts")
    assert [event["step"] for event in told] == [3, 6] and all(event["imbalance"] >= 0 for event in told)
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result["train"]["parts"] == {"imbalance": told[-1]["imbalance"]}


# -- what text writes in place


def written_inputs(length, where, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    z, v = (torch.randn(2, length, width, generator=generator, dtype=dtype).requires_grad_() for width in (6, 5))
    docs = (torch.rand(2, length, generator=generator) < 0.1).cumsum(1) if where else None
    return z, v, docs


@pytest.mark.parametrize("momentum, decay", [(0.0, 1.0), (0.9, 0.95)])
@pytest.mark.parametrize("where", [False, True])
@pytest.mark.parametrize("length", [3, 8, 29, 64])
def test_chunk_loop_dual_form_and_the_definition_agree(length, where, momentum, decay):
    found = []
    for function in (KERNELS["written"].reference, KERNELS["written"].twins["chunked"].make()):
        z, v, docs = written_inputs(length, where)
        out = function(z, v, docs, 8, momentum, decay)
        found.append([out, *flat_grads(out, [z, v])])
    for wanted, got in zip(*found, strict=True):
        assert torch.allclose(wanted, got, atol=1e-11)
    # The definition: a matrix for each document, written at the end of each chunk, with momentum, and forgetting.
    z, v, docs = written_inputs(length, where)
    for row in range(2):
        matrix = speed = torch.zeros(5, 6, dtype=torch.float64)
        owner = -1
        for begin in range(0, length, 8):
            part = range(begin, min(begin + 8, length))
            for t in part:
                same = docs is None or int(docs[row, t]) == owner
                wanted = (matrix @ z[row, t]) if same and begin else torch.zeros(5, dtype=torch.float64)
                assert torch.allclose(found[0][0][row, t], wanted, atol=1e-11)
            last = -1 if docs is None else int(docs[row, part[-1]])
            if docs is not None and last != owner:
                matrix = speed = torch.zeros(5, 6, dtype=torch.float64)
                owner = last
            own = [t for t in part if docs is None or int(docs[row, t]) == last]
            speed = momentum * speed + sum(torch.outer(v[row, t], z[row, t]) for t in own)
            matrix = decay * matrix + speed
    assert written_shares(4, 0.9, 0.95) == pytest.approx([0, 1, 0.95 + 0.9, 0.95 * 1.85 + 0.81])


def test_in_place_learning_begins_as_nothing_and_learns():
    config, tokens = small_config(**INPLACE), tokens_of(2, 23)
    model, plain = make_model(config, 2), make_model(small_config(**{**INPLACE, "INPLACE_LAYERS": ""}), 2)
    assert torch.equal(make_forward(model, 0)(tokens, None), make_forward(plain, 0)(tokens, None))
    assert "blocks 1: learn in place, 4 tokens a chunk" in plan_text(config.model)
    model = make_model(config, 2, shake=0.2)
    loss = make_loss(model, 0)(tokens, tokens.roll(-1, 1), None)
    written = model.blocks[1].mlp.written
    grads = torch.autograd.grad(loss, [written.taps, written.target])
    assert all(grad.abs().min() > 0 for grad in grads)
    zero = make_model(small_config(**INPLACE, INPLACE_LR=1e-6), 2, shake=0.2)
    for name, parameter in zero.named_parameters():
        parameter.data = dict(model.named_parameters())[name].data
    without = make_forward(zero, 0)(tokens, None)
    assert not torch.allclose(make_forward(model, 0)(tokens, None), without, atol=1e-4)
    # The first chunk reads nothing, whatever is learned.
    assert torch.allclose(make_forward(model, 0)(tokens, None)[:, :4], without[:, :4], atol=1e-5)


def test_values_look_ahead_within_their_chunk_and_document_only():
    written = make_model(small_config(**INPLACE), 2, shake=0.5).blocks[1].mlp.written
    stream = torch.randn(1, 11, 32, generator=torch.Generator().manual_seed(1))
    docs = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]])
    reach = {2: {0, 1, 2, 3}, 3: {1, 2, 3}, 4: {4, 5}, 5: {4, 5}, 6: {6, 7}, 8: {8, 9, 10}, 10: {8, 9, 10}}
    before = written.values(Taught(stream, docs))
    for t, sees in reach.items():
        for other in range(11):
            changed = stream.clone()
            changed[0, other] += 1
            moved = not torch.equal(written.values(Taught(changed, docs))[0, t], before[0, t])
            assert moved == (other in sees), (t, other)


@pytest.mark.parametrize("words", [HYBRID, MOE, {**INPLACE, "STACK": "A G"}, {"PRESET": "baseline",
                                                                              "RETRIEVAL_BITS": 32}, KNOT,
                                   {"PRESET": "baseline", "GRAMMAR_BIAS": 1}])
def test_hybrids_are_causal_and_documents_apart(words):
    """A token changes nothing before it, though values of its chunk look ahead; a document nothing in the next."""
    model = make_model(small_config(**words), 3, shake=0.2)
    forward, tokens = make_forward(model, 0), tokens_of(1, 24)
    tokens[0, 10] = BOS
    docs = document_index(tokens)
    before = forward(tokens, docs)
    for t in (1, 5, 7, 12, 18, 22):
        changed = tokens.clone()
        changed[0, t] = 4 + (changed[0, t] - 3) % 380
        moved = (forward(changed, docs) - before).abs().amax(-1)[0]
        assert moved[:t].max() <= 1e-5 and moved[t] > 1e-4
        assert t > 10 or moved[10:].max() <= 1e-5
        assert t < 12 or moved[t + 1:].max() > 1e-5 or t == 23


def test_in_place_learning_trains_and_scores(mini, tmp_path):
    words = small_words(mini, tmp_path, **INPLACE, RUN_ID="in", ITERATIONS=8, SCALAR_LR=0.05, EVAL="contiguous,ttt",
                        AUDIT=1, AUDIT_TOKENS=200)
    assert main(words, {}) == 0
    weights = train_gpt.load_checkpoint(tmp_path / "in" / "checkpoint.pt").weights
    assert weights["blocks.1.mlp.written.taps"].abs().max() > 1e-3


# -- retrieval


def test_what_followed_the_states_most_alike_is_recalled():
    """Against a search by hand."""
    generator = torch.Generator().manual_seed(4)
    codes = torch.where(torch.rand(2, 30, 64, generator=generator) < 0.5, -1.0, 1.0)
    stream = torch.randn(2, 30, 8, generator=generator)
    docs = (torch.rand(2, 30, generator=generator) < 0.1).cumsum(1)
    sharp = torch.tensor([5.0])
    out = KERNELS["recalled"].reference(codes, stream, docs, 1, sharp, 30)
    several = KERNELS["recalled"].reference(codes, stream, docs, 3, sharp, 30)
    for row in range(2):
        for t in range(30):
            past = [j for j in range(t) if docs[row, j] == docs[row, t]]
            if not past:
                assert out[row, t].abs().sum() == several[row, t].abs().sum() == 0
                continue
            alike = torch.stack([(codes[row, t] * codes[row, j]).sum() for j in past])
            best = max(past, key=lambda j: (float((codes[row, t] * codes[row, j]).sum()), j))  # noqa: B023
            assert torch.allclose(out[row, t], stream[row, best + 1])
            if len(past) <= 3:
                shares = (5 * alike / 64).softmax(0)
                wanted = sum(share * stream[row, j + 1] for share, j in zip(shares, past, strict=True))
                assert torch.allclose(several[row, t], wanted, atol=1e-5)


def test_retrieval_begins_as_nothing_and_learns(mini, tmp_path):
    words = {"PRESET": "baseline", "RETRIEVAL_BITS": 32}
    model, plain = (make_model(small_config(**more), 2) for more in (words, {"PRESET": "baseline"}))
    tokens = tokens_of(2, 23)
    assert torch.equal(make_forward(model, 0)(tokens, None), make_forward(plain, 0)(tokens, None))
    model = make_model(small_config(**words), 2, shake=0.2)
    loss = make_loss(model, 0)(tokens, tokens.roll(-1, 1), None)
    grads = torch.autograd.grad(loss, list(model.retrieval.parameters()))
    assert all(grad.abs().max() > 0 for grad in grads)
    assert main(small_words(mini, tmp_path, **words, RUN_ID="r", ITERATIONS=8, EVAL="contiguous,ttt", AUDIT=1,
                            AUDIT_TOKENS=200), {}) == 0
    weights = train_gpt.load_checkpoint(tmp_path / "r" / "checkpoint.pt").weights
    assert weights["retrieval.strength"].abs().max() > 1e-3


# -- span knot


def test_bits_are_asked_for_by_the_codes_before_them():
    """Against a loop over positions."""
    codes = torch.where(torch.rand(2, 150, 24, generator=torch.Generator().manual_seed(5)) < 0.5, -1.0, 1.0)
    docs = torch.zeros(2, 150, dtype=torch.long)
    docs[0, 90:], docs[1, 3:] = 1, 1
    for where in (docs, None):
        found = knot_fields(codes, where)
        for row in range(2):
            for t in range(150):
                past = [j for j in range(t) if where is None or docs[row, j] == docs[row, t]]
                near = codes[row, past[-64:]].sum(0).sign() if past else torch.zeros(24)
                last = codes[row, past[-1]].roll(1) if past else torch.zeros(24)
                assert torch.allclose(found[row, t], 0.3 * near + 0.2 * last)


def test_a_relaxation_lowers_the_energy_by_its_few_turns():
    """The code is that of the signs but for two bits in a hundred at most, and its energy, summed by its definition,
    is below theirs and below that of any other so few turns."""
    settings = small_config(**KNOT, KNOT_BITS=100).model
    knot = make_model(small_config(**KNOT, KNOT_BITS=100), 2, shake=0.5).blocks[0].mixer
    seen = {}
    knot.knot.register_forward_pre_hook(lambda module, inputs: seen.update(code=inputs[0]))
    y = torch.randn(2, 40, knot.code.weight.shape[1], generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        knot.beside(y, Context(None, None, None, None), Sites(*Sites._fields), None)
        signs = torch.where(F.linear(y, knot.code.weight) < 0, -1.0, 1.0)
        pull, fields = F.linear(y, knot.field.weight), knot_fields(signs, None)
    code = seen["code"]

    def energy(bits):
        # A bit that is not as a field wants it costs the field's strength.
        return (-bits * pull + 0.5 * (fields.abs() - bits * fields)).sum(-1)

    turned = (code - signs).abs() > 1
    assert settings.knot_bits == 100 and turned.sum(-1).max() == 2 and ((code.abs() - 1).abs() < 1e-6).all()
    assert (energy(code) <= energy(signs) + 1e-4).all() and (energy(code) < energy(signs) - 0.1).any()
    best = torch.stack([energy(signs * torch.ones(100).index_fill(0, torch.tensor(pair), -1.0))
                        for pair in itertools.combinations(range(100), 2)]).amin(0)
    assert (energy(code) <= best + 1e-4).all()


def test_a_knot_begins_as_nothing_and_learns(mini, tmp_path):
    plain, model = (make_model(small_config(PRESET="baseline", STACK=stack), 2) for stack in ("G A", "K A"))
    tokens = tokens_of(2, 23)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            model.get_parameter(name).copy_(parameter)
    assert torch.equal(make_forward(model, 0)(tokens, None), make_forward(plain, 0)(tokens, None))
    model = make_model(small_config(**KNOT), 2, shake=0.2)
    loss = make_loss(model, 0)(tokens, tokens.roll(-1, 1), None)
    knot = model.blocks[0].mixer
    grads = torch.autograd.grad(loss, [part.weight for part in (knot.code, knot.field, knot.knot)])
    assert all(grad.abs().max() > 0 for grad in grads)
    assert main(small_words(mini, tmp_path, **KNOT, RUN_ID="k", ITERATIONS=8, EVAL="contiguous,ttt", AUDIT=1,
                            AUDIT_TOKENS=200), {}) == 0
    weights = train_gpt.load_checkpoint(tmp_path / "k" / "checkpoint.pt").weights
    assert weights["blocks.0.mixer.knot.weight"].abs().max() > 1e-3


# -- what is open


def features_by_hand(tokens):
    """Features behind each token of a document or of a part of one, read character by character, with a stack of the
    places where brackets were opened for each kind."""
    kinds, stacks, kind_of = ("()", "[]", "{}", "\u201c\u201d"), [[] for _ in range(4)], {}
    for kind, (opens, closes) in enumerate(kinds):
        kind_of |= {opens: (kind, True), closes: (kind, False)}
    quote = code = line = item = False
    found = []
    for t, token in enumerate(tokens):
        piece = PIECES_OF_TEXT[token].replace("\u2581", " ")
        text = "" if token == BOS else chr(int(piece[1:-1], 16)) if piece.startswith("<0x") else piece
        if line or "\n" in text:
            item = bool(re.match(r"\s*([-*]|1\.)", text.rpartition("\n")[2]))
        for sign in text:
            quote = False if sign == "\n" else quote ^ (sign == '"')
            code ^= sign == "`"
            kind, opens = kind_of.get(sign, (None, False))
            if opens:
                stacks[kind].append(t)
            elif kind is not None and stacks[kind]:
                stacks[kind].pop()
        line = token == BOS or text.endswith("\n")
        places = [stack[min(len(stack), 4) - 1] if stack else -1 for stack in stacks]
        deep, newest = sum(map(len, stacks)), max(places)
        found.append([*map(bool, stacks), *(place == newest >= 0 for place in places), len(stacks[0]) > 1, deep > 2,
                      quote, code, line, item, deep / 8, newest >= 0 and t - newest >= 32])
    return torch.tensor(found, dtype=torch.float32)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_open_is_what_a_reader_finds(seed):
    """Character by character, document by document, and read in pieces."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (70, 1, 40, 90)
    documents = [torch.cat([torch.tensor([BOS]), torch.randint(2, 32, (n - 1,), generator=generator)]) for n in lengths]
    documents[3][5:80] = 2
    documents[3][4] = 3
    documents[0][30:40] = torch.tensor([3, 3, 30, 28, 19, 4, 4, 20, 17, 4])  # six deep, and back
    table = torch.from_numpy(Grammar.facts_of(Pieces(PIECES_OF_TEXT))).long()
    tokens = torch.cat(documents)
    begins, state = (tokens == BOS)[None], torch.zeros(1, Grammar.STATE, dtype=torch.long)
    features, _ = grammar_features(table[tokens][None], begins, state, 0)
    wanted = torch.cat([features_by_hand(document.tolist()) for document in documents])
    assert torch.equal(features[0], wanted)
    assert ((wanted > 0).any(0)).all() or seed  # every feature is seen
    begin = 0
    for size in (1, 3, 1, 60, 100, 36):
        part = slice(begin, begin + size)
        found, state = grammar_features(table[tokens[part]][None], begins[:, part], state, begin)
        assert torch.equal(found[0], wanted[part])
        begin += size


def test_what_is_open_hangs_on_the_tokens_of_the_document_alone():
    """However it is told which they are: one document a row, numbers, spans; and where a row is cut within one."""
    model = make_model(small_config(PRESET="baseline", GRAMMAR_BIAS=1), 2)
    with torch.no_grad():
        model.grammar.bias.normal_(generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(2, 32, (3, 60), generator=torch.Generator().manual_seed(8))
    tokens[0, 0] = tokens[0, 20] = tokens[1, 0] = tokens[2, 33] = BOS
    hidden = torch.zeros(3, 60, model.settings.model_dim)

    def features(docs):
        with torch.no_grad():
            return model.grammar(hidden, tokens, Context(None, docs, None, None))

    wanted = features(None)
    assert torch.equal(features(document_index(tokens)), wanted)
    forward, spans = make_forward(model, 0), row_spans(document_index(tokens).numpy(), torch.device("cpu"))
    with torch.no_grad():
        in_rows = forward(tokens, document_index(tokens))
        assert torch.allclose(forward(tokens.view(1, -1), spans).view(3, 60, -1), in_rows, atol=1e-5)
    for row, cuts in enumerate(([0, 20], [0], [0, 33])):
        for begin, end in itertools.pairwise([*cuts, 60]):
            alone = features_by_hand(tokens[row, begin:end].tolist()) @ model.grammar.bias.detach().T
            assert torch.allclose(wanted[row, begin:end], alone, atol=1e-5)
    cut = document_index(tokens)
    cut[:, 45:] += 1  # a span ends here, within a document
    alone = features_by_hand(tokens[1, 45:].tolist()) @ model.grammar.bias.detach().T
    assert torch.allclose(features(cut)[1, 45:], alone, atol=1e-5)


def test_the_bias_begins_as_nothing_learns_and_stands_in_the_artifact(mini, tmp_path):
    plain, model = (make_model(small_config(PRESET="baseline", GRAMMAR_BIAS=on), 2) for on in (0, 1))
    tokens = tokens_of(2, 23)
    assert torch.equal(make_forward(model, 0)(tokens, None), make_forward(plain, 0)(tokens, None))
    words = small_words(mini, tmp_path, PRESET="baseline", GRAMMAR_BIAS=1, RUN_ID="g", ITERATIONS=8, AUDIT=1,
                        EVAL="contiguous,ttt", AUDIT_TOKENS=200)
    assert main(words, {}) == 0
    facts, weights = train_gpt.load_artifact(tmp_path / "g" / "artifact.bin")
    assert weights["grammar.bias"].abs().max() > 1e-4
    table = Grammar.read(facts["grammar"], facts["vocab_size"])
    manifest = json.loads((Path(mini) / "manifest.json").read_text())
    tokenizer = train_gpt.load_tokenizer(Path(mini) / manifest["tokenizer"]["path"], facts["vocab_size"])
    assert (table == Grammar.facts_of(tokenizer)).all() and table.any()
    assert "grammar: tokens with brackets:" in (tmp_path / "g" / "train.log").read_text()
    kernels, _ = train_gpt.pick_kernels("auto", torch.device("cpu"))
    path = tmp_path / "g" / "artifact.bin"
    again = train_gpt.make_model_from(facts, weights, kernels, torch.float32, path)
    assert (again.grammar.facts.numpy() == table).all()
    for damaged in ([[0, 99, 1]], [[-1, 0, 1]], [[1, 2]], [[0, 0, 300]], "x", None, {}, [[0, 0, 1.5]], [[0, 0, True]],
                    [[0, 0, -2 ** 63]], [1], [[0, 0, "1"]], [[0, 0, 1], [0, 0, 1]], [[3, 1, 1], [2, 1, 1]], [[0, 0, 0]],
                    [[0, 8, -1]], ["\x1b[2J"]):
        broken = {**facts, "grammar": damaged} if damaged is not None else {
            key: value for key, value in facts.items() if key != "grammar"}
        with pytest.raises(train_gpt.ConfigError, match="describes no model"):
            train_gpt.make_model_from(broken, weights, kernels, torch.float32, path)
    other = {**facts, "model": {**facts["model"], "grammar_bias": False}}
    without = {name: weight for name, weight in weights.items() if name != "grammar.bias"}
    with pytest.raises(train_gpt.ConfigError, match="the model has none"):
        train_gpt.make_model_from(other, without, kernels, torch.float32, path)


def test_a_tokenizer_that_opens_nothing_is_a_mistake():
    facts = Grammar.facts_of(Pieces(["<pad>", "<s>", "a", "\u2581b"]))
    with pytest.raises(ConfigError, match="GRAMMAR_BIAS=1: no token"):
        Grammar.told(facts)
    told = Grammar.told(Grammar.facts_of(Pieces(["<pad>", "<s>", "(", ")", '"', "\n", "- ", "`"])))
    assert told == "grammar: tokens with brackets:2 quotes:1 code:1 line_breaks:1 lists:1"
    assert (Grammar.read(Grammar.write(facts), len(facts)) == facts).all()


# -- depth at evaluation

DRAWN = {"PRESET": "sixteen", "STACK": "A (A2)*1..4~2 A", "LOOP_STATE": "exact", "LOOP_SKIPS": 0}


def passes_of(model, passes, leave=0.0):
    return make_forward(model, plan_phase(model.settings, 1.0, passes=passes), leave)


def test_positions_leave_when_they_come_to_rest():
    model, tokens = make_model(small_config(**DRAWN), 3, shake=0.2), tokens_of(3, 16)
    with torch.no_grad():
        for block in model.blocks[1:3]:  # nearer to rest
            block.attn_scale *= 0.3
            block.mlp_scale *= 0.3
    two, four = (passes_of(model, passes)(tokens, None) for passes in (2, 4))
    assert torch.equal(passes_of(model, 4, 1e-9)(tokens, None), four)
    # The second pass is the first that is compared with another: there all leave.
    assert torch.equal(passes_of(model, 4, 1e9)(tokens, None), two)
    states, seen = [], {}

    def note(y, x):
        states.append(x)
        return y
    make_forward(model, plan_phase(model.settings, 1.0, passes=4))(tokens, None, {
        f"loops.1.pass.{number}": note for number in range(4)})
    change = [(b - a).norm(dim=-1) / a.norm(dim=-1) for a, b in zip(states[1:], states[2:], strict=False)]
    leave = float(torch.cat([part.flatten() for part in change]).median())
    mixed = passes_of(model, 4, leave)
    out = mixed(tokens, None)
    assert not torch.allclose(out, two, atol=1e-4) and not torch.allclose(out, four, atol=1e-4)
    # Whoever leaves is known from the past alone, and in any company.
    for t in (3, 9, 14):
        changed = tokens.clone()
        changed[:, t] = 4 + (changed[:, t] - 3) % 380
        assert torch.allclose(mixed(changed, None)[:, :t], out[:, :t], atol=1e-5)
    for row in range(3):
        seen[row] = mixed(tokens[row:row + 1], None)
        assert torch.allclose(seen[row], out[row:row + 1], atol=1e-5)


def test_passes_of_evaluation_are_a_setting():
    config = small_config(**DRAWN, EVAL_PASSES=4)
    model = make_model(config, 3, shake=0.2)
    guest = make_guest("contiguous", model, config, train_gpt.make_world({}))
    tokens = tokens_of(1, 12)
    assert torch.equal(guest.forward(tokens, None), passes_of(model, 4)(tokens, None))
    usual = make_guest("contiguous", model, small_config(**DRAWN), train_gpt.make_world({}))
    assert torch.equal(usual.forward(tokens, None), passes_of(model, 2)(tokens, None))
    with pytest.raises(ConfigError, match="EVAL_PASSES=5"):
        small_config(**DRAWN, EVAL_PASSES=5)


def test_the_valve_goes_by_the_chunk_before():
    config = small_config(**DRAWN, EVAL="valve", VALVE_BITS=4)
    guest = make_guest("valve", make_model(config, 3, shake=0.2), config, train_gpt.make_world({}))
    state = guest.begin(4, None)
    assert isinstance(state, Depths) and state.levels == [1] * 4
    state.bits = [1.9, 2.0, 3.9, 4.0]
    ask = train_gpt.Ask([], torch.zeros(0), None, torch.zeros(0), [], 3)
    assert guest.learn(state, ask, torch.zeros(0)) and state.levels == [0, 1, 1]


def test_the_valve_notes_each_rows_entropy_and_takes_its_depth():
    config = small_config(**DRAWN, EVAL="valve")
    model = make_model(config, 3, shake=0.2)
    guest = make_guest("valve", model, config, train_gpt.make_world({}))
    ways = guest.rehearsed()  # the last round has the work of all depths, the first row the most
    assert [way.firsts for way in ways] == [[0], [1], [2], [2, 1, 0]] and guest.firsts == [1]
    assert ways[-1].begin(1, None).levels == [2] and ways[-1].begin(5, None).levels == [2, 1, 0, 2, 1]
    state, tokens, offers = guest.begin(3, None), tokens_of(3, 12), []
    state.levels = [2, 0, 1]
    places = torch.tensor([3, 4, 12 + 5, 24 + 2, 24 + 3, 24 + 4])
    guest.predict(state, train_gpt.Ask([0] * 3, tokens, None, places, [2, 1, 3], 3), offers.append)
    wanted = [model.logits(passes_of(model, passes)(tokens[row:row + 1], None)[0])[at] for row, passes, at in (
        (0, 4, slice(3, 5)), (1, 1, slice(5, 6)), (2, 2, slice(2, 5)))]
    assert len(offers) == 1 and torch.allclose(offers[0], torch.cat(wanted), atol=1e-5)
    for row in range(3):
        chances = wanted[row].double().softmax(-1)
        assert state.bits[row] == pytest.approx(float(-(chances * chances.log2()).sum(-1).mean()), abs=1e-4)


def test_the_valve_scores_by_its_levels(mini, tmp_path):
    """With one depth for all levels its threshold is nothing; with several it changes the score; the referee agrees."""
    words = small_words(mini, tmp_path, **DRAWN, ITERATIONS=30, TTT_CHUNK_SIZE=16, TTT_EVAL_SEQ_LEN=64)
    assert main([*words, "RUN_ID=a", "STAGES=train,calibrate,write,reload,evaluate,report", "EVAL=valve", "AUDIT=1",
                 "AUDIT_TOKENS=300"], {}) == 0

    def score(name, *more):
        again = [*words, f"RUN_ID={name}", f"FROM={tmp_path / 'a'}", "STAGES=reload,evaluate", "PACK=0", *more]
        assert main(again, {}) == 0
        return {kind: row["val_loss"] for kind, row in json.loads(
            (tmp_path / name / "result.json").read_text())["scores"].items() if kind in EVALUATORS}
    # Below the threshold all chunks but the first of a document take one pass, above it four.
    low, high = (score(f"v{bits}", "EVAL=valve", f"VALVE_BITS={bits}")["valve"] for bits in (20, 0.1))
    other = score("other", "EVAL=valve", "VALVE_PASSES=1,2,3", "VALVE_BITS=0.1")["valve"]
    assert len({low, high, other}) == 3
    flat = {score(f"f{bits}", "EVAL=valve", "VALVE_PASSES=2,2,2", f"VALVE_BITS={bits}")["valve"] for bits in (20, 0.1)}
    assert len(flat) == 1
    with pytest.raises(ConfigError, match="needs three whole numbers"):
        load_config([*words, "EVAL=valve", "VALVE_PASSES=1,2"], {}, gpus=0)


# -- computed again


@pytest.mark.parametrize("words", [HYBRID, MOE, {"PRESET": "sixteen", "STACK": "A (A)*3 A"}])
def test_blocks_computed_again_have_the_same_gradients_and_keep_less(words):
    model = make_model(small_config(**words), 3, shake=0.2)
    tokens, parameters, found, kept = tokens_of(2, 48), list(model.parameters()), [], []
    for again in (False, True):
        size = 0

        def pack(x):
            nonlocal size
            size += x.numel() * x.element_size()  # noqa: B023
            return x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = make_loss(model, 0, again=again)(tokens, tokens.roll(-1, 1), document_index(tokens))
        kept.append(size)
        found.append([loss.detach(), *torch.autograd.grad(loss, parameters, allow_unused=True)])
    for wanted, got in zip(*found, strict=True):
        assert (wanted is None) == (got is None) and (wanted is None or torch.equal(wanted, got))
    assert kept[1] < 0.5 * kept[0]


def test_a_run_computes_again_when_told_to(mini, tmp_path, monkeypatch):
    losses, asked = [], []
    plain = train_gpt.checkpoint
    monkeypatch.setattr(train_gpt, "checkpoint", lambda *inputs, **more: asked.append(1) or plain(*inputs, **more))
    for on in (0, 1):
        assert main(small_words(mini, tmp_path, RUN_ID=f"c{on}", ITERATIONS=4, STAGES="train", GRAD_CHECKPOINT=on),
                    {}) == 0
        losses.append([event["train_loss"] for event in events(tmp_path / f"c{on}", "step")])
        assert bool(asked) == bool(on)
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("words", [{"PRESET": "clowncar"}, {"PRESET": "chimera"},
                                   {**INPLACE, "STACK": "A{moe=3}2", "RETRIEVAL_BITS": 16},
                                   {**KNOT, "GRAMMAR_BIAS": 1}])
def test_one_graph_holds_a_model_at_any_length(words):
    """What a GPU compiles, traced on a CPU: evaluation's forward for all lengths, and the loss with its gradients."""
    model = make_model(small_config(**words), 2, shake=0.2)
    plain = make_forward(model, len(model.phases) - 1)
    traced = torch.compile(plain, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        for length in (24, 31):
            tokens = tokens_of(2, length)
            docs = document_index(tokens)
            assert torch.allclose(traced(tokens, docs), plain(tokens, docs), atol=1e-5)
    loss, parameters = make_loss(model, 0, again=True), list(model.parameters())
    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, dynamic=False, backend="aot_eager")):
        value = function(tokens, tokens.roll(-1, 1), document_index(tokens))
        found.append([value, *torch.autograd.grad(value, parameters, allow_unused=True)])
    for wanted, got in zip(*found, strict=True):
        assert (wanted is None) == (got is None) and (wanted is None or torch.allclose(wanted, got, atol=1e-4))


# -- texts in pieces

PIECES = {
    "hybrid": HYBRID, "experts": MOE, "in place": {**INPLACE, "INPLACE_MOMENTUM": 0.5, "INPLACE_DECAY": 0.9},
    "sixteen": {"PRESET": "sixteen", "BIGRAM_VOCAB_SIZE": 64, "TRIGRAM": 1}, "jamone": {"PRESET": "jamone"},
    "radial": {"PRESET": "radial"}, "clowncar": {"PRESET": "clowncar"}, "ternary": {"PRESET": "ternary"},
    "caseops": {"PRESET": "caseops"}, "mixers": {"PRESET": "baseline", "STACK": "D T G X"},
    "span knot": {"PRESET": "baseline", "STACK": "K G"}, "grammar": {"PRESET": "baseline", "GRAMMAR_BIAS": 1},
    "values": {"PRESET": "baseline", "VALUE_RESIDUAL": 1, "VE_LAYERS": "1", "SMEAR_CHANNELS": 1},
    "retrieval": {"PRESET": "baseline", "RETRIEVAL_BITS": 32},
    "yarn": {"PRESET": "baseline", "YARN_FACTOR": 4, "XSA_LAST_N": 2, "ATTN_GATE": "dense"}}


@pytest.mark.parametrize("name", PIECES)
def test_a_text_read_in_pieces_is_the_text(name):
    model = make_model(small_config(**PIECES[name]), 2, shake=0.2)
    forward, tokens = make_forward(model, len(model.phases) - 1), tokens_of(2, 37)
    if model.grammar is not None:
        tokens[:, 1:] %= len(PIECES_OF_TEXT)
    memory, found, begin = Memory(), [], 0
    with torch.no_grad():
        whole = forward(tokens, None)
        for size in (5, 1, 1, 9, 1, 2, 16, 1, 1):
            found.append(forward(tokens[:, begin:begin + size], None, memory=memory))
            begin += size
            if begin == 17:
                held = memory.copy()
        assert torch.allclose(torch.cat(found, 1), whole, atol=2e-5) and memory.length == begin == 37
        # A copy goes on by itself: what was read since is not in it.
        assert held.length == 17
        assert torch.allclose(forward(tokens[:, 17:], None, memory=held), whole[:, 17:], atol=2e-5)


def test_places_begin_again_where_their_table_does():
    model = make_model(small_config(PRESET="radial", TRAIN_SEQ_LEN=64, POSITION_ROWS=256), 2, shake=0.2)
    model.positions.rows = 11
    forward, tokens, memory = make_forward(model, 0), tokens_of(1, 40), Memory()
    with torch.no_grad():
        whole = forward(tokens, None)
        found = [forward(tokens[:, at:at + 1], None, memory=memory) for at in range(40)]
    assert torch.allclose(torch.cat(found, 1), whole, atol=2e-5) and memory.tail.shape[1] <= 11 + 8


def test_recurrent_stacks_hold_the_same_however_long_the_text():
    sizes = {}
    for stack in ("D T G X K", "A G"):
        model = make_model(small_config(PRESET="baseline", STACK=stack), 2)
        forward, memory = make_forward(model, 0), Memory()
        sizes[stack] = []
        with torch.no_grad():
            for _ in range(3):
                forward(tokens_of(1, 70, begins=False), None, memory=memory)
                sizes[stack].append(memory.bytes())
    assert len(set(sizes["D T G X K"])) == 1
    assert sizes["A G"][2] - sizes["A G"][1] == sizes["A G"][1] - sizes["A G"][0] > 0


def test_memories_by_whole_chunks_are_refused():
    assert memory_unusable(small_config(**HYBRID).model) is None
    for more in ({"TITANS_DEPTH": 2}, {"TITANS_CONTEXT": 1}):
        settings = small_config(PRESET="baseline", STACK="T", **more).model
        assert "cannot be read token by token" in memory_unusable(settings)
    assert memory_unusable(small_config(PRESET="baseline", STACK="T").model) is None


# -- told


def test_what_rules_states_and_depth_is_told(mini, tmp_path):
    words = small_words(mini, tmp_path, PRESET="chimera", STACK="G{moe=2} (X A)*1..4~2 A", RUN_ID="told", ITERATIONS=6,
                        STAGES="train", VAL_LOSS_EVERY=3)
    assert main(words, {}) == 0
    told = events(tmp_path / "told", "parts")
    assert [event["step"] for event in told] == [3, 6]
    assert all(0 < event["alpha"] < 1 and 0 < event["beta"] < 1 and event["imbalance"] >= 0 for event in told)
    assert all(1 <= event["passes"] <= 4 for event in told[:2])
    assert "parts: alpha 0." in (tmp_path / "told" / "train.log").read_text()
    assert parse_stack("G{moe=2}")[0][0].overrides == {"moe_experts": 2}
    assert dataclasses.replace(small_config().model, moe_experts=3).moe_experts == 3
