"""DATA: shards, the manifest, bytes per token, rows; every fault is one line."""

import json
import shutil
import struct

import numpy as np
import pytest
import torch
from conftest import MINI_VOCAB, small_config, small_words
from hypothesis import given
from hypothesis import strategies as st

from train_gpt import (
    BOS,
    Batches,
    ConfigError,
    TokenStream,
    World,
    document_index,
    length_at,
    load_config,
    load_data,
    load_tokenizer,
    make_byte_counter,
    read_shard,
    sha256_file,
)


def settings_for(folder, **more):
    return load_config(small_words(folder, "none", **more), {}, gpus=0).data


@pytest.fixture()
def copy(mini, tmp_path):
    """A private copy of the mini dataset with its tokenizer, to damage."""
    shutil.copytree(mini.parent.parent, tmp_path / "data")
    folder = tmp_path / "data" / "datasets" / mini.name
    (folder / ".verified.json").unlink(missing_ok=True)
    return folder


def refusal(folder, **more):
    with pytest.raises(ConfigError) as caught:
        load_data(settings_for(folder, **more), World())
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def edit_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_load_data_counts_every_byte(mini):
    data = load_data(settings_for(mini), World())
    manifest = json.loads((mini / "manifest.json").read_text())
    assert data.val.bytes.sum() == manifest["val"]["bytes"] == manifest["val"]["counted_bytes"]
    assert data.val.documents == 12 and data.val.lossless
    assert len(data.train) == manifest["train"]["tokens"]
    assert load_data(settings_for(mini), World()).manifest_sha256 == data.manifest_sha256


def test_lossless_bytes_equal_decoded_text(mini):
    """Recounted the slow way: decode each document and encode it as UTF-8."""
    data = load_data(settings_for(mini), World())
    tokenizer = load_tokenizer(next((mini.parent.parent / "tokenizers").glob("*.model")), MINI_VOCAB)
    starts = [*np.flatnonzero(data.val.tokens == BOS), len(data.val.tokens)]
    for start, stop in zip(starts, starts[1:], strict=False):
        text = tokenizer.decode(data.val.tokens[start + 1:stop].tolist())
        assert data.val.bytes[start:stop].sum() == len(text.encode())
        assert data.val.bytes[start] == 0


class FakeTokenizer:
    """Five pieces: control, unknown, a byte, a word with a leading space, a word without."""

    pieces = ["<s>", "<unk>", "<0x41>", "\u2581caf\u00e9", "ing", "\u2581", "a\u2581b"]

    def vocab_size(self):
        return len(self.pieces)

    def is_control(self, token):
        return token == 0

    def is_unknown(self, token):
        return token == 1

    def is_unused(self, token):
        return False

    def is_byte(self, token):
        return token == 2

    def id_to_piece(self, token):
        return self.pieces[token]


def test_byte_rules():
    tokens = np.arange(7)
    lossless = make_byte_counter(FakeTokenizer(), "lossless")
    assert lossless(np.zeros(7, np.int64), tokens).tolist() == [0, 0, 1, 6, 3, 1, 3]
    challenge = make_byte_counter(FakeTokenizer(), "challenge")
    assert challenge(np.full(7, 4), tokens).tolist() == [0, 0, 1, 6, 3, 1, 3]
    assert challenge(np.zeros(7, np.int64), tokens).tolist() == [0, 0, 1, 5, 3, 0, 3]
    with pytest.raises(ConfigError, match="byte_rule=guess"):
        make_byte_counter(FakeTokenizer(), "guess")


def test_shard_faults(tmp_path):
    def shard(header, body=b""):
        path = tmp_path / "fineweb_train_000000.bin"
        path.write_bytes(struct.pack("<256i", *header, *[0] * (256 - len(header))) + body)
        return path
    assert read_shard(shard([20240520, 1, 2], b"\x01\x00\x05\x00")).tolist() == [1, 5]
    for header, body, said in (([20240521, 1, 1], b"ab", "magic"), ([20240520, 2, 1], b"ab", "magic and version"),
                               ([20240520, 1, 2], b"ab", "truncated"), ([20240520, 1, 1], b"abc", "overlong"),
                               ([20240520, 1, 0], b"", "none"), ([20240520, 1, -1], b"", "truncated")):
        with pytest.raises(ConfigError, match=said):
            read_shard(shard(header, body))
    (tmp_path / "short.bin").write_bytes(b"xx")
    with pytest.raises(ConfigError, match="header of 1024 bytes"):
        read_shard(tmp_path / "short.bin")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_shard(tmp_path / "absent.bin")


def test_absent_folder_and_manifest(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nothing")
    assert "manifest.json cannot be read" in refusal(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    assert "not a manifest" in refusal(tmp_path)


@pytest.mark.parametrize("change, said", [
    (lambda m: m.update(format=9), "format 9, must be 1"),
    (lambda m: m["disjoint"].update(common=3), "3 validation documents are in the training shards"),
    (lambda m: m["val"].update(counted_bytes=7), "the manifest says 7"),
    (lambda m: m["val"].update(bytes=8), "must count the 8 bytes"),
    (lambda m: m["train"]["shards"][0].update(tokens=5), "the manifest says 5"),
    (lambda m: m["train"]["shards"][0].update(sha256="0" * 64), "sha256 differs"),
    (lambda m: m["train"]["shards"][0].update(file="../x.bin"), "not a manifest"),
    (lambda m: m["tokenizer"].update(sha256="0" * 64), "not the tokenizer of the shards"),
    (lambda m: m.update(byte_rule="guess"), "byte_rule=guess"),
    (lambda m: m["val"].update(documents=77), "the manifest says 77"),
    (lambda m: m["train"].update(tokens=5), "the manifest says 5"),
    (lambda m: m["val"].update(bytes=None), "must be known"),
    (lambda m: m.update(source=None), "source must be of type str"),
    (lambda m: m["disjoint"].update(common=1) or m.update(source="fineweb-own"), "must be 0"),
    (lambda m: m["val"]["shards"].clear(), "need shards"),
    (lambda m: m["val"]["shards"][0].pop("sha256"), "sha256"),
    (lambda m: m.update(byte_rule="sidecar"), "needs sidecars"),
])
def test_manifest_that_does_not_match(copy, change, said):
    edit_manifest(copy, change)
    assert said in refusal(copy)


def test_duplicates_in_the_published_shards_are_declared_not_refused(copy):
    edit_manifest(copy, lambda m: (m["disjoint"].update(common=3), m.update(source="fineweb (somewhere)")))
    assert load_data(settings_for(copy), World()).manifest["disjoint"]["common"] == 3


def test_damaged_shard_is_found_even_after_it_was_verified(copy):
    load_data(settings_for(copy), World())
    path = copy / "fineweb_train_000000.bin"
    raw = bytearray(path.read_bytes())
    raw[2000] ^= 1
    path.write_bytes(raw)
    assert "sha256 differs" in refusal(copy)
    path.write_bytes(raw[:-2])
    assert "truncated" in refusal(copy)


def test_a_token_beyond_the_vocabulary_is_found(copy):
    path = copy / "fineweb_train_000000.bin"
    raw = bytearray(path.read_bytes())
    raw[1024 + 50:1024 + 52] = b"\xff\xee"
    path.write_bytes(raw)
    edit_manifest(copy, lambda m: m["train"]["shards"][0].update(sha256=sha256_file(path)))
    assert "is beyond VOCAB_SIZE=384" in refusal(copy)


def test_wrong_vocabulary(copy):
    assert "VOCAB_SIZE=512: the tokenizer" in refusal(copy, VOCAB_SIZE=512)
    assert "not a readable SentencePiece model" in refusal(copy, TOKENIZER_PATH=copy / "manifest.json")


def test_sidecar_replaces_the_tokenizers_count(copy):
    """With byte_rule sidecar the counts come from the second shard, and it must be as long as the tokens."""
    raw = (copy / "fineweb_val_000000.bin").read_bytes()
    count = (len(raw) - 1024) // 2
    tokens = np.frombuffer(raw, "<u2", offset=1024)
    side = np.where(tokens == BOS, 0, 3).astype("<u2")
    (copy / "fineweb_val_bytes_000000.bin").write_bytes(raw[:1024] + side.tobytes())
    entry = {"file": "fineweb_val_bytes_000000.bin", "tokens": count,
             "sha256": sha256_file(copy / "fineweb_val_bytes_000000.bin")}

    def change(manifest):
        manifest.update(byte_rule="sidecar", source="elsewhere")
        manifest["val"].update(sidecars=[entry], counted_bytes=int(side.sum()), bytes=int(side.sum()))
    edit_manifest(copy, change)
    assert load_data(settings_for(copy), World()).val.bytes.tolist() == side.tolist()
    edit_manifest(copy, lambda m: m["val"].update(sidecars=[entry, entry]))
    assert "entries for" in refusal(copy)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_stream_joins_shards(sizes, data):
    whole = np.arange(sum(sizes), dtype=np.uint16)
    stream = TokenStream(np.split(whole, np.cumsum(sizes)[:-1]))
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start + 1, len(whole)))
    assert stream.take(start, stop).tolist() == list(range(start, stop))


def batches(length, shuffle, seed=3):
    config = small_config(SHUFFLE=int(shuffle), TRAIN_SEQ_LEN=16, MICRO_BATCH_TOKENS=64, TRAIN_BATCH_TOKENS=64)
    tokens = (np.arange(length) + 2).astype(np.uint16)
    return Batches(TokenStream([tokens[:100], tokens[100:]]), config.data, config.train, seed)


@pytest.mark.parametrize("shuffle", [False, True])
def test_rows_cover_each_epoch_once(shuffle):
    rows = batches(16 * 20 + 1, shuffle)
    per_epoch = rows.blocks_per_epoch
    for epoch in range(3):
        starts = [rows._start(epoch * per_epoch + place) for place in range(per_epoch)]
        assert len(set(starts)) == per_epoch and len({start % 16 for start in starts}) == 1
        assert min(starts) >= 0 and max(starts) + 17 <= 16 * 20 + 1
        assert (starts == sorted(starts)) != shuffle


def test_rows_are_a_function_of_their_index_and_targets_are_next_tokens():
    rows, again = batches(900, True), batches(900, True)
    order = [5, 0, 31, 2]
    first = {index: rows.micro(index, World()) for index in order}
    for index in sorted(order):
        batch = again.micro(index, World())
        assert torch.equal(batch.tokens, first[index].tokens)
        assert torch.equal(batch.targets, batch.tokens + 1)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_change_of_context_cuts_the_same_tokens(shuffle):
    """With a schedule of 16, 32 and 48, every micro-batch holds the same tokens in every context, and an epoch all."""
    config = small_config(SHUFFLE=int(shuffle), TRAIN_SEQ_LEN=48, TRAIN_SEQ_SCHEDULE="16@0.2,32@0.5,48@1",
                          MICRO_BATCH_TOKENS=192, TRAIN_BATCH_TOKENS=192)
    tokens = (np.arange(96 * 21 + 1) + 2).astype(np.uint16)
    rows = Batches(TokenStream([tokens]), config.data, config.train, 3)
    seen = []
    for index in range(rows.blocks_per_epoch // 2):
        flat = [rows.micro(index, World(), length) for length in (16, 32, 48)]
        assert [batch.tokens.shape for batch in flat] == [(12, 16), (6, 32), (4, 48)]
        for batch in flat[1:]:
            assert torch.equal(batch.tokens.flatten(), flat[0].tokens.flatten())
            assert torch.equal(batch.targets.flatten(), flat[0].targets.flatten())
        seen += flat[0].tokens.flatten().tolist()
    assert len(set(seen)) == len(seen) == rows.blocks_per_epoch * 96
    assert [length_at(config.train, frac) for frac in (0, 0.19, 0.2, 0.49, 0.5, 1)] == [16, 16, 32, 32, 48, 48]


def test_packed_rows_hold_whole_documents_and_drop_nothing():
    config = small_config(SHUFFLE=1, TRAIN_SEQ_LEN=32, TRAIN_SEQ_SCHEDULE="8@0.5,32@1", MICRO_BATCH_TOKENS=128,
                          TRAIN_BATCH_TOKENS=128)
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random(128 * 30) < 0.03, BOS, rng.integers(5, 99, 128 * 30)).astype(np.uint16)
    packed = Batches(TokenStream([tokens]), config.data, config.train, 3, packed=True)
    starts = sorted(packed._start(index) for index in range(packed.blocks_per_epoch))
    assert np.diff(starts).tolist() == [128] * (packed.blocks_per_epoch - 1)
    for index in range(packed.blocks_per_epoch):
        short, long = (packed.micro(index, World(), length) for length in (8, 32))
        assert short.tokens.shape == (1, 128) and torch.equal(short.tokens, long.tokens)
        start = packed._start(index)
        assert short.targets[0].tolist() == tokens[start + 1:start + 129].tolist()
        for batch, length in ((short, 8), (long, 32)):
            docs = batch.docs.docs(batch.tokens.shape)[0]
            assert batch.docs.longest == 32 and torch.bincount(docs).max() <= length
            # A new span begins at every BOS, else only where the one before is full.
            begins = (docs[1:] != docs[:-1]).nonzero()[:, 0] + 1
            for at in begins.tolist():
                assert batch.tokens[0, at] == BOS or (docs == docs[at - 1]).sum() == length
            assert set((batch.tokens[0, 1:] == BOS).nonzero()[:, 0].add(1).tolist()) <= set(begins.tolist())


def test_too_little_text_is_a_clear_fault():
    with pytest.raises(ConfigError, match="less than two rows"):
        batches(20, False)


def test_document_index_counts_bos():
    tokens = torch.tensor([[5, BOS, 7, 8, BOS, BOS]])
    assert document_index(tokens).tolist() == [[0, 1, 1, 1, 2, 3]]
