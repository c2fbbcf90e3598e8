"""Bits per byte of ordinary compressors on the very bytes that a validation split stands for.

    python tools/yardsticks.py RUN_FOLDER_OR_DATASET_FOLDER

The validation shards are decoded back to text with the tokenizer of the data manifest, documents one after
another. Standard output holds one JSON object:
{"bytes": n, "lossless": bool, "gzip": .., "zstd": .., "xz": ..}.
"""

from __future__ import annotations

import gzip
import importlib
import json
import lzma
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SPACE = "\u2581"  # SentencePiece's mark for a space
DECODE_TOKENS = 1 << 20  # tokens decoded at a time, so that a large split needs little beside its text
# RULES: byte rule of the manifest -> a space that opens a document counts. Under the challenge's rule the
# tokenizer itself put it there, so it is no byte of the text.
RULES = {"lossless": True, "challenge": False}


def yardsticks(text: bytes) -> dict[str, float]:
    """Returns bits per byte of gzip -9, zstd -19 and xz -9e on `text`, each as one stream, headers included.

    Raises ValueError for empty text, ImportError where the zstandard library is missing.
    """
    import zstandard

    if not text:
        raise ValueError("no bytes to compress")
    compressors: dict[str, Callable[[bytes], bytes]] = {
        "gzip": lambda data: gzip.compress(data, 9, mtime=0),
        "zstd": zstandard.ZstdCompressor(level=19).compress,
        "xz": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    }
    with ThreadPoolExecutor(len(compressors)) as pool:  # all three release the interpreter while they work
        sizes = {name: pool.submit(lambda f: len(f(text)), f) for name, f in compressors.items()}
        return {name: 8 * size.result() / len(text) for name, size in sizes.items()}


def validation_text(dataset: Path, gpt: ModuleType) -> tuple[bytes, bool]:
    """Returns the text of a dataset's validation split, one document after another, and if it is lossless.

    `gpt` is the train_gpt module (or the running script's own module); its read_shard, sha256_file and
    ConfigError are used. Raises its ConfigError for missing, damaged or mismatched files, for a byte rule
    without a decoder, and where lossless text is not exactly as long as the manifest says.
    """
    path = dataset / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        rule, tokenizer, split = manifest["byte_rule"], manifest["tokenizer"], manifest["val"]
        lossless, vocabulary = tokenizer["lossless"], tokenizer["vocab_size"]
        model, model_hash = dataset / tokenizer["path"], tokenizer["sha256"]
        shards = [(dataset / shard["file"], shard["tokens"]) for shard in split["shards"]]
        expected_bytes = split["counted_bytes"] if split["bytes"] is None else split["bytes"]
    except OSError as error:
        raise gpt.ConfigError(f"DATA_PATH={dataset}: no readable {path.name} ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise gpt.ConfigError(f"DATA_PATH={dataset}: {path.name} is damaged ({error!r})") from error
    if tokenizer.get("transform"):
        text = transformed_text(dataset, gpt)
        if lossless and len(text) != expected_bytes:
            raise gpt.ConfigError(f"DATA_PATH={dataset}: the validation tokens decode to {len(text)} bytes, "
                                  f"{path.name} says {expected_bytes}")
        return text, lossless
    if rule not in RULES:
        raise gpt.ConfigError(f"DATA_PATH={dataset}: text under the byte rule {rule!r} cannot be decoded; "
                              f"yardsticks know {', '.join(RULES)}")
    if not model.is_file():
        raise gpt.ConfigError(f"TOKENIZER_PATH={model}: missing")
    if gpt.sha256_file(model) != model_hash:
        raise gpt.ConfigError(f"TOKENIZER_PATH={model}: not the tokenizer of {path} (sha256 differs)")
    tables = piece_bytes(model, opening_space=RULES[rule])
    if len(tables) != 2 * vocabulary:
        raise gpt.ConfigError(f"TOKENIZER_PATH={model}: {len(tables) // 2} pieces, {path} says {vocabulary}")
    parts = []
    previous = None
    for shard, count in shards:
        tokens = gpt.read_shard(shard)
        if len(tokens) != count:
            raise gpt.ConfigError(f"{shard}: {len(tokens)} tokens, {path} says {count}")
        if count and int(tokens.max()) >= vocabulary:
            raise gpt.ConfigError(f"{shard}: token {int(tokens.max())}, the vocabulary has {vocabulary}")
        parts.append(decode_tokens(tokens, tables, previous))
        previous = int(tokens[-1]) if count else previous
    text = b"".join(parts)
    if rule == "lossless" and len(text) != expected_bytes:
        raise gpt.ConfigError(f"DATA_PATH={dataset}: the validation tokens decode to {len(text)} bytes, "
                              f"{path.name} says {expected_bytes}")
    return text, lossless


def transformed_text(dataset: Path, gpt: ModuleType) -> bytes:
    """Returns the validation text of a dataset whose text went through a transform (CaseOps), undone by
    data/prepare.py; raises gpt.ConfigError where that cannot be."""
    if str(ROOT / "data") not in sys.path:
        sys.path.append(str(ROOT / "data"))
    prepare = importlib.import_module("prepare")
    try:
        return "".join(prepare.dataset_texts(dataset, "val")).encode()
    except prepare.DataError as error:
        raise gpt.ConfigError(f"DATA_PATH={error}") from error


def piece_bytes(model: Path, opening_space: bool) -> list[bytes]:
    """Returns each token's bytes inside a text, then each token's bytes after a control token (2 V).

    U+2581 is a space, a byte piece its byte, control, unknown and unused pieces nothing. Without
    `opening_space` one U+2581 that leads a piece right after a control token is dropped.
    """
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    inside, opening = [], []
    for token in range(processor.get_piece_size()):
        piece = processor.id_to_piece(token)
        if processor.is_byte(token):
            inside.append(bytes([int(piece[1:-1], 16)]))
            opening.append(inside[-1])
        elif processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
            inside.append(b"")
            opening.append(b"")
        else:
            first = piece if opening_space else piece.removeprefix(SPACE)
            inside.append(piece.replace(SPACE, " ").encode())
            opening.append(first.replace(SPACE, " ").encode())
    return inside + opening


def decode_tokens(tokens: np.ndarray, tables: list[bytes], previous: int | None) -> bytes:
    """Returns the bytes of `tokens` (T,); `previous` is the token before, None at the start of a split."""
    vocabulary = len(tables) // 2
    silent = np.array([not piece for piece in tables[:vocabulary]])
    parts = []
    last = True if previous is None else bool(silent[previous])
    for start in range(0, len(tokens), DECODE_TOKENS):
        chunk = np.asarray(tokens[start: start + DECODE_TOKENS], dtype=np.int64)
        quiet = silent[chunk]
        opens = np.concatenate([[last], quiet[:-1]])
        last = bool(quiet[-1])
        parts.append(b"".join(map(tables.__getitem__, (chunk + vocabulary * opens).tolist())))
    return b"".join(parts)


def dataset_folder(folder: Path, gpt: ModuleType) -> Path:
    """Returns the dataset folder that `folder` is, or that the run in `folder` read; raises gpt.ConfigError.

    A run's relative DATA_PATH counts from the current folder, as it does in training.
    """
    if (folder / "manifest.json").is_file():
        return folder
    config = folder / "config.json"
    if not config.is_file():
        raise gpt.ConfigError(f"{folder}: neither manifest.json (a dataset) nor config.json (a run) in it")
    try:
        return Path(json.loads(config.read_bytes())["settings"]["DATA_PATH"])
    except (ValueError, KeyError, TypeError) as error:
        raise gpt.ConfigError(f"{config}: no setting DATA_PATH in it ({error!r})") from error


def import_train_gpt() -> ModuleType:
    """Returns the module of the readable train_gpt.py."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module("train_gpt")


def main(argv: list[str]) -> int:
    """Prints one folder's yardsticks; returns the exit code: 0, or 2 after one line for a user's mistake."""
    if argv in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if len(argv) != 1 or argv[0].startswith("-"):
        print("usage: python tools/yardsticks.py RUN_FOLDER_OR_DATASET_FOLDER", file=sys.stderr)
        return 2
    gpt = import_train_gpt()
    try:
        text, lossless = validation_text(dataset_folder(Path(argv[0]), gpt), gpt)
        if not text:
            raise gpt.ConfigError(f"{argv[0]}: the validation split is empty")
    except gpt.ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps({"bytes": len(text), "lossless": lossless, **yardsticks(text)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
