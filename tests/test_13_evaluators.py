"""EVALUATORS: every target once, whatever the window; the ledger catches what is wrong; known numbers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, small_config
from hypothesis import given
from hypothesis import strategies as st

from train_gpt import (
    BOS,
    EVALUATORS,
    CheckError,
    EvalSettings,
    Ledger,
    Validation,
    Window,
    World,
    bits_per_byte,
    document_index,
    make_forward,
    score,
)


def validation(count=203, seed=0, vocab=384):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, vocab, count)
    tokens[0] = BOS
    tokens[rng.integers(1, count, 6)] = BOS
    return Validation(tokens, np.where(tokens == BOS, 0, 3), int((tokens == BOS).sum()), True)


@pytest.mark.parametrize("kind", EVALUATORS)
@given(st.integers(2, 400), st.integers(2, 70), st.data())
def test_windows_score_every_target_once(kind, count, length, data):
    settings = EvalSettings(eval_seq_len=length, eval_stride=data.draw(st.integers(1, length)))
    windows = EVALUATORS[kind].plan(count, settings)
    scored = [target for window in windows for target in range(window.first, window.stop + 1)]
    assert scored == list(range(1, count))
    assert all(0 <= w.start < w.first <= w.stop and w.stop - w.start <= length for w in windows)
    if kind == "sliding":
        # Behind the first window every target has at least length - stride tokens of context.
        assert all(w.first - w.start >= min(w.first, length - settings.eval_stride + 1) for w in windows)


def test_sliding_with_stride_of_the_window_is_contiguous():
    settings = EvalSettings(eval_seq_len=16, eval_stride=16)
    sliding, contiguous = (EVALUATORS[kind].plan(100, settings) for kind in ("sliding", "contiguous"))
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


@pytest.mark.parametrize("kind", EVALUATORS)
def test_score_equals_the_naive_sum(kind):
    config = small_config(EVAL_SEQ_LEN=24, EVAL_STRIDE=7, EVAL_BATCH_TOKENS=100)
    model, val = make_model(config, shake=0.1), validation()
    found = score(kind, model, val, config, World(), lambda: 0.0)
    with torch.no_grad():
        wanted = naive(model, val, EVALUATORS[kind].plan(len(val.tokens), config.eval))
    assert found.nats == pytest.approx(wanted, rel=1e-6)
    assert (found.tokens, found.bytes, found.documents) == (202, int(val.bytes.sum()), val.documents)
    assert found.ledger["targets"] == 202 and found.ledger["scored_once"] is True and found.ledger["updates"] == 0


@pytest.mark.parametrize("kind", EVALUATORS)
def test_score_does_not_depend_on_the_batch(kind):
    val, sums = validation(), []
    for tokens in (24, 100, 100000):
        config = small_config(EVAL_SEQ_LEN=24, EVAL_STRIDE=7, EVAL_BATCH_TOKENS=tokens)
        sums.append(score(kind, make_model(config, shake=0.1), val, config, World(), lambda: 0.0).nats)
    assert max(sums) - min(sums) < 1e-4 * sums[0]


def test_an_untrained_model_is_uniform():
    """Zero hidden states give log2(V) bits a token: the score of knowing nothing, exactly."""
    config, val = small_config(), validation()
    model = make_model(config)
    torch.nn.init.zeros_(model.tok_emb)
    found = score("contiguous", model, val, config, World(), lambda: 0.0)
    assert found.nats / found.tokens == pytest.approx(math.log(384), rel=1e-6)
    assert found.entry()["val_bpb"] == pytest.approx(math.log2(384) * 202 / val.bytes.sum(), rel=1e-6)


def test_known_numbers():
    """The challenge's published token and byte counts: nats over bits per byte, for its 1024 and 8192 vocabularies."""
    assert 1 / bits_per_byte(62021632, 151080363) == pytest.approx(1.68846, abs=2e-5)
    assert 1 / bits_per_byte(40540160, 151078222) == pytest.approx(2.5831, abs=2e-4)
    assert bits_per_byte(math.log(2), 1) == 1


def test_ledger_refuses_a_target_scored_twice_and_position_zero():
    ledger = Ledger(10)
    ledger.score(0, [Window(0, 5, 1)])
    with pytest.raises(CheckError, match="scored twice"):
        ledger.score(1, [Window(3, 8, 5)])
    with pytest.raises(CheckError, match="no targets"):
        Ledger(10).score(0, [Window(0, 5, 0)])


def test_ledger_refuses_a_skipped_tail():
    ledger = Ledger(10)
    ledger.score(0, [Window(0, 8, 1)])
    with pytest.raises(CheckError, match="1 of 9 targets were not scored exactly once"):
        ledger.close(World())
    ledger.score(1, [Window(1, 9, 9)])
    assert ledger.close(World())["scored_once"] is True


def test_journal_depends_on_what_was_scored_in_which_order():
    digests = set()
    for spans in ([(0, 4, 1), (0, 9, 5)], [(0, 5, 1), (0, 9, 6)]):
        ledger = Ledger(10)
        for batch, span in enumerate(spans):
            ledger.score(batch, [Window(*span)])
        digests.add(ledger.close(World())["journal_sha256"])
    assert len(digests) == 2


def test_isolation_is_a_setting_of_the_score_too():
    """With DOC_ISOLATION=0 the published habit is scored, and it differs."""
    val = validation()
    found = [score("contiguous", make_model(config, shake=0.2), val, config, World(), lambda: 0.0).nats
             for config in (small_config(), small_config(DOC_ISOLATION=0))]
    assert abs(found[0] - found[1]) > 1e-3
