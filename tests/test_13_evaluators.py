"""EVALUATORS: every target once, whatever the window; the ledger catches what is wrong; known numbers."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, small_config
from hypothesis import given, settings
from hypothesis import strategies as st

from train_gpt import (
    BOS,
    EVALUATORS,
    CheckError,
    Ledger,
    Validation,
    Window,
    World,
    bits_per_byte,
    document_index,
    make_forward,
    make_guest,
    score,
    targets_of,
)


def validation(count=203, seed=0, vocab=384):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, vocab, count)
    tokens[0] = BOS
    tokens[rng.integers(1, count, 6)] = BOS
    return Validation(tokens, np.where(tokens == BOS, 0, 3), int((tokens == BOS).sum()), True)


def scored(kind, model, val, config, **more):
    """One evaluator's score, its guest made for it."""
    return score(kind, make_guest(kind, model, config, World()), val, config, World(), lambda: 0.0, **more)


def windows_of(kind, tokens, config):
    """All windows of a plan, in the order of its stages, jobs and rounds."""
    return [window for stage in EVALUATORS[kind].plan(tokens, config) for job in stage for item in job
            for window in item.windows]


@st.composite
def streams(draw):
    """Tokens of several documents, some of them empty, and evaluator settings that fit."""
    lengths = draw(st.lists(st.integers(0, 90), min_size=1, max_size=7))
    tokens = np.concatenate([[BOS, *range(4, 4 + length)] for length in lengths] + [[5]])
    length = draw(st.integers(2, 70))
    config = small_config(
        EVAL_SEQ_LEN=length, EVAL_STRIDE=draw(st.integers(1, length)), TTT_EVAL_SEQ_LEN=length,
        TTT_CHUNK_SIZE=draw(st.integers(1, length)), TTT_BATCH_SIZE=draw(st.integers(1, 4)),
        EVAL_BATCH_TOKENS=draw(st.integers(length, 300)), TTT_WARM_START_A=draw(st.integers(0, 1)),
        PHASED_TTT_PREFIX_DOCS=draw(st.integers(0, 8)), PHASED_TTT_NUM_PHASES=draw(st.integers(1, 3)),
        TTT_SHORT_SCORE_FIRST_STEPS=draw(st.sampled_from(("", "9:2,40:7"))) if length > 6 else "")
    return tokens, config


@pytest.mark.parametrize("kind", EVALUATORS)
@settings(deadline=None)
@given(streams())
def test_plan_scores_every_target_once(kind, stream):
    tokens, config = stream
    windows = windows_of(kind, tokens, config)
    assert sorted(targets_of(windows)) == list(range(1, len(tokens)))
    length = config.eval.eval_seq_len
    assert all(0 <= w.start < w.first <= w.stop and w.stop - w.start <= length for w in windows)
    if kind == "sliding":
        # Behind the first window every target has at least length - stride tokens of context.
        assert all(w.first - w.start >= min(w.first, length - config.eval.eval_stride + 1) for w in windows)
    if EVALUATORS[kind].within:
        assert all((tokens[w.start + 1:w.stop] != BOS).all() for w in windows)


@pytest.mark.parametrize("kind", EVALUATORS)
@settings(deadline=None)
@given(streams())
def test_rows_go_on_in_order_and_targets_of_a_stage_lie_together(kind, stream):
    tokens, config = stream
    edge = 1
    for stage in EVALUATORS[kind].plan(tokens, config):
        for job in stage:
            for item, after in itertools.zip_longest(job, job[1:]):
                going = 0 if after is None or after.fresh else len(after.windows)
                assert item.more == going
                for old, new in zip(item.windows, after.windows[:going] if going else (), strict=False):
                    assert new.first == old.stop + 1 and new.start >= old.start
        targets = sorted(targets_of(w for job in stage for item in job for w in item.windows))
        assert targets == list(range(edge, edge + len(targets)))
        edge += len(targets)


def test_sliding_with_stride_of_the_window_is_contiguous():
    config, tokens = small_config(EVAL_SEQ_LEN=16, EVAL_STRIDE=16), np.full(100, 5)
    sliding, contiguous = (windows_of(kind, tokens, config) for kind in ("sliding", "contiguous"))
    assert sliding[:-1] == contiguous[:-1]
    # Only the tail differs: sliding gives it a full window of context.
    assert sliding[-1] == Window(83, 99, 97) and contiguous[-1] == Window(96, 99, 97)


def naive(model, val, windows):
    """Each window alone, unpadded, one target at a time."""
    total, docs = 0.0, document_index(torch.from_numpy(val.tokens))
    forward = make_forward(model, len(model.phases) - 1)
    for window in windows:
        tokens = torch.from_numpy(val.tokens[window.start:window.stop])[None]
        logits = model.logits(forward(tokens, docs[None, window.start:window.stop]))[0]
        for target in range(window.first, window.stop + 1):
            total -= F.log_softmax(logits[target - 1 - window.start].double(), -1)[val.tokens[target]].item()
    return total


@pytest.mark.parametrize("kind", [kind for kind, row in EVALUATORS.items() if not row.guest.normalised])
def test_score_equals_the_naive_sum(kind):
    config = small_config(EVAL_SEQ_LEN=24, EVAL_STRIDE=7, EVAL_BATCH_TOKENS=100, TTT_EVAL_SEQ_LEN=24, TTT_CHUNK_SIZE=5,
                          TTT_LORA_LR=0, TTT_DOWN_LR=0)
    model, val = make_model(config, shake=0.1), validation()
    found = scored(kind, model, val, config)
    with torch.no_grad():
        wanted = naive(model, val, windows_of(kind, val.tokens, config))
    assert found.nats == pytest.approx(wanted, rel=1e-6)
    assert (found.tokens, found.bytes, found.documents) == (202, int(val.bytes.sum()), val.documents)
    assert found.ledger["targets"] == 202 and found.ledger["scored_once"] is True
    assert (found.ledger["updates"] > 0) == (kind in ("ttt", "valve"))


@pytest.mark.parametrize("kind", EVALUATORS)
def test_score_does_not_depend_on_the_batch(kind):
    val, sums = validation(), []
    for tokens in (24, 100, 100000):
        config = small_config(EVAL_SEQ_LEN=24, EVAL_STRIDE=7, EVAL_BATCH_TOKENS=tokens)
        sums.append(scored(kind, make_model(config, shake=0.1), val, config).nats)
    assert max(sums) - min(sums) < 1e-4 * sums[0]


def test_an_untrained_model_is_uniform():
    """Zero hidden states give log2(V) bits a token: the score of knowing nothing, exactly."""
    config, val = small_config(), validation()
    model = make_model(config)
    torch.nn.init.zeros_(model.tok_emb)
    found = scored("contiguous", model, val, config)
    assert found.nats / found.tokens == pytest.approx(math.log(384), rel=1e-6)
    assert found.entry()["val_bpb"] == pytest.approx(math.log2(384) * 202 / val.bytes.sum(), rel=1e-6)


def test_known_numbers():
    """The challenge's published token and byte counts: nats over bits per byte, for its 1024 and 8192 vocabularies."""
    assert 1 / bits_per_byte(62021632, 151080363) == pytest.approx(1.68846, abs=2e-5)
    assert 1 / bits_per_byte(40540160, 151078222) == pytest.approx(2.5831, abs=2e-4)
    assert bits_per_byte(math.log(2), 1) == 1


def test_ledger_refuses_a_target_scored_twice_and_position_zero():
    ledger = Ledger(10)
    ledger.score((0, 0), [Window(0, 5, 1)])
    with pytest.raises(CheckError, match="scored twice"):
        ledger.score((0, 1), [Window(3, 8, 5)])
    with pytest.raises(CheckError, match="no targets"):
        Ledger(10).score((0, 0), [Window(0, 5, 0)])


def test_ledger_refuses_a_skipped_tail():
    ledger = Ledger(10)
    ledger.score((0, 0), [Window(0, 8, 1)])
    with pytest.raises(CheckError, match="1 of 9 targets were not scored exactly once"):
        ledger.close(World())
    with pytest.raises(CheckError, match="1 of 9 targets were not scored exactly once"):
        ledger.merge(World(), 1, 9)
    ledger.score((0, 1), [Window(1, 9, 9)])
    assert ledger.close(World())[0]["scored_once"] is True


def test_ledger_refuses_an_update_before_the_score():
    ledger = Ledger(10)
    ledger.score((0, 0), [Window(0, 5, 1)])
    ledger.learn((0, 0), [Window(0, 5, 1)])
    with pytest.raises(CheckError, match="an update saw 2 of them before their score"):
        ledger.learn((0, 0), [Window(0, 7, 4)])


def test_journal_depends_on_what_was_scored_in_which_order():
    digests = set()
    for spans in ([(0, 4, 1), (0, 9, 5)], [(0, 5, 1), (0, 9, 6)]):
        for learns in (0, 1):
            ledger = Ledger(10)
            for job, span in enumerate(spans):
                ledger.score((0, job), [Window(*span)])
                if learns:
                    ledger.learn((0, job), [Window(*span)])
            closed, _ = ledger.close(World())
            assert closed["updates"] == 2 * learns
            digests.add(closed["journal_sha256"])
    assert len(digests) == 4


def test_isolation_is_a_setting_of_the_score_too():
    """With DOC_ISOLATION=0 the published habit is scored, and it differs."""
    val = validation()
    found = [scored("contiguous", make_model(config, shake=0.2), val, config).nats
             for config in (small_config(), small_config(DOC_ISOLATION=0))]
    assert abs(found[0] - found[1]) > 1e-3
