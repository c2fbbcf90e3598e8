"""Benchmarks of squeeze and evaluation: what stands in one table was measured side by side, in one run, on the machine
it names.

    ./run.sh bench gptq                       error of gptq over nearest rounding, and its seconds
    ./run.sh bench codec [RUN_FOLDER]         entropy coders: bytes against the ideal and against rivals, and speed
    ./run.sh bench formats [RUN_FOLDER ...]   a finished run squeezed with other settings, each artifact scored; runs
                                              after the first are added as their own settings have them
    ./run.sh bench fit [RUN_FOLDER ...]       FIT=1 at shares of the size of the run's int8 model
    ./run.sh bench schedule [RUN_FOLDER]      test-time training: positions against the challenge's padded groups, and
                                              eight simulated ranks at the paces of this machine and of others
    ./run.sh bench ttt [RUN_FOLDER]           settings of test-time training tried on training documents, one at a time
                                              (TTT_LORA_LR=1e-3,3e-3 TTT_SITES=q,v/head) or all combined (GRID=1)
    ./run.sh bench ngram [RUN_FOLDER]         the n-gram mixture: gates by texts, sums, block sizes, memory and seconds
    ./run.sh bench presets                    systems trained and scored on equal bytes, seconds, documents and seeds
    ./run.sh bench parts                      a preset against changes of it ("ROW=name: A=1 B=2"), the same way
    ./run.sh bench crawler                    the crawler's passes, instructions and memory, and other mixers, likewise
    ./run.sh bench ternary                    a ternary block's updates, CAGS, scales, formats and passes, likewise
    ./run.sh bench hybrid                     the hybrid stack's mixers, loops, experts and in-place learning, likewise
    ./run.sh bench generate [RUN_FOLDER ...]  text from artifacts: tokens a second along it, memory, the same text with
                                              drafts and packed
    ./run.sh bench speed                      a preset's step, kernels and optimizer against the peaks of this machine

Without a folder it is the newest finished one in runs/ that was trained without QAT; `schedule` then has an untrained
model. `--json FILE` keeps the tables as JSON too; `ttt`, `ngram`, `generate`, `presets`, `parts`, `crawler`, `ternary`
and `hybrid` keep theirs in records/ where no FILE is named. `formats`, `fit`, `ngram`, `generate`, `speed` and the
comparisons, `presets`, `parts`, `crawler`, `ternary` and `hybrid`, hand settings of train_gpt.py on. Comparisons
(tools/compare.py) keep their runs in runs/compare and go on where they were stopped. `speed` (tools/speed.py) needs no
data; it takes settings from the environment too, as training does. Seconds of all but `formats`, `fit`, `generate`,
`speed` and the comparisons are the processor's, on one thread (lanes with THREADS; on a GPU they are the clock's), of
`gptq` and `codec` medians; the spread is that from fastest to slowest over the median. Options:

"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import itertools
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # seconds of one core: read when numpy is loaded
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as run.sh has it for training: read when torch is loaded

import numpy as np  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import prepare  # noqa: E402

import train_gpt as gpt  # noqa: E402
from tools import compare, generate, speed  # noqa: E402

OURS, RIVALS = ("range", "context"), ("zpaq", "lrzip")
SIGMA = 31 / 13  # deviation of a weight in steps of int6 that ends at k = 13
BLOCK_SHAPES = [(512, 512), (256, 512), (256, 512), (512, 512), (2048, 512), (512, 2048)]  # q k v o up down


class BenchError(Exception):
    """A user's mistake or a launch that failed; every line of the message is clear by itself."""


class Table(NamedTuple):
    """A title, the columns with their formats, the rows (a cell: number, text, or None for nothing), a last line."""
    title: str
    columns: dict[str, str]
    rows: list[list[Any]]
    note: str = ""

    def text(self) -> str:
        """Words to the left, numbers to the right."""
        rows = [["-" if cell is None else cell if isinstance(cell, str) else format(cell, form)
                 for cell, form in zip(row, self.columns.values(), strict=True)] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(self.columns, *rows, strict=True)]
        lines = ["  ".join(f"{cell:{'>' if form else '<'}{width}}" for cell, form, width in
                           zip(row, self.columns.values(), widths, strict=True)).rstrip()
                 for row in [list(self.columns), *rows]]
        return "\n".join(["", self.title, lines[0], "-" * len(lines[0]), *lines[1:], *filter(None, [self.note])])

    def json(self) -> dict[str, Any]:
        """The same as values by column."""
        names = [name.strip() for name in self.columns]
        return {"title": self.title, "rows": [dict(zip(names, row, strict=True)) for row in self.rows],
                "note": self.note}


def machine() -> dict[str, Any]:
    """What seconds depend on."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", path.read_text()) if path.exists() else None
    return {"cpu": found[1].strip() if found else platform.processor() or platform.machine(),
            **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
            "capability": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count(), "torch": torch.__version__,
            "python": platform.python_version(), "load": round(os.getloadavg()[0], 2)}


def timed(work: Callable[[], Any], repeats: int = 1) -> tuple[float, float, Any]:
    """Median and spread of the processor seconds of `work` and of children it waited for, and what it returned. Other
    programs on the machine do not count, nor does a first call where there are several."""
    spent, result = [], work() if repeats > 1 else None
    for _ in range(repeats):
        began = time.process_time() + sum(os.times()[2:4])
        result = work()
        spent.append(max(time.process_time() + sum(os.times()[2:4]) - began, 1e-6))
    median = statistics.median(spent)
    return median, (max(spent) - min(spent)) / median, result


# ---- gptq


def make_hessian(kind: str, columns: int, generator: torch.Generator) -> torch.Tensor:
    """sum x x^T over 2,048 samples of an AR(1) process along the columns; or of white noise, its diagonal only."""
    x = torch.randn(2048, columns, generator=generator, dtype=torch.float64)
    if kind == "diagonal":
        return torch.diag(x.square().sum(0))
    rho = float(kind)
    for column in range(1, columns):
        x[:, column] = rho * x[:, column - 1] + math.sqrt(1 - rho * rho) * x[:, column]
    return x.T @ x


def draw(shape: tuple[int, int], kind: str, name: str, generator: torch.Generator
         ) -> tuple[torch.Tensor, gpt.Grid, torch.Tensor, gpt.ArtifactSettings]:
    """What a solver is called with: Gaussian weights, an int grid up to the largest of a row, the Hessian."""
    weight, form = torch.randn(shape, generator=generator, dtype=torch.float64), gpt.FORMATS[name]
    measured = form.measure(weight, gpt.Route(name), form.bits)
    return (weight, gpt.make_grid(measured, gpt.Route(name), shape[1], form.low, form.high),
            make_hessian(kind, shape[1], generator), gpt.ArtifactSettings())


def bench_gptq(folders: list[Path], options: dict[str, Any]) -> Iterator[Table]:
    """Ratios of errors, then seconds."""
    rows, generator = [], torch.Generator().manual_seed(1)
    for kind in ("0.9", "0.8", "diagonal"):
        for name in ("int4", "int5", "int6"):
            ratios = []
            for _ in range(options["REPEATS"]):
                weight, grid, hessian, settings = case = draw((128, 256), kind, name, generator)
                errors = [weight - grid.value(gpt.SOLVERS[solver](*case)) for solver in ("nearest", "gptq")]
                nearest, gptq = (float(((error @ hessian) * error).sum()) for error in errors)
                ratios.append(gptq / nearest)
            rows.append([kind, name, statistics.median(ratios), min(ratios), max(ratios)])
    yield Table(f"Hessian-weighted error of gptq over nearest: {options['REPEATS']} draws of 128x256 Gaussian weights, "
                "2,048 samples, fp64",
                {"inputs: AR(1) rho": "", "grid": "", "median": ".4f", "least": ".4f", "most": ".4f"}, rows)
    rows = []
    for shape in ((512, 512), (2048, 512), (512, 2048)):
        case = draw(shape, "0.9", "int6", generator)
        nearest, gptq = (timed(lambda solver=solver, case=case: gpt.SOLVERS[solver](*case), options["REPEATS"])
                         for solver in ("nearest", "gptq"))
        rows.append(["{}x{}".format(*shape), *nearest[:2], *gptq[:2], gptq[0] / nearest[0]])
    yield Table("Seconds of a solver, int6, outputs x inputs", {
        "weight": "", "nearest": ".4f", "spread": ".0%", "gptq": ".3f", "spread ": ".0%", "ratio": ".0f"}, rows)


# ---- codec


def gaussian_codes(shapes: list[tuple[int, int]], differ: float = 0.0) -> gpt.Matrices:
    """int6 codes of Gaussian matrices; rows and columns may differ in deviation by log-normal factors, as trained ones
    do."""
    rng, out = np.random.default_rng(1), []
    for rows, columns in shapes:
        factor = np.exp(differ * (rng.standard_normal((rows, 1)) + rng.standard_normal(columns)))
        scale = np.float32(SIGMA * factor)
        out.append(np.clip(np.rint(rng.standard_normal((rows, columns), np.float32) * scale), -31, 31).astype(np.int8))
    return out


def gaussian_bits(matrices: gpt.Matrices) -> float:
    """The ideal code length of gaussian_codes: -log2 of the probability of every code."""
    below = [statistics.NormalDist(0, SIGMA).cdf(code + 0.5) for code in range(-31, 31)]
    chances = np.maximum(np.diff([0.0, *below, 1.0]), 1e-300)
    return float(sum(-np.bincount(matrix.ravel() + 31, minlength=63) @ np.log2(chances) for matrix in matrices))


def count_of(matrices: gpt.Matrices) -> int:
    """Their symbols."""
    return sum(matrix.size for matrix in matrices)


def pack_checked(name: str, matrices: gpt.Matrices, high: int) -> tuple[int, float, float]:
    """Bytes of a codec and its seconds both ways; BenchError where it does not give back what it got."""
    packing, _, (blob, _) = timed(lambda: gpt.CODECS[name].pack(matrices, -high, high))
    shapes = [matrix.shape for matrix in matrices]
    unpacking, _, back = timed(lambda: gpt.CODECS[name].unpack(blob, shapes, -high, high))
    if not all(map(np.array_equal, matrices, back)):
        raise BenchError(f"CODEC={name}: unpacking gave other symbols than were packed")
    return len(blob), packing, unpacking


def gaussian_table(coders: list[str], share: float) -> Table:
    """(a) Gaussian codes of the caseops shape, against the ideal."""
    shapes = [(math.ceil(rows * share), columns) for rows, columns in [*BLOCK_SHAPES * 11, (8192, 512)]]
    matrices = gaussian_codes(shapes)
    rows = [["ideal code length", count_of(matrices), gaussian_bits(matrices) / 8,
             gaussian_bits(matrices) / count_of(matrices), 0.0, None, None]]
    for name in (name for name in coders if name in (*OURS, "brotli")):
        part = matrices if name in OURS else matrices[:9]  # brotli would take minutes for all of them
        count, ideal, (size, *seconds) = count_of(part), gaussian_bits(part), pack_checked(name, part, 31)
        rows.append([name, count, size, 8 * size / count, 8 * size / ideal - 1, *seconds])
    return Table("Gaussian codes, int6 at k = 13, shapes of 11 blocks of 512 and an embedding of 8,192", {
        "coder": "", "symbols": ",d", "bytes": ",.0f", "bits a symbol": ".4f", "over ideal": "+.3%", "s pack": ".2f",
        "s unpack": ".2f"}, rows, "brotli (level 11) has the first 9 matrices only, against their own ideal")


def stored_of(folder: Path, words: list[str]) -> dict[str, gpt.Stored]:
    """The tensors of a finished run, rounded to nearest in the formats that its settings and the words say."""
    config = gpt.load_config([f"FROM={folder}", "STAGES=write", *words], {}, gpus=0)
    kernels, _ = gpt.pick_kernels("reference", torch.device("cpu"), settings=config.model)
    with torch.device("meta"):
        routes = gpt.routes_of(gpt.GPT(config.model, config.data.vocab_size, kernels, torch.float32), config.artifact)
    held = gpt.load_checkpoint(folder / "checkpoint.pt")
    weights = held.average or held.weights
    return {name: gpt.Stored(route, tuple(weights[name].shape), gpt.FORMATS[route.format].encode(weights[name], route))
            for name, route in routes.items()}


def reset_words(**more: object) -> list[str]:
    """Every setting of the squeeze but codec and cap at its default, then `more`."""
    values = {gpt.setting_name(field): field.default for field in dataclasses.fields(gpt.ArtifactSettings)
              if field.name not in ("codec", "target_bytes")}
    return [f"{name}={value}" for name, value in {**values, **more}.items()]


def run_table(folder: Path, bits: int, sigmas: int, coders: list[str]) -> Table:
    """(b) The codes of a trained model: every coder, the byte coders in every order of the symbols."""
    words = reset_words(MATRIX_BITS=bits, EMBED_BITS=bits, MATRIX_CLIP_SIGMAS=sigmas, EMBED_CLIP_SIGMAS=sigmas)
    matrices = [row.coded.codes.numpy() for row in stored_of(folder, words).values() if row.route.format[:3] == "int"]
    high, count, entropy = 2 ** (bits - 1) - 1, count_of(matrices), sum(map(gpt.entropy_bits, matrices)) / 8
    sizes: list[tuple[Any, ...]] = [("order-0 entropy a tensor", "", entropy, None, None)]
    for name in filter(gpt.codec_there, coders):
        if name in OURS:
            sizes.append((name, "", *pack_checked(name, matrices, high)))
            continue
        compress = gpt.CODECS[name].pack.keywords["compress"]
        for layout in gpt.LAYOUTS.values():
            order = layout.pack.__name__.removesuffix("_pack")
            if 2 * high + 1 in layout.symbols and (name not in RIVALS or order in ("rows", "columns")):
                data = layout.pack(matrices, -high, high)
                seconds, _, blob = timed(lambda compress=compress, data=data: compress(data))
                sizes.append((name, order, len(blob) + 1, seconds, None))
    best = [min((size for name, _, size, *_ in sizes if name in names), default=None)
            for names in (OURS, RIVALS, set(coders) - {*OURS})]
    rival = best[1] or best[2]
    rows = [[name, order, size, 8 * size / count, size / entropy - 1, size / rival - 1 if rival else None, *seconds]
            for name, order, size, *seconds in sizes]
    rows += [[name, "not installed", *[None] * 6] for name in coders if not gpt.codec_there(name)]
    return Table(f"Codes of {folder}, int{bits} at k = {sigmas}, nearest: {len(matrices)} tensors, {count:,} weights", {
        "coder": "", "order": "", "bytes": ",.0f", "bits a weight": ".4f", "over entropy": "+.2%",
        "over rival": "+.2%", "s pack": ".2f", "s unpack": ".2f"}, rows,
        f"ours over the smallest rival: {best[0] / rival - 1:+.3%}" if best[0] and rival else "")


def speed_table(coders: list[str], share: float, repeats: int) -> Table:
    """(c) Millions of symbols a second each way."""
    rows = []
    for name in coders:
        for shape in ((2048, 512), (512, 2048), (192, 192)):
            shapes, codec = [shape] * math.ceil(share * 2 ** 22 / math.prod(shape)), gpt.CODECS[name]
            matrices = gaussian_codes(shapes, 0.6)  # less, and `context` finds nothing and is as fast as `range`
            packing, spread, (blob, _) = timed(lambda c=codec, m=matrices: c.pack(m, -31, 31), repeats)
            unpacking, back, _ = timed(lambda c=codec, b=blob, s=shapes: c.unpack(b, s, -31, 31), repeats)
            count = count_of(matrices)
            rows.append([name, "{} of {}x{}".format(len(shapes), *shape), count, 8 * len(blob) / count,
                         count / packing / 1e6, spread, count / unpacking / 1e6, back])
    return Table("Million symbols a second of one core, int6 codes whose rows and columns differ in deviation", {
        "coder": "", "matrices": "", "symbols": ",d", "bits a symbol": ".4f", "packed": ".2f", "spread": ".0%",
        "unpacked": ".2f", "spread ": ".0%"}, rows)


def ternary_table(folder: Path | None, coders: list[str], share: float) -> Table:
    """(d) Ternary weights through the container, trits and scales apart; those of the run too where it has some."""
    generator, cases, rows = torch.Generator().manual_seed(1), {}, []
    latents = {f"w{i}": torch.randn(math.ceil(height * share), width, generator=generator)
               for i, (height, width) in enumerate(BLOCK_SHAPES)}
    for scale in ("absmean", "rms", "nonzero"):
        route = gpt.Route("ternary", 128, scale=scale)
        cases[f"Gaussian, {scale}"] = {name: gpt.Stored(route, tuple(weight.shape), gpt.encode_grid(weight, route))
                                       for name, weight in latents.items()}
    if folder and (own := {name: row for name, row in stored_of(folder, []).items() if row.route.format == "ternary"}):
        cases[f"{folder}, {next(iter(own.values())).route.scale}"] = own
    for what, stored in cases.items():
        _, spent = gpt.pack_artifact(stored, {}, coders)
        trits = sum(math.prod(row.shape) for row in stored.values())
        entropy = sum(gpt.entropy_bits(row.coded.codes.numpy()) for row in stored.values()) / trits
        scales = sum(row.shape[0] * gpt.group_count(row.shape[1], row.route.group) for row in stored.values())
        scale_bits = 8 * sum(sides for *_, sides in spent.values())
        bits = (8 * sum(size for _, size, _ in spent.values()) - scale_bits) / trits
        rows.append([what, "+".join(sorted({codec for codec, *_ in spent.values()})), trits, entropy, bits,
                     bits - entropy, scales, scale_bits / scales, scale_bits / trits])
    return Table("Ternary weights, threshold 0.5, scales by groups of 128, through the container", {
        "latents, scale": "", "coder": "", "trits": ",d", "entropy": ".4f", "bits a trit": ".4f", "over": "+.4f",
        "scales": ",d", "bits a scale": ".2f", "scale bits a trit": ".4f"}, rows)


def bench_codec(folders: list[Path], options: dict[str, Any]) -> Iterator[Table]:
    """The parts in order."""
    parts, coders, (share,) = options["PARTS"], options["CODEC"], options["SHARE"]
    there = list(filter(gpt.codec_there, coders))
    if "gaussian" in parts:
        yield gaussian_table(there, share)
    for bits, sigmas in ((6, 13), (6, 5), (8, 5)) if "run" in parts else ():
        yield run_table(folders[0] if folders else newest_run(), bits, sigmas, coders)
    if "speed" in parts:
        yield speed_table([name for name in there if name in OURS] or there, share, options["REPEATS"])
    if "ternary" in parts:
        auto, _ = gpt.pick_codecs(("auto",))
        yield ternary_table(folders[0] if folders else None, [name for name in auto if name in there] or there, share)


# ---- formats and fit: launches of train_gpt.py


def newest_run() -> Path:
    """The newest finished run in runs/ whose loss was taken at the weights themselves."""
    found = []
    for path in Path("runs").glob("*/checkpoint.pt"):
        try:
            settings = json.loads((path.parent / "config.json").read_text())["settings"]
            if "train" in json.loads((path.parent / "result.json").read_text()) and settings.get("QAT_START", 1) == 1:
                found.append((path.stat().st_mtime, path.parent))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    if not found:
        raise BenchError("runs: no finished run with a checkpoint.pt; name a run folder, or make one with ./run.sh")
    return max(found)[1]


class Launches:
    """Launches of train_gpt.py, as it is now, into a temporary folder of runs; the faults of those that fail are
    kept."""

    def __init__(self, runs: str, words: list[str]) -> None:
        self.runs, self.words, self.faults = Path(runs), words, []
        shutil.copy(ROOT / "train_gpt.py", self.runs)

    def run(self, name: str, folder: Path, words: list[str], needed: bool = False) -> dict[str, Any]:
        """result.json of one launch from the run in `folder`; where it failed, {}, or BenchError for what all else is
        compared with. A line on standard error says how long it took."""
        began = time.monotonic()
        command = [sys.executable, str(self.runs / "train_gpt.py"), "STAGES=calibrate,write,reload,evaluate", *words,
                   *self.words, f"FROM={folder}", f"RUNS_PATH={self.runs}", f"RUN_ID={name}", "EVAL=contiguous",
                   f"TOOLS_PATH={ROOT / 'tools'}", "PACK=0", "TENSORBOARD=0"]
        done = subprocess.run(command, capture_output=True, text=True,
                              env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ})
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        if done.returncode == 0:
            return json.loads((self.runs / name / "result.json").read_text())
        said = (done.stderr.strip() or "no message").splitlines()[-1]
        self.faults.append(f"{name}: exit code {done.returncode}: {said}")
        if needed:
            self.close()
        return {}

    def close(self) -> None:
        """BenchError with a line for every launch that failed."""
        if self.faults:
            raise BenchError("\n".join(self.faults))


# Rows of `formats`: the name begins with a grid, whose plain row is what the others are compared with.
EMBED7 = {"EMBED_BITS": 7, "EMBED_CLIP_SIGMAS": 14}
GRIDS: dict[str, dict[str, Any]] = {"int8": {"MATRIX_BITS": 8}, **{
    f"int{bits}": {"MATRIX_BITS": bits, "MATRIX_CLIP_SIGMAS": sigmas, **EMBED7} for bits, sigmas in
    ((6, 13), (5, 4), (4, 4))}}
ROWS: dict[str, dict[str, Any]] = {
    **{grid + tail: {**words, "SOLVER": solver} for grid, words in GRIDS.items()
       for tail, solver in (("", "nearest"), ("-gptq", "gptq"))},
    **{f"int6-gptq-{tail}": {**GRIDS["int6"], "SOLVER": "gptq", name: value} for tail, name, value in (
        ("allocate", "ALLOCATE", 1), ("lqer", "LQER_RANK", 4), ("awq", "AWQ_LITE_GROUP_TOP_K", 1),
        ("rate", "RATE_ROUNDING", 1), ("prune", "PRUNE_ONES", 0.1), ("sequential", "GPTQ_SEQUENTIAL", 1),
        ("self", "GPTQ_CALIBRATION_TEXT", "self"))},
    "ternary-qat": {"MATRIX_FORMAT": "ternary", "GROUP_SIZE": 128, "EMBED_FORMAT": "fp8", "QAT_START": 0.5,
                    "STAGES": "train,calibrate,write,reload,evaluate"}}
SLOW = {"SELF": "int6-gptq-self", "TERNARY": "ternary-qat"}  # option -> row that is left out without it


def bench_formats(folders: list[Path], options: dict[str, Any]) -> Iterator[Table]:
    """One row a launch; int8 comes first and scores the float weights too, plain grids come before what needs them."""
    folder, found = folders[0] if folders else newest_run(), {}
    chosen = {*options["ROWS"], *(name for option, name in SLOW.items() if options[option])}
    chosen |= {"int8", *(name.split("-")[0] for name in chosen)}
    with tempfile.TemporaryDirectory() as runs:
        launches = Launches(runs, options["words"])
        Path(runs, "int8").mkdir()
        Path(runs, "int8", "checkpoint.pt").symlink_to((folder / "checkpoint.pt").resolve())
        for name in (name for name in ROWS if name in chosen):
            found[name] = launches.run(name, folder, reset_words(**ROWS[name]), needed=name == "int8")
        for index, other in enumerate(folders[1:]):
            found[str(other)] = launches.run(f"other-{index}", other, [])
    found = {name: result for name, result in found.items() if result}
    base, first = found["int8"]["scores"]["float"]["val_bpb"], found["int8"]["artifact"]
    losses = {name: result["scores"]["contiguous"]["val_bpb"] - base for name, result in found.items()}
    rows = [["float", 32.0, round(32 * first["model_bytes"] / first["bits_per_weight"]), base, 0.0, None, None, None]]
    for name, result in found.items():
        nearest = losses.get(name.split("-")[0], 0.0) if name in ROWS and "-" in name else 0.0
        rows.append([name, result["artifact"]["bits_per_weight"], result["artifact"]["model_bytes"],
                     base + losses[name], losses[name], losses[name] / nearest if nearest > 0 else None,
                     result["train"]["calibrate_seconds"], result["artifact"]["write_seconds"]])
    yield Table(f"{folder} squeezed anew: bits of all weights, contiguous bits per byte, loss against float", {
        "row": "", "bits a weight": ".3f", "model bytes": ",d", "BPB": ".4f", "loss": "+.4f", "over nearest": ".3f",
        "s calibrate": ".1f", "s solve, code": ".1f"}, rows)
    launches.close()


def bench_fit(folders: list[Path], options: dict[str, Any]) -> Iterator[Table]:
    """A launch a run says what a share is of; then one a cap."""
    rows, words = [], [*reset_words(SOLVER="gptq"), "STAGES=calibrate,write"]
    with tempfile.TemporaryDirectory() as runs:
        launches = Launches(runs, options["words"])
        for index, folder in enumerate(folders or [newest_run()]):
            whole = launches.run(f"int8-{index}", folder, words, needed=True)["artifact"]
            for share in options["CAPS"]:
                cap = round(share * whole["model_bytes"]) + whole["code_bytes"]
                result = launches.run(f"cap-{index}-{share:g}", folder, [*words, "FIT=1", f"TARGET_BYTES={cap}"])
                if result:
                    row = result["artifact"]
                    unused = cap - row["total_bytes"]
                    rows.append([str(folder), whole["model_bytes"], share, cap, row["model_bytes"], row["code_bytes"],
                                 unused, "yes" if 0 <= unused <= gpt.FIT_WINDOW_BYTES else "NO", row["fit_passes"],
                                 row["step_factor"], row["write_seconds"]])
    yield Table("FIT=1 on int8 with gptq; a cap is a share of the int8 model, and the code", {
        "run": "", "int8 model": ",d", "share": ".0%", "cap": ",d", "model": ",d", "code": ",d", "unused": ",d",
        "within 4,000": "", "passes": "d", "steps times": ".3f", "s solve, code": ".1f"}, rows)
    launches.close()


# ---- schedule: what test-time training computes, and when eight ranks are done with it


RANKS = 8
RECORD = {"TTT_CHUNK_SIZE": 48, "TTT_EVAL_SEQ_LEN": 2048, "TTT_BATCH_SIZE": 64, "TTT_SHORT_SCORE_FIRST_STEPS": ""}
PUBLISHED_ROWS = 64  # documents that the challenge's record scripts put side by side
PUBLISHED_ENDS = (833, 1666, 2500)  # finished documents at which all their ranks wait and train the whole model
# Percentile -> tokens of the challenge's 50,000 validation documents, from the logs of its records; and the longest.
LENGTHS, LONGEST = {0: 27, 25: 292, 50: 567, 75: 1075, 90: 1880, 95: 2780, 99: 6600}, 97_114
# 1.01 billion positions, forward and backward, take eight H100 180 s (PR 1855).
H100_POSITION = 180 * RANKS / 1.01e9
LATENCIES = (256, 4096, 16384, 37000, 65536)  # positions; at 37,000 a step of 16 rows takes the 0.1 s of those logs
CHUNK_TABLES: dict[str, dict[str, Any]] = {
    "48 for all": {}, "48 for all, 128 side by side": {"TTT_BATCH_SIZE": 128},
    "96 from 4,000, 192 from 16,000": {"TTT_SHORT_SCORE_FIRST_STEPS": "4000:48,16000:96", "TTT_CHUNK_SIZE": 192},
    "192 from 16,000": {"TTT_SHORT_SCORE_FIRST_STEPS": "16000:48", "TTT_CHUNK_SIZE": 192},
    "8 up to 256, 24 up to 2,000 (PR 2014)": {"TTT_SHORT_SCORE_FIRST_STEPS": "256:8,2000:24"}}


class Work(NamedTuple):
    """A job as the simulation sees it: forwards that follow each other, positions of all of them, documents."""
    rounds: int
    positions: int
    documents: int

    def seconds(self, pace: gpt.Pace) -> float:
        return pace.round * self.rounds + pace.position * self.positions


def draw_lengths(count: int) -> np.ndarray:
    """`count` lengths, ascending: the quantiles of LENGTHS, straight in the logarithm between them; the last hundredth
    is a power law that ends at the longest."""
    share = 100 * (np.arange(count) + 0.5) / count
    lengths = np.exp(np.interp(share, list(LENGTHS), np.log(list(LENGTHS.values()))))
    tail, edge = np.flatnonzero(share > 99), LENGTHS[99]
    rank = (count - tail) / (count / 100)
    lengths[tail] = edge * rank ** (math.log(LONGEST / edge) / math.log(min(100 / count, 0.5)))
    return np.rint(lengths).astype(np.int64)


def make_stream(lengths: np.ndarray) -> np.ndarray:
    """Tokens in which only the beginnings of documents matter, in an order of its own, and a last target."""
    lengths = np.random.default_rng(0).permutation(lengths)
    tokens = np.zeros(lengths.sum() + 1, np.int64)
    tokens[lengths.cumsum() - lengths] = gpt.BOS
    return tokens


def our_work(tokens: np.ndarray, config: gpt.Config) -> tuple[list[gpt.Stage], list[list[Work]]]:
    """The real plan, and its jobs stage by stage."""
    stages = gpt.plan_ttt(tokens, config)
    return stages, [[Work(len(job), sum(item.positions() for item in job),
                          sum(len(item.windows) for item in job if item.fresh)) for job in stage] for stage in stages]


def published_work(lengths: np.ndarray, chunk: int, context: int) -> list[Work]:
    """The challenge's groups, longest first: documents sorted by length, 64 side by side, every row computed up to the
    end of the group's longest, in windows that end with the chunk and are as wide as there is context."""
    lengths, jobs = np.sort(lengths), []
    for group in (lengths[at:at + PUBLISHED_ROWS] for at in range(0, len(lengths), PUBLISHED_ROWS)):
        widths = np.minimum((np.arange(-(-int(group[-1]) // chunk)) + 1) * chunk, context)
        jobs.append(Work(len(widths), len(group) * int(widths.sum()), len(group)))
    return jobs[::-1]


def claim(jobs: list[Work], pace: gpt.Pace, ends: tuple[int, ...] = ()) -> float:
    """Seconds until ranks that each claim the next job when they are free have done all; at each of `ends` finished
    documents nobody claims more until all have finished."""
    free, running, finished, ends = [0.0] * RANKS, [], 0, list(ends)
    for job in jobs:
        while running and running[0][0] <= free[0]:
            finished += heapq.heappop(running)[1]
        if ends and finished >= ends[0]:
            free = [max(free)] * RANKS
            finished += sum(documents for _, documents in running)
            running, ends = [], [end for end in ends if end > finished]
        done = heapq.heappop(free) + job.seconds(pace)
        heapq.heappush(free, done)
        heapq.heappush(running, (done, job.documents))
    return max(free)


def assigned(stages: list[gpt.Stage], work: list[list[Work]], pace: gpt.Pace, step_positions: float) -> float:
    """Seconds of our static schedule, which knows the latency as `step_positions` only: each stage as long as its
    longest share."""
    return sum(max(sum(jobs[number].seconds(pace) for number in share)
                   for share in gpt.assign(stage, RANKS, step_positions)) for stage, jobs in zip(stages, work,
                                                                                                 strict=True))


def padding_table(folder: Path | None) -> Table:
    """(a) Positions on real documents: ours against the padded groups."""
    config = gpt.load_config(["PRESET=sixteen", "OVERLAY=tiny"], {}, gpus=0)
    tokens = gpt.load_data(config.data, gpt.World()).val.tokens
    lengths = np.array([end - start for start, end in gpt.find_documents(tokens)])
    chunk, context, rows = config.ttt.ttt_chunk_size, config.ttt.ttt_eval_seq_len, []
    padded = published_work(lengths, chunk, context)
    for name, jobs in (("published: 64 side by side, padded", padded), *(
            (f"ours, TTT_BATCH_SIZE={size}",
             sum(our_work(tokens, gpt.with_settings(config, {"TTT_BATCH_SIZE": size}))[1], []))
            for size in (config.ttt.ttt_batch_size, PUBLISHED_ROWS))):
        rounds, positions = (sum(getattr(job, part) for job in jobs) for part in ("rounds", "positions"))
        rows.append([name, len(jobs), rounds, positions, positions / sum(job.positions for job in padded)])
    return Table(f"Positions computed by test-time training: WikiText-2 validation, {len(lengths)} documents, "
                 f"{len(tokens) - 1:,} targets, chunk {chunk}, context {context}", {
        "plan": "", "groups": ",d", "forwards": ",d", "positions": ",d", "over published": ".3f"}, rows,
        f"wanted at most 0.333: {'yes' if rows[1][-1] <= 1 / 3 else 'NO'}")


def measured_pace(folder: Path | None, rows: int) -> tuple[str, gpt.Pace]:
    """What a step of test-time training costs here, and a name that has its latency in positions: a round of so many
    documents in a window of 2,048 on the folder's model, or on an untrained one of OVERLAY=tiny, which costs the same.
    """
    device = torch.device("cpu")
    if folder:
        held = load_run(folder, [], device=device)
        config, model = held.config, held.model
    else:
        config = gpt.load_config(["PRESET=sixteen", "OVERLAY=tiny"], {}, gpus=0)
        kernels, _ = gpt.pick_kernels(config.system.kernels, device, settings=config.model)
        model = gpt.GPT(config.model, config.data.vocab_size, kernels,
                        gpt.pick_dtype(config.system.compute_dtype, device))
        gpt.init_weights(model, config.run.seed)
    config = gpt.with_settings(config, {**RECORD, "TTT_BATCH_SIZE": rows})
    stages = gpt.plan_ttt(make_stream(np.full(rows, RECORD["TTT_EVAL_SEQ_LEN"] + 2 * RECORD["TTT_CHUNK_SIZE"])), config)
    guest = gpt.make_guest("ttt", model, config, gpt.World())
    pace = gpt.rehearse("ttt", guest, stages, config, gpt.World(), time.process_time)
    return f"this CPU ({pace.round / pace.position:,.0f})", pace


def ranks_table(tokens: np.ndarray, lengths: np.ndarray, paces: dict[str, tuple[gpt.Pace, float]]) -> Table:
    """(b) Busy share of eight ranks, ours and published, for each pace and what `assign` takes its latency for."""
    config, rows = gpt.with_settings(gpt.load_config(["OVERLAY="], {}, gpus=0), RECORD), []
    plans = [(name, *our_work(tokens, gpt.with_settings(config, more))) for name, more in (
        ("ours", {}), ("ours, 3 phases", {"PHASED_TTT_PREFIX_DOCS": PUBLISHED_ENDS[-1], "PHASED_TTT_NUM_PHASES": 3}))]
    padded = published_work(lengths, RECORD["TTT_CHUNK_SIZE"], RECORD["TTT_EVAL_SEQ_LEN"])
    for what, (pace, step_positions) in paces.items():
        found = [("published", padded, claim(padded, pace)),
                 ("published, 3 waits", padded, claim(padded, pace, PUBLISHED_ENDS))]
        known = pace.round / pace.position
        found += [(name, sum(work, []), assigned(stages, work, pace, step))
                  for (name, stages, work), step in zip((*plans, ("ours, latency known", *plans[0][1:])),
                                                        (step_positions, step_positions, known), strict=True)]
        for name, jobs, seconds in found:
            costs = [job.seconds(pace) for job in jobs]
            busy, longest = sum(costs) / RANKS / seconds, max(costs)
            verdict = "yes" if busy >= 0.9 else "longest job" if seconds <= 1.001 * longest else "NO"
            rows.append([what, name, sum(job.rounds for job in jobs), sum(job.positions for job in jobs) / 1e9, seconds,
                         sum(costs) / RANKS, longest, busy, verdict if name.startswith("ours") else ""])
    return Table(f"{RANKS} simulated ranks: {len(lengths):,} documents, mean {lengths.mean():.0f}, longest "
                 f"{lengths.max():,} tokens, chunk 48, context 2048, 64 side by side", {
        "pace (latency in positions)": "", "schedule": "", "forwards": ",d", "G positions": ".3f", "s in all": ".1f",
        "s of work, a rank": ".1f", "s longest job": ".1f", "busy": ".1%", "90 %": ""}, rows,
        "padding of published counts as work; the whole model's own training between phases is left out; unless the "
        f"latency is known, `assign` takes it for {gpt.STEP_POSITIONS['cpu']:,.0f} positions on a CPU and for "
        f"{gpt.STEP_POSITIONS['cuda']:,.0f} on a GPU")


def chunks_table(tokens: np.ndarray, paces: dict[str, tuple[gpt.Pace, float]]) -> Table:
    """(c) Other chunk sizes by the length of the document; what they cost in bits, `bench ttt` measures."""
    config, rows = gpt.with_settings(gpt.load_config(["OVERLAY="], {}, gpus=0), RECORD), []
    for name, more in CHUNK_TABLES.items():
        stages, work = our_work(tokens, gpt.with_settings(config, more))
        jobs = sum(work, [])
        rows.append([name, sum(job.rounds for job in jobs), sum(job.positions for job in jobs) / 1e9,
                     *(value for pace, step_positions in paces.values() for value in
                       (assigned(stages, work, pace, step_positions), max(job.seconds(pace) for job in jobs)))])
    return Table(f"Chunks by length of the document, {RANKS} simulated ranks: seconds in all and of the longest job", {
        "chunk": "", "forwards": ",d", "G positions": ".3f",
        **{f"s {name}{what}": ".1f" for name in paces for what in ("", ", longest")}}, rows)


def bench_schedule(folders: list[Path], options: dict[str, Any]) -> Iterator[Table]:
    """The parts in order; paces are measured once."""
    parts, folder = options["PARTS"], folders[0] if folders else None
    if "padding" in parts:
        yield padding_table(folder)
    if {"ranks", "chunks"} & {*parts}:
        lengths = draw_lengths(options["DOCS"])
        tokens = make_stream(lengths)
        name, here = measured_pace(folder, options["ROWS"])
        paces = {name: (here, gpt.STEP_POSITIONS["cpu"])}
        paces |= {f"H100 ({latency:,})": (gpt.Pace(latency * H100_POSITION, H100_POSITION), gpt.STEP_POSITIONS["cuda"])
                  for latency in LATENCIES}
    if "ranks" in parts:
        yield ranks_table(tokens, lengths, paces)
    if "chunks" in parts:
        few = [next(iter(paces)), *(f"H100 ({latency:,})" for latency in (16384, 37000))]
        yield chunks_table(tokens, {name: paces[name] for name in few})


# ---- ttt and ngram: evaluators of a finished run, on texts of our choice


class Loaded(NamedTuple):
    """A finished run, ready to be scored: its settings, the model of its artifact, its data, where and by which clock
    (of the processor, where it computes)."""
    config: gpt.Config
    model: gpt.GPT
    data: gpt.Data
    tokenizer: Any
    world: gpt.World
    clock: Callable[[], float]

    def score(self, kind: str, text: gpt.Validation, settings: dict[str, Any],
              watch: Callable[[np.ndarray, torch.Tensor], None] | None = None) -> gpt.Score:
        """One evaluator's score of a text, with some settings changed."""
        config = gpt.with_settings(self.config, settings)
        guest = gpt.make_guest(kind, self.model, config, self.world)
        return gpt.score(kind, guest, text, config, self.world, self.clock, watch=watch)

    def text(self, documents: list[np.ndarray]) -> gpt.Validation:
        """Documents, each from its BOS on, as something that can be scored. The next BOS is a document's last target.
        BenchError where only the validation split's bytes are known."""
        rule = self.data.manifest["byte_rule"]
        if rule == "sidecar":
            raise BenchError(f"DATA_PATH={self.config.data.data_path}: counts the bytes of its validation split only "
                             "(byte_rule sidecar), so no other text can be scored")
        counter = gpt.make_byte_counter(self.tokenizer, rule)
        tokens = np.concatenate([*documents, [gpt.BOS]]).astype(np.int64)
        return gpt.Validation(tokens, np.concatenate([[0], counter(tokens[:-1], tokens[1:])]), len(documents),
                              self.data.val.lossless)


def load_run(folder: Path, words: list[str], lanes: int = 1, device: torch.device | None = None) -> Loaded:
    """The artifact of a run folder, as the stage evaluate reads it; ConfigError where it or the data is not there."""
    config = gpt.load_config([f"FROM={folder}", "STAGES=evaluate", *words], {})
    world = dataclasses.replace(gpt.World() if device else gpt.make_world({}), lanes=lanes)
    path, data = folder / "artifact.bin", gpt.load_data(config.data, world)
    facts, weights = gpt.load_artifact(path)
    if facts.get("tokenizer_sha256") != data.tokenizer_sha256:
        raise BenchError(f"DATA_PATH={config.data.data_path}: {path} was trained with another tokenizer")
    kernels, _ = gpt.pick_kernels(config.system.kernels, world.device, settings=config.model)
    model = gpt.make_model_from(facts, weights, kernels, gpt.pick_dtype(config.system.compute_dtype, world.device),
                                path).to(world.device)
    tokenizer = gpt.load_tokenizer(Path(config.data.tokenizer_path or Path(config.data.data_path) /
                                        data.manifest["tokenizer"]["path"]), config.data.vocab_size)
    return Loaded(config, model, data, tokenizer, world,
                  time.process_time if world.device.type == "cpu" else time.monotonic)


def split_documents(tokens: np.ndarray) -> list[np.ndarray]:
    """The documents of a stream, each from its BOS on; what stands before the first is left out."""
    return np.split(tokens, np.flatnonzero(tokens == gpt.BOS))[1:]


def training_documents(stream: gpt.TokenStream, count: int, chunk: int, block: int = 1 << 20) -> list[np.ndarray]:
    """The first `count` whole documents of the training stream that have two chunks or more; BenchError if there are
    fewer."""
    found, tokens, at = [], np.zeros(0, np.int64), 0
    while len(found) < count and at < len(stream):
        tokens = np.concatenate([tokens, stream.take(at, min(at + block, len(stream)))])
        at += block
        *whole, tokens = split_documents(tokens) or [tokens]
        found += [document for document in (whole if at < len(stream) else [*whole, tokens]) if len(document) > chunk]
    if len(found) < count:
        raise BenchError(f"DOCS={count}: the training stream has {len(found)} documents of more than {chunk} tokens")
    return found[:count]


# Setting -> what it is multiplied by, or what it is set to, one at a time; where no words say otherwise.
FACTORS = {"TTT_LORA_LR": (1 / 3, 3), "TTT_LORA_RANK": (0.5, 2), "TTT_LORA_ALPHA": (0.5, 2),
           "TTT_CHUNK_SIZE": (0.5, 2), "TTT_EVAL_SEQ_LEN": (0.5, 2)}
VALUES = {"TTT_SITES": ("q,k,v,attn,mlp,head", "q,v", "q,v,mlp,head", "mlp,head", "head", "q,k,v,o,up,down,head"),
          "TTT_BETA1": (0.0, 0.9), "TTT_BETA2": (0.95, 0.99, 0.999), "TTT_WEIGHT_DECAY": (0.0, 0.5, 2.0),
          "TTT_GRAD_STEPS": (1, 2), "TTT_POLYAK_DECAY": (0.0, 0.5, 0.9), "TTT_DOWN_LR": (0.0, 1e-4, 1e-3),
          "TTT_WARM_START_A": (0, 1), "PHASED_TTT_PREFIX_DOCS": (0, 8)}
GRID = ("TTT_LORA_LR", "TTT_LORA_ALPHA")  # of FACTORS, where GRID=1 has no words
TTT_NAMES = tuple(gpt.setting_name(field) for field in dataclasses.fields(gpt.TTTSettings))


def parse_sweep(words: list[str], own: dict[str, Any], grid: bool) -> dict[str, list[Any]]:
    """Setting -> values to try. `NAME=1,2,3`; values that hold commas themselves are parted by `/`."""
    if words:
        texts = dict(word.split("=", 1) for word in words)
        return {name: [gpt.parse_value(name, part) for part in
                       text.split("/" if "/" in text or isinstance(own[name], (tuple, str)) else ",")]
                for name, text in texts.items()}
    sweep = {name: [gpt.parse_value(name, type(own[name])(float(f"{own[name] * factor:.3g}"))) for factor in factors]
             for name, factors in FACTORS.items()}
    if grid:
        return {name: [own[name], *sweep[name]] for name in GRID}
    return sweep | {name: [gpt.parse_value(name, value) for value in values] for name, values in VALUES.items()}


def sweep_rows(sweep: dict[str, list[Any]], grid: bool) -> list[dict[str, Any]]:
    """The changes of each row: one setting after the other, or all combinations."""
    if grid:
        return [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]
    return [{name: value} for name, values in sweep.items() for value in values]


def bench_ttt(folders: list[Path], options: dict[str, Any]) -> Iterator[Table]:
    """First the base, then the run's own settings, then the sweep."""
    folder, grid = folders[0] if folders else newest_run(), bool(options["GRID"])
    held = load_run(folder, [], options["THREADS"])
    own = {name: value for name, value in held.config.flat().items() if name in TTT_NAMES}
    changes = sweep_rows(parse_sweep(options["words"], own, grid), grid)
    for change in changes if options["words"] else ():
        if fault := next((text.format(**config._asdict()) for config in [gpt.with_settings(held.config, change)]
                          for holds, text in gpt.RULES if not holds(config)), ""):
            raise BenchError(fault)
    chunk = held.config.ttt.ttt_chunk_size
    text = held.text(training_documents(held.data.train, options["DOCS"], chunk))
    # The same context before every target as test-time training has, so that the difference is what it learns.
    base = held.score("document", text, {"EVAL_SEQ_LEN": held.config.ttt.ttt_eval_seq_len, "EVAL_STRIDE": chunk})
    start, rows, seen = base.entry()["val_bpb"], [], {}
    rows.append(["document, nothing learned", start, 0.0, None, base.seconds, 0])
    for change in [{}, *changes]:
        config = gpt.with_settings(held.config, change)
        name = " ".join(f"{key}={gpt.show_value(value)}" for key, value in change.items()) or "as the run has it"
        if config.ttt in seen or not all(holds(config) for holds, _ in gpt.RULES):
            continue
        found = held.score("ttt", text, change)
        bpb = seen[config.ttt] = found.entry()["val_bpb"]
        rows.append([name, bpb, start - bpb, seen[held.config.ttt] - bpb, found.seconds, found.ledger["updates"]])
        print(f"{name}: {bpb:.4f} BPB, {found.seconds:.0f} s", file=sys.stderr, flush=True)
    best = min(rows, key=lambda row: row[1])
    yield Table(f"Test-time training of {folder} on training text: the first {options['DOCS']} documents of two chunks "
                f"or more, {len(text.tokens) - 1:,} targets, {text.bytes.sum():,} bytes", {
        "settings": "", "BPB": ".4f", "gain": "+.4f", "gain over the run's": "+.4f", "s": ".1f", "updates": ",d"}, rows,
        f"best: {best[0]}; the model has seen this text in training, so gains here only rank settings; declared modes "
        "(TTT_WARM_START_A, PHASED_TTT_PREFIX_DOCS) carry memory between documents")


# ---- ngram


CORPORA = ROOT.parent / "shared" / "corpora"
SUM_POSITIONS = 1000
COST_BLOCK, COST_PIECE = 4096, 512  # targets of a block, and of one prediction
FIVE_ORDERS = {"TOKEN_ORDER": "8,10,12,14,16", "TOKEN_THRESHOLD": "0.7,0.7,0.6,0.5,0.5", "TOKEN_BOOST": 2.0,
               "TOKEN_MIN_COUNT": "3,3,2,2,2", "TOKEN_BOOST_BY_SHARE": 1}
GATE_ROWS: dict[str, dict[str, Any]] = {**{name: {"NGRAM_GATE": name} for name in gpt.GATES},
                                        "tilt5": {"NGRAM_GATE": "tilt", **FIVE_ORDERS}}  # PR 1514
TEXTS = ("valid", "corpus", "order", "within")


class SumWatch:
    """Keeps the largest distance from one that offered probabilities sum to, in float64, at positions drawn once."""

    def __init__(self, targets: int) -> None:
        drawn = np.random.default_rng(0).choice(targets, min(SUM_POSITIONS, targets), replace=False)
        self.chosen, self.seen, self.off = np.zeros(targets + 1, bool), 0, 0.0
        self.chosen[drawn + 1] = True

    def __call__(self, at: np.ndarray, values: torch.Tensor) -> None:
        if len(rows := np.flatnonzero(self.chosen[at])):
            sums = values[torch.from_numpy(rows).to(values.device)].double().exp().sum(-1)
            self.seen, self.off = self.seen + len(rows), max(self.off, float((sums - 1).abs().max()))


def corpus_documents(held: Loaded) -> Iterator[np.ndarray]:
    """The documents of the shared corpus in the run's tokens, each from a BOS on; none where the corpus is not there.
    BenchError where its file is damaged."""
    try:
        for path in sorted(CORPORA.glob("*.jsonl.zst"))[:1]:
            for text in prepare.read_jsonl_zst(path, ""):
                tokens = prepare.encode_document(held.tokenizer, text, held.data.val.lossless)
                yield np.array([gpt.BOS, *tokens], np.int64)
    except prepare.DataError as error:
        raise BenchError(str(error)) from None


def cut(documents: Iterable[np.ndarray], tokens: int) -> list[np.ndarray]:
    """The first documents that hold at most so many tokens; the first itself is cut off if need be."""
    kept, left = [], tokens
    for document in documents:
        if kept and left < len(document):
            break
        kept.append(document[:tokens])
        left -= len(document)
    return kept


def make_texts(held: Loaded, names: list[str], documents: int, tokens: int) -> dict[str, gpt.Validation]:
    """The texts that there are: the validation split; documents of the shared corpus, those in another order, and
    those with their tokens shuffled within each."""
    rng, texts = np.random.default_rng(0), {}
    if "valid" in names:
        whole = len(held.data.val.tokens) <= tokens + 1
        texts["valid"] = held.data.val if whole else held.text(cut(split_documents(held.data.val.tokens), tokens))
    found = cut(itertools.islice(corpus_documents(held), documents), tokens) if {*names} - {"valid"} else []
    made = {"corpus": lambda: found, "order": lambda: [found[index] for index in rng.permutation(len(found))],
            "within": lambda: [np.concatenate([document[:1], rng.permutation(document[1:])]) for document in found]}
    return texts | {name: held.text(make()) for name, make in made.items() if name in names and found}


def gates_table(held: Loaded, folder: Path, texts: dict[str, gpt.Validation], gates: list[str], note: str) -> Table:
    """Bits per byte before and after, for each text and gate."""
    rows = []
    for where, text in texts.items():
        before = held.score("sliding", text, {})
        for gate in gates:
            if GATE_ROWS[gate]["NGRAM_GATE"] == "head" and not held.config.model.ngram_head:
                continue
            watch = SumWatch(len(text.tokens) - 1)
            after = held.score("ngram", text, GATE_ROWS[gate], watch)
            bits = [found.entry()["val_bpb"] for found in (before, after)]
            rows.append([where, text.documents, len(text.tokens) - 1, gate, *bits, bits[1] - bits[0], watch.off,
                         after.seconds - before.seconds, after.seconds])
            print(f"{where} {gate}: {bits[0]:.4f} -> {bits[1]:.4f} BPB, {after.seconds:.0f} s", file=sys.stderr,
                  flush=True)
    return Table(f"N-gram mixture with {folder}, blocks of {held.config.ngram.ngram_chunk_tokens:,}: bits per byte "
                 "before (sliding) and after", {
        "text": "", "documents": ",d", "targets": ",d", "gate": "", "before": ".4f", "after": ".4f", "change": "+.4f",
        f"|sum - 1| at {SUM_POSITIONS:,}": ".1e", "s more": ".1f", "s": ".1f"}, rows, note)


def blocks_table(held: Loaded, where: str, text: gpt.Validation, blocks: list[int]) -> Table:
    """Bits per byte by how many targets are scored between two updates of the counts."""
    before, rows = held.score("sliding", text, {}).entry()["val_bpb"], []
    for block in blocks:
        found = held.score("ngram", text, {"NGRAM_CHUNK_TOKENS": block})
        bits = found.entry()["val_bpb"]
        rows.append([block, found.ledger["updates"], before, bits, bits - before, found.seconds])
        print(f"{where}, blocks of {block}: {bits:.4f} BPB, {found.seconds:.0f} s", file=sys.stderr, flush=True)
    return Table(f"Blocks between updates: {where}, gate {held.config.ngram.ngram_gate}, stride "
                 f"{held.config.eval.eval_stride}", {
        "NGRAM_CHUNK_TOKENS": ",d", "updates": ",d", "before": ".4f", "after": ".4f", "change": "+.4f", "s": ".1f"},
        rows)


def store_bytes(tokens: np.ndarray, orders: tuple[int, ...], vocab_size: int) -> tuple[float, float]:
    """Bytes a token that the counts hold after these tokens, and at most while they were counted."""
    tracemalloc.start()
    store, before = gpt.NgramStore(orders, vocab_size), tracemalloc.get_traced_memory()[0]
    for start in range(0, len(tokens), COST_BLOCK):
        store.absorb(tokens[start:start + COST_BLOCK])
    now, peak = ((value - before) / len(tokens) for value in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    return now, peak


def cost_table(held: Loaded, millions: list[float]) -> Table:
    """Memory, and seconds without the model: its log-distributions are one random block, used again and again."""
    settings, vocab = held.config.ngram, held.config.data.vocab_size
    settings = dataclasses.replace(settings, ngram_gate="learned") if settings.ngram_gate == "head" else settings
    wanted, stream, rows = round(1e6 * max(millions)), held.data.train, []
    tokens = stream.take(0, min(wanted, len(stream)))
    for document in corpus_documents(held) if len(tokens) < wanted else ():
        tokens = np.concatenate([tokens, document]) if len(tokens) < wanted else tokens
        if len(tokens) >= wanted:
            break
    logits = torch.randn(COST_BLOCK, vocab, generator=torch.Generator().manual_seed(0)).mul(3).log_softmax(-1)
    for count in sorted({min(round(1e6 * value), len(tokens)) for value in millions}):
        mixture, spent = gpt.NgramMixture(settings, vocab, tokens[:1]), [0.0, 0.0]
        for start in range(1, count, COST_BLOCK):
            block, notes, began = tokens[start:min(start + COST_BLOCK, count)], [], time.process_time()
            for first in range(0, len(block), COST_PIECE):
                stop = min(first + COST_PIECE, len(block))
                context = tokens[max(0, start + first - 64):start + stop - 1]
                notes.append(mixture.predict(context, logits[first:stop])[1])
            told = np.concatenate(notes)
            told[:, 0] = -4.0
            between = time.process_time()
            mixture.absorb_block(block, told)
            spent = [spent[0] + between - began, spent[1] + time.process_time() - between]
        rows.append([count, sum(spent), *spent, 1e6 * sum(spent) / count,
                     *store_bytes(tokens[:count], gpt.orders_of(settings), vocab)])
    return Table(f"Cost of the mixture without the model: gate {settings.ngram_gate}, blocks of {COST_BLOCK:,}, "
                 f"predictions of {COST_PIECE}, vocabulary {vocab:,}", {
        "targets": ",d", "s": ".1f", "s predict": ".1f", "s absorb": ".1f", "us a target": ".1f",
        "bytes a token": ".1f", "at peak": ".1f"}, rows,
        f"only {len(tokens):,} tokens are there" if len(tokens) < wanted else "")


def bench_ngram(folders: list[Path], options: dict[str, Any]) -> Iterator[Table]:
    """The parts in order."""
    folder, parts = folders[0] if folders else newest_run(), options["PARTS"]
    held = load_run(folder, ["EVAL=sliding,ngram", *options["words"]], options["THREADS"])
    texts = {}
    if {"gates", "blocks"} & {*parts}:
        texts = make_texts(held, options["TEXTS"], options["DOCS"], options["TOKENS"])
    absent = [name for name in options["TEXTS"] if name not in texts]
    notes = [f"no corpus in {CORPORA}: {', '.join(absent)} left out"] if absent else []
    if "head" in options["GATES"] and not held.config.model.ngram_head:
        notes.append("trained without NGRAM_HEAD: gate head left out")
    if "gates" in parts:
        yield gates_table(held, folder, texts, options["GATES"], "; ".join(notes))
    if "blocks" in parts:
        for where, text in [*texts.items()][:1]:
            yield blocks_table(held, where, text, options["BLOCKS"])
    if "cost" in parts:
        yield cost_table(held, options["MILLIONS"])


# ---- generate

GENERATE_ROWS: dict[str, dict[str, Any]] = {  # the same greedy text, made otherwise
    "plain": {}, "packed": {"packed": True}, "drafts": {"speculate": 8},
    "packed, drafts": {"packed": True, "speculate": 8}}
NEAR = 128  # tokens at most that are read behind a place, by turns with the other places


def speeds_at(reader: generate.Reader, text: list[int], places: list[int],
              clock: Callable[[], float] = time.perf_counter) -> list[float | None]:
    """Tokens a second that a fresh reader reads behind places of a text, one by one; None where the text ends before.
    The places take turns, token by token, so that what else the machine does meets all of them."""
    readers, begin = {}, 0
    for place in sorted({place for place in places if place < len(text)}):
        reader.read(text[begin:place], 1)
        readers[place], begin = reader.copy(), place
    spent: dict[int, list[float]] = {place: [] for place in readers}
    for step in range(min(NEAR, len(text) - max(readers, default=0))):
        for place, own in readers.items():
            began = clock()
            own.read(text[place + step:place + step + 1], 1)
            spent[place].append(clock() - began)
    return [1 / statistics.median(spent[place]) if place in spent else None for place in places]


def bench_generate(folders: list[Path], options: dict[str, Any]) -> Iterator[Table]:
    """Greedy text of each artifact in all rows of GENERATE_ROWS."""
    rows, places = [], list(dict.fromkeys(options["AT"]))
    for folder in folders or [newest_run()]:
        first: list[int] = []
        for name, changes in GENERATE_ROWS.items():
            wanted = generate.Options(tokens=options["TOKENS"], greedy=True, ignore_eos=True, **changes)
            held = generate.load(folder, options["words"], wanted.packed)
            if wanted.packed and held.packing is None:
                continue  # no ternary matrix
            meter = generate.Meter()
            prompt = generate.encode_prompt(held.tokenizer, options["PROMPT"])
            made = generate.generate(held, prompt, wanted, lambda token: None, meter)
            found, first = generate.measure(meter, held), first or made
            speeds = [None] * len(places) if wanted.speculate else speeds_at(
                generate.make_reader(held, wanted.mode, lambda line: None), prompt + made, places)
            rows.append([
                held.config.run.preset, held.config.model.stack, name, "same" if made == first else "OTHER",
                found["tokens_per_second"], *speeds, speeds[-1] / speeds[0] if all(speeds) else None,
                found["accepted"] / found["drafted"] if found["drafted"] else None, found["model_bytes"],
                held.packing and held.packing.share, found["state_bytes"]])
            print(f"{folder}: {name}: {found['tokens_per_second'] or 0:,.1f} tokens a second", file=sys.stderr,
                  flush=True)
    columns = {"preset": "", "stack": "", "as": "", "text": "", "tokens/s": ",.1f",
               **{f"at {place}": ",.1f" for place in places}, "last / first": ".3f", "drafts taken": ".0%",
               "model bytes": ",d", "packed / bf16": ".3f", "state bytes": ",d"}
    yield Table(f"Greedy text of {options['TOKENS']} tokens from each artifact", columns, rows,
                f"at n: the median of up to {NEAR} tokens behind token n, read by turns with the other places; text: "
                "against the first row of the same artifact; packed / bf16: bytes of the ternary matrices; state: what "
                "is kept of the text at its end")


# ---- command line


class Option(NamedTuple):
    """An option: its default, how its text is read, the rule that the value must keep, help; whether words add up."""
    default: Any
    read: Callable[[str], Any]
    keeps: Callable[[Any], bool]
    rule: str
    text: str
    adds: bool = False

    def parse(self, text: str) -> Any:
        """The value, or ValueError with the rule."""
        with contextlib.suppress(ValueError):
            if self.keeps(value := self.read(text)):
                return value
        raise ValueError(f"must be {self.rule}")


def count_option(default: int, text: str) -> Option:
    return Option(default, int, lambda value: value > 0, "a whole number of at least 1", text)


def flag_option(text: str) -> Option:
    return Option(0, int, lambda value: value in (0, 1), "0 or 1", f"1 {text}")


def names_option(known: Iterable[str], text: str) -> Option:
    """A list of names or patterns; the value is what they match, in the order of `known`, nothing if one is unknown."""
    known = list(known)

    def read(words: str) -> list[str]:
        matches = [{name for name in known if fnmatchcase(name, word)} for word in words.split(",")]
        return [name for name in known if all(matches) and name in set().union(*matches)]

    return Option(known, read, bool, f"some of {', '.join(known)}", f"{text}: {', '.join(known)}")


def numbers_option(default: list, read: Callable[[str], Any], text: str) -> Option:
    """A list of numbers above 0."""
    return Option(default, lambda words: list(map(read, words.split(","))), lambda values: all(0 < v for v in values),
                  "numbers above 0, parted by commas", text)


class Command(NamedTuple):
    """A command: what makes its tables, how many run folders it takes, its options; settings of train_gpt.py that it
    takes as words, files that a folder must have, and the file in records/ that keeps its tables by itself."""
    tables: Callable[[list[Path], dict[str, Any]], Iterator[Table]]
    most_folders: int
    options: dict[str, Option]
    settings: Iterable[str] = ()
    needs: tuple[str, ...] = ("config.json", "checkpoint.pt")
    record: str = ""


ARTIFACT = ("config.json", "artifact.bin")
LANES = count_option(1, "lanes of one thread each")
USUAL = gpt.SETTINGS["PRESET"][1].default
TERMS = {  # of a paired comparison
    "SEEDS": Option([1, 2, 3], lambda text: list(map(int, text.split(","))),
                    lambda seeds: min(seeds) >= 0 and len({*seeds}) == len(seeds),
                    "different whole numbers of at least 0, parted by commas", "seeds, each run for all"),
    "SECONDS": count_option(150, "of training"),
    "BYTES": count_option(1_000_000, "of code and model, which set the shape"),
    "FIT_BITS": Option(3.75, float, lambda bits: 0 < bits <= 32, "a number above 0 and at most 32",
                       "bits a weight that the shape is made for where FIT chooses the steps")}


def suite_command(name: str, suite: compare.Suite) -> Command:
    """The command of rows that belong together."""
    return Command(lambda _, options: itertools.starmap(Table, compare.parts(options, suite=suite)), 0, {
        "BASE": Option(suite.base, str, gpt.PRESETS.__contains__, f"one of {', '.join(gpt.PRESETS)}",
                       "what is changed"),
        "ROWS": names_option(suite.rows, "rows, also as patterns")._replace(default=[]),
        "ROW": Option([], compare.read_row, bool, "NAME: SETTING=value ...", "a row of your own, once for each", True),
        "EVAL": names_option(gpt.EVALUATORS, "evaluators")._replace(default=["contiguous"]),
        **TERMS, "SECONDS": count_option(suite.seconds, "of training"),
        "BYTES": count_option(suite.size, "of code and model, which set the shape"),
        "MINUTES": count_option(suite.minutes, "in which the last run ends; the same command goes on")},
        gpt.SETTINGS, (), f"compare_{name}.json")


SHARE_RULE = (lambda values: all(0 < value <= 1 for value in values), "above 0 and at most 1")
COMMANDS = {
    "gptq": Command(bench_gptq, 0, {"REPEATS": count_option(20, "draws, and repetitions of what is timed")}),
    "codec": Command(bench_codec, 1, {
        "PARTS": names_option(("gaussian", "run", "speed", "ternary"), "tables"),
        "CODEC": names_option((*OURS, *(name for name in gpt.CODECS if name not in OURS)), "coders"),
        "REPEATS": count_option(5, "repetitions of what is timed"),
        "SHARE": Option([1.0], lambda text: [float(text)], *SHARE_RULE, "how much of the made-up matrices")}),
    "formats": Command(bench_formats, 99, {
        "ROWS": names_option((name for name in ROWS if name not in SLOW.values()), "rows, also as patterns"),
        "TERNARY": flag_option("adds ternary-qat: trained with the run's own settings, ternary from half-way on"),
        "SELF": flag_option("adds int6-gptq-self: calibrated on text that the model samples, slowly")},
        gpt.SETTINGS),
    "fit": Command(bench_fit, 99, {
        "CAPS": Option([0.55, 0.8], lambda text: list(map(float, text.split(","))), *SHARE_RULE,
                       "shares of the int8 model")}, gpt.SETTINGS),
    "schedule": Command(bench_schedule, 1, {
        "PARTS": names_option(("padding", "ranks", "chunks"), "tables"),
        "DOCS": count_option(50_000, "simulated documents"),
        "ROWS": count_option(4, "documents side by side where the pace is measured")}, (), ARTIFACT),
    "ttt": Command(bench_ttt, 1, {
        "DOCS": count_option(24, "training documents"),
        "GRID": flag_option("tries all combinations; without words some of TTT_LORA_LR and TTT_LORA_ALPHA"),
        "THREADS": LANES}, TTT_NAMES, ARTIFACT, "ttt_sweep.json"),
    "ngram": Command(bench_ngram, 1, {
        "PARTS": names_option(("gates", "blocks", "cost"), "tables"),
        "GATES": names_option(GATE_ROWS, "gates"),
        "TEXTS": names_option(TEXTS, "validation, shared corpus, the same reordered, and shuffled within documents"),
        "DOCS": count_option(100, "documents of the shared corpus"),
        "TOKENS": count_option(10 ** 9, "the most tokens of a text, in whole documents"),
        "BLOCKS": numbers_option([256, 1024, 4096, 16384, 65536], int, "block sizes, on the first text"),
        "MILLIONS": numbers_option([1.0, 2.0, 5.0], float, "million tokens of the part cost"),
        "THREADS": LANES}, gpt.SETTINGS, ARTIFACT, "ngram.json"),
    "generate": Command(bench_generate, 99, {
        "TOKENS": count_option(4200, "made for each row"),
        "AT": numbers_option([500, 4000], int, "places in the text where its speed is shown"),
        "PROMPT": Option("The ", str, lambda text: True, "a text", "what the text follows")},
        generate.SETTINGS, ARTIFACT, "generate.json"),
    "presets": Command(lambda _, options: itertools.starmap(Table, compare.presets(options)), 0, {
        "PRESETS": names_option(gpt.PRESETS, "systems"),
        "BASE": Option("", str, bool, "a preset", f"the one that is compared with the others; {USUAL}, else the last"),
        "EVAL": names_option(gpt.EVALUATORS, "evaluators")._replace(default=["contiguous", "sliding", "ttt"]),
        **TERMS, "MINUTES": count_option(75, "in which the last run ends; the same command goes on")},
        gpt.SETTINGS, (), "compare_presets.json"),
    **{name: suite_command(name, suite) for name, suite in compare.SUITES.items()},
    "speed": Command(lambda _, options: itertools.starmap(Table, speed.tables(options)), 0, {
        "PARTS": names_option(speed.PARTS, "tables beside the ceilings"),
        "COMPILED": Option("", str, lambda text: text in ("0", "1", "both"), "0, 1 or both",
                           "torch.compile; default: as training has it, on a GPU both"),
        "REPEATS": count_option(0, "repetitions of what is timed; default 10 on a GPU, 5 on a CPU"),
        "BUDGET_SECONDS": Option(150.0, float, lambda seconds: seconds > 0, "a number above 0",
                                 "for all; what does not fit is left out and says so"),
        "DOCUMENT_TOKENS": Option(1000.0, float, lambda tokens: tokens >= 4, "a number of at least 4",
                                  "of the random documents, on average")}, gpt.SETTINGS)}


def parse(argv: list[str]) -> tuple[Command, list[Path], dict[str, Any], Path | None]:
    """The command, its run folders, its options and the JSON file; raises BenchError."""
    if not argv or argv[0] not in COMMANDS:
        raise BenchError(f"bench {argv[0] if argv else ''}: must be followed by one of {', '.join(COMMANDS)}")
    command, folders, out, words = COMMANDS[argv[0]], [], None, iter(argv[1:])
    options: dict[str, Any] = {name: option.default for name, option in command.options.items()} | {"words": []}
    for word in words:
        name, equals, text = word.partition("=")
        if word == "--json":
            out = Path(next(words, ""))
            if not out.name or not out.parent.is_dir():
                raise BenchError(f"--json {out}: must be a file in a folder that is there")
        elif equals and name in command.options:
            try:
                value = command.options[name].parse(text)
                options[name] = options[name] + value if command.options[name].adds else value
            except ValueError as error:
                raise BenchError(f"{word}: {error}") from None
        elif equals and name in command.settings:
            options["words"].append(word)
        elif equals or word.startswith("-"):
            raise BenchError(f"{word}: must be one of {', '.join(command.options)}, --json FILE"
                             + (", or a setting of train_gpt.py" if command.settings else ""))
        else:
            folders.append(Path(word))
    for index, folder in enumerate(folders):
        if index == command.most_folders:
            raise BenchError(f"{folder}: bench {argv[0]} takes {command.most_folders or 'no'} run folder")
        if not all((folder / name).exists() for name in command.needs):
            raise BenchError(f"{folder}: must be a run folder with {' and '.join(command.needs)}")
    return command, folders, options, out


def main(argv: list[str]) -> int:
    """Prints the tables of one command; returns the exit code: 0, or 2 after one line for every mistake."""
    if {"-h", "--help"} & set(argv):
        print(__doc__ + "\n".join(f"    {name:<9}{key:<16}{option.text}" for name, command in COMMANDS.items()
                                  for key, option in command.options.items()))
        return 0
    torch.set_num_threads(1)
    facts, tables, out = machine(), [], None
    try:
        command, folders, options, out = parse(argv)
        print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
        for table in command.tables(folders, options):
            tables.append(table.json())
            print(table.text(), flush=True)
        if command.record and not out:
            out = ROOT / "records" / command.record
    except (BenchError, gpt.ConfigError, gpt.CheckError) as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        if out:
            out.write_text(json.dumps({"machine": facts, "tables": tables}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
