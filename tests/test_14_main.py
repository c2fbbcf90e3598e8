"""MAIN: every preset from data to report; stages alone; the packed file; exit codes with one clear line."""

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib

import pytest
import torch
from conftest import ROOT, SMALL, clean_env, events, launch, make_model, small_config, small_words

import train_gpt
from train_gpt import PRESETS, main


def run(words, code, capsys):
    """The run's exit code is `code`; returns what it wrote to standard error."""
    assert main([str(word) for word in words], {}) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said




def all_of(preset):
    """The evaluators that a preset's model can have."""
    drawn = train_gpt.random_depth(small_config(PRESET=preset).model.stack)
    return ",".join(kind for kind in train_gpt.EVALUATORS if drawn or kind != "valve")


class Finished:
    """A folder of runs, `runs / name` one of them: that of a preset is run, with all stages, when it is first asked
    for."""

    def __init__(self, dataset, runs):
        self.dataset, self.runs = dataset, runs

    def __str__(self):
        return str(self.runs)

    def __truediv__(self, name):
        if name in PRESETS and not (self.runs / name).exists():
            assert main(small_words(self.dataset, self.runs, PRESET=name, RUN_ID=name, ITERATIONS=12,
                                    EVAL=all_of(name), VAL_LOSS_EVERY=6), {}) == 0
        return self.runs / name


@pytest.fixture(scope="module")
def finished(mini, tmp_path_factory):
    """Finished runs of every preset."""
    return Finished(mini, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("preset", PRESETS)
def test_run_folder_is_complete(finished, preset):
    folder = finished / preset
    found = json.loads((folder / "result.json").read_text())
    assert {"preset", "overlay", "seed", "config_hash", "source_sha256", "code_sha256", "commit", "environment", "data",
            "train", "artifact", "scores", "yardsticks", "ledger", "budget", "declared"} <= set(found)
    assert set(found["train"]) >= {"steps", "tokens", "seconds", "tokens_per_second", "final_train_loss",
                                   "peak_memory_bytes"}
    assert set(found["scores"]) == {"float", *all_of(preset).split(",")}
    for score in found["scores"].values():
        assert set(score) == {"val_loss", "val_bpb", "tokens", "bytes", "seconds", "documents"}
        assert score["documents"] == 12 and score["bytes"] == found["data"]["val_bytes"]
    assert set(found["yardsticks"]) == {"gzip", "zstd", "xz"}
    assert found["ledger"]["scored_once"] is True and found["budget"]["ok"] is True
    size = (folder / "artifact.bin").stat().st_size
    config = train_gpt.load_config(small_words("x", "x", PRESET=preset, EVAL=all_of(preset)), {}, gpus=0)
    code = found["artifact"]["code_bytes"]
    # The readable file ran, a packed one is counted (the tests share one; tests/test_pack.py has each preset's).
    assert found["artifact"]["model_bytes"] == size and 40_000 < code < 80_000
    assert found["artifact"]["total_bytes"] == size + code < found["artifact"]["limit_bytes"] == 16_000_000
    # In so few steps an fp8 embedding takes few values, which code better than Gaussian ones.
    near = 0.15 if config.artifact.embed_format == "fp8" else 0.05
    assert abs(found["artifact"]["forecast_bytes"] / (size + code) - 1) < near
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("preset", PRESETS)
def test_log_has_the_challenges_lines(finished, preset):
    text = (finished / preset / "train.log").read_text()
    for pattern in (r"^step:1/12 train_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms$",
                    r"^step:6/12 val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms$",
                    r"^peak memory allocated: \d+ MiB reserved: \d+ MiB$", r"^Code size: \d+ bytes",
                    r"^Total submission size (int[68]|ternary)\+[\w+]+: \d+ bytes$", r"^val_tokens: \d+ ",
                    r"^final_(int[68]|ternary)_\w+_roundtrip_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}$"):
        assert train_gpt.re.search(pattern, text, train_gpt.re.M), pattern


@pytest.mark.parametrize("preset", ["jamone", "radial", "ternary"])
def test_reloaded_ternary_models_give_the_same_logits(finished, preset):
    """To the bit those that the last training step's forward would give: its weights projected, or the artifact's."""
    config = train_gpt.load_config([f"FROM={finished / preset}", "STAGES=evaluate"], {}, gpus=0)
    held = train_gpt.load_checkpoint(finished / preset / "checkpoint.pt")
    kernels, _ = train_gpt.pick_kernels(config.system.kernels, torch.device("cpu"), settings=config.model)
    facts, read = train_gpt.load_artifact(finished / preset / "artifact.bin")
    again = train_gpt.make_model_from(facts, read, kernels, torch.float32, finished / preset / "artifact.bin")
    trained = make_model(config)
    routes = train_gpt.routes_of(trained, config.artifact)
    assert sum(route.format == "ternary" for route in routes.values()) >= 6
    train_gpt.load_weights(trained, {name: train_gpt.project(p, routes[name]) for name, p in held.weights.items()}, "x")
    tokens = torch.randint(4, config.data.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    found = [model.logits(train_gpt.make_forward(model, len(model.phases) - 1)(tokens, None))
             for model in (again, trained)]
    assert torch.equal(*found) and found[0].std() > 0


def test_score_again_without_training(finished, capsys):
    """The artifact alone is re-scored, in a new folder, with the old settings and another stride."""
    old = finished / "sixteen"
    words = [f"RUNS_PATH={finished}", "RUN_ID=again", "STAGES=evaluate,report", f"FROM={old}", "EVAL=contiguous",
             "PACK=0", "THREADS=1"]
    assert run(words, 0, capsys) == ""
    before, after = (json.loads((folder / "result.json").read_text()) for folder in (old, finished / "again"))
    assert after["scores"]["contiguous"]["val_bpb"] == before["scores"]["contiguous"]["val_bpb"]
    assert set(after["scores"]) == {"contiguous"} and after["artifact"] == before["artifact"]
    assert (finished / "again" / "artifact.bin").read_bytes() == (old / "artifact.bin").read_bytes()


def test_squeeze_again_without_training(finished, capsys):
    """With another grid; the moments of the old run are still those of its weights."""
    words = [f"RUNS_PATH={finished}", "RUN_ID=four", "STAGES=write,reload,evaluate,report",
             f"FROM={finished / 'sixteen'}", "MATRIX_BITS=4", "EMBED_BITS=4", "PACK=0", "THREADS=1"]
    run(words, 0, capsys)
    found = [json.loads((finished / name / "result.json").read_text())["artifact"]["model_bytes"]
             for name in ("four", "sixteen")]
    assert found[0] < 0.65 * found[1]
    assert not (finished / "four" / "hessians.pt").exists()


def test_every_part_goes_from_training_to_test_time_training(mini, tmp_path, capsys):
    """All parts that no preset has under `tiny` as well, with GPTQ, allocation, fit, LQER and finer columns."""
    words = small_words(mini, tmp_path, RUN_ID="parts", ITERATIONS=5, STAGES="train,calibrate,write,reload,evaluate",
                        EVAL="ttt", PRESET="caseops", VE_LAYERS="1,2", VE_DIM=8, VALUE_RESIDUAL=1, BIGRAM_VOCAB_SIZE=31,
                        BIGRAM_DIM=8, TRIGRAM=1, EMBED_DIM=16, ASYM_LOGIT_RESCALE=1, ATTN_GATE="dense", ALLOCATE=1,
                        FIT=1, RATE_ROUNDING=1, AWQ_LITE_GROUP_SIZE=8, TARGET_BYTES=110000)
    run(words, 0, capsys)
    log = (tmp_path / "parts" / "train.log").read_text()
    assert "equal to the weights that were written" in log and "scored_once:True" in log
    assert re.search(r"^bigram\.table +table +int7 +nearest", log, re.M)
    assert re.search(r"^values\.proj\.weight +matrix +int6(\+lqer)? +gptq", log, re.M)
    assert re.search(r"^head_proj\.weight +matrix +int6(\+lqer)? +gptq", log, re.M)


MIXER_RUNS = {
    "delta": {"STACK": "D2"}, "gated delta": {"STACK": "G2", "ALLOW_NEG_EIGVAL": 1}, "mlstm": {"STACK": "X2"},
    "titans": {"STACK": "T2"}, "exact step": {"STACK": "D G", "EFLA": 1},
    "memory as context": {"STACK": "T A", "TITANS_CONTEXT": 1, "PERSISTENT_SLOTS": 4},
    "deep memory": {"STACK": "T A", "TITANS_DEPTH": 2},
    "crawler": {"PRESET": "clowncar", "STACK": "A (A{mlp=4,xsa=1} D{mlp=0,gate=0})*4 A", "BIGRAM_DIM": 8,
                "BIGRAM_VOCAB_SIZE": 31, "EVAL": "sliding,ttt,ngram"}}


@pytest.mark.parametrize("name", MIXER_RUNS)
def test_every_mixer_goes_from_data_to_a_legal_score(mini, tmp_path, capsys, name):
    """Trained, calibrated, squeezed, read back to the same weights, scored and audited."""
    words = {"PRESET": "sixteen", "EVAL": "sliding,ttt", "MIXER_CHUNK": 16, **MIXER_RUNS[name]}
    run(small_words(mini, tmp_path, RUN_ID="mixer", ITERATIONS=8, AUDIT=1, AUDIT_TOKENS=150,
                    STAGES="train,calibrate,write,reload,evaluate", **words), 0, capsys)
    log = (tmp_path / "mixer" / "train.log").read_text()
    found = json.loads((tmp_path / "mixer" / "result.json").read_text())
    assert "equal to the weights that were written" in log and found["ledger"]["scored_once"] is True
    assert all(verdict["pass"] for verdict in found["audit"].values()), found["audit"]
    steps = events(tmp_path / "mixer", "step")
    assert steps[-1]["train_loss"] < steps[0]["train_loss"]


# -- the squeeze, without training again


NEAREST = {"SOLVER": "nearest", "ALLOCATE": 0, "FIT": 0, "RATE_ROUNDING": 0}


def again(finished, run_id, stages="calibrate,write,reload,evaluate", source="baseline", **more):
    """The words that take a finished run's weights through other stages and settings."""
    return [f"RUNS_PATH={finished}", f"RUN_ID={run_id}", f"STAGES={stages}", f"FROM={finished / source}", "PACK=0",
            "THREADS=1", "EVAL=contiguous", *(f"{name}={value}" for name, value in more.items())]


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_calibrate_and_solve_again_without_training(finished, capsys):
    """STAGES=calibrate,write,reload,evaluate: GPTQ lowers the summed cost of nearest at the same grid, and the events
    have what every tensor took and cost."""
    grid = {"MATRIX_BITS": 4, "EMBED_BITS": 4, "MATRIX_CLIP_SIGMAS": 3, "EMBED_CLIP_SIGMAS": 3}
    run(again(finished, "g", SOLVER="gptq", **grid), 0, capsys)
    # LQER of rank 1 for one matrix asks for a calibration, so that nearest has costs too.
    run(again(finished, "n", SOLVER="nearest", LQER_RANK=1, LQER_TOP_K=1, **grid), 0, capsys)
    costs = [result(finished / name)["artifact"]["cost_nats"] for name in "gn"]
    assert 0 < costs[0] < 0.95 * costs[1], costs
    text, model = (finished / "g" / "train.log").read_text(), finished / "g" / "artifact.bin"
    assert "counted as training" in text and "equal to the weights that were written" in text
    rows = events(finished / "g", "tensor")
    assert {(row["solver"], row["format"]) for row in rows} == {("gptq", "int4"), ("nearest", "fp16")}
    assert all(row["cost"] > 0 and row["hessian_error"] > 0 for row in rows if row["solver"] == "gptq")
    assert abs(sum(row["bytes"] for row in rows) / model.stat().st_size - 1) < 0.25
    assert sum(row["format"].endswith("+lqer") for row in events(finished / "n", "tensor")) <= 1
    assert result(finished / "g")["train"]["calibrate_seconds"] > 0
    assert result(finished / "g")["train"]["steps"] == 12


def test_a_squeeze_that_needs_a_calibration_says_so(finished, capsys):
    for number, more in enumerate(({"SOLVER": "gptq"}, {"ALLOCATE": 1}, {"LQER_RANK": 2}, {"PRUNE_ONES": 0.1},
                                   {"AWQ_LITE_GROUP_TOP_K": 1, "AWQ_LITE_GROUP_SIZE": 8})):
        said = run(again(finished, f"without{number}", "write", **more), 2, capsys)
        assert "put calibrate before write" in said and len(said.strip().splitlines()) == 1


def test_a_missing_calibrate_is_found_before_any_training(mini, tmp_path, capsys):
    """A contradiction between settings is an error before any work."""
    words = small_words(mini, tmp_path, RUN_ID="x", ITERATIONS=1, STAGES="train,write", SOLVER="gptq")
    assert "calibrate" in run(words, 2, capsys)
    assert not (tmp_path / "x" / "checkpoint.pt").exists()


@pytest.mark.parametrize("words", [["CODEC=lrzip"], ["POLICY=embedding: codec=lrzip"]])
def test_a_missing_codec_is_found_before_any_training(mini, tmp_path, capsys, monkeypatch, words):
    monkeypatch.setattr(train_gpt.shutil, "which", lambda name: None)
    said = run([*small_words(mini, tmp_path, RUN_ID="x", ITERATIONS=1, **NEAREST), *words], 2, capsys)
    assert "lrzip" in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "x" / "checkpoint.pt").exists()


def test_a_policy_that_matches_nothing_is_a_mistake(mini, tmp_path, capsys):
    """A misspelt setting is an error before any work; so is a row for a tensor that is not there."""
    words = small_words(mini, tmp_path, RUN_ID="x", ITERATIONS=1, STAGES="train", **NEAREST)
    assert "POLICY=block.0.*: int4" in run([*words, "POLICY=block.0.*: int4; embedding: int6"], 2, capsys)


@pytest.mark.parametrize("words, said", [
    ({"POLICY": "blocks.0.*: int6 solver=gptq"}, "solver=gptq for blocks.0."),
    ({"ALLOCATE": 1, "MATRIX_FORMAT": "ternary", "EMBED_FORMAT": "fp8"}, "ALLOCATE=1: needs a matrix")])
def test_a_squeeze_that_cannot_work_is_refused_before_any_training(mini, tmp_path, capsys, words, said):
    given = {**NEAREST, "RUN_ID": "x", "ITERATIONS": 1, "STAGES": "train,calibrate,write", **words}
    assert said in run(small_words(mini, tmp_path, **given), 2, capsys)
    assert not (tmp_path / "x" / "checkpoint.pt").exists()


DAMAGE = {"half": lambda raw: raw[:len(raw) // 2], "empty": lambda raw: b"", "nonsense": lambda raw: b"nonsense" * 40,
          "a bit": lambda raw: raw[:len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 16]) + raw[len(raw) // 2 + 1:]}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_moments_are_one_line_and_exit_code_2(finished, capsys, how):
    run_id = f"moments {how}".replace(" ", "_")
    run(again(finished, run_id, "calibrate", SOLVER="gptq"), 0, capsys)
    path = finished / run_id / "hessians.pt"
    path.write_bytes(DAMAGE[how](path.read_bytes()))
    said = run(again(finished, run_id, "write", SOLVER="gptq"), 2, capsys)
    assert "hessians.pt" in said and len(said.strip().splitlines()) == 1
    assert not (finished / run_id / "artifact.bin").exists()


@pytest.mark.parametrize("what, said", [("tokenizer_sha256", "tokenizer"), ("vocab_size", "describes no model"),
                                        ("model", "describes no model"), ("streams", "artifact.bin")])
def test_an_artifact_that_lacks_a_fact_is_one_line_and_exit_code_2(finished, capsys, what, said):
    """With a matching checksum, as another program may write it."""
    folder = finished / f"lacks_{what}"
    shutil.copytree(finished / "baseline", folder)
    path = folder / "artifact.bin"
    data = path.read_bytes()
    length = struct.unpack_from("<I", data, 10)[0]
    header = json.loads(zlib.decompress(data[14:14 + length]))
    del header[what]
    raw = zlib.compress(json.dumps(header).encode())
    body = data[:10] + struct.pack("<I", len(raw)) + raw + data[14 + length:-32]
    path.write_bytes(body + hashlib.sha256(body).digest())
    words = [f"RUNS_PATH={finished}", f"RUN_ID=read_{what}", "STAGES=evaluate", f"FROM={folder}", "PACK=0", "THREADS=1"]
    error = run(words, 2, capsys)
    assert said in error and len(error.strip().splitlines()) == 1


def test_sequential_calibration_solves_every_matrix_once(mini, tmp_path, capsys, monkeypatch):
    """Block after block, each on predecessors in their stored form; also where there are more than ten blocks. What
    comes last, head and embedding, is solved when it is written."""
    solved, real = [], train_gpt.solve_all

    def recorded(weights, *rest):
        solved.append(list(weights))
        return real(weights, *rest)
    monkeypatch.setattr(train_gpt, "solve_all", recorded)
    run(small_words(mini, tmp_path, RUN_ID="s", ITERATIONS=1, STAGES="train,calibrate", STACK="A{mlp=1}12",
                    MODEL_DIM=16, ROPE_DIMS=4, SOLVER="gptq", GPTQ_SEQUENTIAL=1, GPTQ_CALIBRATION_BATCHES=1), 0, capsys)
    names = [name for step in solved for name in step]
    assert len(solved) == 12 and "tok_emb" not in names
    assert sorted(names) == sorted(set(names)), [name for name in set(names) if names.count(name) > 1]
    assert [step[0].split(".")[1] for step in solved] == [str(block) for block in range(12)]


def test_loop_aware_calibration_acts(finished, capsys):
    """Clowncar's groups are calibrated on what the stored flat blocks make: their Hessians and codes differ from those
    on float weights, those of the flat blocks do not."""
    for run_id, on in (("plain", 0), ("aware", 1)):
        run(again(finished, run_id, "calibrate,write", source="clowncar", LOOP_AWARE_GPTQ=on, MATRIX_BITS=3), 0, capsys)
    plain, aware = (torch.load(finished / name / "hessians.pt", weights_only=True) for name in ("plain", "aware"))
    assert set(plain) == set(aware)
    inside = {site for site in plain if site.startswith(("v1.", "v2.", "v3.", "v4.", "loops."))}
    assert len(inside) > 20
    for site in plain:
        if site.startswith(("slope", "tokens")):
            continue
        assert torch.equal(plain[site], aware[site]) == (site not in inside), site
    written = [train_gpt.unpack_artifact((finished / name / "artifact.bin").read_bytes())[1]
               for name in ("plain", "aware")]
    same = {name: torch.equal(written[0][name], written[1][name]) for name in written[0]}
    assert not same["blocks.1.mlp.up.weight"] and not same["blocks.1.mixer.q.weight"]
    assert same["blocks.0.mlp.up.weight"] and same["blocks.2.mlp.up.weight"]


def test_sequential_calibration_sees_stored_predecessors(finished, capsys):
    """The moments of the first block are those of the float weights, those of a later one are not."""
    for run_id, more in (("flat", {}), ("sequential", {"GPTQ_SEQUENTIAL": 1})):
        run(again(finished, run_id, "calibrate", SOLVER="gptq", MATRIX_BITS=3, **more), 0, capsys)
    flat, other = (torch.load(finished / name / "hessians.pt", weights_only=True) for name in ("flat", "sequential"))
    assert set(flat) == set(other)
    assert torch.equal(flat["v0.q"], other["v0.q"]) and not torch.equal(flat["v3.q"], other["v3.q"])


def test_calibration_on_what_the_model_writes_needs_no_training_text(finished, capsys):
    run(again(finished, "self", SOLVER="gptq", GPTQ_CALIBRATION_TEXT="self", GPTQ_CALIBRATION_BATCHES=2), 0, capsys)
    assert "tokens of self text" in (finished / "self" / "train.log").read_text()


@pytest.mark.parametrize("share", [0.6, 0.8])
@pytest.mark.parametrize("more", [{"SOLVER": "nearest"}, {"SOLVER": "gptq", "ALLOCATE": 1, "RATE_ROUNDING": 1}])
def test_the_fit_ends_just_below_the_cap(finished, capsys, share, more):
    """Code plus model, at a share of that model's int8 size: at most 4,000 bytes unused, never one too many, and at
    most four passes."""
    before = result(finished / "baseline")["artifact"]
    cap = before["code_bytes"] + round(share * before["model_bytes"])
    run_id = f"fit{share}{more['SOLVER']}"
    run(again(finished, run_id, FIT=1, TARGET_BYTES=cap, **more), 0, capsys)
    found = result(finished / run_id)["artifact"]
    assert cap - 4000 <= found["total_bytes"] <= cap, (found, cap)
    assert (finished / run_id / "artifact.bin").stat().st_size == found["model_bytes"]
    assert found["fit_passes"] <= 4 and found["step_factor"] > 1
    assert abs(found["forecast_bytes"] / found["total_bytes"] - 1) < 0.05
    text = (finished / run_id / "train.log").read_text()
    assert f"{cap - found['total_bytes']} bytes of TARGET_BYTES={cap} unused" in text


def test_a_fit_under_too_large_a_cap_says_so_and_is_valid(finished, capsys):
    run(again(finished, "wide", FIT=1, SOLVER="nearest"), 0, capsys)
    found = result(finished / "wide")["artifact"]
    assert found["total_bytes"] < 1_000_000 and found["step_factor"] == 1 and found["fit_passes"] == 1
    assert "the finest steps of the policy are smaller than the cap" in (finished / "wide" / "train.log").read_text()


def test_a_fit_that_is_impossible_is_exit_code_3_with_the_numbers(finished, capsys):
    code = result(finished / "baseline")["artifact"]["code_bytes"]
    said = run(again(finished, "tight", "write", FIT=1, SOLVER="nearest", TARGET_BYTES=code + 3000), 3, capsys)
    assert "FIT=1: the coarsest steps make a model of" in said and "would fit" in said
    assert len(said.strip().splitlines()) == 1 and not (finished / "tight" / "artifact.bin").exists()
    said = run(again(finished, "none", "write", FIT=1, SOLVER="nearest", TARGET_BYTES=1000), 3, capsys)
    assert len(said.strip().splitlines()) == 1


@pytest.mark.dist
def test_two_ranks_solve_what_one_solves(mini, finished, capsys, tmp_path):
    """The tensors are divided over ranks, the batches too; sums of moments differ in the last bit at most, so the score
    does not."""
    more = {"SOLVER": "gptq", "MATRIX_BITS": 4, "EMBED_BITS": 5}
    run(again(finished, "one", **more), 0, capsys)
    words = again(finished, "two", **more)
    done = launch(words, processes=2)
    assert done.returncode == 0, done.stderr
    one, two = (result(finished / name) for name in ("one", "two"))
    same = (finished / "one" / "artifact.bin").read_bytes() == (finished / "two" / "artifact.bin").read_bytes()
    print("artifacts are", "equal" if same else "not equal")
    assert abs(one["scores"]["contiguous"]["val_bpb"] - two["scores"]["contiguous"]["val_bpb"]) <= 1e-3
    assert abs(one["artifact"]["model_bytes"] / two["artifact"]["model_bytes"] - 1) < 0.01


def test_over_the_cap_is_exit_code_3_after_everything_is_saved(mini, tmp_path, capsys):
    words = small_words(mini, tmp_path, RUN_ID="big", ITERATIONS=2, TARGET_BYTES=1000, FIT=0)
    assert "TARGET_BYTES=1000: code plus model are" in run(words, 3, capsys)
    assert json.loads((tmp_path / "big" / "result.json").read_text())["artifact"]["total_bytes"] > 1000


def test_over_the_evaluation_budget_is_exit_code_3(mini, tmp_path, capsys):
    words = small_words(mini, tmp_path, RUN_ID="slow", ITERATIONS=2, EVAL_BUDGET_SECONDS=0.0001)
    assert "EVAL_BUDGET_SECONDS=0.0001: the evaluation would take" in run(words, 3, capsys)


def test_absent_tools_are_said_and_cost_nothing_else(mini, tmp_path, capsys):
    words = small_words(mini, tmp_path, RUN_ID="bare", ITERATIONS=2, TOOLS_PATH=tmp_path / "none")
    run(words, 0, capsys)
    assert "yardsticks.py is not there" in (tmp_path / "bare" / "train.log").read_text()
    assert "PACK=1: needs" in run([*words, "PACK=1"], 2, capsys)


def test_declared_mode_is_printed(mini, tmp_path, capsys):
    run(small_words(mini, tmp_path, RUN_ID="d", ITERATIONS=1, STAGES="train", DOC_ISOLATION=0), 0, capsys)
    assert "declared mode: DOC_ISOLATION=0" in (tmp_path / "d" / "train.log").read_text()


BAD_WORDS = {
    "misspelt": ["MATRIX_LRR=1"], "range": ["MATRIX_BITS=99"], "heads": ["NUM_HEADS=7"], "preset": ["PRESET=best"],
    "stack": ["STACK=A(("], "data": ["DATA_PATH=/nonexistent/folder"], "vocabulary": ["VOCAB_SIZE=1000"],
    "flag": ["--halp"], "run folder": ["RUN_ID=a/b"], "from": ["FROM=/nonexistent", "STAGES=evaluate"]}


@pytest.mark.parametrize("name", BAD_WORDS)
def test_bad_words_are_one_line_and_exit_code_2(mini, tmp_path, capsys, name):
    said = run([*small_words(mini, tmp_path), *BAD_WORDS[name]], 2, capsys)
    assert len(said.strip().splitlines()) == 1, said


def test_a_mistake_leaves_its_run_name_free(mini, tmp_path, capsys):
    """After a wrong DATA_PATH the corrected line works under the same RUN_ID."""
    words = small_words(mini, tmp_path, RUN_ID="again", ITERATIONS=1, STAGES="train")
    assert "no such folder" in run([*words, "DATA_PATH=/nonexistent"], 2, capsys)
    run(words, 0, capsys)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["settings"]["DATA_PATH"] == str(mini)


def damaged(finished, tmp_path, name):
    """A copy of a finished run with one bit of a file flipped."""
    shutil.copytree(finished / "sixteen", tmp_path / "run")
    path = tmp_path / "run" / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 16
    path.write_bytes(raw)
    return small_words("x", tmp_path, RUN_ID="run")[-1:]


@pytest.mark.parametrize("name, stage", [
    ("artifact.bin", "evaluate"), ("checkpoint.pt", "write"), ("checkpoint.pt", "train")])
def test_damaged_files_are_one_line_and_exit_code_2(mini, finished, tmp_path, capsys, name, stage):
    damaged(finished, tmp_path, name)
    words = small_words(mini, tmp_path, PRESET="sixteen", RUN_ID="run", ITERATIONS=12,
                        EVAL=all_of("sixteen"), VAL_LOSS_EVERY=6, STAGES=stage)
    said = run(words, 2, capsys)
    assert name in said and len(said.strip().splitlines()) == 1


def test_full_disk_and_unwritable_folder(mini, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    said = run(small_words(mini, tmp_path / "file", RUN_ID="x"), 2, capsys)
    assert "RUNS_PATH" in said and len(said.strip().splitlines()) == 1
    real = train_gpt.save_checkpoint

    def full(path, held):
        real(path, held)
        raise OSError(28, "No space left on device", str(path))
    monkeypatch.setattr(train_gpt, "save_checkpoint", full)
    said = run(small_words(mini, tmp_path, RUN_ID="full", ITERATIONS=1), 2, capsys)
    assert "No space left on device" in said and len(said.strip().splitlines()) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_really_full_disk(mini, tmp_path):
    """A log that cannot grow ends the run with one line."""
    folder = tmp_path / "dev"
    folder.mkdir()
    os.symlink("/dev/full", folder / "train.log")
    done = launch(small_words(mini, tmp_path, RUN_ID="dev", ITERATIONS=1, STAGES="train"))
    assert done.returncode == 2 and "No space left on device" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("error, whose", [
    (train_gpt.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore"), "the device"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\nmore"), "the machine"),
    (MemoryError(), "the machine")])
def test_out_of_memory_names_the_setting(mini, tmp_path, capsys, monkeypatch, error, whose):
    def full(*_):
        raise error
    monkeypatch.setattr(train_gpt.Trainer, "gradients", full)
    said = run(small_words(mini, tmp_path, RUN_ID="x", ITERATIONS=1), 2, capsys)
    assert said.startswith(f"MICRO_BATCH_TOKENS=128: {whose} ran out of memory")
    assert len(said.strip().splitlines()) == 1


def test_packed_file_repeats_the_run_alone(mini, finished, tmp_path):
    """From the readable file with PACK=1, and from the packed file alone in an empty folder without settings: the same
    artifact as the readable file writes."""
    words = small_words(mini, tmp_path, PRESET="sixteen", RUN_ID="packed", ITERATIONS=12, VAL_LOSS_EVERY=6,
                        STAGES="train,calibrate,write", EVAL="contiguous,sliding", PACK=1)
    done = launch(words)
    assert done.returncode == 0, done.stderr
    assert "packed:1" in done.stdout
    wanted = (finished / "sixteen" / "artifact.bin").read_bytes()
    assert (tmp_path / "packed" / "artifact.bin").read_bytes() == wanted
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tmp_path / "packed" / "train_gpt.py", alone)
    done = subprocess.run([sys.executable, "train_gpt.py", f"DATA_PATH={mini}", "STAGES=train,calibrate,write",
                           "RUN_ID=r", "THREADS=1", "TENSORBOARD=0"], cwd=alone, env=clean_env(),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (alone / "runs" / "r" / "artifact.bin").read_bytes() == wanted
    assert (alone / "runs" / "r" / "train_gpt.py").read_bytes() == (alone / "train_gpt.py").read_bytes()
    other = subprocess.run([sys.executable, "train_gpt.py", "PRESET=baseline"], cwd=alone, env=clean_env(),
                           capture_output=True, text=True)
    assert other.returncode == 2 and "the packed file was made with PRESET=sixteen" in other.stderr


@pytest.mark.dist
def test_torchrun_on_the_readable_file_runs_the_packed_one_on_all_ranks(mini, tmp_path):
    done = launch(small_words(mini, tmp_path, RUN_ID="p", ITERATIONS=2, STAGES="train,calibrate,write", PACK=1),
                  processes=2)
    assert done.returncode == 0, done.stderr
    assert "packed:1" in done.stdout and "world_size:2" in done.stdout
    head = (tmp_path / "p" / "train_gpt.py").read_bytes()[:200]
    assert b"packed; source sha256" in head


@pytest.mark.parametrize("preset", PRESETS)
def test_plan_needs_no_data(preset, capsys):
    assert main([f"PRESET={preset}", "OVERLAY=", "PACK=0", "--plan"], {}) == 0
    text = capsys.readouterr().out
    assert "forecast bytes" in text and "TFLOPs a step" in text


def test_help_and_presets(capsys):
    assert main(["--help"], {}) == 0 and "MATRIX_LR" in capsys.readouterr().out
    assert main(["--presets"], {}) == 0 and "sixteen" in capsys.readouterr().out


def test_small_words_are_settings():
    assert set(SMALL) <= set(train_gpt.SETTINGS) and (ROOT / "train_gpt.py").exists()
