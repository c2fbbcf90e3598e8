"""MAIN: every preset from data to report; stages alone; the packed file; exit codes with one clear line."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL, clean_env, launch, small_words

import train_gpt
from train_gpt import PRESETS, main


def run(words, code, capsys):
    """The run's exit code is `code`; returns what it wrote to standard error."""
    assert main([str(word) for word in words], {}) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.fixture(scope="module")
def finished(mini, tmp_path_factory):
    """A finished run of every preset: name -> folder."""
    runs = tmp_path_factory.mktemp("runs")
    for preset in PRESETS:
        assert main(small_words(mini, runs, PRESET=preset, RUN_ID=preset, ITERATIONS=12, EVAL="contiguous,sliding",
                                VAL_LOSS_EVERY=6), {}) == 0
    return runs


@pytest.mark.parametrize("preset", PRESETS)
def test_run_folder_is_complete(finished, preset):
    folder = finished / preset
    found = json.loads((folder / "result.json").read_text())
    assert {"preset", "overlay", "seed", "config_hash", "source_sha256", "code_sha256", "commit", "environment", "data",
            "train", "artifact", "scores", "yardsticks", "ledger", "budget", "declared"} <= set(found)
    assert set(found["train"]) >= {"steps", "tokens", "seconds", "tokens_per_second", "final_train_loss",
                                   "peak_memory_bytes"}
    assert set(found["scores"]) == {"float", "contiguous", "sliding"}
    for score in found["scores"].values():
        assert set(score) == {"val_loss", "val_bpb", "tokens", "bytes", "seconds", "documents"}
        assert score["documents"] == 12 and score["bytes"] == found["data"]["val_bytes"]
    assert set(found["yardsticks"]) == {"gzip", "zstd", "xz"}
    assert found["ledger"]["scored_once"] is True and found["budget"]["ok"] is True
    size = (folder / "artifact.bin").stat().st_size
    code = (folder / "train_gpt.py").stat().st_size
    assert found["artifact"]["model_bytes"] == size and found["artifact"]["code_bytes"] == code
    assert found["artifact"]["total_bytes"] == size + code < found["artifact"]["limit_bytes"] == 16_000_000
    assert abs(found["artifact"]["forecast_bytes"] / (size + code) - 1) < 0.05
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("preset", PRESETS)
def test_log_has_the_challenges_lines(finished, preset):
    text = (finished / preset / "train.log").read_text()
    for pattern in (r"^step:1/12 train_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms$",
                    r"^step:6/12 val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms$",
                    r"^peak memory allocated: \d+ MiB reserved: \d+ MiB$", r"^Code size: \d+ bytes$",
                    r"^Total submission size int8\+\w+: \d+ bytes$", r"^val_tokens: \d+ ",
                    r"^final_int8_\w+_roundtrip_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}$"):
        assert train_gpt.re.search(pattern, text, train_gpt.re.M), pattern


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
    words = [f"RUNS_PATH={finished}", "RUN_ID=four", "STAGES=write,reload,evaluate,report",
             f"FROM={finished / 'sixteen'}", "MATRIX_BITS=4", "EMBED_BITS=4", "PACK=0", "THREADS=1"]
    run(words, 0, capsys)
    found = [json.loads((finished / name / "result.json").read_text())["artifact"]["model_bytes"]
             for name in ("four", "sixteen")]
    assert found[0] < 0.65 * found[1]


def test_over_the_cap_is_exit_code_3_after_everything_is_saved(mini, tmp_path, capsys):
    words = small_words(mini, tmp_path, RUN_ID="big", ITERATIONS=2, TARGET_BYTES=1000)
    assert "TARGET_BYTES=1000: code plus model are" in run(words, 3, capsys)
    assert json.loads((tmp_path / "big" / "result.json").read_text())["artifact"]["total_bytes"] > 1000


def test_over_the_evaluation_budget_is_exit_code_3(mini, tmp_path, capsys):
    words = small_words(mini, tmp_path, RUN_ID="slow", ITERATIONS=2, EVAL_BUDGET_SECONDS=0.0001)
    assert "budget:" in run(words, 3, capsys)


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
    words = small_words(mini, tmp_path, PRESET="sixteen", RUN_ID="run", ITERATIONS=12, EVAL="contiguous,sliding",
                        VAL_LOSS_EVERY=6, STAGES=stage)
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
                        STAGES="train,write", EVAL="contiguous,sliding", PACK=1)
    done = launch(words)
    assert done.returncode == 0, done.stderr
    assert "packed:1" in done.stdout
    wanted = (finished / "sixteen" / "artifact.bin").read_bytes()
    assert (tmp_path / "packed" / "artifact.bin").read_bytes() == wanted
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tmp_path / "packed" / "train_gpt.py", alone)
    done = subprocess.run([sys.executable, "train_gpt.py", f"DATA_PATH={mini}", "STAGES=train,write", "RUN_ID=r",
                           "THREADS=1", "TENSORBOARD=0"], cwd=alone, env=clean_env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (alone / "runs" / "r" / "artifact.bin").read_bytes() == wanted
    assert (alone / "runs" / "r" / "train_gpt.py").read_bytes() == (alone / "train_gpt.py").read_bytes()
    other = subprocess.run([sys.executable, "train_gpt.py", "PRESET=baseline"], cwd=alone, env=clean_env(),
                           capture_output=True, text=True)
    assert other.returncode == 2 and "the packed file was made with PRESET=sixteen" in other.stderr


@pytest.mark.dist
def test_torchrun_on_the_readable_file_runs_the_packed_one_on_all_ranks(mini, tmp_path):
    done = launch(small_words(mini, tmp_path, RUN_ID="p", ITERATIONS=2, STAGES="train,write", PACK=1), processes=2)
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
