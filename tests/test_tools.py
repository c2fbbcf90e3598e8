"""The picture draws the valid history of a run; the yardsticks compress exactly the validation text."""

import gzip
import hashlib
import io
import json
import lzma
import math
import random
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import zstandard

from tools import plot, yardsticks

ROOT = Path(__file__).resolve().parent.parent
WIKITEXT = ROOT / "data" / "datasets" / "wikitext2_sp2048"


class ConfigError(Exception):
    pass


def read_shard(path):
    return np.fromfile(path, dtype="<u2", offset=1024)


def sha256_file(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


GPT = types.SimpleNamespace(ConfigError=ConfigError, read_shard=read_shard, sha256_file=sha256_file)


# ---- yardsticks


def test_yardsticks_are_the_compressors_own_sizes():
    text = b"the quick brown fox " * 40 + random.Random(1).randbytes(300)
    got = yardsticks.yardsticks(text)
    stream = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=stream, mtime=0) as file:
        file.write(text)
    assert got == {
        "gzip": 8 * len(stream.getvalue()) / len(text),
        "zstd": 8 * len(zstandard.ZstdCompressor(level=19).compress(text)) / len(text),
        "xz": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
    }
    assert yardsticks.yardsticks(text) == got
    with pytest.raises(ValueError, match="no bytes"):
        yardsticks.yardsticks(b"")


def train_tokenizer(folder, lossless):
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False,
               "add_dummy_prefix": False} if lossless else {}
    text = "\n".join(f"a cat {i} sat on the mat, and the dog saw the cat" for i in range(200))
    prefix = folder / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n")), model_prefix=str(prefix), model_type="bpe", vocab_size=320,
        byte_fallback=True, pad_id=0, bos_id=1, eos_id=2, unk_id=3, hard_vocab_limit=False, num_threads=1,
        minloglevel=2, **options)
    return Path(f"{prefix}.model")


def write_shard(path, tokens):
    path.write_bytes(struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253) + np.array(tokens, "<u2").tobytes())


@pytest.fixture
def dataset(tmp_path):
    """Makes a dataset folder from documents; returns a function of (documents, rule, shard split)."""
    def make(documents, rule="lossless", shard_tokens=1 << 30, **changes):
        model = train_tokenizer(tmp_path, rule == "lossless")
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        tokens = []
        for document in documents:
            tokens.append(1)
            for i, part in enumerate(document.split(yardsticks.SPACE)):
                if i:  # a literal U+2581 is written as its three bytes
                    tokens += [processor.piece_to_id(f"<0x{byte:02X}>") for byte in yardsticks.SPACE.encode()]
                tokens += processor.encode(part)
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        shards = []
        for i, start in enumerate(range(0, len(tokens), shard_tokens)):
            name = f"fineweb_val_{i:06d}.bin"
            write_shard(folder / name, tokens[start: start + shard_tokens])
            shards.append({"file": name, "tokens": len(tokens[start: start + shard_tokens])})
        size = sum(len(document.encode()) for document in documents)
        manifest = {"byte_rule": rule,
                    "tokenizer": {"path": "../tokenizer.model", "sha256": sha256_file(model),
                                  "vocab_size": processor.get_piece_size(), "lossless": rule == "lossless"},
                    "val": {"bytes": size, "counted_bytes": size, "shards": shards, **changes}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder
    return make


HARD_TEXTS = [
    " leading", "two  spaces \n\n lines\r\n", "", "a", " ", "\0\t", "é 日本 \U0001f600 \u200b e\u0301",
    f"mark {yardsticks.SPACE}{yardsticks.SPACE} here {yardsticks.SPACE}", "the cat sat",
]


def test_lossless_text_comes_back_byte_for_byte_across_shards(dataset, monkeypatch):
    expected = "".join(HARD_TEXTS).encode()
    assert yardsticks.validation_text(dataset(HARD_TEXTS), GPT) == (expected, True)
    monkeypatch.setattr(yardsticks, "DECODE_TOKENS", 3)
    assert yardsticks.validation_text(dataset(HARD_TEXTS, shard_tokens=7), GPT) == (expected, True)


def test_challenge_rule_drops_the_tokenizers_own_leading_space(dataset, monkeypatch):
    documents = ["the cat sat", "on the mat", "a dog"]
    for chunk in (1 << 20, 1):
        monkeypatch.setattr(yardsticks, "DECODE_TOKENS", chunk)
        folder = dataset(documents, rule="challenge", shard_tokens=4)
        assert yardsticks.validation_text(folder, GPT) == ("".join(documents).encode(), False)


@pytest.mark.parametrize(("change", "message"), [
    (lambda m, f: m["val"].update(bytes=5), "decode to 11 bytes, manifest.json says 5"),
    (lambda m, f: m["val"].update(bytes=None, counted_bytes=7), "decode to 11 bytes, manifest.json says 7"),
    (lambda m, f: m.update(byte_rule="sidecar"), "the byte rule 'sidecar' cannot be decoded"),
    (lambda m, f: m["tokenizer"].update(sha256="0"), "sha256 differs"),
    (lambda m, f: m["tokenizer"].update(path="nowhere"), "missing"),
    (lambda m, f: m["tokenizer"].update(vocab_size=9), "pieces"),
    (lambda m, f: m["val"]["shards"][0].update(tokens=2), "tokens, "),
    (lambda m, f: m.pop("val"), "damaged"),
    (lambda m, f: write_shard(f / "fineweb_val_000000.bin", [9999] * m["val"]["shards"][0]["tokens"]), "token 9999"),
])
def test_each_fault_of_a_dataset_is_one_line(dataset, change, message):
    folder = dataset(["the cat sat"])
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest, folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError) as caught:
        yardsticks.validation_text(folder, GPT)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_folder_is_a_dataset_or_a_run(tmp_path):
    with pytest.raises(ConfigError, match="neither"):
        yardsticks.dataset_folder(tmp_path, GPT)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no setting DATA_PATH"):
        yardsticks.dataset_folder(tmp_path, GPT)
    (tmp_path / "config.json").write_text(json.dumps({"settings": {"DATA_PATH": "data/x"}}))
    assert yardsticks.dataset_folder(tmp_path, GPT) == Path("data/x")
    (tmp_path / "manifest.json").write_text("{}")
    assert yardsticks.dataset_folder(tmp_path, GPT) == tmp_path


@pytest.mark.skipif(not (WIKITEXT / "manifest.json").exists() or not (ROOT / "train_gpt.py").exists(),
                    reason="the WikiText-2 dataset is not prepared here")
def test_yardsticks_of_wikitext(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"settings": {"DATA_PATH": str(WIKITEXT)}}))
    done = subprocess.run([sys.executable, ROOT / "tools" / "yardsticks.py", tmp_path], capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result) == ["bytes", "lossless", "gzip", "zstd", "xz"]
    assert (result["bytes"], result["lossless"], round(result["xz"], 4)) == (1146846, True, 2.3178)
    done = subprocess.run([sys.executable, ROOT / "tools" / "yardsticks.py", tmp_path / "no"], capture_output=True,
                          text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


# ---- the picture


def step_event(step, loss, seconds):
    return {"event": "step", "t": seconds, "step": step, "train_loss": loss, "lr_factor": 1.0,
            "train_seconds": seconds, "tokens": 10 * step, "grad_norm": 0.5}


def val_event(step, bpb, seconds):
    return {"event": "val", "t": seconds, "step": step, "val_loss": bpb, "val_bpb": bpb, "train_seconds": seconds}


def test_after_a_resume_the_later_line_wins_and_lost_steps_are_gone():
    events = [step_event(i, 5.0 - i, float(i)) for i in (1, 2, 3, 4, 5)]
    events.insert(3, val_event(3, 9.0, 3.0))
    events += [{"event": "resume", "step": 2, "train_seconds": 2.0}, step_event(3, 7.0, 3.5), val_event(3, 8.0, 3.5)]
    series = plot.prepare(events, {}, {})
    assert series.train_loss == plot.Curve([1.0, 2.0, 3.5], [4.0, 3.0, 7.0])
    assert series.val_bpb == plot.Curve([3.5], [8.0])
    assert series.resumes == [2.0]
    # Without a resume line the later line of a step wins as well.
    assert plot.prepare([step_event(1, 2.0, 1.0), step_event(1, 1.0, 1.5)], {}, {}).train_loss.y == [1.0]
    # A second resume from before the first one takes the first out of the history.
    events += [{"event": "resume", "step": 1, "train_seconds": 1.0}]
    assert plot.prepare(events, {}, {}).resumes == [1.0]


def test_not_a_number_is_left_out_and_smoothing_keeps_a_constant():
    events = [step_event(i, math.nan if i == 2 else 3.0, float(i)) for i in range(1, 200)]
    series = plot.prepare(events, {}, {})
    assert len(series.train_loss.y) == 198 and 2.0 not in series.train_loss.x
    assert series.smooth_loss.y == pytest.approx([3.0] * 198)
    line = plot.Curve(list(range(500)), [float(i) for i in range(500)])
    assert plot.smooth(line).y[:480] == pytest.approx(line.y[:480])  # no delay


def test_bytes_by_group_sum_to_the_total():
    def tensor(name, role, size):
        return {"event": "tensor", "name": name, "role": role, "bytes": size}
    events = [tensor(f"blocks.{b}.{kind}", "matrix", 100 + b) for b in range(3) for kind in ("q", "mlp.up.weight")]
    events += [tensor("embedding", "embedding", 999), tensor("embedding", "embedding", 1000)]  # written twice
    result = {"artifact": {"model_bytes": 1706, "code_bytes": 50, "total_bytes": 1756, "limit_bytes": 2000}}
    parts, total = plot.byte_parts(events, result)
    assert parts == [("embedding", "embedding", 1000), ("matrix · q  ×3", "matrix", 303),
                     ("matrix · up  ×3", "matrix", 303), ("container", "", 100), ("code", "", 50)]
    assert total == sum(size for *_, size in parts) == 1756
    many = [tensor(f"part_{chr(97 + i)}{chr(97 + i)}", "gain", i + 1) for i in range(20)]
    parts, total = plot.byte_parts(many, {})
    assert len(parts) == plot.MOST_BARS + 1 and total == 210 and parts[-1] == ("6 smaller tensors", "", 21)


def test_labels_never_touch_and_stay_near():
    rng = random.Random(3)
    for _ in range(200):
        wanted = [rng.random() for _ in range(rng.randrange(0, 9))]
        places = plot.spread(wanted, 0.1, 0.0, 1.0)
        ordered = sorted(places)
        assert all(b - a > 0.1 - 1e-9 for a, b in zip(ordered, ordered[1:], strict=False))
        assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
        assert sorted(range(len(wanted)), key=wanted.__getitem__) == sorted(range(len(wanted)), key=places.__getitem__)
    assert plot.spread([0.5, 0.2], 0.1, 0, 1) == pytest.approx([0.5, 0.2])
    assert plot.spread([0.5, 0.5], 0.1, 0, 1) == pytest.approx([0.45, 0.55])


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def write_run(folder, events, config=None, result=None):
    folder.mkdir(exist_ok=True)
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    for name, value in (("config.json", config), ("result.json", result)):
        if value is not None:
            (folder / name).write_text(json.dumps(value))


def test_a_whole_run_gives_a_picture_of_the_right_size(tmp_path):
    events = [step_event(i, 5 / i + 2, i / 2) for i in range(1, 60)] + [val_event(0, 8.0, 0.0), val_event(59, 2.2, 29)]
    events += [{"event": "tensor", "name": f"blocks.{b}.q", "role": "matrix", "format": "int8", "codec": "zstd",
                "weights": 10, "bytes": 900_000, "error": 0.1} for b in range(3)]
    config = {"settings": {"PRESET": "sixteen", "OVERLAY": "tiny", "RUN_ID": "one"}}
    result = {"scores": {"sliding": {"val_bpb": 2.1}, "contiguous": {"val_bpb": 2.11}},
              "yardsticks": {"gzip": 2.8, "zstd": 2.35, "xz": 2.31},
              "artifact": {"model_bytes": 2_700_900, "code_bytes": 30_000, "total_bytes": 2_730_900,
                           "limit_bytes": 16_000_000}}
    write_run(tmp_path, events, config, result)
    assert plot.main([str(tmp_path)]) == 0
    assert png_size(tmp_path / "curve.png") == (1600, 1200)
    figure = plot.draw(plot.prepare(events, config, result))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert "Artifact: 2,730,900 of 16,000,000 bytes (17.1%)" in titles
    assert figure.get_suptitle() == "one   sixteen + tiny"
    bits = figure.axes[titles.index("Bits per byte on the validation split")]
    assert {text.get_text() for text in bits.texts} >= {"sliding 2.1000", "gzip 2.8000", "xz 2.3100"}


@pytest.mark.parametrize("events", [
    [], [step_event(1, 3.0, 1.0)], [val_event(1, 3.0, 1.0)], [step_event(i, 3.0, 0.0) for i in range(3)],
    [{"event": "score", "evaluator": "sliding", "val_bpb": 2.0}],
    [{"event": "resume", "step": 4, "train_seconds": 2.0}],
    [{"event": "tensor", "name": "embedding", "role": "embedding", "bytes": 10}],
])
def test_part_of_a_run_draws_what_there_is_and_says_what_is_missing(tmp_path, events):
    write_run(tmp_path, events)
    assert plot.main([str(tmp_path), "--out", str(tmp_path / "x.png")]) == 0
    assert png_size(tmp_path / "x.png") == (1600, 1200)
    assert not list(tmp_path.glob("*.part"))
    assert plot.prepare(events, {}, {}).notes == ["not finished: no result.json"]
    assert plot.prepare(events, {}, {"scores": {"x": {"val_bpb": 1}}}).notes == ["result.json: no artifact, yardsticks"]


def test_a_line_cut_by_a_kill_is_skipped_and_counted(tmp_path):
    write_run(tmp_path, [step_event(1, 3.0, 1.0)])
    path = tmp_path / "events.jsonl"
    path.write_bytes(path.read_bytes() + b'{"event":"st' + json.dumps(step_event(2, 2.0, 2.0)).encode() + b"\n\xff\n")
    events, broken = plot.read_events(path)
    assert (len(events), broken) == (1, 2)
    assert plot.main([str(tmp_path)]) == 0


@pytest.mark.parametrize(("files", "message"), [
    ({}, "events.jsonl"), ({"events.jsonl": "", "config.json": "{"}, "config.json"),
    ({"events.jsonl": "", "result.json": "[]"}, "result.json"),
    ({"events.jsonl": '{"event": "step"}\n'}, "lacks"),
])
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, capsys, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert plot.main([str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and message in said.err
    assert plot.main([]) == 2


def test_unwritable_picture_is_one_line(tmp_path, capsys):
    write_run(tmp_path, [])
    (tmp_path / "file").write_text("")
    assert plot.main([str(tmp_path), "--out", str(tmp_path / "file" / "x.png")]) == 2
    assert "cannot be written" in capsys.readouterr().err
