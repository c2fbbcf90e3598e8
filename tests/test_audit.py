"""The audit itself: its slice and places, its two ranks, its reading of the journal, what it calls declared, its words;
and a run with AUDIT=1 from the command line. What it catches is in test_13_cheats.py."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import prepare
import pytest
import torch
from conftest import FITTING, MINI_VOCAB, ROOT, launch, make_model, small_words, synthetic_documents
from hypothesis import given, settings
from hypothesis import strategies as st
from test_13_cheats import ALL, BestOfTwo, NotANumber, audit, broken, settings_for, split, verdicts_on

import train_gpt
from train_gpt import BOS, EVALUATORS, SETTINGS, CheckError, Validation, World, main

# The slice --------------------------------------------------------------------------------------------------------


def documents(lengths):
    """A split with documents of these lengths, BOS included; every token says where it stands."""
    tokens = np.concatenate([[BOS, *range(10, 9 + length)] for length in lengths])
    return Validation(tokens, np.where(tokens == BOS, 0, tokens), len(lengths), True)


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(2, 200), st.integers(1, 70))
def test_slice_is_whole_documents_that_are_enough(lengths, tokens, enough):
    val = documents(lengths)
    part = audit.pick_slice(val, BOS, tokens, enough)
    assert part.numbers == sorted(set(part.numbers)) and part.longest == max(lengths[n] for n in part.numbers)
    assert part.tokens.tolist() == [*np.concatenate([[BOS, *range(10, 9 + lengths[n])] for n in part.numbers]), BOS]
    assert part.bytes[:-1].tolist() == [0 if token == BOS else token for token in part.tokens[:-1]]
    # Each document owns what stands behind its BOS, and the next BOS.
    assert part.owner.tolist() == [-1, *np.repeat(range(len(part.numbers)), [lengths[n] for n in part.numbers])]
    full = [length for length in lengths if length > 1]
    assert len(part.numbers) >= min(2, len(full))
    assert part.longest > enough or not any(length > enough for length in full)
    # More than was asked for only where two documents are more, and then the shortest that will do.
    if len(part.tokens) - 1 > tokens and len(full) > 1:
        assert len(part.numbers) == 2 and min(full) == min(lengths[n] for n in part.numbers)


def test_slice_takes_documents_from_the_beginning():
    part = audit.pick_slice(documents([30, 500, 40, 90, 35, 70, 20]), BOS, 200, 64)
    assert part.numbers == [0, 2, 4, 5, 6] and part.longest == 70


def bench_of(kind, data=None, tokens=210, **more):
    config = settings_for(kind, **more)
    part = audit.pick_slice((data or split()).val, BOS, tokens, config.eval.eval_seq_len)
    return audit.Bench(train_gpt, kind, config, make_model(config, shake=0.1), part, lambda: 0.0)


@pytest.mark.parametrize("kind", EVALUATORS)
def test_places_are_inside_and_at_the_edges_of_a_window(kind):
    bench = bench_of(kind)
    windows = [w for stage in bench.stages for job in stage for item in job for w in item.windows]
    assert any({w.first, (w.first + w.stop) // 2, w.stop} <= set(bench.at) for w in windows)
    assert all(bench.part.tokens[t] != BOS and t < len(bench.part.tokens) - 1 for t in bench.at)
    for places in bench.alone:
        owners = bench.part.owner[places].tolist()
        assert len(set(owners)) == len(places) and (bench.part.tokens[places] != BOS).all()
        assert len(places) == (1 if bench.declared else len(bench.part.numbers))


def test_disturbed_changes_these_tokens_only_and_no_bos(monkeypatch):
    bench = bench_of("contiguous")
    seen = []
    monkeypatch.setattr(bench, "play", lambda tokens: seen.append(tokens))
    where = np.arange(len(bench.part.tokens)) % 3 == 0
    for seed in range(5):
        bench.disturbed(where, seed)
        changed = seen[-1] != bench.part.tokens
        assert np.array_equal(changed, where & (bench.part.tokens != BOS))
        assert ((seen[-1] == BOS) == (bench.part.tokens == BOS)).all() and seen[-1].max() < MINI_VOCAB


def test_differs_sees_one_bit_of_one_row():
    bench = bench_of("contiguous")
    other = SimpleNamespace(digests=bench.watch.digests.copy())
    every = bench.turn >= 0
    assert bench.differs((bench.score, other), every, every) == ""
    row = torch.ones(1, MINI_VOCAB)
    watch = audit.Watch(bench.part.tokens, [])
    watch(np.array([7]), row)
    first = watch.digests[7]
    row[0, 300] = 1 + 2 ** -23
    watch(np.array([7]), row)
    assert first != watch.digests[7] and watch.seen[7] == 2
    other.digests[7] += 1
    assert "1 offered rows differ, first that of target 7" in bench.differs((bench.score, other), every, every)
    assert bench.differs((bench.score, other), every, bench.turn < 7) == ""


def test_too_few_targets_are_no_pass():
    config = settings_for("contiguous")
    data = SimpleNamespace(val=Validation(np.array([BOS, BOS]), np.array([0, 0]), 2, True), manifest=split().manifest)
    verdicts = verdicts_on("contiguous", config, make_model(config), data, 2)
    assert broken(verdicts) >= ALL and "AUDIT_TOKENS: 1 targets leave none to change" in str(verdicts["causality"])


def test_one_document_has_none_before_it():
    val = split().val
    data = SimpleNamespace(val=val._replace(tokens=val.tokens[:70], bytes=val.bytes[:70], documents=1),
                           manifest={"byte_rule": "sidecar", "val": {"counted_bytes": int(val.bytes[:70].sum())}})
    config = settings_for("ttt")
    verdicts = verdicts_on("ttt", config, make_model(config, shake=0.1), data)
    assert not broken(verdicts) and "one document only" in verdicts["previous_document"]["evidence"]


# Two ranks --------------------------------------------------------------------------------------------------------


def test_threads_make_a_world():
    def work(rank):
        total = torch.tensor([rank.rank + 1, 10])
        assert rank.add_(total) is total
        rank.barrier()
        return total.tolist(), rank.same(f"rank {rank.rank}"), rank.gather(rank.rank), rank.first, rank.each(
            lambda item: item * 2, [rank.rank] * rank.rank)

    results, played = audit.on_ranks(3, torch.device("cpu"), work)
    assert [result[:3] for result in results] == [([6, 30], "rank 0", [0, 1, 2])] * 3
    assert [result[3:] for result in results] == [(True, []), (False, [2]), (False, [4, 4])] and played == [0, 1, 2]


def test_an_error_of_one_rank_ends_all_and_is_the_one_that_is_told():
    def work(rank):
        if rank.rank == 1:
            raise CheckError("of rank 1")
        rank.barrier()

    with pytest.raises(CheckError, match="of rank 1"):
        audit.on_ranks(3, torch.device("cpu"), work)


def test_world_of_threads_has_what_a_world_has():
    real = {name for name in dir(World) if not name.startswith("_")} | {"rank", "size", "device", "lanes"}
    [[rank], _] = audit.on_ranks(1, torch.device("cpu"), lambda rank: rank)
    assert all(hasattr(rank, name) for name in real)


# The journal ------------------------------------------------------------------------------------------------------

OWNER = np.array([-1, 0, 0, 0, 0, 0, 1, 1, 1, 1])


@pytest.mark.parametrize("text, learned, fault", [
    ("score 1 9;", 0, ""),
    ("score 1 3;learn 1 3;score 4 5;\nscore 6 9;", 1, ""),
    # An update between stages saw what the jobs before it scored.
    ("score 1 5;\nscore 6 7;\nlearn 1 7;\nscore 8 9;", 1, ""),
    ("learn 1 3;score 1 5;\nscore 6 9;", 1, "an update saw targets 1..3 before their score"),
    ("score 1 3;learn 1 4;score 4 9;", 1, "an update saw targets 1..4 before"),
    # The targets of another job are nothing that an update within a job may know.
    ("score 1 5;\nscore 6 7;learn 1 5;score 8 9;", 1, "an update saw targets 1..5 before"),
    ("score 1 5;\nlearn 1 6;\nscore 6 9;", 1, "an update saw targets 1..6 before"),
    ("score 3 5;learn 3 5;score 1 2;\nscore 6 9;", 1, "targets 1..2 were scored behind later ones of their document"),
    ("score 1 5;\nscore 6 8;", 0, "1 targets were not scored exactly once"),
    ("score 1 5;\nscore 5 9;", 0, "1 targets were not scored exactly once"),
    ("score 0 9;", 0, "1 targets were not scored exactly once"),
    ("score 1 9", 0, "cannot be read"), ("score 1 9;forget 1 2;", 0, "cannot be read"),
])
def test_reading_the_journal(text, learned, fault):
    found, said = audit.read_journal(text, OWNER)
    assert found == learned and (fault in said if fault else said == "")


# Declared modes -----------------------------------------------------------------------------------------------------


def test_declarations_name_settings():
    assert {text.partition(":")[0].partition("=")[0] for _, _, text in train_gpt.DECLARED_MODES} <= set(SETTINGS)
    assert {kind for kind, _, _ in train_gpt.DECLARED_MODES} <= set(EVALUATORS)
    assert all(kind in EVALUATORS and name in SETTINGS for kind, name in audit.PARTS.items())


# More documents than a warm start has tracks, each a group of its own.
MANY, WARM = (20, 31, 49, 18, 27, 34, 25, 40, 22, 29, 45), {"TTT_WARM_START_A": 1, "TTT_BATCH_SIZE": 1}


@pytest.mark.parametrize("kind, more, words", [
    ("ttt", {}, []), ("ttt", WARM, ["TTT_WARM_START_A=1"]),
    ("ttt", {"PHASED_TTT_PREFIX_DOCS": 2}, ["PHASED_TTT_PREFIX_DOCS"]),
    ("ttt", {"DOC_ISOLATION": 0}, []), ("document", {"DOC_ISOLATION": 0}, []),
    ("sliding", {"DOC_ISOLATION": 0}, ["DOC_ISOLATION=0"]),
    ("contiguous", {"TTT_WARM_START_A": 1, "PHASED_TTT_PREFIX_DOCS": 2}, []),
    ("ngram", {}, ["EVAL=ngram"]), ("ngram", {"DOC_ISOLATION": 0}, ["DOC_ISOLATION=0", "EVAL=ngram"])])
def test_what_is_declared(kind, more, words):
    bench = bench_of(kind, split(MANY), 400, **more)
    assert bench.declared == words and (bench.order == "of scoring") == bool(words)
    said = audit.previous_document(bench)
    assert said[0] and ("declared: " + ", ".join(words) in said[1]) == bool(words)
    if words:
        # What is declared happens: documents do reach each other.
        assert "; up to " in said[1]


def test_a_declaration_without_reach_says_so():
    """One group of documents: the warm start has nobody to go on to."""
    assert audit.previous_document(bench_of("ttt", TTT_WARM_START_A=1, TTT_BATCH_SIZE=9))[1] == (
        "declared: TTT_WARM_START_A=1; but none reaches another on this slice")


def test_undeclared_reach_fails(monkeypatch):
    """The same warm start, were it not declared, breaks the rule."""
    monkeypatch.setattr(train_gpt, "DECLARED_MODES", ())
    good, text = audit.previous_document(bench_of("ttt", split(MANY), 400, **WARM))
    assert not good and text.startswith("documents [") and "scores differ" in text


def test_declared_adaptation_is_judged_in_the_order_of_scoring(monkeypatch):
    """Length-sorted documents that learn from each other keep no order of the stream, and need not."""
    bench = bench_of("ttt", split(MANY), 400, **WARM)
    assert audit.causality(bench)[0] and "in the order of scoring" in audit.causality(bench)[1]
    assert audit.realised_token(bench)[0]
    monkeypatch.setattr(train_gpt, "DECLARED_MODES", ())
    assert not audit.causality(bench_of("ttt", split(MANY), 400, **WARM))[0]


def test_ngram_learns_on_the_slice():
    """Counts that are told after more targets than the slice has would be judged before they are ever used."""
    bench = bench_of("ngram", NGRAM_CHUNK_TOKENS=65536)
    assert "with NGRAM_CHUNK_TOKENS=26" in audit.causality(bench)[1]
    assert audit.read_journal(bench.score.journal, bench.part.owner)[0] >= 4


# Its words ----------------------------------------------------------------------------------------------------------


def test_every_rule_names_every_evaluator(monkeypatch):
    config = settings_for("contiguous", **FITTING["valve"])
    config = config._replace(eval=train_gpt.dataclasses.replace(config.eval, eval=tuple(EVALUATORS)))
    verdicts = verdicts_on(None, config, make_model(config, shake=0.1))
    assert list(verdicts) == [*audit.RULES, "bytes"] and json.loads(json.dumps(verdicts)) == verdicts
    for rule in audit.RULES:
        assert verdicts[rule]["pass"] is True and all(f"{kind}: " in verdicts[rule]["evidence"] for kind in EVALUATORS)
        assert "\n" not in verdicts[rule]["evidence"]
    assert "209 targets, up to 70 in one" in verdicts["causality"]["evidence"]
    assert "jobs on two ranks" in verdicts["rank_count"]["evidence"]


def test_a_referee_that_stops_one_evaluator_does_not_stop_the_audit(monkeypatch):
    monkeypatch.setitem(EVALUATORS, "contiguous", EVALUATORS["contiguous"]._replace(guest=NotANumber))
    config = settings_for("contiguous")
    config = config._replace(eval=train_gpt.dataclasses.replace(config.eval, eval=("contiguous", "sliding")))
    verdicts = verdicts_on(None, config, make_model(config, shake=0.1))
    assert broken(verdicts) == ALL
    assert "contiguous: stopped: 1 targets scored NaN" in verdicts["causality"]["evidence"]
    assert "sliding: other tokens behind targets" in verdicts["causality"]["evidence"]


def test_audit_leaves_the_model_and_torch_alone():
    config = settings_for("ttt")
    model = make_model(config, shake=0.1)
    before = train_gpt.weights_digest(dict(model.named_parameters()))
    verdicts_on("ttt", config, model)
    assert train_gpt.weights_digest(dict(model.named_parameters())) == before
    assert not torch.are_deterministic_algorithms_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_import_needs_nothing_of_the_project(tmp_path):
    code = "import sys, audit; assert not {'train_gpt', 'prepare', 'pack'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={"PYTHONPATH": str(ROOT / "tools")})


# Bytes --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def challenge(tmp_path_factory):
    """A small lossy dataset, with the challenge's tokenizer recipe."""
    folder = tmp_path_factory.mktemp("challenge")
    text = folder / "mini.jsonl"
    text.write_text("".join(json.dumps({"text": f"  {document}"}) + "\n" for document in synthetic_documents(40, 3)))
    done = prepare.main(["--data-dir", str(folder), "text", str(text), "--name", "mini", "--vocab-size",
                         str(MINI_VOCAB), "--val-docs", "4", "--settings", "challenge"], {})
    assert done == 0
    return folder / "datasets" / f"mini_sp{MINI_VOCAB}"


def test_bytes_by_the_rule_of_the_challenge(challenge):
    config = train_gpt.load_config(small_words(challenge, "none"), {}, gpus=0)
    data = train_gpt.load_data(config.data, World())
    good, text = audit.count_bytes(train_gpt, config, data)
    assert good and "by the rule challenge" in text and f"{data.val.bytes.sum()} bytes of 4 documents" in text
    # A space that opens a document is put there by the tokenizer and is no byte of it.
    opening = data.val.bytes.copy()
    opening[np.flatnonzero(data.val.tokens == BOS) + 1] += 1
    good, text = audit.count_bytes(train_gpt, config, data._replace(val=data.val._replace(bytes=opening)))
    assert not good and text.startswith("document 0: ")


def test_bytes_of_a_sidecar_are_compared_with_the_manifest():
    data, config = split(), settings_for("contiguous")
    good, text = audit.count_bytes(train_gpt, config, data)
    assert good and "612 bytes in the sidecar, 612 in the manifest; the text cannot be decoded here" in text
    # log2(384) bits for each of 208 targets.
    assert f"{np.log2(384) * 208 / 612:.4f} BPB" in text
    data.manifest["val"]["counted_bytes"] += 1
    assert not audit.count_bytes(train_gpt, config, data)[0]


# A run --------------------------------------------------------------------------------------------------------------

WORDS = {"EVAL": "contiguous,sliding,ttt", "AUDIT": 1, "AUDIT_TOKENS": 300}


@pytest.fixture(scope="module")
def finished(mini, tmp_path_factory):
    """A run from the command line, audited by the packed file that ran."""
    runs = tmp_path_factory.mktemp("runs")
    words = small_words(mini, runs, RUN_ID="good", ITERATIONS=3, STACK="A2", TTT_CHUNK_SIZE=32, TTT_EVAL_SEQ_LEN=64,
                        PACK=1, **WORDS)
    done = launch(words)
    assert done.returncode == 0, done.stderr
    return runs / "good"


def test_a_run_is_audited(finished):
    found, log = json.loads((finished / "result.json").read_text()), (finished / "train.log").read_text()
    assert found["artifact"]["packed"] and list(found["audit"]) == [*audit.RULES, "bytes"]
    assert not broken(found["audit"])
    for rule, row in found["audit"].items():
        assert f"\naudit: {rule} pass: {row['evidence']}\n" in log


def test_a_cheating_run_ends_with_3_and_keeps_its_result(finished, monkeypatch, capsys):
    row = EVALUATORS["contiguous"]
    monkeypatch.setitem(EVALUATORS, "contiguous", row._replace(guest=BestOfTwo))
    words = [f"RUNS_PATH={finished.parent}", "RUN_ID=bad", f"FROM={finished}", "STAGES=evaluate", "PACK=0", "AUDIT=1",
             "AUDIT_TOKENS=300", "EVAL=contiguous,sliding", "THREADS=1"]
    assert main(words, {}) == 3
    assert capsys.readouterr().err.startswith("AUDIT=1: realised_token: ")
    folder = finished.parent / "bad"
    found = json.loads((folder / "result.json").read_text())
    assert broken(found["audit"]) == {"realised_token"} and found["scores"]["contiguous"]["val_bpb"] > 0
    evidence = found["audit"]["realised_token"]["evidence"]
    assert evidence.startswith("contiguous: with ") and "; sliding: another token at" in evidence
    assert f"\naudit: realised_token FAIL: {evidence}\n" in (folder / "train.log").read_text()


def test_audit_takes_its_time_from_the_clock_that_is_passed_in():
    config = settings_for("contiguous")
    verdicts = audit.audit(train_gpt, config, make_model(config, shake=0.1), split(), 210, lambda: 5.0)
    assert verdicts["reproducible"]["evidence"].endswith(" passes, 0.0 s")
