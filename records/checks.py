"""The checklist K1 to K27 on a folder of a submission: a table of checks, each with a verdict and its evidence.

A verdict is pass, fail or unknown ("cannot tell"). A check that needs a GPU, the data or a run says so and is unknown
here; it never passes because nothing was found to look at. Nothing that the folder says of itself is believed where a
second source can contradict it: logs, submission.json, the script's bytes, and in our own folders result.json and the
chained events are held against each other. To add a check: write a function of Facts and a row in CHECKS.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from records import dialects, page, schema, scripts, significance
from records.dialects import LogFacts, Metric
from records.folder import LOG_LIMIT_BYTES, TEXT_LIMIT_BYTES, Folder, FolderError, read_json, shown
from records.schema import CAP_BYTES, FINEWEB_BYTES, FINEWEB_DOCUMENTS, TOKENIZATIONS, TRACKS, Claim, Track
from records.scripts import Looked

PASS, FAIL, UNKNOWN = "pass", "fail", "unknown"
NEAR_CAP_BYTES = 30_000
LOOP_GRACE_SECONDS = 1.0  # the challenge's scripts look at the clock after a step
BYTES_SLACK = 1e-3
CUT_SLACK = 2e-3  # a log may drop the tail of the split
LEAST_SEEDS = 3
MOST_LOGS, LOGS_LIMIT_BYTES = 32, 32 << 20  # of all logs together, and of all events
# In 600 seconds nothing below the first has survived review, and a fit of the accepted rows ends at the second.
SURVIVED_BPB, FLOOR_BPB = 1.056, 1.043
UNLIMITED_FLOOR_BPB = 1.0
USUAL_SHARDS = 200  # published training sets have 39 or 80 shards, those rebuilt on the wrong split hundreds
OWN_FILES = ("config.json", "requirements.txt", "source/train_gpt.py")
CHECKPOINTS = (".pt", ".pth", ".ckpt", ".safetensors", ".pyc", ".pyo", ".so", ".dll", ".exe", ".npy", ".pkl", ".pickle")
ARTIFACTS = re.compile(r"(?i)(^|/)(artifact[\w.-]*\.bin|[\w.-]+\.ptz|[\w.-]+\.int\d[\w.]*|final_model[\w.-]*\.bin)$")
FOLDER_NAME = re.compile(r"(\d{4}-\d\d-\d\d)_[A-Za-z0-9][\w.+-]{0,99}")
# Packages of the challenge's own requirements, which every folder may import; import name -> package.
CHALLENGE_PACKAGES = {"torch", "numpy", "sentencepiece", "tqdm", "huggingface_hub", "kernels", "setuptools", "datasets",
                      "tiktoken", "typing_extensions"}
PACKAGE_OF = {"flash_attn_interface": "flash_attn", "yaml": "pyyaml", "PIL": "pillow", "sklearn": "scikit_learn",
              "fla": "flash_linear_attention", "zstd": "zstandard", "google": "protobuf"}
SPELLINGS = {"flash_attn": {"flash_attn_3", "flash_attn_interface"}}  # packages that are called otherwise, too
LOG_TEXT = re.compile(r"(?i)(logs/[^/]*|(.*/)?(?:[\w.-]*(?<![a-z]))?(log|train|seed[_-]?\d)[\w.-]*)\.txt")
WITH_TORCH = {"triton", "torchgen", "functorch"}
COMPRESSORS = {"brotli", "zstandard", "zstd", "lz4", "constriction", "pyppmd", "lrzip"}
PROGRAMS = {"lrzip", "zpaq", "xz", "7z", "zstd", "brotli"}


class Verdict(NamedTuple):
    """pass, fail or unknown, and why in one line."""

    status: str
    evidence: str


def verdict(faults: Iterable[str], evidence: str, known: bool = True) -> Verdict:
    """Fail with the faults where there are any, else pass, or unknown where nothing could be looked at."""
    faults = list(dict.fromkeys(faults))
    more = f"; and {len(faults) - 6} more" if len(faults) > 6 else ""
    return Verdict(FAIL, "; ".join(faults[:6]) + more) if faults else Verdict(PASS if known else UNKNOWN, evidence)


def places(value: float) -> int:
    """Decimals that a JSON number shows; at least four, since a trailing zero is not kept."""
    text = repr(value)
    return 12 if "e" in text else max(4, len(text.partition(".")[2]))


def inside(name: object) -> bool:
    """Whether a text is a relative name that stays in its folder."""
    return isinstance(name, str) and bool(re.fullmatch(r"[\w.+ -]+(/[\w.+ -]+)*", name)) and not any(
        part in (".", "..") for part in name.split("/"))


class Facts:
    """A submission folder as the checks see it, everything read once and within limits. `name` and `parent` are those
    of the place that it has, or will have, under records/."""

    def __init__(self, root: Path, place: Path | None = None, ran: Verdict | None = None) -> None:
        self.folder, self.ran = Folder(root), ran
        self.place = place or root.resolve()

    @functools.cached_property
    def claim_name(self) -> str:
        """The JSON file: submission.json, or one of that kind."""
        others = sorted(name for name in self.folder.files if re.fullmatch(r"submission[\w.-]*\.json", name))
        return "submission.json" if "submission.json" in self.folder.files or not others else others[0]

    @functools.cached_property
    def claim(self) -> Claim:
        """What submission.json says; without a value, and with the fault, where it cannot be read."""
        try:
            found = self.folder.json(self.claim_name)
            return schema.read_claim(found.value, found.faults)
        except FolderError as error:
            return Claim({}, {}, [], [str(error)], False, {})

    @property
    def ours(self) -> bool:
        """Whether records/submit.py made the folder; its own demands are then made too."""
        return self.claim.ours

    @functools.cached_property
    def track_name(self) -> str | None:
        """The track that the JSON names, else the one of the folder above."""
        told = schema.pick_track(self.claim.values.get("track"))
        above = {track.folder: name for name, track in reversed(TRACKS.items())}
        return told or above.get(self.place.parent.name)

    @property
    def track(self) -> Track | None:
        """Its row."""
        return TRACKS.get(self.track_name or "")

    @functools.cached_property
    def looked(self) -> Looked | None:
        """The script, unpacked and looked at; None where it cannot be read."""
        try:
            return scripts.look(self.folder.read("train_gpt.py", scripts.SCRIPT_LIMIT_BYTES))
        except FolderError:
            return None

    @functools.cached_property
    def log_faults(self) -> list[str]:
        """What kept logs from being read."""
        return self._read_logs[1]

    @property
    def logs(self) -> dict[str, LogFacts]:
        """The facts of every log by its name."""
        return self._read_logs[0]

    @functools.cached_property
    def _read_logs(self) -> tuple[dict[str, LogFacts], list[str]]:
        logs, faults = {}, []
        names = sorted(name for name in self.folder.files
                       if name.endswith(".log") or LOG_TEXT.fullmatch(name))
        left = LOGS_LIMIT_BYTES
        for name in names[:MOST_LOGS]:
            try:
                data = self.folder.read(name, min(LOG_LIMIT_BYTES, left))
            except FolderError as error:
                faults.append(str(error))
                continue
            left -= len(data)
            logs[name] = dialects.read_log(data)
        return logs, faults + ([f"more than {MOST_LOGS} logs"] if len(names) > MOST_LOGS else [])

    @functools.cached_property
    def by_seed(self) -> dict[int, tuple[str, LogFacts]]:
        """The log of each seed: the one that submission.json names, else the one whose name or text says the seed."""
        found: dict[int, tuple[str, LogFacts]] = {}
        for name, log in self.logs.items():
            match = re.search(r"(?i)(?:seed|_s)[_-]?(\d{1,9})(?!\d)", name.rpartition("/")[2])
            seed = int(match[1]) if match else log.get("seed")
            if seed is not None and (seed not in found or name.rpartition("/")[2].startswith("train")):
                found[seed] = (name, log)
        for seed, row in self.claim.seeds.items():
            if inside(row.get("log")) and row["log"] in self.logs:
                found[seed] = (row["log"], self.logs[row["log"]])
        if not found and len(self.logs) == 1:
            found[next(iter(self.claim.seeds), 0)] = next(iter(self.logs.items()))
        return {seed: found[seed] for seed in sorted(found)}

    @property
    def seeds(self) -> list[int]:
        """The seeds that are claimed, else those that have a log."""
        return sorted(self.claim.seeds) or list(self.by_seed)

    @functools.cached_property
    def results(self) -> dict[int, dict[str, Any]]:
        """result.json of each seed, in our own folders."""
        return self._read_results[0]

    @functools.cached_property
    def _read_results(self) -> tuple[dict[int, dict[str, Any]], list[str]]:
        results, faults = {}, []
        for seed in self.claim.seeds if self.ours else ():
            try:
                found = self.folder.json(f"result_seed{seed}.json")
                schema.check_result(found.value)
                results[seed] = found.value
                faults += found.faults
            except FolderError as error:
                faults.append(str(error))
            except schema.ResultError as error:
                faults.append(f"result_seed{seed}.json: {error}")
        return results, faults

    @functools.cached_property
    def chains(self) -> dict[int, list[str]]:
        """What is wrong with the chained events of each seed that has some, where they can be followed here."""
        size = sum(self.folder.files.get(f"events_seed{seed}.jsonl", 0) for seed in self.results)
        if size > LOGS_LIMIT_BYTES:
            return {min(self.results): [f"events have {size} bytes, at most {LOGS_LIMIT_BYTES} are read"]}
        found = {seed: chain_faults(self, seed) for seed in self.results}
        return {seed: faults for seed, faults in found.items() if faults is not None}

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """config.json of our own folders; {} where there is none that can be read."""
        try:
            return self.folder.json("config.json").value if self.ours else {}
        except FolderError:
            return {}

    @functools.cached_property
    def readme(self) -> str:
        """README.md; "" where it cannot be read."""
        try:
            return self.folder.text("README.md", TEXT_LIMIT_BYTES)
        except FolderError:
            return ""

    @functools.cached_property
    def fineweb(self) -> bool:
        """Whether the text is the challenge's, or must be: strangers' is unless they say so, ours where the results or
        the track say it."""
        return not self.results or self.track is not None and self.track.fineweb or any(
            row["data"]["source"].startswith("fineweb") for row in self.results.values())

    def missing(self, judged: Iterable[int]) -> str:
        """Which seeds a check could say nothing of, "" for none: then it has not passed."""
        left = [str(seed) for seed in self.seeds if seed not in {*judged}]
        return f"; nothing tells of seed {', '.join(left[:6])}" if left else ""

    def metric(self, seed: int) -> Metric | None:
        """The score that a seed's log ends with, or the one that our headline names."""
        _, log = self.by_seed.get(seed, ("", None))
        label = self.claim.raw.get("metric_label") if self.ours else None
        named = [metric for metric in log.metrics if metric.label == label] if log and label else []
        return named[-1] if named else dialects.final(log) if log and not label else None

    def scores(self) -> dict[int, tuple[float | None, float]]:
        """Nats and bits of each seed: from submission.json, else from its log."""
        found: dict[int, tuple[float | None, float]] = {}
        for seed in self.seeds:
            row, metric = self.claim.seeds.get(seed, {}), self.metric(seed)
            if schema.is_number(row.get("val_bpb")):
                loss = row.get("val_loss")
                same = metric and abs(metric.bpb - row["val_bpb"]) < 1e-4
                found[seed] = (loss if schema.is_number(loss) else metric.loss if same else None, row["val_bpb"])
            elif metric:
                found[seed] = (metric.loss, metric.bpb)
        return found


# ---- bytes and the script


def code_total(facts: Facts) -> tuple[int, list[str]]:
    """Bytes of the script and of the files beside it that it imports or loads, and the names of those."""
    beside = [name for name in facts.folder.files if name != "train_gpt.py" and "/" not in name
              and name.endswith((".py", ".c", ".cpp", ".cu", ".h"))]
    if facts.looked is None:
        return facts.folder.files.get("train_gpt.py", 0), []
    imported = {use.name.partition(".")[0] for use in facts.looked.imports}
    used = [name for name in beside if name.removesuffix(".py") in imported or name in facts.looked.texts]
    return facts.folder.files.get("train_gpt.py", 0) + sum(facts.folder.files[name] for name in used), used


def k1(facts: Facts) -> Verdict:
    """Code as shipped plus model, for the worst seed."""
    code, used = code_total(facts)
    shipped = {name: size for name, size in facts.folder.files.items() if ARTIFACTS.search(name)}
    faults = [f"{shown(name)}: has no bytes" for name, size in shipped.items() if not size]
    totals: dict[str, int] = {}
    for seed in facts.seeds:
        row, (_, log) = facts.claim.seeds.get(seed, {}), facts.by_seed.get(seed, ("", None))
        model = row.get("model_bytes") if schema.is_count(row.get("model_bytes")) else log and log.get("model_bytes")
        if model == 0:
            faults.append(f"seed {seed}: the model has no bytes")
        if model is not None and code:
            totals[f"seed {seed}: {code} of code as shipped + {model} of model"] = code + model
        if log and (told := dialects.total_bytes(log)) is not None:
            totals[f"log of seed {seed}"] = told
        if schema.is_count(row.get("artifact_bytes")):
            totals[f"submission.json, seed {seed}"] = row["artifact_bytes"]
            if facts.ours and model is not None and row["artifact_bytes"] != code + model:
                faults.append(f"seed {seed}: artifact_bytes is {row['artifact_bytes']}, shipped are {code + model}")
    for name, size in shipped.items():
        totals[f"{shown(name)} + code"] = size + code
    parts = [facts.claim.get(name) for name in ("bytes_total", "bytes_code", "bytes_model")]
    if parts[0] is not None:
        totals["bytes_total"] = parts[0]
    if facts.ours and None not in parts:
        worst = max((row.get("artifact_bytes", 0) for row in facts.claim.seeds.values()), default=0)
        if parts[0] != parts[1] + parts[2] or parts[0] != worst:
            faults.append(f"bytes_total is {parts[0]}, not {parts[1]} + {parts[2]}, or not the worst seed's {worst}")
    faults += [f"{what}: {total} bytes, {total - CAP_BYTES} over the {CAP_BYTES}" for what, total in totals.items()
               if total > CAP_BYTES]
    worst = max(totals.values(), default=0)
    near = "; less than 30 KB below the cap, seeds differ by as much" if worst > CAP_BYTES - NEAR_CAP_BYTES else ""
    return verdict(faults, f"at most {worst} of {CAP_BYTES} bytes, {code} of them code as shipped"
                           f"{' with ' + ', '.join(used) if used else ''}{near}" if totals else
                   f"{code} bytes of code as shipped; nothing says the model's", bool(totals))


def k2(facts: Facts) -> Verdict:
    """The code that is counted is the code that is shipped."""
    if facts.looked is None:
        return Verdict(FAIL, "train_gpt.py: cannot be read")
    script, shipped = facts.looked.script, facts.looked.script.sizes[0]
    faults = [f"train_gpt.py: {script.fault}"] if facts.ours and script.fault else []
    if facts.ours and not script.ours and not script.fault:
        faults.append("train_gpt.py: is not packed by tools/pack.py")
    told = {f"log of seed {seed}": dialects.code_bytes(log) for seed, (_, log) in facts.by_seed.items()}
    told |= {f"submission.json, seed {seed}": row.get("code_bytes") for seed, row in facts.claim.seeds.items()}
    told["bytes_code"] = facts.claim.get("bytes_code")
    told = {what: size for what, size in told.items() if schema.is_count(size)}
    counted, used = code_total(facts)
    unpacked = set() if facts.ours else set(script.sizes[1:])
    faults += [f"{what} counts {size} bytes of code, shipped are {counted}" for what, size in told.items()
               if size not in (shipped, counted) and size not in unpacked]
    raw = any(size in unpacked for size in told.values())
    if used and any(size == shipped for size in told.values()):
        faults.append(f"imports {', '.join(used)} beside it, which is not counted")
    if facts.ours:
        try:
            source, named = facts.folder.sha256("source/train_gpt.py"), {
                row["source_sha256"] for row in facts.results.values()}
            first = facts.folder.read("train_gpt.py", scripts.SCRIPT_LIMIT_BYTES).partition(b"\n")[0]
            if named and named != {source} or f"source sha256 {source};".encode() not in first:
                faults.append("source/train_gpt.py: is not the source of the packed script")
        except FolderError as error:
            faults.append(str(error))
    layers = " -> ".join(map(str, script.sizes)) + (f" by {', '.join(script.shims)}" if script.shims else "")
    hidden = f"; goes no further: {script.fault}" if script.fault else ""
    return verdict(faults, f"bytes by layer {layers}{hidden}; " + (
        f"{len(told)} sources count {'the unpacked code' if raw else 'the same'}" if told else "nothing counts code"),
        bool(told) and not script.fault)


def log_faults(facts: Facts, seed: int) -> list[str]:
    """What in a seed's log contradicts submission.json."""
    name, log = facts.by_seed.get(seed, ("", None))
    row, metric = facts.claim.seeds.get(seed, {}), facts.metric(seed)
    if log is None:
        return [f"seed {seed}: has no log"]
    faults = []
    if metric is None:
        return [f"{shown(name)}: has no line with a final score; cut short, or of another run"]
    # A score of the float weights is no score of the artifact, whoever claims it.
    lines = [metric] if facts.ours else [found for found in log.metrics if not dialects.FLOAT.search(found.label)]
    agreeing = []
    for unit, printed, digits in (("val_loss", "loss", "loss_decimals"), ("val_bpb", "bpb", "bpb_decimals")):
        value = row.get(unit)
        told = [found for found in lines if getattr(found, printed) is not None]
        if not schema.is_number(value) or not told:
            continue
        near = {found.line for found in told if dialects.agrees(
            value, getattr(found, printed), min(places(value), max(4, getattr(found, digits))))}
        if not near:
            faults.append(f"{shown(name)}: ends with {unit} {getattr(metric, printed)}, submission.json says {value}")
        agreeing.append(near | {found.line for found in lines if getattr(found, printed) is None})
    if len(agreeing) == 2 and not faults and not agreeing[0] & agreeing[1]:
        faults.append(f"{shown(name)}: no line has both val_loss {row['val_loss']} and val_bpb {row['val_bpb']}")
    if log.get("seed") is not None and log.get("seed") != seed and len(facts.by_seed) > 1:
        faults.append(f"{shown(name)}: is of seed {log.get('seed')}, not {seed}")
    size, told = row.get("artifact_bytes"), dialects.total_bytes(log)
    if schema.is_count(size) and told is not None and size not in (told, log.get("model_bytes")):
        faults.append(f"{shown(name)}: has {told} bytes in all, submission.json says {size}")
    if log.source and facts.looked:
        texts = {hashlib.sha256(text.strip().encode()).digest() for text in (log.source, facts.looked.script.text)}
        if len(texts) > 1:
            faults.append(f"{shown(name)}: holds the source of another script")
    return faults


def own_faults(facts: Facts, seed: int) -> list[str]:
    """What in our own folder does not belong together for one seed: script, result, entry, log, events."""
    result, (_, log) = facts.results.get(seed), facts.by_seed.get(seed, ("", None))
    if result is None:
        return []
    faults, where = [], f"result_seed{seed}.json"
    try:
        code = facts.folder.sha256("train_gpt.py")
        if result["code_sha256"] != code:
            faults.append(f"{where}: another script ran (sha256 {result['code_sha256'][:16]}, shipped {code[:16]})")
    except FolderError as error:
        faults.append(str(error))
    name = f"artifact_seed{seed}.bin"
    # One that is larger is over the cap, which K1 says; hashing many of them would take long.
    if facts.folder.files.get(name, CAP_BYTES + 1) <= CAP_BYTES and (
            facts.folder.sha256(name) != result["artifact"]["sha256"]):
        faults.append(f"{name}: is not the artifact of the run")
    if result["seed"] != seed:
        faults.append(f"{where}: is of seed {result['seed']}")
    kind, entry = facts.claim.raw.get("evaluator"), facts.claim.seeds[seed]
    if not isinstance(kind, str) or kind not in result["scores"]:
        faults.append(f"{where}: has no score of {shown(kind)}")
    else:
        made = schema.entry_of(result, kind, f"train_seed{seed}.log")
        changed = [name for name in {**made, **entry} if made.get(name) != entry.get(name)]
        if changed:
            faults.append(f"submission.json: {', '.join(sorted(changed)[:4])} of {seed} is not what {where} gives")
    if log:
        for what, value, told in (("model bytes", result["artifact"]["model_bytes"], log.get("model_bytes")),
                                  ("targets", result["ledger"]["targets"], log.get("ledger_targets"))):
            if told != value:
                faults.append(f"log of seed {seed}: {what} {told}, {where} says {value}")
    return faults + (facts.chains.get(seed) or [])


def chain_faults(facts: Facts, seed: int) -> list[str] | None:
    """What tools/receipt.py finds in a seed's chained events; None where there are none, or it cannot run here."""
    names = {f"events_seed{seed}.jsonl": "events.jsonl", f"result_seed{seed}.json": "result.json",
             f"receipt_seed{seed}.json": "receipt.json", "train_gpt.py": "train_gpt.py"}
    if f"events_seed{seed}.jsonl" not in facts.folder.files:
        return None
    try:
        from tools import receipt
    except ImportError:  # it needs torch, which a reviewer may not have
        return None
    with tempfile.TemporaryDirectory() as place:
        try:
            for name, as_in_run in names.items():
                if name in facts.folder.files:
                    (Path(place) / as_in_run).write_bytes(facts.folder.read(name, LOG_LIMIT_BYTES))
            return [f"seed {seed}: {fault}" for fault in receipt.check(Path(place))]
        except receipt.PackageError:  # a signature that cannot be looked at here
            return None
        except (FolderError, receipt.ReceiptError) as error:
            return [str(error).replace(place, f"seed {seed}")]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return [f"events_seed{seed}.jsonl: cannot be read ({type(error).__name__})"]


def k3(facts: Facts) -> Verdict:
    """Logs, JSON, script and page say the same."""
    faults = [*facts.log_faults, *(facts._read_results[1] if facts.ours else [])]
    faults += [fault for seed in facts.seeds for fault in log_faults(facts, seed)]
    single = facts.claim.get("val_bpb")
    if not facts.claim.seeds and single is not None and len(facts.logs) == 1:
        told = [metric for log in facts.logs.values() for metric in log.metrics]
        if not any(dialects.agrees(single, metric.bpb, min(places(single), metric.bpb_decimals)) for metric in told):
            faults.append(f"val_bpb {single} stands in no line of the log")
    if facts.ours:
        faults += [fault for seed in facts.seeds for fault in own_faults(facts, seed)]
        faults += [f"README.md: {fault}" for fault in page.stale(facts.readme, facts.claim.raw)]
        tree = facts.looked.script.tree if facts.looked else None
        held = scripts.find_literal(tree, "BAKED") if tree else None
        settings = facts.config.get("settings")
        if isinstance(held, dict) and isinstance(settings, dict):
            faults += [f"config.json: {name} is not the script's" for name, value in held.items()
                       if settings.get(name, ...) != (list(value) if isinstance(value, tuple) else value)]
        elif held is None and facts.looked and not facts.looked.script.fault:
            faults.append("train_gpt.py: holds no configuration")
    metrics = sum(len(log.metrics) for log in facts.logs.values())
    bad = sum(log.undecoded for log in facts.logs.values())
    return verdict(faults, f"{len(facts.logs)} logs with {metrics} scores agree with {facts.claim_name}"
                           f"{f', {len(facts.chains)} chains of events hold' if facts.chains else ''}"
                           f"{f', {bad} bytes that are no UTF-8' if bad else ''}" if facts.logs else
                   "no log can be read", bool(metrics))


# ---- the validation split


def implied(facts: Facts) -> dict[int, tuple[float, float, int | None, int | None]]:
    """Seed -> nats a token over bits a byte, the bytes that it implies (NaN without tokens), targets, bytes stated."""
    found = {}
    for seed, (loss, bpb) in facts.scores().items():
        row, (_, log) = facts.claim.seeds.get(seed, {}), facts.by_seed.get(seed, ("", None))
        tokens = (log and dialects.tokens(log)) or row.get("target_tokens") or row.get("val_tokens")
        if loss and bpb:
            count = tokens if schema.is_count(tokens) and tokens else None
            size = count * loss / bpb / math.log(2) if count else math.nan
            stated = (log and log.get("val_bytes")) or facts.results.get(seed, {}).get("data", {}).get("val_bytes")
            found[seed] = (loss / bpb, size, count, stated)
    if not found and facts.claim.get("val_loss") and facts.claim.get("val_bpb"):
        found[0] = (facts.claim.get("val_loss") / facts.claim.get("val_bpb"), math.nan, None, None)
    return found


def k4(facts: Facts) -> Verdict:
    """targets x (nats a token / bits a byte) / ln 2 is the number of bytes, whatever the tokenizer."""
    faults, told, judged = [], [], set()
    if facts.track and facts.track.fineweb:
        faults += [f"seed {seed}: scored {shown(row['data']['source'])}, the track is of the challenge's text"
                   for seed, row in facts.results.items() if not row["data"]["source"].startswith("fineweb")]
    for seed, (ratio, size, _, stated) in implied(facts).items():
        wanted = FINEWEB_BYTES if facts.fineweb else stated
        if math.isfinite(size) and wanted:
            judged.add(seed)
            off = size / wanted
            told.append(f"seed {seed}: {size:,.0f} bytes implied, {off - 1:+.4%} of {wanted:,}")
            if abs(off - 1) > BYTES_SLACK:
                known = [f"; looks like {text}" for low, high, text in schema.KNOWN_MISTAKES if low <= off < high]
                faults.append(told[-1] + "".join(known[:1]))
        elif facts.fineweb:
            near = [name for name, row in TOKENIZATIONS.items() if abs(ratio / row.ratio - 1) < BYTES_SLACK]
            judged |= {seed} if near else set()
            told += [f"nats a token over bits a byte is {ratio:.5f}, that of {near[0]}"] if near else []
    loss, bpb = facts.claim.get("val_loss"), facts.claim.get("val_bpb")
    ratios = [row[0] for row in implied(facts).values()]
    if loss and bpb and ratios and abs(loss / bpb / statistics.fmean(ratios) - 1) > BYTES_SLACK:
        faults.append(f"val_loss over val_bpb is {loss / bpb:.5f}, of its seeds {statistics.fmean(ratios):.5f}")
    left = facts.missing(judged) if facts.scores() else ""
    return verdict(faults, ("; ".join(told[:3]) or "no loss, bits and targets stand together") + left,
                   bool(told) and not left)


def k5(facts: Facts) -> Verdict:
    """Every target of the whole split, once."""
    faults, told, judged = [], [], set()
    for seed in facts.seeds:
        _, log = facts.by_seed.get(seed, ("", None))
        tokens = log and dialects.tokens(log)
        if log and log.get("val_tokens") and log.get("target_tokens") and log.get("target_tokens") != log.get(
                "val_tokens"):
            faults.append(f"log of seed {seed}: {log.get('target_tokens')} targets of {log.get('val_tokens')} tokens")
        if log and log.get("scored_once") == "False":
            faults.append(f"log of seed {seed}: targets were not scored once")
        if result := facts.results.get(seed):
            counts = {result["data"]["val_tokens"], result["ledger"]["targets"],
                      *(row["tokens"] for row in result["scores"].values()), *([tokens] if tokens else [])}
            if len(counts) > 1 or result["ledger"]["scored_once"] is not True:
                faults.append(f"seed {seed}: {sorted(map(str, counts))} targets, once each: "
                              f"{result['ledger']['scored_once']}")
            judged.add(seed)
            told.append(f"seed {seed}: {result['ledger']['targets']} targets once each, "
                        f"{result['data']['val_documents']} documents")
        if not (facts.fineweb and tokens):
            continue
        near = [name for name, row in TOKENIZATIONS.items() if abs(tokens / row.uncut - 1) < CUT_SLACK]
        size = implied(facts).get(seed, (0, math.nan, 0, 0))[1]
        documents = log.get("val_documents")
        judged.add(seed)
        if near or documents == FINEWEB_DOCUMENTS:
            told.append(f"seed {seed}: {tokens:,} targets" + (f" of {near[0]}" if near else f", {documents} documents"))
        elif abs(size / FINEWEB_BYTES - 1) < BYTES_SLACK:
            told.append(f"seed {seed}: {tokens:,} targets, which come to all bytes")
        elif size < 0.97 * FINEWEB_BYTES or tokens < 0.9 * min(row.uncut for row in TOKENIZATIONS.values()):
            faults.append(f"seed {seed}: {tokens:,} targets are a part of the split")
    left = facts.missing(judged) if told else ""
    return verdict(faults, ("; ".join(told[:3]) or "no log says how many targets were scored") + left,
                   bool(told) and not left)


def k6(facts: Facts) -> Verdict:
    """The tokenizer gives back every byte, or the bytes come from a table that is the challenge's."""
    faults, told = [], []
    for seed, result in facts.results.items():
        data = result["data"]
        if data["lossless"] and data.get("val_document_bytes") not in (None, data["val_bytes"]):
            faults.append(f"seed {seed}: counts {data['val_bytes']} bytes, the documents have "
                          f"{data['val_document_bytes']}")
        elif data["lossless"] and data.get("val_document_bytes"):
            told.append(f"lossless: {data['val_bytes']} bytes are those of the {data['val_documents']} documents")
        if result["audit"].get("bytes", {}).get("pass") is False:
            faults.append(f"seed {seed}: audit of bytes failed")
    for name in facts.folder.files:
        if facts.ours and name == "tokenizer.model" and facts.results:
            try:
                if facts.folder.sha256(name) not in {row["data"]["tokenizer_sha256"] for row in facts.results.values()}:
                    faults.append(f"{name}: is not the tokenizer of the runs")
            except FolderError as error:
                faults.append(str(error))
    return verdict(faults, "; ".join(dict.fromkeys(told)) or "needs the tokenizer and the text; K4 tests the sum",
                   bool(told))


def k7(facts: Facts) -> Verdict:
    """No validation document is in the training data."""
    if facts.results:
        common = {seed: row["data"]["disjoint"].get("common") for seed, row in facts.results.items()}
        manifests = {row["data"]["manifest_sha256"] for row in facts.results.values()}
        part = next(iter(facts.results.values()))["data"]["disjoint"]
        return verdict([f"seed {seed}: {count} validation documents are in the training shards"
                        for seed, count in common.items() if count != 0]
                       + ["the seeds had different datasets"] * (len(manifests) > 1),
                       f"{part.get('val_documents')} validation and {part.get('train_documents')} training documents, "
                       f"none in both ({shown(part.get('method'))})")
    shards = [log.get("train_shards") for log in facts.logs.values() if log.get("train_shards")]
    hint = (f"; {max(shards)} training shards: rebuilt locally, perhaps on the wrong split" if shards
            and max(shards) >= USUAL_SHARDS else f"; {max(shards)} training shards" if shards else "")
    return Verdict(UNKNOWN, f"needs manifests of the documents' hashes{hint}")


# ---- the four conditions


def audited(*rules: str) -> Callable[[Facts], Verdict]:
    """A check that rests on our AUDIT=1: fail where a rule failed in any seed, pass where it passed in one at least."""
    def judge(facts: Facts) -> Verdict:
        faults, told = [], []
        for seed, result in facts.results.items():
            for rule in rules:
                row = result["audit"].get(rule)
                if row and row.get("pass") is True:
                    told.append(f"seed {seed}, {rule}: {shown(row.get('evidence'), 160)}")
                elif row:
                    faults.append(f"seed {seed}, {rule}: {shown(row.get('evidence'), 200)}")
        for seed, (_, log) in facts.by_seed.items():
            faults += [f"log of seed {seed}: audit of {rule} failed" for rule in rules
                       if f"{rule} FAIL" in (log.get("audit") or ())]
        complete = all(any(f", {rule}: " in text for text in told) for rule in rules)
        return verdict(faults, "; ".join(told[:len(rules)]) or "needs the evaluation itself: AUDIT=1 does it", complete)
    return judge


def k11(facts: Facts) -> Verdict:
    """Every score is committed once, from left to right."""
    ledgers = {seed: row["ledger"] for seed, row in facts.results.items()}
    faults = [f"seed {seed}: targets were not scored once" for seed, row in ledgers.items()
              if row["scored_once"] is not True]
    shown_by = audited("single_pass")(facts)
    if shown_by.status == FAIL:
        return shown_by
    told = "the ledger counted every target once" if ledgers else "needs the evaluation's journal"
    return verdict(faults, shown_by.evidence if shown_by.status == PASS else told, bool(ledgers))


def k12(facts: Facts) -> Verdict:
    """No validation token is used before the evaluation."""
    faults = [f"log of seed {seed}: {shown(lines[0])}" for seed, (_, log) in facts.by_seed.items()
              if (lines := log.get("prequant_ttt"))]
    return verdict(faults, "no log tells of training on validation tokens; a proof needs the run's open files",
                   known=False)


def k13(facts: Facts) -> Verdict:
    """One document does not change the next, unless that is declared."""
    found = audited("previous_document")(facts)
    modes = sorted({mode for row in facts.results.values() for mode in row["declared"]["modes"]})
    return found._replace(evidence=f"{found.evidence}; declared: {'; '.join(modes)}") if modes else found


# ---- budgets and hardware


def k14(facts: Facts) -> Verdict:
    """Training within its seconds, with and without what surrounds the loop."""
    limit, faults, told, judged = facts.track and facts.track.train_seconds, [], [], set()
    for seed in facts.seeds:
        _, log = facts.by_seed.get(seed, ("", None))
        loop = log and dialects.loop_seconds(log)
        row, result = facts.claim.seeds.get(seed, {}), facts.results.get(seed)
        loop = loop if loop is not None else row.get("train_loop_s")
        if not schema.is_number(loop):
            continue
        strict = result["budget"]["strict_train_seconds"] if result else loop + (log.get("hessian_seconds") or 0
                                                                                 if log else 0)
        judged.add(seed)
        within = " over" if limit and strict > limit else ""
        told.append(f"seed {seed}: loop {loop:.1f} s, strict {strict:.1f} s{within}")
        counted = result["budget"]["train_seconds"] if result else loop
        if limit and counted > limit + (0 if result else LOOP_GRACE_SECONDS):
            faults.append(f"seed {seed}: {counted:.1f} s of training, {limit:g} are allowed")
        if result and result["budget"]["ok"] is not True:
            faults.append(f"seed {seed}: was over its own budget")
    what = f"of {limit:g}" if limit else "no limit in this track" if facts.track else "track not known"
    left = facts.missing(judged)
    return verdict(faults, "; ".join(told[:3]) + f"; {what}{left}" if told else "no log says the seconds of training",
                   bool(told) and not left and facts.track is not None)


def k15(facts: Facts) -> Verdict:
    """Evaluation within its seconds, what is computed before it included."""
    limit, faults, told, judged = facts.track and facts.track.eval_seconds, [], [], set()
    for seed in facts.seeds:
        _, log = facts.by_seed.get(seed, ("", None))
        spent = log and (log.get("eval_seconds") or log.get("metric_eval_seconds"))
        spent = spent if spent is not None else facts.claim.seeds.get(seed, {}).get("eval_s")
        if not schema.is_number(spent):
            continue
        judged.add(seed)
        outside = (log and log.get("outside_seconds")) or 0
        told.append(f"seed {seed}: {spent:.1f} s" + (f" + {outside:.1f} s outside the timer" if outside else ""))
        if limit and spent + outside > limit:
            faults.append(f"seed {seed}: {spent + outside:.1f} s of evaluation, {limit:g} are allowed")
    what = f"of {limit:g}" if limit else "no limit in this track" if facts.track else "track not known"
    left = facts.missing(judged)
    return verdict(faults, "; ".join(told[:3]) + f"; {what}{left}" if told else "no log says the seconds of evaluation",
                   bool(told) and not left and facts.track is not None)


def k16(facts: Facts) -> Verdict:
    """The hardware that the track asks for."""
    faults, told, sure = [], [], bool(facts.seeds)
    wanted = facts.track.gpus if facts.track else 0
    for seed in facts.seeds:
        _, log = facts.by_seed.get(seed, ("", None))
        result = facts.results.get(seed)
        size = (log and log.get("world_size")) or (result and result["environment"].get("processes"))
        names = set((log and log.get("gpus")) or [])
        if result:
            names.add(str(result["environment"].get("gpu") or result["environment"].get("device")))
        told.append(f"seed {seed}: {size or '?'} x {', '.join(sorted(map(shown, names))) or '?'}")
        sure = sure and bool(size and names)
        if wanted and size and size != wanted:
            faults.append(f"seed {seed}: {size} processes, the track asks for {wanted} GPUs")
        if wanted and names and not any(facts.track.gpu in name for name in names):
            faults.append(f"seed {seed}: {', '.join(sorted(map(shown, names)))}, the track asks for {facts.track.gpu}")
    stated = facts.claim.values.get("hardware")
    if wanted and not sure and isinstance(stated, str) and facts.track.gpu not in stated:
        faults.append(f"hardware {shown(stated)}: the track asks for {wanted} x {facts.track.gpu}")
    evidence = "; ".join(told[:3]) + (f"; stated: {shown(stated)}" if isinstance(stated, str) else "")
    return verdict(faults, evidence or "nothing names the hardware", sure)


# ---- seeds and statistics


def k17(facts: Facts) -> Verdict:
    """Three seeds of one configuration."""
    faults = [] if len(facts.seeds) >= LEAST_SEEDS else [f"{len(facts.seeds)} seeds, {LEAST_SEEDS} are needed"]
    logs = {seed: log for seed, (_, log) in facts.by_seed.items() if seed in facts.seeds}
    settings = {seed: dialects.own_text(log.settings) for seed, log in logs.items() if log.settings}
    names = sorted({name for own in settings.values() for name in own})
    differing = [name for name in names if len({own.get(name) for own in settings.values()}) > 1]
    differing = [] if facts.ours else differing  # hashes say it better, where launches added to a log
    if differing:
        faults.append(f"settings differ between the seeds' logs: {', '.join(map(shown, differing[:6]))}")
    for what, values in (("code bytes", {dialects.code_bytes(log) for log in logs.values()} - {None}),
                         ("scripts", {row["code_sha256"] for row in facts.results.values()})):
        if len(values) > 1:
            faults.append(f"{what} differ between the seeds: {', '.join(sorted(shown(value, 20) for value in values))}")
    recipe = facts.config.get("settings")
    for seed, result in facts.results.items():
        wanted = schema.config_hash(recipe, seed) if isinstance(recipe, dict) else ""
        if result["config_hash"] != wanted:
            faults.append(f"result_seed{seed}.json: config_hash is not that of config.json with this seed")
        told = [config == wanted[:16] for config in (logs[seed].get("configs") or ())] if seed in logs else [True]
        # A run that died may have been begun again with other settings: from some launch on all must be these.
        if not told or not all(told[told.index(True) if True in told else 0:]):
            faults.append(f"log of seed {seed}: ran with another configuration than config.json and this seed")
    how = (f"{len(names)} settings" if settings else "") or ("code size" if logs else "")
    return verdict(faults, f"{len(facts.seeds)} seeds: {', '.join(map(str, facts.seeds))}; equal {how or 'unknown'}",
                   bool(how))


def k18(facts: Facts) -> Verdict:
    """Mean, deviation and test, recomputed."""
    faults, told = [], []
    scores = facts.scores()
    for place, unit in enumerate(("val_loss", "val_bpb")):
        values = [row[place] for row in scores.values()]
        stated, spread = facts.claim.get(unit), facts.claim.get(f"{unit}_std")
        if not values or None in values:
            continue
        mean = statistics.fmean(values)
        told.append(f"{unit} {mean:.8f} over {len(values)}")
        # The seeds' values are rounded, too: by so much can a mean of true ones lie elsewhere, a deviation by more.
        slack = 0.5 * 10.0 ** -max(map(places, values))
        if stated is not None and not dialects.agrees(mean, stated, places(stated), slack):
            best = "; it is the best seed's" if dialects.agrees(min(values), stated, places(stated)) else ""
            faults.append(f"{unit} {stated} is not the mean {mean:.8f} of {len(values)} seeds{best}")
        if spread is not None and len(values) > 1 and not dialects.agrees(
                statistics.stdev(values), spread, places(spread), 1.5 * slack):
            other = dialects.agrees(statistics.pstdev(values), spread, places(spread))
            faults.append(f"{unit}_std {spread} is not the sample deviation {statistics.stdev(values):.8f}"
                          + ("; it is the population's" if other else ""))
    compared = facts.claim.raw.get("comparison") if facts.ours else None
    if isinstance(compared, dict) and compared:
        if schema.plain(compare_with(facts, compared)) != compared:
            faults.append("comparison: is not what the seeds and those of its base give")
        told.append(f"compared with {shown(compared.get('base'))}")
    elif facts.ours and facts.track and facts.track.base:
        faults.append("comparison: names no base, which this track asks for")
    return verdict(faults, "; ".join(told) or "no scores by seed", bool(told))


def compare_with(facts: Facts, compared: Mapping[str, Any]) -> dict[str, Any]:
    """The comparison with the base whose values a record holds, computed anew; {} where it holds none."""
    rows = compared.get("base_seeds")
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        return {}
    return comparison(facts.scores(), str(compared.get("base")), rows)


def comparison(scores: Mapping[int, tuple[float | None, float]], base: str, rows: Mapping[str, Mapping[str, Any]]
               ) -> dict[str, Any]:
    """Ours against a base: its seeds' values, the differences, both bars in nats and bits a byte."""
    ours = {"nats": [row[0] for row in scores.values() if row[0] is not None],
            "bpb": [row[1] for row in scores.values()]}
    theirs = {unit: [float(row[name]) for row in rows.values() if schema.is_number(row.get(name))]
              for unit, name in (("nats", "val_loss"), ("bpb", "val_bpb"))}
    found: dict[str, Any] = {"base": base, "base_seeds": {seed: dict(row) for seed, row in rows.items()}}
    for unit, values in theirs.items():
        if values and ours[unit]:
            found[f"delta_{unit}"] = statistics.fmean(ours[unit]) - statistics.fmean(values)
    return {**found, "tests": significance.judge(ours, theirs)}


def k19(facts: Facts) -> Verdict:
    """Every run of the configuration is told, and none was left out because it was worse: one that no record may hold
    (over its budget, over the cap, caught by the audit) is told too, and was not left out by choice."""
    runs = facts.claim.raw.get("all_runs")
    if not isinstance(runs, list) or not all(isinstance(row, dict) for row in runs):
        return Verdict(FAIL if facts.ours else UNKNOWN, "no list of all runs of this configuration")
    listed = [row.get("seed") for row in runs]
    faults = [f"seed {seed}: is not in the list of runs" for seed in facts.seeds if seed not in listed]
    dropped, barred = [], []
    for row in runs:
        if row.get("used") is not True and row.get("same_script") is not False and schema.is_number(row.get("val_bpb")):
            (barred if disqualified(row) else dropped).append(row)
    used = [bpb for _, bpb in facts.scores().values()]
    if dropped and used and statistics.fmean(used) < statistics.fmean([*used, *(row["val_bpb"] for row in dropped)]):
        faults.append(f"{len(dropped)} runs with a score were left out, and the mean is better without them: seeds "
                      f"{', '.join(shown(row.get('seed'), 12) for row in dropped[:6])}")
    told = "; ".join(f"seed {shown(row.get('seed'), 12)} {shown(row['disqualified'][0], 80)}" for row in barred[:6])
    return verdict(faults, f"{len(runs)} runs listed, {len(dropped)} with a score not used"
                           + (f", {len(barred)} more that no record may hold: {told}" if barred else ""))


def disqualified(row: Mapping[str, Any]) -> bool:
    """Whether a row of all_runs says in words why no record may hold the run."""
    reasons = row.get("disqualified")
    return isinstance(reasons, list) and bool(reasons) and all(isinstance(text, str) and text for text in reasons)


# ---- folder and schema


def k20(facts: Facts) -> Verdict:
    """One folder of the right shape at the right place."""
    folder, name = facts.folder, facts.place.name
    faults = list(folder.faults)
    match = FOLDER_NAME.fullmatch(name)
    if not match or not schema.is_date(name):
        faults.append(f"{shown(name)}: the folder must be named YYYY-MM-DD_name")
    elif facts.ours and not str(facts.claim.values.get("date")).startswith(match[1]):
        faults.append(f"date {shown(facts.claim.values.get('date'), 20)}: the folder is of {match[1]}")
    above = facts.place.parent.name
    told = schema.pick_track(facts.claim.values.get("track"))
    if above.startswith("track_") and told and TRACKS[told].folder != above:
        faults.append(f"stands under {shown(above)}, its track {told} belongs to {TRACKS[told].folder}")
    if facts.place.parts[:-1].count("records") > 1:
        faults.append("stands under records/ twice")
    wanted = ["README.md", facts.claim_name, "train_gpt.py", *(OWN_FILES if facts.ours else ())]
    for seed, row in facts.claim.seeds.items():
        if row.get("log") is not None and not inside(row["log"]):
            faults.append(f"log of seed {seed}: {shown(row['log'])} leads out of the folder")
        elif row.get("log") is not None or facts.ours:
            wanted.append(row.get("log") or f"train_seed{seed}.log")
        wanted += [f"{name}_seed{seed}.{kind}" for name, kind in (
            ("result", "json"), ("events", "jsonl"), ("receipt", "json"))] if facts.ours else []
    faults += [f"{shown(path)}: is not there" for path in dict.fromkeys(wanted) if path not in folder.files]
    if not facts.logs and not facts.log_faults:
        faults.append("there is no log")
    faults += [f"{shown(path)}: is no part of a submission" for path in folder.files
               if path.lower().endswith(CHECKPOINTS) or "__pycache__/" in path or path.startswith(".git/")]
    faults += [f"{shown(path)}: is no name for a file here" for path in folder.files
               if not path.isprintable() or "\\" in path or len(path) > 200]
    where = "" if above.startswith("track_") else f"; {shown(above)}/ is no track, so its place is not judged"
    return verdict(faults, f"{len(folder.files)} files{where}")


def k21(facts: Facts) -> Verdict:
    """submission.json has its fields, each of its kind, each once."""
    notes = f"; {', '.join(facts.claim.notes[:6])}" if facts.claim.notes else ""
    return verdict(facts.claim.faults, f"{len(facts.claim.raw)} fields, "
                                       f"{'canonical' if facts.ours else 'of another tool'}{notes}")


# ---- the script by itself


def k22(facts: Facts) -> Verdict:
    """The script is Python that this version parses."""
    if facts.looked is None:
        return Verdict(FAIL, "train_gpt.py: cannot be read")
    script = facts.looked.script
    faults = ["train_gpt.py: begins with a byte order mark"] * script.mark
    broken = script.tree is None and ("in Python" in script.fault or "no Python text" in script.fault)
    faults += [f"train_gpt.py: {script.fault}"] if broken else []
    return verdict(faults, f"parses in Python {sys.version_info[0]}.{sys.version_info[1]}; not run" if not script.fault
                   else f"train_gpt.py: {script.fault}", not script.fault)


def package(name: str) -> str:
    """The package of a module, in the spelling that both sides are brought to."""
    first = name.partition(".")[0]
    return PACKAGE_OF.get(first, first).lower().replace("-", "_")


def k23(facts: Facts) -> Verdict:
    """Every import is in the requirements, and no compressor is optional."""
    if facts.looked is None or facts.looked.script.fault:
        return Verdict(UNKNOWN, "the script cannot be read to its end")
    try:
        text = facts.folder.text("requirements.txt") if "requirements.txt" in facts.folder.files else ""
    except FolderError as error:
        return Verdict(FAIL, str(error))
    # A package that a comment names is told of, with the reason why it is not installed from there.
    told = {word.lower().replace("-", "_") for word in re.findall(r"[A-Za-z][\w-]*", text)} | CHALLENGE_PACKAGES
    beside = {name.removesuffix(".py") for name in facts.folder.files if name.endswith(".py")}
    faults = []
    for use in facts.looked.imports:
        first, wanted = use.name.partition(".")[0], package(use.name)
        if not use.reached or first in sys.stdlib_module_names or first in beside or first in WITH_TORCH:
            continue
        if not told & {wanted, *SPELLINGS.get(wanted, ())} and not use.optional:
            faults.append(f"line {use.line}: imports {shown(use.name)}, which requirements.txt does not name")
        if use.optional and wanted in COMPRESSORS:
            faults.append(f"line {use.line}: goes on without the compressor {shown(use.name)}")
    for seed, (_, log) in facts.by_seed.items():
        faults += [f"log of seed {seed}: {shown(line)}" for key in ("fallbacks", "not_there") for line in
                   (log.get(key) or ())[:1]]
    faults += [f"line {use.line}: runs {use.name}, which neither README.md nor requirements.txt names"
               for use in facts.looked.programs if use.reached and use.name in PROGRAMS and use.name not in told
               and use.name not in facts.readme]
    names = sorted({package(use.name) for use in facts.looked.imports
                    if use.name.partition(".")[0] not in sys.stdlib_module_names})
    return verdict(faults, f"imports {', '.join(map(shown, names)) or 'the standard library only'}")


def k24(facts: Facts) -> Verdict:
    """Nothing that runs uses a network."""
    if facts.looked is None or facts.looked.script.fault:
        return Verdict(UNKNOWN, "the script cannot be read to its end")
    live = [f"line {use.line}: {shown(use.name)}" for use in facts.looked.network if use.reached]
    dead = len(facts.looked.network) - len(live)
    told = [f"{len(facts.looked.hidden)} calls of exec or eval hide code"] if facts.looked.hidden else []
    return verdict(live, "; ".join(["no call of the script that is reached uses a network"
                                    + (f", {dead} that are not reached do" if dead else ""), *told]), not told)


def k25(facts: Facts) -> Verdict:
    """The artifact, read back in a fresh process, gives the score."""
    return facts.ran or Verdict(UNKNOWN, "needs the artifact and a run: verify --run")


def k26(facts: Facts) -> Verdict:
    """The code that runs can be read."""
    if facts.looked is None:
        return Verdict(FAIL, "train_gpt.py: cannot be read")
    script, (reached, defined) = facts.looked.script, facts.looked.definitions
    faults = [f"line {use.line}: {use.name} of something that cannot be read" for use in facts.looked.hidden
              if use.reached]
    if script.fault and script.tree is not None:
        faults.append(f"train_gpt.py: runs what cannot be read: {script.fault}")
    return verdict(faults, f"{reached} of {defined} definitions are reached from the start" if not script.fault
                   else f"train_gpt.py: {script.fault}", not script.fault)


def k27(facts: Facts) -> Verdict:
    """The score is in the band of what is plausible."""
    best = min((bpb for _, bpb in facts.scores().values()), default=facts.claim.get("val_bpb"))
    faults = [f"seed {seed}: {shown(alarm, 160)}" for seed, row in facts.results.items() for alarm in row["alarms"]]
    if best is None:
        return verdict(faults, "no score", known=False)
    timed = bool(facts.track and facts.track.train_seconds)
    if facts.fineweb and best < (FLOOR_BPB if timed else UNLIMITED_FLOOR_BPB):
        faults.append(f"{best:.5f} is below {FLOOR_BPB if timed else UNLIMITED_FLOOR_BPB}; see K4, K5, K7, K9 first")
    low = facts.fineweb and timed and best < SURVIVED_BPB
    doubt = f"; nothing below {SURVIVED_BPB} has survived review, K7 and K9 decide" if low else ""
    return verdict(faults, f"best seed {best:.5f}{doubt}", not low)


class Check(NamedTuple):
    """A row of the checklist: what is checked, by which rule, with what (S static, L logs and JSON, C a CPU and the
    artifact, G a GPU), and the judge."""

    title: str
    rule: str
    tier: str
    judge: Callable[[Facts], Verdict]


CHECKS: dict[str, Check] = {
    "K1": Check("bytes of code and model", "R1", "S", k1),
    "K2": Check("code counted is code shipped", "R1", "S", k2),
    "K3": Check("log, JSON and script belong together", "R9", "L", k3),
    "K4": Check("implied bytes", "R5", "L", k4),
    "K5": Check("whole validation split", "R4", "L", k5),
    "K6": Check("tokenizer proof", "R5", "C", k6),
    "K7": Check("training and validation disjoint", "R4", "C", k7),
    "K8": Check("strict causality", "C1", "C/G", audited("causality")),
    "K9": Check("a full distribution, fixed before", "C2", "C/G", audited("distribution", "realised_token")),
    "K10": Check("score before update", "C3", "C/G", audited("single_pass")),
    "K11": Check("one pass", "C4", "L", k11),
    "K12": Check("no validation token before evaluation", "R4", "S/C", k12),
    "K13": Check("documents do not reach each other", "C1", "C", k13),
    "K14": Check("seconds of training", "R2", "L", k14),
    "K15": Check("seconds of evaluation", "R3", "L", k15),
    "K16": Check("hardware", "R2", "L", k16),
    "K17": Check("three seeds, one configuration", "R6", "L", k17),
    "K18": Check("mean, deviation and test", "R6", "L", k18),
    "K19": Check("all runs told", "R7", "L", k19),
    "K20": Check("shape of the folder", "R9", "S", k20),
    "K21": Check("schema of submission.json", "R9", "S", k21),
    "K22": Check("script is Python", "R9", "S", k22),
    "K23": Check("dependencies", "R8", "S", k23),
    "K24": Check("no network", "R1", "S", k24),
    "K25": Check("artifact reloaded", "R1", "C/G", k25),
    "K26": Check("code can be read", "R1", "S", k26),
    "K27": Check("plausible score", "R6", "L", k27)}


def judge_all(facts: Facts) -> dict[str, Verdict]:
    """The verdict of every check, in the order of the list. One that breaks on a folder has failed, and says so: what a
    check cannot stand, no honest tool writes, or the check is to be mended."""
    found = {}
    for name, check in CHECKS.items():
        try:
            found[name] = check.judge(facts)
        except Exception as error:  # whatever a stranger wrote, the other checks are made
            found[name] = Verdict(FAIL, f"the check itself broke ({type(error).__name__}: {shown(error, 120)})")
    return found


def read_values(path: Path) -> tuple[str, dict[int, tuple[float | None, float]]]:
    """Name and scores by seed of a folder or a submission.json; FolderError where there are none."""
    if path.is_dir():
        facts = Facts(path)
        if not facts.scores() and facts.claim.faults and not facts.logs:
            raise FolderError(f"{path}: {facts.claim.faults[0]}")
        name, scores = facts.place.name, facts.scores()
    else:
        folder = Folder(path.parent)
        found = read_json(folder.read(path.name, TEXT_LIMIT_BYTES), path.name)
        claim = schema.read_claim(found.value, found.faults)
        name = path.resolve().parent.name
        scores = {seed: (row.get("val_loss") if schema.is_number(row.get("val_loss")) else None, row["val_bpb"])
                  for seed, row in claim.seeds.items() if schema.is_number(row.get("val_bpb"))}
    if not scores:
        raise FolderError(f"{path}: has no scores by seed")
    return name, scores
