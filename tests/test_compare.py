"""Paired comparison: statistics against known values, the laws of the shape rule, and the engine with launches that are
played: their order, what is used again, what a failure leaves, the tables."""

import json
import math
import os
import subprocess
from types import SimpleNamespace

import prepare
import pytest
from conftest import ROOT

import train_gpt as gpt
from tools import bench, compare, readme

OPTIONS = {"PRESETS": ["baseline", "sixteen"], "BASE": "", "EVAL": ["contiguous"], "SEEDS": [1, 2], "SECONDS": 150,
           "BYTES": 1_000_000, "FIT_BITS": 3.75, "MINUTES": 75, "ROWS": [], "ROW": [], "words": []}
CODE_BYTES = 50_000


class Played:
    """Launches that write what a finished run leaves; `bits` says the score of (run name, evaluator), None fails."""

    def __init__(self, folder, bits, **facts):
        self.bits, self.facts, self.names, self.seconds, self.source = bits, facts, [], 0.0, "as it was"
        self.lab = compare.Lab(lambda words: None, self.pack, self.launch, folder, {}, lambda: self.seconds,
                               lambda: self.source)

    def pack(self, config):
        return f"# made {len(self.names):04}\n{sorted(gpt.baked(config).items())}".encode().ljust(CODE_BYTES)

    def launch(self, words, out):
        config = gpt.load_config(words, {})
        name, folder = config.run.run_id, out.parent / config.run.run_id
        self.names.append(name)
        self.seconds += 240
        assert str(out.parent) == config.run.runs_path and out.stem == name
        scores = {kind: self.bits(name, kind) for kind in config.eval.eval}
        if None in scores.values():
            return ["exit code 3: it ends with:", "  the last line"]
        data = {"path": config.data.data_path, "val_documents": 60, "val_document_bytes": 1_146_846, "disjoint": {
            "method": prepare.TEXT_HASH, "train_documents": 600, "val_documents": 60, "train_digest": "a",
            "val_digest": "b"}}
        result = {"config_hash": config.digest(), "commit": "0123456789abcdef+", "data": data,
                  "declared": {"modes": []},
                  "scores": {kind: {"val_bpb": value} for kind, value in scores.items()},
                  "artifact": {"total_bytes": 990_000 + config.run.seed},
                  "train": {"steps": 900, "tokens_per_second": 20_000.0}, "budget": {"train_seconds": 149.5},
                  "environment": {"cpu": "a CPU", "threads": 2, "torch": "2.13.0"}, **self.facts}
        if "report" not in config.run.stages:  # which writes these
            del result["config_hash"], result["commit"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train_gpt.py").write_bytes(self.pack(config))
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "config.json").write_text(json.dumps({"settings": {
            name: gpt.show_value(value) for name, value in config.flat().items()}}))
        return []

    def presets(self, **more):
        """The tables of `presets`, and what it says in the end."""
        return collect(compare.presets({**OPTIONS, **more}, self.lab))

    def parts(self, **more):
        """The tables of `parts` on baseline, and what it says in the end."""
        return collect(compare.parts({**OPTIONS, "BASE": "baseline", **more}, self.lab))


@pytest.fixture(autouse=True)
def shapes_once(monkeypatch, found={}):  # noqa: B006 - what is the same in all tests is searched for once
    """The search of a shape with its answers kept."""
    search = compare.find_shape

    def kept(words, *rest):
        key = (*words, *map(str, rest))
        if key not in found:
            found[key] = search(words, *rest)
        return found[key]

    monkeypatch.setattr(compare, "find_shape", kept)


def collect(tables):
    found = []
    try:
        for fields in tables:
            found.append(bench.Table(*fields))
    except gpt.ConfigError as error:
        return found, str(error)
    return found, ""


def by_system(name, kind):
    """Scores that differ a little from seed to seed and much from preset to preset."""
    variant, seed = name.rsplit("_", 1)
    return {"baseline": 2.0, "sixteen": 1.9}.get(variant, 2.0) + 0.01 * int(seed) - (kind == "sliding") * 0.05


# ---- statistics


@pytest.mark.parametrize(("freedom", "share", "known"), [
    (1, 0.95, 12.7062), (2, 0.95, 4.30265), (3, 0.95, 3.18245), (4, 0.95, 2.77645), (5, 0.95, 2.57058),
    (9, 0.95, 2.26216), (10, 0.95, 2.22814), (29, 0.95, 2.04523), (30, 0.95, 2.04227), (120, 0.95, 1.97993),
    (1, 0.99, 63.6567), (2, 0.99, 9.92484), (5, 0.90, 2.01505), (10, 0.5, 0.69981)])
def test_t_quantile_has_the_values_of_the_printed_tables(freedom, share, known):
    assert compare.t_quantile(freedom, share) == pytest.approx(known, rel=3e-6)


def test_a_paired_interval_by_hand():
    ours, theirs = {1: 1.0, 2: 2.0, 3: 4.0, 9: 7.0}, {1: 1.5, 2: 2.1, 3: 4.3, 8: 0.0}
    found = compare.paired(ours, theirs)  # differences -0.5, -0.1, -0.3: mean -0.3, deviation 0.2
    assert (found.mean, found.deviation, found.count) == (pytest.approx(-0.3), pytest.approx(0.2), 3)
    assert found.half == pytest.approx(4.30265 * 0.2 / math.sqrt(3), rel=1e-5) and found.verdict == "not decided"
    assert compare.paired(theirs, ours).mean == pytest.approx(0.3)


def test_verdicts_need_the_whole_interval():
    said = [compare.interval(values).verdict for values in
            ([-1.0, -1.1, -1.2], [1.0, 1.1, 1.2], [-1.0, 1.1, -1.2], [-1.0], [], [0.0, 0.0], [-0.1, -0.1])]
    assert said == ["better", "worse", "not decided", "not decided", "not decided", "not decided", "better"]
    assert compare.interval([]) == (None, None, None, 0) and compare.interval([2.0]) == (2.0, None, None, 1)


# ---- the shape rule


@pytest.mark.parametrize("size", [400_000, 1_000_000, 4_000_000])
@pytest.mark.parametrize("preset", gpt.PRESETS)
def test_the_shape_is_the_widest_within_the_bytes(preset, size):
    words = [f"PRESET={preset}", "OVERLAY=tiny"]
    width, heads, kv = (int(word.partition("=")[2]) for word in compare.find_shape(words, {}, CODE_BYTES, size, 3.75))
    sizes = []
    for step in range(2):
        with_shape = gpt.load_config([*words, *compare.shape_words(width + step * compare.WIDTH_STEP)], {})
        sizes.append(compare.rule_bytes(with_shape, CODE_BYTES, 3.75))
    assert sizes[0] <= size < sizes[1] and kv == 1
    assert width % heads == 0 and width // heads % 2 == 0 and width // heads >= compare.LEAST_PART
    assert not any(width % more == 0 and width // more % 2 == 0 and width // more >= compare.LEAST_PART
                   for more in range(heads + 1, width))
    assert f"multiple of {compare.WIDTH_STEP} " in compare.shape_rule(size, 3.75) and f"{size:,} bytes" in (
        compare.shape_rule(size, 3.75))


def test_what_fit_will_fill_is_counted_at_so_many_bits():
    config = gpt.load_config(["PRESET=sixteen", "OVERLAY=tiny"], {})
    count = sum(gpt.count_roles(gpt.make_skeleton(config)).values())
    assert config.artifact.fit and compare.rule_bytes(config, 7, 4.0) == count / 2 + 7
    plain = gpt.with_settings(config, {"FIT": 0})
    planned = gpt.forecast_fitted(gpt.make_skeleton(plain), plain.artifact, 7)
    assert compare.rule_bytes(plain, 7, 4.0) == pytest.approx(sum(planned.values()) + 7)


def test_bytes_too_few_for_any_width_are_one_line():
    words = ["PRESET=baseline", "OVERLAY=tiny"]
    with pytest.raises(gpt.ConfigError, match=r"^BYTES=60000: no width is within it for PRESET=baseline OVERLAY=tiny"):
        compare.find_shape(words, {}, CODE_BYTES, 60_000, 3.75)
    with pytest.raises(gpt.ConfigError, match=r"^BYTES=1: .*NUM_KV_HEADS=1: must divide|^BYTES=1: .*ROPE_DIMS"):
        compare.find_shape([*words, "ROPE_DIMS=8192"], {}, CODE_BYTES, 1, 3.75)


def test_widths_that_a_preset_cannot_have_are_passed_over():
    words = ["PRESET=baseline", "OVERLAY=tiny", "ROPE_DIMS=74"]  # two heads of 74 and more, or one
    shape = compare.find_shape(words, {}, CODE_BYTES, 1_000_000, 3.75)
    assert shape[:2] == ["MODEL_DIM=152", "NUM_HEADS=2"]


# ---- the engine


def test_runs_go_seed_by_seed_through_the_variants(tmp_path, capsys):
    played = Played(tmp_path, by_system)
    (shapes, runs, differences), said = played.presets(SEEDS=[1, 2, 3])
    assert played.names == [f"{name}_{seed}" for seed in (1, 2, 3) for name in ("baseline", "sixteen")] and not said
    shape = {row["variant"]: row for row in shapes.json()["rows"]}
    assert shapes.title.startswith("Shapes: MODEL_DIM is the largest multiple of")
    assert all(row["bytes by the rule"] <= 1e6 and row["code"] == CODE_BYTES for row in shape.values())
    seen = {(row["variant"], row["seed"]): row for row in runs.json()["rows"]}
    assert seen["sixteen", "2"]["contiguous"] == 1.92 and seen["baseline", "mean of 3"]["contiguous"] == (
        pytest.approx(2.02))
    (row,) = differences.json()["rows"]
    assert row["minus"] == "baseline" and row["mean"] == pytest.approx(-0.1) and row["sixteen is"] == "better"
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "1/6 baseline seed 1: 240 s, contiguous 2.0100; at most 20 minutes left"
    assert lines[-1] == "6/6 sixteen seed 3: 240 s, contiguous 1.9300"


def test_every_run_has_the_same_seconds_evaluators_and_seed_and_its_own_shape(tmp_path):
    played = Played(tmp_path, by_system)
    played.presets(SEEDS=[5], EVAL=["contiguous", "sliding"], words=["MATRIX_LR=0.03", "OVERLAY=tiny"], SECONDS=99)
    results = [*tmp_path.glob("*/*/result.json")]
    assert {path.parent.name for path in results} == {"baseline_5", "sixteen_5"}
    config = compare.make_variant("x", ["PRESET=sixteen", "OVERLAY=tiny", "MATRIX_LR=0.03"], {**OPTIONS, "SECONDS": 99},
                                  played.lab).config
    assert config.train.max_wallclock_seconds == 99 and config.artifact.target_bytes == 1_000_000
    assert config.optim.matrix_lr == 0.03 and config.model.num_kv_heads == 1 and config.eval.eval_budget_seconds == 0
    plain = compare.make_variant("x", ["PRESET=baseline", "OVERLAY=tiny"], OPTIONS, played.lab).config
    assert plain.artifact.target_bytes == gpt.LIMIT_BYTES and plain.model.model_dim < config.model.model_dim


def test_finished_runs_are_used_again(tmp_path, capsys):
    first = Played(tmp_path, by_system)
    first.presets(SEEDS=[1])
    more = Played(tmp_path, by_system)
    (_, runs, _), _ = more.presets(SEEDS=[2, 1])
    assert more.names == ["baseline_2", "sixteen_2"] and "2 were there already" in runs.note
    assert "baseline seed 1: there already, contiguous 2.0100" in capsys.readouterr().err
    # Another setting, a damaged result or another program is another run.
    for change in ({"SECONDS": 99}, {"words": ["MATRIX_LR=0.03"]}, {"EVAL": ["sliding"]}):
        other = Played(tmp_path, by_system)
        other.presets(SEEDS=[1], **change)
        assert other.names == ["baseline_1", "sixteen_1"], change
    (path,) = tmp_path.glob("*/baseline_2/result.json")
    whole = json.loads(path.read_text())
    for damage in ("{", json.dumps({**whole, "config_hash": "another"}), json.dumps({**whole, "scores": {}})):
        path.write_text(damage)
        again = Played(tmp_path, by_system)
        again.presets()
        assert again.names == ["baseline_2"]
    path.with_name("train_gpt.py").write_text("# made 0\nanother program")
    again = Played(tmp_path, by_system)
    again.presets()
    assert again.names == ["baseline_2"]


def test_a_failed_run_is_reported_and_leaves_the_rest(tmp_path, capsys):
    played = Played(tmp_path, lambda name, kind: None if name == "sixteen_2" else by_system(name, kind))
    (_, runs, differences), said = played.presets(SEEDS=[1, 2, 3])
    assert said == "sixteen seed 2: exit code 3: it ends with:\n  the last line"
    rows = {(row["variant"], row["seed"]): row for row in runs.json()["rows"]}
    assert rows["sixteen", "2"]["contiguous"] is None and rows["sixteen", "mean of 2"]["contiguous"] == (
        pytest.approx(1.92))
    assert "NOT ALL: 1 runs are missing" in runs.note and differences.json()["rows"][0]["seeds"] == 2
    assert "4/6 sixteen seed 2: 240 s, FAILED" in capsys.readouterr().err
    played = Played(tmp_path / "none", lambda name, kind: None)
    (_, runs, differences), said = played.presets()
    assert said.count("exit code 3") == 4 and differences.json()["rows"][0]["sixteen is"] == "not decided"
    assert "no run is finished" in runs.text()


def test_no_run_is_begun_that_would_end_too_late_or_with_another_source(tmp_path):
    played = Played(tmp_path, by_system)
    tables, said = played.presets(SEEDS=[1, 2, 3], MINUTES=13)
    assert len(played.names) == 3 and len(tables) == 3
    assert said == "MINUTES=13: 3 runs are left; the same command goes on with them"
    played = Played(tmp_path / "other", by_system)
    launch = played.lab.launch

    def edit(words, out):
        played.source = "edited"
        return launch(words, out)

    played.lab = played.lab._replace(launch=edit)
    assert played.presets()[1] == "train_gpt.py: changed since the command began; 3 runs are left for a new one"
    assert played.names == ["baseline_1"]


def test_an_interruption_is_one_line(tmp_path):
    played = Played(tmp_path, by_system)

    def interrupt(words, out):
        raise KeyboardInterrupt

    played.lab = played.lab._replace(launch=interrupt)
    said = played.presets()[1]
    assert said.startswith("interrupted in ") and said.endswith("baseline_1: the same command goes on there")


def test_what_is_not_equal_is_said_first(tmp_path):
    facts = {"artifact": {"total_bytes": 1_020_000}, "budget": {"train_seconds": 153.0},
             "declared": {"modes": ["TTT_WARM_START_A=1: adapters"]}}
    note = Played(tmp_path, by_system, **facts).presets()[0][1].note
    assert note.startswith("baseline: +2.00% over BYTES; baseline: trained for 153.0 seconds; baseline declares "
                           "TTT_WARM_START_A=1: adapters; sixteen: +2.00%")
    data = {"path": "elsewhere", "val_document_bytes": 1, "disjoint": {
        "method": prepare.TOKEN_HASH, "train_documents": 600, "val_documents": 60}}
    played = Played(tmp_path / "data", by_system)
    played.presets(SEEDS=[1])
    played.facts["data"] = data
    assert played.presets()[0][1].note.startswith("NOT THE SAME DOCUMENTS: ./data/datasets/wikitext2_sp2048, elsewhere")


def test_documents_are_the_same_by_their_bytes_where_these_are_known():
    def dataset(method, digest, documents=600, size=9):
        return {"val_document_bytes": size, "disjoint": {
            "method": method, "train_documents": documents, "val_documents": 3, "train_digest": digest,
            "val_digest": "v"}}

    text, tokens = prepare.TEXT_HASH, prepare.TOKEN_HASH
    assert compare.same_documents([dataset(text, "a"), dataset(text, "a")]) and compare.same_documents([])
    assert not compare.same_documents([dataset(text, "a"), dataset(text, "b")])
    assert compare.same_documents([dataset(text, "a"), dataset(tokens, "b")])
    assert not compare.same_documents([dataset(tokens, "a"), dataset(tokens, "a", 601)])
    assert not compare.same_documents([dataset(tokens, "a"), dataset(tokens, "a", size=8)])


@pytest.mark.parametrize(("more", "start"), [
    ({"words": ["SEED=3"]}, "SEED=3: must be left to SEEDS"),
    ({"words": ["MODEL_DIM=64"]}, "MODEL_DIM=64: must be left to the rule of BYTES"),
    ({"words": ["EVAL_BUDGET_SECONDS=9"]}, "EVAL_BUDGET_SECONDS=9: must be left to the comparison"),
    ({"words": ["MATRIX_LR=x"]}, "MATRIX_LR=x: must be a number"),
    ({"BASE": "nothing"}, "BASE=nothing: must be one of PRESETS=baseline,sixteen"),
    ({"words": ["RESERVE_SECONDS=200"]}, "RESERVE_SECONDS=200.0: must be less than MAX_WALLCLOCK_SECONDS=150"),
    ({"BYTES": 9}, "BYTES=9: no width is within it"),
])
def test_mistakes_are_one_line_before_any_run(tmp_path, more, start):
    played = Played(tmp_path, by_system)
    tables, said = played.presets(**more)
    assert said.startswith(start) and "\n" not in said and not tables and not played.names


# ---- parts


def test_parts_are_sorted_by_their_difference_to_the_base(tmp_path):
    change = {"base": 0.0, "worse": 0.3, "better": -0.2, "again": 0.001}
    bits = lambda name, kind: None if name.startswith("bad") else 2.0 + change[name.rsplit("_", 1)[0]] + (  # noqa: E731
        0.01 * int(name[-1]) * (1 + (kind == "sliding")))
    rows = [("bad", ["MATRIX_LR=0.5"]), ("worse", ["MATRIX_LR=0.1"]), ("better", ["MODEL_DIM=160", "NUM_HEADS=2"])]
    played = Played(tmp_path, bits)
    (shapes, runs, table), said = played.parts(ROWS=["again"], ROW=rows, EVAL=["contiguous", "sliding"])
    assert played.names == [f"{name}_{seed}" for seed in (1, 2) for name in (
        "base", "again", "bad", "worse", "better")] and said.count("bad seed") == 2
    widths = {row["variant"]: row["MODEL_DIM"] for row in shapes.json()["rows"]}
    assert widths["base"] == widths["worse"] == 152 and widths["better"] == 160
    found = table.json()["rows"]
    assert [row["row"] for row in found] == ["better", "base", "again", "worse", "bad"]
    assert found[0]["contiguous minus base"] == pytest.approx(-0.2) and found[0]["sliding is"] == "better"
    assert found[0]["changed"] == "MODEL_DIM=160 NUM_HEADS=2" and found[3]["contiguous is"] == "worse"
    assert found[1]["contiguous is"] == "base" and found[4]["contiguous"] is None and "mean of 2" in runs.text()
    # A row more costs its own runs.
    played = Played(tmp_path, lambda name, kind: 2.0)
    played.parts(ROW=[*rows[1:], ("new", ["MLP_MULT=3"])], EVAL=["contiguous", "sliding"], SEEDS=[1])
    assert played.names == ["new_1"]


def test_all_rows_of_the_table_can_be_run(tmp_path):
    played = Played(tmp_path, lambda name, kind: 2.0)
    (_, _, table), said = played.parts(BASE=gpt.SETTINGS["PRESET"][1].default, SEEDS=[1], MINUTES=600.0)
    assert not said and {row["row"] for row in table.json()["rows"]} == {"base", *compare.ROWS}
    assert bench.COMMANDS["parts"].options["ROWS"].default == []
    assert all(name.replace("-", "").isalnum() for name in compare.ROWS)


def test_the_crawlers_rows_can_be_run_and_some_find_their_own_shape(tmp_path):
    """Those that spend the base's bytes otherwise are as wide as the rule allows; the others keep the base's width."""
    scores = {"contiguous": {"val_bpb": 2.0}, "float": {"val_bpb": 2.1}}
    played = Played(tmp_path, lambda name, kind: 2.0, scores=scores)
    suite, options = compare.SUITES["crawler"], {**OPTIONS, "BASE": "clowncar", "SEEDS": [1], "MINUTES": 600.0}
    (shapes, _, table, squeezes), said = collect(compare.parts(options, played.lab, suite))
    assert not said and {row["row"] for row in table.json()["rows"]} == {"base", *compare.CRAWLER_ROWS}
    found = {row["variant"]: row for row in shapes.json()["rows"]}
    widths = {name: row["MODEL_DIM"] for name, row in found.items()}
    assert {widths[name] for name in found if name not in compare.OWN_SHAPE} == {widths["base"]}
    for name in compare.OWN_SHAPE:
        assert widths[name] < widths["base"] and 0.9e6 < found[name]["bytes by the rule"] <= 1e6, name
    assert found["delta-memory"]["parameters"] > found["base"]["parameters"] > found["one-pass"]["parameters"]
    assert "but delta, flat" in shapes.text() and "own" in shapes.text()
    # What is squeezed again costs no training, is kept, and is compared with the float weights of its own run.
    assert [row["row"] for row in squeezes.json()["rows"]] == ["base", "one-pass", "two-passes", "eight-passes",
                                                               "noise", "straight-through"]
    assert squeezes.json()["rows"][0]["int4"] == pytest.approx(-0.1)
    assert "int3 is MATRIX_BITS=3 POLICY=" in squeezes.note
    assert played.names[-1] == "straight-through_1_int3" and "base_1_int5" in played.names
    before = len(played.names)
    collect(compare.parts({**options, "ROWS": ["one-pass"]}, played.lab, suite))
    assert len(played.names) == before


def test_the_ternary_rows_can_be_run(tmp_path):
    """Formats of other sizes find their own shape; a fact that a run does not have is left out."""
    played = Played(tmp_path, lambda name, kind: 2.0)
    suite, options = compare.SUITES["ternary"], {**OPTIONS, "BASE": "jamone", "SEEDS": [1], "MINUTES": 600.0,
                                                 "BYTES": 250_000}
    played.facts["train"] = {"steps": 9, "tokens_per_second": 1.0, "trits": {"zeros": 0.4, "bits": 1.5}}
    (shapes, _, table), said = collect(compare.parts(options, played.lab, suite))
    assert not said and {row["row"] for row in table.json()["rows"]} == {"base", *compare.TERNARY_ROWS}
    assert all(row["bits a trit"] == 1.5 and row["zeros"] == 0.4 for row in table.json()["rows"])
    widths = {row["variant"]: row["MODEL_DIM"] for row in shapes.json()["rows"]}
    assert widths["binary"] > widths["base"] > widths["distinct-2"] > widths["distinct-8"]
    assert {widths[name] for name in widths if name not in compare.TERNARY_OWN_SHAPE} == {widths["base"]}
    del played.facts["train"]
    (_, _, table), _ = collect(compare.parts({**options, "SEEDS": [2], "ROWS": ["binary"]}, played.lab, suite))
    assert table.json()["rows"][0]["bits a trit"] is None


def test_the_hybrid_rows_can_be_run(tmp_path):
    """With the suite's own bytes, and some artifacts evaluated otherwise."""
    played, suite = Played(tmp_path, lambda name, kind: 2.0), compare.SUITES["hybrid"]
    options = {**OPTIONS, "BASE": suite.base, "SEEDS": [1], "MINUTES": 600.0, "BYTES": suite.size}
    (shapes, _, table, again), said = collect(compare.parts(options, played.lab, suite))
    assert not said and {row["row"] for row in table.json()["rows"]} == {"base", *compare.HYBRID_ROWS}
    widths = {row["variant"]: row["MODEL_DIM"] for row in shapes.json()["rows"]}
    assert {widths[name] for name in widths if name not in compare.HYBRID_OWN_SHAPE} == {widths["base"]}
    assert widths["distinct"] < widths["base"] <= widths["attention"]
    assert [row["row"] for row in again.json()["rows"]] == ["base"]
    assert again.json()["rows"][0]["valve"] == 0 and played.names[-1] == "base_1_valve"


def test_the_squeeze_costs_the_artifact_minus_the_float_weights():
    scores = {"contiguous": {"val_bpb": 2.25}, "float": {"val_bpb": 2.0}}
    assert compare.squeeze_gap({"scores": scores}) == 0.25
    assert math.isnan(compare.squeeze_gap({"scores": {"ttt": scores["float"]}}))


@pytest.mark.parametrize(("text", "expected"), [
    ("wide: MODEL_DIM=256 NUM_HEADS=4", [("wide", ["MODEL_DIM=256", "NUM_HEADS=4"])]),
    ("loop:STACK=A1 (A2)*2@0.5 A1  MLP_MULT=3", [("loop", ["STACK=A1 (A2)*2@0.5 A1", "MLP_MULT=3"])]),
    ("policy: POLICY=*.q.weight: int8 k=14; gate: fp16", [("policy", ["POLICY=*.q.weight: int8 k=14; gate: fp16"])]),
    ("again:", [("again", [])])])
def test_a_row_of_ones_own(text, expected):
    assert compare.read_row(text) == expected


@pytest.mark.parametrize("text", ["nocolon", "two words: A=1", "x: lower=1", ": A=1", "x: A=1B b", "\u00e9: A=1"])
def test_a_row_that_cannot_be_read(text):
    if text == "x: A=1B b":  # a value may have blanks: the trainer judges it
        assert compare.read_row(text) == [("x", ["A=1B b"])]
    else:
        with pytest.raises(ValueError):
            compare.read_row(text)


@pytest.mark.parametrize(("more", "start"), [
    ({"ROW": [("a", []), ("a", [])]}, "ROW=a: must be a name that no other row has"),
    ({"ROW": [("base", [])]}, "ROW=base: must be a name"), ({"ROW": [("a", ["SEED=1"])]}, "SEED=1: must be left to"),
    ({"ROW": [("a", ["EVAL=ttt"])]}, "EVAL=ttt: must be left to the option EVAL"),
    ({"ROW": [("a", ["NO_SUCH=1"])]}, "NO_SUCH=1: not a setting")])
def test_mistakes_in_a_row_are_one_line(tmp_path, more, start):
    tables, said = Played(tmp_path, by_system).parts(**more)
    assert said.startswith(start) and "\n" not in said and not tables


# ---- text


RUNS_TEXT = """
Presets on equal terms: bits per byte, 150 seconds of training, 1,000,000 bytes, the same documents and seeds
variant   seed       contiguous  sliding  artifact bytes  steps  tokens/s  train s  run
---------------------------------------------------------------------------------------
baseline  1              2.0100   1.9600         990,001    900    20,000    149.5  A/baseline_1
baseline  2              2.0200   1.9700         990,002    900    20,000    149.5  A/baseline_2
baseline  mean of 2      2.0150   1.9650         990,002    900    20,000    149.5
sixteen   1              1.9100   1.8600         990,001    900    20,000    149.5  B/sixteen_1
sixteen   2                   -        -               -      -         -        -  B/sixteen_2
sixteen   mean of 1      1.9100   1.8600         990,001    900    20,000    149.5
a CPU, 2 threads, torch 2.13.0; commit 0123456789ab+; 3 runs in 16 minutes, 0 were there already; NOT ALL: 1 runs are \
missing"""
DIFFERENCES_TEXT = """
Differences: sixteen minus the other preset, bits per byte
minus     evaluator      mean      +-  deviation  seeds  sixteen is
-------------------------------------------------------------------
baseline  contiguous  -0.1000  0.0000     0.0000      2  better
baseline  sliding     -0.1000  0.0000     0.0000      2  better
""" + compare.INTERVALS


def test_the_text_of_the_tables(tmp_path):
    played = Played(tmp_path, lambda name, kind: None if name == "sixteen_2" else by_system(name, kind))
    (_, runs, _), _ = played.presets(EVAL=["contiguous", "sliding"])
    text = runs.text()
    for name, letter in (("baseline_1", "A"), ("sixteen_1", "B")):
        (folder,) = tmp_path.glob(f"*/{name}")
        text = text.replace(folder.parent.name, letter)
    assert text == RUNS_TEXT
    (_, _, differences), _ = Played(tmp_path, by_system).presets(EVAL=["contiguous", "sliding"])
    assert differences.text() == DIFFERENCES_TEXT


def test_the_command_line_hands_its_options_on(tmp_path, monkeypatch, capsys):
    seen, fields = [], ("T", {"a": "d"}, [[1]], "n")
    for name in ("presets", "parts"):
        monkeypatch.setattr(compare, name, lambda options, suite=None: (seen.append(options), iter([fields]))[1])
    out = tmp_path / "out.json"
    words = ["PRESETS=sixteen,baseline", "SEEDS=4,7", "SECONDS=30", "EVAL=sliding", "MATRIX_LR=0.1", "OVERLAY="]
    assert bench.main(["presets", *words, "--json", str(out)]) == 0
    assert bench.main(["parts", "ROW=a: MLP_MULT=3", "ROW=b:", "ROWS=no-*", "--json", str(out)]) == 0
    presets, parts = seen
    assert (presets["PRESETS"], presets["SEEDS"], presets["SECONDS"]) == (["baseline", "sixteen"], [4, 7], 30)
    assert presets["words"] == ["MATRIX_LR=0.1", "OVERLAY="] and presets["EVAL"] == ["sliding"]
    assert (presets["BYTES"], presets["FIT_BITS"], presets["MINUTES"]) == (1_000_000, 3.75, 75)
    assert parts["ROW"] == [("a", ["MLP_MULT=3"]), ("b", [])] and parts["EVAL"] == ["contiguous"]
    assert parts["ROWS"] == [name for name in compare.ROWS if name.startswith("no-")]
    assert json.loads(out.read_text())["tables"] == [{"title": "T", "rows": [{"a": 1}], "note": "n"}]
    assert bench.COMMANDS["presets"].options["EVAL"].default == ["contiguous", "sliding", "ttt"]
    assert {bench.COMMANDS[name].record for name in ("presets", "parts")} == {
        "compare_presets.json", "compare_parts.json"}
    capsys.readouterr()
    for words, start in ((["presets", "SEEDS=1,1"], "SEEDS=1,1: must be different whole numbers"),
                         (["presets", "PRESETS=nothing"], "PRESETS=nothing: must be some of"),
                         (["presets", "runs/x"], "runs/x: bench presets takes no run folder"),
                         (["parts", "BASE=nothing"], "BASE=nothing: must be one of"),
                         (["parts", "ROW=x"], "ROW=x: must be NAME: SETTING=value"),
                         (["parts", "NO_SUCH=1"], "NO_SUCH=1: must be one of BASE")):
        assert bench.main(words) == 2
        said = capsys.readouterr().err
        assert said.startswith(start) and said.count("\n") == 1


# ---- the real launches, with a program of our own in place of run.sh


def test_a_launch_is_run_sh_with_the_own_interpreter(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    script = tmp_path / "run.sh"
    script.write_text('#!/bin/sh\necho "$PYTHON|$PACK|$OPENBLAS_NUM_THREADS|$*"\npwd\n')
    script.chmod(0o755)
    out = tmp_path / "x_1.out"
    assert compare.launch(["A=1", "B=2 3"], out) == []
    first, where = out.read_text().splitlines()
    assert first == f"{compare.sys.executable}|1||A=1 B=2 3" and os.path.samefile(where, tmp_path)
    script.write_text("#!/bin/sh\nfor i in 1 2 3 4 5; do echo line $i; echo; done >&2\nexit 3\n")
    assert compare.launch([], out) == [f"exit code 3: {out} ends with:", "  line 3", "  line 4", "  line 5"]


def test_a_run_that_outlived_its_command_is_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    script, out = tmp_path / "run.sh", tmp_path / "x_1.out"
    script.write_text('#!/bin/sh\n(sleep 1; echo old) &\n[ -z "$1" ] || echo new\n')
    script.chmod(0o755)
    compare.launch([], out)  # it ends while a process that it began holds its lock
    compare.launch(["second"], out)
    assert out.read_text().splitlines()[:2] == ["old", "new"]
    assert "x_1: a run of an earlier command is still at it" in capsys.readouterr().err


def test_data_that_cannot_be_made_are_the_preparation_s_own_line(monkeypatch):
    played = []
    monkeypatch.setattr(subprocess, "run", lambda command, **more: (
        played.append(command), SimpleNamespace(returncode=2, stderr="DATA_PATH=x: absent\n"))[1])
    with pytest.raises(gpt.ConfigError, match="^DATA_PATH=x: absent$"):
        compare.ensure_data(["DATA_PATH=x"])
    assert played[0][1:] == [str(ROOT / "data" / "prepare.py"), "ensure", "DATA_PATH=x"]


# ---- README


def test_the_readme_shows_the_table_or_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "COMPARE", tmp_path / "compare.json")
    assert readme.compare_table() == "`./run.sh bench presets` makes this table; it has not been made yet."
    tables, _ = Played(tmp_path, by_system).presets(EVAL=["contiguous", "sliding"], SEEDS=[1, 2, 3])
    readme.COMPARE.write_text(json.dumps({"machine": {}, "tables": [table.json() for table in tables]}))
    lines = readme.compare_table().splitlines()
    assert lines[0] == ("| preset | contiguous | sliding | artifact bytes | steps | tokens/s | train s | "
                        "sixteen minus it: contiguous | sliding |")
    assert lines[2] == ("| `baseline` | 2.0200 | 1.9700 | 990,002 | 900 | 20,000 | 149.5 | "
                        "-0.1000 \u00b1 0.0000, better | -0.1000 \u00b1 0.0000, better |")
    assert lines[3] == "| `sixteen` | 1.9200 | 1.8700 | 990,002 | 900 | 20,000 | 149.5 | | |"
    assert lines[5].startswith("Presets on equal terms: bits per byte, 150 seconds of training")
    assert "mean of 3 seeds" in lines[5] and lines[5].count("MODEL_DIM is the largest") == 1
