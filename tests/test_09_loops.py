"""MODEL and TRAINING, the state of looped groups and passes that training draws: the laws of Parcae's specification."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import events, launch, make_model, small_config, small_words

from train_gpt import (
    HOLDS,
    Coverage,
    document_index,
    drawn_passes,
    dropped_parts,
    load_checkpoint,
    main,
    make_forward,
    make_loss,
    mean_passes,
    parse_stack,
    plan_layers,
    plan_phase,
    plan_text,
    rms_norm,
)

STACK = "A (A2)*1..4~2 A"
DRAWN = {"PRESET": "sixteen", "STACK": STACK, "LOOP_STATE": "exact", "LOOP_SKIPS": 0}


def test_the_state_never_grows_by_itself():
    """Whatever the parameters are, what is kept of it is below 1 in every channel; both ways of holding agree where the
    time is short, and are as published at the start."""
    loop = make_model(small_config(**DRAWN)).loops["1"]
    h, e = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    for seed in range(20):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in (loop.a_log, loop.pace):
                parameter.copy_(4 * torch.randn(32))
        assert (loop.hold(h, torch.zeros_like(e)).abs() < h.abs()).all()
    time, rate = torch.full((1,), 1e-4), torch.ones(1)
    assert HOLDS["exact"](time, rate) == pytest.approx(float(HOLDS["euler"](time, rate)), rel=1e-3)
    for kind, taken in (("exact", 0.553), ("euler", 0.805)):
        loop = make_model(small_config(**{**DRAWN, "LOOP_STATE": kind})).loops["1"]
        assert torch.allclose(loop.hold(torch.zeros(32), torch.ones(32)), torch.full((32,), taken), atol=1e-3)
        assert torch.allclose(loop.hold(torch.ones(32), torch.zeros(32)), torch.full((32,), 0.2 ** 0.5), atol=1e-3)


def test_one_pass_is_the_plain_stack_behind_the_injection():
    """Of a model with one pass a group: block(B e), e the normalised stream."""
    config = small_config(PRESET="baseline", STACK="A (A)*1..2~1 A", LOOP_STATE="exact", UNET_SKIPS=0)
    model = make_model(config, 2, shake=0.2)
    tokens = torch.randint(4, 384, (2, 9))
    first, group, last = model.blocks
    forward = make_forward(model, 0)
    kinds = [step.block for step in model.phases[0].steps]
    assert kinds == [0, 1, 2] and len(plan_phase(config.model, 0.0, deepest=True).steps) == 4
    x0 = model.embed(tokens, None)
    loop = model.loops["1"]
    plain = make_model(small_config(PRESET="baseline", STACK="A3", UNET_SKIPS=0))
    plain.load_state_dict({name: p for name, p in model.state_dict().items() if not name.startswith("loops")})
    seen = {}

    def note(name, change=lambda y: y):
        def watch(y, x):
            seen[name] = y
            return change(y)
        return watch
    found = forward(tokens, document_index(tokens), {"loops.1.pass.0": note("state")})
    time = F.softplus(loop.pace)
    entered = first(x0, None, x0, context(model, tokens), sites(), None)[0]
    taken = -torch.expm1(-time * loop.a_log.exp()) / loop.a_log.exp()
    held = taken * loop.give * rms_norm(entered, model.settings.norm_eps)
    assert torch.allclose(seen["state"], held, atol=1e-5)
    after = group(held, None, x0, context(model, tokens), sites(), None)[0]
    wanted = rms_norm(last(after, None, x0, context(model, tokens), sites(), None)[0], model.settings.norm_eps)
    assert torch.allclose(found, wanted, atol=1e-5)


def context(model, tokens):
    from train_gpt import Context, attention_mask
    docs = document_index(tokens)
    return Context(attention_mask(docs, tokens.shape), docs, None, None)


def sites():
    from train_gpt import Sites
    return Sites(*Sites._fields)


def test_what_is_drawn_is_poisson_within_its_bounds_and_the_last_half_learns():
    settings = small_config(**DRAWN).model
    plan = plan_phase(settings, 0.0, deepest=True)
    firsts = [step.visit for step in plan.steps if step.turn and step.turn.first]
    assert len(firsts) == 4
    keep = drawn_passes(settings, plan, 4000, 7)[firsts]
    count = (keep > 0).sum(0)
    rng = np.random.Generator(np.random.PCG64(7))
    assert np.array_equal(count, np.clip(rng.poisson(2.0, 4000), 1, 4))
    assert np.array_equal(keep, drawn_passes(settings, plan, 4000, 7)[firsts]) and not np.array_equal(
        keep, drawn_passes(settings, plan, 4000, 8)[firsts])
    # Of three passes with a mean of two the last one learns: the stream is cut before the second and the third.
    three = keep[:, count == 3][:, 0]
    assert three.tolist() == [1, 2, 2, 0] and keep[:, count == 1][:, 0].tolist() == [1, 0, 0, 0]
    assert (drawn_passes(settings, plan, 3, None) == 1).all()


def test_rows_of_different_depth_are_what_each_is_alone():
    config = small_config(**DRAWN)
    model = make_model(config, 3, shake=0.2)
    plan = plan_phase(config.model, 0.0, deepest=True)
    forward = make_forward(model, plan)
    tokens = torch.randint(4, 384, (5, 12), generator=torch.Generator().manual_seed(1))
    keep = torch.from_numpy(drawn_passes(config.model, plan, 5, 11))
    assert len({tuple(column) for column in keep.T.tolist()}) > 1
    together = forward(tokens, None, None, keep)
    for row in range(5):
        alone = forward(tokens[row:row + 1], None, None, keep[:, row:row + 1])
        assert torch.allclose(together[row:row + 1], alone, atol=1e-5)
    # As many passes as evaluation has are what evaluation does.
    usual = torch.from_numpy(np.array([[1.0 if not step.turn or step.turn.number < 2 else 0.0] for step in plan.steps],
                                      np.float32))
    assert torch.allclose(forward(tokens[:1], None, None, usual), make_forward(model, 0)(tokens[:1], None), atol=1e-5)


def test_cut_passes_get_no_gradient():
    """With two passes of which the last learns, the first block's gradient is that of a stream that begins there."""
    config = small_config(**{**DRAWN, "STACK": "(A)*1..2~1"})
    model = make_model(config, 3, shake=0.2)
    plan = plan_phase(config.model, 0.0, deepest=True)
    tokens = torch.randint(4, 384, (1, 12), generator=torch.Generator().manual_seed(1))
    found = {}
    for name, keep in (("cut", [[1.0], [2.0]]), ("whole", [[1.0], [1.0]])):
        model.zero_grad()
        loss = make_loss(model, plan)(tokens, tokens.roll(-1, 1), document_index(tokens), None, torch.tensor(keep))
        loss.backward()
        found[name] = loss.item(), model.loops["0"].a_log.grad.clone(), model.blocks[0].mixer.q.weight.grad.clone()
    assert found["cut"][0] == found["whole"][0]
    # The state's decay acts in the second pass only, on what the first one left: its gradient stays.
    assert found["cut"][1].abs().sum() > 0 and not torch.allclose(found["cut"][2], found["whole"][2])


def test_plan_and_evaluation_have_the_mean():
    settings = small_config(**DRAWN).model
    assert parse_stack(STACK)[1][1].depth == (1, 4, 2.0)
    assert [step.block for step in plan_layers(settings)[0].steps] == [0, 1, 2, 1, 2, 3]
    assert "blocks 1-2: in training 1 to 4 passes a row, on average 2.06" in plan_text(settings)
    assert "blocks 1-2, 4 passes: exact state" in plan_text(settings)


@pytest.mark.parametrize("depth", [(1, 4, 2.0), (2, 8, 2.0), (1, 4, 4.0), (4, 8, 4.5), (3, 3, 3.0)])
def test_the_mean_of_drawn_passes(depth):
    """Of what is drawn, not of the law that is cut off."""
    least, most, mean = depth
    settings = small_config(**DRAWN | {"STACK": f"A (A)*{least}..{most}~{mean:g} A"}).model
    plan = plan_phase(settings, 0.0, deepest=True)
    drawn = drawn_passes(settings, plan, 20000, 5)
    firsts = [step.visit for step in plan.steps if step.turn and step.turn.first]
    assert (drawn[firsts] > 0).sum(0).mean() == pytest.approx(mean_passes(*depth), abs=0.05)


def test_a_step_that_takes_few_passes_is_no_fault():
    """Coverage spares what belongs to a pass that no row may draw, what PASS_DROP leaves out, and experts with their
    low-rank paths; Euler's first pass has no decay in its graph, so that none is missed."""
    config = small_config(**DRAWN | {"LOOP_INSTRUCTIONS": "flow", "ANCHOR_DIM": 4})
    spared = {name for name, p in make_model(config, 1).named_parameters() if hasattr(p, "rare")}
    assert spared == {name for name, _ in make_model(config, 1).named_parameters()
                      if name.startswith(("loops.1.inst_out", "loops.1.anchor"))} and len(spared) == 4 + 3 + 3
    fixed = small_config(STACK="A (A)*3 A", LOOP_INSTRUCTIONS="flow", PASS_DROP=0.5, MOE_EXPERTS=2, HGF_RANK=2)
    model = make_model(fixed, 1)
    coverage = Coverage(model, dropped_parts(fixed.model))
    kept = {name.split(".")[1] for name in coverage.still if name.startswith("blocks.")}
    assert kept == {"0", "2"} and not any(name.startswith("loops.") for name in coverage.still)
    assert not any(".routed." in name for name in coverage.still) and any("path" in name for name in coverage.still)
    euler = make_model(small_config(STACK="A (A)*3@0.5 A", LOOP_STATE="euler"), 1)
    for phase, reached in enumerate((False, True)):
        make_forward(euler, phase)(torch.arange(2, 18).view(2, 8), None).square().sum().backward()
        assert (euler.loops["1"].a_log.grad is not None) is reached


def test_it_trains_resumes_and_ranks_agree(mini, tmp_path):
    """The passes of a row are drawn by its number, whoever computes it."""
    words = small_words(mini, tmp_path, **DRAWN, ITERATIONS=6, STAGES="train")
    found = []
    for processes in (1, 2):
        done = launch([*words, f"RUN_ID=r{processes}"], processes)
        assert done.returncode == 0, done.stderr
        found.append([event["train_loss"] for event in events(tmp_path / f"r{processes}", "step")])
    assert found[0] == pytest.approx(found[1], abs=2e-5) and found[0][-1] < found[0][0]
    assert main([*words, "RUN_ID=again", "STAGES=train,calibrate,write,reload,evaluate", "EVAL=ttt"], {}) == 0
    assert [event["train_loss"] for event in events(tmp_path / "again", "step")] == pytest.approx(found[0], abs=1e-6)
    assert load_checkpoint(tmp_path / "again" / "checkpoint.pt").weights["loops.1.a_log"].abs().sum() > 0
