"""GENERATE: the laws of sampling, text against full forwards, drafts that change no distribution, text that is never
taken back, grammars, and the command on a finished run."""

import dataclasses
import importlib.util
import io
import itertools
import json
import os
import random
import subprocess
import sys

import caseops
import prepare
import pytest
import scipy.stats
import torch
from conftest import MINI_VOCAB, ROOT, make_model, small_config, small_words, synthetic_documents

import train_gpt as gpt
from tools import bench, generate
from tools.generate import Drafts, Meter, Options, Remembering, Rereading, continue_text

needs_llguidance = pytest.mark.skipif(importlib.util.find_spec("llguidance") is None,
                                      reason="llguidance is not installed (pip install llguidance)")


def silent(token):
    """An emit that does nothing."""


def processor(model):
    return prepare.sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.fixture(scope="module")
def plain():
    """A lossless tokenizer."""
    return processor(prepare.train_tokenizer(synthetic_documents(40, 7), MINI_VOCAB, "lossless"))


@pytest.fixture(scope="module")
def cased():
    """A CaseOps tokenizer."""
    return processor(prepare.train_tokenizer(synthetic_documents(40, 7), MINI_VOCAB, "lossless", with_caseops=True))


def held_model(tokenizer=None, seed=1, shake=0.1, **more):
    """A shaken model, ready to make text."""
    config = small_config(**more)
    return generate.Held(config, make_model(config, seed, shake).requires_grad_(False), tokenizer)


# ---- sampling


def test_the_penalty_pulls_what_was_seen_down_on_both_sides_of_zero():
    logits, seen = torch.tensor([2.0, 2.0, -2.0, -2.0, 0.0]), torch.tensor([True, False, True, False, True])
    assert generate.penalise(logits, seen, 2.0).tolist() == [1.0, 2.0, -4.0, -2.0, 0.0]
    assert torch.equal(generate.penalise(logits, seen, 1.0), logits)


def test_the_nucleus_is_the_smallest_set_that_reaches_its_share():
    """Against all sets of a small vocabulary."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        chances = torch.randn(6, dtype=torch.float64, generator=generator).softmax(0)
        top_p = float(torch.rand((), generator=generator)) or 0.5
        found = generate.nucleus(chances, top_p)
        kept = found > 0
        smallest = min(size for size in range(1, 7) if any(
            sum(chances[list(members)]) >= top_p for members in itertools.combinations(range(6), size)))
        assert int(kept.sum()) == smallest and chances[kept].sum() >= top_p
        assert chances[kept].min() >= chances[~kept].max() if not kept.all() else True
        assert torch.allclose(found[kept], chances[kept] / chances[kept].sum()) and found.sum() == pytest.approx(1)
    assert torch.equal(generate.nucleus(chances, 1.0), chances)
    assert generate.nucleus(torch.full((4,), 0.25), 0.5).tolist() == [0.5, 0.5, 0.0, 0.0]


def test_greedy_is_temperature_zero_and_the_limit_of_small_ones():
    logits, seen = torch.tensor([0.5, 1.0, 3.0, 2.9]), torch.tensor([False, False, True, False])
    for options in (Options(greedy=True), Options(temperature=0.0), Options(temperature=1e-300)):
        assert generate.chances(logits, seen, options).tolist() == [0, 0, 0, 1]  # 3 / 1.08 is below 2.9
    assert generate.chances(logits, seen, Options(greedy=True, repetition=1.0)).tolist() == [0, 0, 1, 0]
    flat = generate.chances(logits, seen, Options(temperature=100.0, top_p=1.0))
    assert flat.min() > 0.24


def test_only_allowed_tokens_have_chances():
    logits, seen = torch.randn(6), torch.tensor([True] * 3 + [False] * 3)
    allowed = torch.tensor([True, False, True, False, False, True])
    for options in (Options(), Options(greedy=True), Options(temperature=2.0, top_p=1.0)):
        found = generate.chances(logits, seen, options, allowed)
        assert found[~allowed].sum() == 0 and found.sum() == pytest.approx(1)
    assert (found[allowed] > 0).all()


def test_samples_follow_their_chances():
    chances, generator = torch.tensor([0.0, 0.5, 0.2, 0.3], dtype=torch.float64), torch.Generator().manual_seed(5)
    drawn = torch.tensor([generate.sample(chances, generator) for _ in range(4000)]).bincount(minlength=4)
    assert drawn[0] == 0 and scipy.stats.chisquare(drawn[1:], 4000 * chances[1:]).pvalue > 1e-3


def test_accepting_and_rejecting_gives_back_the_distribution():
    """p(d) at d, and elsewhere the chance of rejection times that of the others: p again, exactly."""
    for seed in range(20):
        chances = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).softmax(0)
        for drafted in range(5):
            others = generate.without(chances, drafted)
            assert others[drafted] == 0
            mixed = (1 - chances[drafted]) * others
            mixed[drafted] += chances[drafted]
            assert torch.allclose(mixed, chances, atol=1e-15)
    certain = torch.tensor([0.0, 1.0])
    assert generate.settle(certain, 1, torch.Generator()) == generate.settle(certain, 0, torch.Generator()) == 1


# ---- drafts


def longest_match(text, most):
    """What Drafts proposes, by trying every place."""
    best = (1, 0)
    for end in range(2, len(text)):
        size = 0
        while size < end and text[end - 1 - size] == text[len(text) - 1 - size]:
            size += 1
        best = max(best, (size, end))
    whole = list(text)
    for place in range(best[1], best[1] + most if best[0] >= generate.LEAST_MATCH else 0):
        whole.append(whole[place])
    return whole[len(text):]


def test_drafts_are_what_followed_the_longest_match():
    rng = random.Random(3)
    found = 0
    for _ in range(60):
        text = rng.choices(range(3), k=rng.randint(0, 25))
        drafts = Drafts(text[:5])
        for token in text[5:]:
            drafts.add(token)
        for most in (0, 1, 4):
            assert drafts.propose(most) == longest_match(text, most), text
            found += len(drafts.propose(most))
    assert found > 100
    assert Drafts([1, 7, 8, 9, 7, 8]).propose(5) == [9, 7, 8, 9, 7] and Drafts([1, 7, 8, 9, 3, 8]).propose(5) == []


class Tabled:
    """A reader whose logits depend on the last two tokens and on how many there are, modulo 5."""

    def __init__(self, table, text=()):
        self.table, self.text = table, list(text)

    def read(self, tokens, count):
        self.text += tokens
        return torch.stack([self.table[key_of(self.text[:end])] for end in
                            range(len(self.text) - count + 1, len(self.text) + 1)])

    def copy(self):
        return Tabled(self.table, self.text)

    def bytes(self):
        return 8 * len(self.text)


VOCAB, PROMPT = 4, [gpt.BOS, 2, 3, 0, 2, 3, 3, 2, 3]
TABLE = {key: torch.randn(VOCAB, generator=torch.Generator().manual_seed(number))
         for number, key in enumerate(itertools.product(range(5), range(VOCAB), range(VOCAB)), 100)}


def key_of(text):
    """The row of a table behind a text."""
    return len(text) % 5, *text[-2:]


def exact(options, text=(), chance=1.0):
    """The probability of every text of at most `tokens` tokens, BOS as what ends it."""
    if len(text) == options.tokens or (text and text[-1] == gpt.BOS):
        return {text: chance}
    whole = [*PROMPT, *text]
    seen = torch.zeros(VOCAB, dtype=torch.bool)
    seen[[token for token in whole if token != gpt.BOS]] = True
    found = generate.chances(TABLE[key_of(whole)], seen, options)
    parts = [exact(options, (*text, token), chance * float(found[token])) for token in range(VOCAB) if found[token]]
    return {key: value for part in parts for key, value in part.items()}


def surprise(options, draws):
    """The p-value of what was drawn under the exact distribution, and how drafts fared."""
    wanted, counts, total = exact(options), {}, Meter()
    for seed in range(draws):
        meter = Meter()
        made = continue_text(Tabled(TABLE), PROMPT, dataclasses.replace(options, seed=seed), silent, None, meter)
        key = (*made, gpt.BOS) if meter.stopped == "end" else tuple(made)
        counts[key] = counts.get(key, 0) + 1
        total.drafted, total.accepted = total.drafted + meter.drafted, total.accepted + meter.accepted
    assert set(counts) <= set(wanted) and sum(wanted.values()) == pytest.approx(1)
    often = [key for key, chance in wanted.items() if draws * chance >= 5]
    seen = [counts.get(key, 0) for key in often]
    hoped = [draws * wanted[key] for key in often]
    rest = draws - sum(seen), draws - sum(hoped)
    if rest[1] > 1:
        seen, hoped = [*seen, rest[0]], [*hoped, rest[1]]
    scale = sum(seen) / sum(hoped)
    return scipy.stats.chisquare(seen, [scale * value for value in hoped]).pvalue, total


@pytest.mark.parametrize("options", [Options(tokens=4, speculate=3), Options(tokens=4, speculate=0),
                                     Options(tokens=3, speculate=8, temperature=1.3, top_p=1.0, repetition=1.0),
                                     Options(tokens=4, speculate=1, top_p=0.7, repetition=1.5)], ids=str)
def test_drafts_do_not_change_the_distribution(options):
    """Of whole texts, with penalty and nucleus at every position, against the sum over all of them."""
    p_value, meter = surprise(options, 2500)
    assert p_value > 1e-3
    if options.speculate:
        assert 0.05 * meter.drafted < meter.accepted < 0.95 * meter.drafted


def test_that_test_notices_a_wrong_rejection(monkeypatch):
    monkeypatch.setattr(generate, "without", lambda chances, token: chances)
    p_value, _ = surprise(Options(tokens=4, speculate=3), 2500)
    assert p_value < 1e-6


# ---- text of models


STACKS = {"recurrent": {"PRESET": "sixteen", "STACK": "G X D A", "CONV_SIZE": 4},
          "titans": {"PRESET": "sixteen", "STACK": "A T A"},
          "parts": {"PRESET": "caseops", "VE_LAYERS": "1", "VE_DIM": 8, "VALUE_RESIDUAL": 1, "BIGRAM_VOCAB_SIZE": 31,
                    "BIGRAM_DIM": 8, "TRIGRAM": 1, "SMEAR_CHANNELS": 1},
          "drawn": {"PRESET": "chimera", "STACK": "G (X A)*1..4~3 A", "LOOP_EXIT": 0.9},
          "no memory": {"PRESET": "sixteen", "STACK": "A T A", "TITANS_DEPTH": 2}}
STACKS |= {name: {"PRESET": name} for name in gpt.PRESETS}


def greedy_text(held, prompt, options):
    """The likeliest token after each full forward over the whole text."""
    text, forward = list(prompt), gpt.make_forward(held.model, -1, held.config.eval.loop_exit)
    while len(text) < len(prompt) + options.tokens:
        with torch.inference_mode():
            logits = held.model.logits(forward(torch.tensor([text]), None))[0, -1]
        seen = torch.zeros(len(logits), dtype=torch.bool)
        seen[[token for token in text if token != gpt.BOS]] = True
        token = int(generate.penalise(logits, seen, options.repetition).argmax())
        if token == gpt.BOS:
            break
        text.append(token)
    return text[len(prompt):]


@pytest.mark.parametrize("name", STACKS)
def test_text_is_that_of_full_forwards(name):
    """Token by token, and with drafts."""
    held, prompt = held_model(**STACKS[name]), [gpt.BOS, 40, 41, 42, 40, 41, 42, 40, 41]
    for repetition in (1.0, 1.3):
        options, given = Options(tokens=14, greedy=True, repetition=repetition), []
        wanted = greedy_text(held, prompt, options)
        assert generate.generate(held, prompt, options, given.append) == given == wanted and wanted
        drafting = dataclasses.replace(options, speculate=4)
        assert generate.generate(held, prompt, drafting, silent) == wanted


def test_drafts_save_forwards_and_greedy_text_stays():
    """A model that repeats itself: fewer forwards, the same text, and rejections on the way."""
    held, rejected = held_model(PRESET="baseline"), 0
    for start in range(20, 26):
        prompt = [gpt.BOS, *[start, 50, 60, 70, start + 1, 50, 60] * 2]
        meters = [Meter(), Meter()]
        texts = [generate.generate(held, prompt, Options(tokens=40, greedy=True, repetition=1.0, speculate=most),
                                   silent, meter) for most, meter in zip((0, 8), meters, strict=True)]
        assert texts[0] == texts[1]
        assert meters[1].accepted > 8 and 5 * meters[1].forwards < meters[0].forwards == 39
        reader = generate.make_reader(held, "evaluation", silent)
        reader.read(prompt, 1)
        assert 2 * reader.bytes() < 0.7 * meters[0].state_bytes < meters[1].state_bytes <= meters[0].state_bytes
        rejected += meters[1].drafted - meters[1].accepted
    assert rejected > 0


def test_a_memory_is_not_spoilt_by_a_rejected_draft():
    """What was read ahead of a snapshot leaves no trace in it."""
    held = held_model(**STACKS["recurrent"])
    forward = gpt.make_forward(held.model, -1)
    reader, fresh = (Remembering(held.model, forward) for _ in range(2))
    reader.read([gpt.BOS, 30, 31, 32], 1)
    size, before = reader.bytes(), reader.copy()
    reader.read([60, 61, 62], 3)
    fresh.read([gpt.BOS, 30, 31, 32], 1)
    assert torch.equal(before.read([33, 34], 2), fresh.read([33, 34], 2))
    assert 0 < size < reader.bytes() and Rereading(held.model, forward).bytes() == 0


def test_a_draft_that_is_taken_in_part_leaves_no_trace():
    """Greedy texts of the table, whose rows tell how much was read, are those without drafts."""
    rejected = 0
    for end in itertools.product((2, 3, 0), repeat=3):
        prompt, meter = [*PROMPT, *end], Meter()
        texts = [continue_text(Tabled(TABLE), prompt, Options(tokens=12, greedy=True, speculate=most), silent, None,
                               meter) for most in (0, 5)]
        assert texts[0] == texts[1]
        rejected += meter.drafted - meter.accepted
    assert rejected > 20


def test_a_model_without_a_memory_reads_everything_anew():
    lines = []
    for name, kind in (("no memory", Rereading), ("titans", Remembering)):
        assert type(generate.make_reader(held_model(**STACKS[name]), "evaluation", lines.append)) is kind
    assert len(lines) == 1 and lines[0].endswith("; the whole text is read anew for each token")


def test_positions_leave_groups_as_in_evaluation(monkeypatch):
    held, seen = held_model(**STACKS["drawn"]), []
    monkeypatch.setattr(gpt, "make_forward", lambda model, phase, leave: seen.append(leave))
    generate.make_reader(held, "evaluation", seen.append)
    assert seen == [0.9]


def test_long_prompts_are_read_in_pieces(monkeypatch):
    held, prompt = held_model(PRESET="baseline"), [gpt.BOS, *range(20, 60)]
    forward = gpt.make_forward(held.model, -1)
    whole = Remembering(held.model, forward).read(prompt, 1)
    monkeypatch.setattr(generate, "READ_TOKENS", 7)
    assert torch.allclose(Remembering(held.model, forward).read(prompt, 1), whole, atol=1e-4)


def test_a_document_that_ends_ends_the_text():
    """BOS is neither given out nor counted; it is not penalised, either."""
    table = {key: torch.tensor([0.0, 5.0 if key[1:] == (3, 3) else 0.1, 0.0, 3.0]) for key in TABLE}
    meter, given = Meter(), []
    made = continue_text(Tabled(table), [gpt.BOS, 2], Options(greedy=True, repetition=1.2), given.append, None, meter)
    assert made == given == [3, 3] and meter.stopped == "end" and len(meter.times) == 3
    for more in ({"greedy": True}, {"greedy": True, "speculate": 4}, {"speculate": 4}):
        endless = Options(tokens=20, repetition=1.2, ignore_eos=True, **more)
        made = continue_text(Tabled(table), [gpt.BOS, 2], endless, silent, None, meter)
        assert len(made) == 20 and gpt.BOS not in made and meter.stopped == "tokens"


@pytest.mark.parametrize(("stack", "mode", "passes", "told"), [
    ({"STACK": "A (A)*1..4~2 A", "LOOP_SKIPS": 0, "LOOP_STATE": "exact"}, "evaluation", 2, ""),
    ({"STACK": "A (A)*1..4~2 A", "LOOP_SKIPS": 0, "LOOP_STATE": "exact"}, "fast", 1, "1 pass of"),
    ({"STACK": "A (A)*1..4~2 A", "LOOP_SKIPS": 0, "LOOP_STATE": "exact"}, "reasoning", 4, "4 passes of"),
    ({"STACK": "A (A)*1..3~2 A", "LOOP_SKIPS": 0, "LOOP_STATE": "exact"}, "reasoning", 3, "4 are not in training"),
    ({"STACK": "A (A)*3 A", "UNET_SKIPS": 0}, "balanced", 2, "2 passes of"),
    ({"STACK": "A (A)*3@0.35 A2"}, "fast", 1, "1 pass of"),
    ({"STACK": "A (A)*3@0.35 A2"}, "reasoning", 3, "3 passes of"),
    ({"STACK": "A3"}, "fast", None, "changes nothing")])
def test_modes_are_passes_that_training_had(stack, mode, passes, told):
    held = held_model(PRESET="baseline", **stack)
    phase, line = generate.pick_phase(held.model, mode)
    turns = [step.turn.number for step in phase.steps if step.turn]
    assert (max(turns) + 1 if turns else None) == passes
    assert told in line and bool(line) == bool(told)
    lines = []
    made = generate.generate(held, [gpt.BOS, 30], Options(tokens=3, mode=mode), silent, say=lines.append)
    assert made and lines == ([line] if line else [])


def test_skips_that_a_model_has_not_learned_are_never_asked_for():
    """Of every number of passes; where none fits, evaluation's plan stays."""
    for stack in ("A (A2)*4 A2", "A (A)*3@0.35 A2", "A2 (A)*2 A", "(A3)*5"):
        held = held_model(PRESET="baseline", STACK=stack)
        for mode in generate.PASSES:
            phase, _ = generate.pick_phase(held.model, mode)
            gpt.make_forward(held.model, phase)(torch.tensor([[1, 30]]), None)


# ---- text as it comes


def texts():
    """Texts with cases, characters of several bytes, and control characters of CaseOps in the text itself."""
    rng = random.Random(4)
    pieces = ["The ", "NASA", "iPhone", "OpenAI ", "a", "B", "\n", " ", "\u00e9", "\u4e2d", "\U0001f600", "I ", "x1Y2",
              "\ue001", "\ue004", "\ue004\ue002", "caf\u00c9s", "\u2581", "ab CD.", "\t\r\n"]
    return ["".join(rng.choices(pieces, k=rng.randint(1, 30))) for _ in range(60)]


@pytest.mark.parametrize("name", ["plain", "cased"])
def test_streamed_text_is_the_document(name, request):
    """Piece by piece what decoding the whole gives; characters and letters are not given out before they are certain,
    so nothing is taken back."""
    tokenizer = request.getfixturevalue(name)
    assert prepare.has_caseops(tokenizer) == (name == "cased")
    for text in texts():
        spelling, told = generate.Spelling(tokenizer), ""
        for token in prepare.encode_document(tokenizer, text):
            told += spelling.feed([token])
            assert text.startswith(told)
        assert told + spelling.finish() == text


@pytest.mark.parametrize("name", ["plain", "cased"])
def test_streamed_text_of_any_tokens_is_what_decoding_all_of_them_gives(name, request):
    """Broken characters, stray control characters, control tokens: what a model makes, too."""
    tokenizer = request.getfixturevalue(name)
    rng, size = random.Random(9), tokenizer.vocab_size()
    bytes_and_marks = [token for token in range(size) if tokenizer.is_byte(token)] + list(range(9)) * 8
    for number in range(150):
        tokens = rng.choices(bytes_and_marks if number % 2 else range(size), k=rng.randint(0, 40))
        spelling = generate.Spelling(tokenizer)
        told = "".join(spelling.feed([token]) for token in tokens) + spelling.finish()
        whole = prepare.decode_bytes(tokenizer, tokens).decode("utf-8", "replace")
        assert told == (caseops.decode(whole, strict=False) if name == "cased" else whole)


def test_letters_behind_a_prompt_take_its_case(cased):
    """A word in capitals goes on in capitals; a marker that is not finished says nothing yet."""
    spelling = generate.Spelling(cased)
    spelling.feed(generate.encode_prompt(cased, "The NAS"))
    more = cased.encode("a")
    assert spelling.feed(more) == "A" and spelling.feed(cased.encode(" a")) == " a"
    assert spelling.feed([caseops.FIRST_ID]) == "" and spelling.feed(more) == "A" and spelling.feed(more) == "a"


def test_prompts_begin_with_bos_and_come_back(plain, cased):
    for tokenizer in (plain, cased):
        tokens = generate.encode_prompt(tokenizer, "The caf\u00e9 of NASA")
        assert tokens[0] == gpt.BOS and prepare.decode_document(tokenizer, tokens) == "The caf\u00e9 of NASA"
    assert generate.encode_prompt(plain, "") == [gpt.BOS]


# ---- grammars


class Liking:
    """A reader with the same logits everywhere, of which those of pieces of some characters, and of BOS, are high."""

    def __init__(self, tokenizer, liked, more=6.0):
        table = prepare.piece_bytes(tokenizer)
        self.row = torch.tensor([more if piece and set(piece) <= set(liked) else 0.0 for piece in table])
        self.row[gpt.BOS] = more

    def read(self, tokens, count):
        return self.row.expand(count, -1)

    def copy(self):
        return self

    def bytes(self):
        return 0


def grammatical(tokenizer, name, options, reader):
    """A text, and whether its grammar says that it is whole."""
    meter, spelling = Meter(), generate.Spelling(tokenizer)
    made = continue_text(reader, [gpt.BOS], options, silent, generate.Grammar(name, tokenizer), meter)
    return spelling.feed(made) + spelling.finish(), meter


@needs_llguidance
@pytest.mark.parametrize("name", ["plain", "cased"])
def test_json_can_be_parsed(name, request):
    """Whatever the model likes; a text that TOKENS cuts off is not called complete."""
    tokenizer, whole = request.getfixturevalue(name), 0
    reader = Liking(tokenizer, b'{}[]",:0')
    for seed in range(12):
        text, meter = grammatical(tokenizer, "json", Options(tokens=60, seed=seed, temperature=1.0, repetition=1.0,
                                                             top_p=1.0, speculate=seed % 3), reader)
        if meter.complete:
            json.loads(text)
            whole += 1
        else:
            assert meter.stopped == "tokens"
    assert whole >= 3
    for seed in range(5):  # white space between the parts of a text could go on for ever
        text, _ = grammatical(tokenizer, "json", Options(tokens=6, seed=seed), Liking(tokenizer, b"[ \n"))
        assert text and not any(map(str.isspace, text.partition('"')[0]))


@needs_llguidance
def test_brackets_are_balanced(plain):
    pairs, whole = {")": "(", "]": "[", "}": "{"}, 0
    reader = Liking(plain, b"()[]{}")
    for seed in range(12):
        text, meter = grammatical(plain, "brackets", Options(tokens=30, seed=seed, top_p=1.0, repetition=1.0,
                                                             temperature=1.0), reader)
        waiting = []
        for character in text:
            if character in "([{":
                waiting.append(character)
            elif character in pairs:
                assert waiting and waiting.pop() == pairs[character]
        assert meter.complete == (not waiting)
        whole += meter.complete and len(text) > 4
    assert whole >= 2


@needs_llguidance
def test_a_grammar_of_ones_own(plain, tmp_path):
    """Ends where it is satisfied and nothing more fits; greedy, with drafts, and sampled."""
    path = tmp_path / "own.lark"
    path.write_text('start: "abab" /[0-9]{3}/ "."\n')
    for options in (Options(greedy=True), Options(greedy=True, speculate=4), Options(seed=3)):
        text, meter = grammatical(plain, str(path), options, Liking(plain, b"01"))
        assert text[:4] == "abab" and text[4:7].isdigit() and text[7:] == "."
        assert meter.complete and meter.stopped == "grammar"


@needs_llguidance
def test_a_faulty_grammar_is_one_line(plain, tmp_path):
    path = tmp_path / "bad.lark"
    for text in ("start: nothing_like_it", "start: (", "\xff"):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(gpt.ConfigError) as fault:
            generate.Grammar(str(path), plain)
        assert str(fault.value).startswith(f"GRAMMAR={path}: ") and "\n" not in str(fault.value)


def test_without_llguidance_one_line_says_so(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(gpt.ConfigError, match="^GRAMMAR=json: needs the package llguidance"):
        generate.Grammar("json", plain)


# ---- the command


@pytest.fixture(scope="module")
def finished(mini, tmp_path_factory):
    """The folder of a small ternary run with an artifact."""
    runs = tmp_path_factory.mktemp("runs")
    words = small_words(mini, runs, PRESET="ternary", RUN_ID="one", ITERATIONS=3, STAGES="train,write")
    assert gpt.main(words, {}) == 0
    return runs / "one"


@pytest.fixture(autouse=True)
def one_thread():
    """The command takes the machine's threads."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def command(capsys, *words, code=0, environ=None):
    """What it wrote to standard output and to standard error."""
    capsys.readouterr()
    found = generate.main([str(word) for word in words], environ or {})
    out, err = capsys.readouterr()
    assert found == code and "Traceback" not in err, err
    return out, err


def test_the_command_streams_text(finished, capsys):
    words = (f"FROM={finished}", "PROMPT=Ab ", "TOKENS=24", "SEED=5", "THREADS=1")
    out, err = command(capsys, *words)
    assert out.endswith("\n") and len(out) > 8 and "parameters" in err
    again, _ = command(capsys, *words)
    other, _ = command(capsys, *words, "SEED=6")
    assert again == out != other
    found = json.loads(command(capsys, *words, "JSON=1")[0])
    assert found["text"] + "\n" == out and found["prompt"] == "Ab " and len(found["tokens"]) == 24
    assert found["stopped"] == "tokens" and "report" not in found


def test_greedy_text_is_the_same_packed_drafted_and_at_temperature_zero(finished, capsys):
    words = (f"FROM={finished}", "PROMPT=Ab ", "TOKENS=30", "THREADS=1", "JSON=1", "REPETITION=1")
    wanted = json.loads(command(capsys, *words, "GREEDY=1")[0])["tokens"]
    for more in (["TEMPERATURE=0"], ["GREEDY=1", "SPECULATE=6"], ["GREEDY=1", "PACKED=1"]):
        out, err = command(capsys, *words, *more)
        assert json.loads(out)["tokens"] == wanted
        assert ("matrices in" in err) == ("PACKED=1" in more)
    assert len(wanted) > 2


def test_the_report_has_speeds_and_bytes(finished, capsys):
    words = (f"FROM={finished}", "PROMPT=Ab abab abab", "TOKENS=16", "THREADS=1", "REPORT=1")
    found = json.loads(command(capsys, *words, "JSON=1", "SPECULATE=4")[0])["report"]
    assert found["tokens"] <= 16 and len(found["intervals"]) == 8 and found["tokens_per_second"] > 0
    assert found["prompt_tokens"] > 3 and found["prompt_tokens_per_second"] > 0
    assert 0 < found["state_bytes"] < found["peak_bytes"] and 0 < found["model_bytes"] < found["peak_bytes"]
    assert found["accepted"] <= found["drafted"] and found["forwards"] <= 16
    small = json.loads(command(capsys, *words, "JSON=1", "PACKED=1")[0])["report"]
    assert small["model_bytes"] < found["model_bytes"]
    out, err = command(capsys, *words)
    assert "tokens a second" in err and "from token 14" in err and "state" in err and "tokens a second" not in out


def test_every_preset_and_mode_makes_text(mini, tmp_path, capsys):
    """From an artifact of a looped model with drawn passes, and of one without groups."""
    for preset, told in (("chimera", "2 passes"), ("sixteen", "changes nothing")):
        assert gpt.main(small_words(mini, tmp_path, PRESET=preset, RUN_ID=preset, ITERATIONS=2,
                                    STAGES="train,calibrate,write"),
                        {}) == 0
        out, err = command(capsys, f"FROM={tmp_path / preset}", "TOKENS=6", "MODE=balanced", "THREADS=1", "PACKED=1")
        assert out and told in err and ("no ternary matrix" in err) == (preset == "sixteen")


def test_text_that_never_ends_has_no_grammar(finished, capsys):
    out, err = command(capsys, f"FROM={finished}", "IGNORE_EOS=1", "GRAMMAR=json", code=2)
    assert not out and err == "IGNORE_EOS=1: not with GRAMMAR=json, which says itself where a text may end\n"


def test_the_benchmark_compares_the_same_text(finished, tmp_path, capsys, monkeypatch):
    """All rows of a ternary artifact; a text that differs is said."""
    out = tmp_path / "rows.json"
    call = ["generate", str(finished), "TOKENS=40", "AT=8,30", "PROMPT=Ab ", "THREADS=1", "--json", str(out)]
    assert bench.main(call) == 0
    rows = {row["as"]: row for row in json.loads(out.read_text())["tables"][0]["rows"]}
    assert [*rows] == [*bench.GENERATE_ROWS] and {row["text"] for row in rows.values()} == {"same"}
    assert rows["plain"]["last / first"] == pytest.approx(rows["plain"]["at 30"] / rows["plain"]["at 8"])
    assert rows["packed"]["model bytes"] < rows["plain"]["model bytes"] and rows["packed"]["packed / bf16"] < 0.3
    assert rows["drafts"]["at 8"] is None and rows["drafts"]["drafts taken"] is not None
    assert rows["plain"]["packed / bf16"] is None and rows["plain"]["state bytes"] > 0
    text = capsys.readouterr().out
    assert "at 30" in text and "ternary" in text
    true = generate.continue_text
    monkeypatch.setattr(generate, "continue_text", lambda reader, prompt, options, *more: [
        token + options.packed for token in true(reader, prompt, options, *more)])
    assert bench.main(call) == 0
    rows = {row["as"]: row for row in json.loads(out.read_text())["tables"][0]["rows"]}
    assert [rows[name]["text"] for name in bench.GENERATE_ROWS] == ["same", "OTHER", "same", "OTHER"]


def test_speeds_are_medians_of_places_that_take_turns():
    """A reader whose tokens cost a second and the five hundredth part of what was read, now and then nine more."""
    now, order = [0.0], []

    class Slow:
        def __init__(self, read=0):
            self.held = read

        def read(self, tokens, count):
            self.held += len(tokens)
            if len(tokens) == 1:
                order.append(self.held)
                now[0] += 1 + self.held // 500 + 9 * (len(order) % 10 == 0)

        def copy(self):
            return Slow(self.held)

    text = list(range(2000))
    assert bench.speeds_at(Slow(), text, [1510, 510, 2000], lambda: now[0]) == [1 / 4, 1 / 2, None]
    assert order[:4] == [511, 1511, 512, 1512] and len(order) == 2 * bench.NEAR
    assert bench.speeds_at(Slow(), text, [5000]) == [None]
    assert bench.speeds_at(Slow(), text, [510, 510], lambda: now[0]) == [1 / 2, 1 / 2]
    order.clear()
    bench.speeds_at(Slow(), text, [1990])
    assert order == list(range(1991, 2001))


@needs_llguidance
def test_a_grammar_that_is_not_satisfied_is_said(finished, capsys, tmp_path):
    path = tmp_path / "long.lark"
    path.write_text("start: /[a-z]{300}/\n")
    words = (f"FROM={finished}", "TOKENS=5", "THREADS=1", f"GRAMMAR={path}")
    out, err = command(capsys, *words, code=3)
    assert out and err.splitlines()[-1] == f"GRAMMAR={path}: TOKENS=5 ended before the text was complete"


BAD = {"TOKENS=0": "a whole number of at least 1", "TOKENS=x": "a whole number", "TEMPERATURE=-1": "a number",
       "TEMPERATURE=nan": "a number", "TOP_P=0": "above 0", "TOP_P=1.1": "at most 1", "REPETITION=0": "at least 0.01",
       "SEED=-1": "a whole number", "GREEDY=yes": "must be one of 0, 1", "MODE=deep": "must be one of evaluation, fast",
       "SPECULATE=-1": "a whole number", "SPECULATE=999": "at most 256", "PACKED=2": "must be one of 0, 1",
       "GRAMMAR=xml": "must be none, json, brackets or a .lark file", "GRAMMAR=/no/x.lark": "must be none",
       "IGNORE_EOS=on": "must be one of 0, 1",
       "REPORT=": "must be one of 0, 1", "JSON=a": "must be one of 0, 1", "TOKEN=3": "must be FROM=, PROMPT=",
       "hello": "must be FROM=", "--json": "must be FROM=", "": "must be FROM=", "two\nlines": "must be FROM=",
       "MODEL_DIM=3": "must be FROM=", "PROMPT=\udcff": "must be UTF-8", "FROM=": "must be a run folder",
       "FROM=/nowhere": "must be a run folder", "THREADS=x": "THREADS=x", "DATA_PATH=/nowhere": "DATA_PATH=/nowhere",
       "TOKENIZER_PATH=/nowhere": "TOKENIZER_PATH=/nowhere"}


@pytest.mark.parametrize("word", BAD)
def test_mistakes_are_one_line(word, finished, capsys):
    out, err = command(capsys, f"FROM={finished}", word, code=2)
    assert out == "" and err.count("\n") == 1 and BAD[word] in err
    assert err.startswith(word.partition("=")[0].split("\n")[0])


def test_another_tokenizer_and_a_damaged_artifact_are_refused(finished, cased, capsys, tmp_path):
    other = tmp_path / "other.model"
    other.write_bytes(cased.serialized_model_proto())
    _, err = command(capsys, f"FROM={finished}", f"TOKENIZER_PATH={other}", code=2)
    assert "not the tokenizer" in err and err.count("\n") == 1
    for name in ("config.json", "artifact.bin"):
        data = (finished / name).read_bytes()
        (tmp_path / name).write_bytes(data if name == "config.json" else data[:-9])
    _, err = command(capsys, f"FROM={tmp_path}", code=2)
    assert "artifact.bin" in err and err.count("\n") == 1


def test_words_come_from_the_environment_too(finished, capsys, tmp_path):
    """As in training: a word on the command line wins, what is no word of it is nobody's business."""
    environ = {"FROM": str(finished), "PROMPT": "Ab ", "TOKENS": "5", "THREADS": "1", "JSON": "1", "MODEL_DIM": "3"}
    found = json.loads(command(capsys, environ=environ)[0])
    assert found["prompt"] == "Ab " and len(found["tokens"]) == 5
    assert len(json.loads(command(capsys, "TOKENS=3", environ=environ)[0])["tokens"]) == 3
    out, err = command(capsys, environ=environ | {"TOKENS": "a\nb"}, code=2)
    assert not out and err == "TOKENS=a b: must be a whole number of at least 1 and at most 1e+06\n"


def test_places_that_cannot_be_read_are_one_line(finished, capsys):
    for word in (f"FROM=/tmp/{'x' * 300}", f"GRAMMAR={'x' * 300}.lark"):
        out, err = command(capsys, f"FROM={finished}", word, code=2)
        assert not out and err.count("\n") == 1 and "too long" in err


def test_long_repetitions_are_drafted_in_bounded_time():
    """The last match of a text that goes in circles is long enough: nothing else is compared."""
    class Counted(list):
        reads = 0

        def __getitem__(self, place):
            Counted.reads += 1
            return super().__getitem__(place)

    drafts = Drafts([2, 3, 4] * 2000)
    drafts.text = Counted(drafts.text)
    assert drafts.propose(8) == [2, 3, 4, 2, 3, 4, 2, 3]
    assert Counted.reads < 200
    # A pair that stands everywhere behind and before other tokens is looked for at so many places only.
    drafts = Drafts([token for place in range(3000) for token in (2, 3, 10 + place)] + [2, 3])
    drafts.text, Counted.reads = Counted(drafts.text), 0
    assert drafts.propose(1) == [10 + 2999]
    assert Counted.reads < 4 * generate.MOST_PLACES


def test_help_names_every_option(capsys):
    out, err = command(capsys, "--help")
    assert err == "" and all(f"\n    {name} " in out for name in generate.OPTIONS)
    assert max(map(len, out.splitlines())) <= 120


def test_the_command_finishes_the_prompts_last_word(cased, capsys, monkeypatch, tmp_path):
    """The prompt is not printed, but a word of it that goes on keeps its capitals."""
    held = held_model(cased, PRESET="baseline")
    monkeypatch.setattr(generate, "load", lambda folder, words, pack: held)
    monkeypatch.setattr(generate, "generate", lambda held, prompt, options, emit, meter, say: [
        emit(token) for token in cased.encode("a is")])
    generate.run(generate.Words(tmp_path, "The NAS", Options(), []))
    assert capsys.readouterr() == ("A is\n", "")


def test_a_reader_that_has_seen_enough_is_no_fault(finished, monkeypatch):
    """As with `| head -c 1`."""
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

        def fileno(self):
            return os.open(os.devnull, os.O_WRONLY)
    monkeypatch.setattr(sys, "stdout", Closed())
    assert generate.main([f"FROM={finished}", "TOKENS=3", "THREADS=1"], {}) == 0


@pytest.mark.parametrize("words", [["generate", "FROM=x", "PROMPT=two words\nand lines", "PACKED=1"],
                                   ["FROM=x", "STAGES=generate", "PROMPT=two words\nand lines", "PACKED=1"]])
def test_the_launcher_hands_the_words_on(words, tmp_path):
    player = tmp_path / "python"
    player.write_text('#!/bin/sh\ncase "$1" in tools/*) printf "%s|" "$@" ;; esac\n')
    player.chmod(0o755)
    done = subprocess.run([ROOT / "run.sh", *words, f"PYTHON={player}"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "tools/generate.py|FROM=x|PROMPT=two words\nand lines|PACKED=1|"


def test_the_command_runs_in_a_process_of_its_own(finished):
    done = subprocess.run([sys.executable, "tools/generate.py", f"FROM={finished}", "TOKENS=8", "GREEDY=1", "JSON=1"],
                          cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and len(json.loads(done.stdout)["tokens"]) <= 8
