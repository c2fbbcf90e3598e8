"""What is told of a published plan is what the code has."""

import re

import pytest

from tools import explain
from train_gpt import MIXERS, PRESETS, SETTINGS, load_config

# The groups of keys of Chimera 5.1's configuration, and what of them stands under its quantization and backbone.
GROUPS = ("hidden_size", "hidden_act", "initializer_range", "rms_norm_before_every_linear", "vocab", "max_position",
          "tie_word_embeddings", "method", "activation_bits", "runtime_kernel", "sherry_mode", "hgf_correction",
          "layer_pattern", "kv_cache", "gated_deltanet", "efla", "xlstm", "titans", "tsp_span_knot", "moe", "looping",
          "span_inference", "grammar", "semantic_memory", "entropy_valve", "debt_ledger", "self_evolution",
          "braid_state", "modes", "generation", "training phases", "byte_level", "deployment", "memory_budget", "files",
          "diagnostics", "context_tiers", "multimodal", "safety", "P3_ternary_compute")


@pytest.mark.parametrize("name", explain.TABLES)
def test_what_is_built_names_settings_that_there_are(name):
    """A setting that is on in the preset is its own, one that is told to be off is not, and what is not built has no
    setting that would do it."""
    config = load_config([f"PRESET={name}", "OVERLAY="], {}, gpus=0).flat()
    for row in explain.TABLES[name]:
        assert row.verdict in (explain.BUILT, explain.PART, explain.LEFT_OUT)
        assert set(row.settings) <= set(SETTINGS), row.keys
        assert row.settings or "./run.sh " in row.text or row.verdict != explain.BUILT, row.keys
        if re.search(r"\boff\b", row.text) and row.keys != "quantization: sherry_mode":
            for setting in row.settings:
                assert config[setting] == SETTINGS[setting][1].default, (row.keys, setting)
    assert config["MATRIX_FORMAT"] == "ternary"


def test_every_group_of_the_plan_has_a_row_and_letters_are_mixers():
    keys = " ".join(row.keys for row in explain.TABLES["chimera"])
    assert [group for group in GROUPS if group not in keys] == []
    told = next(row.text for row in explain.TABLES["chimera"] if row.keys == "backbone: layer_pattern")
    assert set(re.findall(r"\b([A-Z]) ", told)) <= set(MIXERS)
    assert set(MIXERS) - set(re.findall(r"\b([A-Z]) ", told)) <= {"D"}  # the plain delta rule is not in the plan


def test_text_fits_a_terminal_and_mistakes_are_one_line(capsys):
    assert max(map(len, explain.text("chimera").splitlines())) <= 120
    assert explain.main(["chimera"]) == 0 and "built" in capsys.readouterr().out
    assert explain.main(["nothing"]) == 2 and capsys.readouterr().err.count("\n") == 1
    assert set(explain.TABLES) <= set(PRESETS)
