"""Rewrites the generated parts of README.md, so that no number or list in it is typed by hand.

    python tools/readme.py [RUN_FOLDER]

A generated part stands between `<!-- NAME: generated -->` and `<!-- end -->`. With a run folder its result.json first
becomes records/reference_run.json, from which the result table is made. `--check` changes nothing and exits with 1
when README.md is stale.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt  # noqa: E402

README, REFERENCE = ROOT / "README.md", ROOT / "records" / "reference_run.json"
SQUEEZE = ROOT / "records" / "squeeze.json"  # made by ./run.sh bench formats RUN_FOLDER TERNARY=1 --json
COMPARE = ROOT / "records" / "compare_presets.json"  # made by ./run.sh bench presets
CRAWLER = ROOT / "records" / "compare_crawler.json"  # made by ./run.sh bench crawler
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


def crawler_table() -> str:
    """The rows of the crawler's comparison, the best first; or the command that measures them."""
    if not CRAWLER.exists():
        return "`./run.sh bench crawler` makes this table; it has not been made yet."
    shapes, runs, table = json.loads(CRAWLER.read_text())["tables"]
    forms = {"contiguous": ".4f", "squeeze": "+.4f", "artifact bytes": ",.0f", "steps": ",.0f", "train s": ".1f"}
    lines = ["| row | contiguous | minus base | squeeze | artifact bytes | steps | train s | changed |",
             "| --- |" + " ---: |" * 6 + " --- |"]
    for row in table["rows"]:
        cells = {name: "" if row[name] is None else format(row[name], form) for name, form in forms.items()}
        verdict = row["contiguous is"]
        if row["contiguous +-"] is not None:
            verdict = f"{row['contiguous minus base']:+.4f} \u00b1 {row['contiguous +-']:.4f}, {verdict}"
        changed = f"`{row['changed']}`" if row["changed"] else ""
        lines.append(f"| {row['row']} | {cells['contiguous']} | {verdict} | {cells['squeeze']} | "
                     f"{cells['artifact bytes']} | {cells['steps']} | {cells['train s']} | {changed} |")
    seeds = max(row["seeds"] for row in table["rows"])
    notes = [f"{runs['title']}; {seeds} seeds", runs["note"], shapes["title"], table["note"],
             "squeeze: bits per byte of the artifact minus those of the float weights"]
    return "\n".join([*lines, "", ". ".join(notes) + "."])


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
        except (OSError, ValueError) as error:
            print(f"{folders[0]}: must be a run folder with a result.json ({error})", file=sys.stderr)
            return 2
        kind = (result.get("preset"), result.get("overlay"), result.get("declared", {}).get("packed"))
        if kind != ("sixteen", "tiny", True) or "float" not in result.get("scores", {}):
            print(f"{folders[0]}: must be a finished default run of the packed file on a CPU, not {kind}",
                  file=sys.stderr)
            return 2
        REFERENCE.write_text(json.dumps(result, indent=1) + "\n")
    old = README.read_text()
    new = fresh(old)
    if "--check" in argv:
        return int(old != new)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
