"""Sweeps: many runs that differ in some settings, kept so that they can be killed, shared and added to.

    ./run.sh sweep MATRIX_LR=0.02,0.026,0.03 SEED=1,2,3          a grid: all combinations, differences paired by seed
    ./run.sh sweep MATRIX_LR=0.01..0.05:log --trials 40          a search: Optuna's TPE, poor runs stopped early
    ./run.sh sweep table5                                        a sweep of tools/sweeps.toml, or one begun with --name
    ./run.sh sweep FROM=runs/a,runs/b MATRIX_BITS=4,5,6 STAGES=calibrate,write,reload,evaluate
                                                                 trained runs squeezed anew; likewise STAGES=evaluate

A word NAME=value is handed to every trial. Several values make an axis: a comma parts them. Where a setting's own
value may hold commas (EVAL, STACK, POLICY, TRAIN_SEQ_SCHEDULE, ...: lists, and texts of the recipe) a slash does:
EVAL=sliding/sliding,ttt are two values. LOW..HIGH is a range of a number, :log by its logarithm, :STEP in steps; it
needs --trials. FROM takes patterns, FROM='runs/sweeps/lr/*'. `--row "name: A=1 B=2"`, given several times, is an axis
whose values are bundles of words.

A trial is a launch of ./run.sh in runs/sweeps/<name>/<number>. The trials stand in Optuna's storage, by default
runs/sweeps/sweeps.db (SQLite). The same command goes on where it was stopped, by whatever: finished trials are told,
not run; one whose worker died goes on in its folder, and a run that outlived its worker is waited for. More values,
seeds or --trials under the same --name cost their own runs only. Any number of workers may share a sweep: the same
command, or ./run.sh sweep NAME, on other machines with the same --storage. A sweep belongs to its other words and to
train_gpt.py as it was.

On 8 GPUs --jobs 8 gives each trial one GPU, --jobs 1 all of them; on a CPU the cores are divided.
trials.csv and sweep.png in the sweep's folder hold the results; --report writes them without running anything.
Exit codes: 0 done, 2 a mistake in the words, 3 some trials failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import fcntl
import glob
import hashlib
import io
import itertools
import json
import math
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import optuna  # noqa: E402
from optuna.trial import TrialState  # noqa: E402

import train_gpt as gpt  # noqa: E402
from tools import compare  # noqa: E402
from tools.console import Parser, UsageError, choice, duration, number, table_text  # noqa: E402
from tools.plot import BLUE, GREY, ORANGE, SCORE_COLOURS, valid_events  # noqa: E402
from tools.watch import Tail, fraction, read_settings  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW = "ROW"  # the axis of named bundles of words
LAUNCHER = {"NPROC"}  # words of run.sh that a trial may have
PLACES = {"RUN_ID": "each trial has its own", "NNODES": "a trial runs on one machine",
          "NODE_RANK": "a trial runs on one machine", "MASTER_ADDR": "a trial runs on one machine",
          "MASTER_PORT": "a trial runs on one machine", "PYTHON": "./run.sh takes it"}
PAIRED_BY = ("SEED", "FROM")  # the first of these that is an axis pairs the differences
CURVE_PARTS = 20  # points of the loss curve that early stopping looks at
TRIES = 3  # of a run that something else ended by a signal
STOP_SECONDS = 20.0  # that a run has to end before it is killed
# Optuna's rules for stopping a run early, on the mean loss of each part of training against the other trials there.
PRUNERS: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
    "none": optuna.pruners.NopPruner,
    "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=CURVE_PARTS // 5),
    "hyperband": lambda: optuna.pruners.HyperbandPruner(min_resource=CURVE_PARTS // 5, max_resource=CURVE_PARTS - 1,
                                                        reduction_factor=3)}
# The run's own last command: it holds the lock for as long as it lives and leaves the exit code, whoever still listens.
WRAPPER = 'digest=$1; shift; "$@"; code=$?; echo "$code $digest" >"$0.part" && mv "$0.part" "$0"; exit "$code"'


class Interrupted(Exception):
    """The worker was told to stop."""


class Lost(Exception):
    """Another worker took the trial over, because this one seemed dead."""


# ---- what is varied


class Axis(NamedTuple):
    """A setting and its values as a user would write them, or the two ends of a range: straight, by the logarithm or in
    steps (0 is none)."""
    name: str
    texts: tuple[str, ...]
    ranged: bool = False
    log: bool = False
    step: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether the values are whole numbers."""
        return self.name in gpt.SETTINGS and gpt.SETTINGS[self.name][1].type is int

    @property
    def numeric(self) -> bool:
        """Whether the values are numbers."""
        return self.name in gpt.SETTINGS and gpt.SETTINGS[self.name][1].type in (int, float)

    def text(self) -> str:
        """As a word says it."""
        low_high = "..".join(self.texts) + (":log" if self.log else f":{self.step:g}" if self.step else "")
        return low_high if self.ranged else separator(self.name).join(self.texts)

    def suggest(self, trial: optuna.Trial) -> str:
        """A value of the axis for a trial, drawn by the study's sampler."""
        if not self.ranged:
            return trial.suggest_categorical(self.name, self.texts)
        if self.whole:
            low, high = map(int, self.texts)
            return str(trial.suggest_int(self.name, low, high, step=int(self.step) or 1, log=self.log))
        low, high = map(float, self.texts)
        return gpt.show_value(trial.suggest_float(self.name, low, high, step=self.step or None, log=self.log))


class Spec(NamedTuple):
    """A sweep: its name, the words of every trial, the axes, the words of each row, how many trials a search has (0: a
    grid), what is minimised, the rule that stops runs early."""
    name: str
    words: tuple[str, ...]
    axes: tuple[Axis, ...]
    rows: dict[str, list[str]]
    trials: int
    goal: str
    prune: str

    def job_words(self, values: Mapping[str, str]) -> list[str]:
        """The words of a trial with these values of the axes."""
        named = [word for name, text in values.items() for word in (
            self.rows[text] if name == ROW else [f"{name}={text}"])]
        return [*self.words, *named]

    def keys(self) -> list[str]:
        """What tells the trials apart: the values of a grid's point, seed by seed through all others, so that what
        drifts meets all alike; a number in a search."""
        if self.trials:
            return [f"trial {index}" for index in range(self.trials)]
        outer = [axis for axis in self.axes if axis.name == self.pairs]
        axes = outer + [axis for axis in self.axes if axis.name != self.pairs]
        points = [dict(zip([axis.name for axis in axes], texts, strict=True))
                  for texts in itertools.product(*(axis.texts for axis in axes))]
        return [json.dumps({axis.name: point[axis.name] for axis in self.axes}) for point in points]

    @property
    def pairs(self) -> str:
        """The axis whose values pair the differences of a grid; empty without one."""
        names = [axis.name for axis in self.axes]
        return next((name for name in PAIRED_BY if name in names and not self.trials), "")


def separator(name: str) -> str:
    """What parts the values of a setting: a comma, or a slash where its own value may hold commas."""
    field = gpt.SETTINGS[name][1] if name in gpt.SETTINGS else None
    if field is None or field.type in (int, float, bool):
        return ","
    plain = field.type is str and (field.metadata["choices"] or field.metadata["scope"] != "recipe"
                                   or name in ("PRESET", "OVERLAY"))
    return "," if plain else "/"


def spell(name: str, text: str) -> str:
    """A value in the one spelling that makes equal values equal; ConfigError where the setting cannot have it."""
    if name not in gpt.SETTINGS:
        return text
    try:
        return gpt.show_value(gpt.parse_value(name, text))
    except gpt.ConfigError as error:
        other = "/" if separator(name) == "," else ","
        hint = f"; {'a comma' if other == '/' else 'a slash'} parts its values" if other in text else ""
        raise gpt.ConfigError(f"{error}{hint}") from None


def read_range(name: str, text: str) -> Axis | None:
    """LOW..HIGH, LOW..HIGH:log or LOW..HIGH:STEP of a number; None for anything else. ConfigError for a bad one."""
    if ".." not in text or not Axis(name, ()).numeric:
        return None
    found = re.fullmatch(r"(.+?)\.\.([^:]+)(?::(.+))?", text)
    low, high, how = found.groups() if found else ("", "", "")
    if not found:
        raise gpt.ConfigError(f"{name}={text}: must be LOW..HIGH, LOW..HIGH:log or LOW..HIGH:STEP")
    low, high = spell(name, low), spell(name, high)
    if float(low) >= float(high) or (how == "log" and float(low) <= 0):
        raise gpt.ConfigError(f"{name}={text}: must rise{', from above 0' * (how == 'log')}")
    if how in (None, "log"):
        return Axis(name, (low, high), True, how == "log")
    try:
        step = (int if Axis(name, ()).whole else float)(how)
    except ValueError:
        step = 0
    if not 0 < step <= float(high) - float(low):
        raise gpt.ConfigError(f"{name}={text}: {how} must be log, or a step above 0 within the range")
    return Axis(name, (low, high), True, False, float(step))


def read_axis(word: str) -> Axis:
    """The values of a word NAME=value; one value where nothing varies."""
    name, _, text = word.partition("=")
    if found := read_range(name, text):
        return found
    parts = [part.strip() for part in text.split(separator(name))]
    if name == "FROM":
        found = [sorted(map(os.path.dirname, glob.glob(f"{part}/config.json"))) if "*" in part else [part]
                 for part in parts]
        if not all(found):
            raise gpt.ConfigError(f"{name}={parts[found.index([])]}: matches no run folder with a config.json")
        parts = [place for places in found for place in places]
    texts = tuple(spell(name, part) for part in parts)
    if len({*texts}) < len(texts):
        raise gpt.ConfigError(f"{word}: names a value twice")
    return Axis(name, texts)


def read_rows(texts: Iterable[str]) -> dict[str, list[str]]:
    """Name -> words of `name: A=1 B=2`."""
    rows: dict[str, list[str]] = {}
    for text in texts:
        try:
            [(name, words)] = compare.read_row(text)
        except ValueError:
            raise gpt.ConfigError(f"--row: {text}: must be NAME: SETTING=value ...") from None
        if name in rows:
            raise gpt.ConfigError(f"--row: {name}: must be a name that no other row has")
        rows[name] = words
    return rows


def check_names(words: Iterable[str]) -> None:
    """ConfigError for what is no word NAME=value, or says what the sweep says."""
    for word in words:
        name, equals, _ = word.partition("=")
        if not equals or name in PLACES:
            raise gpt.ConfigError(f"{word}: must be " + (f"left out: {PLACES[name]}" if name in PLACES else
                                                         "a word NAME=value; the name of a sweep comes first"))


def settings_of(words: Iterable[str]) -> list[str]:
    """The words that train_gpt.py knows."""
    return [word for word in words if word.partition("=")[0] not in LAUNCHER]


def make_spec(name: str, words: list[str], rows: dict[str, list[str]], options: Mapping[str, Any], lab: Lab
              ) -> tuple[Spec, dict[str, Any]]:
    """The sweep that these words ask for, and what it must keep; every point of a grid is checked, of a search the ends
    of every axis, and ConfigError raised. Without a name it gets one that the same words give again, until
    train_gpt.py changes."""
    words = list({word.partition("=")[0]: word for word in words if not word.startswith("RUNS_PATH=")}.values())
    check_names([*words, *itertools.chain.from_iterable(rows.values())])
    axes = [read_axis(word) for word in words]
    fixed = tuple(f"{axis.name}={axis.texts[0]}" for axis in axes if len(axis.texts) == 1)
    axes = [Axis(ROW, tuple(rows))] * bool(rows) + [axis for axis in axes if len(axis.texts) > 1]
    if not axes:
        raise gpt.ConfigError("sweep: nothing varies; a word with several values does, MATRIX_LR=0.02,0.03")
    trials = options["trials"] or 0
    for axis in axes:
        if axis.ranged and not trials:
            raise gpt.ConfigError(f"{axis.name}={axis.text()}: a range needs --trials N")
        if axis.name in PAIRED_BY and trials:
            raise gpt.ConfigError(f"{axis.name}={axis.text()}: a search takes one; try its best with several in a grid")
    spec = Spec("", fixed, tuple(axes), rows, trials, options["goal"] or "",
                options["prune"] or ("median" if trials else "none"))
    points = [json.loads(key) for key in spec.keys()] if not trials else [
        {other.name: other.texts[0] for other in axes} | {axis.name: text} for axis in axes for text in axis.texts]
    configs = [gpt.load_config(settings_of(spec.job_words(point)), lab.env) for point in points]
    spec = spec._replace(goal=check_goal(spec.goal, configs[0]))
    facts = identity(spec, configs[0], lab)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    return spec._replace(name=name or f"{'-'.join(axis.name for axis in axes)[:60]}-{digest}"), facts


def check_goal(goal: str, config: gpt.Config) -> str:
    """What is minimised: the goal, or without one the last evaluator's bits per byte, or the training loss where
    nothing is evaluated."""
    evaluated = [*config.eval.eval] if "evaluate" in config.run.stages else []
    trained = "train" in config.run.stages
    known = [*evaluated, *(["loss"] if trained else []), *(["float"] if trained and evaluated else [])]
    if not goal and not known:
        raise gpt.ConfigError(f"STAGES={','.join(config.run.stages)}: neither trains nor evaluates; --goal names a "
                              "number of result.json, for example artifact.total_bytes")
    if goal and "." not in goal and goal not in known:
        raise gpt.ConfigError(f"--goal: {goal}: must be one of {', '.join(known)}, or a path in result.json such as "
                              "artifact.total_bytes")
    return goal or (evaluated[-1] if evaluated else "loss")


def identity(spec: Spec, first: gpt.Config, lab: Lab) -> dict[str, Any]:
    """What a sweep must keep while values, seeds and trials are added."""
    env = {name: text for name, text in lab.env.items()
           if (name in gpt.SETTINGS or name in LAUNCHER) and name not in ("RUN_ID", "RUNS_PATH")}
    axes = [f"{axis.name}={axis.text()}" if spec.trials else axis.name for axis in spec.axes]
    return {"kind": "search" if spec.trials else "grid", "axes": axes, "words": sorted(spec.words),
            "rows": spec.rows if spec.trials else {}, "environment": env, "overlay": first.run.overlay,
            "goal": spec.goal, "prune": spec.prune, "train_gpt.py": lab.source()}


# ---- the world around


class Lab(NamedTuple):
    """What the engine does to the world around it; a test brings another one."""
    command: list[str]  # what a trial is, before its words
    env: Mapping[str, str]
    runs: Path  # the folder of run folders; sweeps live in sweeps/ there
    source: Callable[[], str]  # digest of the program
    clock: Callable[[], float] = time.monotonic
    poll: float = 1.0  # seconds between two looks at a run
    beat: float = 15.0  # seconds between two signs of life
    grace: float = 120.0  # seconds without one, after which a worker on another machine is dead
    seats: Path = Path(tempfile.gettempdir())  # of locks on the GPUs of this machine, for all sweeps


def source_digest() -> str:
    """sha256 of train_gpt.py as Python reads it: comments and layout do not count."""
    return hashlib.sha256(ast.dump(ast.parse(Path(gpt.__file__).read_text())).encode()).hexdigest()[:16]


def make_lab() -> Lab:
    """The real one."""
    env = {name: text for name, text in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    return Lab([str(ROOT / "run.sh")], {**env, "PYTHON": sys.executable}, ROOT / "runs", source_digest)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone with everybody who uses this file on this machine, or on a file system that passes locks on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def try_lock(path: Path) -> io.TextIOWrapper | None:
    """The open file that holds the lock, or None while somebody else does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def open_storage(url: str, root: Path) -> optuna.storages.BaseStorage:
    """Optuna's storage of a URL: sqlite, postgresql, mysql, or journal:FILE, which a network file system can hold."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with locked(root / ".lock"):  # two that make the tables of a new SQLite file at a time are in each other's way
            if url.startswith("journal:"):
                journal = optuna.storages.journal.JournalFileBackend(url.removeprefix("journal:"))
                return optuna.storages.JournalStorage(journal)
            waits = {"connect_args": {"timeout": 120}} if url.startswith("sqlite") else {}
            return optuna.storages.RDBStorage(url, engine_kwargs=waits)
    except Exception as error:  # whatever a driver or a server says, it is about the URL
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"--storage: {url}: cannot be opened ({said})") from None


# ---- trials in the storage


class Job(NamedTuple):
    """A trial that this worker has claimed: its handle in the study, its run folder's number, its words, the values of
    the axes, and the lock that says that this worker lives."""
    trial: optuna.Trial
    place: int
    words: list[str]
    values: dict[str, str]
    alive: io.TextIOWrapper


class Store:
    """The trials of a sweep. A trial stands for its key; one that failed without a fault is an attempt that came to
    nothing, and its key is claimed anew. The number of a key's first trial names the run folder."""

    def __init__(self, spec: Spec, url: str, lab: Lab) -> None:
        self.spec, self.lab, self.root = spec, lab, lab.runs / "sweeps"
        self.folder = (self.root / spec.name).absolute()
        self.local = url.startswith(("sqlite", "journal:"))  # a file: all who use it can see each other's locks
        self.storage = open_storage(url, self.root)
        with locked(self.folder / ".lock"):
            self.study = optuna.create_study(storage=self.storage, study_name=spec.name, load_if_exists=True,
                                             pruner=PRUNERS[spec.prune]())
        self.owner = f"{socket.gethostname()}:{self.folder}"
        self.seen: dict[int, tuple[Any, float]] = {}

    def check(self, facts: dict[str, Any]) -> None:
        """UsageError where the sweep of this name is another one."""
        with locked(self.folder / ".lock"):
            held = self.study.user_attrs.get("identity", facts)
            rows = self.study.user_attrs.get("command", {}).get("rows", {})
            changed = [f"{name} ({json.dumps(held.get(name))}, now {json.dumps(facts[name])})" for name in facts
                       if held.get(name) != facts[name]]
            changed += [f"words of the row {name}" for name, words in self.spec.rows.items()
                        if rows.get(name, words) != words]
            if changed:
                raise UsageError(f"--name: {self.spec.name}: that sweep has other {changed[0]}; use another name")
            self.study.set_user_attr("identity", facts)
            axes = [f"{axis.name}={axis.text()}" for axis in self.spec.axes if axis.name != ROW]
            self.study.set_user_attr("command", {
                "words": [*self.spec.words, *axes], "rows": self.spec.rows, "trials": self.spec.trials,
                "goal": self.spec.goal, "prune": self.spec.prune})

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """All trials, attempts that came to nothing too."""
        return self.study.get_trials(deepcopy=False)

    def void(self, trial: optuna.trial.FrozenTrial, forgiven: list[int]) -> bool:
        """Whether a trial is an attempt that came to nothing, or a failure that is to be tried again."""
        return trial.number in forgiven or "key" not in trial.user_attrs or (
            trial.state is TrialState.FAIL and "fault" not in trial.user_attrs)

    def live(self) -> dict[str, optuna.trial.FrozenTrial]:
        """Key -> its trial. Of two, which machines that see no common lock may have made, the first counts."""
        forgiven, found = self.study.user_attrs.get("forgiven", []), {}
        for trial in self.trials():
            if not self.void(trial, forgiven):
                found.setdefault(trial.user_attrs["key"], trial)
        return found

    def places(self) -> dict[str, int]:
        """Key -> the number of its run folder."""
        found: dict[str, int] = {}
        for trial in self.trials():
            found.setdefault(trial.user_attrs.get("key", ""), trial.number)
        return found

    def fill(self) -> None:
        """Queue every key that has no trial; an earlier attempt's values stay."""
        live = self.live()
        for key in self.spec.keys():
            if key not in live:
                tried = [trial.params for trial in self.trials() if trial.user_attrs.get("key") == key]
                params = next((params for params in reversed(tried) if params), {}) if self.spec.trials else {}
                self.study.enqueue_trial(params, user_attrs={"key": key})

    def forgive(self) -> int:
        """Let what failed be tried again; returns how many."""
        with locked(self.folder / ".lock"):
            failed, places = [trial for trial in self.live().values() if "fault" in trial.user_attrs], self.places()
            for trial in failed:
                self.path(places[trial.user_attrs["key"]], "exit").unlink(missing_ok=True)
            self.study.set_user_attr("forgiven", [*self.study.user_attrs.get("forgiven", []),
                                                  *(trial.number for trial in failed)])
        return len(failed)

    def path(self, place: int, kind: str) -> Path:
        """A file beside the run folder: out (what the run said), exit (its code), lock, worker."""
        return self.folder / f"{'' if kind == 'out' else '.'}{place}.{kind}"

    def is_dead(self, trial: optuna.trial.FrozenTrial, place: int) -> bool:
        """Whether the worker of a running trial is gone. On this machine its lock says so at once; elsewhere it is dead
        when neither its beats nor its run's events have changed for as long as the grace."""
        owner = trial.user_attrs.get("owner")
        if owner == self.owner or (owner is None and self.local):
            lock = try_lock(self.path(place, "worker"))
            if lock is not None:
                lock.close()
            return lock is not None
        events = self.folder / str(place) / "events.jsonl"
        sign = (trial.user_attrs.get("beat"), events.stat().st_size if events.exists() else 0)
        known, since = self.seen.get(trial.number, (None, 0.0))
        if known != sign:
            self.seen[trial.number] = (sign, self.lab.clock())
            return False
        return self.lab.clock() - since > self.lab.grace

    def recover(self) -> None:
        """Give up the trials of dead workers, so that their keys are free."""
        places = self.places()
        for key, trial in self.live().items():
            if trial.state is TrialState.RUNNING and self.is_dead(trial, places[key]):
                self.give_up(trial.number)

    def give_up(self, number: int) -> None:
        """End an attempt; whoever finished it meanwhile is right."""
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError, ValueError):
            self.study.tell(number, state=TrialState.FAIL)

    def claim(self) -> Job | None:
        """The next trial, running from now on as this worker's; None where none is free.

        Optuna's own step from waiting to running is atomic in a database server; in SQLite two processes can both take
        it, so the claim is made under a lock."""
        with locked(self.folder / ".lock"):
            self.recover()
            self.fill()
            places = self.places()
            waiting = [(key, trial) for key, trial in self.live().items() if trial.state is TrialState.WAITING]
            # What was begun goes first: its run may still be at it, and two at a time would share the machine.
            for key, queued in sorted(waiting, key=lambda item: (places[item[0]] == item[1].number, item[1].number)):
                with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                    if self.study._storage.set_trial_state_values(queued._trial_id, TrialState.RUNNING):
                        return self.begin(key, queued, places[key])
        return None

    def begin(self, key: str, queued: optuna.trial.FrozenTrial, place: int) -> Job:
        """The job of a trial that has just become this worker's: its values, and the lock of its worker."""
        seed = gpt.stream_seed(0, f"sweep {self.spec.name}", queued.number)
        self.study.sampler = optuna.samplers.TPESampler(seed=seed % 2 ** 32)
        trial = optuna.Trial(self.study, queued._trial_id)
        trial.set_user_attr("owner", self.owner)
        values = self.values(trial, key)
        trial.set_user_attr("values", values)
        alive = try_lock(self.path(place, "worker"))
        if alive is None:
            self.give_up(trial.number)
            raise UsageError(f"{self.path(place, 'worker')}: is locked though its trial was free; is the folder used "
                             "by a sweep in another storage?")
        return Job(trial, place, self.spec.job_words(values), values, alive)

    def values(self, trial: optuna.Trial, key: str) -> dict[str, str]:
        """The values of the axes for a trial: those of its key, or drawn."""
        if self.spec.trials:
            return {axis.name: axis.suggest(trial) for axis in self.spec.axes}
        values = json.loads(key)
        for axis in self.spec.axes:
            if axis.numeric:  # as parameters, so that Optuna's own tools see them
                trial.suggest_float(axis.name, float(values[axis.name]), float(values[axis.name]))
        return values

    def beat(self, job: Job, count: int) -> None:
        """A sign of life; raises Lost where the trial is no longer this worker's."""
        try:
            job.trial.set_user_attr("beat", count)
        except optuna.exceptions.UpdateFinishedTrialError:
            raise Lost from None

    def tell(self, job: Job, state: TrialState, value: float | None, **facts: Any) -> None:
        """The trial's end; what another worker told before stays."""
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError, ValueError):
            for name, fact in facts.items():
                job.trial.set_user_attr(name, fact)
            self.study.tell(job.trial, value if state is TrialState.COMPLETE else None, state=state)

    def open_keys(self) -> int:
        """How many trials are still waiting or running."""
        return sum(trial.state in (TrialState.WAITING, TrialState.RUNNING) for trial in self.live().values())


# ---- one trial


def curve_points(events: list[dict[str, Any]], settings: Mapping[str, Any]) -> dict[int, float]:
    """Part of training -> mean training loss there, for the parts that have steps."""
    steps = valid_events(events)[0]["step"].values()
    parts: dict[int, list[float]] = {}
    for step in steps:
        if math.isfinite(step["train_loss"]):
            parts.setdefault(max(1, math.ceil(CURVE_PARTS * fraction(step, settings))), []).append(step["train_loss"])
    return {part: statistics.fmean(losses) for part, losses in sorted(parts.items())}


def read_facts(folder: Path) -> dict[str, Any]:
    """What a finished run says of itself, by column of trials.csv; {} where it has no result.json."""
    try:
        result = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        return {}
    facts = {kind: entry["val_bpb"] for kind, entry in result.get("scores", {}).items()}
    for column, (part, name) in {
            "total_bytes": ("artifact", "total_bytes"), "steps": ("train", "steps"),
            "tokens_per_second": ("train", "tokens_per_second"), "train_seconds": ("train", "seconds")}.items():
        if name in result.get(part, {}):
            facts[column] = result[part][name]
    return facts | ({"eval_seconds": result["eval_seconds"]} if "eval_seconds" in result else {})


def read_goal(goal: str, folder: Path, facts: Mapping[str, Any]) -> float:
    """The number that is minimised; ConfigError where the run has none."""
    if goal in facts:
        return float(facts[goal])
    value: Any = None
    if goal == "loss" and (folder / "events.jsonl").exists():
        points = curve_points(Tail(folder / "events.jsonl").read(), read_settings(folder))
        value = [*points.values()][-1] if points else None
    elif (folder / "result.json").exists():
        value = json.loads((folder / "result.json").read_text())
        for name in goal.split("."):
            value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise gpt.ConfigError(f"--goal: {goal}: {folder} has no such number")
    return float(value)


def read_exit(path: Path, digest: str) -> int | None:
    """The exit code that a run with these words left; None where it left none."""
    try:
        code, whose = path.read_text().split()
    except (OSError, ValueError):
        return None
    return int(code) if whose == digest else None


def is_final(code: int | None) -> bool:
    """Whether a run ended by itself; one that a signal ended goes on in its folder."""
    return code is not None and code < 128


class Worker:
    """Runs trials one after the other; a sweep has as many as --jobs says, on as many machines as one likes."""

    def __init__(self, store: Store, lab: Lab, stop: threading.Event, device: Mapping[str, str],
                 cores: set[int] | None, say: Callable[[str], None], others: Iterable[Mapping[str, str]] = ()) -> None:
        """`device` has the variables of the GPUs that are this worker's, `others` those of the other workers here."""
        self.store, self.lab, self.stop, self.cores, self.say = store, lab, stop, cores, say
        self.devices = [device, *(other for other in others if other != device)]
        self.seconds: list[float] = []

    def work(self) -> None:
        """Runs what is free until nothing is left, and waits for what others have, in case they die."""
        if self.cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, self.cores)  # of this thread, and so of the runs that it starts
        waited = False
        while not self.stop.is_set():
            job = self.store.claim()
            if job is not None:
                with job.alive:
                    self.take(job)
                waited = False
            elif left := self.store.open_keys():
                if not waited:
                    self.say(f"{left} trial{'s are' if left > 1 else ' is'} with other workers; waiting")
                waited = True
                self.stop.wait(self.lab.poll)
            else:
                return

    def take(self, job: Job) -> None:
        """Brings one claimed trial to its end and tells the storage and the user."""
        began = self.lab.clock()
        try:
            state, value, facts = self.run(job)
        except Interrupted:
            self.store.give_up(job.trial.number)
            return
        except Lost:
            self.say(f"{job.place}: another worker has taken it over")
            return
        except BaseException:
            self.store.give_up(job.trial.number)
            raise
        seconds = self.lab.clock() - began
        known = facts.pop("known", False)
        self.store.tell(job, state, value, seconds=seconds, **facts)
        self.seconds += [] if known else [seconds]
        said = show_goal(value) if value is not None else facts.get("fault", "stopped early")
        left, all_ = self.store.open_keys(), len(self.store.live())
        pace = statistics.fmean(self.seconds) if self.seconds else 0.0
        best = best_of(self.store)
        self.say(f"{all_ - left}/{all_}  {job.place}: {name_of(job.values)}: {said}, "
                 + ("there already" if known else duration(seconds))
                 + (f"; best {show_goal(best[1])} {best[0]}" if best else "")
                 + (f"; about {duration(left * pace)} left for one worker" if left and pace else ""))

    def run(self, job: Job) -> tuple[TrialState, float | None, dict[str, Any]]:
        """State, value and facts of a trial: found finished, or launched until it ends."""
        words = [*job.words, f"RUNS_PATH={self.store.folder}", f"RUN_ID={job.place}"]
        digest = hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
        path, folder = self.store.path(job.place, "exit"), self.store.folder / str(job.place)
        code, tries, known = read_exit(path, digest), 0, True
        while not is_final(code) and tries < TRIES:
            if self.play(job, words, digest):
                return TrialState.PRUNED, None, {"curve": self.points(folder)}
            code, tries, known = read_exit(path, digest), tries + 1, False
            code = 137 if code is None else code  # killed together with what would have written it
        if code == 0:
            facts = {"facts": read_facts(folder), "curve": self.points(folder), "known": known}
            try:
                return TrialState.COMPLETE, read_goal(self.store.spec.goal, folder, facts["facts"]), facts
            except gpt.ConfigError as error:
                return TrialState.FAIL, None, facts | {"fault": str(error)}
        said = [line for line in self.read_out(job.place) if line.strip()]
        ended = f"ended by signal {code - 128}" if code >= 128 else f"exit code {code}"
        fault = f"{ended}: {said[-1].strip() if said else 'it said nothing'}"[:300]
        # What a check refused is as bad as a trial can be, and the search should know; other failures say nothing.
        return TrialState.PRUNED if code == 3 else TrialState.FAIL, None, {"fault": fault, "curve": {}, "known": known}

    def read_out(self, place: int) -> list[str]:
        """What the run said."""
        path = self.store.path(place, "out")
        return path.read_text(errors="replace").splitlines() if path.exists() else []

    def points(self, folder: Path) -> dict[str, float]:
        """The loss curve, as JSON has it; {} where there is none."""
        path = folder / "events.jsonl"
        found = curve_points(Tail(path).read(), read_settings(folder)) if path.exists() else {}
        return {str(part): loss for part, loss in found.items()}

    def take_device(self, job: Job | None = None) -> tuple[Mapping[str, str], list[io.TextIOWrapper]]:
        """The first GPUs that no run holds, and the locks on them, which the run inherits: one that outlived its worker
        keeps its own. Waits until there are some; Interrupted where the sweep ends before."""
        waited, began, beats = False, self.lab.clock(), 0
        while True:
            for device in self.devices:
                names = [name for name in device.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
                locks = [try_lock(self.lab.seats / f"sixteen_gpu_{os.getuid()}_{re.sub(r'[^A-Za-z0-9-]', '_', name)}")
                         for name in names]
                if None not in locks:
                    return device, locks
                for lock in filter(None, locks):
                    lock.close()
            if not waited:
                self.say("every GPU has a run of an earlier worker; waiting for one")
            waited = True
            self.stop.wait(self.lab.poll)
            if self.stop.is_set():
                raise Interrupted
            if job is not None and self.lab.clock() - began >= self.lab.beat * (beats + 1):
                beats += 1
                self.store.beat(job, -beats)  # another number than those while it runs

    def play(self, job: Job, words: list[str], digest: str) -> bool:
        """Launches the run, or waits for one that outlived its worker; True where it was stopped early. It holds the
        lock itself, so it is never run twice at a time."""
        lock, child = try_lock(self.store.path(job.place, "lock")), None
        if lock is None:
            self.say(f"{job.place}: a run of an earlier worker is still at it; waiting for its end")
        else:
            path = self.store.path(job.place, "exit")
            if is_final(read_exit(path, digest)):
                lock.close()
                return False
            path.unlink(missing_ok=True)
            with contextlib.ExitStack() as held:
                held.enter_context(lock)
                device, seats = self.take_device(job)
                for seat in seats:
                    held.enter_context(seat)
                out = held.enter_context(self.store.path(job.place, "out").open("ab"))
                child = subprocess.Popen(
                    ["/bin/sh", "-c", WRAPPER, str(self.store.path(job.place, "exit")), digest, *self.lab.command,
                     *words], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                    env={**self.lab.env, **device}, pass_fds=[file.fileno() for file in (lock, *seats)],
                    start_new_session=True)
        began, beats, told = self.lab.clock(), 0, set()
        tail = Tail(self.store.folder / str(job.place) / "events.jsonl")
        try:
            while self.is_running(job.place, child):
                self.stop.wait(self.lab.poll)
                if self.stop.is_set():
                    raise Interrupted
                if self.lab.clock() - began >= self.lab.beat * (beats + 1):
                    beats += 1
                    self.store.beat(job, beats)
                if child is not None and self.store.spec.prune != "none" and self.is_hopeless(job, tail, told):
                    self.end(child)
                    return True
        except BaseException:
            if child is not None:
                self.end(child)
            raise
        return False

    def is_running(self, place: int, child: subprocess.Popen | None) -> bool:
        """Whether the run goes on: the child's own state, or the lock of one that is not ours."""
        if child is not None:
            return child.poll() is None
        lock = try_lock(self.store.path(place, "lock"))
        if lock is not None:
            lock.close()
        return lock is None

    def is_hopeless(self, job: Job, tail: Tail, told: set[int]) -> bool:
        """Reports the parts of the curve that are complete; True once the rule says that they are too bad."""
        if not tail.path.exists():
            return False
        points = curve_points(tail.read(), read_settings(tail.path.parent))
        for part in [part for part in points if part not in told and part < max(points)]:
            told.add(part)
            job.trial.report(points[part], part)
            if job.trial.should_prune():
                return True
        return False

    def end(self, child: subprocess.Popen) -> None:
        """Ends a run with all its processes: asked, then killed."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
            asked = time.monotonic()
            while time.monotonic() - asked < STOP_SECONDS:
                child.poll()
                os.killpg(child.pid, 0)  # whether anything is left of the group, not of its first process only
                time.sleep(0.05)
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def short(text: str) -> str:
    """A value as a table shows it: a drawn number in four digits."""
    with contextlib.suppress(ValueError):
        return f"{float(text):.4g}" if len(text) > 8 else text
    return text


def goal_form(largest: float) -> str:
    """The format of goals of this size: bytes without decimals, bits with four."""
    return ",.0f" if abs(largest) >= 10_000 else ".4f"


def show_goal(value: float) -> str:
    """A goal as text."""
    return format(value, goal_form(value))


def name_of(values: Mapping[str, str]) -> str:
    """Values of axes in one line."""
    return " ".join(text if name == ROW else f"{name}={short(text)}" for name, text in values.items())


def best_of(store: Store) -> tuple[str, float] | None:
    """The best trial and its value."""
    done = [trial for trial in store.live().values() if trial.state is TrialState.COMPLETE]
    best = min(done, key=lambda trial: trial.value, default=None)
    return (name_of(best.user_attrs["values"]), best.value) if best else None


def devices(jobs: int, env: Mapping[str, str], gpus: int, cores: list[int]) -> list[tuple[dict[str, str], set[int]]]:
    """For each of the jobs on this machine its variables and cores: GPUs and cores in equal parts, and nothing where
    there is one job. ConfigError where GPUs cannot be divided."""
    if jobs == 1:
        return [({}, set())]
    if gpus and gpus % jobs:
        raise gpt.ConfigError(f"--jobs: {jobs}: must divide the {gpus} GPUs of this machine")
    if gpus and env.get("NPROC"):
        raise gpt.ConfigError(f"NPROC={env['NPROC']}: --jobs {jobs} gives a trial {gpus // jobs} of the {gpus} GPUs")
    given = [name.strip() for name in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    names = given[:gpus] if len(given) >= gpus else [*map(str, range(gpus))]
    found = []
    for index in range(jobs):
        mine = names[index * gpus // jobs:(index + 1) * gpus // jobs]
        own = {"CUDA_VISIBLE_DEVICES": ",".join(mine), "NPROC": str(len(mine))} if gpus else {}
        share = {*cores[index * len(cores) // jobs:(index + 1) * len(cores) // jobs]}
        found.append((own, share or {*cores}))
    return found


def run_workers(store: Store, lab: Lab, shares: list[tuple[dict[str, str], set[int]]]) -> None:
    """Workers side by side until nothing is left; KeyboardInterrupt, from Ctrl-C or SIGTERM, stops their runs, which
    keep their checkpoints."""
    stop = threading.Event()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    workers = [Worker(store, lab, stop, device, cores, say, [other for other, _ in shares])
               for device, cores in shares]
    with ThreadPoolExecutor(len(workers)) as pool:
        futures = [pool.submit(worker.work) for worker in workers]
        try:
            while wait(futures, 0.2, FIRST_EXCEPTION).not_done:
                if any(future.done() and future.exception() for future in futures):
                    break
        finally:
            stop.set()
    for future in futures:
        future.result()


# ---- what came of it


class Result(NamedTuple):
    """A trial as the report shows it."""
    place: int
    state: str
    values: dict[str, str]
    goal: float | None
    facts: dict[str, Any]
    seconds: float | None
    curve: dict[int, float]
    fault: str


def results_of(store: Store) -> list[Result]:
    """All trials by their number."""
    said = {TrialState.COMPLETE: "done", TrialState.PRUNED: "stopped early", TrialState.FAIL: "failed",
            TrialState.RUNNING: "running", TrialState.WAITING: "waiting"}
    found, places = [], store.places()
    for key, trial in store.live().items():
        attrs = trial.user_attrs
        values = attrs.get("values") or (json.loads(key) if not store.spec.trials else {})
        found.append(Result(places[key], "failed" if "fault" in attrs else said[trial.state], values,
                            trial.value if trial.state is TrialState.COMPLETE else None, attrs.get("facts", {}),
                            attrs.get("seconds"), {int(part): loss for part, loss in attrs.get("curve", {}).items()},
                            attrs.get("fault", "")))
    return sorted(found)


def csv_text(spec: Spec, results: list[Result]) -> str:
    """trials.csv: a line a trial, numbers in full."""
    columns = list(dict.fromkeys(name for result in results for name in result.facts))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["trial", "state", *(axis.name for axis in spec.axes), spec.goal + (
        " (goal)" if spec.goal in columns else ""), *columns, "seconds", "fault"])
    for result in results:
        writer.writerow([result.place, result.state, *(result.values.get(axis.name, "") for axis in spec.axes),
                         *("" if value is None else value for value in (
                             result.goal, *map(result.facts.get, columns), result.seconds)), result.fault])
    return out.getvalue()


class Group(NamedTuple):
    """The trials of a grid that differ in what pairs them only: their values, and goal by the paired axis."""
    values: dict[str, str]
    goals: dict[str, float]


def make_groups(spec: Spec, results: list[Result]) -> list[Group]:
    """Groups in the order of their first trials."""
    groups: dict[str, Group] = {}
    for result in results:
        values = {name: text for name, text in result.values.items() if name != spec.pairs}
        group = groups.setdefault(json.dumps(values), Group(values, {}))
        if result.goal is not None:
            group.goals[result.values[spec.pairs]] = result.goal
    return list(groups.values())


def pick_base(points: list[dict[str, str]], pairs: str, words: str) -> dict[str, str]:
    """The values that all others are compared with, without the paired axis: the only ones with these words, or the
    first. UsageError where that is not one combination."""
    plain = [{name: text for name, text in point.items() if name != pairs} for point in points]
    wanted = set(words.split())
    fits = [values for values in plain if wanted <= {
        text if name == ROW else f"{name}={text}" for name, text in values.items()}]
    if not fits or (wanted and any(values != fits[0] for values in fits)):
        raise UsageError(f"--base: {words}: must fit one combination of {', '.join(plain[0])}, fits "
                         f"{len({json.dumps(values) for values in fits})}")
    return fits[0]


def pair_table(spec: Spec, results: list[Result], base_words: str) -> str:
    """Means, and the differences to the base paired by seed, with their intervals; empty where nothing is paired."""
    groups = make_groups(spec, results) if spec.pairs else []
    if len(groups) < 2:
        return ""
    values = pick_base([group.values for group in groups], spec.pairs, base_words)
    base = next(group for group in groups if group.values == values)
    rows = []
    for group in groups:
        mean = compare.interval(group.goals.values())
        cells: list[Any] = [name_of(group.values), mean.mean, mean.deviation, len(group.goals)]
        found = compare.paired(group.goals, base.goals)
        rows.append([*cells, *([None, None, "base"] if group is base else
                               [found.mean, found.half, found.verdict])])
    rows.sort(key=lambda row: math.inf if row[1] is None else row[1])
    form = goal_form(max((row[1] for row in rows if row[1] is not None), default=0.0))
    text = table_text({"": "", spec.goal: form, "deviation": form, f"{spec.pairs}s": "d", "minus base": f"+{form}",
                       "+-": form, "is": ""}, rows)
    return f"{text}\n{compare.INTERVALS.replace('seeds', f'values of {spec.pairs}')}"


def result_table(spec: Spec, results: list[Result]) -> str:
    """The trials, the best first."""
    form = goal_form(max((result.goal for result in results if result.goal is not None), default=0.0))
    columns = {"trial": "d", **dict.fromkeys((axis.name for axis in spec.axes), ""), spec.goal: form,
               "seconds": ".0f", "": ""}
    order = sorted(results, key=lambda result: (result.goal is None, result.goal or 0.0, result.place))
    return table_text(columns, [[
        result.place, *(short(result.values.get(axis.name, "")) for axis in spec.axes), result.goal, result.seconds,
        result.fault or ("" if result.state == "done" else result.state)] for result in order])


def draw(spec: Spec, results: list[Result], path: Path) -> None:
    """sweep.png: the goal over every axis, over the trials in their order, and the loss curves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    done = [result for result in results if result.goal is not None]
    axes = [axis for axis in spec.axes if axis.name != spec.pairs] or list(spec.axes)
    curves = any(len(result.curve) > 1 for result in results)
    count = len(axes) + 1 + curves
    width = min(3, count)
    figure = Figure(figsize=(6 * width, 4.5 * -(-count // width)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{spec.name}: {len(done)} of {len(results)} trials have a result")
    panels = [figure.add_subplot(-(-count // width), width, index + 1) for index in range(count)]
    for axis, panel in zip(axes, panels, strict=False):
        draw_axis(panel, spec, axis, done)
    draw_history(panels[len(axes)], spec, done)
    if curves:
        draw_curves(panels[-1], results)
    figure.savefig(part := path.with_name(f".{path.name}.{os.getpid()}.part"), format="png", dpi=100)
    part.replace(path)


def draw_axis(panel: Axes, spec: Spec, axis: Axis, done: list[Result]) -> None:
    """The goal over one axis: a point a trial, coloured by what pairs them, and the means of a grid."""
    texts = list(dict.fromkeys([*(() if axis.ranged else axis.texts), *(result.values[axis.name] for result in done)]))
    where = {text: float(text) if axis.numeric else float(index) for index, text in enumerate(texts)}
    pairs = list(dict.fromkeys(result.values.get(spec.pairs, "") for result in done))
    for index, pair in enumerate(pairs):
        mine = [result for result in done if result.values.get(spec.pairs, "") == pair]
        panel.scatter([where[result.values[axis.name]] for result in mine], [result.goal for result in mine], s=22,
                      color=SCORE_COLOURS[index % len(SCORE_COLOURS)], label=f"{spec.pairs}={pair}" if pair else None)
    if not spec.trials:
        means = {text: [result.goal for result in done if result.values[axis.name] == text] for text in texts}
        known = sorted((where[text], statistics.fmean(goals)) for text, goals in means.items() if goals)
        panel.plot([x for x, _ in known], [y for _, y in known], color=GREY, label="mean")
    if 1 < len(pairs) <= 8:
        panel.legend(fontsize=8)
    spread = [where[text] for text in texts]
    if axis.log or (axis.numeric and len(spread) > 2 and min(spread) > 0 and max(spread) / min(spread) > 8):
        panel.set_xscale("log")
    if not axis.numeric:
        panel.set_xticks(list(where.values()), texts, rotation=30, ha="right", fontsize=8)
    panel.set_xlabel("" if axis.name == ROW else axis.name)
    panel.set_ylabel(spec.goal)


def draw_history(panel: Axes, spec: Spec, done: list[Result]) -> None:
    """The goal by number, and the best so far."""
    panel.scatter([result.place for result in done], [result.goal for result in done], s=22, color=BLUE)
    best = [*itertools.accumulate((result.goal for result in done), min)]
    panel.step([result.place for result in done], best, where="post", color=ORANGE, label="best so far")
    panel.set_xlabel("trial")
    panel.set_ylabel(spec.goal)
    if done:
        panel.legend(fontsize=8)


def draw_curves(panel: Axes, results: list[Result]) -> None:
    """Training loss over the fraction of training, stopped runs in grey."""
    for result in results:
        if result.curve:
            parts = sorted(result.curve)
            panel.plot([part / CURVE_PARTS for part in parts], [result.curve[part] for part in parts], linewidth=1,
                       color=BLUE if result.state == "done" else GREY)
    panel.set_xlabel("fraction of training")
    panel.set_ylabel("training loss (nats)")


def report(store: Store, base: str) -> int:
    """Writes trials.csv and sweep.png and prints the tables; returns how many trials failed."""
    spec, results = store.spec, results_of(store)
    pairs = pair_table(spec, results, base)
    gpt.write_atomic(store.folder / "trials.csv", csv_text(spec, results).encode())
    draw(spec, results, store.folder / "sweep.png")
    print("\n\n".join(filter(None, [result_table(spec, results), pairs])))
    failed = sum(result.state == "failed" for result in results)
    open_ = sum(result.state in ("running", "waiting") for result in results)
    print(f"\n{spec.name}: {len(results)} trials, {failed} failed, {open_} not finished; {store.folder}/trials.csv, "
          "sweep.png")
    return failed


# ---- command line


def named_sweep(name: str, file: Path) -> dict[str, Any]:
    """A sweep of the file: words, rows, options; {} where it has none of this name."""
    try:
        held = tomllib.loads(file.read_text()).get(name, {})
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--file: {file}: cannot be read ({error})") from None
    unknown = {*held} - {"about", "words", "rows", "trials", "goal", "prune"}
    if unknown:
        raise UsageError(f"--file: {file}: {name} has {sorted(unknown)[0]}; about, words, rows, trials, goal and prune "
                         "are known")
    return held


def begun_sweep(name: str, url: str, root: Path) -> dict[str, Any]:
    """The words, rows and options of a sweep in the storage; {} where it has none of this name."""
    if url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).exists():
        return {}  # opening it would make it
    with contextlib.suppress(KeyError):
        return optuna.load_study(storage=open_storage(url, root), study_name=name).user_attrs.get("command", {})
    return {}


def parse(argv: list[str], lab: Lab) -> tuple[Spec, dict[str, Any], Lab, argparse.Namespace]:
    """The sweep, what it must keep, the world with its folder of runs, and the options; UsageError or ConfigError."""
    parser = Parser("./run.sh sweep [NAME] [SETTING=value,value ...] [option ...]", __doc__)
    parser.add_argument("words", nargs="*", help="a sweep's name first, if any, then settings")
    parser.add_argument("--trials", type=number(int, 1), metavar="N", help="search with N trials")
    parser.add_argument("--name", default="", help="of a new sweep")
    parser.add_argument("--row", action="append", default=[], metavar='"NAME: SETTING=value ..."',
                        help="words that are varied together, once for each")
    parser.add_argument("--goal", default="", help="what is minimised: an evaluator, loss, or a path in result.json")
    parser.add_argument("--prune", type=choice(PRUNERS), help="early stopping; median in a search, none in a grid")
    parser.add_argument("--base", default="", metavar='"SETTING=value ..."', help="what differences are taken to")
    parser.add_argument("--jobs", type=number(int, 1), default=1, metavar="N", help="trials side by side here")
    parser.add_argument("--storage", default="", metavar="URL", help="sqlite:///, postgresql://, mysql:// or "
                        "journal:FILE")
    parser.add_argument("--file", type=Path, default=ROOT / "tools" / "sweeps.toml", help="of named sweeps")
    parser.add_argument("--again", action="store_true", help="run failed trials again")
    parser.add_argument("--report", action="store_true", help="only show what is there")
    given = parser.parse_intermixed_args(argv)
    words, name = list(given.words), given.name
    if name and not re.fullmatch(r"[A-Za-z0-9._-]+", name) or name in (".", ".."):
        raise UsageError(f"--name: {name}: must be letters, digits, dots, dashes and underscores")
    runs = next((word.partition("=")[2] for word in reversed(words) if word.startswith("RUNS_PATH=")),
                lab.env.get("RUNS_PATH", ""))
    lab = lab._replace(runs=(ROOT / runs) if runs else lab.runs)
    given.storage = given.storage or f"sqlite:///{(lab.runs / 'sweeps').absolute()}/sweeps.db"
    held: dict[str, Any] = {}
    if words and "=" not in words[0]:
        asked = words.pop(0)
        held = named_sweep(asked, given.file)
        held = held or begun_sweep(asked, given.storage, lab.runs / "sweeps")
        if not held:
            raise UsageError(f"{asked}: must be a sweep of {given.file}, one that was begun with --name, or a word "
                             "NAME=value")
        name = name or asked
    rows = read_rows([f"{row}: {text if isinstance(text, str) else ' '.join(text)}"
                      for row, text in held.get("rows", {}).items()]) | read_rows(given.row)
    options = {key: getattr(given, key) or held.get(key) for key in ("trials", "goal", "prune")}
    spec, facts = make_spec(name, [*held.get("words", []), *words], rows, options, lab)
    if given.base and not spec.pairs:
        raise UsageError(f"--base: {given.base}: needs a grid with several values of {' or '.join(PAIRED_BY)}")
    if given.base:
        pick_base([json.loads(key) for key in spec.keys()], spec.pairs, given.base)
    return spec, facts, lab, given


def main(argv: list[str], lab: Lab | None = None) -> int:
    """The command line; returns the exit code."""
    lab = lab or make_lab()
    before = signal.getsignal(signal.SIGTERM)
    try:
        spec, facts, lab, given = parse(argv, lab)
        gpus = gpt.torch.cuda.device_count()
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]
        shares = devices(given.jobs, lab.env, gpus, cores)
        store = Store(spec, given.storage, lab)
        store.check(facts)
        if not given.report:
            print(f"{spec.name}: {'search' if spec.trials else 'grid'} of {len(spec.keys())} trials over "
                  + ", ".join(f"{axis.name} ({axis.text() if axis.ranged else len(axis.texts)})" for axis in spec.axes)
                  + f"; minimises {spec.goal}" + (f"; fixed {' '.join(spec.words)}" if spec.words else "")
                  + f"; {store.folder}", file=sys.stderr, flush=True)
            if given.again:
                print(f"--again: {store.forgive()} trials", file=sys.stderr, flush=True)
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            run_workers(store, lab, shares)
        failed = report(store, given.base)
        if failed and not given.report:
            print(f"{failed} failed; --again runs what failed again", file=sys.stderr)
            return 3
        return 0
    except (UsageError, gpt.ConfigError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
