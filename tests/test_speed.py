"""`bench speed`: floors and counts by hand, every row of every table at a small size, and what a row says that cannot
be measured. No number of seconds is expected but that it is above 0."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import small_config, small_words

import train_gpt as gpt
from tools import bench, speed

CPU = torch.device("cpu")
WORDS = [word for word in small_words("none", "none", PRESET="baseline", STACK="A2")
         if word.split("=")[0] not in ("DATA_PATH", "RUNS_PATH")]
QUICK = ["REPEATS=2", *WORDS]
NEEDED = ["attention", "mean_nats", "mlp"]  # by a stack of attention only


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setattr(speed, "MATRIX_SIDE", {"cpu": 64})
    monkeypatch.setattr(speed, "COPY_BYTES", {"cpu": 1 << 16})
    for name in {*gpt.SETTINGS, *gpt.RENAMED}:
        monkeypatch.delenv(name, raising=False)


def tables(tmp_path, *words):
    """The tables by the first words of their titles, from the JSON."""
    out = tmp_path / "speed.json"
    assert bench.main(["speed", *words, "--json", str(out)]) == 0
    held = json.loads(out.read_text())
    assert set(held["machine"]) >= {"cpu", "torch"}
    return {table["title"].split(":")[0]: table["rows"] for table in held["tables"]}


def place(rows=2, length=8, **more):
    return speed.Place(small_config(PRESET="baseline", STACK="A2", **more), CPU, torch.float32, rows, length, 6.0)


# ---- counts by hand


def test_pairs_of_spans_are_counted_one_by_one():
    starts = np.array([0, 3, 4, 9, 9, 9])
    by_hand = sum(key <= query for a, b in zip(starts, starts[1:], strict=False)
                  for query in range(a, b) for key in range(a, b))
    assert speed.visible_pairs(starts) == by_hand == 6 + 1 + 15
    long = np.array([0, 98304], np.int32)  # its square is no int32
    assert speed.visible_pairs(long) == 98304 * 98305 // 2


def test_attention_work_by_hand():
    work = speed.attention_work(pairs=22, rows=3, length=5, heads=4, kv_heads=2, channels=8, size=2)
    q, kv = 15 * 4 * 8 * 2, 15 * 2 * 8 * 2
    assert (work.flops, work.flops_both) == (2 * 2 * 22 * 4 * 8, 6 * 2 * 22 * 4 * 8)
    assert work.bytes == (q + kv + kv) + q  # q, k, v; the output
    assert work.bytes_both == work.bytes + (q + kv + kv + q) + (q + kv + kv)  # again, its gradient; their gradients
    assert work.reference_flops == 6 * 2 * (3 * 5 * 5) * 4 * 8 and work.reference_bytes == 6 * 4 * 3 * 4 * 25


def test_mean_nats_work_by_hand():
    work = speed.mean_nats_work(tokens=10, width=4, vocab=7, size=2)
    assert (work.flops, work.flops_both) == (2 * 10 * 4 * 7, 3 * 2 * 10 * 4 * 7)
    inputs, gradients = 10 * 4 * 2 + 7 * 4 * 4 + 10 * 8, 10 * 4 * 2 + 7 * 4 * 4
    assert (work.bytes, work.bytes_both) == (inputs, inputs + gradients)
    assert work.reference_bytes == 5 * 10 * 7 * 4


def test_mlp_work_by_hand():
    work = speed.mlp_work(tokens=10, width=4, hidden=16, size=2)
    assert (work.flops, work.flops_both) == (2 * 2 * 10 * 4 * 16, 6 * 2 * 10 * 4 * 16)
    stream, matrices = 10 * 4 * 2, 2 * 4 * 16 * 4
    assert work.bytes == 2 * stream + matrices
    assert work.bytes_both == work.bytes + (2 * stream + matrices) + (stream + matrices)


def test_floor_is_the_larger_of_both():
    work = speed.Work(100, 30, 300, 90, 0, 0)
    assert work.floor(speed.Ceiling(10, 10), False) == 10 and work.floor(speed.Ceiling(10, 10), True) == 30
    assert work.floor(speed.Ceiling(100, 10), True) == 9
    assert (work.bound(speed.Ceiling(10, 10)), work.bound(speed.Ceiling(100, 10))) == ("FLOP", "bytes")


def test_orthogonalisation_is_counted_by_its_products(monkeypatch):
    seen = []

    def counted(product):
        def wrapped(*matrices, **more):
            a, b = matrices[-2:]
            seen.append(2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2])
            return product(*matrices, **more)
        return wrapped
    monkeypatch.setattr(torch, "baddbmm", counted(torch.baddbmm))
    for shape in ((3, 6, 4), (3, 4, 6)):
        seen.clear()
        gpt.orthogonalize(torch.randn(shape), "newton_schulz", 5, torch.float32)
        grams = 5 * 2 * 3 * 4 * 4 * 6  # x x^T, written with @
        assert len(seen) == 10 and sum(seen) + grams == speed.orthogonalize_flops(*shape, 5)


def test_documents_have_about_the_length_that_was_asked_for():
    tokens = speed.document_stream(400_000, 384, 1000.0).take(0, 400_000)
    sizes = np.diff(np.flatnonzero(tokens == gpt.BOS))
    assert tokens[0] == gpt.BOS and sizes.mean() == pytest.approx(1000, rel=0.15)
    assert np.median(sizes) == pytest.approx(607, rel=0.15) and tokens.max() < 384
    assert np.array_equal(tokens, speed.document_stream(400_000, 384, 1000.0).take(0, 400_000))


def test_both_layouts_of_attention_are_the_same_work():
    """Rows with a mask and the same rows packed, with spans: values and gradients agree, and the pairs are the
    mask's."""
    case = speed.attention_case(place())
    rows, packed = case.draw()
    assert rows[3].sum() < 2 * 36  # documents do end inside these rows
    assert case.work.flops == 4 * 2 * 16 * int(rows[3].sum())
    assert packed[0].shape == (1, 16, 2, 16) and isinstance(packed[3], gpt.Spans)

    def attend(q, k, v, where):
        docs = gpt.attention_mask(where, torch.Size(q.shape[:2]))
        return gpt.attention_reference(q, k, v, docs)
    exact, found = (speed.Passes(function, inputs, case.moving).both() for function, inputs in
                    ((gpt.attention_reference, rows), (attend, packed)))
    assert speed.relative(found[0], exact[0]) < 1e-5
    assert max(map(speed.relative, found[1], exact[1])) < 1e-5 and len(exact[1]) == 3
    free = speed.attention_case(place(DOC_ISOLATION=0))
    assert free.work.flops == 4 * 2 * 16 * 2 * 36 and free.draw()[0][3] is None


def test_relative_error_never_hides_what_is_not_a_number():
    one = torch.ones(4)
    assert speed.relative(1.5 * one, one) == pytest.approx(0.5)
    assert math.isnan(speed.relative(one * math.nan, one))


# ---- tables


@pytest.mark.parametrize("lanes", [1, 2])
def test_all_tables_have_all_rows(tmp_path, monkeypatch, capsys, lanes):
    seen, gradients = [], gpt.Trainer.gradients
    monkeypatch.setattr(gpt.Trainer, "gradients", lambda self, phase: seen.append(
        (phase, self.length, self.micros, self.step)) or gradients(self, phase))
    found = tables(tmp_path, *QUICK, f"THREADS={lanes}", "TRAIN_SEQ_SCHEDULE=32@0.5,64@1", "STACK=A (A)*2@0.5",
                   "EMA_DECAY=0.9")
    assert list(found) == ["ceilings", "kernels", "optimizer", "step, eager"]
    assert len(found["ceilings"]) == 2 * lanes and all(row["rate"] > 0 for row in found["ceilings"])
    step = found["step, eager"]
    assert [(row["phase"], row["visits"], row["context"], row["shape"]) for row in step] == [
        ("from 0%", 2, 32, "4x32"), ("from 50%", 3, 64, "2x64")]
    # A round is a step of as many micro-batches as there are lanes, each time on other tokens.
    assert seen == [(at // 3, 32 << at // 3, lanes, at) for at in range(6)]
    config = gpt.load_config([*QUICK[1:], "STACK=A (A)*2@0.5", "TRAIN_SEQ_SCHEDULE=32@0.5,64@1"], {}, gpus=0)
    for row, phase in zip(step, gpt.plan_layers(config.model), strict=True):
        assert row["note"] == "" and min(row["s round"], row["s optimizer"], row["peak GB"], row["s first"]) > 0
        assert row["s step"] == pytest.approx(4 / lanes * row["s round"] + row["s optimizer"])
        assert row["tokens/s"] == pytest.approx(512 / row["s step"])
        flops = 3 * 512 * gpt.forward_flops(config.model, 384, phase, row["context"])
        assert row["TFLOP/step"] == pytest.approx(flops / 1e12)
        assert row["TFLOP/s"] == pytest.approx(flops / row["s step"] / 1e12)
        assert row["of peak"] == pytest.approx(row["TFLOP/s"] / found["ceilings"][0]["rate"])
    kernels = found["kernels"]
    assert [(row["operation"], row["form"]) for row in kernels] == [
        (name, form) for name in NEEDED for form in ("reference", *gpt.KERNELS[name].twins)]
    for row in kernels:
        twin = gpt.KERNELS[row["operation"]].twins.get(row["form"])
        reason = twin and twin.unusable(CPU, torch.float32, config.model)
        if reason:
            assert row["note"] == reason and row["ms both"] is None
            continue
        kernel = gpt.KERNELS[row["operation"]]
        assert row["note"] in ("", "in use") and min(row["ms forward"], row["ms both"], row["ms floor"]) > 0
        # Norms, so no sharper than the tests of the kernels; the reference against itself is exact.
        assert row["value error"] <= (10 * kernel.value_tolerance if twin else 0)
        assert row["gradient error"] <= (10 * kernel.gradient_tolerance if twin else 0)
        assert row["both at"] == pytest.approx(row["ms floor"] / row["ms both"])
        base = next(other["ms both"] for other in kernels if other["operation"] == row["operation"])
        assert row["speedup"] == pytest.approx(base / row["ms both"])
    assert [row["operation"] for row in kernels if row["note"] == "in use"] == NEEDED
    parts = {row["part"]: row for row in found["optimizer"]}
    assert parts["64x32 orthogonalised"]["tensors"] == 2  # the up matrices
    assert parts["64x32 orthogonalised"]["GFLOP"] == pytest.approx(speed.orthogonalize_flops(2, 64, 32, 5) / 1e9)
    assert parts["AdamW, embedding"]["MB"] == pytest.approx(28 * 384 * 32 / 1e6)
    whole = parts["Optimizer.step, all"]
    assert whole["parameters"] == sum(row["parameters"] for row in found["optimizer"][:-2])
    assert "weight average" in parts and all(row["ms"] > 0 and row["note"] == "" for row in parts.values())
    assert f"in {lanes} lanes" in capsys.readouterr().out and torch.get_num_threads() == 1


def test_a_twin_that_fails_or_lies_has_its_row(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("no such\nluck")

    def unmade():
        raise ImportError("not here")

    def usable(device, dtype, settings):
        return None
    kernel = gpt.KERNELS["mlp"]
    twins = {"fails": gpt.Twin(lambda: fails, usable), "unmade": gpt.Twin(unmade, usable),
             "lies": gpt.Twin(lambda: lambda *inputs: 2 * kernel.reference(*inputs), usable),
             "crooked": gpt.Twin(lambda: lambda x, up, down, slope: kernel.reference(
                 x, up, 2 * down - down.detach(), slope), usable),
             "lost": gpt.Twin(lambda: lambda *inputs: math.nan * kernel.reference(*inputs), usable)}
    monkeypatch.setitem(gpt.KERNELS, "mlp", kernel._replace(twins=twins))
    names = [*NEEDED, "another"]
    monkeypatch.setattr(gpt, "pick_kernels", lambda *_: (None, [f"kernel:{name} reference" for name in names]))
    monkeypatch.setitem(gpt.KERNELS, "another", kernel)
    monkeypatch.setattr(gpt, "kernels_of", lambda settings: names)
    found = tables(tmp_path, *QUICK, "PARTS=kernels")["kernels"]
    rows = {row["form"]: row for row in found if row["operation"] == "mlp"}
    assert rows["fails"]["note"] == "RuntimeError: no such" and rows["unmade"]["note"] == "ImportError: not here"
    assert rows["lies"]["value error"] == pytest.approx(1) and rows["lies"]["gradient error"] == pytest.approx(1)
    assert rows["crooked"]["value error"] < 1e-6 and rows["crooked"]["gradient error"] == pytest.approx(1)
    assert math.isnan(rows["lost"]["value error"]) and math.isnan(rows["lost"]["gradient error"])
    assert [row["note"] for row in found if row["operation"] == "another"] == ["no case of it in tools/speed.py"]
    assert "RuntimeError: no such" in capsys.readouterr().out


def test_a_table_that_fails_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setitem(speed.CASES, "mlp", lambda place: 1 / 0)
    found = tables(tmp_path, *QUICK)
    assert list(found) == ["ceilings", "kernels", "optimizer", "step, eager"]
    assert found["kernels"] == [{"note": "ZeroDivisionError: division by zero"}] and found["optimizer"][0]["ms"] > 0


def test_compiled_rows_come_first_and_count_their_graphs(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(gpt, "pick_compile", lambda choice, device: (choice == "1", "here"))
    monkeypatch.setattr(gpt, "make_compiled", lambda function, on, **_: asked.append(on) or function)
    made = iter(range(5, 100))
    monkeypatch.setattr(gpt, "compiled_graphs", lambda: next(made))
    found = tables(tmp_path, *QUICK, "COMPILED=both", "THREADS=2")
    assert list(found) == ["ceilings", "step, compiled (here)", "kernels", "kernels, references compiled", "optimizer",
                           "step, eager"]
    assert [(row["graphs"], row["breaks"]) for row in found["step, compiled (here)"]] == [(1, 0)]
    assert [(row["graphs"], row["breaks"]) for row in found["step, eager"]] == [(None, None)]
    assert asked == [True, *[True] * len(NEEDED), False]
    rows = found["kernels, references compiled"]
    assert [row["operation"] for row in rows] == NEEDED
    assert all(row["speedup"] > 0 and row["value error"] == 0 for row in rows)
    assert list(tables(tmp_path, *QUICK, "COMPILED=1", "PARTS=step", "THREADS=2")) == [
        "ceilings", "step, compiled (here)"]
    assert torch.get_num_threads() == 1  # as it was
    assert list(tables(tmp_path, *QUICK, "PARTS=step")) == ["ceilings", "step, eager"]


@pytest.mark.parametrize("stack, more, names", [("D X T", [], ["delta", "mlstm", "titans"]),
                                                ("T", ["TITANS_DEPTH=2"], ["deep"])])
def test_recurrences_have_their_rows(tmp_path, stack, more, names):
    found = tables(tmp_path, *QUICK, *more, f"STACK={stack}", "PARTS=kernels", "DOCUMENT_TOKENS=20")["kernels"]
    rows = {(row["operation"], row["form"]): row for row in found}
    for name in names:
        for form in ("reference", "chunked"):
            row = rows[name, form]
            assert row["note"] == ("in use" if form == "chunked" else "") and row["ms floor"] > 0
            assert row["value error"] <= 1e-4 and row["gradient error"] <= 1e-3
    # Packed for a twin that wants it: the same values behind each other, with spans.
    for name in names:
        config = small_config(PRESET="baseline", STACK=stack, **dict(word.split("=") for word in more))
        plain, packed = speed.CASES[name](speed.Place(config, CPU, torch.float32, 2, 64, 20.0)).draw()
        chunked = gpt.KERNELS[name].twins["chunked"].make()
        a, b = chunked(*plain)[0], chunked(*packed)[0]
        assert torch.allclose(a.flatten(0, 1), b[0], atol=1e-5)


@pytest.mark.parametrize("name, form, more", [("experts", "grouped", ["MOE_EXPERTS=3", "MLP_MULT=2"]),
                                              ("written", "chunked", ["INPLACE_LAYERS=1", "INPLACE_CHUNK=16"])])
def test_parts_of_the_feed_forward_have_their_rows(tmp_path, name, form, more):
    found = tables(tmp_path, *QUICK, *more, "PARTS=kernels")["kernels"]
    rows = {row["form"]: row for row in found if row["operation"] == name}
    assert list(rows) == ["reference", form] and rows[form]["note"] == "in use"
    assert rows[form]["value error"] <= 1e-4 and rows[form]["gradient error"] <= 1e-3 and rows[form]["ms floor"] > 0


def test_a_packed_twin_gets_packed_rows(tmp_path, monkeypatch):
    def attend(q, k, v, where):
        assert isinstance(where, gpt.Spans) and q.shape[0] == 1
        return gpt.attention_reference(q, k, v, gpt.attention_mask(where, torch.Size(q.shape[:2])))
    twins = {"packed": gpt.Twin(lambda: attend, lambda *_: None, packed=True)}
    monkeypatch.setitem(gpt.KERNELS, "attention", gpt.KERNELS["attention"]._replace(twins=twins))
    found = tables(tmp_path, *QUICK, "DOCUMENT_TOKENS=20")
    row = found["kernels"][1]
    assert row["note"] == "in use" and row["value error"] < 1e-6 and row["gradient error"] < 1e-5
    assert [row["shape"] for row in found["step, eager"]] == ["1x128"]


def test_a_reference_that_is_too_large_stands_beside_a_smaller_size(tmp_path, monkeypatch):
    row = speed.attention_work(0, 1, 64, 2, 1, 16, 4).reference_bytes
    with monkeypatch.context() as patch:
        patch.setattr(speed, "free_bytes", lambda device: 1.5 * row / speed.MEMORY_SHARE)
        found = tables(tmp_path, *QUICK, "PARTS=kernels")["kernels"]
    assert [row["form"] for row in found if row["operation"] == "attention"] == [
        "reference", *gpt.KERNELS["attention"].twins, "reference", "sdpa"]  # what is not usable is said once
    found = [row for row in found if row["operation"] == "attention"]
    reference, sdpa = ([row for row in found if row["form"] == form] for form in ("reference", "sdpa"))
    assert [row["size"].split(",")[0] for row in reference] == [row["size"].split(",")[0] for row in sdpa] == [
        "2x64", "1x64"]
    assert "GB" in reference[0]["note"] and reference[0]["ms both"] is None
    assert sdpa[0]["ms both"] > 0 and sdpa[0]["speedup"] is None and sdpa[0]["value error"] is None
    assert reference[1]["speedup"] == 1 and sdpa[1]["speedup"] > 0 and sdpa[1]["value error"] < 1e-5
    monkeypatch.setattr(speed, "REFERENCE_SHARE", 0.0)
    found = tables(tmp_path, *QUICK, "PARTS=kernels")["kernels"]
    assert [row["form"] for row in found if "s a call" in row["note"]] == ["reference"] * len(NEEDED)


def test_what_does_not_fit_the_budget_says_so(tmp_path):
    found = tables(tmp_path, *QUICK, "BUDGET_SECONDS=1e-6")
    assert all(row["runs"] == 1 and row["rate"] > 0 for row in found["ceilings"])
    usable = [row for row in found["kernels"] if "needs" not in row["note"]]
    for row in (*found["step, eager"], *usable, *found["optimizer"]):
        assert row["note"] == "left out: BUDGET_SECONDS=1e-06 is spent"
        assert all(row.get(name) is None for name in ("s round", "ms both", "ms"))


def test_meter_repeats_what_its_budget_has_room_for(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    meter, calls = speed.Meter(CPU, 5, 100.0), []

    def work():
        now[0] += 3.0 if not calls else 2.0
        calls.append(now[0])
    spent = meter.time(work)
    assert spent == speed.Timing(2.0, 0.0, 2.0, 3, 3.0, None)  # a tenth of the budget holds three of 3 s
    meter.check(100.0 - now[0])
    with pytest.raises(speed.Skipped, match="needs about 95 s, 91 of BUDGET_SECONDS=100 are left"):
        meter.check(95.0)
    calls.clear()
    assert meter.time(work, compiled=True).runs == 5 and len(calls) == 7  # the first call was no measure
    now[0] = 100.0
    with pytest.raises(speed.Skipped, match="is spent"):
        meter.check()
    assert meter.time(work).runs == 1


@pytest.mark.parametrize("word, said", [
    ("BUDGET_SECONDS=0", "must be a number above 0"), ("COMPILED=2", "must be 0, 1 or both"),
    ("PARTS=all", "must be some of step, kernels, optimizer"), ("PRESET=none", "must be one of"),
    ("STEPS=3", "must be one of PARTS")])
def test_mistakes_are_one_line(capsys, word, said):
    assert bench.main(["speed", word]) == 2
    assert said in capsys.readouterr().err.strip()


def test_preflight_judges_the_step_against_such_a_gpu():
    """As fast as it was, a little slower, too slow, another GPU, and a step that could not be timed."""
    from tools import preflight
    name, (rate, _) = "NVIDIA H200", preflight.EXPECTED[r"\bH200\b"]
    assert preflight.judge(name, rate, "")[0] == preflight.judge(name, 0.86 * rate, "")[0] == "ok"
    assert preflight.judge(name, 0.84 * rate, "") == (
        "missing", "813,960 tokens/s a GPU, 84% of the 969,000 of such a GPU (measured with torch's varlen attention): "
        "too slow, at least 85%")
    others = ("NVIDIA T4", "NVIDIA GH200 480GB", "NVIDIA H100 PCIe")
    assert {preflight.judge(other, 10.0, "")[0] for other in others} == {"optional"}
    assert preflight.judge(name, None, "out of memory") == ("missing", "the step could not be timed: out of memory")
    row = dict.fromkeys(speed.STEP_COLUMNS) | {"visits": 11, "context": 2048, "tokens/s": 5.0, "note": "n"}
    tables = [{"rows": [{"what": "matrix product"}]}, {"rows": [row | {"visits": 17, "tokens/s": 9.0}, row]}]
    assert preflight.step_of(tables) == (5.0, "n") and preflight.step_of(tables[:1]) == (None, "")
