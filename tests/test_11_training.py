"""TRAINING: it learns, it stops in time, it resumes bit for bit, the number of ranks changes nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile

import pytest
import torch
from conftest import ROOT, clean_env, events, launch, make_model, small_config, small_words

import train_gpt
from train_gpt import (
    FORMATS,
    CheckError,
    Checkpoint,
    ConfigError,
    Log,
    LossScale,
    Optimizer,
    Prefetch,
    Progress,
    Stopwatch,
    Trainer,
    World,
    check_same_weights,
    load_checkpoint,
    load_config,
    load_data,
    main,
    make_loss,
    pick_compile,
    plan_phase,
    project,
    rate_factor,
    routes_of,
    save_checkpoint,
    unpack_artifact,
    working_compiler,
)

STAGES = "train,calibrate,write,reload,evaluate"


def losses(folder):
    """Step -> training loss; after a resume the later line of a step is the valid one."""
    return {line["step"]: line["train_loss"] for line in events(folder, "step")}


def test_stopwatch_counts_only_while_it_runs():
    now = [0.0]
    watch = Stopwatch(lambda: now[0], 5.0)
    now[0] = 3.0
    watch.start()
    now[0] = 4.5
    assert watch.seconds() == 6.5
    watch.stop()
    now[0] = 99.0
    assert watch.seconds() == 6.5


def test_compile_choice_is_explained(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert pick_compile("0", gpu) == (False, "COMPILE=0")
    assert pick_compile("auto", cpu) == (False, "lanes are as fast on a CPU and start at once; COMPILE=1 insists")
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(train_gpt.importlib.util, "find_spec", lambda name: None)
    assert working_compiler() is None
    with pytest.raises(ConfigError, match="COMPILE=1: needs a working C\\+\\+ compiler"):
        pick_compile("1", cpu)
    assert pick_compile("auto", gpu) == (False, "a GPU without triton and a C compiler")
    with pytest.raises(ConfigError, match="COMPILE=1: on a GPU needs"):
        pick_compile("1", gpu)


def checkpoint(step=3):
    model = make_model(small_config())
    weights = {name: p.detach() for name, p in model.named_parameters()}
    state = {"tok_emb": {"first": torch.ones(2)}}
    return Checkpoint(step, 1.5, False, 2.0, "config", "data", weights, {}, state, {"tok_emb": 1}, {"length": 64})


def test_checkpoint_round_trip_and_damage(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, checkpoint())
    held, wanted = load_checkpoint(path), checkpoint()
    assert held.step == 3 and all(torch.equal(held.weights[name], tensor) for name, tensor in wanted.weights.items())
    raw = path.read_bytes()
    info = max(zipfile.ZipFile(path).infolist(), key=lambda entry: entry.file_size)
    damaged = bytearray(raw)
    damaged[info.header_offset + 200 + info.file_size // 2] ^= 4
    for data in (bytes(damaged), raw[:len(raw) // 2], b"", b"nonsense" * 99):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match="is damaged") as caught:
            load_checkpoint(path)
        assert len(str(caught.value).splitlines()) == 1


def test_weights_are_compared_over_ranks():
    """One rank agrees with itself; two that differ are told apart by their digests."""
    model = make_model(small_config())
    check_same_weights(model, World())

    class Other(World):
        def gather(self, value):
            return [value, "another digest"]
    with pytest.raises(CheckError, match="ranks hold different weights"):
        check_same_weights(model, Other(size=2))


@pytest.fixture(scope="module")
def straight(mini, tmp_path_factory):
    """Twenty steps without interruption, one rank."""
    runs = tmp_path_factory.mktemp("runs")
    assert main(small_words(mini, runs, RUN_ID="one", ITERATIONS=20, STAGES=STAGES), {}) == 0
    return runs / "one"


def test_it_learns(straight):
    found = losses(straight)
    assert sorted(found) == list(range(1, 21)) and found[20] < found[1] - 0.5


def test_same_seed_same_bits_and_another_seed_other_bits(mini, straight, tmp_path):
    for run_id, seed in (("same", 1337), ("other", 1)):
        assert main(small_words(mini, tmp_path, RUN_ID=run_id, ITERATIONS=3, SEED=seed, STAGES="train"), {}) == 0
    # The schedule depends on ITERATIONS, the first step's loss does not.
    assert losses(tmp_path / "same")[1] == losses(straight)[1] != losses(tmp_path / "other")[1]


def test_lanes_give_the_same_bits(mini, straight, tmp_path):
    """Two micro-batches side by side sum to the same gradients, in the same order, as one after the other."""
    assert main(small_words(mini, tmp_path, RUN_ID="lanes", ITERATIONS=20, STAGES=STAGES, THREADS=2), {}) == 0
    assert "threads:2 in 2 lanes" in (tmp_path / "lanes" / "train.log").read_text()
    assert losses(tmp_path / "lanes") == losses(straight)
    scores = [json.loads((folder / "result.json").read_text())["scores"] for folder in (straight, tmp_path / "lanes")]
    for kind in ("contiguous", "sliding"):
        assert scores[0][kind]["val_loss"] == scores[1][kind]["val_loss"]


@pytest.mark.dist
def test_two_ranks_equal_one(mini, straight, tmp_path):
    """fp32: the same losses to 1e-5 over 20 steps, and the same score to 1e-9 of the same artifact."""
    done = launch(small_words(mini, tmp_path, RUN_ID="two", ITERATIONS=20, STAGES=STAGES, SYNC_CHECK_EVERY=5),
                  processes=2)
    assert done.returncode == 0, done.stderr
    one, two = losses(straight), losses(tmp_path / "two")
    assert sorted(two) == sorted(one) and max(abs(one[step] - two[step]) for step in one) <= 1e-5
    again = launch(small_words(mini, tmp_path, RUN_ID="score", FROM=straight, STAGES="evaluate"), processes=2)
    assert again.returncode == 0, again.stderr
    scores = [json.loads((folder / "result.json").read_text()) for folder in (straight, tmp_path / "score")]
    for kind in ("contiguous", "sliding"):
        assert abs(scores[0]["scores"][kind]["val_bpb"] - scores[1]["scores"][kind]["val_bpb"]) <= 1e-9
    assert scores[0]["ledger"] == scores[1]["ledger"]


CRAWLER = {"PRESET": "clowncar", "STACK": "A (A{xsa=1} D{mlp=0})*3 [G X]1 T A", "POLICY": "blocks.1.*.weight: int8",
           "INST_DIM": 4, "CRAWLER_TAP_DIM": 4, "ANCHOR_DIM": 4, "CRAWLER_LOOP_ROPE_SCALES": "9,1",
           "BIGRAM_VOCAB_SIZE": 31, "BIGRAM_DIM": 8, "CRAWLER_CADENCE_MAIN": 2, "CRAWLER_CADENCE_LATE": 0,
           "MIXER_CHUNK": 16, "QAT_START": 0.5, "QAT_KIND": "noise", "QAT_PARTS": "loops",
           "TRAIN_SEQ_SCHEDULE": "32@0.5,64@1"}


RECORD = {"PRESET": "caseops", "VE_LAYERS": "1,2", "VE_DIM": 8, "VALUE_RESIDUAL": 1, "BIGRAM_VOCAB_SIZE": 31,
          "BIGRAM_DIM": 8, "TRIGRAM": 1, "EMBED_DIM": 16, "ASYM_LOGIT_RESCALE": 1, "TRAIN_SEQ_SCHEDULE": "32@0.5,64@1",
          "WD_TAPER_START_FRAC": 0.5, "WD_TAPER_FINAL_MULT": 0.5}
TERNARY = {"PRESET": "radial", "STACK": "A (A)*2 A", "GROUP_SIZE": 8, "CAGS": "placed", "RATE_TERM": 1, "HGF_RANK": 2,
           "PASS_DROP": 0.2}


@pytest.mark.dist
@pytest.mark.parametrize("parts, dtype, near", [
    (RECORD, "float32", 2e-5), (RECORD, "bfloat16", 0.03), (CRAWLER, "float32", 2e-5), (CRAWLER, "bfloat16", 0.03),
    (TERNARY, "float16", 0.03)])
def test_two_ranks_equal_one_with_every_part(mini, tmp_path, parts, dtype, near):
    """The record stack and the crawler with all other parts on as well, over their changes of plan and of context;
    a ternary stack in float16, as small GPUs train it."""
    for processes in (1, 2):
        done = launch(small_words(mini, tmp_path, RUN_ID=f"r{processes}", ITERATIONS=8, STAGES="train",
                                  COMPUTE_DTYPE=dtype, SYNC_CHECK_EVERY=2, **parts),
                      processes=processes)
        assert done.returncode == 0, done.stderr
    one, two = losses(tmp_path / "r1"), losses(tmp_path / "r2")
    assert sorted(two) == sorted(one) and max(abs(one[step] - two[step]) for step in one) <= near


@pytest.mark.dist
def test_ranks_that_do_not_divide_the_batch_are_refused(mini, tmp_path):
    done = launch(small_words(mini, tmp_path, RUN_ID="x", ITERATIONS=2, STAGES="train"), processes=3)
    assert done.returncode == 2 and "NPROC=3: must divide the 4 micro-batches" in done.stderr
    assert "Traceback" not in done.stderr


def test_killed_run_resumes_bit_for_bit(mini, straight, tmp_path):
    """kill -9 in the middle; the restart says so, and every later loss and the artifact are the same bits."""
    words = small_words(mini, tmp_path, RUN_ID="killed", ITERATIONS=20, STAGES="train,calibrate,write",
                        CHECKPOINT_SECONDS="0.05")
    with subprocess.Popen([sys.executable, "train_gpt.py", *words], cwd=ROOT, env=clean_env(),
                          stdout=subprocess.DEVNULL) as child:
        path = tmp_path / "killed" / "events.jsonl"
        for _ in range(2400):
            if path.exists() and '"step": 7' in path.read_text() and (path.parent / "checkpoint.pt").exists():
                break
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
    assert 7 <= max(losses(path.parent)) < 20
    done = launch(words)
    assert done.returncode == 0, done.stderr
    resumed = events(path.parent, "resume")
    assert len(resumed) == 1 and 0 < resumed[0]["step"] < 20
    assert f"resumed:{tmp_path / 'killed' / 'checkpoint.pt'} step:{resumed[0]['step']}" in done.stdout
    assert losses(path.parent) == losses(straight)
    assert (path.parent / "artifact.bin").read_bytes() == (straight / "artifact.bin").read_bytes()


def test_under_a_wall_clock_the_seconds_before_the_kill_count(mini, tmp_path):
    """A run that logged 50 of its 60 seconds before it was killed does not get them back from an older checkpoint."""
    words = small_words(mini, tmp_path, RUN_ID="clock", ITERATIONS=100000, STAGES="train", MAX_WALLCLOCK_SECONDS=60,
                        WARMDOWN_FRAC=0, MIN_LR=0)
    assert main([*words, "ITERATIONS=2"], {}) == 0
    folder = tmp_path / "clock"
    held = load_checkpoint(folder / "checkpoint.pt")
    config = json.loads((folder / "config.json").read_text())
    digest = load_config(words, {}, gpus=0).digest()
    save_checkpoint(folder / "checkpoint.pt", held._replace(finished=False, config_hash=digest))
    config["settings"]["ITERATIONS"] = 100000
    (folder / "config.json").write_text(json.dumps(config))
    with open(folder / "events.jsonl", "a") as file:
        file.write(json.dumps({"event": "step", "t": 1, "step": 90, "train_loss": 1, "train_seconds": 58.5}) + "\n")
    began = time.monotonic()
    assert main(words, {}) == 0
    assert time.monotonic() - began < 15
    assert events(folder, "resume")[0]["train_seconds"] == 58.5
    assert json.loads((folder / "result.json").read_text())["train"]["seconds"] <= 60


def test_killed_before_the_first_checkpoint_is_said_and_counts(mini, tmp_path):
    """The seconds are spent; a checkpoint that was deleted on purpose starts anew instead."""
    words = small_words(mini, tmp_path, RUN_ID="early", ITERATIONS=3, STAGES="train", MAX_WALLCLOCK_SECONDS=60)
    folder = tmp_path / "early"
    folder.mkdir()
    (folder / "events.jsonl").write_text('{"event": "start", "t": 0}\n{"event": "step", "t": 1, "step": 1, "'
                                         'train_loss": 1, "train_seconds": 20.0}\n{"event": "step", "t": 2, "st')
    assert main(words, {}) == 0
    assert "restarted: killed before its first checkpoint" in (folder / "train.log").read_text()
    assert json.loads((folder / "result.json").read_text())["train"]["seconds"] > 20
    (folder / "checkpoint.pt").unlink()
    assert main(words, {}) == 0
    assert json.loads((folder / "result.json").read_text())["train"]["seconds"] < 20


def test_gradients_are_the_mean_of_the_batch_and_clipped_as_a_whole(mini, tmp_path):
    """The clip acts on the norm of the whole reduced gradient, keeps its direction, and reports the norm before it."""
    found = {}
    for clip in (0, 0.01):
        config = load_config(small_words(mini, tmp_path, GRAD_CLIP_NORM=clip), {}, gpus=0)
        model = make_model(config, shake=0.05)
        trainer = Trainer(config, model, load_data(config.data, World()), World(), Log(None, lambda: 0.0), tmp_path,
                          False, lambda phase: (0.0, 0.0))
        trainer.losses = [make_loss(model, 0)]
        loss, norm = (value.item() for value in trainer.gradients(0))
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        found[clip] = loss, norm, flat
        micros = [trainer.batches.micro(index, World()) for index in range(4)]
        assert loss == pytest.approx(sum(make_loss(model, 0)(*batch).item() for batch in micros) / 4, abs=1e-5)
    assert found[0][:2] == found[0.01][:2] and found[0][1] == pytest.approx(found[0][2].norm().item(), rel=1e-5)
    assert found[0.01][2].norm().item() == pytest.approx(0.01, rel=1e-4)
    assert torch.nn.functional.cosine_similarity(found[0][2], found[0.01][2], dim=0) > 0.99999


def test_no_score_holds_the_z_loss(mini, tmp_path):
    """The training loss does; what is validated and scored is the plain cross-entropy."""
    found = {}
    for weight in (0, 0.5):
        words = small_words(mini, tmp_path, RUN_ID=f"z{weight}", ITERATIONS=2, VAL_LOSS_EVERY=1, Z_LOSS=weight,
                            MATRIX_LR=0, TIED_EMBED_LR=0, SCALAR_LR=0, STAGES=STAGES, EVAL="contiguous")
        assert main(words, {}) == 0
        folder = tmp_path / f"z{weight}"
        scores = json.loads((folder / "result.json").read_text())["scores"]
        found[weight] = (losses(folder)[1], events(folder, "val")[0]["val_bpb"],
                         *(scores[kind]["val_bpb"] for kind in ("float", "contiguous")))
    assert found[0][1:] == found[0.5][1:] and found[0.5][0] > found[0][0] + 1


def test_step_limited_runs_use_all_their_steps(mini, tmp_path):
    """The stop rule looks at the seconds left, not at the share of steps left."""
    config = load_config(small_words(mini, tmp_path, ITERATIONS=1000, MAX_WALLCLOCK_SECONDS=180), {}, gpus=0)
    trainer = Trainer.__new__(Trainer)
    trainer.config, trainer.world, trainer.step, trainer.slowest, trainer.flying = config, World(), 998, 0.4, []
    trainer.reserve, trainer.before = 5.0, 0.0
    trainer.watch = Stopwatch(lambda: 0.0, 100.0)
    assert trainer.must_stop(trainer.progress()) is False
    trainer.watch = Stopwatch(lambda: 0.0, 174.9)
    assert trainer.must_stop(trainer.progress()) is True
    # Steps that are still in the air take their time too; a strict clock leaves less.
    trainer.watch = Stopwatch(lambda: 0.0, 174.0)
    assert trainer.must_stop(trainer.progress()) is False
    trainer.flying = [None, None]
    assert trainer.must_stop(trainer.progress()) is True
    trainer.flying, trainer.before = [], 1.0
    assert trainer.must_stop(trainer.progress()) is True


class CountingBatches:
    """Stands for Batches: says which micro-batches were made, in which context."""

    def __init__(self):
        self.made = []

    def micro(self, index, world, length):
        self.made.append((index, length))
        return index, length


def test_prefetch_gives_what_was_asked_for_and_makes_nothing_twice():
    batches = CountingBatches()
    prefetch, order = Prefetch(batches, World()), list(range(20))
    for at in order:
        assert prefetch.take(at, 64 if at < 9 else 128, order[at + 1:]) == (at, 64 if at < 9 else 128)
    prefetch.worker.shutdown()
    # What was ahead when the context changed is made anew, from the same index; the rest once.
    assert sorted(set(batches.made)) == sorted(batches.made)
    assert [index for index, length in batches.made if length == 128][0] <= 9
    assert {index for index, _ in batches.made} == set(range(20))


def test_loss_scale_halves_on_overflow_and_grows_after_good_steps():
    scale = LossScale(torch.float16)
    assert scale.value == 2 ** 15 and not scale.saw(False) and scale.value == 2 ** 14
    assert all(scale.saw(True) for _ in range(LossScale.GROWTH_STEPS)) and scale.value == 2 ** 15
    for _ in range(16):
        used = scale.saw(False)
    # Below 1 nothing helps any more: the step counts as it is, and training ends as diverged.
    assert used and scale.value < 1
    plain = LossScale(torch.bfloat16)
    assert plain.value == 1 and plain.saw(False) and plain.value == 1


def test_float16_training_learns_and_leaves_an_overflow_out(mini, tmp_path):
    """A loss scale that is far too large at first: the steps that overflow change nothing and are named."""
    config = load_config(small_words(mini, tmp_path, COMPUTE_DTYPE="float16", STACK="A2"), {}, gpus=0)
    model = make_model(config)
    log = Lines()
    trainer = Trainer(config, model, load_data(config.data, World()), World(), log, tmp_path, False,
                      lambda phase: (0.0, 0.0))
    trainer.losses = [make_loss(model, 0)]
    trainer.scale.value = 2.0 ** 40
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.one_step(Progress(0, 0.0, 10))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert trainer.step == 1 and trainer.scale.value == 2.0 ** 39
    assert "left out: a float16 gradient overflowed" in log.lines[0]
    trainer.scale.value, found = 2.0 ** 10, []
    for step in range(1, 12):
        trainer.one_step(Progress(step, 0.1, 10))
        found.append(trainer.last_loss)
    assert found[-1] < found[0] - 0.3 and trainer.scale.good == 11


class Lines(Log):
    """A log that keeps its lines."""

    def __init__(self):
        super().__init__(None, lambda: 0.0)
        self.lines = []

    def line(self, text=""):
        self.lines.append(text)


def test_context_grows_and_the_rate_rises_again(mini, tmp_path):
    """32 tokens a row until half of training, then 64, with four steps of rising rate behind the change; a resumed run
    goes on in the middle of them."""
    words = small_words(mini, tmp_path, RUN_ID="grow", ITERATIONS=12, STAGES="train", TRAIN_SEQ_SCHEDULE="32@0.5,64@1",
                        SEQ_CHANGE_WARMUP_STEPS=4, WARMDOWN_FRAC=0, MIN_LR=0)
    assert main(words, {}) == 0
    found = {line["step"]: line["lr_factor"] for line in events(tmp_path / "grow", "step")}
    assert [found[step] for step in range(1, 13)] == [1] * 6 + [0.25, 0.5, 0.75, 1, 1, 1]
    log = (tmp_path / "grow" / "train.log").read_text()
    assert "step:6 context:64" in log and "warmup:2 passes of 2 plans and contexts" in log
    held = load_checkpoint(tmp_path / "grow" / "checkpoint.pt")
    assert (held.pace["length"], held.pace["changed_at"]) == (64, 6)


def test_every_phase_and_context_that_occurs_is_warmed_up():
    trainer = Trainer.__new__(Trainer)
    trainer.config = small_config(PRESET="caseops", STACK="A (A)*2@0.35 A2", TRAIN_SEQ_SCHEDULE="16@0.1,32@0.7,64@1",
                                  MICRO_BATCH_TOKENS=64)
    trainer.model, trainer.own, trainer.drawn = make_model(trainer.config), None, False
    assert trainer.shapes() == [(0, 16), (0, 32), (1, 32), (1, 64)]
    trainer.own = plan_phase(trainer.model.settings, 0.0, 1)  # with a cadence one more, in every context
    assert trainer.shapes() == [(0, 16), (0, 32), (1, 32), (1, 64), (2, 16), (2, 32), (2, 64)]
    trainer.model.packed = True
    assert trainer.shapes() == [(0, 64), (1, 64), (2, 64)]


def test_reserve_is_measured_and_the_strict_clock_leaves_room(mini, tmp_path):
    """Under a wall clock the calibration fits into what the rehearsal kept for it; STRICT_CLOCK keeps more."""
    config = load_config(small_words(mini, tmp_path, MAX_WALLCLOCK_SECONDS=60, STACK="A"), {}, gpus=0)
    now = [0.0]

    def clock():
        now[0] += 0.5
        return now[0]
    run = types.SimpleNamespace(config=config, world=World(), clock=clock, folder=tmp_path,
                                new_model=lambda: make_model(config))
    reserve, writing = train_gpt.rehearse_squeeze(run, make_model(config))
    # By this clock a rehearsal takes half a second however many rounds it has: half of them stand for all.
    rounds = config.artifact.gptq_calibration_batches
    assert reserve == pytest.approx(0.5 * train_gpt.RESERVE_MARGIN * rounds / -(-rounds // 2)) and writing == 0
    assert list(tmp_path.iterdir()) == []
    for changes in ({"SOLVER": "nearest", "ALLOCATE": 0, "RATE_ROUNDING": 0}, {"MAX_WALLCLOCK_SECONDS": 0}):
        run.config = train_gpt.with_settings(config, changes)
        assert train_gpt.rehearse_squeeze(run, make_model(config)) == (0.0, 0.0)


def test_the_strict_clock_keeps_room_for_set_up_and_writing(mini, tmp_path):
    """What the loop may take is the budget less set-up, calibration and writing, and validation counts; the checkpoint
    holds what was spent, and the last table has both verdicts."""
    words = small_words(mini, tmp_path, MAX_WALLCLOCK_SECONDS=900, ITERATIONS=4, VAL_LOSS_EVERY=2, STACK="A",
                        STAGES="train,calibrate,write,reload,evaluate,report", EVAL="contiguous", STRICT_CLOCK=1)
    assert main([*words, "RUN_ID=strict"], {}) == 0
    result = json.loads((tmp_path / "strict" / "result.json").read_text())
    assert result["budget"]["ok"] and result["budget"]["strict_ok"]
    assert result["budget"]["strict_train_seconds"] > result["budget"]["train_seconds"] > 0
    log = (tmp_path / "strict" / "train.log").read_text()
    assert "; strict clock: " in log and "strict training: compilation, warm-up and writing too" in log
    pace = load_checkpoint(tmp_path / "strict" / "checkpoint.pt").pace
    assert min(pace["strict"], pace["before"], pace["reserve"]) > 0
    assert not list((tmp_path / "strict").glob(".rehearsal*"))


def test_both_clocks_by_hand():
    """A clock that stands at 100: the process began at 30, earlier ones spent 7; 20 s of loop, 15 of them before."""
    trainer = Trainer.__new__(Trainer)
    trainer.config = small_config(MAX_WALLCLOCK_SECONDS=60, STRICT_CLOCK=1)
    trainer.log = types.SimpleNamespace(clock=lambda: 100.0)
    trainer.began, trainer.earlier, trainer.reserve, trainer.before = 30.0, 7.0, 4.0, 11.0
    assert trainer.strict_seconds() == 77 and trainer.budget() == 45
    trainer.before = 0.0
    assert trainer.budget() == 56
    trainer.config = small_config(MAX_WALLCLOCK_SECONDS=0)
    assert trainer.budget() == float("inf")


def test_from_with_train_trains_and_squeezes_its_own_weights(mini, straight, tmp_path):
    """FROM gives the settings; the new seed's weights, not the old run's, become the artifact."""
    words = [f"FROM={straight}", f"RUNS_PATH={tmp_path}", "SEED=5", "STAGES=train,calibrate,write,reload", "PACK=0",
             "TENSORBOARD=0", "THREADS=1"]
    assert main([*words, "RUN_ID=new"], {}) == 0
    assert (tmp_path / "new" / "artifact.bin").read_bytes() != (straight / "artifact.bin").read_bytes()
    assert losses(tmp_path / "new")[1] != losses(straight)[1]


def test_a_run_folder_belongs_to_one_source(mini, straight, tmp_path, capsys):
    """Scoring another run into a used folder is refused; an old run alone keeps its own settings and script."""
    shutil.copytree(straight, tmp_path / "one")
    words = [f"RUNS_PATH={tmp_path}", "STAGES=evaluate", "EVAL=contiguous", "PACK=0", "THREADS=1"]
    assert main([*words, "RUN_ID=again", f"FROM={straight}"], {}) == 0
    assert main([*words, "RUN_ID=again", f"FROM={tmp_path / 'one'}"], {}) == 2
    assert "RUN_ID=again: that run had other settings (FROM=" in capsys.readouterr().err
    config = (tmp_path / "one" / "config.json").read_bytes()
    assert main(["RUN_ID=one", f"RUNS_PATH={tmp_path}", "STAGES=evaluate", "PACK=0", "THREADS=1"], {}) == 0
    assert (tmp_path / "one" / "config.json").read_bytes() == config


@pytest.mark.dist
@pytest.mark.parametrize("words, code, said", [
    (["STAGES=train,write,evaluate,report", "TARGET_BYTES=1000", "FIT=0", "SOLVER=nearest", "ALLOCATE=0"], 3,
     "TARGET_BYTES=1000: code plus model are"),
    (["STAGES=train", "DATA_PATH=/nonexistent"], 2, "no such folder")])
def test_a_failure_on_one_rank_ends_all_with_one_line(mini, tmp_path, words, code, said):
    began = time.monotonic()
    done = launch([*small_words(mini, tmp_path, RUN_ID="f", ITERATIONS=2), *words], processes=2)
    assert done.returncode == code and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and time.monotonic() - began < 60


def test_finished_run_does_not_train_again(mini, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "one")
    before = (tmp_path / "one" / "checkpoint.pt").read_bytes()
    words = small_words(mini, tmp_path, RUN_ID="one", ITERATIONS=20, STAGES="train")
    assert main(words, {}) == 0
    assert (tmp_path / "one" / "checkpoint.pt").read_bytes() == before
    assert "training was finished" in (tmp_path / "one" / "train.log").read_text()


def test_other_settings_under_an_old_name_are_refused(mini, straight, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / "one")
    assert main(small_words(mini, tmp_path, RUN_ID="one", ITERATIONS=20, MATRIX_LR=0.5), {}) == 2
    assert "RUN_ID=one: that run had other settings (MATRIX_LR=0.026 -> 0.5)" in capsys.readouterr().err


def test_divergence_is_a_clear_end(mini, tmp_path, capsys):
    words = small_words(mini, tmp_path, RUN_ID="boom", ITERATIONS=50, STAGES="train", TIED_EMBED_LR=1e30,
                        SCALAR_LR=1e30, GRAD_CLIP_NORM=0, LOGIT_SOFTCAP=0)
    assert main(words, {}) == 3
    said = capsys.readouterr().err
    assert "training diverged; lower MATRIX_LR" in said and len(said.splitlines()) == 1


def test_validation_during_training_is_logged_and_not_timed(mini, tmp_path):
    words = small_words(mini, tmp_path, RUN_ID="val", ITERATIONS=7, STAGES="train", VAL_LOSS_EVERY=3)
    assert main(words, {}) == 0
    found = events(tmp_path / "val", "val")
    assert [line["step"] for line in found] == [3, 6] and found[1]["val_bpb"] < found[0]["val_bpb"]
    assert "step:3/7 val_loss:" in (tmp_path / "val" / "train.log").read_text()


# -- loops


def test_a_dead_channel_between_passes_is_told(mini, tmp_path):
    """At the start instructions add nothing and positions a hundredth; after training they add, and the log says so."""
    words = {"PRESET": "clowncar", "STACK": "A (A)*3 A", "BIGRAM_VOCAB_SIZE": 0, "POLICY": "", "INST_DIM": 4}
    trainer, model = qat_trainer(mini, tmp_path, **words)
    assert list(trainer.tell_loops()) == ["1"] and trainer.tell_loops()["1"][0] > 0
    train_gpt.init_weights(model, 0)
    assert trainer.tell_loops() == {"1": [0.0, 0.0, 0.0]}
    positions, model = qat_trainer(mini, tmp_path, **words, LOOP_INSTRUCTIONS="position")
    train_gpt.init_weights(model, 0)
    assert all(0 < share < 0.01 for share in positions.tell_loops()["1"])
    assert main(small_words(mini, tmp_path, RUN_ID="told", ITERATIONS=6, STAGES="train", VAL_LOSS_EVERY=3, **words),
                {}) == 0
    found = json.loads((tmp_path / "told" / "result.json").read_text())["train"]["added_before_passes"]
    assert set(found) == {"1"} and all(share > 1e-4 for share in found["1"])
    said = events(tmp_path / "told", "loops")
    assert [line["step"] for line in said] == [3, 6] and said[-1]["added"] == found
    assert "step:6 loop 1: added before each pass, over the stream: 0." in (
        tmp_path / "told" / "train.log").read_text()


def test_cadence_chooses_the_plan_by_the_rate(mini, tmp_path):
    """Every second step in all passes while the rate is high, none later; both plans are trained."""
    words = {"PRESET": "clowncar", "STACK": "A (A)*3 A", "BIGRAM_VOCAB_SIZE": 0, "POLICY": "", "INST_DIM": 4,
             "CRAWLER_CADENCE_EARLY": 2, "CRAWLER_CADENCE_MAIN": 3, "CRAWLER_CADENCE_LATE": 0, "WARMDOWN_FRAC": 1,
             "MIN_LR": 0}
    trainer, _ = qat_trainer(mini, tmp_path, **words)
    plans = []
    for trainer.step in range(20):
        plans.append(trainer.plan_at(Progress(trainer.step, trainer.step / 20, 20.0 - trainer.step)))
    wanted = [0 if step % (2 if step < 10 else 3) == 0 and step < 16 else 1 for step in range(20)]
    assert plans == wanted
    assert [step.block for step in trainer.own.steps] == [0, 1, 2] and len(trainer.model.phases[0].steps) == 5
    assert main(small_words(mini, tmp_path, RUN_ID="cadence", ITERATIONS=8, STAGES="train", **words), {}) == 0
    assert losses(tmp_path / "cadence")[8] < losses(tmp_path / "cadence")[1]
    seconds, _ = qat_trainer(mini, tmp_path, **{**words, **dict.fromkeys(
        ("CRAWLER_CADENCE_EARLY", "CRAWLER_CADENCE_MAIN", "CRAWLER_CADENCE_LATE"), 1)})
    assert seconds.own is None and seconds.plan_at(Progress(7, 0.9, 1.0)) == 0


# -- training at the weights as they will be stored


def qat_trainer(mini, folder, **more):
    """(trainer, its model) ready for one step at fraction 0."""
    config = load_config(small_words(mini, folder, **{"STACK": "A2", "GRAD_CLIP_NORM": 0, **more}), {}, gpus=0)
    model = make_model(config, shake=0.05)
    trainer = Trainer(config, model, load_data(config.data, World()), World(), Log(None, lambda: 0.0), folder, False,
                      lambda phase: (0.0, 0.0))
    trainer.losses = [make_loss(model, phase) for phase in range(len(model.phases))]
    return trainer, model


QAT_POLICIES = {name: f"matrix: {name} group=8; embedding: {name} group=16" for name in FORMATS} | {
    "mixed": "*.q.weight: ternary group=8; *.mlp.*: sherry; matrix: int4 k=5; embedding: fp8; gain: bf16"}


@pytest.mark.parametrize("policy", QAT_POLICIES)
def test_qat_takes_the_loss_at_the_stored_weights_and_updates_the_latent_ones(mini, tmp_path, policy):
    """By hand: loss and gradients at the projected weights, the update on the latent ones; then the same in a step."""
    words = {"POLICY": QAT_POLICIES[policy], "SOLVER": "nearest"}
    trainer, model = qat_trainer(mini, tmp_path, QAT_START=0, **words)
    latent = {name: p.detach().clone() for name, p in model.named_parameters()}
    other, copy = qat_trainer(mini, tmp_path, QAT_START=1, **words)
    routes = routes_of(copy, other.config.artifact)
    with torch.no_grad():
        for name, p in copy.named_parameters():
            p.copy_(project(p, routes[name]))
    assert any(not torch.equal(p, latent[name]) for name, p in copy.named_parameters())
    loss, _ = other.gradients(0)
    other.optimizer = Optimizer(copy, other.config.optim, World(), copy.dtype)
    with torch.no_grad():
        for name, p in copy.named_parameters():
            p.copy_(latent[name])
    progress = Progress(0, 0.0, 10.0, 99.0)
    other.optimizer.step(rate_factor(other.config.optim, progress), train_gpt.momentum_at(other.config.optim, 0))
    plain = sum(make_loss(model, 0)(*trainer.batches.micro(index, World())).item() for index in range(4)) / 4
    trainer.one_step(progress)
    assert trainer.last_loss == loss != plain
    for (name, found), wanted in zip(model.named_parameters(), copy.parameters(), strict=True):
        assert torch.equal(found, wanted), name
    assert not any(torch.equal(p, project(p, routes[name])) for name, p in model.named_parameters() if p.ndim == 2
                   and routes[name].format not in ("fp16", "bf16"))


def test_qat_begins_at_its_fraction_and_puts_the_weights_back(mini, tmp_path):
    trainer, model = qat_trainer(mini, tmp_path, QAT_START=0.5, MATRIX_FORMAT="ternary", GROUP_SIZE=8)
    latent = [p.detach().clone() for p in model.parameters()]
    routes = routes_of(model, trainer.config.artifact)
    for frac, on in ((0.0, False), (0.49, False), (0.5, True), (1.0, True)):
        with trainer.as_stored(frac):
            for (name, p), held in zip(model.named_parameters(), latent, strict=True):
                assert torch.equal(p, project(held, routes[name]) if on else held)
        assert all(torch.equal(p, held) for p, held in zip(model.parameters(), latent, strict=True))
    with pytest.raises(KeyError), trainer.as_stored(1.0):
        raise KeyError
    assert all(torch.equal(p, held) for p, held in zip(model.parameters(), latent, strict=True))
    never = train_gpt.dataclasses.replace(trainer.config.artifact, qat_start=1.0)
    trainer.config = trainer.config._replace(artifact=never)
    with trainer.as_stored(1.0):
        assert all(torch.equal(p, held) for p, held in zip(model.parameters(), latent, strict=True))


def test_noise_is_one_step_of_the_grid_on_loops_only(mini, tmp_path):
    """Uniform within half a step, the same on every rank, other at every step; the weights come back; validation sees
    them as they are, and what is exported is not rounded."""
    words = {"PRESET": "clowncar", "STACK": "A (A)*2 A", "BIGRAM_VOCAB_SIZE": 0, "POLICY": "", "QAT_START": 0.5,
             "QAT_KIND": "noise", "QAT_PARTS": "loops", "INST_DIM": 4}
    config = load_config(small_words(mini, tmp_path, GRAD_CLIP_NORM=0, **words), {}, gpus=0)
    model, other = make_model(config, shake=0.05), make_model(config, shake=0.05)
    trainers = [Trainer(config, m, load_data(config.data, World()), World(), Log(None, lambda: 0.0), tmp_path, False,
                        lambda phase: (0.0, 0.0)) for m in (model, other)]
    latent = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen = []
    for step in (0, 0, 1):
        for trainer in trainers:
            trainer.step = step
        with trainers[0].as_stored(0.5, training=True), trainers[1].as_stored(0.5, training=True):
            for (name, p), twin in zip(model.named_parameters(), other.parameters(), strict=True):
                assert torch.equal(p, twin)
                moved = (p - latent[name]).abs()
                assert bool(moved.any()) == (name.startswith("blocks.1.") and p.role == "matrix"), name
                if moved.any():
                    row = latent[name].abs().amax(1, keepdim=True) / 31  # int6, the grid ends at the largest value
                    assert (moved <= 0.5 * 1.03 * row).all() and moved.max() > 0.3 * row.min()
            seen.append(model.blocks[1].mlp.up.weight.detach().clone())
        with trainers[0].as_stored(0.5), trainers[1].as_stored(0.4, training=True):
            assert all(torch.equal(p, latent[name]) for m in (model, other) for name, p in m.named_parameters())
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


def test_straight_through_on_loops_only_stores_what_was_trained(mini, tmp_path):
    words = small_words(mini, tmp_path, RUN_ID="loops", PRESET="clowncar", STACK="A (A)*2 A", POLICY="", INST_DIM=4,
                        ITERATIONS=4, QAT_START=0, QAT_PARTS="loops", STAGES=STAGES, EVAL="contiguous",
                        BIGRAM_VOCAB_SIZE=0, LOOP_AWARE_GPTQ=0, **PLAIN)
    assert main(words, {}) == 0
    config, held = load_config(words, {}, gpus=0), load_checkpoint(tmp_path / "loops" / "checkpoint.pt")
    routes = routes_of(make_model(config), config.artifact)
    _, stored = unpack_artifact((tmp_path / "loops" / "artifact.bin").read_bytes())
    for name in ("blocks.1.mlp.up.weight", "blocks.0.mlp.up.weight"):
        assert torch.equal(stored[name], project(held.weights[name], routes[name]))
    assert "diagnostic pre-quantization" in (tmp_path / "loops" / "train.log").read_text()


PLAIN = {"SOLVER": "nearest", "ALLOCATE": 0, "FIT": 0, "RATE_ROUNDING": 0}


@pytest.mark.parametrize("more", [
    {"MATRIX_FORMAT": "ternary", "GROUP_SIZE": 8, "EMBED_FORMAT": "fp8"},
    {"MATRIX_BITS": 4, "EMBED_BITS": 5, "EMA_DECAY": 0.9, "THREADS": 2, "ATTN_CLIP_SIGMAS": 4}], ids=str)
def test_the_artifact_of_a_qat_run_holds_the_weights_that_were_trained(mini, tmp_path, more):
    """Bit for bit, so that the score of the artifact is the score of the float weights, exactly."""
    words = small_words(mini, tmp_path, RUN_ID="qat", ITERATIONS=6, QAT_START=0.5, EVAL="contiguous",
                        STAGES=STAGES, VAL_LOSS_EVERY=5, **{**PLAIN, **more})
    assert main(words, {}) == 0
    folder = tmp_path / "qat"
    config, held = load_config(words, {}, gpus=0), load_checkpoint(folder / "checkpoint.pt")
    routes = routes_of(make_model(config), config.artifact)
    _, weights = unpack_artifact((folder / "artifact.bin").read_bytes())
    for name, latent in (held.average or held.weights).items():
        assert torch.equal(weights[name], project(latent, routes[name])), name
    scores = json.loads((folder / "result.json").read_text())["scores"]
    assert scores["contiguous"]["val_loss"] == scores["float"]["val_loss"]
    assert "and to those the forward was trained with" in (folder / "train.log").read_text()
    if not more.get("EMA_DECAY"):
        plain = small_words(mini, tmp_path, RUN_ID="plain", ITERATIONS=6, STAGES="train", **{**PLAIN, **more})
        assert main(plain, {}) == 0
        one, two = losses(folder), losses(tmp_path / "plain")
        assert [one[step] == two[step] for step in range(1, 7)] == [True] * 3 + [False] * 3


@pytest.mark.slow
@pytest.mark.skipif(working_compiler() is None, reason="needs a C++ compiler and Python's headers")
def test_compiled_training_gives_the_same_losses(mini, tmp_path):
    words = small_words(mini, tmp_path, ITERATIONS=4, STAGES="train", STACK="A2")
    assert main([*words, "RUN_ID=plain"], {}) == 0
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = launch([*words, "RUN_ID=compiled", "COMPILE=1"], env=env)
    assert done.returncode == 0, done.stderr
    assert "compile:1 (" in done.stdout and os.listdir(tmp_path / "cache")
    one, two = losses(tmp_path / "plain"), losses(tmp_path / "compiled")
    assert max(abs(one[step] - two[step]) for step in one) <= 1e-4


@pytest.mark.slow
@pytest.mark.skipif(working_compiler() is None, reason="needs a C++ compiler and Python's headers")
def test_qat_is_active_under_compile(mini, tmp_path):
    """The compiled graph sees the projected weights from QAT_START on: the losses of the plain run with QAT, not those
    of a run without; and nothing is compiled anew for it."""
    words = small_words(mini, tmp_path, ITERATIONS=4, STAGES="train", STACK="A2", MATRIX_FORMAT="ternary", GROUP_SIZE=8,
                        **PLAIN)
    assert main([*words, "RUN_ID=plain", "QAT_START=0.5"], {}) == 0
    assert main([*words, "RUN_ID=without"], {}) == 0
    done = launch([*words, "RUN_ID=compiled", "QAT_START=0.5", "COMPILE=1"],
                  env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr
    assert "compile:1 (" in done.stdout and "recompiled:" not in done.stdout
    plain, without, compiled = (losses(tmp_path / name) for name in ("plain", "without", "compiled"))
    assert max(abs(plain[step] - compiled[step]) for step in plain) <= 1e-3
    assert all(plain[step] == without[step] for step in (1, 2))
    assert all(abs(plain[step] - without[step]) > 0.01 for step in (3, 4))
