"""The picture draws the valid history of a run; the yardsticks compress exactly the validation text; the benchmarks
make their tables from small inputs."""

import gzip
import hashlib
import io
import json
import lzma
import math
import os
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
from conftest import small_words

import train_gpt
from tools import bench, plot, yardsticks

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


def tensor_event(name, role="matrix", size=100.0, **more):
    return {"event": "tensor", "name": name, "role": role, "format": "int6", "solver": "gptq", "codec": "context",
            "weights": 200, "bytes": size, "scale_bytes": 0.0, "error": 0.1, "hessian_error": None, "cost": None,
            "visits": None, **more}


def test_bytes_by_part_sum_to_the_total():
    events = [tensor_event(f"blocks.{block}.{name}.weight", size=100 + block, scale_bytes=2.0, cost=0.25)
              for block in range(3) for name in ("mixer.q", "mlp.up")]
    events += [tensor_event("tok_emb", "embedding", size) for size in (999, 1000)]  # written twice
    events += [tensor_event("blocks.0.resid_mix", "gain", 30)]
    result = {"artifact": {"model_bytes": 1736, "code_bytes": 50, "total_bytes": 1786, "limit_bytes": 2000}}
    parts, tensors, total = plot.byte_parts(events, result)
    assert [(part.label, part.kind, part.bytes, part.weights, part.cost) for part in parts] == [
        ("embedding", "embedding", 1000, 200, None), ("q  ×3", "attention", 297, 600, 0.75),
        ("up  ×3", "feed-forward", 297, 600, 0.75), ("gain", "gains", 30, 200, None),
        ("scales", "", 12, 1200, None), ("header", "", 100, 0, None), ("code", "", 50, 0, None)]
    assert (parts[1].bits, parts[1].millinats, parts[0].millinats, parts[5].bits) == ("3.96", "750.00", "", "")
    assert [part.label for part in tensors[:3]] == ["0 q", "0 up", "1 q"] and len(tensors) == 8
    assert total == sum(part.bytes for part in parts) == 1786
    many = [tensor_event(f"part_{chr(97 + i)}{chr(97 + i)}", size=i + 1) for i in range(20)]
    parts, _, total = plot.byte_parts(many, {})
    assert len(parts) == plot.MOST_BARS + 1 and total == 210
    assert (parts[-1].label, parts[-1].bytes) == ("6 smaller parts", 21)


def test_events_of_older_runs_have_parts_too():
    event = {"event": "tensor", "name": "blocks.0.q", "role": "matrix", "bytes": 10}
    parts, tensors, total = plot.byte_parts([event], {})
    assert ([part.label for part in parts], len(tensors), total) == (["q"], 1, 10)


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


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("cost", [0.002, None])
def test_the_picture_prices_every_tensor(tmp_path, trained, cost):
    events = [step_event(i, 3.0, float(i)) for i in range(1, 9)] * trained
    events += [tensor_event(f"blocks.{block}.mlp.{name}.weight", cost=cost, error=0.1 + block / 100)
               for block in range(20) for name in ("up", "down")]
    events += [tensor_event("skips.0_3.gate", "gate", error=0.001)]
    config = {"settings": {"RUN_ID": "two", "FROM": "" if trained else "runs/one"}}
    result = {"artifact": {"model_bytes": 4200, "code_bytes": 5, "total_bytes": 4205}, "scores": {"x": {"val_bpb": 2}}}
    write_run(tmp_path, events, config, result)
    assert plot.main([str(tmp_path)]) == 0
    assert png_size(tmp_path / "curve.png") == (1600, 1200)
    figure = plot.draw(plot.prepare(events, config, result))
    assert figure.get_suptitle() == "two" + "   from runs/one" * (not trained)
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    texts = {text.get_text() for text in panels["Artifact: 4,205 bytes"].texts}
    assert {"4.00", "2,000  (47.6%)"} <= texts and ("40.00" in texts) == (cost is not None)
    ours = [title for title in panels if "ensor's quantization" in title]
    assert ("Loss" in panels) == trained and len(ours) == (not trained)
    if not trained:
        assert ours[0].endswith(f"(the largest {plot.MOST_TENSORS})") and ("costs" in ours[0]) == (cost is not None)
        texts = [text.get_text() for text in panels[ours[0]].texts]
        assert texts[0] == ("2" if cost else "0.29") and texts.count("int6") == plot.MOST_TENSORS
        labels = [label.get_text() for label in panels[ours[0]].get_yticklabels()]
        assert labels[:2] == (["0 up", "0 down"] if cost else ["19 up", "19 down"])


def document_table(**nats):
    """documents.npz of four documents, the last of no bytes; nats by evaluator are bits a byte of each document."""
    targets, sizes = np.array([10, 12, 100, 1]), np.array([20.0, 30.0, 250.0, 0.0])
    table = {"document_targets": targets, "document_bytes": sizes, "position_targets": np.array([4, 8, 111]),
             "position_bytes": np.array([1.0, 19.0, 280.0])}
    for name, values in nats.items():
        table[f"document_nats_{name}"] = np.array([*values, 0.0]) * sizes * math.log(2)
        table[f"position_nats_{name}"] = np.array([9.0, 2.0, 1.0]) * table["position_bytes"] * math.log(2)
    return table


def test_documents_are_binned_and_compared():
    found = plot.document_series(document_table(sliding=(2, 3, 1), ttt=(1.5, 3.5, 0.9), float=(9, 9, 9)))
    middles = [2 ** 1.5, 2 ** 2.5]  # the first bin has too few bytes
    assert found.by_position["ttt"].x == pytest.approx(middles) and found.by_position["ttt"].y == pytest.approx([2, 1])
    assert found.position_share.y == pytest.approx([19 / 300, 280 / 300])
    assert found.by_length["sliding"].x == pytest.approx([2 ** 3.5, 2 ** 6.5])
    assert found.by_length["sliding"].y == pytest.approx([(20 * 2 + 30 * 3) / 50, 1])
    assert found.reference == "sliding" and set(found.by_length) == {"sliding", "ttt"} and set(found.gains) == {"ttt"}
    assert found.gains["ttt"].y == pytest.approx([-0.5, 0.1, 0.5])  # the document without bytes has no gain
    assert found.totals["ttt"] == pytest.approx((20 * 0.5 - 30 * 0.5 + 250 * 0.1) / 300)
    assert plot.document_series(document_table(ttt=(1, 1, 1), contiguous=(2, 2, 2))).reference == "contiguous"
    assert plot.document_series(document_table(ngram=(1, 1, 1), ttt=(2, 2, 2))).totals == {"ttt": pytest.approx(-1)}
    assert plot.document_series({}) == plot.Documents()


@pytest.mark.parametrize("nats", [{"contiguous": (2, 3, 1), "ttt": (1.5, 3.5, 0.9), "float": (9, 9, 9)},
                                  {"ngram": (1, 2, 3)}, {"float": (1, 2, 3)}])
def test_documents_make_the_picture_taller(tmp_path, nats):
    names = list(nats)
    result = {"scores": {name: {"val_bpb": 1.5} for name in names}}
    write_run(tmp_path, [], {"settings": {"RUN_ID": "three"}}, result)
    np.savez_compressed(tmp_path / "documents.npz", **document_table(**nats))
    assert plot.main([str(tmp_path)]) == 0
    assert png_size(tmp_path / "curve.png") == (1600, 1200 + plot.DOCUMENT_PIXELS)
    series = plot.prepare([], {}, result, table=plot.read_table(tmp_path / "documents.npz"))
    figure = plot.draw(series)
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    lines = panels["By position in the document"].lines
    shown = [name for name in names if name != "float"] or names
    assert [line.get_label() for line in lines] == shown == [text.get_text() for text in figure.legends[0].texts[:-1]]
    assert [line.get_color() for line in lines] == [plot.SCORE_COLOURS[names.index(name)] for name in shown]
    (title, axes), = ((title, axes) for title, axes in panels.items() if title.startswith("Gain"))
    assert title == f"Gain over {names[0]}, by document"
    texts = [text.get_text() for text in axes.texts]
    assert texts == (["all documents", "ttt +0.0667"] if "ttt" in nats else ["one evaluator:\nnothing to compare"])
    # What stood there before keeps its size and its distance from the top.
    old = plot.draw(plot.prepare([], {}, result)).axes[0].get_position()
    new = figure.axes[0].get_position()
    tall = 1200 + plot.DOCUMENT_PIXELS
    assert new.height * tall == pytest.approx(old.height * 1200)
    assert (1 - new.y1) * tall == pytest.approx((1 - old.y1) * 1200)


def test_ternary_weights_make_the_picture_taller(tmp_path):
    """Zeros, bits and churn over training time; what a killed life wrote is not drawn; one point has no churn."""
    def trits(step, zeros):
        return {"event": "trits", "step": step, "train_seconds": step / 2, "zeros": zeros, "bits": 1.5,
                **({"churn": 0.1} if step > 2 else {})}
    events = [step_event(i, 3.0, i / 2) for i in range(1, 9)] + [trits(i, i / 8) for i in (2, 4, 6, 8)]
    write_run(tmp_path, events)
    assert plot.main([str(tmp_path)]) == 0
    assert png_size(tmp_path / "curve.png") == (1600, 1200 + plot.TRIT_PIXELS)
    events += [{"event": "resume", "step": 4, "train_seconds": 2.0}]
    series = plot.prepare(events, {}, {})
    assert series.zeros == plot.Curve([1.0, 2.0], [0.25, 0.5])
    panels = {axes.get_title(loc="left"): axes for axes in plot.draw(series).axes}
    assert list(panels["Trits that changed since the point before"].lines[0].get_xdata()) == [2.0]
    assert panels["Ternary weights"].lines[0].get_label() == "zeros"
    panels = {axes.get_title(loc="left"): axes for axes in plot.draw(plot.prepare(events[:9], {}, {})).axes}
    assert [text.get_text() for text in panels["Trits that changed since the point before"].texts] == ["one point only"]


@pytest.mark.parametrize("change", [
    lambda path: path.write_bytes(path.read_bytes()[:200]), lambda path: path.write_bytes(b"PK"),
    lambda path: np.savez(path, document_nats_x=np.ones(2)),
    lambda path: np.savez(path, **{**document_table(x=(1, math.nan, 1))})])
def test_a_damaged_table_of_documents_is_one_line(tmp_path, capsys, change):
    write_run(tmp_path, [])
    np.savez(tmp_path / "documents.npz", **document_table(x=(1, 1, 1)))
    change(tmp_path / "documents.npz")
    assert plot.main([str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "documents.npz" in said.err


# ---- the benchmarks


@pytest.fixture(scope="module")
def finished(mini, tmp_path_factory):
    """A small finished run."""
    runs = tmp_path_factory.mktemp("runs")
    assert train_gpt.main(small_words(mini, runs, PRESET="baseline", RUN_ID="one", ITERATIONS=4, EVAL="contiguous",
                                      STAGES="train,write,evaluate"), {}) == 0
    return runs / "one"


def tables(capsys, folder, *words, code=0):
    """The tables of one benchmark by title, as its JSON file has them, and what it said on standard error."""
    out = folder / "tables.json"
    assert bench.main([*map(str, words), "--json", str(out)]) == code
    said, found = capsys.readouterr(), json.loads(out.read_text())
    assert {"cpu", "cores", "torch"} <= set(found["machine"]) and f"torch {found['machine']['torch']}" in said.out
    for table in found["tables"]:
        assert f"\n{table['title']}\n" in said.out
    return {table["title"].split(":")[0]: table["rows"] for table in found["tables"]}, said.err


@pytest.mark.parametrize(("words", "start"), [
    ([], "bench : must be followed by one of gptq, codec"), (["nothing"], "bench nothing: must be"),
    (["gptq", "REPEATS=0"], "REPEATS=0: must be a whole number"), (["gptq", "REPEATS=x"], "REPEATS=x: must be a whole"),
    (["gptq", "runs/x"], "runs/x: bench gptq takes no run folder"), (["gptq", "--fast"], "--fast: must be one of"),
    (["gptq", "CODEC=zlib"], "CODEC=zlib: must be one of REPEATS"), (["gptq", "--json"], "--json .: must be"),
    (["gptq", "--json", "no/such/x.json"], "--json no/such/x.json: must be"),
    (["codec", "PARTS=run,typo"], "PARTS=run,typo: must be some of gaussian"),
    (["codec", "CODEC=arj"], "CODEC=arj: must be some of range"), (["codec", "SHARE=1.5"], "SHARE=1.5: must be above"),
    (["codec", "no/run"], "no/run: must be a run folder"), (["formats", "ROWS=int9"], "ROWS=int9: must be some of"),
    (["formats", "TERNARY=2"], "TERNARY=2: must be 0 or 1"), (["formats", "MODEL_DIMS=3"], "MODEL_DIMS=3: must be one"),
    (["fit", "CAPS=0.5,0"], "CAPS=0.5,0: must be above 0"), (["fit"], "runs: no finished run"),
    (["schedule", "PARTS=all"], "PARTS=all: must be some of padding"), (["ttt", "GRID=2"], "GRID=2: must be 0 or 1"),
    (["schedule", "TTT_LORA_LR=1"], "TTT_LORA_LR=1: must be one of PARTS"),
    (["ttt", "no/run"], "no/run: must be a run folder with config.json and artifact.bin"),
    (["ttt", "MATRIX_LR=1"], "MATRIX_LR=1: must be one of DOCS"), (["ttt"], "runs: no finished run"),
    (["ngram", "BLOCKS=256,0"], "BLOCKS=256,0: must be numbers above 0"),
])
def test_wrong_words_of_a_benchmark_are_one_line(tmp_path, monkeypatch, capsys, words, start):
    monkeypatch.chdir(tmp_path)
    assert bench.main(words) == 2
    said = capsys.readouterr()
    assert said.err.startswith(start) and said.err.count("\n") == 1 and "Traceback" not in said.out
    assert said.out.count("\n") <= 1  # at most the line that names the machine


def test_the_newest_finished_run_without_qat_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, (name, settings, result) in enumerate([
            ("qat", {"QAT_START": 0.5}, {"train": {}}), ("stopped", {}, {}), ("new", {}, {"train": {}}),
            ("old", {"QAT_START": 1.0}, {"train": {}}), ("damaged", None, {"train": {}})]):
        (tmp_path / "runs" / name).mkdir(parents=True)
        write_run(tmp_path / "runs" / name, [], {"settings": settings}, result)
        (tmp_path / "runs" / name / "checkpoint.pt").touch()
        os.utime(tmp_path / "runs" / name / "checkpoint.pt", (1e9 - age, 1e9 - age))
    assert bench.newest_run() == Path("runs/new")


def test_bench_gptq(tmp_path, capsys):
    errors, seconds = tables(capsys, tmp_path, "gptq", "REPEATS=1")[0].values()
    assert len(errors) == 9 and [row["weight"] for row in seconds] == ["512x512", "2048x512", "512x2048"]
    for row in errors:
        low, high = {"0.9": (0.15, 0.27), "0.8": (0.3, 0.43), "diagonal": (1, 1)}[row["inputs: AR(1) rho"]]
        assert low <= row["least"] <= row["median"] <= row["most"] <= high


def test_bench_codec(finished, tmp_path, capsys, monkeypatch):
    real = train_gpt.codec_there
    monkeypatch.setattr(train_gpt, "codec_there", lambda name: name != "lrzip" and real(name))
    found, _ = tables(capsys, tmp_path, "codec", finished, "CODEC=range,context,zlib,lrzip", "SHARE=0.01", "REPEATS=1")
    gaussian, *runs, speed, ternary = found.values()
    assert [row["coder"] for row in gaussian] == ["ideal code length", "range", "context"]
    assert all(row["bits a symbol"] == pytest.approx(gaussian[0]["bits a symbol"], rel=0.01) for row in gaussian)
    assert len(runs) == 3
    for rows in runs:
        sizes = {(row["coder"], row["order"]): row for row in rows}
        assert list(sizes)[:4] == [("order-0 entropy a tensor", ""), ("range", ""), ("context", ""), ("zlib", "rows")]
        assert sizes["lrzip", "not installed"]["bytes"] is None
        assert min(row["over rival"] for row in rows if row["coder"] == "zlib") == 0
    assert {row["coder"] for row in speed} == {"range", "context"} and len(speed) == 6
    assert [row["latents, scale"] for row in ternary] == [f"Gaussian, {name}" for name in ("absmean", "rms", "nonzero")]
    assert all(1.5 < row["bits a trit"] < 1.65 and 2 < row["bits a scale"] < 8 for row in ternary)


def test_bench_formats(finished, tmp_path, capsys):
    found, said = tables(capsys, tmp_path, "formats", finished, finished, "ROWS=int8-gptq", "TERNARY=1", "CODEC=zlib",
                         "THREADS=1")
    rows = {row["row"]: row for row in next(iter(found.values()))}
    assert list(rows) == ["float", "int8", "int8-gptq", "ternary-qat", str(finished)]
    assert [line.split(":")[0] for line in said.splitlines()] == ["int8", "int8-gptq", "ternary-qat", "other-0"]
    bits = [row["bits a weight"] for row in rows.values()]
    assert bits[0] == 32 > 9 > bits[1] == bits[4] > bits[3] and bits[1] != bits[2] > bits[3]
    assert rows["float"]["BPB"] == json.loads((finished / "result.json").read_text())["scores"]["float"]["val_bpb"]
    assert all(row["loss"] == pytest.approx(row["BPB"] - rows["float"]["BPB"]) for row in rows.values())
    assert rows["int8"]["over nearest"] is rows["ternary-qat"]["over nearest"] is None
    assert rows["int8-gptq"]["s calibrate"] > 0 == rows["int8"]["s calibrate"]


def test_bench_fit(finished, tmp_path, capsys):
    (rows,) = tables(capsys, tmp_path, "fit", finished, "CAPS=0.8", "CODEC=zlib", "THREADS=1")[0].values()
    (row,) = rows
    assert row["within 4,000"] == "yes" and row["unused"] == row["cap"] - row["model"] - row["code"]
    assert row["cap"] - row["code"] == pytest.approx(0.8 * row["int8 model"], abs=200) and row["steps times"] > 1


def test_a_launch_that_fails_leaves_the_other_rows(finished, tmp_path, capsys, monkeypatch):
    def played(self, name, folder, words, needed=False):
        if name in failing:
            self.faults.append(f"{name}: exit code 3: too large")
            return self.close() if needed else {}
        score = {"val_bpb": 1.5 if "gptq" in name else 2.0}
        return {"scores": {"float": {"val_bpb": 1.0}, "contiguous": score}, "train": {"calibrate_seconds": 1.0},
                "artifact": {"model_bytes": 100, "bits_per_weight": 8.0, "write_seconds": 1.0}}

    monkeypatch.setattr(bench.Launches, "run", played)
    failing = {"int5", "int4-gptq"}
    found, said = tables(capsys, tmp_path, "formats", finished, "ROWS=int[456]*", code=2)
    rows = {row["row"]: row["over nearest"] for row in next(iter(found.values()))}
    assert said.splitlines() == ["int5: exit code 3: too large", "int4-gptq: exit code 3: too large"]
    assert rows["int6-gptq-lqer"] == 0.5 and rows["int5-gptq"] is None and failing.isdisjoint(rows)
    failing = {"int8"}
    found, said = tables(capsys, tmp_path, "formats", finished, code=2)
    assert (found, said) == ({}, "int8: exit code 3: too large\n")


def test_a_failed_launch_is_one_line(finished, tmp_path):
    launches = bench.Launches(str(tmp_path), ["NO_SUCH=1"])
    assert launches.run("x", finished, []) == {}
    with pytest.raises(bench.BenchError, match=r"^x: exit code 2: NO_SUCH=1: not a setting"):
        launches.close()
