"""records/: a folder from finished runs, verdicts on whole and spoilt folders of ours and in the public habit, hostile
folders, statistics."""

import base64
import contextlib
import importlib.util
import io
import json
import lzma
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from conftest import ROOT, small_words
from scipy import stats

import train_gpt
from records import checks, dialects, folder, page, schema, scripts, significance, submit
from records.checks import CHECKS, FAIL, PASS, Facts

SEEDS = (1337, 42, 7)
DATE = "2026-05-04"
OWN, PUBLIC = "track_non_record_16mb", "track_10min_16mb"


@pytest.fixture(scope="session")
def runs(mini, tmp_path_factory):
    """Three finished runs of one packed script, in this process; the first is audited."""
    where = tmp_path_factory.mktemp("record_runs")
    tools = where / "tools"
    tools.mkdir()
    for name in ("pack.py", "audit.py", "receipt.py"):
        if (ROOT / "tools" / name).exists():
            (tools / name).symlink_to(ROOT / "tools" / name)
    words = [word for word in small_words(mini, where, PRESET="baseline", STACK="A", ITERATIONS=4, EVAL="contiguous")
             if not word.startswith("PACK=")]
    packed = where / "packed" / "train_gpt.py"
    packed.parent.mkdir()
    packed.write_bytes(train_gpt.pack_self(train_gpt.load_config(words, {}, gpus=0)))
    spec = importlib.util.spec_from_file_location("packed_train_gpt", packed)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    for seed in SEEDS:
        with contextlib.redirect_stdout(io.StringIO()):
            assert module.main([*words, f"RUN_ID=s{seed}", f"SEED={seed}", f"TOOLS_PATH={tools}", "AUDIT_TOKENS=512",
                                f"AUDIT={int(seed == SEEDS[0])}"], {}) == 0
    return [where / f"s{seed}" for seed in SEEDS]


def make_words(runs, records, *more):
    """A command line of `make`."""
    return ["make", *map(str, runs), "--track", "non_record_16mb", "--name", "Tiny", "--author", "A Person",
            "--github-id", "aperson", "--date", DATE, "--records", str(records), *more]


@pytest.fixture(scope="session")
def made(runs, tmp_path_factory):
    """The record of the runs, with its artifact."""
    records = tmp_path_factory.mktemp("records")
    assert submit.main(make_words(runs, records, "--with-artifact")) == 0
    return records / OWN / f"{DATE}_Tiny"


@pytest.fixture
def own(made, tmp_path):
    """A copy of our record to be spoilt, in a folder of its track."""
    return shutil.copytree(made, tmp_path / OWN / made.name)


def failing(path):
    """The checks that fail."""
    return {name for name, row in submit.verify(path).items() if row.status == FAIL}


def edit(path, change):
    """Change a JSON file in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, indent=1))


def reseal(path, change):
    """Change submission.json and make the page anew, as somebody would who hides it."""
    edit(path / "submission.json", change)
    record = json.loads((path / "submission.json").read_text())
    (path / "README.md").write_text(page.write(record, (path / "README.md").read_text()))


def replace(path, pattern, new, count=0):
    """Change a text file by a pattern, which must be there."""
    text, done = re.subn(pattern, new, path.read_text(), count=count, flags=re.M)
    assert done
    path.write_text(text)


# ---- our own folder


def test_three_runs_become_a_folder_that_passes(made):
    found = submit.verify(made)
    assert list(found) == [f"K{number}" for number in range(1, 28)]
    assert {name for name, row in found.items() if row.status != PASS} == {"K12", "K25"}
    assert submit.main(["verify", str(made)]) == 0


def test_no_number_is_typed(made, runs):
    record = json.loads((made / "submission.json").read_text())
    results = [json.loads((run / "result.json").read_text()) for run in runs]
    bits = [row["scores"]["contiguous"]["val_bpb"] for row in results]
    assert record["val_bpb"] == statistics.fmean(bits) and record["val_bpb_std"] == statistics.stdev(bits)
    assert record["bytes_total"] == max(row["artifact"]["total_bytes"] for row in results)
    assert record["bytes_total"] == record["bytes_code"] + record["bytes_model"]
    assert record["bytes_code"] == (made / "train_gpt.py").stat().st_size
    assert sorted(record["seeds"]) == sorted(map(int, record["seed_results"])) == sorted(SEEDS)
    assert {name: row["pass"] for name, row in record["compliance"].items()} == {
        name: row.status == PASS for name, row in submit.verify(made).items()}
    assert sorted(record["files"]) == sorted(Facts(made).folder.files)
    text = (made / "README.md").read_text()
    for row in results:
        assert f"{row['scores']['contiguous']['val_bpb']:.5f}" in text
    assert (made / "train_seed42.log").read_bytes() == (runs[1] / "train.log").read_bytes()


def test_old_readers_find_what_they_look_for(made):
    record = json.loads((made / "submission.json").read_text())
    for name in ("author", "github_id", "name", "blurb", "date", "track"):
        assert isinstance(record[name], str) and record[name]
    row = record["seed_results"]["42"]
    assert row["artifact_bytes"] == row["model_bytes"] + row["code_bytes"] and isinstance(row["val_bpb"], float)


def replace_words(path):
    (path / "README.md").write_text((path / "README.md").read_text().replace("## Lineage", "My words.\n\n## Lineage"))


def test_words_of_a_person_stay_when_a_record_is_made_anew(runs, tmp_path):
    assert submit.main(make_words(runs, tmp_path)) == 0
    target = tmp_path / OWN / f"{DATE}_Tiny"
    assert not list(target.glob("artifact*"))
    replace_words(target)
    assert failing(target) == set()
    assert submit.main(make_words(runs, tmp_path)) == 2
    assert submit.main(make_words(runs, tmp_path, "--replace")) == 0
    assert "My words." in (target / "README.md").read_text() and failing(target) == set()
    assert [path.name for path in tmp_path.iterdir()] == [OWN]


def drop_seed(path):
    for name in ("train_seed7.log", "events_seed7.jsonl", "result_seed7.json", "receipt_seed7.json"):
        (path / name).unlink(missing_ok=True)

    def change(record):
        del record["seed_results"]["7"]
        record["seeds"].remove(7)
        for unit in ("val_loss", "val_bpb"):
            values = [row[unit] for row in record["seed_results"].values()]
            record[unit], record[f"{unit}_std"] = statistics.fmean(values), statistics.stdev(values)
        worst = max(record["seed_results"].values(), key=lambda row: row["artifact_bytes"])
        record["bytes_total"], record["bytes_model"] = worst["artifact_bytes"], worst["model_bytes"]
    reseal(path, change)


def swap_logs(path):
    (path / "train_seed42.log").rename(path / "x")
    (path / "train_seed7.log").rename(path / "train_seed42.log")
    (path / "x").rename(path / "train_seed7.log")


def put(*place, value):
    """A change of one value deep in JSON."""
    def change(record):
        for name in place[:-1]:
            record = record[name]
        record[place[-1]] = value(record[place[-1]]) if callable(value) else value
    return change


def leave_out(record):
    best = min(row["val_bpb"] for row in record["seed_results"].values())
    record["all_runs"].append({"run": "other", "seed": 5, "finished": "2026-05-04T00:00:00Z", "val_bpb": best + 1,
                               "used": False, "same_script": True, "disqualified": []})


def append(name, data):
    def spoil(path):
        with open(path / name, "ab") as file:
            file.write(data)
    return spoil


def move_track(path):
    (path.parent.parent / PUBLIC).mkdir()
    return path.rename(path.parent.parent / PUBLIC / path.name)


OTHER_LAUNCH = b"run_id:x preset:baseline overlay:tiny seed:7 config:0123456789abcdef\n"


def forge_audit(path):
    """A verdict of the audit turned around, and what would tell taken away."""
    edit(path / "result_seed7.json", put("ledger", "updates", value=3))
    (path / "receipt_seed7.json").unlink()


CHAIN = {"K3"} if (ROOT / "tools" / "receipt.py").exists() else set()
# What is done to our folder, and exactly the checks that must fail then.
OWN_SABOTAGES = {
    "number of a seed": (lambda p: edit(p / "submission.json", put("seed_results", "42", "val_bpb",
                                                                    value=lambda v: v - 0.001)), {"K3", "K18"}),
    "headline": (lambda p: edit(p / "submission.json", put("val_bpb", value=lambda v: v - 0.002)), {"K3", "K18"}),
    "headline and page": (lambda p: reseal(p, put("val_bpb", value=lambda v: v - 0.002)), {"K18"}),
    "number on the page": (lambda p: replace(p / "README.md", r"\*\*\d\.(\d{4})\d\*\*", r"**1.\g<1>0**", 1), {"K3"}),
    "best seed as headline": (lambda p: reseal(p, lambda r: r.update(
        val_bpb=min(row["val_bpb"] for row in r["seed_results"].values()))), {"K4", "K18"}),
    "population deviation": (lambda p: reseal(p, lambda r: r.update(val_bpb_std=statistics.pstdev(
        row["val_bpb"] for row in r["seed_results"].values()))), {"K18"}),
    "swapped logs": (swap_logs, {"K3", "K17"}),
    "truncated log": (lambda p: replace(p / "train_seed42.log", r"(?s)^Serialized model.*", ""), {"K3"}),
    "score in a log": (lambda p: replace(p / "train_seed42.log", r"(_exact .*val_bpb:\d\.\d\d)\d\d", r"\g<1>00"),
                       {"K3"}),
    "bigger script": (append("train_gpt.py", b"# more\n"), {"K1", "K2", "K3"}),
    "source": (append("source/train_gpt.py", b"# more\n"), {"K2"}),
    "other seed's configuration": (lambda p: replace(p / "train_seed7.log", r"\bconfig:[0-9a-f]{16}",
                                                     "config:0123456789abcdef"), {"K17"}),
    "configuration": (lambda p: edit(p / "config.json", put("settings", "MODEL_DIM", value=64)), {"K3", "K17"}),
    "two seeds": (drop_seed, {"K17"}),
    "wrong place": (move_track, {"K20"}),
    "wrong track": (lambda p: edit(p / "submission.json", put("track", value="10min_16mb")),
                    {"K4", "K5", "K16", "K18", "K20"}),
    "wrong date": (lambda p: edit(p / "submission.json", put("date", value="2026-05-05")), {"K20"}),
    "no artifact bytes": (lambda p: os.truncate(p / "artifact_seed1337.bin", 0), {"K1", "K3"}),
    "artifact one byte over": (lambda p: os.truncate(p / "artifact_seed1337.bin", 16_000_001 - (
        p / "train_gpt.py").stat().st_size), {"K1", "K3"}),
    "other artifact": (lambda p: (p / "artifact_seed1337.bin").write_bytes(
        (p / "artifact_seed1337.bin").read_bytes()[::-1]), {"K3"}),
    "no page": (lambda p: (p / "README.md").unlink(), {"K3", "K20"}),
    "no result": (lambda p: (p / "result_seed7.json").unlink(), {"K3", "K20"}),
    "no requirements": (lambda p: (p / "requirements.txt").unlink(), {"K20", "K23"}),
    "no log": (lambda p: (p / "train_seed7.log").unlink(), {"K3", "K20"}),
    "no script": (lambda p: (p / "train_gpt.py").unlink(), {"K1", "K2", "K3", "K20", "K22", "K26"}),
    "path out of the folder": (lambda p: edit(p / "submission.json", put("seed_results", "42", "log",
                                                                          value="../../../etc/passwd")), {"K3", "K20"}),
    "key twice": (lambda p: replace(p / "submission.json", r"^\{", '{"date": "2026-05-04",', 1), {"K21"}),
    "byte order mark": (lambda p: (p / "submission.json").write_bytes(
        b"\xef\xbb\xbf" + (p / "submission.json").read_bytes()), {"K21"}),
    "number as text": (lambda p: edit(p / "submission.json", put("bytes_code", value="55913")), {"K3", "K21"}),
    "checkpoint": (lambda p: (p / "final_model.pt").write_bytes(b"x"), {"K20"}),
    "link": (lambda p: (p / "more.txt").symlink_to("/etc/passwd"), {"K20"}),
    "failed audit": (lambda p: edit(p / "result_seed1337.json", put("audit", "causality", "pass", value=False)),
                     {"K8"} | CHAIN),
    "failed audit in the log": (lambda p: replace(p / "train_seed1337.log", "^audit: distribution pass",
                                                  "audit: distribution FAIL"), {"K9"}),
    "documents leak": (lambda p: edit(p / "result_seed1337.json", put("audit", "previous_document", "pass",
                                                                      value=False)), {"K13"} | CHAIN),
    "scored twice": (lambda p: edit(p / "result_seed7.json", put("ledger", "scored_once", value=False)),
                     {"K5", "K11"} | CHAIN),
    "learned before scored": (lambda p: edit(p / "result_seed1337.json", put("audit", "single_pass", "pass",
                                                                             value=False)), {"K10", "K11"} | CHAIN),
    "common documents": (lambda p: edit(p / "result_seed7.json", put("data", "disjoint", "common", value=3)),
                         {"K7"} | CHAIN),
    "over its budget": (lambda p: edit(p / "result_seed7.json", put("budget", "ok", value=False)), {"K14"} | CHAIN),
    "long evaluation": (lambda p: replace(p / "train_seed7.log", r"^total_eval_time: [\d.]+s", "total_eval_time: 601s"),
                        {"K15"}),
    "alarm": (lambda p: edit(p / "result_seed7.json", put("alarms", value=["worse than knowing nothing"])),
              {"K27"} | CHAIN),
    "left-out run": (lambda p: reseal(p, leave_out), {"K19"}),
    "no receipt": (lambda p: (p / "receipt_seed7.json").unlink(), {"K20"}),
    "audit forged without a receipt": (forge_audit, {"K3", "K20"}),
    "launched again with other settings": (lambda p: append("train_seed7.log", OTHER_LAUNCH)(p), {"K17"}),
    "untold run": (lambda p: reseal(p, lambda r: r["all_runs"].pop()), {"K19"}),
    "tokenizer": (append("tokenizer.model", b"x"), {"K6"}),
    "bytes off by half a percent": (lambda p: replace(p / "train_seed7.log", r"\bval_bytes:\d+", "val_bytes:8937"),
                                    {"K4"}),
    "targets left out": (lambda p: replace(p / "train_seed7.log", r"^val_tokens: \d+", "val_tokens: 4000"),
                         {"K4", "K5"})}


@pytest.mark.parametrize("name", OWN_SABOTAGES)
def test_a_spoilt_folder_of_ours_fails_the_right_checks(own, name):
    spoil, expected = OWN_SABOTAGES[name]
    spoilt = spoil(own)
    found = failing(spoilt if isinstance(spoilt, type(own)) else own)
    assert found == expected, {key: submit.verify(own)[key].evidence for key in found ^ expected}


def test_every_check_fails_in_some_folder():
    found = [expected for _, expected in (*OWN_SABOTAGES.values(), *PUBLIC_SABOTAGES.values())]
    assert set().union(*found) | {"K25"} == set(CHECKS)  # K25 is run below


BROKE = "the check itself broke"


def test_a_check_that_breaks_has_failed_and_ends_nothing(own, monkeypatch):
    """A fault of ours is told, and the other checks are made."""
    broken = CHECKS["K4"]._replace(judge=lambda facts: 1 / 0)
    monkeypatch.setitem(CHECKS, "K4", broken)
    found = submit.verify(own)
    assert found["K4"] == (FAIL, f"{BROKE} (ZeroDivisionError: division by zero)") and found["K5"].status == PASS


def test_a_run_that_was_begun_again_with_other_settings_is_one_run(own):
    """What died before it was begun anew left its line in the log."""
    path = own / "train_seed7.log"
    path.write_bytes(OTHER_LAUNCH + path.read_bytes())
    assert failing(own) == set()


def values_in(value, place=()):
    """The places of all values in JSON."""
    yield place
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from values_in(part, (*place, key))


@pytest.mark.parametrize("name", ["submission.json", "result_seed42.json", "config.json"])
def test_no_value_ends_the_verdict(own, monkeypatch, name):
    """Whatever stands at any place of a JSON file, every check has a verdict."""
    monkeypatch.setattr(checks, "chain_faults", lambda facts, seed: None)  # a module of its own, with its own tests
    rng, text = random.Random(name), (own / name).read_text()
    for place in [place for place in values_in(json.loads(text)) if place]:
        odd = rng.choice([None, [], {}, "x", -1, 0.0, 1e308, True, [[1]], {"a": {}}, "\ud800", 10**40])
        edit(own / name, put(*place, value=odd))
        found = checks.judge_all(Facts(own))
        assert len(submit.verdict_table(found)) == len(CHECKS) + 1, (place, odd)
        assert not any(BROKE in row.evidence for row in found.values()), (place, odd, found)
        (own / name).write_text(text)


@pytest.mark.skipif(not CHAIN, reason="runs have no chained events here")
def test_an_edited_event_is_found(own):
    replace(own / "events_seed42.jsonl", r'"train_loss": (\d)', r'"train_loss": 1\1', 1)
    assert failing(own) == {"K3"}


# ---- folders in the public habit


RATIO = {"SP1024": (62_021_632, 151_080_891 / 62_021_632 * math.log(2)),
         "CaseOps": (47_851_520, 151_080_891 / 47_851_520 * math.log(2))}
SOURCE = """import os
import numpy as np
import torch
import torch.distributed as dist
from sentencepiece import SentencePieceProcessor


def extra():
    return np.zeros(3)


def main():
    extra()
    print(torch.__version__, SentencePieceProcessor, dist)


if __name__ == "__main__":
    main()
"""
FILTERS = [{"id": lzma.FILTER_LZMA2}]


def lzma_shim(source):
    """A script packed as most are."""
    data = base64.b85encode(lzma.compress(source.encode(), lzma.FORMAT_RAW, filters=FILTERS)).decode()
    return (f'import lzma as L,base64 as B\nexec(L.decompress(B.b85decode("{data}"),format=L.FORMAT_RAW,'
            'filters=[{"id":L.FILTER_LZMA2}]))\n').encode()


def zlib_shim(source):
    """Another habit: a name, an alias, compile."""
    data = base64.b64encode(zlib.compress(source.encode()))
    return (f"from zlib import decompress as d\nimport base64\nP = {data!r}\n"
            "exec(compile(d(base64.b64decode(P)).decode('utf-8'), 'x', 'exec'), globals())\n").encode()


def public_log(seed, bpb, code, **more):
    """A log in the dialect of the challenge's late scripts."""
    tokens, ratio = RATIO[more.get("kind", "SP1024")]
    facts = {"tokens": tokens, "loss": bpb * ratio, "printed": bpb, "world": 8, "gpu": "NVIDIA H100 80GB HBM3",
             "ms": 599_821, "eval_ms": 480_000, "model": 15_800_000, "lr": "0.022", "head": "", "more": "",
             "scale": 1.0, **more}
    loss, bpb = bpb * ratio, bpb / facts["scale"]  # the same nats over another number of bytes
    rows = "\n".join(f"|   {i}  {facts['gpu']}          On  |   00000000:0{i}:00.0 Off |"
                     for i in range(facts["world"]))
    total = facts.get("total", facts["model"] + code)
    return f"""{facts['head']}Hyperparameters:
  matrix_lr: {facts['lr']}
  run_id: run{seed}
  seed: {seed}
{rows}
world_size:{facts['world']} grad_accum_steps:1
val_tokens: {facts['tokens']}
train_shards: 80
4800/20000 train_loss: 2.1000 train_time: 9.9m tok/s: 100
4838/20000 val_loss: 2.1423 val_bpb: {bpb + 0.01:.4f}
stopping_early: wallclock_cap train_time: {facts['ms']}ms step: 4838/20000
diagnostic pre-quantization post-ema val_loss:{loss - 0.01 * ratio:.8f} val_bpb:{bpb - 0.01:.8f} eval_time:18334ms
GPTQ:collected 67 Hessians in 3.4s
Serialized model quantized+brotli: {facts['model']} bytes
Code size: {code} bytes
Total submission size quantized+brotli: {total} bytes
{facts['more']}quantized_ttt_phased val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:{facts['eval_ms']}ms
total_eval_time:{facts['eval_ms'] / 1000:.1f}s
"""


BPBS = {42: 1.2200, 314: 1.2212, 999: 1.2191}


def public(path, source=SOURCE, shim=lzma_shim, bpbs=BPBS, edit_claim=lambda claim: None, beside=None, counted=None,
           only=None, **more):
    """A folder as entrants make them; `more` goes to every log, or to that of the seed `only`."""
    path.mkdir(parents=True)
    script = shim(source)
    code = counted(script) if counted else len(script)
    (path / "train_gpt.py").write_bytes(script)
    (path / "README.md").write_text("# A record\n")
    loss = {}
    for seed, bpb in bpbs.items():
        own = more if only in (None, seed) else {}
        text = public_log(seed, bpb, code, **own)
        (path / f"train_seed{seed}.log").write_text(text)
        loss[seed] = float(re.findall(r"phased val_loss:([\d.]+)", text)[0])
        bpbs = {**bpbs, seed: float(re.findall(r"phased val_loss:[\d.]+ val_bpb:([\d.]+)", text)[0])}
        total = int(re.findall(r"Total .*: (\d+) bytes", text)[0])
    claim = {"author": "B", "github_id": "b", "name": "A record", "date": DATE, "track": "10min_16mb",
             "val_loss": round(statistics.fmean(loss.values()), 6), "bytes_total": total,
             "mean_val_bpb": round(statistics.fmean(bpbs.values()), 6), "hardware": "8xH100 80GB SXM",
             "std_val_bpb": round(statistics.stdev(bpbs.values()), 6),
             "seeds": list(bpbs), "seed_results": {f"seed_{seed}": {
                 "bpb": round(bpbs[seed], 6), "val_loss": round(loss[seed], 6), "artifact_bytes": total}
                 for seed in bpbs}}
    edit_claim(claim)
    (path / "submission.json").write_text(json.dumps(claim))
    for name, data in (beside or {}).items():
        (path / name).write_bytes(data)
    return path


def claim_float(claim):
    """What the line of the float weights says, for each seed and the mean."""
    for row in (*claim["seed_results"].values(), claim):
        name = "mean_val_bpb" if row is claim else "bpb"
        row["val_loss"] = round(row["val_loss"] - 0.01 * RATIO["SP1024"][1], 6)
        row[name] = round(row[name] - 0.01, 6)


def round_seeds(claim):
    """Five decimals of everything, each rounded from the true value."""
    for row in (*claim["seed_results"].values(), claim):
        row.update({name: round(value, 5) for name, value in row.items() if isinstance(value, float)})


FETCH = "    from urllib.request import urlopen\n    urlopen('http://example.com')\n"
PUBLIC_SABOTAGES = {
    "nothing": ({}, set()),
    "zlib shim": ({"shim": zlib_shim}, set()),
    "plain script": ({"shim": str.encode}, set()),
    "unpacked code counted": ({"counted": lambda script: len(SOURCE)}, set()),
    "space counted twice": ({"scale": 1.165}, {"K4"}),
    "bytes off by half a percent": ({"scale": 1.005}, {"K4"}),
    "too few bytes": ({"scale": 0.995}, {"K4"}),
    "bytes off by a thousandth of a percent": ({"scale": 1.00001}, set()),
    "other tokenizer": ({"kind": "CaseOps"}, set()),
    "part of the split": ({"kind": "CaseOps", "tokens": 9_660_000}, {"K4", "K5"}),
    "slow training": ({"ms": 605_000}, {"K14"}),
    "training over by a step": ({"ms": 600_120}, set()),
    "slow evaluation": ({"eval_ms": 600_400}, {"K15"}),
    "four GPUs": ({"world": 4}, {"K16"}),
    "other GPUs": ({"gpu": "NVIDIA A100-SXM4-80GB"}, {"K16"}),
    "code size": ({"counted": lambda script: len(script) - 1}, {"K2"}),
    "at the cap": ({"total": 16_000_000}, set()),
    "one byte over the cap": ({"total": 16_000_001}, {"K1"}),
    "one byte over with the script that is shipped": ({"model": 16_000_000, "total": 15_999_000}, {"K1"}),
    "network": ({"source": SOURCE.replace("    return np", f"{FETCH}    return np")}, {"K24"}),
    "network by a shell": ({"source": SOURCE.replace("    return np", "    os.system('curl x')\n    return np")},
                           {"K24"}),
    "network that nothing reaches": ({"source": SOURCE + f"\n\ndef never():\n{FETCH}"}, set()),
    "hidden code": ({"source": SOURCE.replace("    return np", "    exec(open('w.bin').read())\n    return np")},
                    {"K26"}),
    "hidden layer": ({"source": "exec(open('weights.bin').read())\n"}, {"K26"}),
    "syntax": ({"source": SOURCE + "def (:\n", "shim": str.encode}, {"K22"}),
    "syntax inside": ({"source": SOURCE + "def (:\n"}, {"K22"}),
    "byte order mark": ({"shim": lambda source: b"\xef\xbb\xbf" + source.encode()}, {"K22"}),
    "optional compressor": ({"source": "try:\n    import brotli\nexcept ImportError:\n    brotli = None\n" + SOURCE},
                            {"K23"}),
    "import without requirements": ({"source": "import brotli\n" + SOURCE}, {"K23"}),
    "import with requirements": ({"source": "import brotli\n" + SOURCE, "beside": {"requirements.txt": b"Brotli==1\n"}},
                                 set()),
    "requirement that nothing reaches": ({"source": SOURCE + "\n\ndef never():\n    import brotli\n"}, set()),
    "fallback of the compressor": ({"more": "zstandard not installed, falling back to zlib\n"}, {"K23"}),
    "program that is not told": ({"source": "import subprocess\nsubprocess.run(['lrzip', 'x'])\n" + SOURCE}, {"K23"}),
    "module beside it": ({"source": "import kernels_x\n" + SOURCE, "beside": {"kernels_x.py": b"x = 1\n"}}, {"K2"}),
    "file beside it that nothing imports": ({"beside": {"notes.py": b"x = 1\n"}}, set()),
    "code before what is packed": ({"shim": lambda source: b"import urllib.request\nurllib.request.urlretrieve('http://x')\n"
                                    + lzma_shim(source)}, {"K24"}),
    "hidden code before what is packed": ({"shim": lambda source: b"exec(open('w').read())\n" + lzma_shim(source)},
                                          {"K26"}),
    "hidden code before an empty layer": ({"shim": lambda source: b"exec(open('w').read())\nexec('pass')\n"}, {"K26"}),
    "code in a text": ({"source": SOURCE.replace(
        "    return np", "    exec(\"import urllib.request as u\\nu.urlopen('x')\")\n    return np")}, {"K24"}),
    "code in bytes": ({"source": SOURCE.replace(
        "    return np", "    exec(b\"import urllib.request as u\\nu.urlopen('x')\")\n    return np")}, {"K24"}),
    "hidden code by a longer name": ({"source": SOURCE.replace(
        "    return np", "    import builtins\n    builtins.exec(open('w').read())\n    return np")}, {"K26"}),
    "network of a module by another way": ({"source": SOURCE.replace(
        "    return np", "    system = __import__('os')\n    system.system('curl x')\n    return np")}, {"K24"}),
    "network in an annotation": ({"source": f"import requests\n{SOURCE}\n\ndef f(x: requests.get('x')):\n    pass\n",
                                  "beside": {"requirements.txt": b"requests\n"}}, {"K24"}),
    "network in a class's own method": ({"source": SOURCE + "\n\nclass X:\n    def f():\n    " + FETCH.replace(
        "\n    ", "\n        ") + "    f()\n"}, {"K24"}),
    "network in a class that nothing names": ({"source": SOURCE + f"\n\nclass X:\n{FETCH}"}, {"K24"}),
    "network in a default": ({"source": "import requests\n" + SOURCE + "\n\ndef f(x=requests.get('x')):\n    pass\n",
                              "beside": {"requirements.txt": b"requests\n"}}, {"K24"}),
    "network at the end": ({"source": f"import atexit\n{SOURCE}\n\n@atexit.register\ndef f():\n{FETCH}"}, {"K24"}),
    "network in what a text names": ({"source": SOURCE.replace("    return np", "    globals()['f']()\n    return np")
                                      + f"\n\ndef f():\n{FETCH}"}, {"K24"}),
    "decorated network that nothing reaches": ({"source": SOURCE + f"\n\n@torch.no_grad()\ndef f():\n{FETCH}"}, set()),
    "a variable called datasets": ({"source": SOURCE.replace(
        "    return np", "    datasets = []\n    datasets.append(1)\n    return np")}, set()),
    "another spelling of a package": ({"source": "import flash_attn_interface\n" + SOURCE, "beside": {
        "requirements.txt": b"flash_attn_3\n"}}, set()),
    "scores of the float weights": ({"edit_claim": claim_float}, {"K3"}),
    "numbers of two lines": ({"more": "other val_loss:2.50000000 val_bpb:1.48000000\n", "edit_claim": lambda c: c[
        "seed_results"]["seed_42"].update(val_loss=2.5)}, {"K3", "K4", "K18"}),
    "rounded seeds": ({"bpbs": {42: 1.080794, 314: 1.081034, 999: 1.081194}, "edit_claim": round_seeds}, set()),
    "training on validation": ({"more": "prequant_ttt: epoch 3/21 loss 2.1\n"}, {"K12"}),
    "third seed of another configuration": ({"only": 999, "lr": "0.03"}, {"K17"}),
    "two seeds": ({"bpbs": {42: 1.22, 314: 1.221}}, {"K17"}),
    "population deviation": ({"edit_claim": lambda c: c.update(std_val_bpb=round(statistics.pstdev(BPBS.values()), 8))},
                             {"K18"}),
    "best seed as headline": ({"edit_claim": lambda c: c.update(mean_val_bpb=1.2191, val_loss=round(
        1.2191 * RATIO["SP1024"][1], 6))}, {"K18"}),
    "seed that its log lacks": ({"edit_claim": lambda c: c["seed_results"]["seed_42"].update(bpb=1.2195)},
                                {"K3", "K18"}),
    "other total": ({"edit_claim": lambda c: c["seed_results"]["seed_42"].update(artifact_bytes=15_000_000)}, {"K3"}),
    "too good": ({"bpbs": {s: b - 0.19 for s, b in BPBS.items()}}, {"K27"}),
    "other source in the log": ({"head": "import os\ndef main(): pass\n" + "=" * 100 + "\n"}, {"K3"}),
    "same source in the log": ({"head": SOURCE + "=" * 100 + "\n"}, set()),
    "text as number": ({"edit_claim": lambda c: c.update(mean_val_bpb="TBD")}, {"K21"}),
    "no author": ({"edit_claim": lambda c: c.pop("author")}, {"K21"}),
    "unlimited track": ({"ms": 3_600_000, "eval_ms": 900_000, "world": 4, "edit_claim": lambda c: c.update(
        track="non-record-unlimited-compute-16mb")}, {"K20"})}


@pytest.mark.parametrize("name", PUBLIC_SABOTAGES)
def test_a_spoilt_public_folder_fails_the_right_checks(tmp_path, name):
    changes, expected = PUBLIC_SABOTAGES[name]
    changes = dict(changes)
    path = tmp_path / PUBLIC / f"{DATE}_Entry"
    public(path, **changes)
    found = failing(path)
    told = submit.verify(path)
    assert found == expected, {key: told[key].evidence for key in found ^ expected}


def test_the_checks_of_a_public_folder_name_what_they_cannot_tell(tmp_path):
    found = submit.verify(public(tmp_path / PUBLIC / f"{DATE}_Entry"))
    assert {name for name, row in found.items() if row.status == "unknown"} == {
        "K6", "K7", "K8", "K9", "K10", "K11", "K12", "K13", "K19", "K25"}


def test_what_one_log_alone_tells_is_not_known_of_the_others(tmp_path):
    path = public(tmp_path / PUBLIC / f"{DATE}_Entry")
    for seed in (314, 999):
        log = path / f"train_seed{seed}.log"
        kept = [line for line in log.read_text().splitlines() if "time" not in line or "phased" in line]
        log.write_text("\n".join(line.partition(" eval_time")[0] for line in kept) + "\n")
    found = submit.verify(path)
    for name in ("K14", "K15"):
        assert found[name].status == "unknown" and "nothing tells of seed 314, 999" in found[name].evidence


def test_logs_by_other_names_are_found(tmp_path):
    path = public(tmp_path / PUBLIC / f"{DATE}_Entry")
    (path / "logs").mkdir()
    for seed, name in zip(BPBS, ("run_seed42.txt", "logs/epochs5_seed314.txt", "seed999.txt"), strict=True):
        (path / f"train_seed{seed}.log").rename(path / name)
    assert failing(path) == set() and len(Facts(path).logs) == 3


@pytest.mark.parametrize("spoil", [
    lambda p: (p / "submission.json").write_text('{"val_bpb": 1' + "0" * 400 + "}"),
    lambda p: replace(p / "train_seed42.log", r"^val_tokens: \d+", "val_tokens: " + "9" * 350),
    lambda p: replace(p / "train_seed42.log", r"val_bpb:[\d.]+ eval_time", "val_bpb:1e999 eval_time"),
    lambda p: edit(p / "submission.json", put("seed_results", "seed_42", "val_loss", value=1e300)),
    lambda p: edit(p / "submission.json", put("bytes_total", value=10 ** 60))])
def test_numbers_that_nothing_can_be_break_nothing(tmp_path, spoil):
    path = public(tmp_path / PUBLIC / f"{DATE}_Entry")
    spoil(path)
    found = submit.verify(path)
    assert not any(BROKE in row.evidence for row in found.values())
    assert {row.status for row in found.values()} >= {"unknown", PASS}
    submit.main(["compare", str(path), str(public(tmp_path / PUBLIC / f"{DATE}_Other"))])


@pytest.mark.parametrize("name, wrong", [("Entry", True), (f"{DATE}_Entry", False), ("2026-13-01_Entry", True),
                                         (f"{DATE} Entry", True)])
def test_the_name_of_a_folder(tmp_path, name, wrong):
    assert ("K20" in failing(public(tmp_path / PUBLIC / name))) == wrong


# ---- hostile folders


def bomb():
    data = base64.b85encode(lzma.compress(bytes(60_000_000), lzma.FORMAT_RAW, filters=FILTERS)).decode()
    return (f'import lzma as L,base64 as B\nexec(L.decompress(B.b85decode("{data}"),format=L.FORMAT_RAW,'
            'filters=[{"id":L.FILTER_LZMA2}]))\n').encode()


def sparse(path, size):
    path.unlink(missing_ok=True)
    path.touch()
    os.truncate(path, size)


def many_files(path):
    for number in range(3000):
        (path / f"{number}.txt").touch()


def deep(path):
    for _ in range(40):
        path = path / "d"
        path.mkdir()


def many_logs(path):
    line = b"a: hessian in 1 precompute outside val_loss:x val_bpb:y serialized model size: code size step: seed\n"
    for number in range(100, 120):
        (path / f"train_seed{number}.log").write_bytes(line * (7_000_000 // len(line)))


def fifo(path):
    (path / "train_seed42.log").unlink()
    os.mkfifo(path / "train_seed42.log")


def link_out(path):
    (path / "submission.json").unlink()
    (path / "submission.json").symlink_to("/etc/passwd")


HOSTILE = {
    "bomb": (lambda p: (p / "train_gpt.py").write_bytes(bomb()), {"K26"}),
    "gigabytes of log": (lambda p: sparse(p / "train_seed42.log", 4 << 30), {"K3"}),
    "gigabytes of JSON": (lambda p: sparse(p / "submission.json", 4 << 30), {"K21"}),
    "gigabytes of script": (lambda p: sparse(p / "train_gpt.py", 4 << 30), {"K1", "K2", "K22", "K26"}),
    "log made to be slow": (lambda p: (p / "train_seed42.log").write_bytes(
        (b"a:_bpb=hessian in precompute outside 1 val_loss " * 40 + b"\n") * 4000), {"K3"}),
    "log of one line": (lambda p: (p / "train_seed42.log").write_bytes(b"val_bpb: " * 900_000), {"K3"}),
    "many large logs": (many_logs, {"K3"}),
    "cyclic link": (lambda p: (p / "loop").symlink_to(p), {"K20"}),
    "link out of the folder": (link_out, {"K20", "K21"}),
    "fifo": (fifo, {"K3", "K20"}),
    "many files": (many_files, {"K20"}),
    "deep folders": (deep, {"K20"}),
    "no UTF-8 in JSON": (lambda p: (p / "submission.json").write_bytes(b'{"name": "\xff"}'), {"K21"}),
    "no UTF-8 in the script": (lambda p: (p / "train_gpt.py").write_bytes(b"x = '\xff'\n"), {"K2", "K22"}),
    "deep JSON": (lambda p: (p / "submission.json").write_text("[" * 100_000), {"K21"}),
    "long number": (lambda p: (p / "submission.json").write_text('{"val_bpb": ' + "9" * 100_000 + "}"), {"K21"}),
    "infinite number": (lambda p: (p / "submission.json").write_text('{"val_bpb": 1e999}'), {"K21"}),
    "not a number": (lambda p: (p / "submission.json").write_text('{"val_bpb": NaN, "seed_results": [1, null]}'),
                     {"K21"}),
    "lists for objects": (lambda p: (p / "submission.json").write_text(json.dumps(
        {name: [] for name in (*schema.FIELDS, *schema.OWN_FIELDS, *schema.ALIASES)})), {"K21"}),
    "says it is ours": (lambda p: edit(p / "submission.json", lambda c: c.update(
        {name: {"x": [1]} for name in schema.OWN_FIELDS} | {"format": schema.FORMAT})), {"K2", "K3", "K20", "K21"}),
    "nested code": (lambda p: (p / "train_gpt.py").write_text("x = " + "-" * 100_000 + "1\n"), {"K2"}),
    "many commas": (lambda p: (p / "train_gpt.py").write_text("x = [" + "1," * 500_000 + "]\n"), {"K2"}),
    "names with control characters": (lambda p: (p / "a\x1b[31m\nb.txt").touch(), {"K20"}),
    "nothing": (lambda p: [path.unlink() for path in p.iterdir()], {"K2", "K20", "K21", "K22", "K26"})}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_gets_its_verdict(tmp_path, capsys, name):
    spoil, expected = HOSTILE[name]
    path = public(tmp_path / PUBLIC / f"{DATE}_Entry")
    spoil(path)
    began = time.monotonic()
    assert submit.main(["verify", str(path)]) == 3
    assert time.monotonic() - began < 20
    said = capsys.readouterr()
    assert said.err == "" and "\x1b" not in said.out and len(said.out.splitlines()) == 28
    assert "root:" not in said.out
    assert expected <= failing(path)
    assert not any(BROKE in row.evidence for row in submit.verify(path).values())


def test_a_script_is_not_executed(tmp_path):
    trap = tmp_path / "ran"
    source = f"open({str(trap)!r}, 'w').write('x')\n"
    for number, shim in enumerate((lzma_shim, zlib_shim, str.encode)):
        path = public(tmp_path / PUBLIC / f"{DATE}_{number}", source=source, shim=shim)
        submit.verify(path)
        assert scripts.decode((path / "train_gpt.py").read_bytes()).text.rstrip() == source.rstrip()
    assert not trap.exists()


@pytest.mark.parametrize("text, why", [
    ("exec(__import__('os').popen('id').read())", "not evaluated here"),
    ("exec(open(__file__).read())", "not evaluated here"), ("exec(open('x'))", "own file"),
    ("import zlib\nexec(zlib.decompress(b'x'))", "cut short"), ("exec('a' * 10**9)", "not evaluated here"),
    ("exec('ab'.replace('a', 'x' * 2))", "not evaluated here"), ("x = y\ny = x\nexec(x)", "not bound to a literal"),
    ("import lzma\nexec(lzma.decompress(b'', format=3, filters=[{'id': 33, 'dict_size': 4000000000}]))", "dictionary"),
    ("exec('exec(' + repr('exec(1)') + ')')", "not evaluated here"), ("exec('a'.encode('nope'))", "encodes with"),
    ("exec('a'.encode('punycode'))", "encodes with"),
    ("import zlib\nexec(zlib.decompress(b'', 99999999999999999999))", "OverflowError"),
    (f"exec({'x' * 3000!r}.join({','.join('a' * 3000)!r}.split(',')))", "makes more than"),
    (f"a = {'x' * 40_000!r}\nexec(a{' + a' * 90})", "takes more than"),
    ("P = open('w').read()\nexec(P)\nP = 'pass'", "bound more than once"), ("P = 'a'\nP += 'b'\nexec(P)", "bound more"),
    ("P = 'a'\nfor P in open('w'):\n    pass\nexec(P)", "bound more"),
    ("import base64\nbase64.b64decode = open\nexec(base64.b64decode('eA=='))", "is changed"),
    ("def exec(x):\n    open(x)\nexec('pass')", "is changed"),
    ("exec(['x', " + "'x', " * 30_000 + "][0])", "takes more than")])
def test_what_is_no_literal_is_not_evaluated(text, why):
    assert why in scripts.decode(text.encode()).fault


def test_names_are_evaluated_once():
    """A chain of sums of itself would take for ever."""
    rows = "".join(f"a{n + 1} = a{n} + a{n}\n" for n in range(60))
    began = time.monotonic()
    found = scripts.decode(f"a0 = ''\n{rows}exec(a60)".encode())
    assert found.fault == "" and time.monotonic() - began < 5


def test_layers_are_bounded():
    text = "x = 1"
    for _ in range(scripts.MOST_LAYERS + 1):
        text = f"exec({text!r})"
    assert "layers" in scripts.decode(text.encode()).fault


@pytest.mark.parametrize("shim", [lzma_shim, zlib_shim])
def test_packed_scripts_are_unpacked_exactly(shim):
    found = scripts.decode(shim(SOURCE))
    assert (found.text, found.fault) == (SOURCE, "") and found.sizes == [len(shim(SOURCE)), len(SOURCE)]


def test_our_own_packed_script_is_unpacked(made):
    found = scripts.decode((made / "train_gpt.py").read_bytes())
    assert found.ours and found.fault == "" and scripts.find_literal(found.tree, "BAKED")["PRESET"] == "baseline"


# ---- reading


@pytest.mark.parametrize("line, label, loss, bpb", [
    ("final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22436570", "final_int8_zlib_roundtrip_exact",
     2.07269931, 1.2243657),
    ("legal_ttt val_loss: 2.79 val_bpb: 1.08", "legal_ttt", 2.79, 1.08),
    ("final_sliding_window val_loss=1.9 val_bpb=1.1", "final_sliding_window", 1.9, 1.1),
    ("[rank0] quantized_ttt val_loss:2.79180191 val_bpb:1.08079352 eval_time:366525ms", "[rank0] quantized_ttt",
     2.79180191, 1.08079352),
    ("ppm_mix bytes=27048621 mix_bpb=0.901", "ppm_mix bytes=27048621 mix_bpb", None, 0.901)])
def test_spellings_of_a_score(line, label, loss, bpb):
    found = dialects.final(dialects.read_log(line.encode()))
    assert found[:3] == (label, loss, bpb)


@pytest.mark.parametrize("line", ["step:100/200 val_loss:2.1 val_bpb:1.3", "100/200 val_loss: 2.1 val_bpb: 1.3",
                                  "diagnostic pre-quantization post-ema val_loss:2.1 val_bpb:1.3"])
def test_what_is_no_final_score(line):
    assert dialects.final(dialects.read_log(line.encode())) is None


@pytest.mark.parametrize("line, key, value", [
    ("Total submission size int8+zlib: 15863489 bytes", "total_bytes", 15863489),
    ("Total submission size quantized+brotli: 15,991,930 bytes", "total_bytes", 15991930),
    ("artifact_bytes: 15,000,000", "total_bytes_too", 15000000),
    ("Serialized model int6+lzma: 15815847 bytes (payload:1 raw_torch:2)", "model_bytes", 15815847),
    ("Code size: 47642 bytes", "raw_code_bytes", 47642),
    ("Code size (compressed): 31815 bytes", "small_code_bytes", 31815),
    ("stopping_early: wallclock_cap train_time:600038ms step:13780/20000", "stopped_seconds", 600.038),
    ("val_loader:shards pattern=./x tokens:62021632", "loader_tokens", 62021632),
    ("total_eval_time:515.3s", "eval_seconds", 515.3),
    ("ledger: targets:12 scored_once:True updates:0", "scored_once", "True"), ("seed: 42", "seed", 42),
    ("run_id:a preset:x seed:7 config:0123456789abcdef", "seed", 7), ("world_size:8 device:cuda", "world_size", 8)])
def test_spellings_of_facts(line, key, value):
    assert dialects.read_log(line.encode()).get(key) == value


def test_the_last_of_several_counts():
    assert dialects.read_log(b"Total submission size: 67272625 bytes\nTotal submission size int8+zlib: 5 bytes\n").get(
        "total_bytes") == 5


def test_numbers_of_the_rules_are_the_trainers():
    assert schema.CAP_BYTES == train_gpt.LIMIT_BYTES and schema.FINEWEB_BYTES == train_gpt.FINEWEB_BYTES
    import prepare
    for name, row in zip(("SP1024", "SP4096", "SP8192", "CaseOps SP8192"), prepare.VARIANTS.values(), strict=True):
        assert abs(schema.TOKENIZATIONS[name].uncut / row.val_tokens - 1) < checks.CUT_SLACK
    assert prepare.FINEWEB_DOCUMENTS == schema.FINEWEB_DOCUMENTS
    assert set(submit.ADAPTATIONS) == set(train_gpt.EVALUATORS)


@pytest.mark.parametrize("text, track", [("10min_16mb", "10min_16mb"), ("track_10min_16mb", "10min_16mb"),
                                         ("non-record-16mb", "non_record_16mb"), ("weekend", None), (None, None),
                                         ("non-record-unlimited-compute-16mb", "non_record_unlimited_16mb")])
def test_spellings_of_a_track(text, track):
    assert schema.pick_track(text) == track


def test_a_file_is_read_to_its_limit_only(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    found = folder.Folder(tmp_path)
    assert found.read("a", 5) == b"12345"
    with pytest.raises(folder.FolderError, match="5 bytes, at most 4"):
        found.read("a", 4)
    (tmp_path / "a").unlink()
    (tmp_path / "a").symlink_to("/etc/passwd")
    with pytest.raises(folder.FolderError, match="cannot be read"):
        found.read("a", 4000)
    with pytest.raises(folder.FolderError, match="is not there"):
        found.read("../a", 4000)


def test_a_file_that_becomes_a_pipe_does_not_block(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    found = folder.Folder(tmp_path)
    (tmp_path / "a").unlink()
    os.mkfifo(tmp_path / "a")
    with pytest.raises(folder.FolderError, match="is no plain file"):
        found.read("a", 4)


# ---- what make refuses


def spoilt_runs(runs, tmp_path, place=2):
    """The runs, one of them a copy."""
    copy = shutil.copytree(runs[place], tmp_path / "copy")
    return [*runs[:place], copy, *runs[place + 1:]], copy


REFUSED = {
    "two runs": (lambda runs, tmp: runs[:2], "2 runs: at least 3"),
    "one seed twice": (lambda runs, tmp: [*runs[:2], runs[0]], "each may stand once"),
    "other artifact": (lambda runs, tmp: spoil_run(runs, tmp, append("artifact.bin", b"x")), "artifact.bin is not"),
    "other script": (lambda runs, tmp: spoil_run(runs, tmp, append("train_gpt.py", b"x")), "train_gpt.py is not"),
    "over its budget": (lambda runs, tmp: spoil_run(runs, tmp, result=put("budget", "ok", value=False)),
                        "over its budget"),
    "over the cap": (lambda runs, tmp: spoil_run(runs, tmp, result=put("artifact", "total_bytes", value=16_000_001)),
                     "1 over the 16000000"),
    "not packed": (lambda runs, tmp: spoil_run(runs, tmp, result=put("artifact", "packed", value=False)), "PACK=0"),
    "audit": (lambda runs, tmp: spoil_run(runs, tmp, result=put("audit", value={"causality": {
        "pass": False, "evidence": ""}})), "audit of causality failed"),
    "ledger": (lambda runs, tmp: spoil_run(runs, tmp, result=put("ledger", "scored_once", value=False)), "ledger"),
    "other source": (lambda runs, tmp: spoil_run(runs, tmp, result=put("source_sha256", value="0" * 64)), "its source"),
    "other data": (lambda runs, tmp: spoil_run(runs, tmp, result=put("data", "manifest_sha256", value="0" * 64)),
                   "its dataset")}


def spoil_run(runs, tmp_path, change=lambda path: None, result=None):
    found, copy = spoilt_runs(runs, tmp_path)
    change(copy)
    if result:
        edit(copy / "result.json", result)
    return found


@pytest.mark.parametrize("name", REFUSED)
def test_make_refuses(runs, tmp_path, capsys, name):
    spoil, why = REFUSED[name]
    assert submit.main(make_words(spoil(runs, tmp_path), tmp_path / "records")) == 3
    assert why in capsys.readouterr().err and not list((tmp_path).glob("records/*/*"))


def test_make_refuses_another_configuration(runs, tmp_path, capsys):
    found, copy = spoilt_runs(runs, tmp_path)
    edit(copy / "config.json", put("settings", "MODEL_DIM", value=64))
    assert submit.main(make_words(found, tmp_path / "records")) == 2
    assert "does not give the config_hash" in capsys.readouterr().err
    recipe = submit.recipe_of(json.loads((copy / "config.json").read_text()))
    edit(copy / "result.json", put("config_hash", value=schema.config_hash(recipe, 7)))
    assert submit.main(make_words(found, tmp_path / "records")) == 3
    assert "its configuration is not that of s1337 (MODEL_DIM)" in capsys.readouterr().err


def test_make_refuses_what_only_the_folder_shows(runs, tmp_path, capsys):
    found, copy = spoilt_runs(runs, tmp_path)
    replace(copy / "train.log", r"^total_eval_time: [\d.]+s", "total_eval_time: 601s")
    assert submit.main(make_words(found, tmp_path / "records")) == 3
    assert capsys.readouterr().err.startswith("K15 ") and not list((tmp_path).glob("records/*/*"))


@pytest.mark.parametrize("words, why", [
    (["--name", "a/b"], "--name=a/b"), (["--name", ".."], "--name=.."), (["--date", "yesterday"], "--date=yesterday"),
    (["--metric", "sliding"], "--metric=sliding"), (["--source", "nothing.py"], "--source=nothing.py"),
    (["--tokenizer", "nothing.model"], "--tokenizer=nothing.model"), (["--base", "nothing"], "--base=nothing"),
    (["--github-id", "a b"], "--github-id=a b"), (["--author", " "], "--author=")])
def test_mistakes_are_one_line(runs, tmp_path, capsys, words, why):
    assert submit.main([*make_words(runs, tmp_path), *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(why) and said.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_the_record_track_wants_a_base_and_its_hardware(runs, tmp_path, capsys, made, monkeypatch):
    words = [*make_words(runs, tmp_path), "--track", "10min_16mb"]
    assert submit.main(words) == 3
    assert "--base: track 10min_16mb" in capsys.readouterr().err
    assert submit.main([*words, "--base", str(made)]) == 3
    assert "scored text, this track is of the challenge's text" in capsys.readouterr().err
    monkeypatch.setitem(schema.TRACKS, "10min_16mb", schema.TRACKS["10min_16mb"]._replace(fineweb=False))
    assert submit.main([*words, "--base", str(made)]) == 3
    assert "K16 hardware" in capsys.readouterr().err


def test_a_base_is_compared_and_checked(runs, tmp_path):
    other = public(tmp_path / PUBLIC / f"{DATE}_Entry")
    assert submit.main(make_words(runs, tmp_path / "records", "--base", str(other))) == 0
    target = tmp_path / "records" / OWN / f"{DATE}_Tiny"
    record = json.loads((target / "submission.json").read_text())
    ours = [row["val_bpb"] for row in record["seed_results"].values()]
    assert record["comparison"]["delta_bpb"] == pytest.approx(statistics.fmean(ours) - statistics.fmean(BPBS.values()))
    assert record["comparison"]["tests"]["bpb"]["practice"]["met"] is False
    assert "Against 2026-05-04_Entry" in (target / "README.md").read_text()
    reseal(target, put("comparison", "tests", "bpb", "practice", "p", value=0.001))
    assert failing(target) == {"K18"}


def test_runs_beside_are_told(runs, tmp_path):
    given, track = [submit.read_run(path) for path in runs[:2]], schema.TRACKS["non_record_16mb"]
    record = json.loads(json.dumps(submit.runs_beside(given, "contiguous", track)))
    assert {row["run"]: row["used"] for row in record} == {"s1337": True, "s42": True, "s7": False}
    assert all(row["disqualified"] == [] and row["finished"] and row["same_script"] for row in record)


def test_a_run_that_no_record_may_hold_is_told_and_not_held_against_the_others(runs, tmp_path, capsys):
    """Over its budget, a run can be in no record; its score, the worst of all, is told and drops nobody's mean. A worse
    one without such a reason does, whether its report is whole, damaged, absent, or raised an alarm."""
    place = tmp_path / "beside"
    for path in runs:
        shutil.copytree(path, place / path.name)

    def add(name, change):
        shutil.copytree(runs[0], place / name)
        edit(place / name / "config.json", put("settings", "SEED", value=99))
        edit(place / name / "result.json", put("scores", "contiguous", "val_bpb", value=9.0))
        edit(place / name / "result.json", change)

    add("over", lambda r: r["budget"].update(ok=False))
    shutil.copytree(runs[0], place / "stopped")
    (place / "stopped" / "result.json").unlink()
    words, mine = make_words([place / path.name for path in runs], tmp_path / "records"), [r.name for r in runs]
    for name, change in {"worse": lambda r: None, "no report": lambda r: r.pop("budget"), "damaged": lambda r: r.pop(
            "artifact"), "alarm": lambda r: r["alarms"].append("diverged")}.items():
        add(name, change)
        assert submit.main(words) == 3
        assert "K19" in capsys.readouterr().err and not (tmp_path / "records" / OWN / f"{DATE}_Tiny").exists()
        shutil.rmtree(place / name)
    assert submit.main(words) == 0
    target = tmp_path / "records" / OWN / f"{DATE}_Tiny"
    told = {row["run"]: row for row in json.loads((target / "submission.json").read_text())["all_runs"]}
    assert sorted(told) == sorted([*mine, "over", "stopped"])
    assert [told[name]["used"] for name in ("over", "stopped")] == [False] * 2
    assert told["over"]["val_bpb"] == 9 and "over its budget" in told["over"]["disqualified"][0]
    assert told["stopped"] | {"val_bpb": None, "disqualified": [], "finished": None} == told["stopped"]
    page = (target / "README.md").read_text()
    assert re.search(r"^\| over \| 99 \|.*\| no \| yes \| over its budget", page, re.M)
    found = submit.verify(target)["K19"]
    assert found.status == PASS and "1 more that no record may hold: seed 99 over its budget" in found.evidence
    for words_of in ("slow", True, [0], [""], [], None):
        edit(target / "submission.json", lambda r, said=words_of: next(
            row for row in r["all_runs"] if row["run"] == "over").update(disqualified=said))
        assert submit.verify(target)["K19"].status == FAIL


# ---- the artifact, run


def ran(path, *more):
    """The verdict of --run."""
    return submit.verify(path, run=True, **dict(more))["K25"]


@pytest.mark.slow
def test_the_artifact_gives_its_score_without_network_and_data(own):
    found = ran(own, ("tokens", 2000))
    assert found.status == PASS and "sockets refused" in found.evidence
    reload_table = own / "documents_seed1337.npz"
    with np.load(reload_table) as held:
        table = {name: held[name] for name in held.files}
    table["document_nats_contiguous"] = table["document_nats_contiguous"][::-1].copy()
    np.savez_compressed(reload_table, **table)
    assert ran(own, ("tokens", 2000)).status == FAIL
    table["document_nats_contiguous"] *= 0.9
    np.savez_compressed(reload_table, **table)
    assert "claimed are" in ran(own).evidence


@pytest.mark.slow
def test_another_runs_artifact_gives_another_score(own, runs):
    shutil.copy(runs[1] / "artifact.bin", own / "artifact_seed1337.bin")
    found = submit.verify(own, run=True)
    assert {name for name, row in found.items() if row.status == FAIL} == {"K3", "K25"}


@pytest.mark.parametrize("code, why", [
    ("import socket; socket.socket()", "no network here"),
    ("import urllib.request; urllib.request.urlopen('http://localhost')", "no network here"),
    ("open(sys.argv[1] + '/x')", "no training data here")])
def test_what_the_process_may_not_do(tmp_path, code, why):
    (tmp_path / "x").touch()
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from records import reload; reload.forbid(sys.argv[1]); "
    done = subprocess.run([sys.executable, "-c", start + code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and why in done.stderr


def test_a_strangers_folder_is_not_run(tmp_path):
    trap = tmp_path / "ran"
    path = public(tmp_path / PUBLIC / f"{DATE}_Entry", source=f"open({str(trap)!r}, 'w').write('x')\n")
    assert ran(path).status == "unknown" and not trap.exists()


def test_a_run_without_its_dataset_cannot_be_told(own, tmp_path):
    assert "--data=" in ran(own, ("data", tmp_path)).evidence


# ---- statistics


def test_welch_agrees_with_scipy():
    rng = random.Random(3)
    for _ in range(200):
        ours = [rng.gauss(1.2, rng.uniform(1e-4, 2e-3)) for _ in range(rng.randint(2, 8))]
        theirs = [rng.gauss(1.2005, rng.uniform(1e-4, 2e-3)) for _ in range(rng.randint(2, 8))]
        margin = rng.choice([0.0, 0.0005])
        found = significance.welch(significance.sample(ours), significance.sample(theirs), margin)
        wanted = stats.ttest_ind([value + margin for value in ours], theirs, equal_var=False, alternative="less")
        assert found.t == pytest.approx(-wanted.statistic, rel=1e-6, abs=1e-9)
        assert found.freedom == pytest.approx(wanted.df, rel=1e-6) and found.p == pytest.approx(wanted.pvalue, rel=1e-6)


def test_welch_by_hand():
    # Ours 1, 2, 3: mean 2, variance 1. Theirs 4, 6, 8: mean 6, variance 4. Standard error sqrt(1/3 + 4/3) = 1.29099;
    # t = 4 / 1.29099; degrees (5/3)^2 / ((1/9 + 16/9) / 2) = 2.94118.
    found = significance.welch(significance.sample([1, 2, 3]), significance.sample([4, 6, 8]))
    assert found.difference == 4 and found.t == pytest.approx(3.0983867) and found.freedom == pytest.approx(2.9411765)
    # With equal variances and counts the degrees are whole; Student's t at 4 exceeds 2.131847 once in twenty.
    even = significance.welch(significance.Sample(0, 1, 3), significance.Sample(2.131847 * math.sqrt(2 / 3), 1, 3))
    assert even.freedom == pytest.approx(4) and even.p == pytest.approx(0.05, abs=1e-6)


@pytest.mark.parametrize("ours, theirs, t", [([1, 1], [2, 2], math.inf), ([2, 2], [1, 1], -math.inf),
                                             ([1, 1], [1, 1], 0)])
def test_what_does_not_vary(ours, theirs, t):
    found = significance.welch(significance.sample(ours), significance.sample(theirs))
    assert found.t == t and found.p == {math.inf: 0, -math.inf: 1, 0: 0.5}[t]


def test_one_seed_is_no_test():
    assert significance.welch(significance.sample([1]), significance.sample([1, 2])) is None


def test_power_is_what_chance_shows():
    ours, theirs = significance.Sample(0.0, 1.0, 12), significance.Sample(0.9, 1.0, 12)
    rng = random.Random(5)
    passed = 0
    for _ in range(3000):
        a, b = ([rng.gauss(part.mean, part.deviation) for _ in range(part.count)] for part in (ours, theirs))
        passed += significance.welch(significance.sample(a), significance.sample(b)).p < 0.05
    assert significance.power(ours, theirs, 0.0, 0.05) == pytest.approx(passed / 3000, abs=0.03)


@pytest.mark.parametrize("both", [False, True])
def test_more_seeds_are_the_fewest_that_do(both):
    for gap, margin, alpha in ((0.002, 0.0, 0.01), (0.0012, 0.0, 0.01), (0.0009, 0.0, 0.25), (0.003, 0.002, 0.01)):
        ours, theirs = significance.Sample(1.0, 0.0007, 3), significance.Sample(1.0 + gap, 0.0007, 3)
        extra = significance.more_seeds(ours, theirs, margin, alpha, both)

        def power(more, ours=ours, theirs=theirs, margin=margin, alpha=alpha):
            grown = theirs._replace(count=3 + more) if both else theirs
            return significance.power(ours._replace(count=3 + more), grown, margin, alpha)
        if extra is None:
            assert power(significance.MOST_SEEDS - 1) < significance.ENOUGH_POWER
        else:
            assert power(extra) >= significance.ENOUGH_POWER
            assert extra == 0 or power(extra - 1) < significance.ENOUGH_POWER


def test_no_seeds_help_below_the_bar():
    ours, theirs = significance.Sample(1.0, 0.1, 3), significance.Sample(1.004, 0.1, 3)
    assert significance.more_seeds(ours, theirs, 0.005, 0.01) is None


def test_compare_prints_both_bars_in_both_units(tmp_path, made, capsys):
    other = public(tmp_path / PUBLIC / f"{DATE}_Entry")
    better = public(tmp_path / PUBLIC / f"{DATE}_Better", bpbs={s: b - 0.01 for s, b in BPBS.items()})
    assert submit.main(["compare", str(better), str(other), str(made), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["folders"]] == [f"{DATE}_Better", f"{DATE}_Entry", made.name]
    rule = found["against"][0]["tests"]
    assert rule["nats"]["rule"]["margin"] == 0.005
    assert rule["bpb"]["rule"]["margin"] == pytest.approx(0.005 / RATIO["SP1024"][1], rel=1e-5)
    assert rule["nats"]["rule"]["met"] and rule["bpb"]["practice"]["met"]
    assert rule["nats"]["rule"]["p"] == pytest.approx(rule["bpb"]["rule"]["p"], rel=1e-2)
    assert submit.main(["compare", str(better), str(other / "submission.json")]) == 0
    assert "met" in capsys.readouterr().out
    assert submit.main(["compare", str(better)]) == 2 and submit.main(["compare", "nowhere", str(better)]) == 2


def test_command_line_of_verify(made, tmp_path, capsys):
    assert submit.main(["verify", str(made), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["checks"]) == set(CHECKS) and found["checks"]["K1"]["status"] == "pass"
    assert submit.main(["verify", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == f"FOLDER={tmp_path / 'nowhere'}: must be a folder\n"
