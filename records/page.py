"""README.md of a record: parts that are made from submission.json, and space for words between them.

Every number of the page stands in a part between `<!-- NAME: generated -->` and `<!-- end -->`; a part is a pure
function of the record, so that a page with an edited number shows. What a person wrote outside is kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Record = Mapping[str, Any]

PAGE = """# {name}

{blurb}

<!-- result: generated -->
<!-- end -->

## What changed, and why

<!-- Words: what is different from the base, which idea it comes from, what was tried without success. -->

## How to run it

<!-- command: generated -->
<!-- end -->

## Checks

<!-- checks: generated -->
<!-- end -->

## Lineage and caveats

<!-- Words: whose work this builds on; what a reader should doubt. -->

## Files

<!-- files: generated -->
<!-- end -->
"""


def table(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns to the left, the others to the right."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def told(value: object, form: str) -> str:
    """A number in a format, or nothing where it is not known."""
    return "" if value is None else format(value, form)


def result_part(record: Record) -> str:
    """Every seed, the stages of each, and the difference from the base."""
    rows = [[str(seed), f"{row['steps']:,}", f"{row['step_avg_ms']:.2f}", told(row["pre_quant_val_bpb"], ".5f"),
             told(row["quantized_val_bpb"], ".5f"), f"{row['val_loss']:.5f}", f"**{row['val_bpb']:.5f}**",
             f"{row['train_budget_s']:.1f}", f"{row['train_strict_s']:.1f}", f"{row['eval_s']:.1f}",
             f"{row['model_bytes']:,}", f"{row['code_bytes']:,}", f"{row['artifact_bytes']:,}"]
            for seed, row in record["seed_results"].items()]
    rows += [["mean", "", "", "", "", f"{record['val_loss']:.5f}", f"**{record['val_bpb']:.5f}**", *[""] * 6],
             ["deviation", "", "", "", "", f"{record['val_loss_std']:.5f}", f"{record['val_bpb_std']:.5f}", *[""] * 6]]
    head = ["seed", "steps", "ms a step", "float BPB", "squeezed BPB", "nats a token", "BPB", "training s", "strict s",
            "evaluation s", "model bytes", "code bytes", "bytes in all"]
    names = list(dict.fromkeys(name for row in record["seed_results"].values() for name in row["scores"]))
    stages = table(["seed", *names], [[str(seed), *(told(row["scores"].get(name, {}).get("val_bpb"), ".5f")
                                                     for name in names)]
                                      for seed, row in record["seed_results"].items()])
    return (f"{record['val_bpb']:.5f} bits a byte and {record['val_loss']:.5f} nats a token: mean of "
            f"{len(record['seeds'])} seeds by `{record['evaluator']}` (log label `{record['metric_label']}`), sample "
            f"deviation {record['val_bpb_std']:.5f} and {record['val_loss_std']:.5f}. The worst seed has "
            f"{record['bytes_total']:,} bytes, {record['bytes_code']:,} of them code. {record['hardware']}.\n\n"
            f"{table(head, rows)}\n\nBits a byte of every evaluator, float weights beside the artifact's:\n\n{stages}"
            f"\n\n{compared(record['comparison'])}")


def compared(found: Mapping[str, Any]) -> str:
    """The difference from the base and what it says."""
    if not found:
        return "No base is named, so nothing is compared."
    deltas = [f"{found[f'delta_{unit}']:+.5f} {words}" for unit, words in (("nats", "nats a token"), ("bpb", "BPB"))
              if f"delta_{unit}" in found]
    lines = [f"Against {found['base']} ({len(found['base_seeds'])} seeds): {', '.join(deltas)}; negative is better."]
    rows = [[bar, unit, f"{row['margin']:.5f}", f"{row['alpha']:g}", told(row.get("t"), ".3f"),
             told(row.get("df"), ".2f"), told(row.get("p"), ".3g"), {True: "met", False: "not met"}.get(row["met"], ""),
             told(row["more_seeds"], "d")] for unit, bars in found["tests"].items() for bar, row in bars.items()]
    head = ["bar", "unit", "margin", "p below", "t", "degrees", "p", "", "more seeds"]
    return "\n\n".join([*lines, "One-sided Welch tests:", table(head, rows, 2)] if rows else lines)


def command_part(record: Record) -> str:
    """The command of each seed, data, environment, and all runs of the configuration."""
    data, runs = record["data"], record["all_runs"]
    barred = any(row.get("disqualified") for row in runs)
    columns = ["run", "seed", "finished", "BPB", "used", "same script", *(["disqualified by"] if barred else [])]
    rows = [[str(row["run"]), str(row["seed"]), str(row["finished"] or "not finished"), told(row["val_bpb"], ".5f"),
             "yes" if row["used"] else "no", "yes" if row["same_script"] else "no",
             *(["; ".join(row["disqualified"]).replace("|", "/")] if barred else [])] for row in runs]
    environment = ", ".join(f"{name} {value}" for name, value in record["environment"].items())
    return (f"    {record['command']}\n\nThe packed script holds every setting of the run (`config.json` lists them); "
            f"`source/train_gpt.py` is the readable one it was made of, commit {record['commit']}, sha256 "
            f"{record['source_sha256']}.\n\nData: {data['source']}, {data['val_documents']:,} validation documents of "
            f"{data['val_bytes']:,} bytes in {data['val_tokens']:,} targets, manifest sha256 "
            f"{data['manifest_sha256']}; tokenizer sha256 {record['tokenizer']['sha256']}.\n\nEnvironment: "
            f"{environment}.\n\nEvery run of this configuration that stood beside those of this record:\n\n"
            + table(columns, rows, len(columns)))


def checks_part(record: Record) -> str:
    """The verdicts that held when the record was made."""
    words = {"pass": "pass", "fail": "FAIL", "unknown": "cannot tell"}
    rows = [[name, row["title"], words[row["status"]], str(row["evidence"]).replace("|", "/")]
            for name, row in record["compliance"].items()]
    modes = "; ".join(record["declared_modes"])
    return table(["", "check", "", "evidence"], rows, 4) + (f"\n\nDeclared: {modes}." if modes else "")


FILE_TEXTS: tuple[tuple[str, str], ...] = (
    (r"README\.md", "this page"), (r"submission\.json", "the numbers, by field"), (r"config\.json", "every setting"),
    (r"requirements\.txt", "packages with versions"), (r"train_gpt\.py", "the packed script that ran and is counted"),
    (r"source/train_gpt\.py", "its readable source, not counted"), (r"tokenizer\.model", "the tokenizer"),
    (r"train_seed\d+\.log", "the log of a seed"), (r"result_seed\d+\.json", "what its run wrote"),
    (r"events_seed\d+\.jsonl", "its events, chained"), (r"receipt_seed\d+\.json", "what its chain comes to"),
    (r"artifact_seed\d+\.bin", "the artifact of a seed"), (r"documents_seed\d+\.npz", "its scores by document"))


def files_part(record: Record) -> str:
    """What lies in the folder."""
    def what(name: str) -> str:
        return next((text for pattern, text in FILE_TEXTS if re.fullmatch(pattern, name)), "")
    return table(["file", "what it is"], [[f"`{name}`", what(name)] for name in record["files"]], 2)


PARTS: dict[str, Callable[[Record], str]] = {"result": result_part, "command": command_part, "checks": checks_part,
                                             "files": files_part}


def place_of(name: str) -> re.Pattern[str]:
    """Where a part stands in a page."""
    return re.compile(rf"(<!-- {name}: generated -->\n)(.*?)(<!-- end -->)", re.S)


def write(record: Record, before: str = "") -> str:
    """The page of a record: a new one, or the words of the one before with the parts made anew."""
    text = before or PAGE.replace("{name}", record["name"]).replace("{blurb}", record["blurb"])
    for name, make in PARTS.items():
        part = make(record)
        text = place_of(name).sub(lambda match, part=part: f"{match[1]}{part}\n{match[3]}", text)
    return text


def stale(text: str, record: Record) -> list[str]:
    """The parts of a page that are not what the record gives, a line each."""
    faults = []
    for name, make in PARTS.items():
        match = place_of(name).search(text)
        try:
            if match is None or match[2] != make(record) + "\n":
                what = "not there" if match is None else "not what submission.json gives"
                faults.append(f"its part {name} is {what}")
        except (KeyError, TypeError, ValueError, AttributeError):
            faults.append(f"its part {name} cannot be made from submission.json")
    return faults
