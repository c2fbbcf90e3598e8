"""OPTIMIZERS: updates against oracles, schedules as functions, sharing of work."""

import itertools
import math

import pytest
import torch
from conftest import make_model, small_config
from hypothesis import given
from hypothesis import strategies as st

from train_gpt import (
    MUON_BACKENDS,
    ROLES,
    UPDATES,
    Average,
    Optimizer,
    OptimSettings,
    Phase,
    Progress,
    World,
    adamw_update_,
    decay_factor,
    fro2_share,
    fro_update_,
    momentum_at,
    muon_direction,
    muon_scale,
    orthogonalize,
    phase_at,
    rate_factor,
    share_out,
)


def test_adamw_equals_torchs():
    torch.manual_seed(0)
    settings = OptimSettings(beta1=0.8, beta2=0.97, adam_eps=1e-7)
    ours = [torch.randn(5, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    theirs = [torch.nn.Parameter(tensor.clone()) for tensor in ours]
    oracle = torch.optim.AdamW(theirs, lr=0.03, betas=(0.8, 0.97), eps=1e-7, weight_decay=0.1)
    firsts, seconds = ([torch.zeros_like(tensor) for tensor in ours] for _ in range(2))
    for step in range(1, 8):
        grads = [torch.randn_like(tensor) for tensor in ours]
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad.clone()
        oracle.step()
        adamw_update_(ours, grads, firsts, seconds, step, 0.03, 0.1, settings)
        for mine, reference in zip(ours, theirs, strict=True):
            assert torch.allclose(mine, reference.detach(), atol=1e-14)


@pytest.mark.parametrize("backend, low, high", [("newton_schulz", 0.6, 1.25), ("polar_express", 0.85, 1.15)])
@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 40), (1, 40, 8)])
def test_orthogonalised_singular_values_are_near_one(backend, low, high, shape):
    torch.manual_seed(1)
    out = orthogonalize(torch.randn(shape), backend, 5, torch.float32)
    values = torch.linalg.svdvals(out)
    # A square Gaussian matrix has some values near zero, which five iterations cannot lift.
    assert out.shape == shape and values.max() < high and values.median() > low


@pytest.mark.parametrize("backend", MUON_BACKENDS)
def test_orthogonalise_keeps_singular_vectors_and_ignores_scale(backend):
    torch.manual_seed(2)
    update = torch.randn(1, 12, 20)
    out = orthogonalize(update, backend, 5, torch.float32)
    assert torch.allclose(out, orthogonalize(update * 1000, backend, 5, torch.float32), atol=1e-4)
    assert torch.allclose(out, orthogonalize(update.mT, backend, 5, torch.float32).mT, atol=1e-4)
    u, _, v = torch.linalg.svd(update, full_matrices=False)
    inner = u.mT @ out @ v.mT
    assert (inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-3


def test_muon_update_by_hand():
    settings = OptimSettings(muon_row_normalize=True)
    grads, momenta = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    update = grads + 0.9 * momenta
    update = update / update.norm(dim=-1, keepdim=True)
    wanted = orthogonalize(update, "newton_schulz", 5, torch.float32)
    assert torch.allclose(muon_direction(grads, momenta, 0.9, settings, torch.float32), wanted, atol=1e-5)
    assert (muon_scale((6, 4)), muon_scale((4, 6))) == ((6 / 4) ** 0.5, 1.0)


def test_a_step_of_the_optimizer_by_hand():
    """Momentum, direction, scale, decay with its taper and rate of one matrix, all in their places."""
    model = make_model(small_config(STACK="A", PRESET="sixteen"))
    settings = OptimSettings(muon_wd=0.5, matrix_lr=0.1)
    optimizer, matrix = Optimizer(model, settings, World(), torch.float32), model.blocks[0].mlp.up.weight
    state = optimizer.state["blocks.0.mlp.up.weight"]["momentum"].normal_()
    before, held, matrix.grad = matrix.detach().clone(), state.clone(), torch.randn_like(matrix)
    optimizer.step(0.25, 0.9, 0.4)
    held = 0.9 * held + matrix.grad
    update = orthogonalize((matrix.grad + 0.9 * held)[None], "newton_schulz", 5, torch.float32)[0]
    wanted = before * (1 - 0.1 * 0.25 * 0.5 * 0.4) - 0.1 * 0.25 * muon_scale(matrix.shape) * update
    assert torch.allclose(matrix, wanted, atol=1e-6) and torch.allclose(state, held)


def fro_state(tensor):
    return UPDATES["fro"].fresh(tensor)


@pytest.mark.parametrize("shape", [(6, 5), (7,)])
def test_fro_by_hand(shape):
    """The published rule in plain numbers, over several steps, on a matrix and a vector."""
    settings = OptimSettings(beta2=0.999, fro_alpha=0.1, fro_gamma=0.8)
    ours = torch.randn(shape, dtype=torch.float64)
    wanted, state = ours.clone(), fro_state(ours)
    m, v, mu, sigma = torch.zeros_like(ours), torch.zeros_like(ours), [0.0] * 3, [0.0] * 3
    for step in range(1, 6):
        g = torch.randn(shape, dtype=torch.float64)
        fro_update_([ours], [g], [state], step, 0.01, 0.1, settings)
        m = 0.9 * m + 0.1 * g
        rho = float((g * m).sum() / (g.norm() * m.norm() + 1e-8))
        for k, pace in enumerate((0.1, 0.01, 0.001)):
            mu[k] += pace * (rho - mu[k])
            sigma[k] += pace * (rho ** 2 - sigma[k])
        r = math.exp(sum(math.log(a * a / (b + 1e-8) + 1e-8) for a, b in zip(mu, sigma, strict=True)) / 3)
        square = g.square().mean(1, keepdim=True) if len(shape) == 2 else g.square()
        v = 0.999 * v + 0.001 * square
        share = (0.1 + 0.9 * 0.8 * min(1.0, r)) / (1 - 0.9 ** step)
        wanted = wanted * (1 - 0.01 * 0.1) - 0.01 * share * m / (v.sqrt() + 1e-8)
        assert torch.allclose(ours, wanted, atol=1e-12)


def test_fros_resonance_says_nothing_about_the_gradients():
    """Noise and one gradient again and again end with the same factor: the start of its means."""
    found = []
    for again in (False, True):
        state, settings = fro_state(torch.zeros(40, 40, dtype=torch.float64)), OptimSettings()
        grad = torch.randn(40, 40, dtype=torch.float64)
        for step in range(1, 101):
            grad = grad if again else torch.randn_like(grad)
            fro_update_([torch.zeros_like(grad)], [grad], [state], step, 0.0, 0.0, settings)
        ratios = state["cosines"][0].square() / state["cosines"][1]
        found.append(float(ratios.log().mean().exp()))
    assert abs(found[0] - found[1]) < 0.02 and found[1] == pytest.approx(0.392, abs=0.02)


def resonances(gradients, **more):
    """FRO-2's factor and its share before the division, step by step."""
    settings = OptimSettings(**{"fro_alpha": 0.3, "fro_gamma": 1.0, **more})
    state, found = UPDATES["fro2"].fresh(torch.zeros(60, 100)), []
    for step, grad in enumerate(gradients, 1):
        mean = float(state["mean"])
        factor = float(fro2_share(grad, state, step, settings))
        raw = mean + (float(state["mean"]) - mean) * step
        found.append((factor, (raw - settings.fro_alpha) / (1 - settings.fro_alpha) / max(settings.fro_gamma, 1e-9)))
    return found


def test_fro2_tells_signal_from_noise_and_keeps_the_rate():
    """Noise: the resonance is at its floor; one gradient again and again: at 1. The factor is 1 on average."""
    torch.manual_seed(0)
    grad = torch.randn(60, 100)
    noise = resonances(torch.randn(60, 100) for _ in range(400))
    steady = resonances(grad for _ in range(400))
    mixed = resonances(grad + 3 * torch.randn(60, 100) for _ in range(400))
    assert sum(r for _, r in noise[-100:]) / 100 < 0.12 and steady[-1][1] > 0.98
    assert noise[-1][1] < mixed[-1][1] < steady[-1][1] + 1e-6
    for found in (noise, steady, mixed):
        assert sum(factor for factor, _ in found) / len(found) == pytest.approx(1, abs=0.25)
        assert all(math.isfinite(factor) and factor > 0 for factor, _ in found)
    assert all(factor == pytest.approx(1, abs=1e-5) for factor, _ in steady)


@pytest.mark.parametrize("rule", ["fro2", "adamw", "fro"])
def test_rules_of_matrices_are_rows(rule):
    """fro2 without gamma is muon to the bit; the others move every matrix, by their own states."""
    models = [make_model(small_config(STACK="A2", PRESET="sixteen"), 3, shake=0.1) for _ in range(2)]
    settings = [OptimSettings(matrix_optimizer=name, fro_gamma=0.0) for name in ("muon", rule)]
    optimizers = [Optimizer(model, each, World(), torch.float32) for model, each in zip(models, settings, strict=True)]
    for step in range(8):
        for model, optimizer in zip(models, optimizers, strict=True):
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step(1.0, 0.9)
    for (name, one), two in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.isfinite(two).all()
        assert torch.equal(one, two) == (rule == "fro2" or one.role != "matrix"), name
    assert optimizers[1].counts["blocks.0.mlp.up.weight"] == 8
    kinds = set(optimizers[1].state["blocks.0.mlp.up.weight"])
    assert kinds == {"fro2": {"momentum", "cosines", "mean", "slow"}, "adamw": {"first", "second"},
                     "fro": {"first", "second", "cosines"}}[rule]


def test_decay_tapers():
    settings = OptimSettings(wd_taper_start_frac=0.5, wd_taper_final_mult=0.2)
    assert [round(decay_factor(settings, frac), 6) for frac in (0, 0.5, 0.75, 1)] == [1, 1, 0.6, 0.2]
    assert decay_factor(OptimSettings(), 1.0) == 1


def test_rates():
    by_share = OptimSettings(warmdown_iters=0, warmdown_frac=0.5, min_lr=0.1)
    assert [rate_factor(by_share, Progress(0, frac, 1)) for frac in (0, 0.5, 0.75, 1)] == [1, 1, 0.5, 0.1]
    by_steps = OptimSettings(warmdown_iters=100)
    assert [rate_factor(by_steps, Progress(0, 0.5, left)) for left in (500, 100, 25, 0)] == [1, 1, 0.25, 0]
    assert rate_factor(OptimSettings(warmdown_iters=0), Progress(0, 0.99, 1)) == 1


def test_momentum_rises():
    settings = OptimSettings(muon_momentum_warmup_start=0.8, muon_momentum=0.9, muon_momentum_warmup_steps=10)
    assert [round(momentum_at(settings, step), 6) for step in (0, 5, 10, 99)] == [0.8, 0.85, 0.9, 0.9]


def test_phase_follows_progress():
    plan = tuple(Phase(start, ()) for start in (0.0, 0.35, 0.5))
    assert [phase_at(plan, frac) for frac in (0, 0.34, 0.35, 0.6, 1.0)] == [0, 0, 1, 2, 2]


@given(st.dictionaries(st.text("abc", max_size=4), st.floats(0.1, 100), min_size=1, max_size=12), st.integers(1, 5))
def test_share_out_is_complete_and_balanced(costs, size):
    owners = share_out(costs, size)
    assert set(owners) == set(costs) and set(owners.values()) <= set(range(size))
    loads = [sum(cost for name, cost in costs.items() if owners[name] == rank) for rank in range(size)]
    assert max(loads) - min(loads) <= max(costs.values()) + 1e-9
    assert share_out(dict(reversed(costs.items())), size) == owners


def test_absent_gradients_leave_parameters_alone():
    """Parameters of a later phase are not decayed, not moved, and start their bias correction when they begin."""
    model = make_model(small_config(STACK="A (A)*2@0.5", PRESET="sixteen"))
    optimizer = Optimizer(model, OptimSettings(muon_wd=0.5, embed_wd=0.5), World(), torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.tok_emb.grad = torch.ones_like(model.tok_emb)
    optimizer.step(1.0, 0.9)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"tok_emb"} and optimizer.counts["tok_emb"] == 1 and optimizer.counts["blocks.0.attn_scale"] == 0


def test_gains_are_never_decayed():
    assert all(not row.decay for name, row in ROLES.items() if name in ("gain", "gate"))


def test_average_is_exponential_in_fp32():
    model = torch.nn.Linear(2, 2)
    average, wanted = Average(model, 0.75), model.weight.detach().clone()
    for step in range(4):
        with torch.no_grad():
            model.weight += step
        average.update()
        wanted = 0.75 * wanted + 0.25 * model.weight.detach()
    assert torch.allclose(average.weights()["weight"], wanted, atol=1e-6)
    assert Average(model, 0.0).weights()["weight"].data_ptr() == model.weight.data_ptr()


def test_a_step_of_each_rank_adds_up_to_the_whole():
    """Two ranks' shares, computed one after the other, hold every matrix once."""
    model = make_model(small_config(STACK="A3"))
    owned = [{name for name, rank in Optimizer(model, OptimSettings(), World(0, 2), torch.float32).owners.items()
              if rank == side} for side in (0, 1)]
    assert owned[0] | owned[1] == {name for name, p in model.named_parameters() if p.role == "matrix"}
    assert not owned[0] & owned[1] and all(owned)
    assert not set(itertools.chain(*owned)) & {"tok_emb"}
