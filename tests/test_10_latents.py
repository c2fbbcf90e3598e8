"""OPTIMIZERS, what changes the steps of ternary latents: CAGS as published and placed, the rate term; the laws of their
specification, and what training makes of them."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import events, make_model, small_config, small_words

from train_gpt import (
    FORMATS,
    Optimizer,
    OptimSettings,
    Route,
    World,
    adamw_update_,
    alpha_guarded,
    alpha_published,
    cags_published,
    entropy_bits,
    latent_units,
    load_checkpoint,
    main,
    pick_route,
    rate_pull,
    rate_ramp,
    routes_of,
    run_signal,
    snap_gain,
)

ROUTE = Route("ternary", group=8, tau=0.8)
TERNARY = {"PRESET": "baseline", "STACK": "A2", "MATRIX_FORMAT": "ternary", "GROUP_SIZE": 8, "QAT_START": 0,
           "MUON_MOMENTUM_WARMUP_STEPS": 0, "WARMDOWN_ITERS": 0}


@pytest.mark.parametrize("scale", ["absmean", "rms", "nonzero"])
def test_units_have_the_border_at_a_half_and_no_scale(scale):
    """A weight is a zero exactly below a half; Psi and Phi do not change when all weights are multiplied."""
    route = Route("ternary", group=8, scale=scale, tau=0.7)
    weight = torch.randn(5, 21)
    units = latent_units(weight, route)
    codes = FORMATS["ternary"].encode(weight, route).codes
    assert units.shape == weight.shape and torch.equal(units.abs() > 0.5, codes != 0)
    again = latent_units(37 * weight, route)
    assert torch.allclose(units, again, rtol=1e-5)
    assert torch.allclose(run_signal(units), run_signal(again), atol=1e-5)
    assert torch.allclose(snap_gain(units), snap_gain(again), atol=1e-4)


def test_run_signal_by_hand():
    """Four neighbours on either side, not itself, not beyond the row."""
    units = torch.randn(3, 12)
    zero = torch.sigmoid((0.5 - units.abs()) / 0.1)
    found = run_signal(units)
    for row, at in ((0, 0), (1, 5), (2, 11), (2, 2)):
        near = [j for j in range(max(0, at - 4), min(12, at + 5)) if j != at]
        assert found[row, at] == pytest.approx(float(zero[row, near].mean()), abs=1e-5)


def test_snap_gain_is_1_at_borders_and_0_at_trits():
    units = torch.tensor([-2.0, -1.5, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.7])
    assert torch.allclose(snap_gain(units), torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.5, 1.0, 0.0, 1.0]))


def test_published_factor_is_nearly_constant_at_the_start():
    """Psi near 1 and Phi near the weight: a factor of 1.016 on average, which no optimizer that normalises sees."""
    torch.manual_seed(0)
    weight = (torch.rand(64, 600) * 2 - 1) / 600 ** 0.5
    factor = cags_published(weight, torch.tensor(0.8))
    assert float(factor.mean()) == pytest.approx(1.016, abs=0.002) and float(factor.max()) < 1.04
    row = torch.tensor([[0.01, 0.2, 0.01, 0.9]])
    assert torch.allclose(cags_published(row, torch.tensor(1.0)), 1 + torch.tensor([[0.01, 0.2, 0.01, 0.1]]) * 2 / 9)


def test_a_constant_factor_on_gradients_is_a_no_op_under_adamw():
    """The published hook, 1.1 on every gradient: after 200 steps the weights are the same."""
    torch.manual_seed(0)
    weights = [torch.randn(20, 20) for _ in range(1)]
    twins, state = [w.clone() for w in weights], [[[torch.zeros(20, 20)], [torch.zeros(20, 20)]] for _ in range(2)]
    for step in range(1, 201):
        grads = [torch.randn(20, 20)]
        adamw_update_(weights, grads, *state[0], step, 3e-4, 0.0, OptimSettings())
        adamw_update_(twins, [1.1 * g for g in grads], *state[1], step, 3e-4, 0.0, OptimSettings())
    assert (weights[0] - twins[0]).abs().max() < 1e-6


def test_alpha_rules():
    """The published one only falls, when the loss is 15 % above its mean; the guard falls and recovers."""
    alpha, mean = torch.tensor(0.8), torch.zeros(())
    for loss in (2.0, 2.1, 2.0, 3.0, 2.0, 2.0):
        alpha_published(alpha, mean, torch.tensor(loss))
    assert float(alpha) == pytest.approx(0.8 / 1.5) and 2.0 < float(mean) < 2.1
    for _ in range(100):
        alpha_published(alpha, torch.tensor(1.0), torch.tensor(2.0))
    assert float(alpha) == pytest.approx(0.05)
    guard, mean = torch.tensor(1.0), torch.zeros(())
    seen = []
    for loss in (2.0, 2.0, 2.5, 2.0, *[2.0] * 40):
        alpha_guarded(guard, mean, torch.tensor(loss))
        seen.append(float(guard))
    assert seen[1] == 1 and seen[2] == pytest.approx(1 / 1.5) and seen[3] > seen[2] and seen[-1] == 1


def test_ramp():
    assert [rate_ramp(frac) for frac in (0.0, 0.29, 0.95, 1.0)] == [0, 0, 0, 0]
    assert rate_ramp(0.475) == pytest.approx(0.5) and rate_ramp(0.65) == rate_ramp(0.94) == 1


def test_the_rate_term_pulls_what_is_near_a_border_towards_zero():
    weight = torch.tensor([[0.5, -0.5, 0.0, 2.0, 0.02, -0.55]])
    units = weight.clone()
    pull = rate_pull(weight, units, torch.full_like(weight, 0.25))
    assert torch.allclose(pull[0, :2], torch.tensor([0.75, -0.75])) and pull[0, 2] == 0
    assert pull[0, 3].abs() < 1e-9 and 0 < pull[0, 4] < 0.02 and pull[0, 5] < -0.7


def optimizers(*settings, model=None):
    """The same model and gradients under several settings; the parameters of each after some steps."""
    found = []
    for words in settings:
        config = small_config(**{**TERNARY, **words})
        model = make_model(config, 3, shake=0.1)
        optimizer = Optimizer(model, config.optim, World(), torch.float32, routes_of(model, config.artifact))
        for step in range(6):
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step(1.0, 0.9, 1.0, 0.7, torch.tensor(3.0))
        found.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return found


def test_without_strength_training_is_the_plain_one_to_the_bit():
    plain, zero, published = optimizers({}, {"CAGS": "placed", "CAGS_ALPHA": 0}, {"CAGS": "published", "CAGS_ALPHA": 0})
    for name, p in plain.items():
        assert torch.equal(p, zero[name]) and torch.equal(p, published[name]), name


def test_only_ternary_latents_are_steered():
    plain, placed, rate, published = optimizers({}, {"CAGS": "placed"}, {"RATE_TERM": 1}, {"CAGS": "published"})
    for name, p in plain.items():
        ternary = p.ndim == 2 and name != "tok_emb" and not name.endswith("resid_mix")
        for other in (placed, rate, published):
            assert torch.equal(p, other[name]) != ternary, name


def test_a_placed_step_is_the_plain_one_times_its_factor():
    config = small_config(**TERNARY, CAGS="placed", CAGS_ALPHA=0.5)
    model = make_model(config, 3, shake=0.1)
    name, weight = "blocks.0.mlp.up.weight", model.blocks[0].mlp.up.weight
    route = pick_route(name, "matrix", config.artifact)
    before, units = weight.detach().clone(), latent_units(weight.detach(), route)
    steps = []
    for routes in (None, {name: route}):
        with torch.no_grad():
            weight.copy_(before)
        optimizer = Optimizer(model, config.optim, World(), torch.float32, routes)
        model.zero_grad()
        weight.grad = torch.ones_like(weight).cumsum(0)
        optimizer.step(1.0, 0.9, 1.0, 0.65, torch.tensor(3.0))
        steps.append(weight.detach() - before)
    factor = 1 + 0.5 * run_signal(units) * snap_gain(units)
    assert torch.allclose(steps[1], steps[0] * factor, atol=1e-6)


def test_gradients_reach_ternary_weights_and_the_rate_term_sets_the_size(mini, tmp_path):
    """Through the loss at the stored weights; the coded size falls with the strength on one seed, and the log, the
    events and the result tell zeros, bits and churn."""
    sizes, zeros = [], []
    for strength in (0, 2, 6, 18):
        words = small_words(mini, tmp_path, RUN_ID=f"rate{strength}", ITERATIONS=24, TRAIN_LOG_EVERY=8,
                            EVAL="contiguous", STAGES="train,calibrate,write,reload,evaluate",
                            RATE_TERM=strength, CODEC="context,range", TERNARY_TAU=0.8, **TERNARY)
        assert main(words, {}) == 0
        folder = tmp_path / f"rate{strength}"
        held, result = load_checkpoint(folder / "checkpoint.pt"), json.loads((folder / "result.json").read_text())
        assert all(held.state[name]["momentum"].any() for name, p in held.weights.items() if name.endswith("up.weight"))
        codes = [FORMATS["ternary"].encode(p, ROUTE).codes.numpy() for name, p in held.weights.items()
                 if p.ndim == 2 and name.startswith("blocks") and "resid" not in name]
        trits = np.concatenate([part.ravel() for part in codes])
        told = result["train"]["trits"]
        assert told["zeros"] == pytest.approx(float((trits == 0).mean()), abs=1e-6)
        assert told["bits"] == pytest.approx(entropy_bits(trits) / len(trits), abs=1e-3)
        sizes.append(result["artifact"]["model_bytes"])
        bits = result["artifact"]["bits_per_trit"]
        assert bits["entropy"] == pytest.approx(told["bits"], abs=1e-3)
        assert bits["base3"] == pytest.approx(1.6, abs=0.01)
        # On a hundred weights a row the coder's tables weigh; it never takes much more than the entropy promises.
        assert 0.8 < bits["efficiency"] < 1.1 and bits["coded"] < 1.7 and bits["base3_zlib"] < 1.75
        assert "bits a trit: in the file" in (folder / "train.log").read_text()
        zeros.append(told["zeros"])
        lines = events(folder, "trits")
        assert [line["step"] for line in lines] == [8, 16, 24] and "churn" not in lines[0] and 0 < lines[1]["churn"] < 1
        assert "trits: zeros" in (folder / "train.log").read_text()
    assert zeros == sorted(zeros) and math.isfinite(sum(zeros)), (zeros, sizes)
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0] - 500, sizes


def test_steering_and_an_average_resume_together(mini, tmp_path, monkeypatch):
    """A run that is cut off between two steps goes on with both, to the same bits."""
    import train_gpt
    words = small_words(mini, tmp_path, **TERNARY, RATE_TERM=1, CAGS="placed", EMA_DECAY=0.5, ITERATIONS=6,
                        STAGES="train")
    assert main([*words, "RUN_ID=whole"], {}) == 0
    plain = train_gpt.Trainer.one_step

    def cut(self, progress):
        if self.step == 3:
            self.save(finished=False)
            self.saving.result()
            raise RuntimeError("killed")
        plain(self, progress)
    monkeypatch.setattr(train_gpt.Trainer, "one_step", cut)
    with pytest.raises(RuntimeError, match="killed"):
        main([*words, "RUN_ID=cut"], {})
    monkeypatch.undo()
    assert main([*words, "RUN_ID=cut"], {}) == 0
    whole, found = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut"))
    for name, tensor in whole.average.items():
        assert torch.equal(tensor, found.average[name]) and torch.equal(whole.weights[name], found.weights[name])


def test_bits_a_trit_with_low_rank_corrections(mini, tmp_path):
    """Corrected tensors count as the others, and the factors do not."""
    words = small_words(mini, tmp_path, RUN_ID="lqer", ITERATIONS=3, STAGES="train,calibrate,write", LQER_RANK=2,
                        LQER_TOP_K=20, CODEC="context,range", **TERNARY)
    assert main(words, {}) == 0
    bits = json.loads((tmp_path / "lqer" / "result.json").read_text())["artifact"]["bits_per_trit"]
    assert 0.8 < bits["efficiency"] < 1.1
    assert any(event["format"] == "ternary+lqer" for event in events(tmp_path / "lqer", "tensor"))
