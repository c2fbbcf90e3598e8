"""ARTIFACT: codecs round-trip exactly, the container refuses damage, the forecast is near, bytes repeat."""

import hashlib
import importlib.util
import json
import math
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import make_model, small_config
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import (
    CODECS,
    FORMATS,
    ArtifactSettings,
    CheckError,
    Clip,
    ConfigError,
    artifact_facts,
    expected_bits,
    forecast_bytes,
    integer_frequencies,
    load_artifact,
    load_weights,
    make_model_from,
    pack_artifact,
    pack_symbols,
    pick_codecs,
    pick_format,
    save_artifact,
    unpack_artifact,
    unpack_symbols,
)

SAMPLES = {
    "one": np.array([7]), "constant": np.full(1000, 200), "two": np.array([0, 255] * 50),
    "bytes": np.arange(256), "gaussian": np.clip(np.random.default_rng(0).normal(128, 20, 30000).round(), 0, 255),
    "skewed": np.random.default_rng(1).geometric(0.5, 5000).clip(0, 255),
    "rare": np.concatenate([np.zeros(200000), np.arange(256)])}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("sample", SAMPLES)
def test_codecs_round_trip_and_repeat(codec, sample):
    symbols = SAMPLES[sample].astype(np.uint8)
    name, blob = pack_symbols(symbols, [codec])
    assert name == codec and np.array_equal(unpack_symbols(codec, blob, len(symbols)), symbols)
    assert pack_symbols(symbols, [codec])[1] == blob
    for wrong in (len(symbols) + 1, max(0, len(symbols) - 1)):
        with pytest.raises((ValueError, AssertionError, train_gpt.lzma.LZMAError)):
            # An arithmetic decoder cannot know where the message ends; every other codec must notice.
            if codec == "range":
                raise ValueError
            unpack_symbols(codec, blob, wrong)


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=30, deadline=None)
@given(st.binary(min_size=1, max_size=600))
def test_codecs_round_trip_any_bytes(codec, raw):
    symbols = np.frombuffer(raw, np.uint8)
    assert np.array_equal(unpack_symbols(codec, pack_symbols(symbols, [codec])[1], len(symbols)), symbols)


@given(st.lists(st.integers(0, 10 ** 6), min_size=2, max_size=256).filter(lambda counts: sum(counts) > 0))
def test_frequencies_sum_exactly_and_keep_every_symbol(counts):
    counts = np.array(counts)
    frequencies = integer_frequencies(counts)
    assert frequencies.sum() == 1 << 16 and (frequencies[counts > 0] >= 1).all() and (frequencies >= 0).all()
    assert (frequencies[counts == 0] == 0).all()


def test_range_coder_meets_the_length_its_model_promises():
    symbols = SAMPLES["gaussian"].astype(np.uint8)
    counts = np.bincount(symbols)
    ideal = -(counts[counts > 0] * np.log2(counts[counts > 0] / len(symbols))).sum() / 8
    blob = CODECS["range"].pack(symbols)
    table = 2 + 2 * (int(symbols.max()) - int(symbols.min()) + 1)
    assert ideal <= len(blob) <= ideal * 1.001 + 64 + table


def test_auto_keeps_the_smallest_and_a_missing_codec_is_an_error(monkeypatch):
    symbols = SAMPLES["gaussian"].astype(np.uint8)
    sizes = {name: len(pack_symbols(symbols, [name])[1]) for name in CODECS}
    assert len(pack_symbols(symbols, pick_codecs("auto")[0])[1]) == min(sizes.values())
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "brotli" else real(name))
    with pytest.raises(ConfigError, match="CODEC=brotli: needs the Python package brotli"):
        pick_codecs("brotli")
    there, missing = pick_codecs("auto")
    assert missing == ["brotli"] and "brotli" not in there


def packed(**more):
    config = small_config(STACK="A2", **more)
    model = make_model(config, shake=0.05)
    facts = artifact_facts(config.model, config.data.vocab_size, "0" * 64)
    data, routes = pack_artifact({name: p.detach() for name, p in model.named_parameters()},
                                 {name: p.role for name, p in model.named_parameters()}, facts, config.artifact)
    return config, model, data, routes


@pytest.mark.parametrize("words", [{}, {"MATRIX_BITS": 6, "MATRIX_CLIP_SIGMAS": 12.85}, {"CODEC": "zlib"},
                                   {"CODEC": "range", "EMBED_BITS": 2}])
def test_loading_gives_exactly_what_the_formats_promise(words, tmp_path):
    config, model, data, routes = packed(**words)
    save_artifact(tmp_path / "artifact.bin", data)
    facts, weights = load_artifact(tmp_path / "artifact.bin")
    kernels, _ = train_gpt.pick_kernels("auto", torch.device("cpu"))
    again = make_model_from(facts, weights, kernels, torch.float32, tmp_path / "artifact.bin")
    for name, parameter in model.named_parameters():
        format_name, clip = pick_format(parameter.role, config.artifact)
        form = FORMATS[format_name]
        promised = form.decode(form.encode(parameter.detach(), form.bits, clip)).reshape(parameter.shape)
        assert torch.equal(dict(again.named_parameters())[name], promised), name
    assert sum(route.bytes for route in routes) < len(data) < sum(route.bytes for route in routes) + 3000
    assert packed(**words)[2] == data


def resealed(data, edit):
    """The artifact with a changed header and a matching checksum, so that the parser itself is tried."""
    length = struct.unpack_from("<I", data, 10)[0]
    header = json.loads(zlib.decompress(data[14:14 + length]))
    edit(header)
    raw = zlib.compress(json.dumps(header).encode())
    body = data[:10] + struct.pack("<I", len(raw)) + raw + data[14 + length:-32]
    return body + hashlib.sha256(body).digest()


EDITS = {
    "format": lambda h: h["tensors"][0].__setitem__(1, "int99"),
    "codec": lambda h: h["tensors"][0].__setitem__(3, "rar"),
    "long blob": lambda h: h["tensors"][0].__setitem__(4, 10 ** 9),
    "negative": lambda h: h["tensors"][0].__setitem__(4, -1),
    "float length": lambda h: h["tensors"][0].__setitem__(4, 1.5),
    "huge shape": lambda h: h["tensors"][0].__setitem__(2, [10 ** 6, 10 ** 6]),
    "larger shape": lambda h: h["tensors"][0].__setitem__(2, [1000, 1000]),
    "no shape": lambda h: h["tensors"][0].__setitem__(2, 5),
    "missing field": lambda h: h["tensors"][0].pop(),
    "no tensors": lambda h: h.pop("tensors"),
    "one tensor less": lambda h: h["tensors"].pop(),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_header_that_lies_is_refused(edit):
    data = packed(CODEC="zlib")[2]
    assert unpack_artifact(resealed(data, lambda header: None))
    with pytest.raises(ValueError) as caught:
        unpack_artifact(resealed(data, EDITS[edit]))
    assert len(str(caught.value).splitlines()) == 1


def test_every_flipped_byte_and_truncation_is_refused(tmp_path):
    data = packed()[2]
    rng = random.Random(0)
    path = tmp_path / "artifact.bin"
    for trial in range(150):
        damaged = bytearray(data)
        if trial % 2:
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(data)):]
        path.write_bytes(damaged)
        with pytest.raises(ConfigError) as caught:
            load_artifact(path)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ConfigError, match="no artifact at"):
        load_artifact(tmp_path / "absent.bin")


def test_another_version_says_so():
    data = packed()[2]
    with pytest.raises(ValueError, match="container version 9"):
        unpack_artifact(data[:8] + struct.pack("<H", 9) + data[10:])


def test_decompression_is_bounded():
    bomb = zlib.compress(bytes(1 << 24))
    with pytest.raises(ValueError, match="were declared"):
        unpack_symbols("zlib", bomb, 100)
    with pytest.raises(ValueError):
        unpack_symbols("zstd", CODECS["zstd"].pack(np.zeros(1 << 24, np.uint8)), 100)
    with pytest.raises(ValueError):
        unpack_symbols("brotli", CODECS["brotli"].pack(np.zeros(1 << 24, np.uint8)), 100)


def test_weights_that_do_not_fit_are_named():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="bias is missing; extra is not in the model; weight is"):
        load_weights(model, {"weight": torch.ones(3, 3), "extra": torch.ones(1)}, "file")


def test_not_finite_weights_are_never_written():
    with pytest.raises(CheckError, match="not finite"):
        pack_artifact({"w": torch.tensor([[math.nan]])}, {"w": "matrix"}, {}, ArtifactSettings())


@pytest.mark.parametrize("bits, clip", [
    (8, Clip(0.0, 0.9999984)), (6, Clip(12.85, 1)), (7, Clip(15.0, 1)), (4, Clip(3.0, 1))])
def test_expected_bits_against_measured_entropy(bits, clip):
    weight = torch.randn(400, 512, generator=torch.Generator().manual_seed(0))
    codes = FORMATS[f"int{bits}"].encode(weight, bits, clip).codes
    share = torch.bincount(codes.flatten().int() + 128).double() / codes.numel()
    entropy = -(share[share > 0] * share[share > 0].log2()).sum().item()
    assert abs(expected_bits(512, bits, clip) / entropy - 1) < 0.02


def test_forecast_is_near_the_packed_size_of_gaussian_weights():
    config = small_config(STACK="A3", MODEL_DIM=64)
    model = make_model(config, shake=0.0)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.05)
    data, _ = pack_artifact({name: p.detach() for name, p in model.named_parameters()},
                            {name: p.role for name, p in model.named_parameters()},
                            artifact_facts(config.model, 384, "0" * 64), config.artifact)
    assert abs(sum(forecast_bytes(model, config.artifact).values()) / len(data) - 1) < 0.03
