"""submission.json: the canonical fields, the spellings that are met instead of them, the tracks.

`read_claim` turns anybody's file into one form, with a note for every spelling it had to translate and a fault for
what it could not; `entry_of` makes the canonical entry of a seed from our own result.json. Field names follow the
challenge's habits, so that its readers understand our files: `artifact_bytes` is code plus model.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from records.folder import shown

FORMAT = "sixteen-1"
CAP_BYTES = 16_000_000
FINEWEB_BYTES = 151_080_891
FINEWEB_DOCUMENTS = 50_000
MOST_SEEDS = 64


class Track(NamedTuple):
    """A track: its folder, the seconds that training and evaluation may take (None: no limit), GPUs and their kind
    (0: any hardware), whether the text must be the challenge's, a base must be named, our audit must have passed."""

    folder: str
    train_seconds: float | None
    eval_seconds: float | None
    gpus: int
    gpu: str
    fineweb: bool
    base: bool
    audit: bool
    text: str


TRACKS: dict[str, Track] = {
    "10min_16mb": Track("track_10min_16mb", 600.0, 600.0, 8, "H100", True, True, True,
                        "the record track: 600 + 600 seconds on 8xH100"),
    "non_record_16mb": Track("track_non_record_16mb", None, 600.0, 0, "", False, False, False,
                             "any hardware and training time within the run's own budget, 600 seconds of evaluation"),
    "non_record_unlimited_16mb": Track("track_non_record_16mb", None, None, 0, "", False, False, False,
                                       "any hardware, any time")}


class Tokens(NamedTuple):
    """A published tokenization of the challenge's validation split: targets uncut, and nats a token over bits a byte of
    every score on it."""

    uncut: int
    ratio: float


# The counts are those that public logs agree on; a log may have cut its tail to whole blocks.
TOKENIZATIONS: dict[str, Tokens] = {
    name: Tokens(uncut, FINEWEB_BYTES / uncut * math.log(2)) for name, uncut in (
        ("SP1024", 62_021_845), ("SP4096", 45_508_608), ("SP8192", 40_548_352), ("CaseOps SP8192", 47_853_343),
        ("bytes", 151_130_112))}
# How a number of bytes that is wrong has come about before: lowest and highest factor, and the mistake.
KNOWN_MISTAKES: tuple[tuple[float, float, str], ...] = (
    (1.025, 1.036, "63,779,840 targets of an early official split"),
    (1.039, 1.070, "bytes of fallback tokens counted as three"),
    (1.160, 1.180, "the space before a word counted twice"),
    (1.195, 1.225, "bytes of fallback tokens counted as three, throughout"),
    (1.225, 1.240, "pieces without the space sign"),
    (1.265, 1.285, "a constant factor on the canonical targets"),
    (1.300, 1.320, "another validation text (lower case)"),
    (0.0, 0.9, "a part of the validation split"))

TRACK_WORDS = {"non_record_unlimited_compute_16mb": "non_record_unlimited_16mb",
               "unlimited_compute_16mb": "non_record_unlimited_16mb", "unlimited_16mb": "non_record_unlimited_16mb",
               "nonrecord_16mb": "non_record_16mb", "non_record": "non_record_16mb", "10min": "10min_16mb",
               "record": "10min_16mb", "10_min_16mb": "10min_16mb", "main": "10min_16mb"}


def pick_track(text: object) -> str | None:
    """The track that a spelling means, None where it is none of them."""
    word = re.sub(r"[^a-z0-9]+", "_", str(text).lower()).strip("_").removeprefix("track_")
    word = TRACK_WORDS.get(word, word)
    return word if word in TRACKS else None


# Canonical name -> other spellings that are read, first match wins.
ALIASES: dict[str, tuple[str, ...]] = {
    "val_bpb": ("mean_val_bpb", "val_bpb_mean", "mean_bpb", "bpb", "final_val_bpb", "val_bpb_exact"),
    "val_loss": ("mean_val_loss", "val_loss_mean", "mean_loss", "final_val_loss", "val_loss_nats"),
    "val_bpb_std": ("std_val_bpb", "val_bpb_stdev", "val_bpb_sd", "std_bpb", "bpb_std"),
    "val_loss_std": ("std_val_loss", "val_loss_stdev", "val_loss_sd"),
    "bytes_total": ("artifact_bytes", "artifact_size_bytes", "artifact_bytes_max", "total_bytes", "submission_bytes",
                    "artifact_bytes_mean"),
    "bytes_code": ("code_bytes", "code_size_bytes"),
    "bytes_model": ("model_bytes", "bytes_model_int8_zlib", "bytes_model_int6_zstd", "model_size_bytes"),
    "seed_results": ("per_seed", "per_seed_results", "seeds_results", "results"),
    "hardware": ("gpu", "gpus"), "github_id": ("github", "github_username"), "blurb": ("description", "summary",
                                                                                      "technique_summary")}
SEED_ALIASES: dict[str, tuple[str, ...]] = {
    "val_bpb": ("bpb", "final_bpb", "val_bpb_exact", "ttt_bpb", "post_ttt_bpb", "final_val_bpb", "val_bpb_ttt"),
    "val_loss": ("loss", "final_loss", "val_loss_nats", "final_val_loss"),
    "artifact_bytes": ("bytes_total", "total_bytes", "artifact_size_bytes", "artifact_size", "submission_bytes"),
    "code_bytes": ("bytes_code",), "model_bytes": ("bytes_model",), "steps": ("train_steps", "step_stop"),
    "eval_s": ("eval_time_s", "eval_seconds", "eval_time_seconds", "ttt_eval_time_s"),
    "train_loop_s": ("train_time_s", "train_seconds", "train_time_seconds", "wallclock_seconds")}


SEED_NUMBERS = ("val_bpb", "val_loss", "artifact_bytes", "model_bytes", "code_bytes")


MOST = 10 ** 18  # no number of a submission is larger


def is_number(value: object) -> bool:
    """Whether a JSON value is a number that something can be."""
    return type(value) in (int, float) and -MOST < value < MOST


def is_count(value: object) -> bool:
    """Whether a JSON value is a whole number of at least zero that something can be."""
    return type(value) is int and 0 <= value < MOST


def is_text(value: object) -> bool:
    """Whether a JSON value is a text with something in it."""
    return isinstance(value, str) and bool(value.strip())


def is_date(value: object) -> bool:
    """Whether a JSON value begins with an ISO date."""
    try:
        datetime.date.fromisoformat(str(value)[:10])
    except ValueError:
        return False
    return isinstance(value, str)


class Field(NamedTuple):
    """A field: whether it has the right kind, the kind in words, whether everybody's file must have it."""

    holds: Callable[[object], bool]
    kind: str
    core: bool = False


FIELDS: dict[str, Field] = {
    "author": Field(is_text, "a text", True), "github_id": Field(is_text, "a text", True),
    "name": Field(is_text, "a text", True), "date": Field(is_date, "an ISO date", True),
    "val_bpb": Field(lambda value: is_number(value) and 0 < value < 32, "a number between 0 and 32", True),
    "blurb": Field(is_text, "a text"),
    "track": Field(lambda value: pick_track(value) is not None, f"one of {', '.join(TRACKS)}"),
    "val_loss": Field(lambda value: is_number(value) and 0 < value < 64, "a number between 0 and 64"),
    "val_bpb_std": Field(lambda value: is_number(value) and value >= 0, "a number of at least 0"),
    "val_loss_std": Field(lambda value: is_number(value) and value >= 0, "a number of at least 0"),
    "bytes_total": Field(is_count, "a whole number"), "bytes_code": Field(is_count, "a whole number"),
    "bytes_model": Field(is_count, "a whole number")}
# What only our own files have; there it must be.
OWN_FIELDS = ("seeds", "seed_results", "metric_label", "tokenizer", "data", "environment", "adaptation", "comparison",
              "all_runs", "compliance", "format", "evaluator")


class Claim(NamedTuple):
    """What a submission.json says, in canonical names: values at the top, values by seed, what had to be translated
    (`notes`), and what is wrong (`faults`); `ours` where records/submit.py made it."""

    values: dict[str, Any]
    seeds: dict[int, dict[str, Any]]
    notes: list[str]
    faults: list[str]
    ours: bool
    raw: dict[str, Any]

    def get(self, name: str) -> Any:
        """A value at the top, None where it is missing or of the wrong kind."""
        value = self.values.get(name)
        return value if name not in FIELDS or FIELDS[name].holds(value) else None

    def by_seed(self, name: str) -> dict[int, float]:
        """The numbers of one field by seed, where they are numbers."""
        return {seed: row[name] for seed, row in self.seeds.items() if is_number(row.get(name))}


def translate(row: Mapping[str, Any], aliases: Mapping[str, tuple[str, ...]], notes: list[str], where: str
              ) -> dict[str, Any]:
    """A JSON object under canonical names."""
    found = dict(row)
    for name, others in aliases.items():
        other = next((other for other in others if other in row and row[other] is not None), None)
        if found.get(name) is None and other is not None:
            found[name] = row[other]
            notes.append(f"{where}{name} is spelt {other}")
    return found


def seed_of(text: object) -> int | None:
    """The seed that a key such as 42 or seed_300 names."""
    match = re.fullmatch(r"(?i)(?:seed[_-]?)?(\d{1,18})", str(text).strip())
    return int(match[1]) if match else None


def read_seeds(values: dict[str, Any], faults: list[str]) -> dict[int, dict[str, Any]]:
    """Seed -> its entry, from whichever of the known forms is there."""
    table, listed = values.get("seed_results"), values.get("seeds")
    if not isinstance(table, (dict, list)) and isinstance(listed, dict):
        table, listed = listed, None
    rows: list[tuple[object, Any]] = []
    if isinstance(table, dict):
        rows = list(table.items())
    elif isinstance(table, list):
        rows = [(row.get("seed"), row) for row in table if isinstance(row, dict)]
    elif isinstance(listed, list):
        rows = [(item, {}) for item in listed]
    else:  # seed_300-style keys at the top
        rows = [(key, value) for key, value in values.items() if re.fullmatch(r"seed[_-]?\d+", key)]
    seeds: dict[int, dict[str, Any]] = {}
    for key, row in rows[:MOST_SEEDS + 1]:
        seed, notes = seed_of(key), []
        if seed is None:
            faults.append(f"seed_results: {shown(key, 30)} names no seed")
        elif len(seeds) == MOST_SEEDS:
            faults.append(f"seed_results: more than {MOST_SEEDS} seeds")
        elif isinstance(row, dict):
            seeds[seed] = translate(row, SEED_ALIASES, notes, f"{seed}: ")
        elif is_number(row):
            seeds[seed] = {"val_bpb": row}
        else:
            faults.append(f"seed_results: {seed} is no object")
    if isinstance(listed, list) and isinstance(table, (dict, list)):
        named = {seed_of(item) for item in listed}
        if named != set(seeds):
            faults.append(f"seeds: lists {shown(sorted(map(str, named)))}, seed_results has {shown(sorted(seeds))}")
    for seed, row in seeds.items():
        for name in SEED_NUMBERS:
            holds = FIELDS[name].holds if name in FIELDS else is_count
            if name in row and not holds(row[name]):
                kind = FIELDS[name].kind if name in FIELDS else "a whole number"
                value = row.pop(name)  # what is no number is nothing that other checks could use
                faults += [f"seed_results: {name} of {seed} must be {kind}"] * (value is not None)
    return seeds


def read_claim(raw: dict[str, Any], faults: list[str]) -> Claim:
    """The claim that a JSON object makes; `faults` of its text come first."""
    notes: list[str] = []
    faults = list(faults)
    values, ours = translate(raw, ALIASES, notes, ""), raw.get("format") == FORMAT
    for name, field in FIELDS.items():
        if values.get(name) is None:
            if field.core or ours:
                faults.append(f"{name}: is missing, must be {field.kind}")
            else:
                notes.append(f"no {name}")
        elif not field.holds(values[name]):
            faults.append(f"{name}={shown(values[name], 40)}: must be {field.kind}")
    faults += [f"{name}: is missing" for name in OWN_FIELDS if ours and name not in raw]
    return Claim(values, read_seeds(values, faults), notes, faults, ours, raw)


# ---- our own runs


def config_hash(recipe: Mapping[str, Any], seed: int) -> str:
    """The config_hash that train_gpt.py gives a recipe with a seed."""
    return hashlib.sha256(json.dumps({"SEED": seed, **recipe}, sort_keys=True).encode()).hexdigest()


def entry_of(result: Mapping[str, Any], kind: str, log: str) -> dict[str, Any]:
    """The canonical entry of a seed, from its result.json and the evaluator that is claimed."""
    train, artifact, scores, budget = (result[name] for name in ("train", "artifact", "scores", "budget"))
    score = scores[kind]
    return {"val_loss": score["val_loss"], "val_bpb": score["val_bpb"], "artifact_bytes": artifact["total_bytes"],
            "code_bytes": artifact["code_bytes"], "model_bytes": artifact["model_bytes"], "steps": train["steps"],
            "step_avg_ms": 1000 * train["seconds"] / max(1, train["steps"]), "train_loop_s": train["seconds"],
            "train_budget_s": budget["train_seconds"], "train_strict_s": budget["strict_train_seconds"],
            "eval_s": budget["eval_seconds"], "pre_quant_val_bpb": scores.get("float", {}).get("val_bpb"),
            "quantized_val_bpb": next((scores[name]["val_bpb"] for name in ("contiguous", "sliding", "document")
                                       if name in scores), None),
            "val_tokens": result["data"]["val_tokens"], "target_tokens": score["tokens"], "val_bytes": score["bytes"],
            "scores": {name: {"val_loss": row["val_loss"], "val_bpb": row["val_bpb"], "seconds": row["seconds"]}
                       for name, row in scores.items()},
            "log": log, "artifact_sha256": artifact["sha256"], "code_sha256": result["code_sha256"],
            "source_sha256": result["source_sha256"], "commit": result["commit"]}


class ResultError(ValueError):
    """A result.json that lacks what a record needs; the message is one clear line."""


# What is read of a result.json: place and kind.
RESULT_FIELDS: dict[str, type | tuple[type, ...]] = {
    "seed": int, "config_hash": str, "code_sha256": str, "source_sha256": str, "commit": str, "scores": dict,
    "audit": dict, "alarms": list, "environment": dict, "train.seconds": (int, float), "train.steps": int,
    "artifact.model_bytes": int, "artifact.code_bytes": int, "artifact.total_bytes": int, "artifact.sha256": str,
    "artifact.packed": bool, "ledger.scored_once": bool, "ledger.targets": int, "budget.ok": bool,
    "budget.train_seconds": (int, float), "budget.strict_train_seconds": (int, float),
    "budget.eval_seconds": (int, float), "data.source": str, "data.val_tokens": int, "data.val_bytes": int,
    "data.val_documents": int, "data.lossless": bool, "data.tokenizer_sha256": str, "data.manifest_sha256": str,
    "data.disjoint": dict, "data.path": str, "declared.modes": list, "preset": str, "overlay": str}
SCORE_FIELDS = ("val_loss", "val_bpb", "tokens", "bytes", "seconds")


def check_result(result: Mapping[str, Any]) -> None:
    """ResultError unless a result.json has every field that is read of it, of its kind."""
    for place, kind in RESULT_FIELDS.items():
        value: Any = result
        for name in place.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if not isinstance(value, kind) or isinstance(value, (int, float)) and not -MOST < value < MOST:
            raise ResultError(f"{place}: is missing or of the wrong kind")
    for name, row in result["scores"].items():
        if not isinstance(row, dict) or not all(is_number(row.get(field)) for field in SCORE_FIELDS):
            raise ResultError(f"scores.{shown(name, 30)}: must have {', '.join(SCORE_FIELDS)}")
    if not all(isinstance(mode, str) for mode in result["declared"]["modes"]):
        raise ResultError("declared.modes: must be texts")
    if not all(isinstance(row, dict) for row in result["audit"].values()):
        raise ResultError("audit: must hold a verdict for each rule")


def plain(value: Any) -> Any:
    """The value as JSON can hold it: no infinity, text keys, lists."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
