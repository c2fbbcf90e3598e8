"""What an experiment will take, before anything is rented: step time, steps, bytes, seconds of evaluation, money.

    ./run.sh plan --gpus 8 --price 20 [--seeds 3] [--speed FILE] [NAME=value ...]

The pace of the machine is measured, not taken from a data sheet: `./run.sh bench speed --json runs/speed.json` on one
GPU of the kind to be rented leaves it, in one or two minutes. FILE is such a JSON; without it the newest in runs/ and
records/ is taken. Where it was measured with the same settings a micro-batch takes what it took there; with others its
FLOPs do at the same FLOP/s. --price is that of the whole machine for an hour. Without --gpus the plan is for the
machine that was measured.

Exit codes: 0 the plan holds, 2 a mistake in the words, 3 it is over the bytes, the seconds of the evaluation, or has no
step in its budget.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import train_gpt as gpt  # noqa: E402
from tools.console import Parser, UsageError, duration, number, table_text  # noqa: E402

TITLE = re.compile(r"step, (compiled|eager).*?: (PRESET=\S+ OVERLAY=\S*), \w+, ([\d,]+) parameters, (\d+) "
                   r"micro-batches of [\d,]+ tokens, \d+ threads in (\d+) lanes")
CALIBRATION = 2.5  # rounds of training that one of the calibration takes: 0.50 s against 0.20 in a run on a CPU
SAME = 0.005  # of the FLOPs: closer is the configuration that was measured
SAMPLE_TOKENS = 2_000_000  # of the validation split whose evaluation is planned; the rest is as dear in proportion
SAMPLE_DOCUMENTS, CHALLENGE_DOCUMENTS = 2_000, 50_000
OVERHEAD_SECONDS = 240.0  # billed beside compilation, training and evaluation: boot, data, writing the artifact


class Pace(NamedTuple):
    """A row of `bench speed` for one processor: FLOPs of a micro-batch, FLOP/s, seconds of the optimizer, parameters,
    seconds of the first call."""
    flops: float
    rate: float
    optimizer: float
    parameters: int
    first: float


class Measured(NamedTuple):
    """A file of `bench speed`: its path, what was measured on what, the rows, whether the step was compiled."""
    path: Path
    name: str
    machine: str
    gpu: bool
    compiled: bool
    paces: list[Pace]

    def pace(self, flops: float) -> Pace:
        """The row whose micro-batch is nearest in FLOPs."""
        return min(self.paces, key=lambda pace: abs(math.log(pace.flops / flops)))


class Segment(NamedTuple):
    """A part of training with one plan and one context: its share, FLOPs of a micro-batch, seconds of a step."""
    share: float
    flops: float
    seconds: float


def read_speed(path: Path) -> Measured:
    """The step table of a file, the compiled one where there are both; UsageError where it has none."""
    try:
        held = json.loads(path.read_text())
        machine, tables = held["machine"], [(TITLE.match(table["title"]), table) for table in held["tables"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--speed: {path}: must be a JSON of ./run.sh bench speed ({error})") from None
    found = None
    for title, table in tables:
        if title is None or (found and found.compiled):
            continue
        micros, lanes = int(title[4]), int(title[5])
        paces = []
        for row in table["rows"]:
            if row["s round"]:
                flops = 1e12 * row["TFLOP/step"] / micros
                paces.append(Pace(flops, lanes * flops / row["s round"], row["s optimizer"],
                                  int(title[3].replace(",", "")), row["s first"]))
        if paces:
            where = machine.get("gpu") or f"{machine.get('cores')} cores of {machine.get('cpu')}"
            found = Measured(path, title[2], where, "gpu" in machine, title[1] == "compiled", paces)
    if found is None:
        raise UsageError(f"--speed: {path}: has no measured step; ./run.sh bench speed --json {path} makes one")
    return found


def find_speed(folders: Iterable[Path]) -> Path:
    """The newest JSON with a step table; UsageError where there is none."""
    files = [path for folder in folders for path in folder.glob("*.json")]
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            return read_speed(path).path
        except UsageError:
            continue
    raise UsageError("--speed: nothing is measured yet; ./run.sh bench speed --json runs/speed.json does it, on one "
                     "GPU of the kind to be rented")


def segments_of(config: gpt.Config, measured: Measured, processors: int) -> list[Segment]:
    """Training part by part. A step is the rounds of this many processors, and the optimizer's work over them; what
    ranks send each other is not in it."""
    train, phases = config.train, gpt.plan_layers(config.model)
    micros = train.train_batch_tokens // train.micro_batch_tokens
    if micros % processors:
        raise gpt.ConfigError(f"--gpus: {processors}: must divide the {micros} micro-batches of a step "
                              f"(TRAIN_BATCH_TOKENS over MICRO_BATCH_TOKENS={train.micro_batch_tokens})")
    parameters = sum(gpt.count_roles(gpt.make_skeleton(config)).values())
    starts = sorted({phase.start for phase in phases} | {start for start, _ in gpt.parse_seq_schedule(train)})
    found = []
    for start, end in itertools.pairwise([*starts, 1.0]):
        phase, length = phases[gpt.phase_at(phases, start)], gpt.length_at(train, start)
        flops = 3 * train.micro_batch_tokens * gpt.forward_flops(config.model, config.data.vocab_size, phase, length)
        pace = measured.pace(flops)
        optimizer = pace.optimizer * parameters / pace.parameters / processors
        found.append(Segment(end - start, flops, micros / processors * flops / pace.rate + optimizer))
    return found


def reserve_seconds(config: gpt.Config, segments: list[Segment], measured: Measured, processors: int) -> float:
    """What the calibration will keep of the budget: as set, or its batches at the last pace with the margin of
    training's own rehearsal."""
    settings = config.artifact
    if "calibrate" not in config.run.stages or not gpt.needs_calibration(
            gpt.routes_of(gpt.make_skeleton(config), settings), settings):
        return 0.0
    flops = segments[-1].flops
    rounds = -(-settings.gptq_calibration_batches // processors)
    return config.train.reserve_seconds or (
        gpt.RESERVE_MARGIN * CALIBRATION * rounds * flops / measured.pace(flops).rate)


def steps_of(config: gpt.Config, segments: list[Segment], reserve: float) -> tuple[int, float]:
    """Steps and seconds of training: what the budget holds, at most ITERATIONS."""
    train = config.train
    all_ = train.iterations * sum(segment.share * segment.seconds for segment in segments)
    room = train.max_wallclock_seconds - reserve if train.max_wallclock_seconds else math.inf
    if all_ <= room:
        return train.iterations, all_
    return int(sum(segment.share * room / segment.seconds for segment in segments)), max(0.0, room)


def sample_tokens(config: gpt.Config) -> tuple[np.ndarray, float, str]:
    """Tokens of the validation split, or of some of its documents; what they are multiplied by to be all of it; where
    they come from: the dataset, or without one documents as long as the challenge's."""
    folder = Path(config.data.data_path)
    manifest = folder / "manifest.json"
    if manifest.exists():
        shards = json.loads(manifest.read_text())["val"]["shards"]
        tokens, all_ = gpt.read_shard(folder / shards[0]["file"]), sum(entry["tokens"] for entry in shards)
        ends = np.flatnonzero(tokens == gpt.BOS)
        end = len(tokens) if len(tokens) <= SAMPLE_TOKENS else int(ends[ends <= SAMPLE_TOKENS][-1]) + 1
        return np.asarray(tokens[:end]).astype(np.int64), all_ / end, f"validation split of {folder}"
    from tools.bench import draw_lengths, make_stream
    return (make_stream(draw_lengths(SAMPLE_DOCUMENTS)), CHALLENGE_DOCUMENTS / SAMPLE_DOCUMENTS,
            f"{folder} is not here: {CHALLENGE_DOCUMENTS:,} documents as long as the challenge's")


def evaluation_seconds(config: gpt.Config, measured: Measured, processors: int) -> tuple[dict[str, float], str]:
    """Seconds of every evaluator, and where the tokens come from. A position takes its forward's FLOPs at the pace of
    training; in test-time training a step on every chunk too. Counts of n-grams take nothing here."""
    if "evaluate" not in config.run.stages:
        return {}, ""
    tokens, times, where = sample_tokens(config)
    paces = {}
    for kind in config.eval.eval:
        learns, depths = kind == "ttt", config.eval.valve_passes if kind == "valve" else ()
        phase = gpt.plan_phase(config.model, 1.0, passes=int(max(depths, default=config.eval.eval_passes)))
        by_chunks = gpt.EVALUATORS[kind].plan is gpt.plan_ttt
        length = config.ttt.ttt_eval_seq_len if by_chunks else config.eval.eval_seq_len
        flops = gpt.forward_flops(config.model, config.data.vocab_size, phase, length)
        passes = 3 * config.ttt.ttt_grad_steps if learns and config.ttt.ttt_lora_rank else 1
        rate = measured.pace(3 * config.train.micro_batch_tokens * flops).rate
        paces[kind] = gpt.Pace(0.0, times * passes * flops / rate)
    return gpt.shrink_to_fit(config, tokens, paces, processors, math.inf)[1], where


def make_plan(config: gpt.Config, measured: Measured, given: argparse.Namespace, code_bytes: int
              ) -> tuple[dict[str, Any], list[list[str]]]:
    """The numbers by name, and the rows that show them: what, how much, how it is known."""
    processors = given.gpus or 1
    segments = segments_of(config, measured, processors)
    reserve = reserve_seconds(config, segments, measured, processors)
    steps, seconds = steps_of(config, segments, reserve)
    model = gpt.make_skeleton(config)
    forecast = gpt.forecast_fitted(model, config.artifact, code_bytes)
    evaluation, where = evaluation_seconds(config, measured, processors)
    compilation = sum(pace.first for pace in measured.paces) if measured.compiled else 0.0
    billed = given.overhead + compilation + seconds + reserve + sum(evaluation.values())
    exact = all(abs(measured.pace(part.flops).flops / part.flops - 1) < SAME for part in segments)
    how = "measured with these settings" if exact else f"from {measured.name} by FLOPs"
    numbers = {
        "step_seconds": [segment.seconds for segment in segments], "shares": [segment.share for segment in segments],
        "steps": steps, "tokens": steps * config.train.train_batch_tokens, "train_seconds": seconds,
        "reserve_seconds": reserve, "total_bytes": round(sum(forecast.values())) + code_bytes,
        "code_bytes": code_bytes, "parameters": sum(gpt.count_roles(model).values()),
        "eval_seconds": evaluation, "billed_seconds": billed, "gpus": given.gpus, "speed": str(measured.path),
        "machine": measured.machine, "measured": exact}
    rows = [["parameters", f"{numbers['parameters']:,}", f"PRESET={config.run.preset} OVERLAY={config.run.overlay}"]]
    edge = 0.0
    for segment in segments:
        rows.append([f"step from {edge:.0%}", f"{1000 * segment.seconds:,.1f} ms", f"{how}, {measured.machine}"
                     + f" x {processors}" * (processors > 1)])
        edge += segment.share
    rows += [
        ["steps", f"{steps:,}", "ITERATIONS" if steps == config.train.iterations else
         f"MAX_WALLCLOCK_SECONDS={config.train.max_wallclock_seconds:g}"
         + (f" less {reserve:.1f} s for the calibration" if reserve else "")],
        ["tokens", f"{numbers['tokens']:,}", f"TRAIN_BATCH_TOKENS={config.train.train_batch_tokens}"],
        ["training", f"{seconds + reserve:,.1f} s", "with the calibration; without what ranks send each other"],
        ["artifact", f"{numbers['total_bytes']:,} bytes", f"forecast, {code_bytes:,} of them code; TARGET_BYTES="
         f"{config.artifact.target_bytes}"]]
    rows += [[f"eval {kind}", f"{spent:,.1f} s", f"by FLOPs; {where}"] for kind, spent in evaluation.items()]
    rows.append(["billed a seed", duration(billed), f"with {compilation:.0f} s of compilation and --overhead "
                 f"{given.overhead:g}"])
    if given.price is not None:
        numbers["price_a_seed"] = billed * given.price / 3600
        numbers["price"] = given.seeds * numbers["price_a_seed"]
        rows += [["money a seed", f"{numbers['price_a_seed']:,.2f}", f"--price {given.price:g} an hour of the machine"],
                 [f"money, {given.seeds} seeds", f"{numbers['price']:,.2f}", "one after the other on the same machine, "
                  "each as if it booted anew"]]
    return numbers, rows


def faults_of(numbers: Mapping[str, Any], config: gpt.Config) -> list[str]:
    """What of the plan does not hold, a line each."""
    faults, budget = [], config.eval.eval_budget_seconds
    if numbers["total_bytes"] > config.artifact.target_bytes:
        faults.append(f"TARGET_BYTES={config.artifact.target_bytes}: the artifact is forecast to have "
                      f"{numbers['total_bytes']:,} bytes")
    if budget and sum(numbers["eval_seconds"].values()) > budget:
        faults.append(f"EVAL_BUDGET_SECONDS={budget:g}: the evaluation is forecast to take "
                      f"{sum(numbers['eval_seconds'].values()):,.0f} s")
    if numbers["steps"] < 1:
        faults.append(f"MAX_WALLCLOCK_SECONDS={config.train.max_wallclock_seconds:g}: does not hold a step")
    return faults


def main(argv: list[str], env: Mapping[str, str] | None = None, root: Path = ROOT) -> int:
    """The command line; returns the exit code."""
    parser = Parser("./run.sh plan [--gpus N] [--price P] [--seeds N] [--speed FILE] [NAME=value ...]", __doc__)
    parser.add_argument("words", nargs="*", help="settings of train_gpt.py")
    parser.add_argument("--gpus", type=number(int, 1), metavar="N", help="GPUs of the machine to be rented")
    parser.add_argument("--price", type=number(float, 0), metavar="P", help="of the machine, an hour")
    parser.add_argument("--seeds", type=number(int, 1), default=3, metavar="N", help="runs to pay for")
    parser.add_argument("--speed", type=Path, metavar="FILE", help="JSON of bench speed; default: the newest")
    parser.add_argument("--overhead", type=number(float, 0), default=OVERHEAD_SECONDS, metavar="SECONDS",
                        help="billed beside compilation, training and evaluation")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keeps the numbers")
    try:
        given = parser.parse_intermixed_args(argv)
        measured = read_speed(given.speed or find_speed([root / "runs", root / "records"]))
        if given.gpus and not measured.gpu:
            raise UsageError(f"--gpus: {given.gpus}: {measured.path} was measured on {measured.machine}; --speed names "
                             "one of a GPU")
        gpus = given.gpus or int(measured.gpu)
        config = gpt.load_config(given.words, os.environ if env is None else env, gpus=gpus)
        gpt.check_squeeze(config)
        numbers, rows = make_plan(config, measured, given, len(gpt.pack_self(config)))
        if given.json:
            given.json.write_text(json.dumps(numbers, indent=1) + "\n")
    except (UsageError, gpt.ConfigError) as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"--json: {error.filename}: cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    print(f"speed: {measured.path}, {'compiled' if measured.compiled else 'eager'}\n")
    print(table_text({"what": "", "how much": "", "how it is known": ""}, rows))
    faults = faults_of(numbers, config)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 3 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
