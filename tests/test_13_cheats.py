"""Cheating evaluators, models, plans, referees and byte counters, each caught by the referee or by the audit.

Every cheater has an honest twin, the same code with its cheat switched off, that passes: no test here can pass because
something else is broken. The honest rows of EVALUATORS pass every rule.
"""

import copy
import dataclasses
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import prepare
import pytest
import torch
import torch.nn.functional as F
from conftest import FITTING, ROOT, make_model, small_config, small_words
from torch import nn

import train_gpt
from train_gpt import (
    BOS,
    EVALUATORS,
    CheckError,
    Evaluator,
    Frozen,
    Ledger,
    Referee,
    Round,
    TestTime,
    Validation,
    World,
    make_byte_counter,
    make_guest,
    make_loss,
    plan_contiguous,
    plan_ttt,
    score,
    shrink_nothing,
)

sys.path.insert(0, str(ROOT / "tools"))

import audit  # noqa: E402

VOCAB, LENGTHS = 384, (70, 30, 45, 26, 38)
SETTINGS = {"STACK": "A2", "EVAL_SEQ_LEN": 48, "EVAL_STRIDE": 16, "EVAL_BATCH_TOKENS": 96, "TTT_EVAL_SEQ_LEN": 48,
            "TTT_CHUNK_SIZE": 12, "TTT_BATCH_SIZE": 2, "TTT_LORA_RANK": 2, "TTT_LORA_LR": "0.01",
            "NGRAM_CHUNK_TOKENS": 40}
ALL = frozenset(audit.RULES)  # every rule but bytes, which no evaluator can break


def split(lengths=LENGTHS):
    """A dataset as the audit sees it, whose bytes are promised, not decoded."""
    rng = np.random.default_rng(0)
    # Repeats within a document, so that what has learned from it knows more.
    tokens = np.concatenate([[BOS, *rng.choice(rng.integers(4, VOCAB, 12), length - 1)] for length in lengths])
    counts = np.where(tokens == BOS, 0, 3)
    manifest = {"byte_rule": "sidecar", "val": {"counted_bytes": int(counts.sum())}}
    return SimpleNamespace(val=Validation(tokens, counts, len(lengths), True), manifest=manifest)


def settings_for(kind, **more):
    """The small configuration with one evaluator, whatever its name."""
    config = small_config(**{**SETTINGS, **({} if "STACK" in more else FITTING.get(kind, {})), **more})
    return config._replace(eval=dataclasses.replace(config.eval, eval=(kind,)))


def verdicts_on(kind, config, model, data=None, tokens=210):
    return audit.audit(train_gpt, config, model, data or split(), tokens, lambda: 0.0)


def broken(verdicts):
    """The rules that fail."""
    return {rule for rule, verdict in verdicts.items() if not verdict["pass"]}


# What guests do -----------------------------------------------------------------------------------------------------


class Cheater(Frozen):
    """A guest that is honest where `cheats` says so."""
    cheats = True

    def rows(self, ask):
        """Logits (S, V) at the places, as the honest guest has them."""
        with torch.inference_mode():
            return self.model.logits(self.forward(ask.tokens, ask.docs).flatten(0, 1)[ask.places])

    def peek(self, ask):
        """The token behind each place, which is its target, and where the row shows it (S,)."""
        flat = F.pad(ask.tokens, (0, 1), value=-1)
        index = ask.places + torch.div(ask.places, ask.tokens.shape[1], rounding_mode="floor") + 1
        next_one = flat.flatten()[index]
        return next_one.clamp(min=0), (next_one >= 0) & self.cheats


class BestOfTwo(Cheater):
    """The better of two models, target by target."""

    def predict(self, state, ask, offer):
        one, (target, seen) = self.rows(ask), self.peek(ask)
        two = one.roll(1, -1)
        better = two.log_softmax(-1).gather(1, target[:, None]) > one.log_softmax(-1).gather(1, target[:, None])
        offer(torch.where(better & seen[:, None], two, one))


class OracleMix(Cheater):
    """Two experts whose weights come from what they give to the realised token. Source: the oracle alpha of n-gram
    caches."""
    normalised = True

    def predict(self, state, ask, offer):
        one, (target, seen) = self.rows(ask).softmax(-1), self.peek(ask)
        two = one.roll(1, -1)
        odds = 8 * (two.gather(1, target[:, None]) / one.gather(1, target[:, None])).log()
        weight = torch.where(seen[:, None], odds.sigmoid(), 0.5)
        offer((weight * two + (1 - weight) * one).log())


class WordStart(Cheater):
    """A tilt towards half of the vocabulary, by the class of the token that follows."""

    def predict(self, state, ask, offer):
        (target, seen), half = self.peek(ask), torch.arange(VOCAB) % 2
        offer(self.rows(ask) + (seen[:, None] & (half == target[:, None] % 2)).float())


class TwoAhead(Cheater):
    """Looks at the token behind its target, never at the target."""

    def predict(self, state, ask, offer):
        flat, last = ask.tokens.flatten(), ask.tokens.numel() - 1
        later, warm = flat[(ask.places + 2).clamp(max=last)], self.rows(ask)
        offer(warm * (1 + 0.01 * (later % 5)[:, None] * self.cheats))


class UpdateInPredict(TestTime):
    """Learns from the targets of a chunk, as far as it is shown them as inputs, and then scores the chunk."""
    cheats = True

    def predict(self, state, ask, offer):
        if self.cheats and ask.more:
            flat = F.pad(ask.tokens, (0, 1)).flatten()
            rows = torch.div(ask.places, ask.tokens.shape[1], rounding_mode="floor")
            self.learn(state, ask, flat[ask.places + rows + 1])
        return super().predict(state, ask, offer)


class SecondPass(Cheater):
    """Learns from the whole split before it scores any of it."""
    tokens = None

    @classmethod
    def plan(cls, tokens, config):
        cls.tokens = tokens
        return plan_contiguous(tokens, config)

    def begin(self, rows, before):
        if self.cheats and not hasattr(self, "learned"):
            self.learned = True
            self.use(copy.deepcopy(self.model))
            row = torch.from_numpy(self.tokens)[None]
            loss, parameters = make_loss(self.model, self.phase), list(self.model.parameters())
            with torch.enable_grad():
                grads = torch.autograd.grad(loss(row[:, :-1], row[:, 1:], None), parameters, materialize_grads=True)
            torch._foreach_add_([parameter.data for parameter in parameters], grads, alpha=-1.0)


class RankMood(Cheater):
    """Predicts otherwise on another rank."""

    def predict(self, state, ask, offer):
        offer(self.rows(ask) * (1 + 0.01 * self.world.rank * self.cheats))


class Hoarder(Cheater):
    """Counts tokens in the guest instead of in the state of its rows: what it knows depends on what its rank played."""

    def begin(self, rows, before):
        if not self.cheats or not hasattr(self, "counts"):
            self.counts = torch.zeros(VOCAB)
        return self.counts if self.cheats else torch.zeros(rows, VOCAB)

    def predict(self, state, ask, offer):
        rows = self.rows(ask)
        owner = torch.repeat_interleave(torch.tensor(ask.counts))
        offer(rows + (state if self.cheats else state[owner]).log1p())

    def learn(self, state, ask, targets):
        at = 0
        for row, count in enumerate(ask.counts[:ask.more]):
            (state if self.cheats else state[row]).index_add_(0, targets[at:at + count], torch.ones(count))
            at += count
        return True


class Diary(Cheater):
    """Remembers from one evaluation to the next how often it was asked, and sharpens itself."""
    asked = 0

    def __init__(self, *parts):
        super().__init__(*parts)
        type(self).asked += self.cheats
        self.sharper = 1 + 0.01 * type(self).asked

    def predict(self, state, ask, offer):
        offer(self.rows(ask) * self.sharper)


class Vandal(Cheater):
    """Learns by changing the model that all evaluators are given."""

    def predict(self, state, ask, offer):
        offer(self.rows(ask))
        if self.cheats:
            self.model.tok_emb.data *= 1.0001


class HashedCache(Cheater):
    """The published n-gram cache: hashed tables of contexts and of contexts with their token, an estimate
    min(full, ctx) / ctx a token, mixed into the model. The estimates of all tokens sum to far more than one. The honest
    twin divides by the sum."""
    normalised, buckets, realised_only = True, 32, False

    def begin(self, rows, before):
        return torch.zeros(rows, 2, self.buckets)

    def keys(self, before, tokens):
        return before * 36313 % self.buckets, (before * 36313 ^ tokens * 27191) % self.buckets

    def predict(self, state, ask, offer):
        owner = torch.repeat_interleave(torch.tensor(ask.counts))
        tables, before = state[owner], ask.tokens.flatten()[ask.places]
        ctx_key, full_key = self.keys(before[:, None], torch.arange(VOCAB))
        ctx = tables[:, 0].gather(1, ctx_key)
        estimate = torch.minimum(tables[:, 1].gather(1, full_key), ctx) / ctx.clamp(min=1)
        model = self.rows(ask).softmax(-1)
        mixed = torch.where(ctx >= 2, 0.6 * model + 0.4 * estimate, model)
        if self.realised_only:
            target, seen = self.peek(ask)
            mixed = torch.where((torch.arange(VOCAB) == target[:, None]) & seen[:, None], mixed, model)
        offer((mixed if self.cheats else mixed / mixed.sum(-1, keepdim=True)).log())

    def learn(self, state, ask, targets):
        owner, count = torch.repeat_interleave(torch.tensor(ask.counts[:ask.more])), sum(ask.counts[:ask.more])
        keys = self.keys(ask.tokens.flatten()[ask.places[:count]], targets[:count])
        for table, key in enumerate(keys):
            state[:, table].index_put_((owner, key), torch.ones(count), accumulate=True)
        return True


class RealisedCache(HashedCache):
    """The same as it was published: only the realised token's probability is replaced."""
    realised_only = True


class TooFew(Cheater):
    def predict(self, state, ask, offer):
        offer(self.rows(ask)[self.cheats:])


class TooMany(Cheater):
    def predict(self, state, ask, offer):
        rows = self.rows(ask)
        offer(torch.cat([rows, rows[:self.cheats]]))


class HalfVocabulary(Cheater):
    def predict(self, state, ask, offer):
        rows = self.rows(ask)
        offer(rows[:, :VOCAB // 2] if self.cheats else rows)


class ImpossibleHalf(Cheater):
    def predict(self, state, ask, offer):
        rows = self.rows(ask).clone()
        if self.cheats:
            rows[:, VOCAB // 2:] = -torch.inf
        offer(rows)


class NotANumber(Cheater):
    def predict(self, state, ask, offer):
        rows = self.rows(ask).clone()
        if self.cheats:
            rows[0] = torch.nan
        offer(rows)


# What plans, models and referees do ---------------------------------------------------------------------------------


def without_tail(tokens, config):
    """All but the last window."""
    stages = plan_contiguous(tokens, config)
    windows = sorted(window for job in stages[0] for item in job for window in item.windows)
    return [[(Round(windows[:-1]),)]]


def twice(tokens, config):
    """A second pass over everything, in a stage of its own."""
    return plan_contiguous(tokens, config) * 2


def overlapping(tokens, config):
    """Sliding windows that begin to score one target too early."""
    stages = plan_contiguous(tokens, config)
    return [[tuple(item._replace(windows=[w._replace(start=w.start - (w.start > 0), first=w.first - (w.first > 1))
                                          for w in item.windows]) for item in job) for job in stages[0]]]


def by_content(tokens, config):
    """Windows as long as the last token says."""
    length = 30 + int(tokens[-2]) % 17
    return plan_contiguous(tokens, config._replace(eval=dataclasses.replace(config.eval, eval_seq_len=length)))


class FutureMean(nn.Module):
    """A mixer with the mean of its document in it, what lies ahead included; its honest twin takes what is behind."""

    def __init__(self, mixer, cheats):
        super().__init__()
        self.mixer, self.cheats = mixer, cheats

    def forward(self, x, context, sites, deltas):
        sight = (context.mask | context.mask.mT if self.cheats else context.mask)[:, 0].to(x.dtype)
        y, values = self.mixer(x, context, sites, deltas)
        return y + sight @ x / sight.sum(-1, keepdim=True), values


class Smear(nn.Module):
    """A mixer that adds the input of the position before; the honest twin not across a BOS."""

    def __init__(self, mixer, cheats):
        super().__init__()
        self.mixer, self.cheats = mixer, cheats

    def forward(self, x, context, sites, deltas):
        same = F.pad(context.mask[:, 0].diagonal(-1, 1, 2), (1, 0)).to(x.dtype)
        before = F.pad(x, (0, 0, 1, -1))
        y, values = self.mixer(x, context, sites, deltas)
        return y + before * (1 if self.cheats else same[..., None]), values


class CarriedState(nn.Module):
    """A delta memory in a loop that begins a pass, at position 0, with the state that the pass before left behind the
    last position, as the crawler was published; its honest twin begins every pass with nothing."""
    PASSES = 3

    def __init__(self, mixer, cheats):
        super().__init__()
        self.mixer, self.cheats, self.inner, self.held = mixer, cheats, mixer.rule, threading.local()
        mixer.rule = self.rule

    def rule(self, q, k, v, beta, decay, where, state, size):
        turn = getattr(self.held, "turn", 0)
        out, after = self.inner(q, k, v, beta, decay, where, self.held.state if turn and self.cheats else None, size)
        self.held.turn, self.held.state = (turn + 1) % self.PASSES, after
        return out, after

    def forward(self, x, context, sites, deltas):
        return self.mixer(x, context, sites, deltas)


class QuietLedger(Ledger):
    """Writes down an update that came too early and says nothing."""

    def learn(self, job, windows):
        for window in windows:
            self.journal[job] = self.journal.get(job, "") + f"learn {window.first} {window.stop};"
        self.updates[job] = self.updates.get(job, 0) + 1


class EarlyReferee(Referee):
    """Lets the update go first."""
    cheats, ledger_type = True, Ledger

    def __init__(self, *parts):
        super().__init__(*parts)
        self.ledger = self.ledger_type(len(self.tokens))

    def play(self, guest, number, job):
        for item in job if self.cheats else ():
            self.ledger.learn(number, item.windows)
        return super().play(guest, number, job)


class QuietReferee(EarlyReferee):
    """With a ledger that does not mind."""
    ledger_type = QuietLedger


class KindReferee(Referee):
    """Takes a tenth off every score."""
    cheats = True

    def settle(self, guest, targets, at, heard, values):
        super().settle(guest, targets, at, heard, values)
        heard[-1] *= 0.9 if self.cheats else 1.0


class Cheat(NamedTuple):
    """A guest or plan, or what is put into a model or in the referee's place, and the rules that must fail."""
    guest: type = Frozen
    plan: Callable | None = plan_contiguous
    fails: frozenset = frozenset()
    mixer: type | None = None
    referee: type | None = None
    stack: str = "A2"


def fails(*rules):
    return frozenset(rules)


CAUGHT = {
    "mean of what lies ahead": Cheat(mixer=FutureMean, fails=fails("causality", "realised_token")),
    "state carried into the next pass": Cheat(mixer=CarriedState, stack="A (D)*3",
                                              fails=fails("causality", "realised_token", "previous_document")),
    "token behind the target": Cheat(TwoAhead, fails=fails("causality", "realised_token", "previous_document")),
    "update inside predict": Cheat(UpdateInPredict, plan_ttt, fails=fails("causality", "realised_token")),
    "second pass": Cheat(SecondPass, SecondPass.plan, fails("causality", "realised_token", "previous_document")),
    "best of two": Cheat(BestOfTwo, fails=fails("realised_token")),
    "oracle mixing weight": Cheat(OracleMix, fails=fails("realised_token")),
    "class of the next token": Cheat(WordStart, fails=fails("realised_token")),
    "windows cut by content": Cheat(plan=by_content, fails=fails("causality", "realised_token", "previous_document")),
    "smear over BOS": Cheat(mixer=Smear, fails=fails("previous_document")),
    "depends on the rank": Cheat(RankMood, fails=fails("rank_count")),
    "state kept in the guest": Cheat(Hoarder, plan_ttt, fails("causality", "realised_token", "previous_document",
                                                             "rank_count")),
    "remembers earlier evaluations": Cheat(Diary, fails=ALL - {"distribution", "single_pass"}),
    "changes the model": Cheat(Vandal, fails=ALL - {"distribution", "single_pass"}),
    "score not that of the offer": Cheat(referee=KindReferee, fails=fails("distribution", "realised_token")),
    "early update, quiet ledger": Cheat(plan=plan_ttt, guest=TestTime, referee=QuietReferee,
                                        fails=fails("single_pass")),
    "hashed n-gram cache": Cheat(HashedCache, plan_ttt, ALL),
    "hashed cache, realised token": Cheat(RealisedCache, plan_ttt, ALL),
}

REFUSED = {
    "hashed n-gram cache": (Cheat(HashedCache, plan_ttt), r"what a predictor calls probabilities sums to e\^"),
    "too few rows": (Cheat(TooFew), "a predictor left some out"),
    "too many rows": (Cheat(TooMany), r"a predictor offered \(\d+, 384\) for \d+ targets"),
    "half of the vocabulary": (Cheat(HalfVocabulary), r"a predictor offered \(\d+, 192\) for"),
    "half of it impossible": (Cheat(ImpossibleHalf), r"\d+ infinity nats"),
    "not a number": (Cheat(NotANumber), "1 targets scored NaN"),
    "skipped tail": (Cheat(plan=without_tail), "targets were not scored exactly once"),
    "second pass in the plan": (Cheat(plan=twice), "scored twice"),
    "windows that overlap": (Cheat(plan=overlapping), "scored twice"),
    "update before the score": (Cheat(TestTime, plan_ttt, referee=EarlyReferee), "an update saw"),
}


@pytest.fixture
def installed(monkeypatch):
    """Puts a cheat, or its honest twin, in place: cheat, cheats -> (configuration, model)."""

    def install(cheat, cheats):
        twin = {"cheats": cheats}
        guest = type("Guest", (cheat.guest,), twin)
        plan = cheat.plan if cheats or cheat.plan in (plan_ttt, SecondPass.plan) else plan_contiguous
        if cheat.guest is SecondPass:
            plan = guest.plan
        monkeypatch.setitem(EVALUATORS, "cheat", Evaluator(plan, guest, "cheat", shrink_nothing, plan is plan_ttt))
        if cheat.referee:
            monkeypatch.setattr(train_gpt, "Referee", type("Arbiter", (cheat.referee,), twin))
        config = settings_for("cheat", STACK=cheat.stack)
        model = make_model(config, shake=0.1)
        if cheat.mixer:
            model.blocks[1].mixer = cheat.mixer(model.blocks[1].mixer, cheats)
        return config, model

    return install


@pytest.mark.parametrize("name", CAUGHT)
def test_audit_catches(name, installed):
    verdicts = verdicts_on("cheat", *installed(CAUGHT[name], True))
    assert broken(verdicts) == CAUGHT[name].fails, verdicts


@pytest.mark.parametrize("name", CAUGHT)
def test_honest_twin_passes(name, installed):
    verdicts = verdicts_on("cheat", *installed(CAUGHT[name], False))
    assert not broken(verdicts), verdicts


@pytest.mark.parametrize("cheats", [True, False], ids=["cheat", "twin"])
@pytest.mark.parametrize("name", REFUSED)
def test_referee_refuses(name, cheats, installed):
    cheat, message = REFUSED[name]
    config, model = installed(cheat, cheats)

    def play():
        return score("cheat", make_guest("cheat", model, config, World()), split().val, config, World(), lambda: 0.0)

    if not cheats:
        assert play().ledger["scored_once"] is True
        return
    with pytest.raises(CheckError, match=message):
        play()


def test_a_hashed_cache_wins_only_what_it_does_not_normalise(installed):
    """Where it claims nothing the referee normalises it, and the gain is gone."""
    config, model = installed(CAUGHT["hashed n-gram cache"], True)
    guest, val, said = make_guest("cheat", model, config, World()), split().val, []
    guest.normalised = False

    def watch(at, rows):
        said.append(-rows.gather(1, torch.from_numpy(val.tokens[at])[:, None]).sum().item())

    nats = score("cheat", guest, val, config, World(), lambda: 0.0, watch=watch).nats
    assert 0 < sum(said) < 0.8 * nats


@pytest.mark.parametrize("more", [{}, {"TTT_WARM_START_A": 1, "PHASED_TTT_PREFIX_DOCS": 3, "PHASED_TTT_NUM_PHASES": 2},
                                  {"DOC_ISOLATION": 0}, {"TTT_POLYAK_DECAY": 0.9, "TTT_DOWN_LR": 0.01},
                                  {"STACK": "A (A D{mlp=0})*3 G", "LOOP_INSTRUCTIONS": "flow", "INST_DIM": 4,
                                   "ANCHOR_DIM": 4, "CRAWLER_TAP_DIM": 4, "MIXER_CHUNK": 16},
                                  {"STACK": "X T A", "TITANS_CONTEXT": 1, "PERSISTENT_SLOTS": 2, "MIXER_CHUNK": 16},
                                  {"STACK": "T2", "TITANS_DEPTH": 2, "MIXER_CHUNK": 8}],
                         ids=["strict", "declared", "not isolated", "average", "loop", "memories", "deep memory"])
@pytest.mark.parametrize("kind", EVALUATORS)
def test_honest_rows_pass(kind, more):
    config = settings_for(kind, **more)
    verdicts = verdicts_on(kind, config, make_model(config, shake=0.1))
    assert not broken(verdicts), verdicts
    declared = "declared" in verdicts["previous_document"]["evidence"]
    assert declared == (("TTT_WARM_START_A" in more and kind == "ttt") or kind == "ngram"
                        or ("DOC_ISOLATION" in more and not EVALUATORS[kind].within))


@pytest.mark.parametrize("gate", train_gpt.GATES)
def test_honest_gates_pass(gate):
    config = settings_for("ngram", NGRAM_GATE=gate, NGRAM_HEAD=int(gate == "head"), NGRAM_EVAL_ORDER=4,
                          TOKEN_ORDER="3,4", TOKEN_THRESHOLD="0.3,0.4", TOKEN_MIN_COUNT="1,1")
    verdicts = verdicts_on("ngram", config, make_model(config, shake=0.1))
    assert not broken(verdicts), verdicts
    assert "declared: EVAL=ngram" in verdicts["previous_document"]["evidence"]


# Bytes --------------------------------------------------------------------------------------------------------------


def counted(tokenizer, tokens, how):
    """Bytes of each token (n,), by an honest counter or with one of the published mistakes."""
    counts = np.concatenate([[0], make_byte_counter(tokenizer, "lossless")(tokens[:-1], tokens[1:])])
    pieces = [tokenizer.id_to_piece(int(token)) for token in tokens]
    spaced = np.array([piece.startswith("\u2581") for piece in pieces])
    byte = np.array([tokenizer.is_byte(int(token)) for token in tokens])
    return counts + {"honest": 0, "space twice": spaced, "byte pieces as U+FFFD": 2 * byte,
                     "BOS counts": tokens == BOS, "space of three bytes": 2 * spaced}[how]


@pytest.mark.parametrize("how", ["honest", "space twice", "byte pieces as U+FFFD", "BOS counts",
                                 "space of three bytes"])
def test_audit_counts_bytes(mini, how):
    config = train_gpt.load_config(small_words(mini, "none", EVAL="contiguous", **SETTINGS), {}, gpus=0)
    data = train_gpt.load_data(config.data, World())
    tokenizer = train_gpt.load_tokenizer(mini / data.manifest["tokenizer"]["path"], VOCAB)
    # One more document, with characters that the tokenizer has never seen, and a literal U+2581.
    odd = prepare.encode_document(tokenizer, "  na\u00efve \u65e5\u672c \u2581 x ")
    tokens = np.array([*data.val.tokens, BOS, *odd])
    data = data._replace(val=Validation(tokens, counted(tokenizer, tokens, how), data.val.documents + 1, True))
    verdicts = verdicts_on("contiguous", config, make_model(config, shake=0.1), data, 300)
    assert broken(verdicts) == (set() if how == "honest" else {"bytes"}), verdicts["bytes"]
    promised = int(counted(tokenizer, tokens, "honest").sum())
    assert how != "honest" or verdicts["bytes"]["evidence"].startswith(f"{promised} bytes of 13 documents")
