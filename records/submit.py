"""Records: a folder from finished runs, the verdict on anybody's folder, and what a difference says.

    python records/submit.py make RUN RUN RUN --track TRACK --name NAME --author NAME --github-id ID
    python records/submit.py verify FOLDER [--json] [--run]
    python records/submit.py compare FOLDER FOLDER ... [--json]
    python records/submit.py report [FOLDER ...] [--out report.html] [--markdown]

`make` writes records/<track>/<date>_<name>/ and types no number: page and JSON come from the runs' own files. It
refuses runs that differ in script or configuration, fewer than three seeds, runs that were not packed, over a budget,
over the cap, changed afterwards, or refused by the audit (which the record track asks for; --base names the record to
compare with). The folder is verified before it takes its place. It holds no artifact, as the challenge's do not;
--with-artifact adds the first run's and its scores by document, which `verify --run` needs.

`verify` reads a folder, ours or anybody's, without running anything in it, and gives a verdict on each of K1 to K27:
pass, fail or cannot tell. --run also executes the script of a folder that `make` made, in a process of its own without
network and training data, and compares what its artifact scores with the log.

`compare` tests the first folder against each other one, in nats and bits a byte, against both bars of the challenge,
and says how many more seeds a decision needs.

`report` makes one page of runs and records, records/report.py.

Exit codes: 0 done, 2 a mistake in the input (one clear line), 3 a failed check.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from records import checks, dialects, page, report, schema, scripts, significance  # noqa: E402
from records.checks import CHECKS, FAIL, PASS, UNKNOWN, Facts, Verdict  # noqa: E402
from records.dialects import LogFacts  # noqa: E402
from records.folder import HASH_LIMIT_BYTES, LOG_LIMIT_BYTES, Folder, FolderError, shown  # noqa: E402
from records.schema import CAP_BYTES, FORMAT, TRACKS  # noqa: E402

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,59}")
MOST_RUNS_BESIDE = 1000
# How the score of an evaluator adapts to the text.
ADAPTATIONS = {"contiguous": "none", "sliding": "none", "document": "none", "ttt": "score_first_ttt",
               "ngram": "token_tilt", "valve": "none"}
WORDS = {PASS: "pass", FAIL: "FAIL", UNKNOWN: "cannot tell"}


class InputError(Exception):
    """A user's mistake; the message is what the user reads. Exit code 2."""


class RefusedError(Exception):
    """A failed check; the message has a line for each. Exit code 3."""


# ---- make


class RunFacts(NamedTuple):
    """A finished run: its folder, what its files say, the settings that every seed of it must share."""

    folder: Folder
    name: str
    result: dict[str, Any]
    settings: dict[str, Any]
    recipe: dict[str, Any]
    log: LogFacts

    @property
    def seed(self) -> int:
        """Its seed."""
        return self.result["seed"]


def recipe_of(config: Any) -> dict[str, Any]:
    """The settings in a run's config.json that are the same for every seed, place and launch of it."""
    import train_gpt
    settings = config.get("settings") if isinstance(config, dict) else None
    if not isinstance(settings, dict):
        raise FolderError("config.json: has no settings")
    return {name: value for name, value in settings.items()
            if name not in train_gpt.SETTINGS or train_gpt.SETTINGS[name][1].metadata["scope"] == "recipe"}


def read_run(path: Path) -> RunFacts:
    """A run folder; InputError where it is none, or its run did not finish."""
    if not path.is_dir():
        raise InputError(f"RUN={path}: must be a run folder")
    folder = Folder(path)
    try:
        result, config = folder.json("result.json").value, folder.json("config.json").value
        if "scores" not in result or "budget" not in result:
            raise InputError(f"RUN={path}: is not finished (no score, or no report)")
        schema.check_result(result)
        recipe = recipe_of(config)
        if schema.config_hash(recipe, result["seed"]) != result["config_hash"]:
            raise InputError(f"RUN={path}: config.json does not give the config_hash of result.json; it was changed, "
                             "or another version of train_gpt.py made the run")
        log = dialects.read_log(folder.read("train.log", LOG_LIMIT_BYTES))
        folder.read("events.jsonl", LOG_LIMIT_BYTES)
    except (FolderError, schema.ResultError) as error:
        raise InputError(f"RUN={path}: {error}") from None
    return RunFacts(folder, path.resolve().name, result, config["settings"], recipe, log)


def disqualified(result: Mapping[str, Any], files: Mapping[str, int], track: schema.Track) -> list[str]:
    """What keeps a run out of every record of a track, whatever it and the others score; `files` are its folder's
    sizes."""
    reasons, budget = [], result["budget"]
    total = max(result["artifact"]["total_bytes"], files.get("train_gpt.py", 0) + files.get("artifact.bin", 0))
    if total > CAP_BYTES:
        reasons.append(f"{total} bytes are {total - CAP_BYTES} over the {CAP_BYTES}")
    if not budget["ok"]:
        reasons.append(f"over its budget (training {budget['train_seconds']:.1f} s, evaluation "
                       f"{budget['eval_seconds']:.1f} s)")
    for what, name, most in (("training", "train_seconds", track.train_seconds),
                             ("evaluation", "eval_seconds", track.eval_seconds)):
        if most and budget[name] > most:
            reasons.append(f"{budget[name]:.1f} s of {what}, the track allows {most:g}")
    if not result["ledger"]["scored_once"]:
        reasons.append("its ledger does not say that every target was scored once")
    return reasons + [f"audit of {rule} failed" for rule, row in result["audit"].items() if row.get("pass") is not True]


def refusals(runs: Sequence[RunFacts], track: schema.Track) -> list[str]:
    """What the checklist forbids in the runs themselves, one line each; the folder's own checks come later."""
    first, faults = runs[0].result, []
    seeds = [run.seed for run in runs]
    if len(runs) < checks.LEAST_SEEDS:
        faults.append(f"{len(runs)} runs: at least {checks.LEAST_SEEDS} seeds are needed")
    if len(set(seeds)) < len(seeds):
        faults.append(f"seeds {', '.join(map(str, seeds))}: each may stand once")
    for run in runs:
        result, where = run.result, f"RUN={run.folder.root}"
        if changed := [name for name in sorted({*run.recipe, *runs[0].recipe})
                       if run.recipe.get(name) != runs[0].recipe.get(name)]:
            faults.append(f"{where}: its configuration is not that of {runs[0].name} ({', '.join(changed[:4])})")
        for name, what in (("code_sha256", "script"), ("source_sha256", "source")):
            if result[name] != first[name]:
                faults.append(f"{where}: its {what} ({name} {result[name][:16]}) is not that of {runs[0].name} "
                              f"({first[name][:16]})")
        if track.fineweb and not result["data"]["source"].startswith("fineweb"):
            faults.append(f"{where}: scored {shown(result['data']['source'])}, this track is of the challenge's text")
        if result["data"]["manifest_sha256"] != first["data"]["manifest_sha256"]:
            faults.append(f"{where}: its dataset is not that of {runs[0].name}")
        if not result["artifact"]["packed"] or not result["declared"].get("packed"):
            faults.append(f"{where}: PACK=0: only the packed script may be submitted")
        for name, promised, what in (("train_gpt.py", result["code_sha256"], "ran"),
                                     ("artifact.bin", result["artifact"]["sha256"], "was written")):
            try:
                if run.folder.sha256(name) != promised:
                    faults.append(f"{where}: {name} is not the one that {what} (sha256)")
            except FolderError as error:
                faults.append(f"{where}: {error}")
        faults += [f"{where}: {reason}" for reason in disqualified(result, run.folder.files, track)]
        faults += [f"{where}: alarm: {shown(alarm)}" for alarm in result["alarms"]]
    if track.audit and not any(run.result["audit"] for run in runs):
        faults.append(f"AUDIT: no run was audited, which this track asks for; RUN_ID={runs[0].name} "
                      "STAGES=evaluate,report AUDIT=1 ./run.sh does it")
    return faults


def find_source(digest: str, commit: str, given: Path | None) -> bytes:
    """The readable train_gpt.py with this sha256: the file that is named, this checkout's, or that of the commit."""
    tried = [given.read_bytes() if given.is_file() else b""] if given else [(ROOT / "train_gpt.py").read_bytes()]
    if not given and re.fullmatch(r"[0-9a-f]{40}\+?", commit):
        done = subprocess.run(["git", "-C", str(ROOT), "show", f"{commit.rstrip('+')}:train_gpt.py"],
                              capture_output=True)
        tried.append(done.stdout)
    for data in tried:
        if hashlib.sha256(data).hexdigest() == digest:
            return data
    where = "" if given else ", which neither this checkout nor their commit has"
    raise InputError(f"--source={given or ''}: must be the readable train_gpt.py of the runs (sha256 {digest[:16]}..."
                     f"{where})")


def find_tokenizer(data: dict[str, Any], given: Path | None) -> bytes | None:
    """The tokenizer's model where it is not one of the challenge's; None for those."""
    if data["source"].startswith("fineweb ("):
        return None
    paths = [given] if given else []
    for base in () if given else (Path(data["path"]), ROOT / data["path"]):
        try:
            manifest = json.loads((base / "manifest.json").read_text(encoding="utf-8"))
            paths.append(base / manifest["tokenizer"]["path"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # the next place is tried, and none is an error below
    for path in paths:
        if path.is_file() and path.stat().st_size <= HASH_LIMIT_BYTES and (
                hashlib.sha256(path.read_bytes()).hexdigest() == data["tokenizer_sha256"]):
            return path.read_bytes()
    raise InputError(f"--tokenizer={given or ''}: must be the tokenizer of the runs (sha256 "
                     f"{data['tokenizer_sha256'][:16]}...); {data['path']} does not hold it")


def metric_label(run: RunFacts, kind: str) -> str:
    """The label in the log of the exact line of an evaluator's score."""
    score = run.result["scores"][kind]
    labels = [metric.label for metric in run.log.metrics
              if metric.label.endswith("_exact") and f"{score['val_bpb']:.8f}" == f"{metric.bpb:.8f}"]
    if not labels:
        raise RefusedError(f"RUN={run.folder.root}: train.log has no line with the score of {kind}")
    return labels[-1]


def runs_beside(runs: Sequence[RunFacts], kind: str, track: schema.Track) -> list[dict[str, Any]]:
    """Every run of the configuration that stands beside the given ones, finished or not: its score where it has one,
    and what disqualifies it, which only a whole result can say."""
    rows: list[dict[str, Any]] = []
    used, code = {run.folder.root.resolve() for run in runs}, runs[0].result["code_sha256"]
    for parent in dict.fromkeys(path.parent for path in sorted(used)):
        for path in sorted(parent.iterdir())[:MOST_RUNS_BESIDE]:
            try:
                config = json.loads((path / "config.json").read_text(encoding="utf-8"))
                if recipe_of(config) != runs[0].recipe:
                    continue
                held = path / "result.json"
                result = json.loads(held.read_text(encoding="utf-8")) if held.exists() else {}
                done = "budget" in result and datetime.datetime.fromtimestamp(held.stat().st_mtime, datetime.UTC)
                row = {"run": path.name, "seed": config["settings"]["SEED"],
                       "finished": done.strftime("%Y-%m-%dT%H:%M:%SZ") if done else None,
                       "val_bpb": result.get("scores", {}).get(kind, {}).get("val_bpb"), "used": path in used,
                       "same_script": result.get("code_sha256", code) == code, "disqualified": []}
                sizes = {name: (path / name).stat().st_size for name in ("train_gpt.py", "artifact.bin")
                         if (path / name).is_file()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError, FolderError):
                continue  # no run folder
            with contextlib.suppress(schema.ResultError):  # where a result is not whole, its score counts
                schema.check_result(result)
                row["disqualified"] = disqualified(result, sizes, track)
            rows.append(row)
    return rows


def hardware(environment: dict[str, Any]) -> str:
    """The machine in words."""
    count = environment.get("processes", 1)
    if "gpu" in environment:
        return f"{count} x {environment['gpu']}, torch {environment.get('torch')}"
    return f"{count} process{'es' if count > 1 else ''} on a CPU ({environment.get('cpu')}, " \
           f"{environment.get('threads')} threads), torch {environment.get('torch')}"


def make_record(runs: Sequence[RunFacts], words: argparse.Namespace, kind: str, base: dict[str, Any]) -> dict[str, Any]:
    """submission.json of the runs, but for the verdicts and the list of files."""
    first = runs[0].result
    entries = {str(run.seed): schema.entry_of(run.result, kind, f"train_seed{run.seed}.log") for run in runs}
    worst = max(entries.values(), key=lambda row: row["artifact_bytes"])
    scores = {run.seed: (run.result["scores"][kind]["val_loss"], run.result["scores"][kind]["val_bpb"]) for run in runs}
    losses, bits = zip(*scores.values(), strict=True)
    label = {metric_label(run, kind) for run in runs}
    if len(label) > 1:
        raise RefusedError(f"the logs name the score of {kind} differently: {', '.join(sorted(label))}")
    settings, processes = runs[0].settings, first["environment"].get("processes", 1)
    launch = f"torchrun --standalone --nproc_per_node={processes}" if processes > 1 else "python"
    words_of = f"preset {first['preset']}" + (f" under {first['overlay']}" if first["overlay"] else "")
    data = first["data"]
    return {
        "format": FORMAT, "author": words.author, "github_id": words.github_id, "name": words.name,
        "blurb": words.blurb or f"{words_of}, scored by {kind} on the artifact read back from disk, {len(runs)} seeds.",
        "date": words.date, "track": words.track, "val_loss": statistics.fmean(losses),
        "val_bpb": statistics.fmean(bits), "val_loss_std": statistics.stdev(losses),
        "val_bpb_std": statistics.stdev(bits), "bytes_total": worst["artifact_bytes"],
        "bytes_code": worst["code_bytes"], "bytes_model": worst["model_bytes"], "seeds": [run.seed for run in runs],
        "seed_results": entries, "metric_label": label.pop(), "evaluator": kind,
        "hardware": hardware(first["environment"]),
        "tokenizer": {"sha256": data["tokenizer_sha256"], "lossless": data["lossless"],
                      "bytes_per_token": data["val_bytes"] / data["val_tokens"], "vocab_size": settings["VOCAB_SIZE"]},
        "data": {name: data[name] for name in ("source", "manifest_sha256", "val_documents", "val_tokens", "val_bytes",
                                               "train_tokens", "disjoint")},
        "environment": first["environment"], "adaptation": ADAPTATIONS[kind],
        "declared_modes": first["declared"]["modes"], "preset": first["preset"], "overlay": first["overlay"],
        "source_sha256": first["source_sha256"], "code_sha256": first["code_sha256"], "commit": first["commit"],
        "command": f"{launch} train_gpt.py SEED=<seed> DATA_PATH=<dataset folder>",
        "comparison": schema.plain(checks.comparison(scores, **base)) if base else {},
        "all_runs": runs_beside(runs, kind, TRACKS[words.track])}


def dump(value: Any) -> bytes:
    """Indented JSON."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def fill(target: Path, runs: Sequence[RunFacts], record: dict[str, Any], source: bytes, tokenizer: bytes | None,
         artifact: bool, before: str) -> None:
    """Write everything of a record into an empty folder, its verdicts last: they are about all the rest."""
    first = runs[0].folder
    files = {"config.json": dump({"settings": runs[0].recipe}), "source/train_gpt.py": source,
             "requirements.txt": (ROOT / "requirements.txt").read_bytes(),
             "train_gpt.py": first.read("train_gpt.py", scripts.SCRIPT_LIMIT_BYTES)}
    if tokenizer is not None:
        files["tokenizer.model"] = tokenizer
    for run in runs:
        for name, kept in (("train.log", f"train_seed{run.seed}.log"), ("events.jsonl", f"events_seed{run.seed}.jsonl"),
                           ("result.json", f"result_seed{run.seed}.json"),
                           ("receipt.json", f"receipt_seed{run.seed}.json")):
            if name in run.folder.files:
                files[kept] = run.folder.read(name, LOG_LIMIT_BYTES)
    if artifact:
        for name, kept in (("artifact.bin", f"artifact_seed{runs[0].seed}.bin"),
                           ("documents.npz", f"documents_seed{runs[0].seed}.npz")):
            files[kept] = first.read(name, HASH_LIMIT_BYTES)
    record["files"] = sorted([*files, "README.md", "submission.json"])
    for name, data in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(data)
    record["compliance"] = {}
    for _ in range(2):  # the verdicts are part of page and JSON, so they are taken twice
        (target / "submission.json").write_bytes(dump(record))
        (target / "README.md").write_text(page.write(record, before), encoding="utf-8")
        found = checks.judge_all(Facts(target))
        record["compliance"] = {name: {"title": CHECKS[name].title, "status": row.status, "pass": row.status == PASS,
                                       "method": CHECKS[name].tier, "evidence": row.evidence}
                                for name, row in found.items()}
    (target / "submission.json").write_bytes(dump(record))
    (target / "README.md").write_text(page.write(record, before), encoding="utf-8")


def read_base(path: Path) -> dict[str, Any]:
    """Name and seeds' values of the record that ours is compared with."""
    try:
        name, scores = checks.read_values(path)
    except FolderError as error:
        raise InputError(f"--base={path}: {error}") from None
    return {"base": name, "rows": {str(seed): {"val_loss": loss, "val_bpb": bpb} for seed, (loss, bpb) in
                                   sorted(scores.items())}}


def make(words: argparse.Namespace) -> Path:
    """Make the folder of a record; returns its path. InputError, or RefusedError with a line for each reason."""
    track = TRACKS[words.track]
    for option, value, rule in (("--name", words.name, NAME), ("--github-id", words.github_id, NAME)):
        if not rule.fullmatch(value):
            raise InputError(f"{option}={shown(value)}: must be letters, digits and dashes, at most 60")
    if not words.author.strip() or not words.author.isprintable():
        raise InputError(f"--author={shown(words.author)}: must be a name")
    if not schema.is_date(words.date) or len(words.date) != 10:
        raise InputError(f"--date={shown(words.date)}: must be YYYY-MM-DD")
    target = words.records / track.folder / f"{words.date}_{words.name}"
    if target.exists() and not words.replace:
        raise InputError(f"--name={words.name}: {target} is there already; --replace makes it anew and keeps its words")
    runs = [read_run(path) for path in words.runs]
    kind = words.metric or runs[0].settings["EVAL"][-1]
    if lacking := [run for run in runs if kind not in run.result["scores"] or kind not in ADAPTATIONS]:
        raise InputError(f"--metric={kind}: must be an evaluator of all runs; {lacking[0].name} has "
                         f"{', '.join(name for name in lacking[0].result['scores'] if name in ADAPTATIONS)}")
    base = read_base(words.base) if words.base else {}
    faults = refusals(runs, track)
    if track.base and not base:
        faults.append(f"--base: track {words.track} asks for the record that this one is compared with")
    if faults:
        raise RefusedError("\n".join(faults))
    first = runs[0].result
    source = find_source(first["source_sha256"], first["commit"], words.source)
    tokenizer = find_tokenizer(first["data"], words.tokenizer)
    before = (target / "README.md").read_text(encoding="utf-8") if (target / "README.md").is_file() else ""
    record = make_record(runs, words, kind, base)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=words.records) as place:
        staged = Path(place) / track.folder / target.name
        staged.mkdir(parents=True)
        try:
            fill(staged, runs, record, source, tokenizer, words.with_artifact, before)
        except FolderError as error:
            raise InputError(f"RUN={runs[0].folder.root}: {error}") from None
        found = checks.judge_all(Facts(staged))
        if broken := [f"{name} {CHECKS[name].title}: {row.evidence}" for name, row in found.items()
                      if row.status == FAIL]:
            raise RefusedError("\n".join(broken))
        if target.exists():
            shutil.rmtree(target)
        staged.rename(target)
    return target


# ---- verify


def verdict_table(found: dict[str, Verdict], width: int = 150) -> list[str]:
    """The verdicts for a terminal, one line each, and their sum."""
    lines = [f"{name:<4} {WORDS[row.status]:<12} {CHECKS[name].rule:<3} {CHECKS[name].tier:<4} "
             f"{CHECKS[name].title:<42} {shown(row.evidence, width)}" for name, row in found.items()]
    counts = {status: sum(row.status == status for row in found.values()) for status in (PASS, FAIL, UNKNOWN)}
    return [*lines, f"{len(found)} checks: {counts[PASS]} pass, {counts[FAIL]} fail, {counts[UNKNOWN]} cannot be told "
                    "here"]


def verify(path: Path, run: bool = False, tokens: int = 0, data: Path | None = None) -> dict[str, Verdict]:
    """The verdicts on a folder; InputError where there is none. Nothing of it is executed without `run`."""
    if not path.is_dir():
        raise InputError(f"FOLDER={path}: must be a folder")
    facts = Facts(path)
    if run:
        from records import reload
        facts.ran = reload.rerun(facts, tokens, data)
    return checks.judge_all(facts)


# ---- compare


def compare(paths: Sequence[Path]) -> dict[str, Any]:
    """Scores of every folder, and the first against each other one."""
    entries = []
    for path in paths:
        try:
            entries.append(checks.read_values(path))
        except FolderError as error:
            raise InputError(f"FOLDER={path}: {error}") from None
    rows = []
    for name, scores in entries:
        losses = [loss for loss, _ in scores.values() if loss is not None]
        row: dict[str, Any] = {"name": name, "seeds": list(scores)}
        for unit, values in (("nats", losses if len(losses) == len(scores) else []),
                             ("bpb", [bpb for _, bpb in scores.values()])):
            row[unit] = significance.sample(values)._asdict() if values else None
        rows.append(row)
    against = []
    for name, scores in entries[1:]:
        base = {str(seed): {"val_loss": loss, "val_bpb": bpb} for seed, (loss, bpb) in scores.items()}
        found = checks.comparison(entries[0][1], name, base)
        against.append(found)
    return schema.plain({"bars": {name: bar._asdict() for name, bar in significance.BARS.items()},
                         "power": significance.ENOUGH_POWER, "folders": rows, "against": against})


def compare_table(found: dict[str, Any]) -> list[str]:
    """The comparison for a terminal."""
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)
    lines = [f"{'folder':<50} {'seeds':>5} {'nats a token':>13} {'deviation':>10} {'BPB':>10} {'deviation':>10}"]
    for row in found["folders"]:
        nats, bits = row["nats"] or {}, row["bpb"]
        lines.append(f"{shown(row['name'], 50):<50} {len(row['seeds']):>5} {number(nats.get('mean'), '.6f'):>13} "
                     f"{number(nats.get('deviation'), '.6f'):>10} {bits['mean']:>10.6f} "
                     f"{number(bits['deviation'], '.6f'):>10}")
    for against in found["against"]:
        lines += ["", f"the first minus {shown(against['base'], 60)}; negative is better"]
        for unit, bars in against["tests"].items():
            for bar, row in bars.items():
                met = {True: "met", False: "not met", None: "needs two seeds of each"}[row["met"]]
                more = row["more_seeds"]
                both = row["more_seeds_of_both"]
                lines.append(
                    f"  {significance.BARS[bar].text:<25} {unit:<5} {row['delta']:+.6f}, margin {row['margin']:.6f}: t "
                    f"{number(row.get('t'), '.3f')} with {number(row.get('df'), '.2f')} degrees, p "
                    f"{number(row.get('p'), '.4g')} of {row['alpha']:g}: {met}; "
                    + ("no number of seeds is enough, if this difference is the truth" if more is None and both is None
                       else f"{more} more seeds of the first for power {found['power']:g}" if more is not None
                       else f"{both} more seeds of both for power {found['power']:g}"))
    return lines


# ---- command line


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit code 2."""
        self.exit(2, f"{self.prog}: {message} (--help lists what there is)\n")


def make_parser() -> OneLineParser:
    """The command line."""
    parser = OneLineParser(prog="records/submit.py", description="Folders of records: make, verify, compare.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    built = commands.add_parser("make", help="a folder from finished runs, one a seed")
    built.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a finished run folder")
    built.add_argument("--track", required=True, choices=list(TRACKS),
                       help="; ".join(f"{name}: {track.text}" for name, track in TRACKS.items()))
    built.add_argument("--name", required=True, help="letters, digits and dashes; the folder is <date>_<name>")
    built.add_argument("--author", required=True)
    built.add_argument("--github-id", required=True, metavar="ID")
    built.add_argument("--blurb", default="", help="one sentence; made from the configuration where it is not given")
    built.add_argument("--date", default=datetime.date.today().isoformat(), help="YYYY-MM-DD (today)")
    built.add_argument("--metric", default="", metavar="EVALUATOR", help="whose score is claimed (the last in EVAL)")
    built.add_argument("--base", type=Path, metavar="FOLDER", help="the record to compare with: folder or JSON file")
    built.add_argument("--source", type=Path, metavar="FILE", help="the readable train_gpt.py (this checkout's)")
    built.add_argument("--tokenizer", type=Path, metavar="MODEL", help="the tokenizer (that of the runs' dataset)")
    built.add_argument("--with-artifact", action="store_true", help="keep the first run's artifact, for verify --run")
    built.add_argument("--replace", action="store_true", help="make it anew where it is there; its words stay")
    built.add_argument("--records", type=Path, default=ROOT / "records", metavar="FOLDER", help="where tracks lie")
    checked = commands.add_parser("verify", help="a verdict on each of K1 to K27, for anybody's folder")
    checked.add_argument("folder", type=Path, metavar="FOLDER")
    checked.add_argument("--json", action="store_true", help="the verdicts as JSON, evidence uncut")
    checked.add_argument("--run", action="store_true", help="execute our script: reload the artifact, score a slice")
    checked.add_argument("--tokens", type=int, default=0, metavar="N", help="targets of that slice (0: 20,000)")
    checked.add_argument("--data", type=Path, metavar="DATASET_FOLDER", help="its validation split (the runs' own)")
    compared = commands.add_parser("compare", help="the first folder against the others")
    compared.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folder or submission.json")
    compared.add_argument("--json", action="store_true")
    commands.add_parser("report", add_help=False, help="one page of runs and records; report --help says more")
    return parser


def run_command(argv: Sequence[str]) -> int:
    """Runs one command line; returns the exit code. Raises InputError and RefusedError."""
    if argv[:1] == ["report"]:
        return report.main(list(argv[1:]))
    words = make_parser().parse_args(argv)
    if words.command == "make":
        target = make(words)
        print("\n".join(verdict_table(checks.judge_all(Facts(target)))))
        print(target)
        return 0
    if words.command == "verify":
        if words.tokens < 0:
            raise InputError(f"--tokens={words.tokens}: must be at least 0")
        found = verify(words.folder, words.run, words.tokens, words.data)
        if words.json:
            rows = {name: {"title": CHECKS[name].title, "rule": CHECKS[name].rule, "tier": CHECKS[name].tier,
                           **row._asdict()} for name, row in found.items()}
            print(json.dumps({"folder": str(words.folder), "checks": rows}, indent=1))
        else:
            print("\n".join(verdict_table(found)))
        return 3 if any(row.status == FAIL for row in found.values()) else 0
    if len(words.folders) < 2:
        raise InputError(f"FOLDER={words.folders[0]}: at least two are compared")
    found = compare(words.folders)
    print(json.dumps(found, indent=1) if words.json else "\n".join(compare_table(found)))
    return 0


def main(argv: Sequence[str]) -> int:
    """Runs one command line; returns the exit code: 0 done, 2 a mistake in the input, 3 a failed check."""
    try:
        return run_command(argv)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except RefusedError as error:
        print(error, file=sys.stderr)
        return 3
    except OSError as error:
        print(f"{error.filename or 'records/submit.py'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
