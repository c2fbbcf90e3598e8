"""The picture of a run: loss, bits per byte, schedule, where the artifact's bytes go and what they cost the loss, and
how the evaluators do by position, by length of the document, and document by document.

    python tools/plot.py RUN_FOLDER [--out curve.png]

Draws what the run folder holds (events.jsonl, config.json, result.json, documents.npz) and says in the picture what it
lacks, so a run that is still going, or that was killed, has a picture too. A run without training (FROM) shows what
each tensor's quantization costs in place of the curves. Needs nothing of train_gpt.py.
"""

from __future__ import annotations

import json
import math
import os
import sys
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_PIXELS, HEIGHT_PIXELS, DOTS_PER_INCH = 1600, 1200, 100
DOCUMENT_PIXELS = 520  # more height, for the panels of documents.npz
TRIT_PIXELS = 440  # and for those of ternary weights
# Okabe and Ito's colours: told apart by colour-blind eyes as well.
BLUE, ORANGE, GREEN, PURPLE, SKY, RED, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#777777")
SCORE_COLOURS = (GREEN, BLUE, PURPLE, "#9C6A00", "#004466", SKY)
KIND_COLOURS = {"embedding": BLUE, "feed-forward": ORANGE, "attention": GREEN, "gains": PURPLE, "matrix": SKY, "": GREY}
MOST_BARS, MOST_TENSORS = 14, 34
TRAINING_TIME = "training time (seconds)"
DIAGNOSTICS = ("float",)  # scores that no evaluator of the artifact made
REFERENCES = ("contiguous", "sliding", "document")  # what gains are counted from: the first of these that is there
LEAST_SHARE = 0.005  # of all bytes; a bin with less is not drawn: few tokens say little and stretch the axis


STYLE = {"font.size": 12, "axes.titlesize": 14, "axes.titleweight": "bold", "axes.grid": True, "grid.alpha": 0.25,
         "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 11.5,
         "axes.axisbelow": True}


class PlotError(Exception):
    """A user's mistake; the message is one clear line."""


@dataclass
class Curve:
    """One line of a picture: y over x, equally long."""

    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)


@dataclass
class Part:
    """A part of the artifact, one tensor or several: where its bytes go and what its quantization costs.

    `kind` colours it ("" is neither weights nor gains), `weights` is what its bytes are spread over (0: nothing),
    `cost` is in nats a token, None where calibration saw nothing of it; `error` is relative, `format` and `error` are
    those of a single tensor.
    """

    label: str
    kind: str
    bytes: float
    weights: int = 0
    cost: float | None = None
    error: float | None = None
    format: str = ""

    @property
    def bits(self) -> str:
        """Bits per weight as text, empty where there are no weights."""
        return f"{8 * self.bytes / self.weights:.2f}" if self.weights else ""

    @property
    def millinats(self) -> str:
        """The cost as text, empty where nothing is known."""
        return "" if self.cost is None else f"{1000 * self.cost:.2f}"


@dataclass
class Documents:
    """Bits per byte of each evaluator where documents differ.

    `by_position` and `by_length` have a point for each of their bins at its middle, `position_share` and `length_share`
    the share of the bytes there. `gains` are bits per byte under those of `reference`, a document a point, ascending,
    over the share of the documents; `totals` are those of all documents together.
    """

    by_position: dict[str, Curve] = field(default_factory=dict)
    by_length: dict[str, Curve] = field(default_factory=dict)
    position_share: Curve = field(default_factory=Curve)
    length_share: Curve = field(default_factory=Curve)
    reference: str = ""
    gains: dict[str, Curve] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)


@dataclass
class Series:
    """Everything that is drawn, free of files and of matplotlib."""

    title: str
    train_loss: Curve
    smooth_loss: Curve
    val_loss: Curve
    val_bpb: Curve
    lr_factor: Curve
    grad_norm: Curve
    resumes: list[float]
    scores: dict[str, float]
    yardsticks: dict[str, float]
    parts: list[Part]
    tensors: list[Part]
    total_bytes: int
    limit_bytes: int | None
    notes: list[str]
    documents: Documents = field(default_factory=Documents)
    zeros: Curve = field(default_factory=Curve)
    trit_bits: Curve = field(default_factory=Curve)
    churn: Curve = field(default_factory=Curve)

    def colour(self, name: str) -> str:
        """The colour of a score, the same in every panel."""
        names = list(dict.fromkeys([*self.scores, *self.documents.by_position]))
        return SCORE_COLOURS[names.index(name) % len(SCORE_COLOURS)]


# ---- from files to series


def read_events(path: Path) -> tuple[list[dict], int]:
    """Returns the events of a file and the number of lines that are not whole (a killed process leaves one)."""
    return parse_events(path.read_bytes())


def parse_events(data: bytes) -> tuple[list[dict], int]:
    """Returns the same of a file's content."""
    events, broken = [], 0
    for line in data.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if isinstance(event, dict) and "event" in event:
            events.append(event)
        else:
            broken += 1
    return events, broken


def valid_events(events: list[dict]) -> tuple[dict[str, dict[int, dict]], list[float]]:
    """Returns the step, val and trits events by step number, ascending, and the training seconds of each resume.

    What a killed life wrote after the checkpoint it was resumed from never happened: a resume drops all later
    steps, and where a step stands there twice the later line wins.
    """
    found: dict[str, dict[int, dict]] = {"step": {}, "val": {}, "trits": {}}
    resumes: list[float] = []
    for event in events:
        kind = event["event"]
        if kind == "resume":
            for kept in found.values():
                for step in [step for step in kept if step > event["step"]]:
                    del kept[step]
            resumes = [seconds for seconds in resumes if seconds < event["train_seconds"]]
            resumes.append(event["train_seconds"])
        elif kind in found:
            found[kind][event["step"]] = event
    return {kind: dict(sorted(kept.items())) for kind, kept in found.items()}, resumes


def make_curve(events: dict[int, dict], key: str) -> Curve:
    """Returns `key` over training seconds, only where it is a finite number."""
    curve = Curve()
    for event in events.values():
        y = event.get(key)
        if isinstance(y, (int, float)) and math.isfinite(y) and "train_seconds" in event:
            curve.x.append(event["train_seconds"])
            curve.y.append(y)
    return curve


def smooth(curve: Curve) -> Curve:
    """Returns the mean over the neighbours on both sides, so that a steep fall is not delayed.

    The window is a fortieth of the points to each side, narrower at the start and one-sided at the end.
    """
    reach = len(curve.y) // 40
    sums = [0.0]
    for y in curve.y:
        sums.append(sums[-1] + y)
    out = Curve(x=list(curve.x))
    for i in range(len(curve.y)):
        half = min(reach, i)
        end = min(i + half + 1, len(curve.y))
        out.y.append((sums[end] - sums[i - half]) / (end - i + half))
    return out


MODULES = {"mixer": "attention", "mlp": "feed-forward"}  # part of a matrix's name -> its kind


def tensor_part(event: dict) -> Part:
    """Returns one tensor as a part: `blocks.3.mlp.up.weight` is `3 up`, a feed-forward; other roles keep their name."""
    words = [word for word in event["name"].split(".") if word not in ("blocks", "weight")]
    kind = next((MODULES[word] for word in words if word in MODULES), event["role"])
    if event["role"] in ("matrix", "factor"):
        label = " ".join([word for word in words[:-1] if word.isdigit()] + words[-1:])
    elif event["role"] == "embedding":
        label = "embedding"
    else:
        label, kind = ".".join(words), "gains"
    return Part(label, kind, event["bytes"], event.get("weights", 0), event.get("cost"), event.get("error"),
                event.get("format", ""))


def byte_parts(events: list[dict], result: dict) -> tuple[list[Part], list[Part], int]:
    """Returns the parts by falling size, scales, container and code last; all tensors; and the total of all bytes.

    Matrices of one name are summed over blocks, gains and gates by role; small parts are joined so that the bars stay
    readable. Scales are taken out of their tensors: their bits are those a weight with a scale pays for it.
    """
    written = {event["name"]: event for event in events if event["event"] == "tensor"}
    tensors = {name: tensor_part(event) for name, event in written.items()}
    groups: dict[tuple[str, str], list[str]] = {}
    for name, part in tensors.items():
        label = part.label.split()[-1] if part.kind != "gains" else written[name]["role"]
        groups.setdefault((label, part.kind), []).append(name)
    parts = []
    for (label, kind), names in groups.items():
        costs = [tensors[name].cost for name in names if tensors[name].cost is not None]
        times = f"  \N{MULTIPLICATION SIGN}{len(names)}" if len(names) > 1 else ""
        parts.append(Part(label + times, kind,
                          sum(tensors[name].bytes - written[name].get("scale_bytes", 0) for name in names),
                          sum(tensors[name].weights for name in names), sum(costs) if costs else None))
    parts.sort(key=lambda part: (-part.bytes, part.label))
    if rest := parts[MOST_BARS:]:
        parts[MOST_BARS:] = [Part(f"{len(rest)} smaller parts", "", sum(part.bytes for part in rest))]
    scaled = [event for event in written.values() if event.get("scale_bytes")]
    if scaled:
        parts.append(Part("scales", "", sum(event["scale_bytes"] for event in scaled),
                          sum(event["weights"] for event in scaled)))
    artifact = result.get("artifact") or {}
    if "model_bytes" in artifact:
        inside = sum(part.bytes for part in parts)
        parts.append(Part("header" if parts else "model", "", artifact["model_bytes"] - inside))
    if "code_bytes" in artifact:
        parts.append(Part("code", "", artifact["code_bytes"]))
    return parts, list(tensors.values()), artifact.get("total_bytes", round(sum(part.bytes for part in parts)))


def bits_per_byte(nats: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Returns bits per byte."""
    return nats / math.log(2) / count


def bin_curves(numbers: np.ndarray, count: np.ndarray, nats: dict[str, np.ndarray]) -> tuple[dict[str, Curve], Curve]:
    """Returns bits per byte by evaluator and the share of the bytes, over the middles of bins that double.

    `numbers` says which bin (2^i .. 2^(i+1) - 1) each of the other values belongs to.
    """
    sums = np.bincount(numbers, count)
    shares = sums / max(sums.sum(), 1.0)
    kept = np.flatnonzero((shares >= LEAST_SHARE) & (sums > 0))
    middles = (2.0 ** (kept + 0.5)).tolist()
    curves = {name: Curve(middles, bits_per_byte(np.bincount(numbers, values)[kept], sums[kept]).tolist())
              for name, values in nats.items()}
    return curves, Curve(middles, shares[kept].tolist())


def document_series(table: dict[str, np.ndarray]) -> Documents:
    """Returns the curves of documents.npz; raises KeyError or ValueError where it lacks something or is not finite."""
    if not table:
        return Documents()
    names = [name.removeprefix("document_nats_") for name in table if name.startswith("document_nats_")]
    names = [name for name in names if name not in DIAGNOSTICS] or names
    if not all(np.isfinite(column).all() for column in table.values()):
        raise ValueError("a number is not finite")
    documents = {name: table[f"document_nats_{name}"] for name in names}
    sizes, length = table["document_bytes"], np.log2(np.maximum(table["document_targets"], 1)).astype(np.int64)
    out = Documents()
    out.by_position, out.position_share = bin_curves(
        np.arange(len(table["position_bytes"])), table["position_bytes"],
        {name: table[f"position_nats_{name}"] for name in names})
    out.by_length, out.length_share = bin_curves(length, sizes, documents)
    out.reference = next((name for name in (*REFERENCES, *names) if name in names), "")
    seen = sizes > 0
    for name in names:
        if name != out.reference and seen.any():
            less = documents[out.reference] - documents[name]
            out.totals[name] = float(bits_per_byte(less.sum(), sizes.sum()))
            gains = np.sort(bits_per_byte(less[seen], sizes[seen]))
            out.gains[name] = Curve((100 * (np.arange(len(gains)) + 0.5) / len(gains)).tolist(), gains.tolist())
    return out


def prepare(events: list[dict], config: dict, result: dict, name: str = "",
            table: dict[str, np.ndarray] | None = None) -> Series:
    """Returns all series of a run; empty ones where the run has no such data, each with a note.

    `name` stands for the run id where the settings have none, `table` is documents.npz. Events of kinds not drawn are
    ignored.
    """
    valid, resumes = valid_events(events)
    steps, vals, trits = valid["step"], valid["val"], valid["trits"]
    settings = config.get("settings", {})
    train_loss = make_curve(steps, "train_loss")
    scores = {key: score["val_bpb"] for key, score in (result.get("scores") or {}).items()}
    if not scores:  # the run is not finished; what it has scored so far stands in the events
        scores = {event["evaluator"]: event["val_bpb"] for event in events if event["event"] == "score"}
    parts, tensors, total = byte_parts(events, result)
    presets = " + ".join(str(value) for value in (settings.get("PRESET"), settings.get("OVERLAY")) if value)
    source = f"from {settings['FROM']}" if settings.get("FROM") else ""
    missing = [part for part in ("artifact", "scores", "yardsticks") if not result.get(part)]
    notes = [f"result.json: no {', '.join(missing)}"] if missing else []
    if not result:
        notes = ["not finished: no result.json"]
    return Series(
        title="   ".join(part for part in (settings.get("RUN_ID") or name, presets, source) if part),
        train_loss=train_loss, smooth_loss=smooth(train_loss),
        val_loss=make_curve(vals, "val_loss"), val_bpb=make_curve(vals, "val_bpb"),
        lr_factor=make_curve(steps, "lr_factor"), grad_norm=make_curve(steps, "grad_norm"),
        resumes=resumes, scores=scores, yardsticks=dict(result.get("yardsticks") or {}), parts=parts, tensors=tensors,
        total_bytes=total, limit_bytes=(result.get("artifact") or {}).get("limit_bytes"), notes=notes,
        documents=document_series(table or {}), zeros=make_curve(trits, "zeros"), trit_bits=make_curve(trits, "bits"),
        churn=make_curve(trits, "churn"))


def spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Returns places for labels near `wanted`, at least `gap` apart and inside [low, high] where they fit.

    Labels that would touch are moved as one group around their common middle.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[list[float]] = []  # each: sum of (wanted - offset in the group), count, start
    for index in order:
        groups.append([wanted[index], 1, wanted[index]])
        while len(groups) > 1 and groups[-2][2] + groups[-2][1] * gap > groups[-1][2]:
            total, count, _ = groups.pop()
            groups[-1][0] += total - count * groups[-1][1] * gap
            groups[-1][1] += count
            groups[-1][2] = groups[-1][0] / groups[-1][1]
    places = [start + i * gap for _, count, start in groups for i in range(int(count))]
    shift_up = low
    for i, place in enumerate(places):
        places[i] = max(place, shift_up)
        shift_up = places[i] + gap
    limit = high
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - gap
    out = [0.0] * len(wanted)
    for place, index in zip(places, order, strict=True):
        out[index] = place
    return out


# ---- from series to a picture


def draw(series: Series) -> Figure:
    """Returns the picture of a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        foot = DOCUMENT_PIXELS if series.documents.by_position else 0
        more = foot + (TRIT_PIXELS if series.zeros.y else 0)
        pixels = HEIGHT_PIXELS + more
        figure = Figure(figsize=(WIDTH_PIXELS / DOTS_PER_INCH, pixels / DOTS_PER_INCH), dpi=DOTS_PER_INCH)

        def up(y: float) -> float:
            """The height of what stands at y of a picture without the documents."""
            return (more + y * HEIGHT_PIXELS) / pixels

        # The gap in the middle holds the second axis of the schedule and the names of the bars; the right margin
        # holds the names of the horizontal lines and the numbers beside the bars.
        columns, rows = ((0.055, 0.37), (0.575, 0.31)), ((0.545, 0.325), (0.075, 0.31))
        panels = [(draw_bits, columns[1], rows[0]), (draw_bytes, columns[1], rows[1])]
        if series.tensors and not series.train_loss.y:
            panels += [(draw_tensors, (0.085, 0.29), (0.075, 0.795))]
        else:
            panels += [(draw_loss, columns[0], rows[0]), (draw_schedule, columns[0], rows[1])]
        if series.zeros.y:
            for panel, (x, width) in zip((draw_trits, draw_churn), columns, strict=True):
                panel(figure.add_axes((x, (foot + 70) / pixels, width, 290 / pixels)), series)
        for panel, (x, width), (y, height) in panels:
            panel(figure.add_axes((x, up(y), width, height * HEIGHT_PIXELS / pixels)), series)
        figure.suptitle(series.title, x=0.055, y=up(0.975), ha="left", fontsize=20, fontweight="bold")
        if series.notes:
            figure.text(0.985, up(0.958), "; ".join(series.notes), ha="right", fontsize=13, color=RED)
        if foot:
            draw_documents(figure, series, (60 / pixels, 310 / pixels), 432 / pixels)
    return figure


def finish(axes: Axes, title: str, x: str, y: str, handles: list | None = None) -> None:
    """Sets title and labels; the legend stands above the axes, where no data can be."""
    axes.set_title(title, loc="left", pad=32 if handles else 12)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if handles:
        axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.012, 0.995), ncol=len(handles),
                    borderaxespad=0.2, handlelength=1.6, columnspacing=1.4)


def say_missing(axes: Axes, text: str) -> None:
    """Writes what a panel has no data for into its middle."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY, fontsize=14)
    axes.set_xticks([])
    axes.set_yticks([])


def mark_resumes(axes: Axes, series: Series) -> list:
    """Draws a thin line where a run went on from a checkpoint; returns the legend entry, if any."""
    lines = [axes.axvline(seconds, color=GREY, linestyle=":", linewidth=1.2) for seconds in series.resumes]
    if lines:
        lines[0].set_label("resumed")
    return lines[:1]


def draw_loss(axes: Axes, series: Series) -> None:
    """Training loss, raw and smoothed, and the validation points."""
    handles = []
    raw, bold, points = series.train_loss, series.smooth_loss, series.val_loss
    if raw.y:
        handles += axes.plot(raw.x, raw.y, color=SKY, alpha=0.45, linewidth=1, label="training, each step")
        handles += axes.plot(bold.x, bold.y, color=BLUE, linewidth=2.2, label="training, smoothed")
    if points.y:
        handles += axes.plot(points.x, points.y, color=RED, marker="o", markersize=6, linewidth=1.2, zorder=4,
                             label="validation")
    if not handles:
        say_missing(axes, "no training steps in events.jsonl")
    handles += mark_resumes(axes, series)
    finish(axes, "Loss", TRAINING_TIME, "loss (nats per token)", handles)


def draw_bits(axes: Axes, series: Series) -> None:
    """Validation bits per byte, the final scores and ordinary compressors, each line named at its right end."""
    points = series.val_bpb
    lines = [(value, name, series.colour(name), "-") for name, value in series.scores.items()]
    lines += [(value, name, GREY, "--") for name, value in series.yardsticks.items()]
    lines = [line for line in lines if isinstance(line[0], (int, float)) and math.isfinite(line[0])]
    title = "Bits per byte on the validation split"
    if not lines and not points.y:
        say_missing(axes, "no validation yet")
        finish(axes, title, TRAINING_TIME, "bits per byte")
        return
    trained = bool(points.y or series.train_loss.y)
    values = [value for value, *_ in lines]
    # An untrained model scores several times the rest; it must not squeeze the lines that matter together.
    ceiling = max(values) + 0.75 * max(max(values) - min([*values, *points.y]), 0.4) if values else math.inf
    low, high = min([*values, *points.y]), max([*values, *(y for y in points.y if y <= ceiling)])
    pad = 0.06 * max(high - low, 0.1)
    low, high = low - pad, high + 1.6 * pad
    axes.set_ylim(low, high)
    handles = []
    if points.y:
        handles += axes.plot(points.x, points.y, color=RED, marker="o", markersize=6, linewidth=1.2, zorder=4,
                             label="validation during training")
        above = [(x, y) for x, y in zip(points.x, points.y, strict=True) if y > high]
        if above:
            handles += axes.plot([x for x, _ in above], [high - 0.35 * pad] * len(above), color=RED, marker="^",
                                 linestyle="", markersize=9, clip_on=False, zorder=5,
                                 label=f"above the axis (up to {max(y for _, y in above):.2f})")
    end = max([*series.train_loss.x, *points.x, 1.0])
    axes.set_xlim(-0.03 * end, 1.03 * end)
    places = spread([value for value, *_ in lines], 0.052 * (high - low), low, high)
    for (value, name, colour, dashes), place in zip(lines, places, strict=True):
        axes.axhline(value, color=colour, linestyle=dashes, linewidth=1.8 if dashes == "-" else 1.4)
        # The label stands outside the axes; a short line leads to it where it had to be moved.
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.9, "shrinkA": 1, "shrinkB": 0,
                  "relpos": (0, 0.5)}
        axes.annotate(f"{name} {value:.4f}", xy=(1.0, value), xytext=(1.04, place), va="center", color=colour,
                      xycoords=("axes fraction", "data"), textcoords=("axes fraction", "data"), fontsize=11.5,
                      annotation_clip=False, arrowprops=leader)
    handles += mark_resumes(axes, series)
    if not trained:
        axes.set_xticks([])
    finish(axes, title, TRAINING_TIME if trained else "", "bits per byte", handles)


def draw_schedule(axes: Axes, series: Series) -> None:
    """Learning-rate factor, and the gradient norm on its own axis."""
    handles = []
    rate, norm = series.lr_factor, series.grad_norm
    if norm.y:
        other = axes.twinx()
        other.spines["right"].set_visible(True)
        other.grid(False)
        handles += other.plot(norm.x, norm.y, color=ORANGE, alpha=0.8, linewidth=1, label="gradient norm (right)")
        other.set_ylabel("gradient norm before clipping", color="#9C6A00")
        other.tick_params(axis="y", colors="#9C6A00")
        if min(norm.y) > 0 and max(norm.y) > 20 * min(norm.y):
            other.set_yscale("log")
        else:
            other.set_ylim(0, 1.08 * max([*norm.y, 1e-9]))
        axes.set_zorder(other.get_zorder() + 1)
        axes.patch.set_visible(False)
    if rate.y:
        handles = axes.plot(rate.x, rate.y, color=BLUE, linewidth=2.4, label="learning-rate factor") + handles
        axes.set_ylim(0, 1.08 * max([*rate.y, 1e-9]))
    if not handles:
        say_missing(axes, "no schedule in events.jsonl")
    handles += mark_resumes(axes, series)
    finish(axes, "Learning rate and gradient", TRAINING_TIME, "learning-rate factor (1 = peak)", handles)


def draw_trits(axes: Axes, series: Series) -> None:
    """The share of ternary weights that are zero, and the entropy of a trit on its own axis."""
    other = axes.twinx()
    other.spines["right"].set_visible(True)
    other.grid(False)
    handles = axes.plot(series.zeros.x, series.zeros.y, color=BLUE, marker="o", linewidth=2.2, label="zeros")
    handles += other.plot(series.trit_bits.x, series.trit_bits.y, color=ORANGE, marker="o", linewidth=2.2,
                          label="bits a trit (right)")
    axes.set_ylim(0, 1)
    other.set_ylim(0, 1.08 * math.log2(3))
    other.set_ylabel("entropy of a trit (bits)", color="#9C6A00")
    other.tick_params(axis="y", colors="#9C6A00")
    finish(axes, "Ternary weights", TRAINING_TIME, "share that is zero", handles + mark_resumes(axes, series))


def draw_churn(axes: Axes, series: Series) -> None:
    """The share of ternary weights that changed between two points; the first of a process has none before it."""
    x, y = series.churn.x, series.churn.y
    axes.plot(x, y, color=GREEN, marker="o", linewidth=2.2)
    axes.set_ylim(0, 1.08 * max([*y, 1e-9]))
    if not y:
        say_missing(axes, "one point only")
    finish(axes, "Trits that changed since the point before", TRAINING_TIME, "share of all ternary weights")


def draw_bars(axes: Axes, parts: list[Part], sizes: list[float], texts: list[str],
              columns: list[tuple[str, float, list[str]]]) -> list:
    """A horizontal bar a part, coloured by kind, its text at its end, and to the right of the axes columns of head,
    place and numbers; returns the handles of the legend, which has the kinds that no bar is named after."""
    handles = []
    for kind in dict.fromkeys(part.kind for part in parts):
        mine = [row for row, part in enumerate(parts) if part.kind == kind]
        bars = axes.barh(mine, [sizes[row] for row in mine], color=KIND_COLOURS.get(kind, RED), height=0.72, label=kind)
        if kind and kind != parts[mine[0]].label:
            handles.append(bars)
    for row, (size, text) in enumerate(zip(sizes, texts, strict=True)):
        axes.annotate(text, xy=(size, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=10.5)
    for head, place, column in columns:
        for row, text in enumerate([head, *column] if any(column) else [], start=-1):
            axes.annotate(text, xy=(place, row), xycoords=("axes fraction", "data"), va="center", ha="right",
                          fontsize=10.5, annotation_clip=False, fontweight="normal" if row >= 0 else "bold")
    axes.set_yticks(range(len(parts)), [part.label for part in parts], fontsize=11)
    axes.set_ylim(len(parts) - 0.4, -0.6)
    axes.grid(False, axis="y")
    return handles


def draw_bytes(axes: Axes, series: Series) -> None:
    """The artifact's bytes by part, code last, with bits per weight and cost of each and of all."""
    if not series.parts:
        say_missing(axes, "no artifact yet")
        finish(axes, "Artifact", "", "")
        return
    title = f"Artifact: {series.total_bytes:,} bytes"
    if series.limit_bytes:
        share = series.total_bytes / series.limit_bytes
        title = f"Artifact: {series.total_bytes:,} of {series.limit_bytes:,} bytes ({share:.1%})"
    unit, scale = ("MB", 1e6) if series.total_bytes >= 2e6 else ("kB", 1e3)
    sizes = [part.bytes / scale for part in series.parts]
    texts = [f"{part.bytes:,.0f}  ({part.bytes / max(series.total_bytes, 1):.1%})" for part in series.parts]
    handles = draw_bars(axes, series.parts, sizes, texts, [
        ("bits", 1.15, [part.bits for part in series.parts]),
        ("cost", 1.29, [part.millinats for part in series.parts])])
    axes.set_xlim(0, 1.44 * max([*sizes, 1e-9]))
    label = f"size in the artifact ({unit})"
    weights, costs = sum(part.weights for part in series.tensors), [part.cost for part in series.parts if part.cost]
    if weights:
        inside = sum(part.bytes for part in series.parts if part.label != "code")
        label += f"\nbits per weight: {8 * inside / weights:.2f} over the model"
    if costs:
        label += f"; cost: {1000 * sum(costs):.2f} milli-nats per token"
    finish(axes, title, label, "", handles)


def draw_tensors(axes: Axes, series: Series) -> None:
    """What every tensor's quantization costs, dearest first; its relative error where no cost was measured."""
    priced = any(part.cost is not None for part in series.tensors)
    found = [(1000 * part.cost if priced else part.error, part) for part in series.tensors
             if part.kind != "gains" and (part.cost if priced else part.error) is not None]
    title = "What each tensor's quantization costs" if priced else "Each tensor's quantization error"
    if not found:
        say_missing(axes, "no errors in events.jsonl")
        finish(axes, title, "", "")
        return
    found.sort(key=lambda item: -item[0])
    if len(found) > MOST_TENSORS:
        found, title = found[:MOST_TENSORS], f"{title} (the largest {MOST_TENSORS})"
    sizes, parts = [size for size, _ in found], [part for _, part in found]
    handles = draw_bars(axes, parts, sizes, [f"{size:.3g}" for size in sizes], [
        ("bits", 1.13, [part.bits for part in parts]), ("format", 1.35, [part.format for part in parts])])
    axes.set_xlim(0, 1.15 * max([*sizes, 1e-9]))
    what = "cost in milli-nats per token" if priced else "root mean square error over that of the weights"
    finish(axes, title, f"{what}\nbits per weight, scales included", "", handles)


def draw_bins(axes: Axes, series: Series, curves: dict[str, Curve], share: Curve, title: str, x: str) -> list:
    """Bits per byte over bins that double, and behind the lines how the bytes are spread; returns the handles."""
    behind = axes.twinx()
    behind.bar(share.x, share.y, width=[0.62 * x for x in share.x], color="#DDDDDD")
    behind.set_ylim(0, 4 * max([*share.y, 1e-9]))  # the bars stay in the lowest quarter
    behind.axis("off")
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)
    handles = []
    for name, curve in curves.items():
        handles += axes.plot(curve.x, curve.y, color=series.colour(name), marker="o", markersize=5, linewidth=1.8,
                             label=name)
    values = [y for curve in curves.values() for y in curve.y]
    if values:
        low, high = min(values), max(values)
        pad = max(0.08 * (high - low), 0.01)
        axes.set_ylim(low - 0.32 * (high - low) - pad, high + pad)  # above the bars
    axes.set_xscale("log", base=2)
    ticks = sorted({2 ** round(math.log2(x) - 0.5) for x in share.x})
    ticks += [2 * tick for tick in ticks[-1:]]
    axes.set_xticks(ticks[::-(-len(ticks) // 9)], [format_count(tick) for tick in ticks[::-(-len(ticks) // 9)]])
    axes.minorticks_off()
    finish(axes, title, x, "bits per byte")
    return handles


def format_count(number: int) -> str:
    """Returns a power of two as text: 512, 1k, 64k."""
    return f"{number}" if number < 1024 else f"{number // 1024}k"


def draw_gains(axes: Axes, series: Series) -> None:
    """Each evaluator's gain over the reference, the documents sorted by it, named with the gain over all of them."""
    found = series.documents
    title = f"Gain over {found.reference}, by document"
    if not found.gains:
        say_missing(axes, "one evaluator:\nnothing to compare")
        finish(axes, title if found.reference else "Gain by document", "", "")
        return
    # A few documents at both ends must not squeeze the rest together.
    edges = np.concatenate([np.quantile(curve.y, [0.02, 0.98]) for curve in found.gains.values()])
    low, high = min(edges.min(), 0.0), max(edges.max(), 0.0)
    pad = 0.06 * max(high - low, 1e-3)
    axes.set_ylim(low - pad, high + pad)
    axes.axhline(0, color=GREY, linewidth=1.2)
    for name, curve in found.gains.items():
        axes.plot(curve.x, curve.y, color=series.colour(name), linewidth=2)
    lines = [("all documents", "black"), *((f"{name} {total:+.4f}", series.colour(name)) for name, total in
                                           sorted(found.totals.items(), key=lambda item: -item[1]))]
    for row, (text, colour) in enumerate(lines):
        axes.text(1.04, 0.97 - 0.075 * row, text, transform=axes.transAxes, va="center", color=colour, fontsize=11.5,
                  fontweight="normal" if row else "bold")
    axes.set_xlim(0, 100)
    finish(axes, title, "share of documents, sorted by gain (%)", "bits per byte saved")


def draw_documents(figure: Figure, series: Series, rows: tuple[float, float], top: float) -> None:
    """The three panels of documents.npz at the foot of the picture, one legend above them."""
    found, (y, height) = series.documents, rows
    axes = figure.add_axes((0.055, y, 0.255, height))
    handles = draw_bins(axes, series, found.by_position, found.position_share, "By position in the document",
                        "tokens behind the document's start")
    axes = figure.add_axes((0.375, y, 0.22, height))
    draw_bins(axes, series, found.by_length, found.length_share, "By length of the document",
              "tokens of the document")
    draw_gains(figure.add_axes((0.665, y, 0.22, height)), series)
    from matplotlib.patches import Patch

    handles.append(Patch(color="#DDDDDD", label="share of the bytes"))
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.047, top), ncol=len(handles), handlelength=1.6,
                  columnspacing=1.4, borderaxespad=0)


# ---- command line


def read_table(path: Path) -> dict[str, np.ndarray]:
    """Returns the columns of documents.npz, {} where there is none; raises PlotError where it is damaged."""
    if not path.exists():
        return {}
    try:
        with np.load(path) as table:
            return dict(table)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise PlotError(f"{path}: damaged ({error})") from error


def read_json(path: Path) -> dict:
    """Returns the object in a JSON file, {} where there is none; raises PlotError where it is damaged."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise PlotError(f"{path}: damaged JSON ({error})") from error
    if not isinstance(value, dict):
        raise PlotError(f"{path}: not a JSON object")
    return value


def plot_run(folder: Path, out: Path) -> None:
    """Draws the run in `folder` into the PNG file `out`, whole or not at all; raises PlotError."""
    path = folder / "events.jsonl"
    try:
        events, broken = read_events(path)
    except OSError as error:
        raise PlotError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        series = prepare(events, read_json(folder / "config.json"), read_json(folder / "result.json"),
                         folder.resolve().name, read_table(folder / "documents.npz"))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise PlotError(f"{folder}: an event, a result or documents.npz lacks what it must have ({error!r})") from error
    if broken:
        series.notes.append(f"{broken} broken line{'s' * (broken > 1)} skipped")
    part = out.with_name(f"{out.name}.{os.getpid()}.part")
    try:
        draw(series).savefig(part, format="png")
        part.replace(out)
    except OSError as error:
        raise PlotError(f"{out}: cannot be written ({error.strerror})") from error
    finally:
        if part.exists():
            part.unlink()


def main(argv: list[str]) -> int:
    """Draws one run; returns the exit code: 0, or 2 after one line for a user's mistake."""
    if argv in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    out = None
    if len(argv) == 3 and argv[1] == "--out":
        argv, out = argv[:1], Path(argv[2])
    if len(argv) != 1 or argv[0].startswith("-"):
        print("usage: python tools/plot.py RUN_FOLDER [--out curve.png]", file=sys.stderr)
        return 2
    try:
        plot_run(Path(argv[0]), out or Path(argv[0]) / "curve.png")
    except PlotError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
