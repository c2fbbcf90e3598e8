"""What a training log says, in whichever of the public dialects it is written.

The challenge's scripts, their thousands of descendants and ours print the same facts with other labels, other
separators and other units. FACTS is the table of them: a key, a word without which a line need not be looked at, a
pattern, and which of several finds counts. A metric line is any line with a loss and bits a byte behind some label that
is no step of training; a new spelling of a fact is a new row.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

LINE_LIMIT = 400  # longer lines are cut: no fact is that long, and patterns stay fast
MOST_TRIES, MOST_SETTINGS = 1000, 2000
NUMBER = r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


class Metric(NamedTuple):
    """A loss in nats a token (None where only bits are printed), bits a byte, and how many decimals each was printed
    with; `label` is the line's text before them."""

    label: str
    loss: float | None
    bpb: float
    loss_decimals: int
    bpb_decimals: int
    line: int


class LogFacts(NamedTuple):
    """The metrics in their order, facts by the keys of FACTS, dumped settings, the source that stands in the log before
    a rule of `=`, the number of lines, and that of bytes which are no UTF-8."""

    metrics: list[Metric]
    found: dict[str, Any]
    settings: dict[str, str]
    source: str
    lines: int
    undecoded: int

    def get(self, key: str) -> Any:
        """A fact, or None."""
        return self.found.get(key)


def whole(text: str) -> int:
    """A number with or without thousands' commas."""
    return int(text.replace(",", "").partition(".")[0])


def decimal(text: str) -> float:
    """The same with a fraction."""
    return float(text.replace(",", ""))


UNITS = {"ms": 0.001, "s": 1.0, "sec": 1.0, "seconds": 1.0, "m": 60.0, "min": 60.0}


def seconds(match: re.Match[str]) -> float:
    """A duration with its unit, in seconds."""
    return decimal(match["n"]) * UNITS[match["u"]]


def last_number(match: re.Match[str]) -> int:
    """The whole number of a match."""
    return whole(match["n"])


def text_of(match: re.Match[str]) -> str:
    """The text of a match."""
    return match["n"].strip()


class Fact(NamedTuple):
    """How one fact is found: lines without `word` are passed over; `keep` is last, all or sum."""

    key: str
    word: str
    pattern: re.Pattern[str]
    make: Callable[[re.Match[str]], Any] = last_number
    keep: str = "last"


def _row(key: str, word: str, pattern: str, make: Callable[[re.Match[str]], Any] = last_number, keep: str = "last"
         ) -> Fact:
    return Fact(key, word, re.compile(pattern.replace("<N>", rf"(?P<n>{NUMBER})")
                                      .replace("<U>", r"(?P<u>ms|seconds|sec|s|min|m)\b")), make, keep)


FACTS: tuple[Fact, ...] = (
    _row("seed", "seed", r"(?i)(?:^|[\s_])seed\s*[:=]\s*<N>\b"),
    _row("config", "config:", r"\bconfig:(?P<n>[0-9a-f]{16})\b", text_of),
    _row("configs", "config:", r"\bconfig:(?P<n>[0-9a-f]{16})\b", text_of, "all"),
    _row("commit", "commit:", r"\bcommit:(?P<n>[0-9a-f]{40}\+?|unknown)", text_of),
    _row("packed", "packed:", r"\bpacked:(?P<n>[01])\b"),
    _row("world_size", "world_size", r"\bworld_size\s*[:=]\s*<N>"),
    _row("device", "device:", r"\bdevice:(?P<n>\w+)", text_of),
    _row("gpus", "NVIDIA", r"^\|\s+\d+\s+(?P<n>NVIDIA [\w .-]+?)\s{2,}", text_of, "all"),
    _row("torch", "orch", r"(?i)\b(?:running pytorch|torch|pytorch_version)\s*[: ]\s*(?P<n>\d+\.\d+[\w.+]*)", text_of),
    _row("val_tokens", "tokens", r"\bval_tokens\s*[:=]\s*<N>"),
    _row("loader_tokens", "val_loader", r"\bval_loader\b.*\btokens\s*[:=]\s*<N>"),
    _row("target_tokens", "target_tokens", r"\btarget_tokens\s*[:=]\s*<N>"),
    _row("val_bytes", "val_bytes", r"\bval_bytes\s*[:=]\s*<N>"),
    _row("val_documents", "doc", r"\b(?:val_documents|total_docs)\s*[:=]\s*<N>"),
    _row("train_shards", "train_shards", r"\btrain_shards\s*[:=]\s*<N>"),
    _row("steps", "step", r"(?:\bstep\s*[: ]\s*|^\s*)<N>\s*/\s*\d+\b"),
    _row("step_seconds", "train_time", r"\btrain_time\s*[:=]\s*<N>\s*<U>", seconds),
    _row("stopped_seconds", "stopping_early", r"\bstopping_early\b.*\btrain_time\s*[:=]\s*<N>\s*<U>", seconds),
    _row("step_avg_ms", "step_avg", r"\bstep_avg\s*[:=]\s*<N>\s*ms", lambda match: decimal(match["n"])),
    _row("hessian_seconds", "essian", r"(?i)\bhessians?\b[^:]{0,60}\bin\s+<N>\s*<U>", seconds, "sum"),
    _row("eval_seconds", "total_eval_time", r"\btotal_eval_time\s*[:=]\s*<N>\s*<U>", seconds),
    _row("metric_eval_seconds", "eval_time", r"(?<!total_)\beval_time\s*[:=]\s*<N>\s*<U>", seconds),
    _row("outside_seconds", "precompute", r"(?i)\bprecompute\w*\W.{0,60}\boutside\b.{0,60}?<N>\s*<U>", seconds),
    _row("model_bytes", "model", r"(?i)\bserialized model [^:]*\S:\s*<N>\s*bytes"),
    _row("raw_code_bytes", "ode size", r"(?i)\bcode size\s*(?:\((?:un|raw)[^)]*\))?\s*:\s*<N>(?:\s*bytes)?"),
    _row("small_code_bytes", "ode size", r"(?i)\bcode size\s*\((?:compressed|packed|wrapped|minified)[^)]*\)\s*:"
                                         r"\s*<N>"),
    _row("total_bytes", "size", r"(?i)\btotal (?:submission|artifact) size[^:]*:\s*<N>(?:\s*bytes)?"),
    _row("total_bytes_too", "bytes", r"(?i)\b(?:total_(?:artifact_|submission_)?bytes|artifact_bytes|submission_bytes)"
                                     r"\s*[:=]\s*<N>"),
    _row("ledger_targets", "ledger:", r"^ledger: targets:<N>"),
    _row("scored_once", "ledger:", r"^ledger: .*\bscored_once:(?P<n>True|False)", text_of),
    _row("audit", "audit: ", r"^audit: (?P<n>\w+ (?:pass|FAIL)): ", text_of, "all"),
    _row("lacking", "codec:auto", r"(?P<n>codec:auto without .*)", text_of, "all"),
    _row("not_there", "not ", r"(?i)(?P<n>\b(?:zstandard|brotli|lrzip|zstd)\W{1,3}(?:is |was )?not (?:found|installed|"
                              r"available))", text_of, "all"),
    _row("fallbacks", "back to ", r"(?i)(?P<n>\bfall(?:ing|s)? ?back to (?:zlib|lzma))", text_of, "all"),
    _row("prequant_ttt", "ttt", r"(?i)(?P<n>\bpre[-_ ]?quant(?:ized|ization)?[-_ ]?ttt\b.{0,40}\b(?:epoch|step|"
                                r"loss)\b)", text_of, "all"))

METRIC = re.compile(rf"\bval_loss\s*[:=]\s*(?P<loss>{NUMBER}),?\s+(?:\w+\s+)?val_bpb\s*[:=]\s*(?P<bpb>{NUMBER})")
BITS_ONLY = re.compile(rf"bpb\s*[:=]\s*(?P<bpb>{NUMBER})")
STEP = re.compile(r"(?:\bstep\s*[:= ]\s*\d+|^\s*\d+\s*/\s*\d+\b)")
# A diagnostic of the float weights, or of the squeeze before the score that is claimed.
DIAGNOSTIC = re.compile(r"(?i)diagnostic|pre[-_ ]?quant|post[-_ ]ema|\bfloat\b")
DUMPED = (re.compile(r"^  (?P<name>[A-Z][A-Z0-9_]+) +(?P<value>.*?) +default "), re.compile(
    r"^  (?P<name>[a-z]\w*): (?P<value>.*)$"))
FLOAT = re.compile(r"(?i)pre[-_ ]?quant|post[-_ ]ema|\bfloat\b")  # of these, the ones that no artifact gave
MOST = 1e18  # no number of a run is larger
RULE = re.compile(r"^={60,}$")
# What may differ between the runs of one configuration.
OWN_SETTINGS = re.compile(r"(?i)^(seed|run_id|run_name|runs_path|from|logfile|log_\w*|.*_path|.*_dir|timestamp|.*_file|"
                          r"rank|local_rank|stages|eval_budget_seconds|audit)$")


def decimals(text: str) -> int:
    """Digits behind the point; many where it has an exponent."""
    return 12 if "e" in text.lower() else len(text.partition(".")[2])


def read_log(data: bytes) -> LogFacts:
    """The facts of a log; never raises for what a stranger wrote."""
    text = data.decode(errors="replace")
    lines = [line[:LINE_LIMIT] for line in text.splitlines()]
    rule = next((place for place, line in enumerate(lines) if RULE.match(line)), 0)
    source = "\n".join(text.splitlines()[:rule])
    # The baseline writes its own source into its log, above a rule; what stands there is no fact of the run.
    start = rule if "import " in source and "def " in source else 0
    settings: dict[str, str] = {}
    for line in lines[start:]:
        for pattern in DUMPED if line.startswith("  ") else ():
            if (match := pattern.match(line)) and len(settings) < MOST_SETTINGS:
                settings[match["name"]] = match["value"].strip()
    found = {fact.key: value for fact in FACTS if (value := find(lines, start, fact)) is not None}
    return LogFacts(find_metrics(lines, start), found, settings, source if start else "", len(lines),
                    text.count("\ufffd"))


def find(lines: list[str], start: int, fact: Fact) -> Any:
    """The value of one fact in the lines from `start` on, None where it is not there. What counts last is looked for
    from the end, and only so many lines are tried: patterns are slow on lines that are made to be."""
    near = [line for line in lines[start:] if fact.word in line]
    values: list[Any] = []
    for line in (near[::-1] if fact.keep == "last" else near)[:MOST_TRIES]:
        if match := fact.pattern.search(line):
            try:
                value = fact.make(match)
            except (ValueError, OverflowError):  # more digits than any reason allows
                continue
            if isinstance(value, (int, float)) and not -MOST < value < MOST:
                continue
            values.append(value)
            if fact.keep == "last":
                return values[0]
    return (sum(values) if fact.keep == "sum" else values) if values else None


def find_metrics(lines: list[str], start: int) -> list[Metric]:
    """Every score of a model in the lines from `start` on, those at steps of training apart."""
    metrics: list[Metric] = []
    for number, line in enumerate(lines[start:], start + 1):
        if "bpb" not in line or not (match := METRIC.search(line) or BITS_ONLY.search(line)):
            continue
        label, parts = line[:match.start()], match.groupdict()
        if STEP.search(label) or len(metrics) >= MOST_TRIES:
            continue
        if "loss" not in parts:  # what stands before `bpb` belongs to the name of the number
            label = line[:match.start() + 3]
        loss = parts.get("loss")
        if not all(abs(decimal(value)) < MOST for value in (loss or "0", match["bpb"])):
            continue
        metrics.append(Metric(label.strip(" :,-|"), None if loss is None else decimal(loss), decimal(match["bpb"]),
                              decimals(loss or ""), decimals(match["bpb"]), number))
    return metrics


def final(log: LogFacts) -> Metric | None:
    """The score a log ends with: its last metric line that is no diagnostic and has both units, else its last."""
    told = [metric for metric in log.metrics if not DIAGNOSTIC.search(metric.label)]
    both = [metric for metric in told if metric.loss is not None]
    return both[-1] if both else told[-1] if told else None


def agrees(value: float, printed: float, places: int, slack: float = 0.0) -> bool:
    """Whether a value, known within `slack` and printed with so many decimals, gives what is printed; either may be the
    rounded one."""
    return abs(value - printed) <= 0.5000001 * 10.0 ** -max(places, 1) + slack


def own_text(settings: dict[str, str]) -> dict[str, str]:
    """Dumped settings that must be equal in all seeds of one configuration."""
    return {name: value for name, value in settings.items() if not OWN_SETTINGS.match(name)}


def code_bytes(log: LogFacts) -> int | None:
    """The code that a log counts: the compressed form where it prints one."""
    return log.get("small_code_bytes") or log.get("raw_code_bytes")


def total_bytes(log: LogFacts) -> int | None:
    """The size of the whole submission that a log ends with."""
    return log.get("total_bytes") or log.get("total_bytes_too")


def tokens(log: LogFacts) -> int | None:
    """The validation tokens that a log scored."""
    return log.get("target_tokens") or log.get("val_tokens") or log.get("loader_tokens")


def loop_seconds(log: LogFacts) -> float | None:
    """Seconds of the training loop."""
    return log.get("stopped_seconds") or log.get("step_seconds")
