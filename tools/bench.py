"""Benchmarks of the squeeze: what stands in one table was measured side by side, in one run, on the machine it names.

    ./run.sh bench gptq                       error of gptq over nearest rounding, and its seconds
    ./run.sh bench codec [RUN_FOLDER]         entropy coders: bytes against the ideal and against rivals, and speed
    ./run.sh bench formats [RUN_FOLDER ...]   a finished run squeezed with other settings, each artifact scored; runs
                                              after the first are added as their own settings have them
    ./run.sh bench fit [RUN_FOLDER ...]       FIT=1 at shares of the size of the run's int8 model

Without a folder it is the newest finished one in runs/ that was trained without QAT. `--json FILE` keeps the tables as
JSON too. `formats` and `fit` hand settings of train_gpt.py on to every launch. Seconds of `gptq` and `codec` are the
processor's, on one thread, medians; the spread is that from fastest to slowest over the median. Options:

"""

from __future__ import annotations

import contextlib
import dataclasses
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
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # seconds of one core: read when numpy is loaded

import numpy as np  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt as gpt  # noqa: E402

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
    kernels, _ = gpt.pick_kernels("reference", torch.device("cpu"))
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


# ---- command line


class Option(NamedTuple):
    """An option: its default, how its text is read, the rule that the value must keep, help."""
    default: Any
    read: Callable[[str], Any]
    keeps: Callable[[Any], bool]
    rule: str
    text: str

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


class Command(NamedTuple):
    """A command: what makes its tables, how many run folders it takes, its options, if launches get other settings."""
    tables: Callable[[list[Path], dict[str, Any]], Iterator[Table]]
    most_folders: int
    options: dict[str, Option]
    launches: bool = False


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
        "SELF": flag_option("adds int6-gptq-self: calibrated on text that the model samples, slowly")}, True),
    "fit": Command(bench_fit, 99, {
        "CAPS": Option([0.55, 0.8], lambda text: list(map(float, text.split(","))), *SHARE_RULE,
                       "shares of the int8 model")}, True)}


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
                options[name] = command.options[name].parse(text)
            except ValueError as error:
                raise BenchError(f"{word}: {error}") from None
        elif equals and command.launches and name in gpt.SETTINGS:
            options["words"].append(word)
        elif equals or word.startswith("-"):
            raise BenchError(f"{word}: must be one of {', '.join(command.options)}, --json FILE"
                             + (", or a setting of train_gpt.py" if command.launches else ""))
        else:
            folders.append(Path(word))
    for index, folder in enumerate(folders):
        if index == command.most_folders:
            raise BenchError(f"{folder}: bench {argv[0]} takes {command.most_folders or 'no'} run folder")
        if not all((folder / name).exists() for name in ("config.json", "checkpoint.pt")):
            raise BenchError(f"{folder}: must be a run folder with config.json and checkpoint.pt")
    return command, folders, options, out


def main(argv: list[str]) -> int:
    """Prints the tables of one command; returns the exit code: 0, or 2 after one line for every mistake."""
    if {"-h", "--help"} & set(argv):
        print(__doc__ + "\n".join(f"    {name:<9}{key:<9}{option.text}" for name, command in COMMANDS.items()
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
    except (BenchError, gpt.ConfigError, gpt.CheckError) as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        if out:
            out.write_text(json.dumps({"machine": facts, "tables": tables}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
