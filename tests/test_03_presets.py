"""PRESETS: every row validates under every overlay, repeats no default, and resolves in the documented order."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, small_words

import train_gpt
from train_gpt import FORMAT_KINDS, OVERLAYS, PRESETS, SETTINGS, load_config, parse_value


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("overlay", ["", *OVERLAYS])
def test_every_row_is_valid(preset, overlay):
    config = load_config([f"PRESET={preset}", f"OVERLAY={overlay}"], {}, gpus=8)
    assert (config.run.preset, config.run.overlay) == (preset, overlay)


@pytest.mark.parametrize("preset", PRESETS)
def test_no_row_repeats_a_default(preset):
    for name, value in PRESETS[preset].values.items():
        assert parse_value(name, value) != SETTINGS[name][1].default, name


def test_defaults_are_the_challenges_baseline():
    """The published parameter count: 9 layers of 512, 8 and 4 heads, feed-forward twice as wide, 1024 tokens."""
    done = subprocess.run([sys.executable, "train_gpt.py", "PRESET=baseline", "OVERLAY=", "PACK=0", "--plan"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "17,059,912" in done.stdout
    assert "A0 A1 A2 A3 A4<-3 A5<-2 A6<-1 A7<-0 A8" in done.stdout


def test_overlay_follows_the_machine():
    assert load_config([], {}, gpus=0).run.overlay == "tiny"
    assert load_config([], {}, gpus=1).run.overlay == ""
    assert load_config(["OVERLAY="], {}, gpus=0).run.overlay == ""


def test_packed_recipe_needs_no_environment_and_refuses_another_preset(monkeypatch):
    wanted = load_config(["PRESET=baseline", "OVERLAY=tiny", "MODEL_DIM=96", "SEED=5"], {}, gpus=0)
    monkeypatch.setattr(train_gpt, "BAKED", json.loads(json.dumps(train_gpt.baked(wanted))))
    again = load_config(["SEED=5"], {}, gpus=8)
    assert again.digest() == wanted.digest() and again.flat() == wanted.flat()
    with pytest.raises(train_gpt.ConfigError, match="the packed file was made with PRESET=baseline"):
        load_config(["PRESET=sixteen"], {}, gpus=0)
    assert load_config(["MLP_MULT=3"], {}, gpus=0).model.mlp_mult == 3


def test_baked_holds_no_seed_path_or_process_count():
    names = set(train_gpt.baked(load_config([], {}, gpus=0)))
    assert not names & {"SEED", "RUN_ID", "RUNS_PATH", "DATA_PATH", "TOKENIZER_PATH", "FROM", "STAGES", "THREADS"}
    assert {"STACK", "MATRIX_LR", "VOCAB_SIZE", "PRESET", "OVERLAY"} <= names


@pytest.mark.parametrize("words", [["PRESET=baseline", "OVERLAY="], ["OVERLAY=tiny", "MLP_MULT=2", "MATRIX_BITS=5"],
                                   ["OVERLAY=tiny", "MUON_WD=0", "SOLVER=nearest", "FIT=0", "CODEC=zlib"]])
def test_a_packed_file_repeats_its_recipe(words, monkeypatch):
    wanted = load_config(words, {}, gpus=0)
    monkeypatch.setattr(train_gpt, "BAKED", json.loads(json.dumps(train_gpt.baked(wanted))))
    for gpus in (0, 8):
        assert load_config([], {}, gpus=gpus).recipe() == wanted.recipe()


def test_from_inherits_settings_but_not_launch_settings(tmp_path):
    first = load_config(small_words("somewhere", tmp_path, RUN_ID="a", SEED=9, MODEL_DIM=64), {}, gpus=0)
    (tmp_path / "a").mkdir()
    settings = {name: list(v) if isinstance(v, tuple) else v for name, v in first.flat().items()}
    (tmp_path / "a" / "config.json").write_text(json.dumps({"settings": settings}))
    again = load_config([f"FROM={tmp_path / 'a'}", "RUN_ID=b", "EVAL_STRIDE=16"], {}, gpus=0)
    assert (again.model.model_dim, again.run.seed, again.data.data_path) == (64, 9, "somewhere")
    assert (again.run.run_id, again.eval.eval_stride) == ("b", 16)
    with pytest.raises(train_gpt.ConfigError, match="PRESET=baseline: FROM=.* was made with"):
        load_config([f"FROM={tmp_path / 'a'}", "PRESET=baseline"], {}, gpus=0)


def test_presets_text_names_every_row():
    text = train_gpt.presets_text()
    assert all(name in text for name in (*PRESETS, *OVERLAYS))


def test_import_does_nothing():
    """No environment read, no device, no file, no output, no optional import."""
    probe = ("import sys, os, builtins\n"
             "import torch, numpy, torch.distributed\n"
             "before = set(sys.modules)\n"
             "class Env(dict):\n"
             "    def get(self, key, default=None):\n"
             "        assert not sys._getframe(1).f_code.co_filename.endswith('train_gpt.py'), key\n"
             "        return dict.get(self, key, default)\n"
             "    __getitem__ = __contains__ = get\n"
             "real, opened = builtins.open, []\n"
             "builtins.open = lambda *a, **k: opened.append(a) or real(*a, **k)\n"
             "os.environ = Env(os.environ)\n"
             "import train_gpt\n"
             "assert not opened, opened\n"
             "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
             "banned = {'sentencepiece', 'zstandard', 'brotli', 'constriction', 'matplotlib', 'tqdm', 'tensorboard',"
             " 'triton', 'huggingface_hub'}\n"
             "assert not new & banned, new & banned\n"
             "assert not torch.cuda.is_initialized()\n")
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_code_outside_presets_knows_a_preset():
    text = (ROOT / "train_gpt.py").read_text()
    sections = text.split("# ==== ")
    for section in sections[2:]:
        if not section.startswith(("03", "02")):
            assert not [name for name in PRESETS if f'"{name}"' in section and name not in FORMAT_KINDS], section[:20]




@pytest.mark.parametrize("name", [name for name, (_, field) in train_gpt.SETTINGS.items()
                                  if isinstance(field.default, (float, int))])
def test_a_printed_default_reads_back_as_itself(name):
    default = train_gpt.SETTINGS[name][1].default
    assert train_gpt.parse_value(name, train_gpt.show_value(default)) == default
