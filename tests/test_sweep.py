"""Sweeps: what words mean, the engine with played runs in real processes (killed, shared, stopped early, failing), what
is kept and what is refused, and the report against numbers worked out by hand."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import tomllib
from pathlib import Path
from typing import NamedTuple

import optuna
import pytest
from conftest import ROOT
from optuna.trial import TrialState

import train_gpt as gpt
from tools import sweep

# A run as ./run.sh makes it, in milliseconds. It notes its start and its end, takes its score from PLAY_SCORES where
# there is one, and does what its MATRIX_LR says: 0.09 fails a check, 0.08 is a mistake, 0.07 is killed once, 0.06
# hangs with a process of its own.
STUB = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
words = dict(word.split("=", 1) for word in sys.argv[1:])
folder = Path(words["RUNS_PATH"]) / words["RUN_ID"]
rate, seconds = words.get("MATRIX_LR", "0.02"), float(os.environ.get("PLAY_SECONDS", "0"))
folder.mkdir(parents=True, exist_ok=True)
def note(what):
    with (folder.parent / what).open("a") as log:
        log.write(f"{words['RUN_ID']} {os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}\\n")
note("launched")
print("a line", *sys.argv[1:], flush=True)
if rate == "0.07" and not (folder / "tried").exists():
    (folder / "tried").touch()
    os.kill(os.getpid(), signal.SIGKILL)
if rate in ("0.09", "0.08"):
    print("MATRIX_LR: the reason")
    sys.exit({"0.09": 3, "0.08": 2}[rate])
(folder / "config.json").write_text(json.dumps({"settings": {"ITERATIONS": 40, "MAX_WALLCLOCK_SECONDS": 0}}))
with (folder / "events.jsonl").open("a", buffering=1) as log:
    for step in range(1, 41):
        log.write(json.dumps({"event": "step", "step": step, "train_loss": 2 + float(rate) + 4 / step,
                              "train_seconds": step}) + "\\n")
        time.sleep((10 if f"{rate} {words.get('SEED')}" == os.environ.get("PLAY_SLOW") else 1) * seconds / 40)
        if rate == "0.06" and step == 1:
            other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            (folder / "other").write_text(str(other.pid))
        if rate == "0.06" and step == 30:
            time.sleep(60)
scores = json.loads(Path(os.environ["PLAY_SCORES"]).read_text()) if "PLAY_SCORES" in os.environ else {}
name = " ".join(filter(None, [rate, words.get("SEED"), words.get("FROM", "")[-1:]]))
(folder / "result.json").write_text(json.dumps({
    "scores": {"contiguous": {"val_bpb": scores.get(name, 1 + float(rate))}}, "eval_seconds": 2.5,
    "artifact": {"total_bytes": 990_000}, "train": {"steps": 40, "tokens_per_second": 1000.0, "seconds": 40.0}}))
note("finished")
"""
GRID = ["MATRIX_LR=0.01,0.02,0.03,0.04", "SEED=1,2,3", "EVAL=contiguous", "--name", "grid"]


class Process(NamedTuple):
    """A forked command: its id, and the file with what it says."""
    pid: int
    said: Path

    def kill(self):
        """As kill -9 does."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def end(self):
        """The exit code and what it said."""
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status), self.said.read_text()


STARTED: list[Process] = []


class Played:
    """A folder of sweeps whose runs are played, here and in processes of their own."""

    def __init__(self, folder, **env):
        self.folder, self.stub = folder, folder / "stub.py"
        self.stub.write_text(STUB)
        clean = {name: text for name, text in os.environ.items() if name not in gpt.SETTINGS and name != "NPROC"}
        self.env = {**clean, "OMP_NUM_THREADS": "1", **env}
        self.source = "as it was"
        self.lab = sweep.Lab([sys.executable, str(self.stub)], self.env, folder, lambda: self.source, poll=0.02,
                             beat=0.05, grace=0.3)

    def run(self, *argv, **more):
        """The exit code of a command in this process."""
        return sweep.main([*argv], self.lab._replace(**more))

    def start(self, *argv):
        """A command in a process of its own, forked: it need not load torch again."""
        said = self.folder / f"said_{len([*self.folder.glob('said_*')])}"
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                sys.stdout = sys.stderr = said.open("w")
                code = self.run(*argv)
                sys.stdout.flush()
            finally:
                os._exit(code)
        said.touch()
        STARTED.append(Process(pid, said))
        return STARTED[-1]

    def noted(self, what, name="grid"):
        """The run ids that noted this, in their order."""
        path = self.folder / "sweeps" / name / what
        return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for(self, holds):
        """Until it holds."""
        end = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < end, "waited for a minute"
            time.sleep(0.01)

    def table(self, name="grid"):
        """trials.csv."""
        with (self.folder / "sweeps" / name / "trials.csv").open() as file:
            return [*csv.DictReader(file)]

    def store(self, name="grid", **more):
        """The trials as another worker sees them."""
        spec = sweep.Spec(name, (), (sweep.Axis("MATRIX_LR", ("0.01", "0.02")),), {}, 0, "contiguous", "none")
        return sweep.Store(spec, f"sqlite:///{self.folder}/sweeps/sweeps.db", self.lab._replace(**more))


@pytest.fixture
def played(tmp_path):
    return Played(tmp_path)


@pytest.fixture(autouse=True)
def nothing_left():
    """A test that fails leaves no process behind."""
    yield
    while STARTED:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            STARTED.pop().kill()


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Pictures take a second; the tests that want one ask for it by their name."""
    if "picture" not in request.node.name:
        monkeypatch.setattr(sweep, "draw", lambda spec, results, path: path.write_text(""))


# ---- what words mean


def spec_of(*argv, runs=Path("/nowhere"), env=None):
    lab = sweep.Lab(["false"], env or {}, runs, lambda: "x")
    return sweep.parse([*argv], lab)[0]


def test_axes_fixed_words_and_the_order_of_a_grid():
    spec = spec_of("MATRIX_LR=0.020,0.03", "EVAL=contiguous", "SEED=1,2", "STACK=A2/A (A{mlp=4,xsa=1})*2 A")
    assert spec.words == ("EVAL=contiguous",) and spec.goal == "contiguous" and spec.pairs == "SEED"
    assert [(axis.name, axis.texts) for axis in spec.axes] == [
        ("MATRIX_LR", ("0.02", "0.03")), ("SEED", ("1", "2")), ("STACK", ("A2", "A (A{mlp=4,xsa=1})*2 A"))]
    keys = [json.loads(key) for key in spec.keys()]
    assert [key["SEED"] for key in keys] == ["1"] * 4 + ["2"] * 4, "seed by seed through all others"
    assert len({*spec.keys()}) == 8
    assert spec.job_words(keys[0]) == ["EVAL=contiguous", "MATRIX_LR=0.02", "SEED=1", "STACK=A2"]


def test_values_with_commas_are_parted_by_slashes():
    spec = spec_of("EVAL=contiguous/contiguous,sliding", "TRAIN_SEQ_SCHEDULE=128@0.3,256@1", "OVERLAY=tiny")
    assert [axis.texts for axis in spec.axes] == [("contiguous", "contiguous,sliding")]
    assert "TRAIN_SEQ_SCHEDULE=128@0.3,256@1" in spec.words
    parted = {name: sweep.separator(name) for name in gpt.SETTINGS}
    assert all(parted[name] == "/" for name in ("EVAL", "STACK", "POLICY", "VE_LAYERS", "TTT_SITES", "TOKEN_ORDER",
                                                "TRAIN_SEQ_SCHEDULE", "TTT_SHORT_SCORE_FIRST_STEPS"))
    assert all(parted[name] == "," for name in ("SEED", "FROM", "DATA_PATH", "PRESET", "OVERLAY", "SOLVER", "FIT"))
    for name, (_, field) in gpt.SETTINGS.items():  # no value of a setting may hold what parts its values
        assert parted[name] not in gpt.show_value(field.default), name


@pytest.mark.parametrize(("word", "axis"), [
    ("MATRIX_LR=0.01..0.05:log", sweep.Axis("MATRIX_LR", ("0.01", "0.05"), True, True)),
    ("MATRIX_LR=1e-3..0.05", sweep.Axis("MATRIX_LR", ("0.001", "0.05"), True)),
    ("GROUP_SIZE=64..256:64", sweep.Axis("GROUP_SIZE", ("64", "256"), True, False, 64.0))])
def test_ranges(word, axis):
    spec = spec_of(word, "--trials", "4")
    assert spec.axes == (axis,) and spec.keys() == [f"trial {index}" for index in range(4)] and spec.prune == "median"
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(1))
    drawn = {float(axis.suggest(study.ask())) for _ in range(30)}
    assert all(float(axis.texts[0]) <= value <= float(axis.texts[1]) for value in drawn) and len(drawn) > 3
    assert not axis.step or drawn <= {64.0, 128.0, 192.0, 256.0}


@pytest.mark.parametrize(("argv", "said"), [
    (["MATRIX_LR=0.01"], "sweep: nothing varies; a word with several values does, MATRIX_LR=0.02,0.03"),
    (["MATRIX_LR=0.01..0.05"], "MATRIX_LR=0.01..0.05: a range needs --trials N"),
    (["MATRIX_LR=0.05..0.01", "--trials", "3"], "MATRIX_LR=0.05..0.01: must rise"),
    (["WARMDOWN_FRAC=0..1:log", "--trials", "3"], "WARMDOWN_FRAC=0..1:log: must rise, from above 0"),
    (["SEED=1,2", "MATRIX_LR=0.1..0.2", "--trials", "3"],
     "SEED=1,2: a search takes one; try its best with several in a grid"),
    (["GROUP_SIZE=64..128:0", "--trials", "3"],
     "GROUP_SIZE=64..128:0: 0 must be log, or a step above 0 within the range"),
    (["MATRX_LR=0.1,0.2"], "MATRX_LR=0.1: not a setting; did you mean MATRIX_LR?"),
    (["MATRIX_LR=0.1/0.2"], "MATRIX_LR=0.1/0.2: must be a number; a comma parts its values"),
    (["EVAL=ttt,ttt"], "EVAL=ttt,ttt: names something twice; a slash parts its values"),
    (["SEED=1,1"], "SEED=1,1: names a value twice"),
    (["SEED=1,-1"], "SEED=-1: must be at least 0"),
    (["NUM_HEADS=2,7", "MODEL_DIM=128", "NUM_KV_HEADS=1"], "NUM_HEADS=7: must divide MODEL_DIM=128"),
    (["SEED=1,2", "RUN_ID=x"], "RUN_ID=x: must be left out: each trial has its own"),
    (["SEED=1,2", "NNODES=2"], "NNODES=2: must be left out: a trial runs on one machine"),
    (["SEED=1,2", "more"], "more: must be a word NAME=value; the name of a sweep comes first"),
    (["SEED=1,2", "--trials", "0"], "--trials: 0: must be a whole number of at least 1"),
    (["SEED=1,2", "--prune", "x"], "--prune: x: must be one of none, median, hyperband"),
    (["SEED=1,2", "--name", "a b"], "--name: a b: must be letters, digits, dots, dashes and underscores"),
    (["SEED=1,2", "--what"], "unrecognized arguments: --what"),
    (["SEED=1,2", "EVAL=sliding", "--goal", "ttt"], "--goal: ttt: must be one of sliding, loss, float, or a path in "
     "result.json such as artifact.total_bytes"),
    (["--row", "a: x", "--row", "b:"], "--row: a: x: must be NAME: SETTING=value ..."),
    (["--row", "a:", "--row", "a:"], "--row: a: must be a name that no other row has"),
    (["FROM=/nowhere/*,x"], "FROM=/nowhere/*: matches no run folder with a config.json"),
    (["SEED=1,2", "--base", "SEED=1", "MATRIX_LR=0.1,0.2"],
     "--base: SEED=1: must fit one combination of MATRIX_LR, fits 0"),
    (["MATRIX_LR=0.1,0.2", "--base", "MATRIX_LR=0.1"],
     "--base: MATRIX_LR=0.1: needs a grid with several values of SEED or FROM")])
def test_mistakes_are_one_line(argv, said, played, capsys):
    argv = [word.replace("/nowhere", str(played.folder)) for word in argv]
    assert played.run(*argv) == 2
    assert capsys.readouterr().err.splitlines()[-1] == said.replace("/nowhere", str(played.folder))


def test_an_unknown_name_makes_nothing(played, capsys):
    assert played.run("nosuch") == 2
    assert capsys.readouterr().err.startswith("nosuch: must be a sweep of ")
    assert not (played.folder / "sweeps").exists()


def test_the_goal_without_one():
    assert spec_of("SEED=1,2", "EVAL=sliding,contiguous").goal == "contiguous"
    assert spec_of("SEED=1,2", "STAGES=train").goal == "loss"
    assert spec_of("SEED=1,2", "--goal", "artifact.total_bytes").goal == "artifact.total_bytes"


def test_the_sweeps_of_the_file_are_sweeps(played):
    runs = []
    for name in "ab":
        (played.folder / name).mkdir()
        (played.folder / name / "config.json").write_text('{"settings": {}}')
        runs.append(str(played.folder / name))
    held = tomllib.loads((ROOT / "tools" / "sweeps.toml").read_text())
    for name, entry in held.items():
        needs = any("train" not in word for word in entry["words"] if word.startswith("STAGES="))
        words = [f"FROM={','.join(runs)}"] if needs else []
        spec, _, lab, _ = sweep.parse([name, *words], played.lab)
        assert spec.name == name and len(spec.keys()) > 2 and entry["about"]
        base = gpt.load_config(["OVERLAY=tiny"], {}).digest()
        for row, text in spec.rows.items():  # a row that changes nothing says so with no words
            assert (gpt.load_config(["OVERLAY=tiny", *text], {}).digest() == base) == (not text), row
    assert spec_of("table5", "SEED=4,5").axes[1].texts == ("4", "5"), "words after the name win"


def test_gpus_and_cores_are_divided():
    whole = [(share.get("CUDA_VISIBLE_DEVICES"), share.get("NPROC"), cores) for share, cores in
             sweep.devices(4, {}, 8, [0, 1, 2, 3])]
    assert whole == [("0,1", "2", {0}), ("2,3", "2", {1}), ("4,5", "2", {2}), ("6,7", "2", {3})]
    assert sweep.devices(1, {}, 8, [0, 1]) == [({}, set())], "all GPUs a trial"
    chosen = sweep.devices(2, {"CUDA_VISIBLE_DEVICES": "5,7"}, 2, [0])
    assert [share["CUDA_VISIBLE_DEVICES"] for share, _ in chosen] == ["5", "7"]
    assert sweep.devices(2, {}, 0, [3, 4, 5]) == [({}, {3}), ({}, {4, 5})]
    with pytest.raises(gpt.ConfigError, match="--jobs: 3: must divide the 8 GPUs"):
        sweep.devices(3, {}, 8, [0])
    with pytest.raises(gpt.ConfigError, match="NPROC=2: --jobs 8 gives a trial 1 of the 8 GPUs"):
        sweep.devices(8, {"NPROC": "2"}, 8, [0])


def test_more_names_of_gpus_than_are_used():
    chosen = sweep.devices(2, {"CUDA_VISIBLE_DEVICES": "4, 5,6,7,"}, 2, [0])
    assert [share["CUDA_VISIBLE_DEVICES"] for share, _ in chosen] == ["4", "5"]


def test_a_gpu_that_a_run_still_holds_is_not_given_twice(tmp_path):
    """Whoever launched the run: the lock on a GPU is the run's. Pairs of GPUs and single ones know of each other."""
    stop, said = threading.Event(), []
    lab = sweep.Lab(["false"], {}, tmp_path, lambda: "x", poll=0.01, seats=tmp_path)

    def worker(mine, *others):
        shares = [{"CUDA_VISIBLE_DEVICES": names} for names in (mine, *others)]
        return sweep.Worker(None, lab, stop, shares[0], None, said.append, shares)

    device, held = worker("0", "1", "2,3").take_device()
    assert device["CUDA_VISIBLE_DEVICES"] == "0"
    device, more = worker("0", "1", "2,3").take_device()
    assert device["CUDA_VISIBLE_DEVICES"] == "1"
    device, most = worker("1,2", "0,3", "2,3").take_device()
    assert device["CUDA_VISIBLE_DEVICES"] == "2,3" and len(most) == 2 and not said
    most[0].close()
    assert worker("0", "2").take_device()[0]["CUDA_VISIBLE_DEVICES"] == "2"
    stop.set()
    with pytest.raises(sweep.Interrupted):
        worker("3").take_device()
    assert len(said) == 1 and "earlier worker" in said[0]
    held[0].close()
    assert worker("0").take_device()[0]["CUDA_VISIBLE_DEVICES"] == "0" and more


def test_a_trial_is_a_launch_of_run_sh_whatever_a_benchmark_set(monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    lab = sweep.make_lab()
    assert lab.command == [str(ROOT / "run.sh")] and lab.env["PYTHON"] == sys.executable
    assert "OPENBLAS_NUM_THREADS" not in lab.env and lab.runs == ROOT / "runs"


def test_comments_do_not_change_the_program(monkeypatch, tmp_path):
    path, digests = tmp_path / "train_gpt.py", []
    monkeypatch.setattr(gpt, "__file__", str(path))
    for text in ("x = 1\n", "# why\nx = 1  # one\n", "x = 2\n"):
        path.write_text(text)
        digests.append(sweep.source_digest())
    assert digests[0] == digests[1] != digests[2]


# ---- killed, shared, stopped


@pytest.mark.dist
def test_a_grid_that_is_killed_twice_ends_with_every_result_and_none_run_twice(tmp_path):
    played = Played(tmp_path, PLAY_SECONDS="0.3", PLAY_SLOW="0.03 1")
    first = played.start(*GRID)
    played.wait_for(lambda: len(played.noted("launched")) == 3)
    first.kill()  # the worker alone: its run lives on and is waited for
    second = played.start(*GRID)
    played.wait_for(lambda: len(played.noted("launched")) == 7)
    running = [line.split() for line in (tmp_path / "sweeps" / "grid" / "launched").read_text().splitlines()][-1]
    second.kill()
    os.killpg(os.getpgid(int(running[1])), signal.SIGKILL)  # and now its run with it, which goes on in its folder
    code, said = played.start(*GRID).end()
    assert code == 0, said
    assert played.noted("launched")[7] == running[0], "what was begun goes first"
    assert sorted(played.noted("finished"), key=int) == [*map(str, range(12))], "each finished, and once"
    launched = played.noted("launched")
    assert len(launched) == 13 and launched.count(running[0]) == 2, "only the one that was killed began again"
    rows = played.table()
    assert [row["state"] for row in rows] == ["done"] * 12
    assert [(row["SEED"], row["MATRIX_LR"]) for row in rows] == [
        (seed, rate) for seed in "123" for rate in ("0.01", "0.02", "0.03", "0.04")]
    study = optuna.load_study(study_name="grid", storage=f"sqlite:///{tmp_path}/sweeps/sweeps.db")
    done = [trial for trial in study.trials if trial.state is TrialState.COMPLETE]
    assert len(done) == 12 and len({trial.user_attrs["key"] for trial in done}) == 12
    assert "12 trials, 0 failed, 0 not finished" in said


@pytest.mark.dist
def test_two_workers_share_a_storage_and_do_no_trial_twice(tmp_path):
    played = Played(tmp_path, PLAY_SECONDS="0.2")
    workers = [played.start(*GRID), played.start(*GRID)]
    codes, said = zip(*(worker.end() for worker in workers), strict=True)
    assert codes == (0, 0), said
    assert sorted(played.noted("launched"), key=int) == [*map(str, range(12))]
    assert sorted(played.noted("finished"), key=int) == [*map(str, range(12))]
    shares = [text.count("/12  ") for text in said]
    assert sum(shares) == 12 and min(shares) >= 2, "both worked"
    assert all("12 trials, 0 failed, 0 not finished" in text for text in said), "both show all of it"


def test_claims_of_many_threads_are_all_different(played):
    """In SQLite alone two that claim at a time can get the same trial."""
    store = played.store()
    store.spec = store.spec._replace(axes=(sweep.Axis("SEED", tuple(map(str, range(16)))),))
    jobs = []
    threads = [threading.Thread(target=lambda: [jobs.append(store.claim()) for _ in range(4)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    places = [job.place for job in jobs if job]
    assert len(places) == 16 and len({*places}) == 16


def test_trials_of_a_dead_worker_elsewhere_are_taken_over_after_the_grace(played):
    store, seconds = played.store(), [0.0]
    store.owner = "another:machine"
    job = store.claim()
    store.beat(job, 1)
    other = played.store(clock=lambda: seconds[0], grace=60.0)
    second = other.claim()
    assert second.place == 1 and other.claim() is None, "the first one is taken to live"
    seconds[0] = 61.0
    store.beat(job, 2)
    assert other.claim() is None, "it gave a sign of life"
    seconds[0] = 100.0
    (other.folder / "0").mkdir()
    (other.folder / "0" / "events.jsonl").write_text("a line\n")
    assert other.claim() is None, "so did its run"
    seconds[0] = 161.0
    job.alive.close()
    taken = other.claim()
    assert (taken.place, taken.values) == (0, job.values), "now it is dead, and goes on in its folder"
    with pytest.raises(sweep.Lost):
        store.beat(job, 3)
    store.tell(job, TrialState.COMPLETE, 7.0)
    assert [trial.state for trial in other.live().values()] == [TrialState.RUNNING] * 2, "what it tells now is late"


def test_a_worker_that_lost_its_trial_stops_its_run(tmp_path, capsys):
    played = Played(tmp_path, PLAY_SECONDS="30")
    store = played.store()
    worker = sweep.Worker(store, played.lab, threading.Event(), {}, None, print)
    job = store.claim()
    threading.Timer(0.3, lambda: store.study.tell(job.trial.number, state=TrialState.FAIL)).start()
    worker.take(job)
    assert capsys.readouterr().out == "0: another worker has taken it over\n"
    assert sweep.try_lock(store.path(0, "lock")) is not None and played.noted("finished") == []


def test_what_two_machines_queued_both_is_run_once(played):
    store = played.store()
    job = store.claim()
    for key in store.spec.keys():  # as a machine that saw no common lock does
        store.study.enqueue_trial({}, user_attrs={"key": key})
    other = played.store()
    second = other.claim()
    assert (job.place, second.place, other.claim()) == (0, 1, None)
    assert len(other.live()) == 2 and len(other.trials()) == 4


def test_a_run_that_ends_while_its_lock_is_looked_at_is_not_begun_again(played):
    store = played.store()
    job = store.claim()
    worker = sweep.Worker(store, played.lab, threading.Event(), {}, None, print)
    store.path(0, "exit").write_text("0 digest\n")
    assert not worker.play(job, [f"RUNS_PATH={store.folder}", "RUN_ID=0"], "digest")
    assert played.noted("launched") == []


def test_a_run_that_will_not_end_is_killed(played, monkeypatch):
    monkeypatch.setattr(sweep, "STOP_SECONDS", 0.3)
    child = subprocess.Popen(["/bin/sh", "-c", "trap '' TERM; echo; sleep 60; sleep 60"], start_new_session=True,
                             stdout=subprocess.PIPE)
    child.stdout.readline()
    began = time.monotonic()
    sweep.Worker(None, played.lab, threading.Event(), {}, None, print).end(child)
    child.stdout.close()
    assert child.returncode == -signal.SIGKILL and time.monotonic() - began < 30


def test_a_hopeless_run_is_stopped_with_all_its_processes(tmp_path, capsys):
    played = Played(tmp_path, PLAY_SECONDS="0.2")
    began = time.monotonic()
    assert played.run("MATRIX_LR=0.01,0.02,0.03,0.04,0.05,0.06", "EVAL=contiguous", "--prune", "median",
                      "--name", "grid") == 0
    assert time.monotonic() - began < sweep.STOP_SECONDS, "asked to end, all of them did"
    rows = played.table()
    assert [row["state"] for row in rows] == ["done"] * 5 + ["stopped early"] and rows[5]["contiguous (goal)"] == ""
    assert played.noted("finished") == [*"01234"]
    assert "5: MATRIX_LR=0.06: stopped early" in capsys.readouterr().err
    other = int((tmp_path / "sweeps" / "grid" / "5" / "other").read_text())
    played.wait_for(lambda: not Path(f"/proc/{other}").exists() or
                    Path(f"/proc/{other}/stat").read_text().split()[2] == "Z")
    assert played.run("grid") == 0 and played.noted("launched") == [*"012345"], "stopped is an end, too"


def test_only_whole_parts_of_a_curve_are_judged(played):
    store = played.store()
    job, folder = store.claim(), store.folder / "0"
    folder.mkdir()
    (folder / "config.json").write_text('{"settings": {"ITERATIONS": 40, "MAX_WALLCLOCK_SECONDS": 0}}')
    steps = [{"event": "step", "step": step, "train_loss": float(step), "train_seconds": step} for step in range(1, 6)]
    (folder / "events.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    worker = sweep.Worker(store, played.lab, threading.Event(), {}, None, print)
    assert not worker.is_hopeless(job, sweep.Tail(folder / "events.jsonl"), set())
    (trial,) = [trial for trial in store.trials() if trial.number == 0]
    assert trial.intermediate_values == {1: 1.5, 2: 3.5}, "the third part is half a part yet"


def test_a_search_draws_within_its_range_and_goes_on(played, capsys):
    words = ["MATRIX_LR=0.01..0.05:log", "SOLVER=nearest,gptq", "EVAL=contiguous", "--name", "tpe"]
    assert played.run(*words, "--trials", "3") == 0
    before = played.table("tpe")
    assert played.run(*words, "--trials", "5", "--jobs", "2") == 0
    after = played.table("tpe")
    assert after[:3] == before and len({row["MATRIX_LR"] for row in after}) == 5
    assert all(0.01 <= float(row["MATRIX_LR"]) <= 0.05 and row["SOLVER"] in ("nearest", "gptq") for row in after)
    assert sorted(played.noted("launched", "tpe")) == [*"01234"]


def test_an_attempt_that_came_to_nothing_keeps_its_values_and_folder(played):
    spec = spec_of("MATRIX_LR=0.01..0.05:log", "--trials", "1", "--name", "tpe", "EVAL=contiguous")
    store = sweep.Store(spec, f"sqlite:///{played.folder}/sweeps/sweeps.db", played.lab)
    job = store.claim()
    job.alive.close()  # as when the worker is killed
    again = sweep.Store(spec, f"sqlite:///{played.folder}/sweeps/sweeps.db", played.lab).claim()
    assert (again.place, again.values) == (0, job.values) and again.trial.number == 1


def test_interruption_stops_the_run_and_the_same_command_goes_on(tmp_path, capsys):
    played = Played(tmp_path, PLAY_SECONDS="0.3", PLAY_SLOW="0.02 1")

    def interrupt():
        played.wait_for(lambda: len(played.noted("launched")) == 2)
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=interrupt, daemon=True).start()
    assert played.run(*GRID) == 130
    assert signal.getsignal(signal.SIGTERM) == handler
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted: the same command goes on"
    assert played.noted("launched") == ["0", "1"] and played.noted("finished") == ["0"], "its run was stopped"
    played.env["PLAY_SECONDS"] = "0"
    assert played.run(*GRID) == 0
    assert sorted(played.noted("finished"), key=int) == [*map(str, range(12))]


# ---- what is kept, what fails, what is refused


def test_more_values_cost_their_own_runs_only(played, capsys):
    assert played.run("MATRIX_LR=0.01,0.02", "SEED=1,2", "EVAL=contiguous", "--name", "grid") == 0
    assert played.run("MATRIX_LR=0.010,0.02", "SEED=1,2,3", "EVAL=contiguous", "--name", "grid") == 0
    assert played.noted("launched") == [*"012345"]
    capsys.readouterr()
    assert played.run("grid") == 0, "by its name alone, with the words it had last"
    assert played.noted("launched") == [*"012345"] and len(played.table()) == 6
    out, err = capsys.readouterr()
    assert "MATRIX_LR=0.02" in out and "grid of 6 trials" in err


def test_a_finished_folder_is_told_and_not_run(played, capsys):
    assert played.run("MATRIX_LR=0.01,0.02", "EVAL=contiguous", "--name", "grid") == 0
    (played.folder / "sweeps" / "sweeps.db").unlink()
    assert played.run("MATRIX_LR=0.01,0.02", "EVAL=contiguous", "--name", "grid") == 0
    assert played.noted("launched") == ["0", "1"] and "there already" in capsys.readouterr().err
    (played.folder / "sweeps" / "sweeps.db").unlink()
    assert played.run("MATRIX_LR=0.01,0.03", "EVAL=contiguous", "--name", "grid") == 0
    assert played.noted("launched") == ["0", "1", "1"], "one of other words is another one's"
    assert [row["contiguous"] for row in played.table()] == ["1.01", "1.03"]


def test_a_sweep_belongs_to_its_words_and_program(played, capsys):
    words = ["MATRIX_LR=0.01,0.02", "EVAL=contiguous", "--name", "grid"]
    assert played.run(*words) == 0
    for more, what in ((["MUON_BACKEND_STEPS=4"], "other words"), (["--goal", "artifact.total_bytes"], "other goal"),
                       (["SEED=1,2"], "other axes"), (["--prune", "median"], "other prune")):
        capsys.readouterr()
        assert played.run(*words, *more) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith(f"--name: grid: that sweep has {what} (") and said.endswith("use another name")
    played.source = "edited"
    assert played.run(*words) == 2 and "other train_gpt.py" in capsys.readouterr().err
    played.source = "as it was"
    assert played.run(*words, env={**played.env, "MUON_BACKEND_STEPS": "4"}) == 2
    assert "other environment" in capsys.readouterr().err
    rows = ["--row", "a:", "--row", "b: MATRIX_LR=0.03", "EVAL=contiguous", "--name", "rows"]
    assert played.run(*rows) == 0
    rows[3] = "b: MATRIX_LR=0.04"
    assert played.run(*rows) == 2 and "other words of the row b" in capsys.readouterr().err
    for more in ([], ["MUON_BACKEND_STEPS=4"], []):
        assert played.run("MATRIX_LR=0.01,0.02", "EVAL=contiguous", *more) == 0
    unnamed = [*(played.folder / "sweeps").glob("MATRIX_LR-*")]
    assert len(unnamed) == 2, "without a name other words have another one, the same words the same"


def test_failures_are_told_and_tried_again_when_asked(played, capsys):
    words = ["MATRIX_LR=0.01,0.07,0.08,0.09", "EVAL=contiguous", "--name", "grid"]
    assert played.run(*words) == 3
    rows = played.table()
    assert [row["state"] for row in rows] == ["done", "done", "failed", "failed"]
    assert rows[2]["fault"] == "exit code 2: MATRIX_LR: the reason"
    assert played.noted("launched") == ["0", "1", "1", "2", "3"], "a run that a signal ended goes on"
    states = [trial.state for trial in played.store().live().values()]
    assert states[2:] == [TrialState.FAIL, TrialState.PRUNED], "a search learns from what a check refused"
    assert capsys.readouterr().err.splitlines()[-1] == "2 failed; --again runs what failed again"
    assert played.run(*words) == 3 and len(played.noted("launched")) == 5
    played.stub.write_text(STUB.replace('("0.09", "0.08")', '("0.09",)'))
    assert played.run(*words, "--again") == 3
    assert played.noted("launched")[5:] == ["2", "3"]
    assert [row["state"] for row in played.table()] == ["done", "done", "done", "failed"]


def test_a_run_that_is_killed_again_and_again_fails(played, capsys):
    played.stub.write_text(STUB.replace('and not (folder / "tried").exists()', ""))
    assert played.run("MATRIX_LR=0.01,0.07", "EVAL=contiguous", "--name", "grid") == 3
    assert played.noted("launched").count("1") == sweep.TRIES
    assert played.table()[1]["fault"].startswith("ended by signal 9: ")


def test_a_number_that_is_not_there_is_a_fault(played, capsys):
    assert played.run("SEED=1,2", "EVAL=contiguous", "--goal", "artifact.nosuch", "--name", "grid") == 3
    assert played.table()[0]["fault"].startswith("--goal: artifact.nosuch: ")
    assert played.run("SEED=1,2", "EVAL=contiguous", "--goal", "artifact.total_bytes", "--name", "bytes") == 0
    assert played.table("bytes")[0]["artifact.total_bytes"] == "990000.0"
    assert "best 990,000 SEED=1" in capsys.readouterr().err
    assert played.run("SEED=1,2", "STAGES=train", "--name", "loss") == 0
    assert float(played.table("loss")[0]["loss"]) == pytest.approx(2.02 + (4 / 39 + 4 / 40) / 2), "the last twentieth"


def test_trained_runs_are_evaluated_anew(played, capsys):
    for name in "ab":
        (played.folder / f"run_{name}").mkdir()
        (played.folder / f"run_{name}" / "config.json").write_text('{"settings": {"SEED": 7}}')
    (played.folder / "scores.json").write_text(json.dumps({"0.02 a": 1.5, "0.02 b": 1.25}))
    played.env["PLAY_SCORES"] = str(played.folder / "scores.json")
    assert played.run(f"FROM={played.folder}/run_*", "STAGES=evaluate", "EVAL=contiguous", "EVAL_STRIDE=32,64",
                      "--name", "grid") == 0
    rows = played.table()
    assert [row["contiguous"] for row in rows] == ["1.5", "1.5", "1.25", "1.25"]
    out = capsys.readouterr().out
    assert "paired over paired" not in out and "values of FROM" in out, "runs pair what seeds would"
    said = (played.folder / "sweeps" / "grid" / "0.out").read_text()
    assert said.split()[2:] == ["STAGES=evaluate", "EVAL=contiguous", f"FROM={played.folder}/run_a", "EVAL_STRIDE=32",
                                f"RUNS_PATH={played.folder}/sweeps/grid", "RUN_ID=0"]


def test_a_journal_file_is_a_storage_too(played):
    pytest.importorskip("optuna.storages.journal")
    words = ["SEED=1,2", "EVAL=contiguous", "--name", "grid", "--storage", f"journal:{played.folder}/journal.log"]
    assert played.run(*words) == 0 and played.run(*words) == 0
    assert played.noted("launched") == ["0", "1"] and not (played.folder / "sweeps" / "sweeps.db").exists()


def test_a_storage_that_cannot_be_opened_is_one_line(played, capsys):
    assert played.run("SEED=1,2", "--storage", "nosuch://host/db") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("--storage: nosuch://host/db: cannot be opened (")


# ---- the report


def test_differences_are_paired_by_seed_as_by_hand(played, capsys):
    # Minus the base by seed: 0.02 has -0.5, -0.1, -0.3 (mean -0.3, deviation 0.2), 0.03 has -1.0, -1.1, -1.2 (mean
    # -1.1, deviation 0.1); t of two degrees of freedom is 4.30265, so half widths are 0.49683 and 0.24842.
    scores = {"0.01 1": 1.5, "0.01 2": 2.1, "0.01 3": 4.3, "0.02 1": 1.0, "0.02 2": 2.0, "0.02 3": 4.0,
              "0.03 1": 0.5, "0.03 2": 1.0, "0.03 3": 3.1}
    (played.folder / "scores.json").write_text(json.dumps(scores))
    played.env["PLAY_SCORES"] = str(played.folder / "scores.json")
    words = ["MATRIX_LR=0.01,0.02,0.03", "SEED=1,2,3", "EVAL=contiguous", "--name", "grid"]
    assert played.run(*words) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["MATRIX_LR=0.02", "2.3333", "1.5275", "3", "-0.3000", "0.4968", "not", "decided"] in lines
    assert ["MATRIX_LR=0.03", "1.5333", "1.3796", "3", "-1.1000", "0.2484", "better"] in lines
    assert ["MATRIX_LR=0.01", "2.6333", "1.4742", "3", "-", "-", "base"] in lines
    assert played.run("grid", "--report", "--base", "MATRIX_LR=0.03") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["MATRIX_LR=0.01", "2.6333", "1.4742", "3", "+1.1000", "0.2484", "worse"] in lines
    assert played.noted("launched") == [*"012345678"], "a report runs nothing"


def test_only_seeds_that_both_have_are_paired(played):
    spec = spec_of("MATRIX_LR=0.01,0.02", "SEED=1,2,3", "EVAL=contiguous")
    results = [sweep.Result(place, "done", {"MATRIX_LR": rate, "SEED": seed}, goal, {}, 1.0, {}, "")
               for place, (rate, seed, goal) in enumerate([
                   ("0.01", "1", 1.0), ("0.02", "1", 2.0), ("0.01", "2", 1.5), ("0.02", "2", None),
                   ("0.02", "3", 9.0)])]
    row = next(line.split() for line in sweep.pair_table(spec, results, "").splitlines() if "0.02" in line)
    assert row == ["MATRIX_LR=0.02", "5.5000", "4.9497", "2", "+1.0000", "-", "not", "decided"]


def test_the_table_is_sorted_and_the_csv_whole(played, capsys):
    assert played.run("MATRIX_LR=0.03,0.01,0.02", "EVAL=contiguous", "--name", "grid") == 0
    out = capsys.readouterr().out
    assert [line.split()[:3] for line in out.splitlines()[1:4]] == [
        ["1", "0.01", "1.0100"], ["2", "0.02", "1.0200"], ["0", "0.03", "1.0300"]]
    row = played.table()[1]
    assert row.pop("seconds")
    assert row == {"trial": "1", "state": "done", "MATRIX_LR": "0.01", "contiguous (goal)": "1.01",
                   "contiguous": "1.01", "total_bytes": "990000", "steps": "40", "tokens_per_second": "1000.0",
                   "train_seconds": "40.0", "eval_seconds": "2.5", "fault": ""}


def test_the_picture_shows_every_kind_of_axis_and_nothing_at_all(played):
    path = played.folder / "sweep.png"
    spec = spec_of("MATRIX_LR=0.001..0.1:log", "SOLVER=nearest,gptq", "EVAL=contiguous", "--trials", "3")
    results = [sweep.Result(place, "done" if goal else "stopped early", {"MATRIX_LR": rate, "SOLVER": solver}, goal, {},
                            1.0, {1: 3.0, 2: 2.0}, "") for place, (rate, solver, goal) in enumerate([
                                ("0.01", "gptq", 1.5), ("0.02", "nearest", 1.25), ("0.09", "gptq", None)])]
    sizes = []
    for spec_, found in ((spec, results), (spec, []), (spec_of("SEED=1,2", "MATRIX_LR=0.1,0.2,0.9"), [])):
        sweep.draw(spec_, found, path)
        assert path.read_bytes()[:4] == b"\x89PNG"
        sizes.append(path.stat().st_size)
    assert sizes[0] > sizes[1] and [*played.folder.glob(".*")] == []


def test_curve_points_are_means_by_part_without_what_never_happened():
    settings = {"ITERATIONS": 40, "MAX_WALLCLOCK_SECONDS": 0}
    events = [{"event": "step", "step": step, "train_loss": float(step), "train_seconds": step} for step in
              range(1, 11)]
    assert sweep.curve_points(events, settings) == {1: 1.5, 2: 3.5, 3: 5.5, 4: 7.5, 5: 9.5}
    events += [{"event": "resume", "step": 4, "train_seconds": 9},
               {"event": "step", "step": 5, "train_loss": 50.0, "train_seconds": 10},
               {"event": "step", "step": 6, "train_loss": float("nan"), "train_seconds": 11}]
    assert sweep.curve_points(events, settings) == {1: 1.5, 2: 3.5, 3: 50.0}
    timed = {"ITERATIONS": 1000, "MAX_WALLCLOCK_SECONDS": 20}
    assert sweep.curve_points(events[:4], timed) == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}


def test_help_says_how_values_are_parted(capsys):
    with pytest.raises(SystemExit) as ended:
        sweep.main(["--help"], sweep.Lab(["false"], {}, Path("/nowhere"), lambda: "x"))
    out = textwrap.dedent(capsys.readouterr().out)
    assert ended.value.code == 0 and "a comma parts them" in out and "--trials N" in out
