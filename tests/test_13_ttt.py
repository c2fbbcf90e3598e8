"""TEST-TIME TRAINING: equal to a plain re-implementation, document by document; causal, strict, and it learns."""

import copy
import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, small_config
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import (
    BOS,
    STEP_POSITIONS,
    TTT_PARTS,
    ConfigError,
    Round,
    TestTime,
    Validation,
    Window,
    World,
    assign,
    document_index,
    find_documents,
    load_config,
    make_forward,
    make_guest,
    parse_chunk_steps,
    plan_ttt,
    score,
    site_shapes,
    stream_seed,
    targets_of,
    weights_digest,
)

VOCAB, PHASE = 48, -1
# A looped block is visited twice, each visit with adapters of its own; skips, rotary and grouped heads take part.
SHAPE = {"VOCAB_SIZE": VOCAB, "MODEL_DIM": 16, "NUM_HEADS": 2, "NUM_KV_HEADS": 1, "ROPE_DIMS": 4,
         "STACK": "A1 (A1)*2@0.5", "KERNELS": "reference", "EVAL_SEQ_LEN": 24, "EVAL_STRIDE": 8,
         "EVAL_BATCH_TOKENS": 128, "TTT_EVAL_SEQ_LEN": 24, "TTT_CHUNK_SIZE": 8, "TTT_BATCH_SIZE": 3, "TTT_LORA_RANK": 3,
         "TTT_LORA_ALPHA": 5, "TTT_LORA_LR": 0.01, "TTT_DOWN_LR": 0, "TTT_WEIGHT_DECAY": 0.5}
LENGTHS = (25, 1, 16, 60, 5, 17, 41, 2, 27, 22, 19)
# Adam without a first moment turns the smallest gradient into a whole step, so modes are compared in float64.
EXACT = 1e-9
PHASED = {"PHASED_TTT_PREFIX_DOCS": 7, "PHASED_TTT_NUM_PHASES": 2, "GLOBAL_TTT_LR": 0.05,
          "GLOBAL_TTT_CHUNK_TOKENS": 96}


@pytest.fixture
def double(monkeypatch):
    """Everything in float64: what differs then is not rounding."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tiny(**more):
    return small_config(**{**SHAPE, **more})


def shaken(config):
    """A model whose every branch takes part, in the default dtype."""
    model = make_model(config, shake=0.15)
    if torch.get_default_dtype() == torch.float64:
        model.double().dtype = torch.float64
    return model


def documents(lengths=LENGTHS, seed=0, repeat=None):
    """Token lists: BOS and what follows, so that a document has as many targets as it has tokens."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(4, VOCAB, length - 1) for length in lengths]
    if repeat:
        texts = [np.resize(rng.integers(4, VOCAB, repeat), length - 1) for length in lengths]
    return [[BOS, *text.tolist()] for text in texts]


def stream(texts, last=(BOS,)):
    """The validation split of these documents; by default the last one, too, is closed by a BOS."""
    tokens = np.array([token for text in texts for token in text] + list(last))
    return Validation(tokens, np.where(tokens == BOS, 0, 2), int((tokens == BOS).sum()), True)


def nats_of(model, val, config, kind="ttt"):
    """Nats of every target (n,), by one evaluator."""
    guest = make_guest(kind, model, config, World(), PHASE)
    return score(kind, guest, val, config, World(), lambda: 0.0).by_target


def by_document(texts, nats):
    """Nats of each document's targets."""
    ends = np.cumsum([len(text) for text in texts])
    return [nats[end - len(text) + 1:end + 1] for text, end in zip(texts, ends, strict=True)]


# -- the plain re-implementation


def add_low(a, b, scale, y, x):
    """y (1, T, out) plus the low-rank addition of one document."""
    return y + scale * torch.einsum("or,ri,bti->bto", b, a, x)


def add_whole(weight, y, x):
    return y + torch.einsum("oi,bti->bto", weight, x)


class Pupil:
    """One document's additions: torch's own AdamW, loss and average, and no batch."""

    def __init__(self, guest, config, carried):
        self.settings = config.ttt
        low, starts = len(guest.low), [start.clone() for start in guest.starts]
        if carried is not None:
            starts[:2 * low:2] = [part.detach().clone() for part in carried[:2 * low:2]]
        self.values = [start.requires_grad_() for start in starts]
        self.low, self.whole = guest.low, guest.whole
        groups = [{"params": self.values[:2 * low], "lr": self.settings.ttt_lora_lr},
                  {"params": self.values[2 * low:], "lr": self.settings.ttt_down_lr}]
        groups = [group for group in groups if group["params"]]
        self.adam = torch.optim.AdamW(groups, betas=(self.settings.ttt_beta1, self.settings.ttt_beta2), eps=1e-10,
                                      weight_decay=self.settings.ttt_weight_decay) if groups else None
        self.average = [value.detach().clone() for value in self.values]

    def deltas(self, parts):
        scale = self.settings.ttt_lora_alpha / self.settings.ttt_lora_rank if self.low else 0
        found = {site: functools.partial(add_low, parts[2 * i], parts[2 * i + 1], scale)
                 for i, site in enumerate(self.low)}
        return found | {site: functools.partial(add_whole, parts[2 * len(self.low) + i])
                        for i, site in enumerate(self.whole)}

    def losses(self, model, tokens, low, high, start, parts):
        """Nats of targets low + 1 .. high, in a row that ends before token `high`."""
        begin = max(start, high - self.settings.ttt_eval_seq_len)
        deltas = self.deltas(parts)
        hidden = make_forward(model, len(model.phases) - 1)(tokens[None, begin:high], None, deltas)
        logits = model.logits(hidden, deltas)[0, low - begin:]
        return -logits.log_softmax(-1)[torch.arange(high - low), tokens[low + 1:high + 1]]

    def read(self, model, tokens, start, end, chunk, nats):
        for low in range(start, end, chunk):
            high = min(low + chunk, end)
            polyak = self.settings.ttt_polyak_decay
            with torch.no_grad():
                parts = self.average if polyak else self.values
                nats[low + 1:high + 1] = self.losses(model, tokens, low, high, start, parts).numpy()
            if high == end or self.adam is None:
                continue
            for _ in range(self.settings.ttt_grad_steps):
                self.adam.zero_grad()
                self.losses(model, tokens, low, high, start, self.values).mean().backward()
                self.adam.step()
                self.average = [polyak * old + (1 - polyak) * new.detach()
                                for old, new in zip(self.average, self.values, strict=True)]


def global_update(model, sgd, tokens, config):
    """SGD over the rows of `tokens`; what does not fill a row is left out."""
    ttt = config.ttt
    length = min(ttt.ttt_eval_seq_len, len(tokens) - 1)
    rows = [tokens[at:at + length + 1] for at in range(0, len(tokens) - length, length)]
    size = max(1, ttt.global_ttt_chunk_tokens // length)
    steps = [rows[at:at + size] for at in range(0, len(rows), size)] * ttt.global_ttt_epochs
    for number, step in enumerate(steps):
        batch = torch.stack(step)
        for group in sgd.param_groups:
            group["lr"] = ttt.global_ttt_lr * (1 + math.cos(math.pi * number / len(steps))) / 2
        sgd.zero_grad(set_to_none=False)
        inputs = batch[:, :-1]
        hidden = make_forward(model, len(model.phases) - 1)(inputs, document_index(inputs))
        F.cross_entropy(model.logits(hidden).flatten(0, 1), batch[:, 1:].flatten()).backward()
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
        if ttt.global_ttt_grad_clip:
            for grad in grads:
                grad *= min(1.0, ttt.global_ttt_grad_clip / norm)
        sgd.step()
    return len(steps)


def oracle(guest, val, config):
    """Nats of every target (n,): one document after the other, in the plan's groups and tracks."""
    tokens, nats, ttt = torch.from_numpy(val.tokens), np.zeros(len(val.tokens)), config.ttt
    model = copy.deepcopy(guest.model)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0, momentum=ttt.global_ttt_momentum)
    bos = [at for at in range(len(tokens)) if tokens[at] == BOS]
    ends = dict(zip(bos, [*bos[1:], len(tokens) - 1], strict=True))
    stages = plan_ttt(val.tokens, config)
    for stage in stages:
        for job in stage:
            carried = []
            for group in (item for item in job if item.fresh):
                starts = [window.start for window in group.windows]
                longest, chunk = max(ends[start] - start for start in starts), ttt.ttt_chunk_size
                for pair in reversed([pair for pair in ttt.ttt_short_score_first_steps.split(",") if pair]):
                    upto, size = map(int, pair.split(":"))
                    chunk = size if longest <= upto else chunk
                pupils = []
                for row, start in enumerate(starts):
                    before = carried[row].values if ttt.ttt_warm_start_a and row < len(carried) else None
                    pupils.append(Pupil(guest, config, before))
                    pupils[-1].read(model, tokens, start, ends[start], chunk, nats)
                carried = pupils
        if stage is not stages[-1] and ttt.global_ttt_lr:
            # The documents of a phase are the next ones of the stream, so what is scored is a beginning of it.
            end = 1 + max(window.stop for job in stage for item in job for window in item.windows)
            global_update(model, sgd, tokens[:end], config)
    return nats


MODES = {
    "plain": {}, "decay": {"TTT_WEIGHT_DECAY": 3}, "both moments": {"TTT_BETA1": 0.8, "TTT_BETA2": 0.95},
    "three steps": {"TTT_GRAD_STEPS": 3, "TTT_BETA1": 0.5}, "average": {"TTT_POLYAK_DECAY": 0.7},
    "average of steps": {"TTT_POLYAK_DECAY": 0.4, "TTT_GRAD_STEPS": 2},
    "matrix": {"TTT_DOWN_LR": 0.004}, "matrix alone": {"TTT_DOWN_LR": 0.004, "TTT_LORA_RANK": 0},
    "matrix, average": {"TTT_DOWN_LR": 0.004, "TTT_POLYAK_DECAY": 0.6, "TTT_GRAD_STEPS": 2},
    "chunk does not divide": {"TTT_CHUNK_SIZE": 7, "TTT_EVAL_SEQ_LEN": 20},
    "one token": {"TTT_CHUNK_SIZE": 1, "TTT_EVAL_SEQ_LEN": 2, "TTT_SITES": "v"},
    "chunks by length": {"TTT_SHORT_SCORE_FIRST_STEPS": "5:2,20:3,41:5"},
    **{part: {"TTT_SITES": part} for part in TTT_PARTS},
    "warm": {"TTT_WARM_START_A": 1}, "warm, average": {"TTT_WARM_START_A": 1, "TTT_POLYAK_DECAY": 0.5},
    "warm, matrix": {"TTT_WARM_START_A": 1, "TTT_DOWN_LR": 0.004},
    "phased": PHASED, "phased, warm": {**PHASED, "TTT_WARM_START_A": 1, "TTT_GRAD_STEPS": 2},
    "phased, two epochs": {**PHASED, "GLOBAL_TTT_EPOCHS": 2, "GLOBAL_TTT_GRAD_CLIP": 0.02},
    "phased, free": {**PHASED, "GLOBAL_TTT_GRAD_CLIP": 0, "GLOBAL_TTT_MOMENTUM": 0, "PHASED_TTT_NUM_PHASES": 1},
    # More rows in a step than the parts that ranks share, and not a multiple of them.
    "phased, many rows": {**PHASED, "GLOBAL_TTT_CHUNK_TOKENS": 11 * 8, "TTT_EVAL_SEQ_LEN": 8},
}


@pytest.mark.parametrize("mode", MODES)
def test_score_equals_a_plain_reimplementation(double, monkeypatch, mode):
    monkeypatch.setattr(train_gpt, "PARTS", 2)
    config = tiny(**MODES[mode])
    model, val = shaken(config), stream(documents(), last=(BOS, 7, 9))
    found = nats_of(model, val, config)
    wanted = oracle(make_guest("ttt", model, config, World(), PHASE), val, config)
    assert np.abs(found - wanted).max() < EXACT
    # The mode matters: what it does is far above the tolerance.
    still = nats_of(model, val, tiny(**{**MODES[mode], "TTT_GRAD_STEPS": 0, "GLOBAL_TTT_LR": 0}))
    assert np.abs(found - still).max() > 1e-3
    if mode != "plain" and mode not in TTT_PARTS:
        assert np.abs(found - nats_of(model, val, tiny())).max() > 1e-4


def test_single_precision_stays_near_the_reimplementation():
    config = tiny(TTT_LORA_LR=1e-3)
    model, val = shaken(config), stream(documents())
    wanted = oracle(make_guest("ttt", model, config, World(), PHASE), val, config)
    assert np.abs(nats_of(model, val, config) - wanted).max() < 1e-4


def test_starts_are_drawn_by_site_and_seed():
    """A is uniform within 1 / sqrt(in), B is zero; a site's draw does not depend on the other sites."""
    config = tiny(TTT_LORA_RANK=64)
    model = shaken(config)
    guest, alone = (make_guest("ttt", model, c, World(), PHASE) for c in (config, tiny(TTT_LORA_RANK=64,
                                                                                     TTT_SITES="v")))
    shapes = site_shapes(model, len(model.phases) - 1)
    for number, site in enumerate(guest.low):
        (inputs, outputs), (a, b) = shapes[site], guest.starts[2 * number:2 * number + 2]
        assert a.shape == (64, inputs) and b.shape == (outputs, 64) and not b.any()
        assert 0.9 < float(a.abs().max()) * inputs ** 0.5 <= 1 and abs(float(a.mean())) < 0.1 * inputs ** -0.5
        generator = torch.Generator().manual_seed(stream_seed(config.run.seed, f"ttt {site}"))
        bound = inputs ** -0.5
        assert torch.equal(a, torch.empty(64, inputs).uniform_(-bound, bound, generator=generator))
    assert alone.low == [site for site in guest.low if site.endswith(".v")]
    assert torch.equal(alone.starts[0], guest.starts[2 * guest.low.index(alone.low[0])])
    # Three visits of two blocks: the loop has a set for each visit, the head one.
    assert len(guest.low) == 3 * 5 + 1
    other = make_guest("ttt", model, tiny(TTT_LORA_RANK=64, SEED=config.run.seed + 1), World(), PHASE)
    assert not torch.equal(other.starts[0], guest.starts[0])


# -- what learns nothing is the plain evaluator


STILL = {"rank 0": {"TTT_LORA_RANK": 0}, "rate 0": {"TTT_LORA_LR": 0, "TTT_WEIGHT_DECAY": 7},
         "no steps": {"TTT_GRAD_STEPS": 0}, "no steps, average": {"TTT_GRAD_STEPS": 0, "TTT_POLYAK_DECAY": 0.9},
         "rate 0, warm": {"TTT_LORA_LR": 0, "TTT_WARM_START_A": 1},
         "phases without a rate": {"TTT_LORA_RANK": 0, **PHASED, "GLOBAL_TTT_LR": 0},
         "alpha 0": {"TTT_LORA_ALPHA": 0}}


@pytest.mark.parametrize("mode, length, chunk", [*((mode, 24, 8) for mode in STILL), ("rank 0", 16, 16),
                                                 ("rate 0", 3, 1)])
def test_what_learns_nothing_is_the_document_evaluator(mode, length, chunk):
    config = tiny(EVAL_SEQ_LEN=length, EVAL_STRIDE=chunk, TTT_EVAL_SEQ_LEN=length, TTT_CHUNK_SIZE=chunk, **STILL[mode])
    model, val = shaken(config), stream(documents(), last=(BOS, 5))
    found, wanted = (nats_of(model, val, config, kind) for kind in ("ttt", "document"))
    assert np.abs(found - wanted).max() < 1e-6 * max(1, np.abs(wanted).max())


def test_first_chunks_are_scored_by_the_base_model(double):
    config = tiny(TTT_LORA_LR=0.1, TTT_DOWN_LR=0.1, EVAL_STRIDE=24)
    model, texts = shaken(config), documents()
    val = stream(texts)
    learned, plain = (by_document(texts, nats_of(model, val, config, kind)) for kind in ("ttt", "document"))
    for text, ours, theirs in zip(texts, learned, plain, strict=True):
        assert np.abs(ours[:8] - theirs[:8]).max() < EXACT
        assert len(text) <= 8 or np.abs(ours[8:] - theirs[8:]).max() > 1e-3


# -- strict: a document is alone


@pytest.mark.parametrize("more", [{}, {"TTT_GRAD_STEPS": 2, "TTT_POLYAK_DECAY": 0.5}, {"TTT_DOWN_LR": 0.003}])
def test_neighbours_change_nothing(double, more):
    """Batch sizes, order and company: each document's nats stay."""
    texts = documents()
    wanted = by_document(texts, nats_of(shaken(tiny()), stream(texts), tiny(**more)))
    for batch, order in ((1, range(11)), (64, range(11)), (3, range(10, -1, -1)), (2, [3, 8, 0, 6, 5])):
        config, chosen = tiny(**more, TTT_BATCH_SIZE=batch), [texts[number] for number in order]
        found = by_document(chosen, nats_of(shaken(config), stream(chosen), config))
        assert max(np.abs(wanted[number] - row).max() for number, row in zip(order, found, strict=True)) < EXACT


def test_neighbours_change_nothing_in_single_precision():
    texts, config = documents(), tiny(TTT_LORA_LR=1e-3)
    found = [nats_of(shaken(config), stream(texts), tiny(TTT_LORA_LR=1e-3, TTT_BATCH_SIZE=batch))
             for batch in (1, 2, 64)]
    assert max(np.abs(a - b).max() for a, b in itertools.combinations(found, 2)) < 1e-5 * found[0].max()


def test_a_document_twice_gets_the_same_bits():
    """Alone in its batch, whatever came before it; and the whole score again is the same bits."""
    text, other = documents((75,))[0], documents((50,), seed=9)[0]
    config = tiny(TTT_BATCH_SIZE=1)
    model = shaken(config)
    texts = [text, other, text]
    found = by_document(texts, nats_of(model, stream(texts), config))
    assert np.array_equal(found[0], found[2])
    assert np.array_equal(found[0], by_document([text], nats_of(model, stream([text]), config))[0])
    again = by_document(texts, nats_of(model, stream(texts), config))
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))


def changed_by(config, changed, monkeypatch=None):
    """Documents whose nats change when the text of document `changed` does, its length staying."""
    texts, model = documents(), shaken(config)
    before = by_document(texts, nats_of(model, stream(texts), config))
    texts[changed] = [BOS, *(4 + (token - 3) % (VOCAB - 4) for token in texts[changed][1:])]
    after = by_document(texts, nats_of(model, stream(texts), config))
    return {number for number, (a, b) in enumerate(zip(before, after, strict=True)) if not np.array_equal(a, b)}


@pytest.mark.parametrize("more", [{}, {"TTT_POLYAK_DECAY": 0.5, "TTT_DOWN_LR": 0.003, "TTT_SITES": "q,embed,o"}])
def test_strict_mode_leaks_nothing(more):
    for number in (3, 7, 8):
        assert changed_by(tiny(**more), number) == {number}


def test_declared_modes_leak_and_only_forwards(monkeypatch):
    """A phase changes the documents of the next ones, a warm start those that come later on its track."""
    # Documents 0-2 are the first phase, 3-6 the second, 7-10 come last.
    assert changed_by(tiny(**PHASED), 0) == {0, *range(3, 11)}
    assert changed_by(tiny(**PHASED), 6) == {6, *range(7, 11)}
    assert changed_by(tiny(**PHASED), 10) == {10}
    assert changed_by(tiny(**{**PHASED, "GLOBAL_TTT_LR": 0}), 0) == {0}
    monkeypatch.setattr(train_gpt, "PARTS", 1)
    warm = tiny(TTT_WARM_START_A=1, TTT_BATCH_SIZE=2)
    order = [[window.start for window in item.windows] for job in plan_ttt(stream(documents()).tokens, warm)[0]
             for item in job if item.fresh]
    starts = np.cumsum([0, *LENGTHS[:-1]]).tolist()
    played = [[starts.index(start) for start in group] for group in order]
    assert played == [[3, 6], [8, 0], [9, 10], [5, 2], [4], [7, 1]]
    # Row by row. Those of one chunk are scored before they learn, so they show no trace of where they began.
    assert changed_by(warm, 6) == {6, 0, 10, 2}
    assert changed_by(warm, 8) == {8, 9, 5}
    assert changed_by(warm, 5) == {5}


@pytest.mark.parametrize("more", [{}, {"TTT_GRAD_STEPS": 2, "TTT_POLYAK_DECAY": 0.5, "TTT_DOWN_LR": 0.003},
                                  {"TTT_SITES": ",".join(TTT_PARTS)},
                                  {**PHASED, "PHASED_TTT_PREFIX_DOCS": 4, "GLOBAL_TTT_CHUNK_TOKENS": 24}])
def test_no_target_depends_on_what_comes_later(more):
    """Bit for bit: change token t and what follows; targets before t keep their nats. In the strict and in the phased
    mode the stream is a valid order."""
    lengths = (13, 1, 8, 22, 5, 9)
    config = tiny(TTT_CHUNK_SIZE=4, TTT_EVAL_SEQ_LEN=12, **more)
    model, tokens = shaken(config), stream(documents(lengths)).tokens
    plain = nats_of(model, stream(documents(lengths)), config)
    for t in (2, 3, 4, 5, 12, 16, 27, 28, 29, 43, 46, len(tokens) - 2):
        other = tokens.copy()
        spot = (np.arange(len(tokens)) >= t) & (tokens != BOS)
        other[spot] = 4 + (other[spot] - 3) % (VOCAB - 4)
        found = nats_of(model, Validation(other, tokens, 6, True), config)
        first = int(np.flatnonzero(spot)[0]) if spot.any() else len(tokens)
        assert np.array_equal(found[:first], plain[:first])
        assert not spot.any() or found[first] != plain[first]


def test_on_a_warm_track_no_target_depends_on_what_is_played_later(monkeypatch):
    """The order there is the plan's: round after round of each job."""
    monkeypatch.setattr(train_gpt, "PARTS", 2)
    config, texts = tiny(TTT_WARM_START_A=1), documents()
    model, val = shaken(config), stream(texts)
    plain = nats_of(model, val, config)
    for job in plan_ttt(val.tokens, config)[0]:
        order = [[int(at) for at in targets_of(item.windows)] for item in job]
        for number in range(0, len(order), 4):
            at = next((at for at in order[number] if val.tokens[at] != BOS), None)
            if at is None:
                continue
            other = val.tokens.copy()
            other[at] = 4 + (other[at] - 3) % (VOCAB - 4)
            differs = set(np.flatnonzero(nats_of(model, val._replace(tokens=other), config) != plain).tolist())
            assert at in differs
            assert differs <= {target for later in order[number:] for target in later}
            # Within the round, only its own row, from the target on.
            row = next(w for w in job[number].windows if w.first <= at <= w.stop)
            assert differs & set(order[number]) <= set(range(at, row.stop + 1))


# -- it learns


class Watched(TestTime):
    """Keeps the states it made."""
    __test__ = False
    states = ()

    def begin(self, rows, before):
        state = super().begin(rows, before)
        self.states = [*self.states, state]
        return state


def test_it_learns_repetitions_and_every_part_moves():
    """Documents that repeat 12 tokens: far below the plain score; no adapter is dead, whatever its site."""
    more = {"TTT_WEIGHT_DECAY": 0, "TTT_LORA_LR": 0.02, "TTT_BATCH_SIZE": 4, "EVAL_STRIDE": 8, "TTT_LORA_RANK": 4}
    texts = documents((200, 170, 150, 120), repeat=12)
    for sites, down in ((",".join(TTT_PARTS), 0.0), ("q,k,v,attn,mlp,head", 0.002)):
        config = tiny(TTT_SITES=sites, TTT_DOWN_LR=down, **more)
        model, val = shaken(config), stream(texts)
        before = weights_digest(dict(model.named_parameters()))
        guest = Watched(model, config, World(), len(model.phases) - 1, False)
        found = score("ttt", guest, val, config, World(), lambda: 0.0)
        plain = nats_of(model, val, config, "document").sum()
        assert found.nats < 0.8 * plain, (found.nats, plain)
        # Later chunks gain more than early ones.
        gains = [row[100:].mean() / row[:8].mean() for row in by_document(texts, found.by_target)]
        assert max(gains) < 0.8
        assert len(guest.states) == 1
        for value, start in zip(guest.states[0].values, guest.starts, strict=True):
            moved = (value - start).flatten(1).abs()
            # Every row of every part, and within it nearly all numbers.
            assert (moved.amax(1) > 1e-4).all() and float((moved > 0).float().mean()) > 0.9
        assert weights_digest(dict(model.named_parameters())) == before
        assert all(parameter.grad is None for parameter in model.parameters())


def test_a_global_update_leaves_the_model_that_was_passed_alone():
    """It learns on a copy, and it helps: the documents share their repeated text."""
    text = documents((60,), repeat=9)[0]
    config = tiny(TTT_LORA_RANK=0, PHASED_TTT_PREFIX_DOCS=6, PHASED_TTT_NUM_PHASES=3, GLOBAL_TTT_LR=0.1,
                  GLOBAL_TTT_CHUNK_TOKENS=32, GLOBAL_TTT_EPOCHS=4)
    model, val = shaken(config), stream([text] * 8)
    before = weights_digest(dict(model.named_parameters()))
    guest = make_guest("ttt", model, config, World(), PHASE)
    found = score("ttt", guest, val, config, World(), lambda: 0.0)
    assert weights_digest(dict(model.named_parameters())) == before and guest.model is not model
    rows = [row.sum() for row in by_document([text] * 8, found.by_target)]
    # Of a phase's two equal documents, side by side in a batch, the nats may differ by rounding.
    assert rows[::2] == pytest.approx(rows[1::2], rel=1e-6) and rows[0] > rows[2] > rows[4] > rows[6]
    assert rows[7] < 0.8 * rows[0]
    assert found.ledger["updates"] == 3


def test_the_last_chunk_is_never_learned_from():
    """The ledger counts an update for each chunk that another of its document follows, and no other."""
    config = tiny(TTT_BATCH_SIZE=1)
    val = stream(documents())
    found = score("ttt", make_guest("ttt", shaken(config), config, World(), PHASE), val, config, World(), lambda: 0.0)
    assert found.ledger["updates"] == sum(math.ceil(length / 8) - 1 for length in LENGTHS)


# -- the plan


def corpus(seed, count=400):
    """Tokens of documents as long as a web corpus's: half below 500, a few of many thousands."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(np.exp(rng.normal(6.1, 1.1, count)), 5, 20000).astype(int)
    tokens = np.full(lengths.sum() + 1, 5)
    tokens[np.concatenate([[0], np.cumsum(lengths)])] = BOS
    return lengths, tokens


def published_positions(lengths, rows, chunk, context):
    """Positions of the published loop: groups of `rows` by length, every row computed until the longest is done."""
    total = 0
    for at in range(0, len(lengths), rows):
        group = sorted(lengths)[at:at + rows]
        total += sum(len(group) * min((number + 1) * chunk, context, group[-1])
                     for number in range(math.ceil(group[-1] / chunk)))
    return total


@pytest.mark.parametrize("seed", [0, 1])
def test_finished_rows_are_dropped(seed):
    """Nothing is computed for a document that is done, and little for padding: the published groups cost more."""
    lengths, tokens = corpus(seed)
    config = small_config(TTT_BATCH_SIZE=64, TTT_CHUNK_SIZE=48, TTT_EVAL_SEQ_LEN=2048)
    rounds = [item for stage in plan_ttt(tokens, config) for job in stage for item in job]
    # Chunks of each document, each once, and no row besides.
    assert sum(len(item.windows) for item in rounds) == sum(math.ceil(length / 48) for length in lengths)
    assert all(w.first <= w.stop for item in rounds for w in item.windows)
    alone = sum(min(stop, 2048) for length in lengths for stop in [*range(48, length, 48), length])
    ours = sum(item.positions() for item in rounds)
    assert alone <= ours < 1.02 * alone
    published = published_positions(lengths, 64, 48, 2048)
    assert ours < (0.85 if seed else 0.75) * published, ours / published


def test_positions_count_rows_times_the_longest():
    assert Round([Window(0, 9, 1), Window(20, 24, 22), Window(30, 31, 31)]).positions() == 27


@pytest.mark.parametrize("batch", [1, 5, 24])
def test_groups_obey_the_table_of_chunks(batch):
    lengths, tokens = corpus(3, 250)
    config = small_config(TTT_BATCH_SIZE=batch, TTT_CHUNK_SIZE=48, TTT_EVAL_SEQ_LEN=512,
                          TTT_SHORT_SCORE_FIRST_STEPS="256:8, 2000:24,")
    sizes = dict(find_documents(tokens))
    seen = set()
    [stage] = plan_ttt(tokens, config)
    for job in stage:
        longest = max(sizes[w.start] - w.start for w in job[0].windows)
        assert len(job[0].windows) <= batch
        assert all(2 * (sizes[w.start] - w.start) >= longest for w in job[0].windows)
        chunk = 8 if longest <= 256 else 24 if longest <= 2000 else 48
        seen.add(chunk)
        for number, item in enumerate(job):
            assert item.fresh == (number == 0)
            done = [w.stop - w.first + 1 for w in item.windows]
            assert done[:item.more] == [chunk] * item.more and all(1 <= size <= chunk for size in done[item.more:])
            assert all(w.stop - w.start == min(w.stop - max(0, w.stop - 512), 512) or w.stop - w.start < 512
                       for w in item.windows)
    assert seen == {8, 24, 48}


def test_the_longest_jobs_come_first():
    """The last one to start is short: nobody waits for a long one that began late."""
    _, tokens = corpus(4)
    [stage] = plan_ttt(tokens, small_config(TTT_BATCH_SIZE=8, TTT_CHUNK_SIZE=48, TTT_EVAL_SEQ_LEN=512))
    costs = [sum(256 + item.positions() for item in job) for job in stage]
    for share in assign(stage, 4):
        assert [costs[job] for job in share] == sorted((costs[job] for job in share), reverse=True)
    assert {share[0] for share in assign(stage, 4)} == set(np.argsort(costs)[-4:].tolist())


@settings(deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 300)), min_size=1, max_size=4), max_size=40),
       st.integers(1, 9), st.sampled_from([0.0, *STEP_POSITIONS.values()]))
def test_jobs_are_shared_evenly(shapes, workers, step):
    """Every job once, the same every time, and no worker has more than the lightest one plus one job."""
    jobs = [tuple(Round([Window(0, length, 1)] * rows) for rows, length in job) for job in shapes]
    shares = assign(jobs, workers, step)
    assert shares == assign(copy.deepcopy(jobs), workers, step) and len(shares) == workers
    assert sorted(job for share in shares for job in share) == list(range(len(jobs)))
    costs = [sum(step + rows * length for rows, length in job) for job in shapes]
    loads = [sum(costs[job] for job in share) for share in shares]
    # Whoever is heaviest got its last job, its lightest, when nobody had less.
    heaviest = max(range(workers), key=loads.__getitem__)
    if shares[heaviest]:
        assert loads[heaviest] - min(costs[job] for job in shares[heaviest]) <= min(loads)
        # Graham's bound for longest first, against the two lower bounds of any division.
        best = max(sum(costs) / workers, max(costs))
        assert loads[heaviest] <= best + min(costs[job] for job in shares[heaviest])


def test_warm_tracks_hold_every_group_once_and_in_the_same_order_everywhere():
    _, tokens = corpus(5, 120)
    words = {"TTT_BATCH_SIZE": 4, "TTT_CHUNK_SIZE": 48, "TTT_EVAL_SEQ_LEN": 512}
    [strict], [warm] = (plan_ttt(tokens, small_config(**words, TTT_WARM_START_A=flag)) for flag in (0, 1))
    assert len(warm) == train_gpt.PARTS < len(strict)
    assert sorted(item for job in warm for item in job) == sorted(item for job in strict for item in job)
    assert all(job[0].fresh for job in warm) and sum(item.fresh for job in warm for item in job) == len(strict)


@pytest.mark.parametrize("count, phases, bounds", [(4, 2, [2, 4, 11]), (3, 1, [3, 11]), (2, 5, [1, 2, 11]),
                                                   (99, 2, [5, 11]), (0, 3, [11])])
def test_phases_divide_the_prefix(count, phases, bounds):
    val = stream(documents())
    stages = plan_ttt(val.tokens, tiny(PHASED_TTT_PREFIX_DOCS=count, PHASED_TTT_NUM_PHASES=phases))
    found = [max(w.stop for job in stage for item in job for w in item.windows) for stage in stages]
    assert found == [sum(LENGTHS[:bound]) for bound in bounds]


# -- settings


@pytest.mark.parametrize("text, steps", [("", ()), ("256:8", ((256, 8),)), (" 256:8 , 2000:24 ,", ((256, 8),
                                                                                               (2000, 24)))])
def test_chunk_steps_are_read(text, steps):
    assert parse_chunk_steps(text) == steps


@pytest.mark.parametrize("text", ["8", "8:", ":8", "8:0", "0:8", "-1:8", "8:2:3", "8:2;9:3", "9:3,8:2", "8:2,8:3",
                                  "a:b", "8.5:2", "8:2,x", "1e3:4", "9999999999:1"])
def test_chunk_steps_that_cannot_be_are_one_line(text):
    with pytest.raises(ConfigError, match="^TTT_SHORT_SCORE_FIRST_STEPS=.*: must be length:chunk pairs with rising"):
        parse_chunk_steps(text)
    with pytest.raises(ConfigError) as caught:
        load_config([f"TTT_SHORT_SCORE_FIRST_STEPS={text}"], {}, gpus=0)
    assert "TTT_SHORT_SCORE_FIRST_STEPS" in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("word, said", [
    ("TTT_SITES=q,z", "must be some of q, k, v"), ("TTT_SITES=", "must name at least one"),
    ("TTT_SITES=q,q", "names something twice"), ("TTT_LORA_RANK=-1", "at least 0"), ("TTT_LORA_LR=-1", "at least 0"),
    ("TTT_BETA2=1", "at most"), ("TTT_POLYAK_DECAY=1", "at most"), ("TTT_CHUNK_SIZE=0", "at least 1"),
    ("TTT_BATCH_SIZE=0", "at least 1"), ("TTT_GRAD_STEPS=1.5", "whole number"), ("TTT_WARM_START_A=2", "0 or 1"),
    ("PHASED_TTT_NUM_PHASES=0", "at least 1"), ("GLOBAL_TTT_CHUNK_TOKENS=0", "at least 1"),
    ("TTT_ENABLED=1", "EVAL names ttt"), ("TTT_CHUNK_SIZE=9999", "at most TTT_EVAL_SEQ_LEN"),
    ("TTT_SHORT_SCORE_FIRST_STEPS=9:9999", "at most"), ("TTT_DOWN_LR=1e999", "at least 0")])
def test_a_setting_that_cannot_be_is_one_line(word, said):
    with pytest.raises(ConfigError) as caught:
        load_config([word], {}, gpus=0)
    text = str(caught.value)
    assert text.startswith(word.partition("=")[0]) and said in text and len(text.splitlines()) == 1
