"""A live run in the terminal: loss, bits per byte, speed, time left, bytes.

    ./run.sh watch [RUN] [--once] [--every SECONDS]

RUN is a run folder, or its name in runs/ or in one of the sweeps there; without one it is the run whose event log was
written to last. What is shown comes from events.jsonl, which is only read, from where the last look ended; config.json
says what the run was asked for. The run cannot notice. On a terminal the view renews itself until the last score is
there or Ctrl-C ends it; elsewhere, or with --once, it is printed once.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools.console import Parser, UsageError, duration, number  # noqa: E402
from tools.plot import valid_events  # noqa: E402

RECENT_STEPS = 20  # over which speed and loss are averaged
SILENT_SECONDS, SILENT_STEPS = 60.0, 10.0  # a run that says nothing for longer than both has probably ended
BLOCKS, CURVE_WIDTH, BAR_WIDTH = "▁▂▃▄▅▆▇█", 60, 40
# What the last event of a kind says of where a run is.
WHERE = {"start": "warming up", "resume": "warming up", "step": "training", "val": "training", "trits": "training",
         "checkpoint": "training", "loops": "training", "tensor": "artifact written", "eval_forecast": "evaluating",
         "score": "evaluating"}

Event = dict[str, Any]


class Tail:
    """The events of a file that grows. A line that is not whole yet waits for its rest; one that a kill cut short
    counts for nothing."""

    def __init__(self, path: Path) -> None:
        self.path, self.at, self.events = path, 0, []

    def read(self) -> list[Event]:
        """All events so far; from the beginning again where the file is shorter than it was."""
        with self.path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self.at:
                self.at, self.events = 0, []
            file.seek(self.at)
            data = file.read()
        whole = data[:data.rfind(b"\n") + 1]
        self.at += len(whole)
        for line in whole.splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and "event" in event:
                self.events.append(event)
        return self.events


def read_settings(folder: Path) -> dict[str, Any]:
    """What the run was asked for, from config.json; {} where it is not there or not whole."""
    try:
        return json.loads((folder / "config.json").read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def fraction(event: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """How much of training is done at a step's event: the larger share of steps and seconds, as training counts it but
    for what it keeps for the calibration."""
    budget = settings.get("MAX_WALLCLOCK_SECONDS", 0)
    share = event["step"] / settings.get("ITERATIONS", math.inf)
    return min(1.0, max(share, event["train_seconds"] / budget if budget else 0.0))


def seconds_left(steps: list[Event], settings: Mapping[str, Any]) -> float | None:
    """Seconds of training that are left at the pace of the last steps; None where nothing says so."""
    if len(steps) < 2 or "ITERATIONS" not in settings:
        return None
    last, budget = steps[-1], settings.get("MAX_WALLCLOCK_SECONDS", 0)
    left = (settings["ITERATIONS"] - last["step"]) * step_seconds(steps)
    return max(0.0, min(left, budget - last["train_seconds"]) if budget else left)


def step_seconds(steps: list[Event]) -> float:
    """Seconds of one of the last steps, of two at least."""
    first, last = steps[-min(RECENT_STEPS, len(steps))], steps[-1]
    return (last["train_seconds"] - first["train_seconds"]) / max(1, last["step"] - first["step"])


def sparkline(values: list[float], width: int = CURVE_WIDTH) -> str:
    """Values as a row of blocks, averaged into at most `width` of them; the lowest is the lowest block."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    count = min(width, len(values))
    edges = [len(values) * i // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def last_life(events: list[Event]) -> list[Event]:
    """The events since the last evaluation began: what an earlier one of a killed process forecast is history."""
    begins = [index for index, event in enumerate(events) if event["event"] == "eval_forecast"]
    return events[begins[-1]:] if begins else []


def training_lines(steps: list[Event], events: list[Event], settings: Mapping[str, Any], going: bool) -> list[str]:
    """Where training is, or was when it ended: progress, loss, bits per byte, speed."""
    last, recent = steps[-1], steps[-RECENT_STEPS:]
    share = fraction(last, settings) if going else 1.0
    bar = ("#" * round(BAR_WIDTH * share)).ljust(BAR_WIDTH, ".")
    left = seconds_left(steps, settings) if going else None
    lines = [f"step   {last['step']:,} of at most {settings.get('ITERATIONS', 0):,}  [{bar}] {share:.0%}"]
    lines.append(f"time   {duration(last['train_seconds'])} of training"
                 + (f", {duration(left)} left" if left is not None else ""))
    mean = sum(step["train_loss"] for step in recent) / len(recent)
    lines.append(f"loss   {last['train_loss']:.4f}, mean of the last {len(recent)}: {mean:.4f} nats   "
                 f"rate x {last['lr_factor']:.3f}   gradient {last['grad_norm']:.3f}")
    if len(steps) > 1:
        pace = step_seconds(steps)
        tokens = (last["tokens"] / last["step"]) / pace if pace else math.nan
        lines.append(f"speed  {tokens:,.0f} tokens/s, {1000 * pace:,.1f} ms a step")
    vals = [event for event in events if event["event"] == "val"]
    if vals:
        lines.append(f"BPB    {vals[-1]['val_bpb']:.4f} of the float weights at step {vals[-1]['step']:,}")
    lines.append(f"curve  {sparkline([step['train_loss'] for step in steps])}")
    return lines


def evaluation_lines(events: list[Event], settings: Mapping[str, Any]) -> list[str]:
    """What the evaluators found, and how long the others will take."""
    life = last_life(events)
    scores = {event["evaluator"]: event for event in events if event["event"] == "score"}
    lines = [f"BPB    {event['val_bpb']:.4f} {kind} in {event['seconds']:.0f} s" for kind, event in scores.items()]
    wanted = life[0]["seconds"] if life else {}
    open_ = [kind for kind in wanted if kind not in {event.get("evaluator") for event in life}]
    if open_:
        lines.append(f"eval   {', '.join(open_)}: forecast {duration(sum(wanted[kind] for kind in open_))} in all")
    return lines


def byte_lines(events: list[Event], settings: Mapping[str, Any]) -> list[str]:
    """Bytes of the tensors in the artifact, as far as they are written; where a squeeze was repeated, the last."""
    tensors = {event["name"]: event for event in events if event["event"] == "tensor"}
    if not tensors:
        return ["bytes  not written yet; ./run.sh plan forecasts them"]
    size, weights = (sum(event[key] for event in tensors.values()) for key in ("bytes", "weights"))
    return [f"bytes  {size:,.0f} of {len(tensors)} tensors, {8 * size / max(1, weights):.2f} bits a weight; with the "
            f"code at most {settings.get('TARGET_BYTES', 0):,}"]


def is_done(events: list[Event], settings: Mapping[str, Any]) -> bool:
    """Whether the last thing that the run was asked for, as far as events tell, is there."""
    stages = settings.get("STAGES", [])
    kinds = {event.get("evaluator") for event in last_life(events)}
    if "evaluate" in stages:
        return set(settings.get("EVAL", ["?"])) <= kinds
    return "write" in stages and any(event["event"] == "tensor" for event in events)


def frame(folder: Path, events: list[Event], silent: float) -> str:
    """The whole view; `silent` are the seconds since the log last grew."""
    settings = read_settings(folder)
    found, resumes = valid_events(events)
    steps = list(found["step"].values())
    valid = [event for event in events if event["event"] not in found] + [
        event for kept in found.values() for event in kept.values()]
    where = next((WHERE[event["event"]] for event in reversed(events) if event["event"] in WHERE), "starting")
    going = where in ("warming up", "training")
    pace = step_seconds(steps) if len(steps) > 1 else 0.0
    if is_done(events, settings):
        where = "finished"
    elif silent > max(SILENT_SECONDS, SILENT_STEPS * pace):
        where += f"; silent for {duration(silent)}: busy with something long, or ended"
    elif silent > 5:
        where += f"; last event {duration(silent)} ago"
    head = f"{folder}  {settings.get('PRESET', '?')} {settings.get('OVERLAY', '')}".rstrip()
    lines = [f"{head}  seed {settings.get('SEED', '?')}", f"{where}"
             + (f"; resumed {len(resumes)} time{'s' * (len(resumes) > 1)}" if resumes else ""), ""]
    none = "step   none yet" if "train" in settings.get("STAGES", ["train"]) else "step   none: this run does not train"
    lines += training_lines(steps, valid, settings, going) if steps else [none]
    lines += byte_lines(events, settings) + evaluation_lines(events, settings)
    return "\n".join(lines)


def find_run(name: str, runs: Path) -> Path:
    """The folder of a run by path or name, the newest without a name; UsageError where there is none."""
    if name:
        places = [Path(name), runs / name, *sorted((runs / "sweeps").glob(f"*/{name}")), runs / "sweeps" / name]
        for place in places:
            if (place / "events.jsonl").exists():
                return place
        raise UsageError(f"RUN: {name}: must be a run folder with an events.jsonl, or its name in {runs}")
    logs = [*runs.glob("*/events.jsonl"), *runs.glob("sweeps/*/*/events.jsonl")]
    if not logs:
        raise UsageError(f"RUN: {runs} holds no run with an events.jsonl; ./run.sh makes one")
    return max(logs, key=lambda path: path.stat().st_mtime).parent


def watch(folder: Path, out: TextIO, live: bool, every: float, clock: Callable[[], float] = time.time,
          wait: Callable[[float], None] = time.sleep) -> None:
    """Writes the view to `out`, once, or again and again until the run is finished."""
    tail = Tail(folder / "events.jsonl")
    while True:
        events = tail.read()
        silent = max(0.0, clock() - tail.path.stat().st_mtime)
        text, done = frame(folder, events, silent), is_done(events, read_settings(folder))
        if not live:
            out.write(text + "\n")
            return
        columns = shutil.get_terminal_size().columns
        # Home, every line to its end erased, then what is below: no flicker, as a cleared screen has.
        out.write("\x1b[H" + "".join(f"{line[:columns]}\x1b[K\n" for line in text.splitlines()) + "\x1b[J")
        out.flush()
        if done:
            return
        wait(every)


def main(argv: Iterable[str], runs: Path = ROOT / "runs") -> int:
    """The command line; returns the exit code: 0, or 2 after one line for a user's mistake."""
    parser = Parser("./run.sh watch [RUN] [--once] [--every SECONDS]", __doc__)
    parser.add_argument("run", nargs="?", default="", help="run folder, or its name; default: the newest")
    parser.add_argument("--once", action="store_true", help="print the view once")
    parser.add_argument("--every", type=number(float, 0.1), default=1.0, metavar="SECONDS", help="between two looks")
    try:
        given = parser.parse_args(list(argv))
        folder = find_run(given.run, runs)
        live = sys.stdout.isatty() and not given.once
        if live:
            sys.stdout.write("\x1b[2J")
        watch(folder, sys.stdout, live, given.every)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"RUN: {error.filename}: cannot be read ({error.strerror})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
