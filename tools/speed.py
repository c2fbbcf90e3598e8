"""Speed of a preset on this machine: ceilings, training step, kernels, optimizer.

`./run.sh bench speed` prints its tables through tools/bench.py. What is timed is what training runs: the step is
Trainer.gradients and Optimizer.step on random tokens in documents of realistic lengths, so no dataset is needed;
kernels are the rows of train_gpt.KERNELS, whatever they are, at the size of a micro-batch. Peaks are measured in the
same run, not taken from a data sheet. Seconds are the clock's (a GPU's events), medians; the spread is that from
fastest to slowest over the median. A row that fails or does not fit the budget says so in its note, and the others
follow.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import train_gpt as gpt  # noqa: E402

Fields = tuple[str, dict[str, str], list[list[Any]], str]  # of a bench.Table: title, columns with formats, rows, note

PARTS = ("step", "kernels", "optimizer")
MATRIX_SIDE = {"cuda": 8192, "cpu": 2048}  # of the product that measures the peak
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}  # far more than a cache
ROW_SHARE = 0.1  # of the budget for the repetitions of one timing
REFERENCE_SHARE = 0.02  # of the budget for one call of a reference; a larger one is measured at a smaller size
MEMORY_SHARE = 0.6  # of the free memory that a reference may need


# ---- timing


class Skipped(Exception):
    """A measurement that does not fit the budget any more."""


class Timing(NamedTuple):
    """Seconds of one call: median, spread from fastest to slowest over the median, fastest; how many calls that is
    of; seconds of the very first call, and of the host until it had queued a call (a GPU only)."""
    median: float
    spread: float
    best: float
    runs: int
    first: float
    host: float | None


class Meter:
    """Times work on a device, at most `repeats` times, and keeps the whole within `seconds`."""

    def __init__(self, device: torch.device, repeats: int, seconds: float) -> None:
        self.gpu, self.repeats, self.seconds = device.type == "cuda", repeats, seconds
        self.began = time.perf_counter()

    def left(self) -> float:
        """Seconds left of the budget; negative when it is overdrawn."""
        return self.seconds - (time.perf_counter() - self.began)

    def check(self, expected: float = 0.0) -> None:
        """Raises Skipped where the budget does not hold `expected` seconds more."""
        if (left := self.left()) <= 0:
            raise Skipped(f"left out: BUDGET_SECONDS={self.seconds:g} is spent")
        if left < expected:
            raise Skipped(f"left out: needs about {expected:.0f} s, {left:.0f} of BUDGET_SECONDS={self.seconds:g} "
                          "are left")

    def wait(self) -> None:
        """Until the device has done all it was given."""
        if self.gpu:
            torch.cuda.synchronize()

    def call(self, work: Callable[[], Any]) -> float:
        """Seconds of one call by the clock, until its results are there."""
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began

    def time(self, work: Callable[[], Any], apart: bool = False, more: int = 1, compiled: bool = False) -> Timing:
        """A first call, a second one on a GPU or where the first one compiled, then as many as the budget has room for,
        one at least. On a GPU the timed calls are queued behind each other, so that short ones do not wait for the
        host; `apart` waits after each, so that the host's seconds are its own. At most `more` times the usual
        repetitions are made."""
        first = self.call(work)
        usual = self.call(work) if self.gpu or compiled else first
        room = min(self.left(), ROW_SHARE * self.seconds)
        runs = max(1, min(more * self.repeats, int(room / max(usual, 1e-9))))
        if not self.gpu:
            spent, host = [self.call(work) for _ in range(runs)], None
        else:
            marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
            queued = []
            for start, stop in marks:
                began = time.perf_counter()
                start.record()
                work()
                stop.record()
                queued.append(time.perf_counter() - began)
                if apart:
                    self.wait()
            self.wait()
            spent, host = [start.elapsed_time(stop) / 1000 for start, stop in marks], statistics.median(queued)
        spent = [max(seconds, 1e-9) for seconds in spent]
        median = statistics.median(spent)
        return Timing(median, (max(spent) - min(spent)) / median, min(spent), runs, first, host)


def free_bytes(device: torch.device) -> int:
    """Memory that the device has left."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    with contextlib.suppress(OSError):
        if found := re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text()):
            return 1024 * int(found[1])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def reset_peak(device: torch.device) -> None:
    """Begin to count the peak anew; where a CPU's system does not let us, the peak stays that of the process."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int | None:
    """The most memory since reset_peak: what torch has allocated on a GPU, what the process holds on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            return 1024 * int(found[1])
    return None


# ---- work: what an operation must do, whatever does it


class Work(NamedTuple):
    """Floating-point operations and bytes that an operation cannot do without, forward alone and with its backward;
    then what its reference does on the way: operations of both passes, and bytes it holds at most.

    Bytes: forward reads the inputs and writes the output, backward reads the inputs and the output's gradient and
    writes the inputs' gradients, each once. What a form keeps between the two, or computes again, is its own affair.
    """
    flops: float
    bytes: float
    flops_both: float
    bytes_both: float
    reference_flops: float
    reference_bytes: float

    def floor(self, ceiling: Ceiling, both: bool) -> float:
        """Seconds that a pass, or both, take at least."""
        flops, size = (self.flops_both, self.bytes_both) if both else (self.flops, self.bytes)
        return max(flops / ceiling.flops, size / ceiling.bytes)

    def bound(self, ceiling: Ceiling) -> str:
        """Which of the two makes the floor of both passes."""
        return "FLOP" if self.flops_both / ceiling.flops > self.bytes_both / ceiling.bytes else "bytes"


class Ceiling(NamedTuple):
    """The machine's peaks, measured: operations and bytes a second."""
    flops: float
    bytes: float


def visible_pairs(starts: np.ndarray) -> int:
    """Pairs of a query and a key it may see, of spans that begin at `starts` (S + 1,): l (l + 1) / 2 a span."""
    sizes = np.diff(np.asarray(starts, np.int64))
    return int((sizes * (sizes + 1) // 2).sum())


def attention_work(pairs: int, rows: int, length: int, heads: int, kv_heads: int, channels: int, size: int) -> Work:
    """Two products a pair and head forward (scores, sums of values), four backward (both factors of both). The
    reference fills whole (T, T) squares, and holds about six of them in fp32."""
    tokens, square = rows * length, rows * heads * length * length
    q, kv = tokens * heads * channels * size, tokens * kv_heads * channels * size
    return Work(4 * heads * channels * pairs, 2 * q + 2 * kv, 12 * heads * channels * pairs, 5 * q + 6 * kv,
                12 * channels * square, 6 * 4 * square)


def mean_nats_work(tokens: int, width: int, vocab: int, size: int) -> Work:
    """One product of (N, D) and (V, D) forward, two backward; the embedding is in fp32. A scalar's gradient can be made
    on the way forward, so backward reads nothing again. The reference holds about five (N, V) in fp32."""
    flops, read = 2 * tokens * width * vocab, tokens * width * size + 4 * vocab * width + 8 * tokens
    return Work(flops, read, 3 * flops, 2 * read - 8 * tokens, 3 * flops, 5 * 4 * tokens * vocab)


def mlp_work(tokens: int, width: int, hidden: int, size: int) -> Work:
    """Two products of (N, D) and (F, D) forward, four backward; the matrices are in fp32. The reference holds about
    five (N, F)."""
    flops, stream, matrices = 4 * tokens * width * hidden, tokens * width * size, 8 * width * hidden
    return Work(flops, 2 * stream + matrices, 3 * flops, 5 * stream + 3 * matrices, 3 * flops,
                5 * size * tokens * hidden)


def orthogonalize_flops(count: int, rows: int, columns: int, steps: int) -> int:
    """Of train_gpt.orthogonalize: an iteration is a gram matrix, its square, and a product with the matrix."""
    small, large = min(rows, columns), max(rows, columns)
    return count * steps * (4 * small * small * large + 2 * small ** 3)


ADAMW_BYTES = 7 * 4  # a parameter in fp32: itself, gradient and two averages are read, all but the gradient written


# ---- inputs


def document_stream(count: int, vocab_size: int, mean: float, seed: int = 0) -> gpt.TokenStream:
    """`count` random tokens in documents of log-normal lengths with this mean; a deviation of 1 in the logarithm is
    about that of the challenge's documents, whose median is 0.6 of the mean."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(gpt.BOS + 3, vocab_size, count).astype(np.uint16)
    sizes = np.maximum(2, np.rint(rng.lognormal(math.log(mean) - 0.5, 1.0, 16 + 8 * math.ceil(count / mean))))
    starts = np.concatenate([[0], sizes.astype(np.int64).cumsum()])
    tokens[starts[starts < count]] = gpt.BOS
    return gpt.TokenStream([tokens])


Inputs = tuple[Any, ...]


class Case(NamedTuple):
    """An operation at one size: the size in words, its work, which inputs get gradients, and what draws the inputs, for
    the reference and again for twins that want packed rows: the same values, rows behind each other."""
    size: str
    work: Work
    moving: tuple[int, ...]
    draw: Callable[[], tuple[Inputs, Inputs]]


class Place(NamedTuple):
    """What a case is made for: configuration, device, dtype, rows and their length, mean length of documents."""
    config: gpt.Config
    device: torch.device
    dtype: torch.dtype
    rows: int
    length: int
    documents: float

    def normal(self, seed: int, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Random values, the same at every call with this seed."""
        generator = torch.Generator(self.device).manual_seed(seed)
        drawn = torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32)
        return drawn.mul_(scale).to(dtype or self.dtype)


def attention_case(place: Place) -> Case:
    """Rows of a micro-batch with the heads of the first block; documents end with their row."""
    plan = gpt.plan_blocks(place.config.model)[0]
    rows, length, channels = place.rows, place.length, place.config.model.model_dim // plan.heads
    docs = np.zeros((rows, length), np.int32)
    if place.config.data.doc_isolation:
        tokens = document_stream(rows * length, place.config.data.vocab_size, place.documents).take(0, rows * length)
        docs = gpt.document_index(torch.from_numpy(tokens.reshape(rows, length))).numpy()
    spans = gpt.row_spans(docs, place.device)
    work = attention_work(visible_pairs(spans.starts.cpu().numpy()), rows, length, plan.heads, plan.kv_heads, channels,
                          place.dtype.itemsize)

    def draw() -> tuple[Inputs, Inputs]:
        parts = [place.normal(seed, rows, length, heads, channels) for seed, heads in
                 enumerate((plan.heads, plan.kv_heads, plan.kv_heads))]
        held = torch.from_numpy(docs).to(place.device) if place.config.data.doc_isolation else None
        return (*parts, gpt.attention_mask(held, torch.Size(docs.shape))), (
            *(part.flatten(0, 1)[None] for part in parts), spans)

    return Case(f"{rows}x{length}, {plan.heads}/{plan.kv_heads} heads of {channels}", work, (0, 1, 2), draw)


def mean_nats_case(place: Place) -> Case:
    """All targets of a micro-batch."""
    model, vocab = place.config.model, place.config.data.vocab_size
    tokens, width = place.rows * place.length, model.embed_dim or model.model_dim

    def draw() -> tuple[Inputs, Inputs]:
        cap = model.logit_softcap
        bound = torch.full((2,), cap, device=place.device) if model.asym_logit_rescale else cap
        targets = torch.from_numpy(document_stream(tokens, vocab, place.documents).take(0, tokens)).to(place.device)
        inputs = (place.normal(0, tokens, width),
                  place.normal(1, vocab, width, scale=width ** -0.5, dtype=torch.float32), targets, bound)
        return inputs, inputs

    return Case(f"{tokens}x{width}, vocabulary {vocab}", mean_nats_work(tokens, width, vocab, place.dtype.itemsize),
                (0, 1, 3) if model.asym_logit_rescale else (0, 1), draw)


def mlp_case(place: Place) -> Case:
    """The feed-forward of the first block on a micro-batch."""
    model, hidden = place.config.model, gpt.plan_blocks(place.config.model)[0].hidden
    tokens, width = place.rows * place.length, model.model_dim

    def draw() -> tuple[Inputs, Inputs]:
        inputs = (place.normal(0, place.rows, place.length, width),
                  place.normal(1, hidden, width, scale=width ** -0.5, dtype=torch.float32),
                  place.normal(2, width, hidden, scale=hidden ** -0.5, dtype=torch.float32), model.mlp_slope)
        return inputs, inputs

    return Case(f"{tokens}x{width}, hidden {hidden}", mlp_work(tokens, width, hidden, place.dtype.itemsize), (0, 1, 2),
                draw)


def recurrence_work(name: str, tokens: int, heads: int, key: int, value: int, gates: int) -> Work:
    """A token's state is written with a product of its key and what it adds, and read once; the deep memory has two
    matrices and a forward and a backward of its own. Backward twice that. All in fp32. The reference keeps every
    state."""
    hidden = 2 * key
    state, passes = (hidden * (key + value), 6) if name == "deep" else (key * value, {"titans": 4}.get(name, 3))
    flops, each = 2 * tokens * heads * passes * state, 4 * tokens * heads * (2 * key + value + gates)
    return Work(flops, each + 4 * tokens * heads * value, 3 * flops, 3 * each + 8 * tokens * heads * value, 3 * flops,
                6 * 4 * tokens * heads * state)


def recurrence_case(place: Place, name: str) -> Case:
    """Rows of a micro-batch with the heads of the first block that has this recurrence; documents end within rows."""
    letters = {letter for letter, operation in gpt.MIXER_KERNELS.items()
               if operation == ("titans" if name == "deep" else name)}
    plan = next(plan for plan in gpt.plan_blocks(place.config.model) if plan.letter in letters)
    rows, length, heads, key, value = place.rows, place.length, plan.heads, plan.key, plan.value
    docs = None
    if place.config.data.doc_isolation:
        tokens = document_stream(rows * length, place.config.data.vocab_size, place.documents).take(0, rows * length)
        docs = gpt.document_index(torch.from_numpy(tokens.reshape(rows, length)))

    def draw() -> tuple[Inputs, Inputs]:
        parts = [place.normal(seed, rows, length, heads, channels) for seed, channels in enumerate((key, key, value))]
        parts[:2] = [torch.nn.functional.normalize(part.float(), dim=-1).to(part.dtype) for part in parts[:2]]
        raw = [place.normal(3 + seed, rows, length, heads, dtype=torch.float32) for seed in range(3)]
        shares = [part.sigmoid() for part in raw]
        gates = {"delta": [shares[0], -shares[1]], "mlstm": raw[:2],
                 "titans": [1 - shares[0] / 10, shares[1], shares[2]],
                 "deep": [1 - shares[0] / 10, shares[1], shares[2] / place.config.model.mixer_chunk,
                          place.normal(6, heads, 2 * key, key, scale=key ** -0.5, dtype=torch.float32),
                          place.normal(7, heads, value, 2 * key, scale=key ** -0.5, dtype=torch.float32)]}[name]
        more = (None, place.config.model.mixer_chunk)
        where = docs if docs is None else docs.to(place.device)
        spans = gpt.row_spans(np.zeros((rows, length), np.int32) if docs is None else docs.numpy(), place.device)
        packed = [part.flatten(0, 1)[None] if part.shape[:2] == (rows, length) else part for part in (*parts, *gates)]
        return (*parts, *gates, where, *more), (*packed, spans, *more)

    moving = 3 + {"delta": 2, "mlstm": 2, "titans": 3, "deep": 5}[name]
    return Case(f"{rows}x{length}, {heads} heads of {key}/{value}",
                recurrence_work(name, rows * length, heads, key, value, moving - 3), tuple(range(moving)), draw)


def experts_case(place: Place) -> Case:
    """The experts of the first block that has some, on a micro-batch, chosen at random. The reference sends all tokens
    through all of them."""
    model = place.config.model
    plan = next(plan for plan in gpt.plan_blocks(model) if plan.experts)
    tokens, width, hidden, count, each = (place.rows * place.length, model.model_dim, gpt.expert_width(model, plan),
                                          plan.experts, min(model.moe_topk, plan.experts))
    size, matrices = place.dtype.itemsize, 8 * plan.experts * width * hidden
    flops, stream = 4 * tokens * each * width * hidden, tokens * width * size

    def draw() -> tuple[Inputs, Inputs]:
        shares = place.normal(3, tokens, count, dtype=torch.float32).sigmoid()
        taken, chosen = shares.topk(each)
        inputs = (place.normal(0, tokens, width),
                  place.normal(1, count, hidden, width, scale=width ** -0.5, dtype=torch.float32),
                  place.normal(2, count, width, hidden, scale=hidden ** -0.5, dtype=torch.float32), chosen, taken,
                  lambda x: torch.relu(x).square())
        return inputs, inputs

    work = Work(flops, 2 * stream + matrices, 3 * flops, 5 * stream + 3 * matrices, 3 * flops * count / each,
                5 * size * tokens * hidden)
    return Case(f"{tokens}x{width}, {each} of {count} experts of {hidden}", work, (0, 1, 2, 4), draw)


def written_case(place: Place) -> Case:
    """What the rows of a micro-batch write into a block's second matrix and read of it; the reference fills whole
    (T, T) squares."""
    model, rows, length = place.config.model, place.rows, place.length
    plan = next(plan for plan in gpt.plan_blocks(model) if plan.learns)
    tokens, width, hidden = rows * length, model.model_dim, gpt.learning_width(model, plan)
    flops, size = 4 * tokens * width * hidden, 4 * tokens * (hidden + 2 * width)

    def draw() -> tuple[Inputs, Inputs]:
        keys = torch.nn.functional.normalize(place.normal(0, rows, length, hidden, dtype=torch.float32), dim=-1)
        inputs = (keys, place.normal(1, rows, length, width, dtype=torch.float32), None, model.inplace_chunk,
                  model.inplace_momentum, model.inplace_decay)
        return inputs, inputs

    work = Work(flops, size, 3 * flops, 3 * size, 6 * tokens * length * (hidden + width), 3 * 4 * tokens * length)
    return Case(f"{rows}x{length}, {hidden} to {width}, chunks of {model.inplace_chunk}", work, (0, 1), draw)


CASES: dict[str, Callable[[Place], Case]] = {
    "attention": attention_case, "mean_nats": mean_nats_case, "mlp": mlp_case, "experts": experts_case,
    "written": written_case,
    **{name: functools.partial(recurrence_case, name=name) for name in ("delta", "mlstm", "titans", "deep")}}


class Passes:
    """A function on inputs of its own, forward and backward, with a fixed random gradient of the output."""

    def __init__(self, function: Callable[..., Tensor], inputs: Inputs, moving: tuple[int, ...]) -> None:
        self.function = function
        self.inputs = [value.detach().requires_grad_() if place in moving else value
                       for place, value in enumerate(inputs)]
        self.wanted = [self.inputs[place] for place in moving]
        self.upstream: Tensor | None = None

    def forward(self) -> Tensor:
        """The output, as training computes it: ready for a backward. Of a recurrence without its last state."""
        out = self.function(*self.inputs)
        return out[0] if isinstance(out, tuple) else out

    def both(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output and the gradients."""
        out = self.forward()
        if self.upstream is None:
            generator = torch.Generator(out.device).manual_seed(1)
            shape = (out.numel(),) if out.dim() else ()
            drawn = torch.randn(shape, generator=generator, device=out.device) if out.dim() else torch.ones_like(out)
            # In bf16 first, so that every dtype is asked for the same gradient.
            self.upstream = drawn.bfloat16().to(out.dtype).view_as(out)
        return out.detach(), torch.autograd.grad(out, self.wanted, self.upstream)


def relative(found: Tensor, exact: Tensor) -> float:
    """|found - exact| over |exact|, both flat; not a number where either is not."""
    found, exact = found.flatten().float(), exact.flatten().float()
    return float((found - exact).norm() / exact.norm().clamp_min(1e-30))


def wide(inputs: Inputs) -> Inputs:
    """The same values in fp32."""
    return tuple(value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
                 for value in inputs)


def first_line(error: BaseException) -> str:
    """An error in one short line."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}"[:160]


# ---- tables


CEILING_COLUMNS = {"what": "", "size": "", "seconds": ".5f", "spread": ".0%", "runs": "d", "rate": ".4g", "unit": ""}
STEP_COLUMNS = {
    "phase": "", "visits": "d", "context": "d", "shape": "", "s round": ".4f", "spread": ".0%", "runs": "d",
    "s optimizer": ".4f", "s step": ".3f", "tokens/s": ",.0f", "TFLOP/step": ".4g", "TFLOP/s": ".4g",
    "of peak": ".1%", "peak GB": ".2f", "s first": ".1f", "graphs": "d", "breaks": "d", "host": ".0%", "note": ""}
KERNEL_COLUMNS = {
    "operation": "", "form": "", "size": "", "ms forward": ".3f", "ms both": ".3f", "spread": ".0%", "runs": "d",
    "speedup": ".2f", "value error": ".1e", "gradient error": ".1e", "GFLOP": ".4g", "MB": ".4g", "ms floor": ".3f",
    "bound by": "", "forward at": ".0%", "both at": ".0%", "note": ""}
OPTIMIZER_COLUMNS = {
    "part": "", "tensors": ",d", "parameters": ",d", "ms": ".3f", "spread": ".0%", "runs": "d", "GFLOP": ".4g",
    "MB": ".4g", "of peak": ".1%", "of bandwidth": ".1%", "note": ""}


class Speed:
    """One run of the benchmark: configuration, device, budget, and the peaks once they are measured."""

    def __init__(self, config: gpt.Config, options: dict[str, Any]) -> None:
        self.config, self.options, self.world = config, options, gpt.make_world({})
        self.device = self.world.device
        gpu = self.device.type == "cuda"
        self.meter = Meter(self.device, options["REPEATS"] or (10 if gpu else 5), options["BUDGET_SECONDS"])
        self.dtype = gpt.pick_dtype(config.system.compute_dtype, self.device)
        self.micros = config.train.train_batch_tokens // config.train.micro_batch_tokens
        on, self.reason = gpt.pick_compile(config.system.compile, self.device)
        choice = options["COMPILED"] or ("both" if on and gpu else str(int(on)))
        if choice != "0" and not on:
            on, self.reason = gpt.pick_compile("1", self.device)
        self.compiles, self.eager = choice != "0", choice != "1"
        self.whole = self.lane = Ceiling(math.nan, math.nan)
        run = config.run
        self.name = f"PRESET={run.preset} OVERLAY={run.overlay}, {str(self.dtype)[6:]}"

    def share(self, compiled: bool) -> tuple[gpt.World, int]:
        """The world with the lanes that training would have, and its threads, which are set for one lane."""
        return gpt.share_threads(self.world, self.config.system.threads, 1, 1 if compiled else self.micros)

    def attempt(self, cells: Callable[[], list[Any]], labels: list[Any], columns: dict[str, str]) -> list[Any]:
        """The cells of a row, or its labels and, in its note, why there are none."""
        try:
            self.meter.check()
            return cells()
        except Skipped as reason:
            note = str(reason)
        except Exception as error:  # whatever one row meets, the others are still wanted
            note = first_line(error)
        return [*labels, *[None] * (len(columns) - len(labels) - 1), note]

    def tables(self) -> Iterator[Fields]:
        """The tables in the order of what a short budget should buy first."""
        yield self.ceilings()
        made: dict[str, list[Callable[[], Iterator[Fields]]]] = {
            "step, compiled": [lambda: self.step(True)] * self.compiles, "kernels": [self.kernels],
            "optimizer": [self.optimizer], "step, eager": [lambda: self.step(False)] * self.eager}
        for name, parts in made.items():
            try:
                for part in parts if name.split(",")[0] in self.options["PARTS"] else ():
                    yield from part()
            except (gpt.ConfigError, gpt.CheckError):
                raise
            except Exception as error:  # for example a GPU that a kernel has left unusable; what was measured stays
                yield f"{name}: {self.name}", {"note": ""}, [[first_line(error)]], ""

    # -- ceilings

    def ceilings(self) -> Fields:
        """The peaks that everything else is held against; measured even when the budget is spent."""
        world, threads = self.share(not self.eager)
        side, kind = MATRIX_SIDE[self.device.type], self.device.type
        names = {threads: "all threads", threads // world.lanes: "one lane"} if kind == "cpu" else {0: "GPU"}
        if len(names) == 1 and kind == "cpu":
            names = {threads: "all threads"}
        a, b = (torch.randn(side, side, device=self.device).to(self.dtype) for _ in range(2))
        out = torch.empty_like(a)
        source = torch.randn(COPY_BYTES[kind] // 4, device=self.device)
        target = torch.empty_like(source)
        rows, found = [], []
        for count, name in names.items():
            if count:
                torch.set_num_threads(count)
            product = self.meter.time(lambda: torch.mm(a, b, out=out), more=2)
            copy = self.meter.time(lambda: target.copy_(source), more=4)
            found.append(Ceiling(2 * side ** 3 / product.best, 2 * COPY_BYTES[kind] / copy.best))
            rows += [[f"matrix product, {name}", f"{side}^3", product.best, product.spread, product.runs,
                      found[-1].flops / 1e12, "TFLOP/s"],
                     [f"copy, {name}", f"{COPY_BYTES[kind] >> 20} MiB", copy.best, copy.spread, copy.runs,
                      found[-1].bytes / 1e9, "GB/s"]]
        self.whole, self.lane = found[0], found[-1]
        return (f"ceilings: measured here, fastest of the runs, not from a data sheet: products in "
                f"{str(self.dtype)[6:]}, copies in bytes read plus written", CEILING_COLUMNS, rows, "")

    # -- step

    @functools.cached_property
    def model(self) -> gpt.GPT:
        """The model as it starts, but with noise on its matrices, so that none multiplies zeros."""
        kernels, _ = gpt.pick_kernels(self.config.system.kernels, self.device, self.dtype, self.config.model)
        model = gpt.GPT(self.config.model, self.config.data.vocab_size, kernels, self.dtype).to(self.device)
        gpt.init_weights(model, self.config.run.seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
        return model

    def make_trainer(self, model: gpt.GPT, world: gpt.World, compiled: bool) -> gpt.Trainer:
        """A Trainer on random documents whose step is one round: as many micro-batches as there are lanes."""
        train = self.config.train
        stream = document_stream(train.micro_batch_tokens * (4 * world.lanes + 8) + 1, self.config.data.vocab_size,
                                 self.options["DOCUMENT_TOKENS"])
        data = gpt.Data(stream, gpt.Validation(np.zeros(1, np.int64), np.zeros(1, np.int64), 0, True), {}, "", "", None)
        # Without a compiled step there is no graph to replay.
        config = self.config if compiled else gpt.with_settings(self.config, {"CUDA_GRAPHS": "0"})
        trainer = gpt.Trainer(config, model, data, world, gpt.Log(None, time.perf_counter), Path(), compiled,
                              lambda _: (0.0, 0.0))
        trainer.micros = world.lanes
        trainer.losses = [gpt.make_compiled(gpt.make_loss(model, phase, config.ngram.ngram_head_loss,
                                                            config.train.z_loss), compiled,
                                            replayed=trainer.replayed) for phase in range(len(model.phases))]
        return trainer

    def step(self, compiled: bool) -> Iterator[Fields]:
        """A row for every shape of training."""
        world, threads = self.share(compiled)
        model = self.model
        trainer, rows, made = self.make_trainer(model, world, compiled), [], {}
        rounds, train = -(-self.micros // world.lanes), self.config.train
        update: list[Timing] = []

        def work(phase: int) -> None:
            trainer.gradients(phase)
            trainer.step += 1  # other tokens, and those of the next round are fetched meanwhile

        def renew() -> None:
            trainer.optimizer.step(0.0, self.config.optim.muon_momentum)  # a rate of 0 is as much work
            trainer.average.update()

        def cells(phase: int, length: int, labels: list[Any]) -> list[Any]:
            visits = len(model.phases[phase].steps)
            self.meter.check(max((seconds * visits / others for others, seconds in made.items()), default=0.0))
            reset_peak(self.device)
            counters = torch._dynamo.utils.counters if compiled else {}
            before = gpt.compiled_graphs() if compiled else 0, sum(counters["graph_break"].values()) if compiled else 0
            trainer.length = length
            spent = self.meter.time(lambda: work(phase), apart=True, compiled=compiled)
            made[visits] = spent.first
            if not update:
                update.append(self.meter.time(renew))
            seconds = rounds * spent.median + update[0].median
            flops = 3 * train.train_batch_tokens * gpt.forward_flops(self.config.model, self.config.data.vocab_size,
                                                                     model.phases[phase], length)
            peak = peak_bytes(self.device)
            graphs = (gpt.compiled_graphs() - before[0],
                      sum(counters["graph_break"].values()) - before[1]) if compiled else (None, None)
            return [*labels, spent.median, spent.spread, spent.runs, update[0].median, seconds,
                    train.train_batch_tokens / seconds, flops / 1e12, flops / seconds / 1e12,
                    flops / seconds / self.whole.flops, peak / 1e9 if peak else None, spent.first, *graphs,
                    spent.host / spent.median if spent.host is not None else None, ""]

        for phase, length in trainer.shapes():
            shape = (1, train.micro_batch_tokens) if model.packed else (train.micro_batch_tokens // length, length)
            labels = [f"from {model.phases[phase].start:.0%}", len(model.phases[phase].steps), length,
                      "x".join(map(str, shape))]
            rows.append(self.attempt(lambda phase=phase, length=length, labels=labels: cells(phase, length, labels),
                                     labels, STEP_COLUMNS))
            model.zero_grad(set_to_none=True)
        how = f"compiled ({self.reason})" if compiled else "eager"
        count = sum(parameter.numel() for parameter in model.parameters())
        note = (f"round: {world.lanes} micro-batch(es) side by side, forward and backward; step: {rounds} round(s), "
                "Optimizer.step and the weight average; FLOPs: forward_flops x 3; s first: with compilation")
        if self.device.type == "cuda":
            note += "\nhost: its seconds to queue a round over the device's to do it; far below 100% leaves no gap"
        yield (f"step, {how}: {self.name}, {count:,} parameters, {self.micros} micro-batches of "
               f"{train.micro_batch_tokens:,} tokens, {threads} threads in {world.lanes} lanes, documents of about "
               f"{self.options['DOCUMENT_TOKENS']:g}", STEP_COLUMNS, rows, note)

    # -- kernels

    def place(self, rows: int) -> Place:
        """Where cases are made: the longest context."""
        return Place(self.config, self.device, self.dtype, rows, self.config.train.train_seq_len,
                     self.options["DOCUMENT_TOKENS"])

    def unusable(self, name: str) -> dict[str, str]:
        """The twins of an operation that cannot be used here, and why."""
        return {form: reason for form, twin in gpt.KERNELS[name].twins.items()
                if (reason := twin.unusable(self.device, self.dtype, self.config.model))}

    def too_much(self, case: Case) -> str:
        """Why the reference is not run at this size; empty: it is."""
        seconds, size = case.work.reference_flops / self.lane.flops, case.work.reference_bytes
        if size > MEMORY_SHARE * (free := free_bytes(self.device)):
            return f"needs about {size / 1e9:.1f} GB, {free / 1e9:.1f} are free; see the smaller size"
        if seconds > REFERENCE_SHARE * self.meter.seconds:
            return f"needs about {seconds:.0f} s a call; see the smaller size"
        return ""

    def kernels(self) -> Iterator[Fields]:
        """Reference and twins of every operation that the model needs, then the references compiled."""
        self.share(not self.eager)
        rows, compiled = [], []
        _, lines = gpt.pick_kernels(self.config.system.kernels, self.device, self.dtype, self.config.model)
        names = gpt.kernels_of(self.config.model)
        used = {name: line.split()[1] for name, line in zip(names, lines, strict=True)}
        base: dict[str, float] = {}
        all_rows = self.config.train.micro_batch_tokens // self.config.train.train_seq_len
        small: dict[str, Case] = {}
        for name in names:
            if name not in CASES:
                rows.append([name, "-", *[None] * (len(KERNEL_COLUMNS) - 3), "no case of it in tools/speed.py"])
                continue
            count, case = all_rows, CASES[name](self.place(all_rows))
            why = self.too_much(case)
            if why:
                rows += self.compare(name, case, used[name], why, base)
                while count > 1 and self.too_much(case):
                    count //= 2
                    case = CASES[name](self.place(count))
            small[name] = case
            found = self.compare(name, case, used[name], "", base)
            rows += found if not why else [row for row in found if row[1] not in self.unusable(name)]
        note = ("ms both: forward and backward; GFLOP and MB: the fewest that both need; floor: the larger of GFLOP "
                "over peak and MB over bandwidth;\nat: the floor over what was measured; errors: relative norms "
                "against the reference in fp32 on the same inputs, of gradients the worst")
        title = (f"{self.name}, micro-batch of {self.config.train.micro_batch_tokens:,} tokens" + (
            f", one lane of {torch.get_num_threads()} thread(s)" if self.device.type == "cpu" else ""))
        yield f"kernels: {title}", KERNEL_COLUMNS, rows, note
        if self.compiles:
            for name, case in small.items():
                function = gpt.make_compiled(gpt.KERNELS[name].reference, True)
                compiled.append(self.form(name, "compiled reference", case, function, False, "", base,
                                          self.exact(name, case)))
            yield f"kernels, references compiled: {title}", KERNEL_COLUMNS, compiled, ""

    def exact(self, name: str, case: Case) -> dict[str, Any]:
        """Value and gradients of the reference in fp32; nothing where there is no time, or where it fails: then its own
        row says why."""
        if self.meter.left() > 0:
            with contextlib.suppress(Exception):
                return {"both": Passes(gpt.KERNELS[name].reference, wide(case.draw()[0]), case.moving).both()}
        return {}

    def compare(self, name: str, case: Case, used: str, why: str, base: dict[str, float]) -> list[list[Any]]:
        """Rows of the reference and of all twins at one size; without the reference where `why` says so."""
        kernel, rows, exact = gpt.KERNELS[name], [], {}
        if why:
            rows.append([name, "reference", case.size, *[None] * (len(KERNEL_COLUMNS) - 4), why])
        else:
            exact = self.exact(name, case)
            rows.append(self.form(name, "reference", case, kernel.reference, False, used, base, exact))
        reasons = self.unusable(name)
        for form, twin in kernel.twins.items():
            if form in reasons:
                rows.append([name, form, case.size, *[None] * (len(KERNEL_COLUMNS) - 4), reasons[form]])
                continue
            rows.append(self.form(name, form, case, twin.make, twin.packed, used, base, exact, build=True))
        return rows

    def form(self, name: str, form: str, case: Case, function: Callable[..., Any], packed: bool, used: str,
             base: dict[str, float], exact: dict[str, Any], build: bool = False) -> list[Any]:
        """The row of one form; `build` says that `function` makes it. A reference's seconds are kept in `base`."""
        labels, key = [name, form, case.size], f"{name} {case.size}"

        def cells() -> list[Any]:
            self.meter.check(3 * case.work.flops_both / self.lane.flops)
            passes = Passes(function() if build else function, case.draw()[packed], case.moving)
            errors: list[Any] = [None, None]
            both = self.meter.time(passes.both, compiled=not build and form != "reference")
            if "both" in exact:
                value, grads = passes.both()
                errors = [relative(value, exact["both"][0]),
                          max(map(relative, grads, exact["both"][1]), key=lambda error: (error != error, error))]
                del value, grads
            forward = self.meter.time(passes.forward)
            if form == "reference":
                base[key] = both.median
            floors = [case.work.floor(self.lane, way) for way in (False, True)]
            return [*labels, 1000 * forward.median, 1000 * both.median, both.spread, both.runs,
                    base[key] / both.median if key in base else None, *errors, case.work.flops_both / 1e9,
                    case.work.bytes_both / 1e6, 1000 * floors[1], case.work.bound(self.lane),
                    floors[0] / forward.median, floors[1] / both.median, "in use" if form == used else ""]

        return self.attempt(cells, labels, KERNEL_COLUMNS)

    # -- optimizer

    def optimizer(self) -> Iterator[Fields]:
        """The parts of Optimizer.step, each alone, and the whole."""
        self.share(not self.eager)
        model, optim, rows = self.model, self.config.optim, []
        banks: dict[tuple[int, int], list[Tensor]] = {}
        others: dict[str, list[Tensor]] = {}
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
            if gpt.UPDATES[gpt.rule_of(parameter.role, optim)].step is None:
                banks.setdefault(tuple(parameter.shape), []).append(parameter.detach())
            else:
                others.setdefault(parameter.role, []).append(parameter.detach())

        def row(part: str, tensors: list[Tensor], flops: float, size: float, work: Callable[[], Any]) -> None:
            labels = [part, len(tensors), sum(map(torch.numel, tensors))]

            def cells() -> list[Any]:
                self.meter.check(flops / self.lane.flops)
                spent = self.meter.time(work)
                return [*labels, 1000 * spent.median, spent.spread, spent.runs, flops / 1e9 if flops else None,
                        size / 1e6 if size else None, flops / spent.median / self.lane.flops if flops else None,
                        size / spent.median / self.lane.bytes if size else None, ""]

            rows.append(self.attempt(cells, labels, OPTIMIZER_COLUMNS))

        total = 0
        for shape, tensors in sorted(banks.items(), key=lambda item: -len(item[1]) * math.prod(item[0])):
            flops = orthogonalize_flops(len(tensors), *shape, optim.muon_backend_steps)
            total += flops
            stacked = torch.randn(len(tensors), *shape, device=self.device)
            row("{}x{} orthogonalised".format(*shape), tensors, flops, 0, lambda stacked=stacked: gpt.orthogonalize(
                stacked, optim.muon_backend, optim.muon_backend_steps, self.dtype))
        for role, tensors in others.items():
            state = [[torch.randn_like(tensor) for tensor in tensors], [torch.zeros_like(tensor) for tensor in tensors],
                     [torch.zeros_like(tensor) for tensor in tensors]]
            decay = getattr(optim, gpt.ROLES[role].decay) if gpt.ROLES[role].decay else 0.0
            row(f"AdamW, {role}", tensors, 0, ADAMW_BYTES * sum(map(torch.numel, tensors)),
                lambda tensors=tensors, state=state, decay=decay: gpt.adamw_update_(tensors, *state, 1, 0.0, decay,
                                                                                    optim))
        optimizer = gpt.Optimizer(model, optim, self.world, self.dtype)
        every = [parameter.detach() for parameter in model.parameters()]
        row("Optimizer.step, all", every, total, 0, lambda: optimizer.step(0.0, optim.muon_momentum))
        if optim.ema_decay:
            average = gpt.Average(model, optim.ema_decay)
            row("weight average", every, 0, 3 * 4 * sum(map(torch.numel, every)), average.update)
        yield (f"optimizer: {self.name}, {optim.muon_backend} x {optim.muon_backend_steps}", OPTIMIZER_COLUMNS, rows,
               "all of Optimizer.step holds, beside these parts, momenta, stacking and the updates of matrices")


def tables(options: dict[str, Any]) -> Iterator[Fields]:
    """The tables of `bench speed`, each as soon as it is measured."""
    config, threads = gpt.load_config(options["words"], os.environ), torch.get_num_threads()
    try:
        yield from Speed(config, options).tables()
    finally:
        torch.set_num_threads(threads)
