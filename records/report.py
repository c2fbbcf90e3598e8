"""The leaderboard of local runs and records: one page with tables and plots that needs nothing else.

    python records/report.py [FOLDER ...] [--out report.html]      a page; without folders those in runs/ and records/
    python records/report.py [FOLDER ...] --markdown               the table alone, for a README

A run folder counts with what its result.json says, a record with its submission.json; both are read within limits and
never run, and what cannot be read is named and left out. A run is ranked by the evaluator that scored its artifact
best, a record by its mean. Other text on other documents is another contest: entries are ranked within one validation
split, told apart by the bytes that were scored.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from records import schema  # noqa: E402
from records.folder import LOG_LIMIT_BYTES, Folder, FolderError, shown  # noqa: E402
from tools import plot  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_CURVES, MOST_BARS = 12, 16
LEAST_GAP = 0.055  # between two labels, as a share of the axis


class ReportError(Exception):
    """A user's mistake; the message is one clear line."""


class Entry(NamedTuple):
    """A run or a record: where it is, what it is, its headline and the evaluator behind it, bytes of model and code,
    seconds of training and evaluation, steps, the bytes that were scored, seeds, and for a run its curve and parts."""

    name: str
    kind: str
    preset: str
    bpb: float
    evaluator: str
    scores: dict[str, float]
    model_bytes: int | None
    code_bytes: int | None
    train_seconds: float | None
    eval_seconds: float | None
    steps: int | None
    val_bytes: int | None
    seeds: str
    ok: bool | None
    curve: plot.Curve
    parts: list[plot.Part]

    @property
    def total_bytes(self) -> int | None:
        """Code plus model, None where one is not known."""
        known = self.model_bytes is not None and self.code_bytes is not None
        return self.model_bytes + self.code_bytes if known else None


def part(value: dict[str, Any], key: str) -> dict[str, Any]:
    """An object inside an object; empty where there is none."""
    found = value.get(key)
    return found if isinstance(found, dict) else {}


def number(value: Any) -> float | None:
    """The value where it is a number that something can be."""
    return value if schema.is_number(value) else None


def whole(value: Any) -> int | None:
    """The value as a whole number, where it is one."""
    return None if number(value) is None else int(value)


def read_run(folder: Folder) -> Entry | None:
    """A run; None where it has scored no artifact yet."""
    result = folder.json("result.json").value
    found = {name: number(score.get("val_bpb")) for name, score in part(result, "scores").items()
             if isinstance(score, dict)}
    scores = {name: value for name, value in found.items() if value is not None}
    ranked = {name: value for name, value in scores.items() if name not in plot.DIAGNOSTICS
              and schema.FIELDS["val_bpb"].holds(value)}
    if not ranked:
        return None
    evaluator = min(ranked, key=ranked.get)
    events = plot.parse_events(folder.read("events.jsonl", LOG_LIMIT_BYTES))[0] if (
        "events.jsonl" in folder.files) else []
    artifact, budget, data = part(result, "artifact"), part(result, "budget"), part(result, "data")
    kept = budget.get("ok")
    try:
        curve = plot.smooth(plot.make_curve(plot.valid_events(events)[0]["step"], "train_loss"))
        parts = plot.byte_parts(events, {"artifact": artifact})[0]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise FolderError("events.jsonl: has events that no run writes") from None
    return Entry(folder.root.resolve().name, "run",
                 " + ".join(str(name) for name in (result.get("preset"), result.get("overlay")) if name),
                 ranked[evaluator], evaluator, scores, whole(artifact.get("model_bytes")),
                 whole(artifact.get("code_bytes")), number(budget.get("train_seconds")),
                 number(result.get("eval_seconds")), whole(part(result, "train").get("steps")),
                 whole(data.get("val_bytes")), str(result.get("seed", "")),
                 kept if isinstance(kept, bool) else None, in_bits(curve, data), parts)


def in_bits(losses: plot.Curve, data: dict[str, Any]) -> plot.Curve:
    """Losses in nats a token as bits per byte at the validation split's bytes a token, so that tokenizers compare;
    nothing where that is not known."""
    tokens, size = whole(data.get("val_tokens")), whole(data.get("val_bytes"))
    if not tokens or not size or not losses.y:
        return plot.Curve()
    return plot.Curve(losses.x, plot.bits_per_byte(np.array(losses.y) * tokens, np.array(size)).tolist())


def read_record(folder: Folder) -> Entry | None:
    """A record; None where it claims no score."""
    claim = folder.json("submission.json").value
    bpb = claim.get("val_bpb")
    if not schema.FIELDS["val_bpb"].holds(bpb):
        return None
    seeds = claim.get("seed_results")
    rows = [row for row in seeds.values() if isinstance(row, dict)] if isinstance(seeds, dict) else []

    def worst(key: str) -> float | None:
        values = [value for row in rows if (value := number(row.get(key))) is not None]
        return max(values, default=None)
    return Entry(folder.root.resolve().name, "record", str(claim.get("name", "")), bpb,
                 str(claim.get("metric_label", "")), {}, whole(claim.get("bytes_model")),
                 whole(claim.get("bytes_code")), worst("train_loop_s"), worst("eval_s"), whole(worst("steps")),
                 whole(claim.get("val_bytes")),
                 f"mean of {len(rows)}" if rows else "", None, plot.Curve(), [])


READERS: dict[str, Callable[[Folder], Entry | None]] = {"result.json": read_run, "submission.json": read_record}


def collect(folders: Iterable[Path]) -> list[Entry]:
    """The entries in these folders, the best first; a folder that holds neither file is searched two levels down. What
    cannot be read is named on standard error."""
    found: list[Entry] = []
    for folder in folders:
        if not folder.is_dir():
            raise ReportError(f"{folder}: no such folder")
        inside = [folder] if any((folder / name).exists() for name in READERS) else sorted(
            {path.parent for name in READERS for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{name}")})
        for place in inside:
            try:
                held = Folder(place)
                reader = next((READERS[name] for name in READERS if name in held.files), None)
                if reader is None:
                    raise FolderError("result.json or submission.json: is no plain file")
                if (entry := reader(held)) is not None:
                    found.append(entry)
            except FolderError as error:
                print(f"{place}: left out: {error}", file=sys.stderr)
    return sorted(found, key=lambda entry: (-(entry.val_bytes or 0), entry.bpb, entry.name))


# ---- the table


COLUMNS: dict[str, Callable[[Entry], str]] = {
    "what": lambda entry: entry.name, "preset": lambda entry: entry.preset, "seed": lambda entry: entry.seeds,
    "bits per byte": lambda entry: f"{entry.bpb:.4f}", "by": lambda entry: entry.evaluator,
    "other scores": lambda entry: ", ".join(f"{name} {value:.4f}" for name, value in entry.scores.items()
                                            if name != entry.evaluator),
    "model bytes": lambda entry: count_text(entry.model_bytes),
    "code bytes": lambda entry: count_text(entry.code_bytes),
    "total": lambda entry: count_text(entry.total_bytes), "steps": lambda entry: count_text(entry.steps),
    "train s": lambda entry: count_text(entry.train_seconds), "eval s": lambda entry: count_text(entry.eval_seconds),
    "budget": lambda entry: {True: "kept", False: "over", None: ""}[entry.ok],
    "scored bytes": lambda entry: count_text(entry.val_bytes)}
MOST_SIGNS = 200  # of a cell
LEFT = ("what", "preset", "by", "other scores")


def count_text(value: float | None) -> str:
    """A number with separators, whole ones without decimals; empty for None."""
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def markdown(entries: list[Entry]) -> str:
    """The table for a README."""
    lines = [f"| {' | '.join(COLUMNS)} |",
             "|" + "|".join(" --- " if name in LEFT else " ---: " for name in COLUMNS) + "|"]
    lines += ["| " + " | ".join(html.escape(shown(read(entry), MOST_SIGNS), quote=False).replace("|", "\\|")
                                for read in COLUMNS.values()) + " |" for entry in entries]
    return "\n".join(lines)


def table(entries: list[Entry]) -> str:
    """The same as HTML, numbered as the plots are."""
    head = "".join(f"<th>{name}</th>" for name in ("#", *COLUMNS))
    rows = ""
    for rank, entry in enumerate(entries, 1):
        cells = "".join(f"<td{'' if name in LEFT else ' class=number'}>"
                        f"{html.escape(shown(read(entry), MOST_SIGNS))}</td>" for name, read in COLUMNS.items())
        rows += f"<tr><td>{rank}</td>{cells}</tr>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


# ---- the plots


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many inches and its axes, with room for labels at the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100)
    return figure, figure.add_axes((0.09, 0.13, 0.6, 0.74))


def label_right(axes: Axes, points: list[tuple[float, str, str]]) -> None:
    """Names (y, text, colour) in the margin at the height of their y, kept apart, with a line to it."""
    low, high = axes.get_ylim()
    gap = min(LEAST_GAP, 1 / max(1, len(points))) * (high - low)
    places = plot.spread([y for y, *_ in points], gap, low, high)
    for (y, text, colour), place in zip(points, places, strict=True):
        axes.annotate(text, xy=(1.0, y), xytext=(1.04, place), xycoords=("axes fraction", "data"), va="center",
                      textcoords=("axes fraction", "data"), fontsize=9, color=colour, annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "relpos": (0, 0.5)})


def label(rank: int, entry: Entry) -> str:
    """An entry's number and name, which is text and no formula, however strange."""
    return f"{rank + 1} {shown(entry.name, 32)}".replace("$", r"\$")


def colour_of(rank: int) -> str:
    """The colour of an entry, the same in every plot."""
    return plot.SCORE_COLOURS[rank % len(plot.SCORE_COLOURS)]


def scatter(entries: list[Entry], read: Callable[[Entry], float | None], title: str, x: str) -> Figure | None:
    """Bits per byte over something, every entry named; None where nothing is known of it."""
    points = [(rank, value, entry) for rank, entry in enumerate(entries) if (value := read(entry)) is not None]
    if not points:
        return None
    figure, axes = new_figure(9, 4.6)
    for rank, value, entry in points:
        axes.plot(value, entry.bpb, marker="o" if entry.kind == "run" else "s", markersize=8, color=colour_of(rank))
    values, heights = [value for _, value, _ in points], [entry.bpb for *_, entry in points]
    pad = 0.08 * max(max(heights) - min(heights), 0.02)
    axes.set_ylim(min(heights) - pad, max(heights) + pad)
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_xscale("log")
    label_right(axes, [(entry.bpb, label(rank, entry), colour_of(rank)) for rank, _, entry in points])
    plot.finish(axes, title, x, "bits per byte")
    return figure


def curves(entries: list[Entry]) -> Figure | None:
    """The smoothed training losses over each other."""
    known = [(rank, entry) for rank, entry in enumerate(entries) if len(entry.curve.y) > 1][:MOST_CURVES]
    if not known:
        return None
    figure, axes = new_figure(9, 4.6)
    for rank, entry in known:
        axes.plot(entry.curve.x, entry.curve.y, color=colour_of(rank), linewidth=1.6)
    # The first steps are several times the rest and would squeeze it together.
    later = [y for _, entry in known for y in entry.curve.y[len(entry.curve.y) // 10:]]
    axes.set_ylim(min(later) - 0.05, max(later) + 0.05)
    label_right(axes, [(entry.curve.y[-1], label(rank, entry), colour_of(rank)) for rank, entry in known])
    plot.finish(axes, "Training loss, smoothed", plot.TRAINING_TIME, "bits per byte of validation")
    return figure


def bars(entries: list[Entry]) -> Figure | None:
    """Where the bytes of each artifact go, by kind of part."""
    known = [(rank, entry) for rank, entry in enumerate(entries) if entry.parts][:MOST_BARS]
    if not known:
        return None
    figure, axes = new_figure(9, 2.0 + 0.34 * len(known))
    axes.set_position((0.3, 1.0 / figure.get_figheight(), 0.66, 1 - 1.6 / figure.get_figheight()))
    kinds = {kind or "code, scales, header": colour for kind, colour in plot.KIND_COLOURS.items()}
    left, seen = [0.0] * len(known), []
    for kind, colour in kinds.items():
        sizes = [sum(part.bytes for part in entry.parts if (part.kind or "code, scales, header") == kind) / 1e6
                 for _, entry in known]
        if any(sizes):
            seen.append(axes.barh(range(len(known)), sizes, left=left, color=colour, label=kind))
            left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.set_yticks(range(len(known)), [label(rank, entry) for rank, entry in known], fontsize=9)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    figure.legend(handles=seen, loc="lower center", ncol=len(seen), fontsize=8.5)
    plot.finish(axes, "Bytes of the artifact", "million bytes", "")
    return figure


PLOTS: tuple[Callable[[list[Entry]], Figure | None], ...] = (
    lambda entries: scatter(entries, lambda entry: entry.total_bytes, "Bits per byte and bytes",
                            "code plus model, bytes"),
    lambda entries: scatter(entries, lambda entry: entry.train_seconds, "Bits per byte and training time",
                            "training with calibration, seconds"),
    curves, bars)

STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1500px;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:13px}th,td{padding:.3em .6em;border-bottom:1px solid #ddd;text-align:left}
td.number{text-align:right;font-variant-numeric:tabular-nums}th{background:#f4f4f4}
th:nth-child(n+4):not(:nth-child(6)):not(:nth-child(7)){text-align:right}
.scroll{overflow-x:auto}figure{display:inline-block;width:48%;min-width:560px;margin:1em 1% 0 0}img{width:100%}"""


def page(entries: list[Entry]) -> str:
    """The whole page, pictures inside, without scripts; one section for each validation split."""
    import matplotlib

    matplotlib.use("Agg")
    sections = []
    for size in dict.fromkeys(entry.val_bytes for entry in entries):
        own = [entry for entry in entries if entry.val_bytes == size]
        pictures = []
        with matplotlib.rc_context(plot.STYLE | {"font.size": 11, "axes.titlesize": 12}):
            for draw in PLOTS:
                if (figure := draw(own)) is not None:
                    held = io.BytesIO()
                    figure.savefig(held, format="svg")
                    data = base64.b64encode(held.getvalue()).decode()
                    pictures.append(f'<figure><img alt="" src="data:image/svg+xml;base64,{data}"></figure>')
        title = "of an unknown validation split" if size is None else f"of {size:,} validation bytes"
        sections.append(f"<h2>{len(own)} {title}</h2><div class=scroll>{table(own)}</div>{''.join(pictures)}")
    body = "".join(sections) or "<p>No run has scored an artifact yet.</p>"
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Runs and records</title>'
            f"<style>{STYLE}</style></head><body><h1>Runs and records</h1><p>Lower is better; circles are runs, "
            f"squares records, numbered as in the table.</p>{body}</body></html>\n")


def main(argv: list[str]) -> int:
    """Returns 0, or 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(prog="records/report.py", description="The leaderboard of local runs and records.")
    parser.add_argument("folders", nargs="*", type=Path, help="run folders, records, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default: report.html)")
    parser.add_argument("--markdown", action="store_true", help="print the table for a README instead")
    options = parser.parse_args(argv)
    try:
        folders = options.folders or [path for path in (ROOT / "runs", ROOT / "records") if path.is_dir()]
        entries = collect(folders)
        if options.markdown:
            print(markdown(entries))
            return 0
        options.out.write_text(page(entries), encoding="utf-8")
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"--out {options.out}: cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    print(f"{len(entries)} entries: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
