"""ARTIFACT, the range coder: round trips, determinism, damaged streams, edge shapes, sizes near the ideal."""
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import train_gpt as rc

HERE = Path(__file__).parent


def pack(matrices: list[np.ndarray], name: str = "context") -> tuple[bytes, list[float]]:
    return rc.CODECS[name].pack(matrices, -128, 127)


def unpack(blob: bytes, shapes: list[tuple[int, int]]) -> list[np.ndarray]:
    return rc.unpack_range(blob, shapes, -128, 127)


matrices = st.lists(hnp.arrays(np.int8, st.tuples(st.integers(0, 40), st.integers(0, 40)),
                               elements=st.integers(-128, 127)), max_size=4)


def trip(ms: list[np.ndarray]) -> list[bytes]:
    blobs = []
    for name in ("context", "range"):
        blob, bits = pack(ms, name)
        out = unpack(blob, [m.shape for m in ms])
        assert len(bits) == len(ms) and 0 <= sum(bits) <= 8 * len(blob) + 64
        assert len(out) == len(ms)
        for a, b in zip(ms, out, strict=True):
            assert b.dtype == np.int8 and b.shape == a.shape and np.array_equal(a, b)
        blobs.append(blob)
    return blobs


def embedding(rng: np.random.Generator, rows: int = 300, columns: int = 64) -> np.ndarray:
    """Rows in groups that resemble each other: makes the encoder name references."""
    base = rng.normal(size=(9, columns))[rng.integers(0, 9, rows)]
    return np.clip(np.round(5 * base + rng.normal(size=base.shape)), -31, 31).astype(np.int8)


def weights(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Column scales, and rows divided by their own standard deviation."""
    w = rng.normal(size=(rows, columns)) * np.exp(0.3 * rng.normal(size=columns))
    return np.clip(np.round(w / w.std(1, keepdims=True) * 2.4), -31, 31).astype(np.int8)


@settings(max_examples=150, deadline=None)
@given(matrices)
def test_round_trip_any(ms):
    trip(ms)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 130), st.integers(1, 130), st.floats(0.05, 60))
def test_round_trip_gaussian(seed, rows, columns, scale):
    rng = np.random.default_rng(seed)
    trip([np.clip(np.round(rng.normal(size=(rows, columns)) * scale), -128, 127).astype(np.int8) for _ in range(2)])


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 3000), (3000, 1), (2, 2), (7, 1000), (1000, 7), (0, 5), (5, 0), (512, 4)]
)
def test_edge_shapes(shape):
    rng = np.random.default_rng(0)
    for m in (np.zeros(shape, np.int8), np.full(shape, -128, np.int8), rng.integers(-128, 128, shape).astype(np.int8),
              rng.integers(-1, 2, shape).astype(np.int8), rng.integers(90, 128, shape).astype(np.int8)):
        trip([m])
        trip([m, m.T.copy(), m])


def test_kinds_round_trip():
    rng = np.random.default_rng(1)
    e, w = embedding(rng), weights(rng, 200, 96)
    assert {rc._plan(m, -31, 62, (0, 1, 2))["kind"] for m in (e, w)} == {rc.REFERENCE, rc.BUDGET}
    trip([e, w, w.T.copy(), np.asfortranarray(w), w[::2, ::3]])
    trip([np.arange(-128, 128).astype(np.int8).reshape(16, 16)])


def test_small_overhead():
    assert pack([])[0] == b"" and pack([np.zeros((0, 3), np.int8)])[0] == b""
    assert len(pack([np.full((50, 50), 3, np.int8)])[0]) == 2
    assert len(pack([np.array([[-5, 4]], np.int8)])[0]) <= 14
    steps = np.round(np.random.default_rng(0).normal(size=(2048, 1)) * 4).astype(np.int8)
    p = np.unique(steps, return_counts=True)[1] / steps.size
    assert len(pack([steps])[0]) < -(p * np.log2(p)).sum() * 2048 / 8 + 16


def test_near_the_ideal_and_below_order0():
    rng = np.random.default_rng(2)
    m = np.clip(np.round(rng.normal(size=(1024, 512)) * 31 / 13), -31, 31).astype(np.int8)
    w = weights(rng, 512, 256)
    for x, limit in ((m, 1.001), (w, 0.99)):
        p = np.unique(x, return_counts=True)[1] / x.size
        order0 = -(p * np.log2(p)).sum() * x.size / 8
        assert len(pack([x])[0]) < order0 * limit


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), max_size=3))
def test_any_bytes(blob, shapes):
    try:
        out = unpack(blob, shapes)
    except (ValueError, AssertionError, IndexError, OverflowError):
        return
    assert [o.shape for o in out] == shapes and all(o.dtype == np.int8 for o in out)


def test_damaged_blobs():
    rng = np.random.default_rng(3)
    ms = [embedding(rng), weights(rng, 96, 96)]
    blob, shapes = pack(ms)[0], [m.shape for m in ms]
    for n in range(400):
        bad = bytearray(blob)
        if n % 3 == 0:
            bad = bad[: int(rng.integers(0, len(bad)))]
        else:
            for at in rng.integers(0, len(bad) if n % 3 == 1 else 12, 2):
                bad[at] ^= int(rng.integers(1, 256))
        try:
            out = unpack(bytes(bad), shapes)
        except (ValueError, AssertionError, IndexError, OverflowError):
            continue
        assert [o.shape for o in out] == shapes


def test_same_bytes_in_another_process():
    code = ("import sys, hashlib, numpy as np; sys.path[:0] = ['..', '.'];"
            "import test_12_range_coder as t; r = np.random.default_rng(4);"
            "print(hashlib.sha256(t.pack([t.embedding(r), t.weights(r, 200, 96)])[0]).hexdigest())")
    rng = np.random.default_rng(4)
    here = hashlib.sha256(pack([embedding(rng), weights(rng, 200, 96)])[0]).hexdigest()
    there = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert there.stdout.strip() == here


def test_integer_tables_are_pinned():
    """The Gaussian start and the class borders are integers: any change breaks old blobs."""
    digest = hashlib.sha256(rc._normal().astype("<i8").tobytes() + rc._ratios().astype("<f8").tobytes())
    for scale in (0, 24, 34, 60, 89):
        for half in (0, 1):
            digest.update(rc._gaussian(scale, half, 62).astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "fab05641b4c19d36"
