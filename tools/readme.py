"""Rewrites the generated parts of README.md, so that no number or list in it is typed by hand.

    python tools/readme.py [RUN_FOLDER]

A generated part stands between `<!-- NAME: generated -->` and `<!-- end -->`. With a run folder its result.json first
becomes a record: of a default run on a CPU records/reference_run.json, from which the result table is made, of the
preset `jamone` at full size records/jamone_run.json. `--check` changes nothing and exits with 1 when README.md is
stale.
"""

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt  # noqa: E402

README, REFERENCE = ROOT / "README.md", ROOT / "records" / "reference_run.json"
SQUEEZE = ROOT / "records" / "squeeze.json"  # made by ./run.sh bench formats RUN_FOLDER TERNARY=1 --json
COMPARE = ROOT / "records" / "compare_presets.json"  # made by ./run.sh bench presets
CRAWLER = ROOT / "records" / "compare_crawler.json"  # made by ./run.sh bench crawler
TERNARY = ROOT / "records" / "compare_ternary.json"  # made by ./run.sh bench ternary
HYBRID = ROOT / "records" / "compare_hybrid.json"  # made by ./run.sh bench hybrid
HYBRID_MORE = ROOT / "records" / "compare_hybrid_more.json"  # likewise, with ROWS and --json
TEXT = ROOT / "records" / "generate.json"  # made by ./run.sh bench generate RUN_FOLDER ...
JAMONE = ROOT / "records" / "jamone_run.json"  # the command is in records/LOG.md
RUNS = {("sixteen", "tiny"): REFERENCE, ("jamone", ""): JAMONE}  # preset and overlay of a run -> its record
PART = re.compile(r"(<!-- (\w+): generated -->\n).*?(<!-- end -->)", re.S)


def result_table() -> str:
    """The scores of the reference run beside ordinary compressors, then its bytes and seconds."""
    result = json.loads(REFERENCE.read_text())
    lines = ["| what | bits per byte | seconds |", "| --- | ---: | ---: |"]
    order = ("sliding", "contiguous", "float")
    for name in sorted(result["scores"], key=lambda key: order.index(key) if key in order else -1):
        entry = result["scores"][name]
        what = "float weights before the squeeze, contiguous" if name == "float" else f"the artifact, {name}"
        lines.append(f"| {what} | **{entry['val_bpb']:.4f}** | {entry['seconds']:.0f} |")
    lines += [f"| {name} on the same {result['data']['val_bytes']:,} bytes | {value:.4f} | |"
              for name, value in result["yardsticks"].items()]
    artifact, environment = result["artifact"], result["environment"]
    lines += ["", f"{result['train']['steps']:,} steps, {result['train']['tokens']:,} tokens and "
              f"{result['train']['seconds']:.0f} seconds of training on {environment['threads']} CPU cores "
              f"({environment['cpu']}, torch {environment['torch']}); model {artifact['model_bytes']:,} + code "
              f"{artifact['code_bytes']:,} = {artifact['total_bytes']:,} of {artifact['limit_bytes']:,} bytes; every "
              f"one of {result['ledger']['targets']:,} targets scored once."]
    return "\n".join(lines)


def squeeze_table() -> str:
    """The rows of the formats benchmark."""
    table = json.loads(SQUEEZE.read_text())["tables"][0]
    keys = {"row": "", "bits a weight": ".2f", "model bytes": ",d", "loss": "+.4f"}
    lines = [f"| {' | '.join(keys)} |", "| --- | ---: | ---: | ---: |"]
    for row in table["rows"]:
        cells = dict(zip(table["columns"], row, strict=True)) if isinstance(row, list) else row
        lines.append("| " + " | ".join(format(cells[key], form) for key, form in keys.items()) + " |")
    return "\n".join(lines)


def compare_table() -> str:
    """The presets' means over their seeds, and what the base is minus each of the others; or the command that measures
    them."""
    if not COMPARE.exists():
        return "`./run.sh bench presets` makes this table; it has not been made yet."
    shapes, runs, *rest = json.loads(COMPARE.read_text())["tables"]
    rows = [row for row in runs["rows"] if row["seed"].startswith("mean")]
    forms = {"artifact bytes": ",.0f", "steps": ",.0f", "tokens/s": ",.0f", "train s": ".1f"}
    kinds = [name for name in rows[0] if name not in {"variant", "seed", "run", *forms}]
    verdict, found = "", {}
    for row in rest[0]["rows"] if rest else []:
        verdict = next(name for name in row if name.endswith(" is"))
        shown = [f"{row['mean']:+.4f} \u00b1 {row['+-']:.4f}"] if row["+-"] is not None else []
        found[row["minus"], row["evaluator"]] = ", ".join([*shown, row[verdict]])
    heads = ["preset", *kinds, *forms]
    if rest:
        heads += [f"{verdict.removesuffix(' is')} minus it: {kinds[0]}", *kinds[1:]]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for row in rows:
        cells = [f"`{row['variant']}`", *("" if row[name] is None else format(row[name], forms.get(name, ".4f"))
                                          for name in (*kinds, *forms))]
        cells += [found.get((row["variant"], kind), "") for kind in kinds if rest]
        lines.append("".join(f"| {cell} " if cell else "| " for cell in cells) + "|")
    notes = [f"{runs['title']}; {rows[0]['seed']} seeds", runs["note"], shapes["title"],
             *(table["note"] for table in rest)]
    return "\n".join([*lines, "", ". ".join(notes) + "."])


def suite_table(record: Path, name: str, more: dict[str, str]) -> str:
    """The rows of a comparison with a base, the best first, with `more` of its columns and their formats; then what
    was made of some weights again. Or the command that measures them."""
    if not record.exists():
        return f"`./run.sh bench {name}` makes this table; it has not been made yet."
    shapes, runs, table, *rest = json.loads(record.read_text())["tables"]
    forms = {"contiguous": ".4f", **more, "artifact bytes": ",.0f", "steps": ",.0f", "train s": ".1f"}
    lines = [f"| row | contiguous | minus base | {' | '.join([*forms][1:])} | changed |",
             "| --- |" + " ---: |" * (1 + len(forms)) + " --- |"]
    for row in table["rows"]:
        cells = ["" if row[key] is None else format(row[key], form) for key, form in forms.items()]
        changed = f"`{row['changed']}`" if row["changed"] else ""
        lines.append(f"| {row['row']} | {cells[0]} | {difference(row)} | {' | '.join(cells[1:])} | {changed} |")
    seeds = max(row["seeds"] for row in table["rows"])
    notes = [f"{runs['title']}; {seeds} seeds", runs["note"], shapes["title"], table["note"]]
    lines += ["", ". ".join(notes) + "."]
    for extra in rest:
        labels = [key for key in extra["rows"][0] if key != "row" and not key.endswith("+-") and any(
            row[key] is not None for row in extra["rows"])]
        lines += ["", f"{extra['title']}; {extra['note']}.", "", f"| row | {' | '.join(labels)} |",
                  "| --- |" + " ---: |" * len(labels)]
        for row in extra["rows"]:
            cells = ["" if row[label] is None else f"{row[label]:+.4f}" for label in labels]
            halves = ["" if row[f"{label} +-"] is None else f" \u00b1 {row[f'{label} +-']:.4f}" for label in labels]
            lines.append(f"| {row['row']} | {' | '.join(map(''.join, zip(cells, halves, strict=True)))} |")
    return "\n".join(lines)


def difference(row: dict[str, Any]) -> str:
    """What a row's contiguous score is to the base's."""
    half, verdict = row["contiguous +-"], row["contiguous is"]
    return verdict if half is None else f"{row['contiguous minus base']:+.4f} \u00b1 {half:.4f}, {verdict}"


def crawler_table() -> str:
    """The crawler's comparison."""
    return suite_table(CRAWLER, "crawler", {"squeeze": "+.4f"}) + (
        " squeeze: bits per byte of the artifact minus those of the float weights." if CRAWLER.exists() else "")


def ternary_table() -> str:
    """The ternary block's comparison."""
    return suite_table(TERNARY, "ternary", {"bits a trit": ".3f", "zeros": ".3f"})


def hybrid_table() -> str:
    """The hybrid stack's comparison, and some of its artifacts evaluated otherwise; then rows that came later."""
    more = ["The other rows, trained by a later program beside a base of their own:",
            suite_table(HYBRID_MORE, "hybrid", {})] if HYBRID_MORE.exists() else []
    return "\n\n".join([suite_table(HYBRID, "hybrid", {}), *more])


def text_table() -> str:
    """Speed and memory of text from artifacts; or the command that measures them."""
    if not TEXT.exists():
        return "`./run.sh bench generate RUN_FOLDER ...` makes this table; it has not been made yet."
    record = json.loads(TEXT.read_text())
    table, machine = record["tables"][0], record["machine"]
    forms = {"preset": "", "stack": "", "as": "", "text": "", "tokens/s": ",.0f",
             **{name: ",.0f" for name in table["rows"][0] if name.startswith("at ")}, "last / first": ".2f",
             "drafts taken": ".0%", "model bytes": ",d", "packed / bf16": ".3f", "state bytes": ",d"}
    lines = [f"| {' | '.join(forms)} |", "| --- | --- | --- | --- |" + " ---: |" * (len(forms) - 4)]
    for row in table["rows"]:
        cells = ["" if row[name] is None else format(row[name], form) for name, form in forms.items()]
        lines.append(f"| `{cells[0]}` | `{cells[1]}` | {' | '.join(cells[2:])} |")
    return "\n".join([*lines, "", f"{table['title']}, on {machine['cores']} CPU cores ({machine['cpu']}, torch "
                      f"{machine['torch']}); {table['note']}."])


def measured(record: Path, *names: str) -> str:
    """What a comparison found of rows, each beside its base."""
    if not record.exists():
        return "not measured yet"
    rows = {row["row"]: row for row in json.loads(record.read_text())["tables"][2]["rows"]}
    return "; ".join(f"`{name}` {difference(rows[name])}" for name in names if name in rows)


def trits(*names: str) -> str:
    """Bits a trit that a comparison found of rows."""
    if not TERNARY.exists():
        return "not measured yet"
    rows = {row["row"]: row for row in json.loads(TERNARY.read_text())["tables"][2]["rows"]}
    return ", ".join(f"{rows[name]['bits a trit']:.3f} (`{name}`)" for name in names if name in rows)


def full_size(preset: str) -> str:
    """Parameters and forecast model bytes of a preset at full size."""
    config = train_gpt.load_config([f"PRESET={preset}", "OVERLAY="], {}, gpus=0)
    model = train_gpt.make_skeleton(config)
    size = sum(train_gpt.forecast_fitted(model, config.artifact, 0).values())
    return (f"{sum(train_gpt.count_roles(model).values()):,} parameters, forecast {size:,.0f} bytes without code "
            f"(`PRESET={preset} OVERLAY= ./run.sh --plan`)")


def jamone_run() -> str:
    """The trained run of jamone at full size."""
    if not JAMONE.exists():
        return "no trained run yet"
    result = json.loads(JAMONE.read_text())
    train, bits = result["train"], result["artifact"]["bits_per_trit"]
    return (f"a trained run (full size, `RATE_TERM={result['rate_term']:g}`, {train['steps']:,} steps, "
            f"{train['tokens']:,} tokens on 2 CPU cores): model {result['artifact']['model_bytes']:,} bytes, "
            f"{bits['coded']:.3f} bits a trit in the file, {bits['entropy']:.3f} by itself, of {math.log2(3):.3f}; "
            f"zeros {train['trits']['zeros']:.3f}; "
            + (f"{result['scores']['contiguous']['val_bpb']:.4f} BPB" if "scores" in result else
               "not scored: 31 passes over the validation split take a quarter of an hour here"))


# System, published claim, what its code did, what we measure.
CLAIMS: tuple[tuple[str, str, str, Callable[[], str]], ...] = (
    ("`jamone`", "0.93 MB, 99.9 % of Shannon's limit",
     "a formula, parameters times log2 3 with the tied head counted twice; there is no packer. The figure is bits a "
     "parameter, shown as bits a byte", lambda: f"{full_size('jamone')}; {jamone_run()}"),
    ("`jamone`", "loss 0.74 after 5,000 steps",
     "attention without a causal mask; ternary weights without a gradient: only scales and biases learned; no loop, "
     "no data, no evaluation in the repository",
     lambda: "causal and trained: tests/test_09_model.py, tests/test_10_latents.py; eight passes at equal bytes are in "
     "the table above"),
    ("`jamone`", "CAGS: a surgery gain of 21 %",
     "every gradient times 1.1, which cancels in AdamW; an older formula is a factor between 1 and 1.03",
     lambda: f"{measured(TERNARY, 'plain', 'cags-published', 'cags-placed', 'rate-term', 'rate-term-4')}; bits a trit "
     f"{trits('plain', 'cags-published', 'cags-placed', 'rate-term', 'base', 'rate-term-4')}"),
    ("`jamone`", "31 passes through one block", "never compared with fewer",
     lambda: measured(TERNARY, "passes-2", "passes-31", "distinct-2", "distinct-8") + "; the base has 8; one block is "
     "as wide at equal bytes whatever its passes"),
    ("`radial`", "2.6034 BPB, later 1.3379, ternary at 12.55 MB",
     "the byte counter took the word marker for three bytes (1.35 times too many bytes); binary weights, stored as "
     "8-bit latents; the later figure on 12 sequences",
     lambda: f"{full_size('radial')}; {measured(TERNARY, 'binary')}"),
    ("`radial`", "FRO dramatically outperforms AdamW",
     "its resonance is 1 - (1 - pace)^step whatever the gradients are: a fixed schedule of the rate; never compared",
     lambda: measured(TERNARY, "fro", "fro2", "adamw") + "; the base has Muon"),
    ("`radial`", "radial encoding of places", "eight bits: places 256 apart were the same, the angle jumps",
     lambda: measured(TERNARY, "radial", "radial-smooth", "rotary") + "; the base has a learned table"),
    ("`ternary`", "73.7 M parameters, base 3 with LZMA 39 % smaller",
     "6.3 M are a head that is frozen, unused and not stored; the smaller of two forms was the other one, bit planes",
     lambda: full_size("ternary")),
    ("`ternary`", "1.1821 contiguous, 1.1570 sliding; temperature 0.90 is best",
     "the first holds the z-loss; the temperature is read by nothing", lambda: "scores never hold the z-loss (a test), "
     "there is no temperature; not trained at full size: no GPU for hours"),
    ("`ternary`", "scale by root mean square lowers the share of zeros",
     "the counter still used the mean: zeros rise", lambda: f"{measured(TERNARY, 'rms', 'nonzero', 'threshold')}; bits "
     f"a trit {trits('base', 'rms', 'nonzero', 'threshold')}"),
    ("`clowncar`", "1.1813 BPB at 9.1 MB",
     "scales had a floor, so that small weights cost nothing and lost everything", lambda: full_size("clowncar")),
    ("`clowncar`", "flow instructions tell passes apart", "they were in no optimizer",
     lambda: measured(CRAWLER, "no-instructions", "static", "position")),
    ("`clowncar`", "a delta memory carries knowledge between passes",
     "the state at the end of a pass went to position 0 of the next: it saw the future",
     lambda: f"{measured(CRAWLER, 'delta-memory')}; the leak fails the audit (tests/test_13_cheats.py)"),
    ("`clowncar`", "four passes", "GPTQ on Hessians of another graph",
     lambda: measured(CRAWLER, "one-pass", "two-passes", "eight-passes", "flat")),
)


def claims_table() -> str:
    """What was published of four systems, what was behind it, and what is here."""
    return "\n".join(["| system | published | what its code did | measured here |", "| --- | --- | --- | --- |",
                      *(f"| {system} | {claim} | {code} | {read()} |" for system, claim, code, read in CLAIMS)])


def layout_table() -> str:
    """The index of train_gpt.py, from its header."""
    rows = re.findall(r"^    (\d\d) ([A-Z]+) +(.+)$", train_gpt.__doc__, re.M)
    return "\n".join(["| section | what is there |", "| --- | --- |",
                      *(f"| {number} {name} | {text} |" for number, name, text in rows)])


def presets_table() -> str:
    """Every preset and overlay."""
    lines = ["| name | what it is | source |", "| --- | --- | --- |"]
    lines += [f"| `PRESET={name}` | {row.doc} | {row.source} |" for name, row in train_gpt.PRESETS.items()]
    lines += [f"| `OVERLAY={name}` | {doc} | |" for name, (doc, _) in train_gpt.OVERLAYS.items()]
    return "\n".join(lines)


def settings_table() -> str:
    """Every setting with its default and meaning."""
    lines = ["| setting | default | what it does |", "| --- | --- | --- |"]
    for name, (_, field) in train_gpt.SETTINGS.items():
        unit, choices = field.metadata["unit"], field.metadata["choices"]
        text = field.metadata["text"].replace("|", "\\|") + (f" ({', '.join(choices)})" if choices else "")
        shown = train_gpt.show_value(field.default)
        lines.append(f"| `{name}` | {f'`{shown}`' if shown else 'empty'}{f' {unit}' if unit else ''} | {text} |")
    return "\n".join(lines)


PARTS: dict[str, Callable[[], str]] = {
    "result": result_table, "squeeze": squeeze_table, "compare": compare_table, "crawler": crawler_table,
    "ternary": ternary_table, "hybrid": hybrid_table, "text": text_table, "claims": claims_table,
    "layout": layout_table, "presets": presets_table, "settings": settings_table}


def fresh(text: str) -> str:
    """README's text with every generated part made anew; KeyError for a part that no function makes."""
    return PART.sub(lambda match: f"{match[1]}{PARTS[match[2]]()}\n{match[3]}", text)


def main(argv: list[str]) -> int:
    """Returns 0, 1 when --check finds README.md stale, 2 for a run folder without a result."""
    folders = [Path(word) for word in argv if word != "--check"]
    if folders:
        try:
            result = json.loads((folders[0] / "result.json").read_text())
            settings = json.loads((folders[0] / "config.json").read_text())["settings"]
            result["rate_term"] = settings["RATE_TERM"]
        except (OSError, ValueError, KeyError) as error:
            print(f"{folders[0]}: must be a run folder with result.json and config.json ({error})", file=sys.stderr)
            return 2
        kind, packed = (settings["PRESET"], settings["OVERLAY"]), result.get("artifact", {}).get("packed")
        scored = "float" in result.get("scores", {})
        within = result.get("budget", {}).get("ok", False)
        if kind not in RUNS or not packed or RUNS[kind] == REFERENCE and not (scored and within):
            print(f"{folders[0]}: must be a finished default run of the packed file on a CPU within its budget, or "
                  f"jamone's at full size, not {kind}, packed:{packed}, within its budget:{within}", file=sys.stderr)
            return 2
        RUNS[kind].write_text(json.dumps(result, indent=1) + "\n")
    old = README.read_text()
    new = fresh(old)
    if "--check" in argv:
        return int(old != new)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
