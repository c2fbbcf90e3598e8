"""`verify --run`: the artifact of a record, read back and scored in a process of its own.

The process gets a folder with the packed script, the artifact and the validation shards, and nothing else: it stands in
a network namespace without interfaces where the system allows one (`unshare -rn`), and in any case an audit hook, which
Python code cannot take off again, refuses every socket and every file of the dataset. Scored are the first whole
documents of the split; the run kept its nats by document (documents_seed<seed>.npz), and those are held against the
score that log and submission.json claim.

This executes the script of the folder. A script that is made to deceive can; run it where that does no harm.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from records.checks import Facts, Verdict

ROOT = Path(__file__).resolve().parent.parent
SLICE_TOKENS = 20_000
MOST_SECONDS = 1800
TABLE_LIMIT_BYTES = 64 << 20
# Nats a token between the machine of the run and this one; bfloat16 on a GPU and float32 here differ by a tenth of it.
SLACK_NATS = 0.002
# Between the sum over documents and the claim, which come from the same numbers.
SUM_SLACK = 1e-6
SOCKETS = ("socket.", "urllib.", "http.", "ftplib.", "smtplib.")


class RunError(Exception):
    """Why nothing could be run; the message is one clear line."""


def dataset_of(facts: Facts, data: Path | None, result: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The dataset folder of the runs and its manifest."""
    path = result["data"]["path"]
    for base in [data] if data else [Path(path), ROOT / path]:
        try:
            raw = (base / "manifest.json").read_bytes()
        except OSError:
            continue  # the next place is tried, and none is an error below
        if hashlib.sha256(raw).hexdigest() == result["data"]["manifest_sha256"]:
            return base.resolve(), json.loads(raw)
    raise RunError(f"needs the runs' dataset, manifest sha256 {result['data']['manifest_sha256'][:16]}...: "
                   f"--data={data or path}")


def read_table(data: bytes) -> dict[str, Any]:
    """The arrays of an .npz, without pickles and within the limit."""
    import numpy as np
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        if sum(item.file_size for item in file.infolist()) > TABLE_LIMIT_BYTES:
            raise RunError(f"documents: unpacks to more than {TABLE_LIMIT_BYTES} bytes")
    with np.load(io.BytesIO(data), allow_pickle=False) as held:
        return {name: held[name] for name in held.files}


def isolation() -> list[str]:
    """The command in front of the process that takes its network away, [] where this system has none."""
    command = ["unshare", "--user", "--map-root-user", "--net"]
    if shutil.which(command[0]) and not subprocess.run([*command, "true"], capture_output=True).returncode:
        return command
    return []


def rerun(facts: Facts, tokens: int, data: Path | None) -> Verdict:
    """The verdict on K25."""
    from records.checks import FAIL, PASS, UNKNOWN, Verdict
    from records.folder import FolderError
    seeds = [seed for seed in facts.seeds if f"artifact_seed{seed}.bin" in facts.folder.files]
    if not facts.ours or not facts.results or not seeds or seeds[0] not in facts.results:
        return Verdict(UNKNOWN, "holds no artifact that records/submit.py put there (make --with-artifact)")
    seed = seeds[0]
    try:
        return Verdict(*compare(facts, seed, facts.results[seed], tokens or SLICE_TOKENS, data, (PASS, FAIL)))
    except RunError as error:
        return Verdict(UNKNOWN, str(error))
    except (FolderError, ValueError, KeyError, TypeError, OSError, zipfile.BadZipFile) as error:
        return Verdict(FAIL, f"seed {seed}: cannot be run ({type(error).__name__}: {str(error)[:120]})")


def compare(facts: Facts, seed: int, result: dict[str, Any], tokens: int, data: Path | None, words: tuple[str, str]
            ) -> tuple[str, str]:
    """Pass or fail, and what was found."""
    from records.folder import HASH_LIMIT_BYTES
    from records.scripts import SCRIPT_LIMIT_BYTES
    kind = facts.claim.raw["evaluator"]
    if result["declared"]["modes"]:  # what comes before then matters, and a slice is not the whole
        kind = "contiguous"
    table = read_table(facts.folder.read(f"documents_seed{seed}.npz", HASH_LIMIT_BYTES))
    if not isinstance(kind, str) or kind not in result["scores"] or f"document_nats_{kind}" not in table:
        raise RunError(f"the run has no score of {kind} by document")
    nats, targets, claimed = table[f"document_nats_{kind}"], table["document_targets"], result["scores"][kind]
    mean = float(nats.sum()) / max(1, int(targets.sum()))
    if int(targets.sum()) != claimed["tokens"] or abs(mean - claimed["val_loss"]) > SUM_SLACK * claimed["val_loss"]:
        return words[1], f"seed {seed}: its scores by document come to {mean:.6f} nats a token over " \
                         f"{int(targets.sum())} targets, claimed are {claimed['val_loss']:.6f} over {claimed['tokens']}"
    base, manifest = dataset_of(facts, data, result)
    with tempfile.TemporaryDirectory() as place:
        here = Path(place)
        (here / "train_gpt.py").write_bytes(facts.folder.read("train_gpt.py", SCRIPT_LIMIT_BYTES))
        (here / "artifact.bin").write_bytes(facts.folder.read(f"artifact_seed{seed}.bin", HASH_LIMIT_BYTES))
        shards = []
        for entry in manifest["val"]["shards"]:
            shards.append(Path(entry["file"]).name)
            shutil.copyfile(base / shards[-1], here / shards[-1])
        job = {"kind": kind, "seed": seed, "tokens": tokens, "shards": shards, "dataset": str(base)}
        (here / "job.json").write_text(json.dumps(job))
        found, how = start(here)
    count = len(found["nats"])
    ours, theirs = sum(found["nats"]), float(nats[:count].sum())
    scored = max(1, int(targets[:count].sum()))
    gap = abs(ours - theirs) / scored
    worst = max(abs(a - float(b)) / max(1, int(c)) for a, b, c in zip(found["nats"], nats, targets, strict=False))
    text = (f"seed {seed}, {kind}: {scored} targets of {count} documents give {ours / scored:.6f} nats a token, the "
            f"run had {theirs / scored:.6f}; at most {worst:.2g} apart in a document; {how}")
    return (words[0] if found["targets"] == scored and gap <= SLACK_NATS else words[1]), text


def start(here: Path) -> tuple[dict[str, Any], str]:
    """What the process scored, and how it was kept from the network; ValueError where it failed."""
    before = isolation()
    env = {"PATH": os.environ.get("PATH", ""), "HOME": str(here), "OMP_WAIT_POLICY": "PASSIVE",
           **{name: os.environ[name] for name in ("OMP_NUM_THREADS", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
              if name in os.environ}}
    try:
        done = subprocess.run([*before, sys.executable, "-I", str(Path(__file__).resolve()), str(here)], cwd=here,
                              capture_output=True, text=True, errors="replace", timeout=MOST_SECONDS, env=env)
    except subprocess.TimeoutExpired:
        raise RunError(f"took more than {MOST_SECONDS} seconds; --tokens scores fewer targets") from None
    if done.returncode:
        raise ValueError((done.stderr.strip() or "no message").splitlines()[-1])
    found = json.loads((here / "scored.json").read_text())
    return found, "sockets refused, in a network namespace of its own (unshare)" if before else (
        "sockets refused (no unshare here)")


# ---- in the process itself


def forbid(dataset: str) -> None:
    """Refuse sockets and the dataset's files from now on."""
    def hook(event: str, values: tuple[Any, ...]) -> None:
        if event.startswith(SOCKETS):
            raise PermissionError(f"{event}: no network here")
        if event == "open" and isinstance(values[0], (str, bytes)):
            if os.path.realpath(os.fsdecode(values[0])).startswith(dataset + os.sep):
                raise PermissionError(f"{os.fsdecode(values[0])}: no training data here")
    sys.addaudithook(hook)


def score_here(here: Path) -> None:
    """Score the artifact of the folder with its script; leaves scored.json."""
    import importlib.util
    import time
    job = json.loads((here / "job.json").read_text())
    forbid(job["dataset"])
    spec = importlib.util.spec_from_file_location("record_train_gpt", here / "train_gpt.py")
    gpt = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = gpt
    spec.loader.exec_module(gpt)
    import numpy as np
    config = gpt.load_config([f"SEED={job['seed']}"], {})
    world = gpt.make_world({})
    dtype = gpt.pick_dtype(config.system.compute_dtype, world.device)
    kernels, _ = gpt.pick_kernels(config.system.kernels, world.device, dtype, config.model)
    facts, weights = gpt.load_artifact(here / "artifact.bin")
    model = gpt.make_model_from(facts, weights, kernels, dtype, here / "artifact.bin")
    model = model.to(world.device).requires_grad_(False)
    tokens = np.concatenate([gpt.read_shard(here / name) for name in job["shards"]]).astype(np.int64)
    begins = np.flatnonzero(tokens == gpt.BOS)
    # The last windows of a slice are cut as those of the whole split are not, so more is scored than is compared.
    beyond = begins[begins > job["tokens"] + config.eval.eval_seq_len]
    kept = len(begins)
    if len(beyond):  # the next document's BOS is a target of the slice's last document
        tokens, begins = tokens[:beyond[0] + 1], begins[begins < beyond[0]]
        kept = max(1, int((begins <= job["tokens"]).sum()) - 1)
    val = gpt.Validation(tokens, np.zeros(len(tokens), np.int64), len(begins), True)
    guest = gpt.make_guest(job["kind"], model, config, world)
    found = gpt.score(job["kind"], guest, val, config, world, time.monotonic)
    owner = np.searchsorted(begins, np.arange(len(tokens) - 1), side="right") - 1
    nats, targets = np.bincount(owner, found.by_target[1:]), np.bincount(owner)
    (here / "scored.json").write_text(json.dumps({"nats": nats[:kept].tolist(), "targets": int(targets[:kept].sum())}))


if __name__ == "__main__":
    score_here(Path(sys.argv[1]))
