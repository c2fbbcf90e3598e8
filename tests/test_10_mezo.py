"""OPTIMIZERS and TRAINING, MeZO: training by forward passes alone; its laws, its log, and what resumes from it."""

import json

import pytest
import torch
from conftest import events, make_model, small_config, small_words

import train_gpt
from train_gpt import (
    Mezo,
    Optimizer,
    OptimSettings,
    Route,
    World,
    latent_units,
    load_checkpoint,
    main,
    mezo_direction,
    routes_of,
    sgd_step_,
)

MEZO = {"PRESET": "baseline", "STACK": "A2", "MATRIX_OPTIMIZER": "mezo", "OTHER_OPTIMIZER": "mezo", "WARMDOWN_ITERS": 0,
        "MATRIX_LR": 1e-3, "TIED_EMBED_LR": 1e-3, "SCALAR_LR": 1e-4, "GRAD_CLIP_NORM": 20.0, "MUON_WD": 0.01}
TRITS = {"MATRIX_FORMAT": "ternary", "GROUP_SIZE": 8, "QAT_START": 0, "RATE_TERM": 0.5, "CAGS": "placed"}
STAGES = "train,calibrate,write,reload,evaluate"


def mezo_of(**more):
    config = small_config(**{**MEZO, **more})
    model = make_model(config, 3, shake=0.1)
    optimizer = Optimizer(model, config.optim, World(), torch.float32, routes_of(model, config.artifact))
    return model, optimizer, Mezo(optimizer, 5, None)


def test_a_seed_is_a_direction():
    weight = torch.randn(7, 24)
    first = mezo_direction(weight, None, 3)
    assert torch.equal(first, mezo_direction(weight, None, 3)) and first.std() == pytest.approx(1, abs=0.15)
    assert not torch.equal(first, mezo_direction(weight, None, 4))


def test_ternary_directions_have_the_scale_of_their_group():
    """Whatever the size of the latents, from a least one on, the same share of trits flips; zero groups move."""
    route = Route("ternary", group=8)
    weight = torch.randn(64, 256)
    flips = []
    for size in (1e-3, 0.02, 5.0):
        latent = size * weight
        step = 0.03 * mezo_direction(latent, route, 1)
        there, back = (latent_units(latent + sign * step, route).round().clamp(-1, 1) for sign in (1, -1))
        flips.append(float((there != back).float().mean()))
    assert flips[1:] == pytest.approx([flips[2]] * 2, abs=1e-3) and 0.005 < flips[2] < 0.05, flips
    assert flips[0] > flips[1]  # below LEAST_LATENT more of them flip
    assert mezo_direction(torch.zeros(2, 8), route, 1).abs().min() > 0


@pytest.mark.parametrize("more", [{}, TRITS], ids=["plain", "ternary"])
def test_a_probe_leaves_the_weights_to_the_bit_and_reads_the_slope(more):
    """Of a loss that is linear in the weights, half the difference is the product of its gradient and the direction."""
    model, optimizer, mezo = mezo_of(**more)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    slope = {name: torch.randn(p.shape, generator=torch.Generator().manual_seed(9)) for name, p in before.items()}
    loss = lambda: sum((p.detach() * slope[name]).sum().double() for name, p in model.named_parameters())  # noqa: E731
    for step in range(30):
        plus, minus = mezo.probe(step, loss)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        wanted = sum(reach * (direction * slope[name]).sum() for name, (_, direction, reach) in
                     zip(before, mezo.directions(step), strict=True))
        assert float(plus - minus) / 2 == pytest.approx(float(wanted), rel=2e-3, abs=1e-3)
        mezo.fill(step, float(plus - minus) / 2)
        for (parameter, direction, reach), p in zip(mezo.directions(step), model.parameters(), strict=True):
            assert parameter is p and torch.allclose(p.grad, direction * (float(plus - minus) / 2 / reach))


def test_every_parameter_is_walked_once():
    model, optimizer, mezo = mezo_of()
    seen = [parameter for parameter, _, _ in mezo.directions(0)]
    assert len(seen) == len({id(p) for p in seen}) == len(list(model.parameters()))


def test_it_converges_on_a_quadratic():
    """Ten weights, by the pure functions alone."""
    weight, goal = [torch.zeros(10)], torch.linspace(-1, 1, 10)
    loss = lambda w: float((w - goal).square().sum())  # noqa: E731
    for step in range(400):
        direction = mezo_direction(weight[0], None, step)
        slope = (loss(weight[0] + 1e-3 * direction) - loss(weight[0] - 1e-3 * direction)) / 2e-3
        sgd_step_(weight, [slope * direction], [{}], step + 1, 0.03, 0.0, OptimSettings())
    assert loss(weight[0]) < 1e-3 * loss(torch.zeros(10))


def weights_of(folder):
    return load_checkpoint(folder / "checkpoint.pt").weights


def test_rate_zero_changes_nothing(mini, tmp_path):
    words = small_words(mini, tmp_path, RUN_ID="still", ITERATIONS=3, STAGES="train",
                        **{**MEZO, "MATRIX_LR": 0, "TIED_EMBED_LR": 0, "SCALAR_LR": 0, "MUON_WD": 0})
    assert main(words, {}) == 0
    fresh = make_model(train_gpt.load_config(words, {}, gpus=0), 1337)
    held = weights_of(tmp_path / "still")
    assert all(torch.equal(p, held[name]) for name, p in fresh.named_parameters())


@pytest.mark.parametrize("more", [{}, {**TRITS, "EMA_DECAY": 0.5}], ids=["plain", "ternary"])
def test_the_log_rebuilds_the_run(mini, tmp_path, more, capfd):
    """It learns a little; without its checkpoint the run is rebuilt from 16 bytes a step, to the same artifact; a
    training that was cut off goes on in the log; a log that was changed is found out."""
    words = small_words(mini, tmp_path, **{**MEZO, **more}, EVAL="contiguous", CODEC="range")
    assert main([*words, "RUN_ID=whole", "ITERATIONS=30", f"STAGES={STAGES}"], {}) == 0
    whole = tmp_path / "whole"
    losses = [line["train_loss"] for line in events(whole, "step")]
    assert sum(losses[-5:]) < sum(losses[:5])
    log = (whole / "replay.bin").read_bytes()
    assert len(log) == 32 + 16 * 30 and len(set(log)) > 100
    held = (whole / "checkpoint.pt").read_bytes()
    (whole / "checkpoint.pt").unlink()
    again = ["PACK=0", f"FROM={whole}", f"RUNS_PATH={tmp_path}", "RUN_ID=again",
             f"STAGES={STAGES.removeprefix('train,')}"]
    assert main(again, {}) == 0
    assert (tmp_path / "again" / "artifact.bin").read_bytes() == (whole / "artifact.bin").read_bytes()
    scores = [json.loads((tmp_path / name / "result.json").read_text())["scores"] for name in ("whole", "again")]
    assert scores[0]["contiguous"]["val_bpb"] == scores[1]["contiguous"]["val_bpb"]
    (whole / "replay.bin").write_bytes(log[:400] + bytes([log[400] ^ 64]) + log[401:])
    assert main([*again, "RUN_ID=broken"], {}) == 3
    assert "replay.bin: leads to other weights" in capfd.readouterr().err
    (whole / "replay.bin").write_bytes(bytes(32) + log[32:])
    assert main([*again, "RUN_ID=broken"], {}) == 2
    (whole / "checkpoint.pt").write_bytes(held)


def short_of(steps, plain):
    """A step that writes a checkpoint before the sixth and is killed before the ninth."""
    def step(self, progress):
        steps.append(self.step)
        if len(steps) == 6:
            self.save(finished=False)
            self.saving.result()
        if len(steps) == 9:
            raise RuntimeError("killed")
        plain(self, progress)
    return step


def test_a_killed_run_goes_on_in_its_log(mini, tmp_path, monkeypatch):
    words = small_words(mini, tmp_path, **{**MEZO, **TRITS}, STAGES="train", ITERATIONS=12)
    assert main([*words, "RUN_ID=straight"], {}) == 0
    steps, plain = [], train_gpt.Trainer.one_step

    monkeypatch.setattr(train_gpt.Trainer, "one_step", short_of(steps, plain))
    with pytest.raises(RuntimeError, match="killed"):
        main([*words, "RUN_ID=cut"], {})
    monkeypatch.undo()
    cut = tmp_path / "cut"
    assert len((cut / "replay.bin").read_bytes()) == 32 + 16 * 8 and not any((cut / "replay.bin").read_bytes()[:32])
    assert main([*words, "RUN_ID=cut"], {}) == 0
    assert (cut / "replay.bin").read_bytes() == (tmp_path / "straight" / "replay.bin").read_bytes()
    # With nothing left of its budget a resumed run ends at its checkpoint, and so does its log.
    short = [word for word in words if not word.startswith(("ITERATIONS", "MAX_WALLCLOCK"))]
    short += ["RUN_ID=late", "ITERATIONS=50", "MAX_WALLCLOCK_SECONDS=30", "RESERVE_SECONDS=1"]
    steps.clear()
    monkeypatch.setattr(train_gpt.Trainer, "one_step", short_of(steps, plain))
    with pytest.raises(RuntimeError, match="killed"):
        main(short, {})
    monkeypatch.undo()
    late = tmp_path / "late"
    with (late / "events.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 8, "train_loss": 1.0, "train_seconds": 29.9}\n')
    assert main(short, {}) == 0
    assert len((late / "replay.bin").read_bytes()) == 32 + 16 * 5
    (late / "checkpoint.pt").unlink()
    again = ["PACK=0", f"FROM={late}", f"RUNS_PATH={tmp_path}", "RUN_ID=rebuilt", "STAGES=calibrate,write"]
    assert main(again, {}) == 0
    (cut / "checkpoint.pt").unlink()
    changed = [word.replace("MATRIX_LR=0.001", "MATRIX_LR=0.002") for word in words]
    assert changed != words and main([*changed, "RUN_ID=cut"], {}) == 2  # the log alone keeps its folder


def test_ranks_walk_together(mini, tmp_path):
    """Two ranks take the same steps as one, up to how sums are rounded."""
    from conftest import launch
    found = []
    for processes in (1, 2):
        words = small_words(mini, tmp_path, **MEZO, STAGES="train", ITERATIONS=4, RUN_ID=f"ranks{processes}")
        done = launch(words, processes)
        assert done.returncode == 0, done.stderr
        found.append(weights_of(tmp_path / f"ranks{processes}"))
    moved = make_model(train_gpt.load_config(words, {}, gpus=0), 1337)
    for name, p in moved.named_parameters():
        step = float((found[0][name] - p.detach()).norm())
        assert float((found[0][name] - found[1][name]).norm()) <= 0.02 * step, name
