"""SETTINGS: parsing, bounds, rules, the STACK language."""

import ast
import re

import pytest
from conftest import ROOT, SMALL, small_config

from train_gpt import RENAMED, RULES, SETTINGS, ConfigError, help_text, load_config, parse_stack, parse_value


def fault(*words: str, env: dict | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(words, env or {}, gpus=0)
    return str(caught.value)


@pytest.mark.parametrize("name", SETTINGS)
def test_default_survives_its_own_parser(name):
    default = SETTINGS[name][1].default
    assert parse_value(name, default) == default
    assert type(parse_value(name, default)) is type(default)


NODES = list(ast.walk(ast.parse((ROOT / "train_gpt.py").read_text())))
READS = {node.attr for node in NODES if isinstance(node, ast.Attribute)} | {
    getattr(part, "value", "") for node in NODES
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Role" for part in node.args}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_read_somewhere(name):
    """A setting that nothing reads is a lie: some attribute access outside its declaration must name it, or a role."""
    looked_up = {"PRESET", "OVERLAY"}  # chosen by name while the configuration is resolved
    assert SETTINGS[name][1].name in READS or name in looked_up


@pytest.mark.parametrize("words, said", [
    (["SED=1"], "SED=1: not a setting; did you mean SEED?"),
    (["NUM_HEADS=x"], "NUM_HEADS=x: must be a whole number"),
    (["NUM_HEADS=0"], "NUM_HEADS=0: must be at least 1"),
    (["MATRIX_BITS=9"], "MATRIX_BITS=9: must be at least 2 and at most 8 bits"),
    (["MATRIX_LR=nan"], "MATRIX_LR=nan: must be at least 0"),
    (["PACK=yes"], "PACK=yes: must be 0 or 1"),
    (["CODEC=zip"], "CODEC=zip: must be some of auto"),
    (["CODEC=zlib,zlib"], "CODEC=zlib,zlib: names something twice"),
    (["SOLVER=magic"], "SOLVER=magic: must be one of nearest, gptq"),
    (["MATRIX_FORMAT=int4"], "MATRIX_FORMAT=int4: must be one of int, uint"),
    (["ITERATIONS=1" + "0" * 400], "must be a whole number"),
    (["STAGES=train,fly"], "STAGES=train,fly: must be some of train"),
    (["EVAL=sliding,sliding"], "EVAL=sliding,sliding: names something twice"),
    (["EVAL="], "EVAL=: must name at least one of contiguous"),
    (["PRESET=nope"], "PRESET=nope: must be one of baseline"),
    (["OVERLAY=huge"], "OVERLAY=huge: must be auto"),
    (["TRAIN_SEQ_LEN=64", "TRAIN_SEQ_SCHEDULE=32@0.5,64@0.9"], "TRAIN_SEQ_SCHEDULE=32@0.5,64@0.9: must be rising"),
    (["TRAIN_SEQ_LEN=64", "TRAIN_SEQ_SCHEDULE=64@0.5,32@1"], "TRAIN_SEQ_SCHEDULE=64@0.5,32@1: must be rising"),
    (["VE_LAYERS=1;2"], "VE_LAYERS=1;2: must be numbers of blocks"),
    (["flag"], "flag: not a NAME=value word"),
    (["NUM_LAYERS=9"], "NUM_LAYERS=9: not a setting here: write STACK"),
    (["FROM=/nonexistent"], "FROM=/nonexistent: must be a run folder"),
])
def test_bad_word_is_one_clear_line(words, said):
    assert said in fault(*words)
    assert len(fault(*words).splitlines()) == 1


BROKEN_RULES = [
    ["NUM_HEADS=3"], ["NUM_KV_HEADS=3"], ["MODEL_DIM=36", "NUM_HEADS=12", "NUM_KV_HEADS=1", "ROPE_DIMS=0"],
    ["ROPE_DIMS=64"], ["SOFTCAP_TYPE=poly", "LOGIT_SOFTCAP=0"], ["POSITIONS=learned", "POSITION_ROWS=32"],
    ["CAGS=placed"], ["MATRIX_OPTIMIZER=mezo"], ["PASS_DROP=0.1"],
    ["MICRO_BATCH_TOKENS=128", "TRAIN_SEQ_LEN=96", "TRAIN_SEQ_SCHEDULE=64@0.5,96@1"], ["VE_LAYERS=4"],
    ["XSA_LAST_N=5"], ["POST_NORM=1", "PARALLEL_START_LAYER=2"], ["WD_TAPER_FINAL_MULT=0.5"], ["GATE_WINDOW=33"],
    ["TRIGRAM=1"], ["BIGRAM_VOCAB_SIZE=1"], ["ASYM_LOGIT_RESCALE=1", "LOGIT_SOFTCAP=0"],
    ["VALUE_RESIDUAL=1", "STACK=A A{kv=2}"], ["EFLA=1"], ["TITANS_DEPTH=2"], ["KNOT_BITS=64"], ["CONV_SIZE=2"],
    ["STACK=D", "ATTN_GATE=dense"], ["STACK=(A)*2", "CRAWLER_LOOP_ROPE_SCALES=3,2,1"], ["QAT_KIND=noise"],
    ["PERSISTENT_SLOTS=2"], ["TITANS_CONTEXT=1", "STACK=T{value=2}"], ["EFLA=1", "ALLOW_NEG_EIGVAL=1", "STACK=D"],
    ["LOOP_INSTRUCTIONS=flow"], ["LOOP_STATE=exact"], ["STACK=A (A)*1..3~2"],
    ["STACK=A (A)*3@0.5 (A)*1..3~2", "LOOP_STATE=exact", "LOOP_SKIPS=0"],
    ["EVAL_PASSES=2"], ["LOOP_EXIT=0.1"], ["LOOP_EXIT=0.1", "LOOP_STATE=exact", "STACK=A (A)*2"], ["EVAL=valve"],
    ["MOE_EXPERTS=2", "MLP_MULT=0"], ["MOE_EXPERTS=2", "NORM_EPS=0", "EXTRA_NORMS=1"],
    ["MOE_EXPERTS=2", "MATRIX_OPTIMIZER=mezo", "OTHER_OPTIMIZER=mezo", "EMA_DECAY=0", "COMPILE=0"],
    ["MOE_EXPERTS=2", "MOE_TOPK=2"], ["INPLACE_LAYERS=9"], ["INPLACE_LAYERS=1", "INPLACE_CHUNK=64"],
    ["MOE_EXPERTS=2", "MOE_SHARED=0", "TTT_SITES=up"],
    ["CRAWLER_TAP_DIM=2", "STACK=(A)*2 A"], ["CRAWLER_CADENCE_LATE=2", "STACK=A (A)*2"],
    ["LOOP_AWARE_GPTQ=1", "SOLVER=nearest", "STACK=(A)*2"], ["QAT_PARTS=loops", "QAT_START=0"],
    ["TRAIN_BATCH_TOKENS=300"], ["EVAL_STRIDE=65"], ["EVAL_BATCH_TOKENS=63"],
    ["TTT_CHUNK_SIZE=65", "TTT_EVAL_SEQ_LEN=64"],
    ["TTT_SHORT_SCORE_FIRST_STEPS=8:2,90:65", "TTT_EVAL_SEQ_LEN=64", "TTT_CHUNK_SIZE=8"],
    ["NGRAM_HEAD=1", "NGRAM_EVAL_ORDER=9"], ["EVAL=ngram", "EVAL_STRIDE=60"], ["TOKEN_ORDER=8,6"], ["NGRAM_GATE=head"],
    ["TTT_DOWN_LR=0.1", "TTT_SITES=q,down"], ["WARMDOWN_FRAC=0.5", "WARMDOWN_ITERS=5"],
    ["MAX_WALLCLOCK_SECONDS=5", "RESERVE_SECONDS=5"], ["RUN_ID=../x"], ["CODEC=auto,zlib"],
    ["FIT=1", "MATRIX_FORMAT=ternary", "EMBED_FORMAT=fp8"], ["GPTQ_SEQUENTIAL=1", "SOLVER=nearest"],
    ["SIGN_KEY=key.pem", "STAGES=train"], ["REFERENCE_RUN=x", "STAGES=report"], ["STAGES=evaluate"]]


@pytest.mark.parametrize("words, rule", list(zip(BROKEN_RULES, RULES, strict=True)))
def test_every_rule_has_a_failing_example(words, rule):
    names = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    settings = {**SMALL, "WARMDOWN_FRAC": "0", "WARMDOWN_ITERS": "0", **names}
    text = fault(*(f"{name}={value}" for name, value in settings.items()))
    assert rule[1].partition("=")[0] in text
    small_config()  # and the same settings without the fault are fine


def test_all_faults_are_listed_at_once():
    assert len(fault("SED=1", "NUM_HEADS=0", "PRESET=nope").splitlines()) == 3


def test_environment_near_miss_and_renamed_names_are_faults():
    assert "did you mean MATRIX_LR?" in fault(env={"MATRIX_LRR": "1"})
    assert "RESERVE_SECONDS" in fault(env={"GPTQ_RESERVE_SECONDS": "1"})
    pod = dict.fromkeys(("PATH", "HOME", "LANG", "SHELL", "PWD", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "RANK",
                         "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NCCL_DEBUG", "LD_LIBRARY_PATH",
                         "TORCHELASTIC_RUN_ID", "GROUP_RANK", "HOSTNAME", "TERM", "PYTHONPATH",
                         "VIRTUAL_ENV", "TZ", "USER", "LOGNAME", "EDITOR", "CI", "OLDPWD", "SHLVL", "NPROC"), "1")
    load_config([], pod, gpus=0)


@pytest.mark.parametrize("stack", ["A{heads=5}", "A{heads=64}", "A{heads=4,kv=3}", "D{heads=3}", "X{key=0}",
                                   "G{value=0.3}", "T{heads=64,key=0.5}"])
def test_overrides_that_do_not_fit_the_width_are_found_before_any_work(stack):
    said = fault(*(f"{name}={value}" for name, value in {**SMALL, "STACK": stack}.items()))
    assert re.search(re.escape(f"STACK={stack}: ") + "([DGXT] with )?heads=", said)


def test_words_win_over_environment():
    assert load_config(["SEED=2"], {"SEED": "1"}, gpus=0).run.seed == 2


@pytest.mark.parametrize("name", RENAMED)
def test_renamed_names_are_not_settings(name):
    assert name not in SETTINGS


def test_help_lists_every_setting():
    text = help_text()
    assert all(f"  {name} " in text for name in SETTINGS)


@pytest.mark.parametrize("stack, order", [
    ("A3", [[0, 1, 2]]),
    ("[A]2 A", [[0, 1, 2]]),
    ("[A2]2", [[0, 1, 2, 3]]),
    ("(A)*3", [[0, 0, 0]]),
    ("A (A2)*2 A", [[0, 1, 2, 1, 2, 3]]),
    ("A3 (A3)*3@0.35 A5", [[*range(11)], [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]]),
    ("(A2)*2@0.5*3@0.65", [[0, 1], [0, 1, 0, 1], [0, 1, 0, 1, 0, 1]]),
    ("[(A)*2]2", [[0, 0, 1, 1]]),
])
def test_stack_order(stack, order):
    from train_gpt import plan_layers
    phases = plan_layers(small_config(STACK=stack).model)
    assert [[step.block for step in phase.steps] for phase in phases] == order


@pytest.mark.parametrize("stack", [
    "", "Q", "A{", "A{x=1}", "A{mlp=}", "A0", "(A)", "(A)*0", "(A)*2@1", "(A)*3@0.5*2@0.6", "(A)*2@0.5*3@0.4", "[A]",
    "[A]0",
    "(A", "A)", "[A)2", "()*2", "((A)*2)*2", "A4 x", "A600", "(A512)*9", "A 3", "(A)*2@", "(A)*0..4~2",
    "(A)*1..4~5", "(A)*1..4", "(A)*4..1~2", "(A)*1..4~2@0.5", "[A]99999",
    "A99999999999", "A3 A0",
    "(A3)*3@0.35.5", "(A)*2@.", "A{heads=0}", "A{kv=0}", "A{heads=2.5}", "D{conv=1.5}", "D{conv=900}", "A{key=2}",
    "D{kv=3}", "G{xsa=1}", "D{gate=2}", "B",
    "(A)*2@0.1*3@0.2*4@0.3*5@0.4*6@0.5*7@0.6*8@0.7*9@0.8*10@0.9"])
def test_bad_stack_is_a_clear_fault(stack):
    with pytest.raises(ConfigError, match="STACK="):
        parse_stack(stack)


def test_stack_overrides_reach_the_block():
    from conftest import make_model
    model = make_model(small_config(STACK="A{mlp=0} A{mlp=3,heads=4,kv=2}"))
    assert model.blocks[0].mlp is None
    assert model.blocks[1].mlp.up.weight.shape == (96, 32)
    assert model.blocks[1].mixer.k.weight.shape == (16, 32)
    model = make_model(small_config(STACK="G{mlp=0,heads=4,key=0.5,value=2,conv=0,gate=0} D A{xsa=1} A{xsa=0}",
                                    XSA_LAST_N=1))
    mixer, plain = model.blocks[0].mixer, model.blocks[1].mixer
    assert mixer.q.weight.shape == (16, 32) and mixer.v.weight.shape == (64, 32) and len(mixer.gates) == 8
    assert mixer.gate is None and not mixer.convs and model.blocks[0].mlp is None
    assert plain.gate.weight.shape == (32, 32) and plain.convs["k"].shape == (32, 4)
    assert [model.blocks[i].mixer.plan.exclusive for i in (2, 3)] == [True, False]
