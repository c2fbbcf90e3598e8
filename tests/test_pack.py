"""The packed file is the readable one: same program, same bytes each time, readable tracebacks."""

import ast
import hashlib
import importlib.util
import os
import random
import re
import runpy
import shutil
import string
import subprocess
import sys
import zlib
from pathlib import Path

import pyppmd
import pytest

from tools import pack

ROOT = Path(__file__).resolve().parent.parent
BAKED_LINE = "BAKED: dict[str, object] = {}\n"

# A small train_gpt.py with the interface that packing needs and every construct that stripping could break.
MINIATURE = """\
'''Header docstring, dropped.'''
# ==== 01 IMPORTS ==================================================================================
from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import pickle
import sys
from typing import NamedTuple

BAKED: dict[str, object] = {}
# ==== 02 SETTINGS =================================================================================
# why this section exists: a comment with "quotes" and \\\\ that must go


class ConfigError(Exception):
    '''A user's mistake.'''


@dataclasses.dataclass(frozen=True)
class Config:
    '''Settings.'''

    width: int = 8
    names: tuple[str, ...] = ("a", "b")


def baked(config: Config) -> dict[str, object]:
    '''What the packed file carries.'''
    return {"WIDTH": config.width, "RATE": -0.5, "NAME": "it's", "LIST": [1, None, True]}


class Point(NamedTuple):
    '''A docstring that must not be the fields' end.'''

    x: int
    y: float = 2.0


class Empty(Exception):
    "nothing but a docstring"


def load_config(words: list[str], env: dict) -> Config:
    width = 8
    for word in words:
        name, _, value = word.partition("=")
        if name != "WIDTH" or not value.isdigit():
            raise ConfigError(f"{word}: unknown setting\\nsecond line")
        width = int(value)
    return Config(width)
# ==== 03 PARTS ====================================================================================


def counted(f):
    @functools.wraps(f)
    def inner(*args: int, **kwargs: int) -> object:
        inner.calls += 1
        return f(*args, **kwargs)
    inner.calls = 0
    return inner


@counted
def add(a: int, b: int = 1, /, *, c: "int" = 0) -> int:
    '''Adds.'''
    total: int = a + b + c
    return total


async def later(x: int) -> int:
    "docstring"
    await asyncio.sleep(0)
    return x + 1


def used_string() -> str:
    f'''not a docstring {add.__name__}'''
    text = '''two
    lines, kept indent'''
    return text


def quoting(x: str) -> str:
    return f"{x!r:>12} {'nested'} {{braces}} \\n\\t\\u2028é日本 {x:{len(x) + 10}}"


def boom() -> None:
    raise RuntimeError("boom")  # the line that a traceback must show


def main(argv: list[str]) -> int:
    if argv == ["boom"]:
        boom()
    for value in (Config(9), Point(1)):
        assert pickle.loads(pickle.dumps(value)) == value
    assert pickle.loads(pickle.dumps(boom)) is boom
    assert sys.modules[__name__].Config is Config and [f.type for f in dataclasses.fields(Config)][0] == "int"
    assert inspect.getsource(boom).splitlines()[0] == "def boom():", inspect.getsource(boom)
    assert "class Point(NamedTuple):" in inspect.getsource(Point)
    assert asyncio.run(later(1)) == 2 and add(1, 2, c=3) == 6 and add.calls == 1
    assert used_string() == "two\\n    lines, kept indent"
    assert quoting("q").startswith("         'q' nested {br")
    print(__name__, __file__, BAKED, ascii(quoting("q")))
    return 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""
BAKED = {"WIDTH": 16, "RATE": -0.5, "NAME": "it's", "LIST": [1, None, True], "MAP": {"x": 1e-9}}


def write_packed(folder, source=MINIATURE, baked=BAKED):
    path = folder / "train_gpt.py"
    path.write_bytes(pack.pack_source(source, baked, "where it came from"))
    return path


def run(path, *words, env=None, cwd=None):
    return subprocess.run([sys.executable, str(path), *words], capture_output=True, text=True, cwd=cwd,
                          env={**os.environ, **(env or {})}, timeout=60)


def reference_tree(source, baked):
    """The readable program without docstrings and annotations, made another way than the packer's."""
    source = source.replace(BAKED_LINE, f"BAKED = {dict(sorted(baked.items()))!r}\n")
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list) and statements and isinstance(statements[0], ast.stmt):
                kept = [bare(s, isinstance(node, ast.ClassDef)) for s in statements if not is_string(s)]
                setattr(node, field, kept or [ast.Pass()])
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
    return ast.dump(ast.parse(ast.unparse(ast.fix_missing_locations(tree))))


def is_string(statement):
    return isinstance(statement, ast.Expr) and isinstance(getattr(statement.value, "value", None), str)


def bare(statement, is_field):
    if isinstance(statement, ast.AnnAssign) and statement.value is not None and not is_field:
        return ast.Assign([statement.target], statement.value)
    return statement


def undecorated(source):
    return source.replace("@counted\ndef", "def")


# ---- the program is the same


def test_packed_tree_is_the_readable_one_without_what_nothing_reads():
    source = undecorated(MINIATURE)
    packed = pack.pack_source(source, BAKED, "x")
    assert ast.dump(ast.parse(pack.unpack_source(packed))) == reference_tree(source, BAKED)


def test_same_bytes_twice_and_whatever_the_order_of_the_settings():
    first = pack.pack_source(MINIATURE, BAKED, "x")
    assert first == pack.pack_source(MINIATURE, dict(reversed(BAKED.items())), "x")
    assert first != pack.pack_source(MINIATURE, {**BAKED, "WIDTH": 17}, "x")


def test_packed_bytes_do_not_depend_on_the_process(tmp_path):
    code = ("import sys; from tools import pack; "
            "sys.stdout.buffer.write(pack.pack_source(open(sys.argv[1]).read(), {'A': 1}, 'x'))")
    (tmp_path / "s.py").write_text(MINIATURE)
    for seed in ("1", "2"):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "s.py")], cwd=ROOT, check=True,
                              capture_output=True, env={**os.environ, "PYTHONHASHSEED": seed}, timeout=60)
        assert done.stdout == pack.pack_source(MINIATURE, {"A": 1}, "x")


def test_what_the_program_reads_is_kept():
    kernel = """
import functools
BAKED: dict[str, object] = {}
def kernel(x_ptr, BLOCK: tl.constexpr, other: int): "doc"
def quoted(x_ptr, BLOCK: "tl.constexpr"): pass
@torch.library.custom_op("golf::f", mutates_args=())
def op(x: Tensor) -> Tensor: return x
def by_call(x: Tensor) -> Tensor: return x
torch.library.custom_op("golf::g", mutates_args=())(by_call)
@functools.singledispatch
def show(x: object) -> str: return ""
@show.register
def _(x: int) -> str: return "int"
@property
def plain(self: int) -> str: return "x"
@torch.no_grad()
def plain2(x: int) -> str: return "x"
"""
    text, notes = pack.strip_source(kernel, {})
    for kept in ("BLOCK: tl.constexpr", "BLOCK: 'tl.constexpr'", "def op(x: Tensor) -> Tensor",
                 "def by_call(x: Tensor) -> Tensor", "def _(x: int) -> str"):
        assert kept in text
    assert "def plain(self):" in text and "def plain2(x):" in text and '"doc"' not in text and notes == []


@pytest.mark.parametrize(("reader", "kept", "dropped", "notes"), [
    ("print(__doc__)", ["module doc"], ["class doc", "function doc", "x: int"], 0),
    ("print(f.__doc__)", ["module doc", "class doc", "function doc"], ["bare", "x: int"], 1),
    ("getattr(f, '__doc__')", ["function doc"], ["bare"], 1),
    ("inspect.getdoc(f)", ["function doc"], ["bare"], 1),
    ("f.__annotations__", ["f(x: int)", "count: int = 1"], ["function doc"], 1),
    ("typing.get_type_hints(f)", ["f(x: int)"], ["function doc"], 1),
    ("f(1)", ["f(x)", "count = 1", "field: int"], ["doc"], 0),
])
def test_docstrings_and_annotations_stay_exactly_where_they_are_read(reader, kept, dropped, notes):
    source = (f'"""module doc"""\n{BAKED_LINE}class C:\n    """class doc"""\n    field: int\n    "bare"\n'
              f'def f(x: int):\n    """function doc"""\n    "bare"\n    count: int = 1\n{reader}\n')
    text, said = pack.strip_source(source, {})
    assert all(part in text for part in kept), text
    assert not any(part in text for part in dropped), text
    assert len(said) == notes


def test_statement_lists_never_become_empty():
    source = "try:\n    'a'\nexcept E:\n    'b'\nelse:\n    'c'\nfinally:\n    'd'\nwhile x:\n    'e'\n"
    text, _ = pack.strip_source(BAKED_LINE + source, {})
    assert text.count("pass") == 5
    # A second string must not become a docstring when the first is dropped.
    text, _ = pack.strip_source(BAKED_LINE + "def f():\n    'one'\n    'two'\n    return f.x\n", {})
    assert "two" not in text


def test_strings_over_several_lines_keep_their_inner_indent():
    doc = '"""doc\n\n        deep\n    """'
    source = f'{BAKED_LINE}def f():\n    {doc}\n    return f.__doc__, f"""a\n    b{{1}}\n\tc"""\n'
    text, _ = pack.strip_source(source, {})
    readable, stripped = {}, {}
    exec(source, readable)
    exec(text, stripped)
    assert stripped["f"]() == readable["f"]()


# ---- the payload survives


# In the place of pyppmd: the payload must have come as it is, whatever Python makes of it as text; then a program that
# shows its own frames.
FAKE_PPMD = """
import binascii
class Ppmd8Decoder:
    def __init__(self, order, memory): pass
    def decode(self, payload, size):
        show = b"import sys\\nprint(%r, sys._getframe(0).f_lineno, sys._getframe(1).f_lineno)"
        return show % binascii.hexlify(payload)
"""
SPECIAL = b"\0\n\r'\"019abnrtxuUN{\x1a\x0c\x80\x85\xa0\xff"


def payloads():
    rng = random.Random(1)
    yield "nothing", b""
    yield "every byte", bytes(range(256))
    yield "pairs", b"".join(bytes([a, b]) for a in SPECIAL for b in SPECIAL)
    pairs = "".join(f"{a}{b}" for a in "abc" for b in string.ascii_letters)
    yield "pairs of letters", pairs.encode() + b"\0d\0a\0\0da\0"
    for name, end in (("backslash", b"\\"), ("quote", b"'"), ("return", b"\r"), ("NUL", b"\0"), ("quotes", b"''")):
        yield f"{name} at both ends", end + b"x" + end
    for lines in (b"\n", b"\r", b"\r\n", b"\n\r", b"\r\r\n\n"):
        yield f"lines {lines!r}", b"a" + lines * 9 + b"b"
    for size in (1, 100, 5000, 50000):
        yield f"{size} random bytes", rng.randbytes(size)
        yield f"{size} special bytes", bytes(rng.choice(SPECIAL) for _ in range(size))


@pytest.mark.parametrize("payload", [payload for _, payload in payloads()], ids=[name for name, _ in payloads()])
def test_python_runs_a_file_around_any_payload_and_the_stub_reads_it_back(tmp_path, payload):
    payload = payload.replace(b"'''", b"''")
    data = pack.assemble("# x", payload, 6, 1)
    assert len(data) - len(payload) - payload.count(b"\0") == len(pack.assemble("# x", b"", 6, 1)) + len(
        str(pack.count_lines(data))) - 2 + len(str(zlib.crc32(payload + b"\n"))) - len(str(zlib.crc32(b"\n")))
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "pyppmd.py").write_text(FAKE_PPMD)
    (tmp_path / "train_gpt.py").write_bytes(data)
    lines = pack.count_lines(data)  # what Python says of its own stub
    for code in ([str(tmp_path / "train_gpt.py")], ["-c", "import train_gpt"]):  # from the file, and from its bytes
        done = subprocess.run([sys.executable, *code], capture_output=True, text=True, timeout=60, cwd=tmp_path, env={
            **os.environ, "PYTHONPATH": str(tmp_path / "fake"), "PYTHONDONTWRITEBYTECODE": "1"})
        assert done.stdout == f"{(payload + bytes([10])).hex().encode()!r} {lines + 2} {lines}\n", done.stderr


def test_the_pair_for_nul_is_in_no_payload_and_too_long_a_payload_is_refused():
    letters = [a + b for a in string.ascii_letters for b in string.ascii_letters]
    assert pack.free_pair(b"") == b"ab"
    assert pack.free_pair(b"abac") == b"ad"
    every = "".join(letters)
    with pytest.raises(pack.PackError, match="too long"):
        pack.free_pair(every.encode())


def test_folded_indents_come_back():
    text = "if a:\n if b:\n  c\nelse:\n d=x[1:]\nclass e:\n def f():\n  for g in h:\n   i\nj:int=0\n"
    folded = pack.fold_indents(text)
    assert folded == "if a:\nif b:\nc\n\n\nelse:\nd=x[1:]\n\nclass e:\ndef f():\nfor g in h:\ni\n\n\n\nj:int=0"
    assert pack.unfold_indents(folded) == text
    for text in (MINIATURE, REACHING):
        text = pack.strip_source(text, BAKED)[0]
        assert pack.unfold_indents(pack.fold_indents(text)) == text and len(pack.fold_indents(text)) < len(text)


@pytest.mark.parametrize("seed", [0, 3, 5, 15, 53])
def test_a_long_stream_unpacks(seed, monkeypatch):
    """A call of pyppmd 1.3.1 that returns more than 32768 bytes may lose one there, with all seeds here but 0."""
    data = bytes(random.Random(seed).choices(range(97, 113), weights=range(1, 17), k=80_000))
    stream = pack._ppmd_stream(data, 4)
    assert pyppmd.Ppmd8Decoder(4, pack.MODEL_BYTES).decode(stream + b"\n", len(data)) == data
    assert len(stream) > 1 << 15
    if pyppmd.__version__ == "1.3.1":
        monkeypatch.setattr(pack, "PIECE_BYTES", len(data))
        assert len(stream) - len(pack._ppmd_stream(data, 4)) == (seed > 0)


def test_orders_whose_stream_holds_triple_quotes_are_passed_over(monkeypatch):
    real_stream = pack._ppmd_stream
    best = pack.compress(MINIATURE.encode())[1]
    bad = {best}
    monkeypatch.setattr(pack, "_ppmd_stream", lambda data, order: b"'''" if order in bad else real_stream(data, order))
    assert pack.compress(MINIATURE.encode())[1] != best
    packed = pack.pack_source(MINIATURE, BAKED, "x")
    assert f"Ppmd8Decoder({best},".encode() not in packed and "class Point" in pack.unpack_source(packed)
    bad |= set(pack.ORDERS)
    with pytest.raises(pack.PackError, match="triple quotes"):
        pack.compress(MINIATURE.encode())


def test_a_file_whose_payload_holds_every_byte_value_runs(tmp_path):
    noise = random.Random(5).randbytes(6000).hex()
    source = f"{BAKED_LINE}NOISE = {noise!r}\nprint(hash(NOISE) == hash({noise!r}), len(NOISE))\n"
    packed = pack.pack(source, {}, "x")
    assert set(packed.compressed) == set(range(256))
    assert len(packed.data) < 1.007 * len(packed.compressed) + 800
    done = run(write_packed(tmp_path, source, {}))
    assert (done.stdout, done.returncode) == ("True 12000\n", 0)


def test_unpack_runs_nothing_and_returns_what_runs(tmp_path):
    source = BAKED_LINE + "raise SystemExit('executed')\n"
    text = pack.unpack_source(pack.pack_source(source, {}, "x"))
    assert text.strip().splitlines() == ["BAKED = {}", "raise SystemExit('executed')"]


def with_text(folded, size=None, order=6, cut=0):
    """A packed file of this text, whose checksum is right: its stream without the last `cut` bytes."""
    stream = pack._ppmd_stream(folded, order)
    return pack.assemble("# x", stream[:len(stream) - cut], order, len(folded) if size is None else size)


def forged(data, name, value):
    """The file with another number in its stub."""
    around = {"check": rb"!=(\d+):sys", "lines": rb"\*(\d+),0\n", "order": rb"Decoder\((\d+),", "size": rb"_c,(\d+)\)"}
    start, stop = re.search(around[name], data).span(1)
    return data[:start] + str(value).encode() + data[stop:]


def damaged_files():
    good = pack.pack_source(MINIATURE, BAKED, "x")
    middle = len(good) // 2
    yield "truncated", good[:middle], "not a file packed"
    yield "readable", MINIATURE.encode(), "not a file packed"
    yield "empty", b"", "not a file packed"
    yield "extra code before", good.replace(b"try:import", b"import os;os.x\ntry:import", 1), "not a file packed"
    yield "extra code between", good.replace(b"\n_c=", b"\nprint(1);_c=", 1), "not a file packed"
    yield "extra code after", good + b"print(1)\n", "not a file packed"
    yield "a string more", good.replace(b"\n'''\n_c", b"\n''';print(1);'''\n'''\n_c", 1), "not a file packed"
    yield "a quote more", good.replace(b"r'''", b"r'''\n'''", 1), "not a file packed"
    yield "another pair", re.sub(rb"b'[A-Za-z]{2}'", b"b'\\0'", good, count=1), "not a file packed"
    yield "an octal number", forged(good, "lines", "012"), "not a file packed"
    yield "second cookie", b"# x coding: utf-8" + good[3:], "not a file packed"
    yield "quotes in the first line", b"# '''" + good[3:], "not a file packed"
    yield "payload cut", re.sub(rb".{9}\n'''\n_c", b"\n'''\n_c", good, count=1, flags=re.S), "its checksum"
    yield "payload longer", re.sub(rb"\n'''\n_c", b"more\n'''\n_c", good, count=1), "its checksum"
    yield "payload flipped", re.sub(rb"(r'''.{500}).{3}", rb"\1abc", good, count=1, flags=re.S), "its checksum"
    yield "another checksum", forged(good, "check", 1), "its checksum"
    yield "other lines", forged(good, "lines", 999_999_999), "damaged payload: wrong number of lines"
    yield "order 0", forged(good, "order", 0), "damaged payload: wrong number of lines or order"
    yield "order 64", forged(good, "order", 64), "damaged payload: wrong number of lines or order"
    yield "another order", forged(good, "order", 4), "damaged payload: "
    yield "a larger size", forged(good, "size", 99_999), "damaged payload: "
    yield "code in the payload", pack.assemble("# x", b"a''';print(1);r'''b", 6, 5), "not a file packed"
    yield "no payload", pack.assemble("# x", b"", 6, 5), "damaged payload: "
    yield "cut with its checksum", with_text(MINIATURE.encode(), cut=99), "damaged payload: "
    yield "not utf-8", with_text(b"\xff" * 99), "damaged payload: 'utf-8'"
    yield "bomb", with_text(b"x" * 9999, pack.SOURCE_LIMIT_BYTES + 1), "unpacks to more than"
    yield "bomb of indents", with_text(b":\n" * 20_000), "unpacks to more than"
    yield "too long", good + bytes(pack.PACKED_LIMIT_BYTES), "bytes are more than"


@pytest.mark.parametrize("kind", [kind for kind, _, _ in damaged_files()])
def test_unpack_refuses_what_is_not_a_packed_file(kind):
    data, message = next((data, message) for name, data, message in damaged_files() if name == kind)
    with pytest.raises(pack.PackError) as caught:
        pack.unpack_source(data)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["bomb", "payload flipped", "other lines", "too long"])
def test_what_is_refused_for_its_numbers_is_not_decompressed(kind, monkeypatch):
    data = next(data for name, data, _ in damaged_files() if name == kind)
    monkeypatch.setattr(pack, "_ppmd", None)
    with pytest.raises(pack.PackError):
        pack.unpack_source(data)


# ---- the packed file runs like the readable one


def test_runs_as_a_script_with_the_readable_files_output_and_exit_code(tmp_path):
    path = write_packed(tmp_path)
    done = run(path)
    readable = tmp_path / "readable.py"
    literal = repr(dict(sorted(BAKED.items())))
    readable.write_text(blind(MINIATURE).replace("BAKED: dict[str, object] = {}", f"BAKED = {literal}"))
    expected = run(readable)
    assert expected.returncode == 3, expected.stderr
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == expected.stdout.replace("readable.py", "train_gpt.py")
    assert done.stdout.startswith(f"__main__ {path} {literal}")


def blind(source):
    """The miniature without its look at its own source, where the readable file still has its comments."""
    return "\n".join(line for line in source.split("\n") if "getsource(" not in line)


def test_runs_through_runpy_and_imports_without_running_main(tmp_path):
    path = write_packed(tmp_path)
    module = runpy.run_path(str(path))
    assert module["BAKED"] == BAKED and module["Config"]().width == 8
    with pytest.raises(SystemExit) as caught:
        run_as_main(path)
    assert caught.value.code == 3
    code = ("import sys, inspect; sys.path.insert(0, sys.argv[1]); hook = sys.excepthook\n"
            "import train_gpt as t\n"
            "assert t.BAKED['WIDTH'] == 16 and t.__name__ == 'train_gpt' and hook is sys.excepthook\n"
            "assert inspect.getsource(t.boom).startswith('def boom()')")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


def run_as_main(path):
    """Runs the file as runpy does for `python -m`, in this process; excepthook is put back."""
    hook, argv = sys.excepthook, sys.argv
    try:
        sys.argv = [str(path)]
        runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.excepthook, sys.argv = hook, argv


def test_an_uncaught_exception_shows_its_source_lines_and_no_foreign_ones(tmp_path):
    path = write_packed(tmp_path)
    done = run(path, "boom")
    text = pack.unpack_source(path.read_bytes()).split("\n")
    row = next(i for i, line in enumerate(text, 1) if "RuntimeError" in line)
    assert done.returncode == 1
    assert f'File "{path}", line {row}, in boom\n    raise RuntimeError(' in done.stderr
    assert done.stderr.rstrip().endswith("RuntimeError: boom")
    # The stub's own frame stands first, and the lines at its number are empty.
    lines = pack.count_lines(path.read_bytes())
    assert done.stderr.split("\n")[1] == f'  File "{path}", line {lines}, in <module>'
    assert done.stderr.split("\n")[2].startswith("  File ")
    assert text[: lines] == [""] * lines and text[lines]


def test_multiprocessing_spawn_works_from_the_packed_file(tmp_path):
    source = BAKED_LINE + """
import multiprocessing
class C: pass
def job(c): return type(c) is C
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(job, [C()]))
"""
    done = run(write_packed(tmp_path, source, {}))
    assert done.stdout == "[True]\n", done.stderr


# ---- what a packed file says when it cannot run


def without_ppmd(folder):
    """An environment in which pyppmd is not there."""
    (folder / "lacking").mkdir()
    (folder / "lacking" / "pyppmd.py").write_text("raise ImportError")
    return {"PYTHONPATH": str(folder / "lacking")}


def test_without_pyppmd_the_packed_file_says_so_and_exits_with_2(tmp_path):
    done = run(write_packed(tmp_path), env=without_ppmd(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "pyppmd: not installed; pip install pyppmd\n"


def test_without_pyppmd_packing_and_unpacking_say_so(tmp_path, monkeypatch):
    packed = pack.pack_source(MINIATURE, BAKED, "x")
    monkeypatch.setitem(sys.modules, "pyppmd", None)
    for act in (lambda: pack.unpack_source(packed), lambda: pack.pack_source(MINIATURE, BAKED, "x")):
        with pytest.raises(pack.PackError, match=r"^pyppmd: not installed; pip install -r requirements\.txt$"):
            act()


def test_a_damaged_packed_file_says_so_in_one_line(tmp_path):
    path = write_packed(tmp_path)
    good = path.read_bytes()
    start = good.index(b"r'''") + 4
    stop = good.index(b"\n'''\n")
    for place in (start, (start + stop) // 2, stop - 1):
        path.write_bytes(good[:place] + (b"x" if good[place:place + 1] != b"x" else b"y") + good[place + 1:])
        done = run(path)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{path}: damaged payload\n")
    path.write_bytes(good[:(start + stop) // 2])
    done = run(path)
    assert done.returncode == 1 and "SyntaxError" in done.stderr


# ---- refusals


@pytest.mark.parametrize(("source", "baked", "message"), [
    ("x = 1\n", {}, "exactly one top-level line `BAKED"),
    (BAKED_LINE * 2, {}, "exactly one top-level line `BAKED"),
    ("BAKED = {'A': 1}\n", {}, "exactly one top-level line `BAKED"),
    ("def f():\n    BAKED = {}\n", {}, "exactly one top-level line `BAKED"),
    ("BAKED: dict\n", {}, "exactly one top-level line `BAKED"),
    (BAKED_LINE + "def f(:\n", {}, "train_gpt.py line 2"),
    (BAKED_LINE, {"A": float("nan")}, "BAKED['A']: nan"),
    (BAKED_LINE, {"A": [1, {2}]}, "BAKED['A'][1]: set is not plain data"),
    (BAKED_LINE, {"A": Path("x")}, "BAKED['A']: PosixPath is not plain data"),
])
def test_refusals(source, baked, message):
    with pytest.raises(pack.PackError) as caught:
        pack.pack_source(source, baked, "x")
    assert message in str(caught.value)


@pytest.mark.parametrize("provenance", ["two\nlines", "é", "coding: utf-8", "\0", "a ''' b"])
def test_provenance_is_one_ascii_line_that_is_no_cookie(provenance):
    with pytest.raises(pack.PackError, match="provenance"):
        pack.pack_source(BAKED_LINE, {}, provenance)


@pytest.mark.parametrize("value", [
    0.0, -0.0, 1e-300, float("inf"), -float("inf"), 10**400, -5, "", "é\0\n\u2028'", None, True, [], {},
    [[{"a": [None]}]], (1,), {"k": {"z": 1, "a": 2}},
])
def test_baked_values_come_back_exactly(value):
    scope = {}
    exec(pack.strip_source(BAKED_LINE, {"V": value})[0], scope)
    assert repr(scope["BAKED"]) == repr({"V": value})


def test_the_order_with_the_fewest_bytes_is_taken():
    for source in (MINIATURE, REACHING * 9):
        data = source.encode()
        sizes = {order: len(pack.assemble("# x", pack._ppmd_stream(data, order), order, 9999)) for order in pack.ORDERS}
        stream, order = pack.compress(data)
        assert stream == pack._ppmd_stream(data, order) and len(stream) < len(data) / 2
        assert sizes[order] <= min(sizes.values()) + 4  # the digits of its checksum and of its lines


# ---- pruning: what a configuration cannot reach is dropped, and nothing else

# Everything that is reached in a way that is easy to miss; each `dead_` name is what must go.
REACHING = '''"""A program that prunes."""
# ==== 01 IMPORTS ==================================================================================
import colorsys
import dataclasses
import functools
import json
import os.path
import sys
import textwrap
from fractions import Fraction
from string import ascii_letters, digits
from typing import Any, NamedTuple

BAKED: dict[str, object] = {}
# ==== 02 SETTINGS =================================================================================


class ConfigError(Exception):
    """A user's mistake."""


def setting(default: Any, text: str, *, unit: str = "") -> Any:
    return dataclasses.field(default=default, metadata={"text": text, "unit": unit})


@dataclasses.dataclass(frozen=True)
class Settings:
    codec: str = setting("short", "a help text that costs bytes", unit="codecs")
    level: int = setting(3, text="another help text that costs bytes")


class Preset(NamedTuple):
    doc: str
    values: dict[str, Any]
    under: dict[str, dict[str, Any]]


PRESETS: dict[str, Preset] = {
    "one": Preset("the first", {"CODEC": "long", "DATA_PATH": "here"}, {"tiny": {"LEVEL": 9, "DATA_PATH": "there"}}),
    "two": Preset("the second", {"CODEC": "dead_codec"}, {}),
}
OVERLAYS = {"tiny": ("small", {"LEVEL": 4}), "dead_overlay": ("big", {})}
# ==== 03 PARTS ====================================================================================


class Codec(NamedTuple):
    pack: Any
    doc: str = ""


def by_table(text): return text[::-1]
def by_row_of_the_table(text): return by_call_from_a_row(text) + "!"
def by_call_from_a_row(text): return text.upper()
def by_lambda(text): return text.title()
def dead_only_in_a_dropped_row(text): return dead_by_a_dead_one(text) + json.dumps(text)
def dead_by_a_dead_one(text): return textwrap.fill(text) + DEAD_CONSTANT
DEAD_CONSTANT, DEAD_SECOND = "dead_1", 2
def computed(n): return str(n)


CODECS: dict[str, Codec] = {
    "short": Codec(by_table),
    "long": Codec(by_row_of_the_table, "a doc"),
    "lambda": Codec(lambda text: by_lambda(text)),
    "dead_codec": Codec(dead_only_in_a_dropped_row),
    "dead_other": Codec(lambda text: dead_only_in_a_dropped_row(text)),
}
COMPUTED: dict[str, Any] = {**{f"int{n}": computed for n in range(2)}, "half": by_table,
                            "dead_row": dead_by_a_dead_one}
WHOLE: dict[str, Any] = {"a": by_table, "kept_row": by_table}


def by_decorator(f): return functools.wraps(f)(lambda: f() + BY_GLOBAL)
BY_GLOBAL = "global"
@by_decorator
def decorated(): return "decorated "


class BaseOfBase: shared = "base"
class Base(BaseOfBase): pass
class Derived(Base): pass
class DeadDerived(Base): pass


def by_default(): return "default"
def with_default(f=by_default, *, g=Base): return f() + g.shared
def by_fstring(): return "fstring"
def by_nested_fstring(): return 12
def by_comprehension(x): return x + 1
def by_keyword(x): return -x
by_attribute = "attribute"


class Holder: by_attribute = "class attribute"


@functools.singledispatch
def show(x): return "object"
@show.register
def _(x: int): return by_dispatch()
def by_dispatch(): return "int"


class Fault(Exception): pass
class Shape: __match_args__ = ("n",)
class Circle(Shape):
    def __init__(self, n): self.n = n


counter = 0


def count():
    global counter
    counter = counter + 1
    return counter


class Field: pass
@dataclasses.dataclass
class Record:
    part: Field = None
    number: int = 0


type_alias = dict[str, Fraction]
def annotated(x: type_alias) -> Fraction: return x
DEAD_TABLE = {"x": dead_by_a_dead_one}
dead_compiled = Codec(dead_by_a_dead_one)
first, (second, third) = "unpacked", ("a", "b")
def only_readable(): return colorsys.rgb_to_hsv(0, 0, 0)
def also_readable(): return digits
# ==== 04 GONE =====================================================================================
def dead_section(): return Dead()
class Dead: pass
# ==== 05 MAIN =====================================================================================


def main(argv):
    name = argv[0] if argv else "short"
    if not BAKED:
        return only_readable()
    print(BAKED, also_readable() if argv and not BAKED else "packed", CODECS[name].pack("text"),
          COMPUTED["half"]("12"), COMPUTED["int1"](5), list(WHOLE), PRESETS["one"], OVERLAYS)
    print(decorated(), Derived.shared, with_default(), f"{by_fstring()} {'x':>{by_nested_fstring()}}",
          [by_comprehension(x) for x in range(2)], sorted([1, 2], key=by_keyword), show(1), show("x"))
    print(getattr(Holder, "by_attribute"), second, count(), count(),
          [f.type.__name__ for f in dataclasses.fields(Record)])
    try:
        raise Fault("caught")
    except Fault as fault:
        print(fault, annotated(1), os.path.basename("a/b"), ascii_letters[:3], json.dumps([1]) if len(argv) > 9 else "")
    match Circle(4):
        case Circle(n):
            print(n)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
'''
USED = {"CODECS": {"short", "long", "lambda"}, "COMPUTED": {"half", "int1"}, "WHOLE": {"a", "kept_row"},
        "PRESETS": {"one"}, "OVERLAYS": {"tiny"}}
RECIPE = {"PRESET": "one", "CODEC": "short", "LEVEL": 3}
TINY_MAIN = BAKED_LINE + "class ConfigError(Exception): pass\nT = {'a': 1, 'b': 2}\n"


def prune(source, used=None, baked=RECIPE):
    """What is left of a source for which table T needs row a, and the names that were dropped."""
    done = pack.shrink_source(source, baked, {"T": {"a"}} if used is None else used)
    return done.text, done.dropped


@pytest.mark.parametrize("used", [None, {}])
def test_pruning_nothing_is_stripping_alone(used):
    for source in (MINIATURE, REACHING):
        text, notes = pack.strip_source(source, BAKED)
        packed = pack.pack(source, BAKED, "x", used)
        assert packed.source == "\n" * pack.count_lines(packed.data) + text and packed.notes == notes
        assert packed.data == pack.pack_source(source, BAKED, "x")
        assert (packed.stripped.tables, packed.stripped.dropped) == ([], [])
        assert "not in this packed file" not in text


@pytest.mark.parametrize("words", [[], ["long"], ["lambda"]])
def test_a_pruned_program_does_the_same(tmp_path, words):
    expected = tmp_path / "expected.py"
    expected.write_text(REACHING.replace(BAKED_LINE, f"BAKED = {dict(sorted(RECIPE.items()))!r}\n").replace(
        '"two": Preset("the second", {"CODEC": "dead_codec"}, {}),', "").replace(
        '"dead_overlay": ("big", {})', "").replace('"CODEC": "long", ', "").replace('"LEVEL": 9, ', "").replace(
        '{"LEVEL": 4}', "{}"))
    path = tmp_path / "train_gpt.py"
    path.write_bytes(pack.pack_source(REACHING, RECIPE, "x", USED))
    done, wanted = run(path, *words), run(expected, *words)
    assert wanted.returncode == 0, wanted.stderr
    assert (done.returncode, done.stdout, done.stderr) == (0, wanted.stdout, "")


def test_only_what_is_dead_is_dropped():
    done = pack.shrink_source(REACHING, RECIPE, USED)
    assert "dead" not in done.text.lower() and "help text" not in done.text
    gone = {"colorsys", "textwrap", "digits", "only_readable", "also_readable", "Fraction", "Any", "type_alias",
            "DeadDerived", "DEAD_CONSTANT", "DEAD_SECOND", "DEAD_TABLE", "Dead"}
    assert {name for name in done.dropped if not name.startswith("dead_")} == gone
    names = {name for node in ast.parse(REACHING).body for name in pack._bound(node)}
    left = {name for node in ast.parse(done.text).body for name in pack._bound(node)}
    assert names - left == set(done.dropped) and left - names == {"PrunedRows"}
    assert done.notes == []
    assert "from string import ascii_letters\n" in done.text
    assert done.tables == sorted(done.tables) and len(done.tables) == len(USED)
    assert "CODECS: kept short, long, lambda; dropped dead_codec, dead_other" in done.tables
    assert "COMPUTED: kept all computed rows, half; dropped dead_row" in done.tables
    assert "WHOLE: kept a, kept_row; dropped nothing" in done.tables
    assert "\nWHOLE={'a':by_table,'kept_row':by_table}\n" in done.text


def test_settings_that_are_baked_leave_the_presets_and_overlays_and_no_other_table():
    text = pack.shrink_source(REACHING, RECIPE, USED).text
    assert "Preset('the first',{'DATA_PATH':'here'},{'tiny':{'DATA_PATH':'there'}})" in text
    assert "OVERLAYS=PrunedRows('OVERLAYS',{'tiny':('small',{})})" in text
    other = TINY_MAIN + "PRESETS = {'a': {'CODEC': 1}}\nX = {'a': {'CODEC': 2}}\nprint(T, PRESETS, X)\n"
    assert "{'a':{'CODEC':1}}" in prune(other)[0]  # not named, so kept whole
    text = prune(other, {"PRESETS": {"a"}, "X": {"a"}})[0]
    assert "PRESETS={'a':{}}" in text and "X={'a':{'CODEC':2}}" in text
    odd = other.replace("{'a': {'CODEC': 1}}", "{'CODEC': {'LEVEL': 1}}")  # a row's own name is no setting
    assert "PRESETS={'CODEC':{}}" in prune(odd, {"PRESETS": {"CODEC"}})[0]


def test_a_dropped_row_explains_itself(tmp_path):
    path = tmp_path / "train_gpt.py"
    path.write_bytes(pack.pack_source(REACHING, RECIPE, "x", {**USED, "CODECS": {"short"}}))
    done = run(path, "long")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr == (
        "CODECS=long: not in this packed file, which was made for other settings; run the readable train_gpt.py\n")
    scope = {"__name__": "train_gpt"}
    exec(pack.unpack_source(path.read_bytes()), scope)
    table = scope["CODECS"]
    assert isinstance(table, dict) and list(table) == ["short"] and "long" not in table and table.get("long") is None
    assert type(scope["WHOLE"]) is dict
    with pytest.raises(scope["ConfigError"], match="CODECS=long: not in this packed file"):
        table["long"]


@pytest.mark.parametrize("statement", [
    "effect()", "made = effect()", "made = [effect() for _ in range(1)]", "made = {'x': Plain(effect())}",
    "made: int = effect()", "left.right = dead", "T['c'] = 1", "T |= {'c': dead}", "del left", "made = (x := dead)",
    "for made in (1, 2): pass", "while effect(): pass", "if left:\n    made = dead",
    "try:\n    import json as made\nexcept ImportError:\n    made = None", "with left as made: pass",
    "assert left", "@register\ndef made(): pass", "@left.register\nclass made: pass", "def made(x=effect()): pass",
    "def made(*, x=effect()): pass", "class made(left()): pass", "class made(metaclass=left): pass",
    "class made(Hooked): pass", "class made(Hooked2): pass", "class made(Meta): pass",
    "class made:\n    x = effect()", "class made:\n    effect()", "class made:\n    def f(self, x=effect()): pass",
    "class made:\n    @register\n    def f(self): pass", "made = lambda x=effect(): x", "raise left or 1",
    "__getattr__ = dead", "__all__ = ['dead']", "raise left", "async def made(x=effect()): pass",
    "made = f'{effect()}'", "made = left[effect()]", "made = zip(left)", "made = Row.make(left)",
    "@cache\ndef made(): pass", "@left.cache\ndef made(): pass", "class made(zip): pass",
    "@outside\ndef made(): pass", "@outside.register(1)\nclass made: pass", "class made(outside()): pass",
    "made = outside(1)", "made = outside.make()", "class made:\n    x: int = outside()",
    "class made:\n    global left",
])
def test_what_does_something_stays_with_all_it_needs(statement):
    source = (f"{TINY_MAIN}class Hooked:\n    def __init_subclass__(cls): pass\nclass Hooked2(Hooked): pass\n"
              "class Meta(metaclass=type): pass\ndef Plain(x): pass\ndef zip(x): pass\ndef cache(x): pass\n"
              "import outside\nimport typing\nclass Row(typing.NamedTuple): x: int\n"
              f"dead = 1\ndef effect(): pass\ndef register(f): pass\nleft = 2\n{statement}\n")
    text, dropped = prune(source)
    expected = ast.dump(ast.parse(statement.replace("made: int", "made")).body[0])
    assert expected in [ast.dump(node) for node in ast.parse(text).body], text
    needed = {node.id for node in ast.walk(ast.parse(statement)) if isinstance(node, ast.Name)}
    assert not needed & set(dropped) and (needed or "global" in statement)


@pytest.mark.parametrize("statement", [
    "dead = 1", "dead = [1, -2, {'x': (3,)}, f'{len(y)}', y.z[0] if y else y + 1]", "dead: int = 1", "dead = other = 2",
    "def dead(): effect()", "async def dead(): effect()", "dead = lambda: effect()", "class dead: x = 1",
    "class dead(y):\n    'doc'\n    def f(self): effect()", "class dead(y.Z): pass", "dead = re.compile('x')",
    "dead = frozenset(range(3))", "dead = Row(1, x=lambda: effect())", "@triton.jit\ndef dead(): pass",
    "@triton.autotune(configs=[], key=[])\n@triton.jit\ndef dead(): pass",
    "@dataclasses.dataclass(frozen=True)\nclass dead: x: int = 0",
    "@functools.lru_cache(maxsize=None)\ndef dead(): pass", "@torch.no_grad()\ndef dead(): pass",
    "class dead(Row): pass", "dead = [Row(x) for x in range(3) if x]", "dead, (dead2, dead3) = 1, (2, 3)",
])
def test_a_definition_that_nothing_reaches_goes(statement):
    source = (f"{TINY_MAIN}from typing import NamedTuple\nclass Row(NamedTuple):\n    x: int\ndef effect(): pass\n"
              f"class y: Z = 3\n{statement}\nprint(T)\n")
    text, dropped = prune(source)
    assert "dead" not in text and "dead" in dropped and "effect" in dropped and "y" in dropped


@pytest.mark.parametrize("import_line", [
    "import gone", "import gone.part", "import gone as dead", "from gone import dead", "from gone import x as dead"])
def test_imports_go_with_their_last_user_and_only_then(import_line):
    name = pack._alias_name(ast.parse(import_line).body[0].names[0])
    source = f"{TINY_MAIN}{import_line}\ndef user(): return {name}.x\n"
    assert prune(source + "print(T)\n") == (prune(TINY_MAIN + "print(T)\n")[0], [name, "user"])
    for user in ("print(T, user())", f"print(T, {name})", f"del {name}", f"T.x = {name}.y"):
        assert import_line in prune(f"{source}{user}\n")[0]
    assert import_line in prune(f"{TINY_MAIN}{import_line}\nprint(T)\n")[0]  # never named: there for its effect
    for line in ("from gone import *", "from __future__ import annotations"):
        assert line in prune(f"{line}\n{TINY_MAIN}def user(): return annotations['*']\nprint(T)\n")[0]


def test_a_name_in_a_string_or_after_a_dot_is_taken_for_a_use():
    for user, dropped in (("'dead'", []), ("x.dead", []), ("f'{x}dead'", []), ("'the dead'", ["dead"])):
        assert prune(f"{TINY_MAIN}def dead(): pass\nprint(T, {user})\n")[1] == dropped, user


READERS = ["globals()[x]", "eval('dead')", "exec(x)", "__import__(x)", "sys.modules[__name__]", "sys.modules.get(x)",
           "vars()", "locals()", "dir()", "f.__globals__[x]", "inspect.getmodule(f)", "pickle.loads(__name__)",
           "typing.get_type_hints(f)"]


@pytest.mark.parametrize("reader", READERS)
def test_where_definitions_are_found_without_their_name_all_stay(reader):
    source = f"{TINY_MAIN}import gone\ndef dead(): return gone\ndef reader(x): return {reader}\n"
    done = pack.shrink_source(source + "print(T, reader)\n", {}, {"T": {"a"}})
    assert "def dead()" in done.text and "import gone" in done.text and done.dropped == []
    assert "'b'" not in done.text and any("kept: line 6" in note for note in done.notes), done.notes
    if reader != READERS[-1]:  # in code that is itself dropped it does not matter
        assert prune(source + "print(T)\n")[1] == ["gone", "dead", "reader"]


@pytest.mark.parametrize("line", ["import __main__", "import train_gpt", "from train_gpt import x",
                                  "from sys import modules"])
def test_an_import_of_itself_keeps_everything(line):
    source = f"{TINY_MAIN}def dead(): pass\ndef f():\n    {line}\nprint(T, f)\n"
    assert "def dead()" in prune(source)[0]


@pytest.mark.parametrize("line", ["sys.modules['x'] = 1", "if 'x' in sys.modules: pass", "print(f.__name__)",
                                  "model.eval()", "model.modules()", "if __name__ == '__main__': pass", "vars(x)"])
def test_what_only_looks_like_finding_definitions_does_not_keep_them(line):
    source = f"{TINY_MAIN}def dead(): pass\ndef f():\n    {line}\nprint(T, f)\n"
    assert prune(source)[1] == ["dead"]


@pytest.mark.parametrize(("code", "kept"), [
    ("if not BAKED:\n    dead()\n", []), ("if BAKED:\n    live()\nelse:\n    dead()\n", ["live()"]),
    ("if x.y and not BAKED:\n    dead()\n", []), ("if BAKED or dead():\n    live()\n", ["live()"]),
    ("if not BAKED:\n    dead()\nelif x:\n    live()\n", ["if x", "live()"]),
    ("if x:\n    if not BAKED:\n        dead()\n", ["if x", "pass"]),
    ("y = dead() if not BAKED else live()\n", ["y=live()"]),
    ("y = [live() if x.y or BAKED else dead()]\n", ["[live()]"]),
    ("if not (BAKED and BAKED):\n    dead()\n", []),
    ("if x() and not BAKED:\n    live()\n", ["x()", "live()"]),  # x may do something
    ("if x and BAKED:\n    live()\n", ["if x and BAKED", "live()"]), ("y = bool(BAKED)\n", ["bool(BAKED)"]),
    ("if BAKED:\n    return live()\ndead()\n", ["live()"]),
    ("if not BAKED:\n    pass\nelse:\n    raise live\ndead()\n", ["raise live"]),
    ("for y in x:\n    if BAKED:\n        continue\n    dead()\nlive()\n", ["live()"]),
    ("if BAKED:\n    return live()\nx = 1\nlive2()\n", ["live2"]),  # makes x a local name
    ("if BAKED:\n    return live()\nyield 1\n", ["yield 1"]),  # makes it a generator
    ("if BAKED:\n    live()\nlive2()\n", ["live()", "live2()"]), ("if x:\n    return 1\nlive()\n", ["live()"]),
    ("while not BAKED:\n    live()\n", ["while not BAKED"]), ("if BAKED == {}:\n    live()\n", ["BAKED=={}"]),
])
def test_branches_that_a_packed_file_never_takes_go(code, kept):
    text, _ = prune(f"{TINY_MAIN}def main(x):\n" + "".join(f"    {line}\n" for line in code.splitlines())
                    + "    return T\nprint(main)\n")
    assert "dead" not in text and all(part in text for part in kept), text


@pytest.mark.parametrize("change", ["BAKED = {}", "BAKED.clear()", "BAKED['x'] = 1", "del BAKED['x']", "BAKED |= {}",
                                    "def g(BAKED): pass", "lambda BAKED: 1", "for BAKED in (): pass"])
def test_no_branch_goes_where_baked_may_change_or_is_empty(change):
    code = "def main():\n    if not BAKED:\n        live()\n    return T\nprint(main)\n"
    assert "live" in prune(f"{TINY_MAIN}def f():\n    {change}\n{code}")[0]
    assert "live" in prune(TINY_MAIN + code, baked={})[0]
    assert "live" not in prune(f"{TINY_MAIN}def f():\n    BAKED.get('x', BAKED['y'])\n{code}")[0]


def test_help_texts_go_only_from_calls_of_setting():
    source = (f"{TINY_MAIN}def setting(default, text='', *, unit=''): pass\ndef other(default, text): pass\n"
              "setting(1, 'help one', unit='u')\nsetting(1, unit='u', text='help ' 'two')\nsetting('d', T.x)\n"
              "other(1, 'live')\nx.setting(1, 'alive')\n")
    text, _ = prune(source)
    assert "help" not in text and text.endswith(
        "setting(1,'',unit='u')\nsetting(1,unit='u',text='')\nsetting('d',T.x)\nother(1,'live')\nx.setting(1,'alive')\n")
    assert "'help'" in prune(source.replace("text='', *", "words='', *").replace("'help one'", "'help'"))[0]
    keyword_only = source.replace("text='', *, unit=''", "*, unit='', text=''").replace("1, 'help one', ", "1, ")
    assert "help" not in prune(keyword_only)[0]


def test_field_types_of_named_tuples_go_and_those_of_dataclasses_stay():
    source = (f"{TINY_MAIN}import typing\nfrom typing import Any, NamedTuple\nclass P(NamedTuple):\n    x: Any\n"
              "    y: Any = 2\nclass Q(typing.NamedTuple):\n    z: Any\nclass D(Base):\n    w: int = 0\n"
              "print(T, P, Q, D)\n")
    text, dropped = prune(source)
    assert "x:0\n y:0=2\n" in text and "z:0\n" in text and "w:int=0" in text and dropped == ["Any"]
    assert "x:Any" in prune(source + "P.__annotations__\n")[0]


@pytest.mark.parametrize(("source", "used", "message"), [
    ("", {"X": {"a"}}, "used_rows: X must be one top-level dict literal"),
    ("X = dict(a=1)\n", {"X": {"a"}}, "used_rows: X must be"),
    ("def X(): pass\n", {"X": set()}, "used_rows: X must be"),
    ("X = {n: 1 for n in 'ab'}\n", {"X": {"a"}}, "used_rows: X must be"),
    ("X = {'a': 1}\nX = {'a': 1}\n", {"X": {"a"}}, "used_rows: X must be"),
    ("X = {'a': 1, 2: 3}\n", {"X": {"a"}}, "whose keys are strings"),
    ("X = {name: 3}\n", {"X": set()}, "whose keys are strings"),
    ("X: dict\n", {"X": set()}, "used_rows: X must be"), ("import X\n", {"X": set()}, "used_rows: X must be"),
    ("def f():\n    X = {'a': 1}\n", {"X": {"a"}}, "used_rows: X must be"),
    ("", {"T": {"a", "z", "y"}}, "used_rows: T has no row 'y', 'z'"),
    ("PrunedRows = 1\n", {"T": {"a"}}, "the name PrunedRows free"),
])
def test_used_rows_must_fit_the_source(source, used, message):
    with pytest.raises(pack.PackError) as caught:
        pack.pack_source(TINY_MAIN + source, {}, "x", used)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("source", [
    TINY_MAIN.replace("ConfigError", "Fault"),
    TINY_MAIN.replace("class ConfigError(Exception): pass", "ConfigError = 1"),
    BAKED_LINE + "T = {'a': 1, 'b': 2}\nclass ConfigError(Exception): pass\n"])
def test_pruning_needs_the_error_that_it_raises_above_its_tables(source):
    with pytest.raises(pack.PackError, match="one top-level class ConfigError above the tables"):
        prune(source)
    prune(source, {"T": {"a", "b"}})


def test_computed_rows_stay_whole_and_may_be_named():
    source = TINY_MAIN + "X = {'a': 1, **other, 'b': 2}\nprint(X)\n"
    assert "PrunedRows('X',{'a':1,**other})" in prune(source, {"X": {"a", "somewhere in other"}})[0]
    assert "X={'a':1,**other,'b':2}" in prune(source, {"X": {"a", "b"}})[0]
    assert "PrunedRows('X',{**other})" in prune(source, {"X": []})[0]


def test_pruned_bytes_depend_on_neither_order_nor_process(tmp_path):
    first = pack.pack_source(REACHING, RECIPE, "x", USED)
    code = ("import sys; from tools import pack; used = eval(sys.argv[2]); "
            "sys.stdout.buffer.write(pack.pack_source(open(sys.argv[1]).read(), eval(sys.argv[3]), 'x', used))")
    (tmp_path / "s.py").write_text(REACHING)
    used = repr({table: sorted(rows)[::-1] for table, rows in reversed(USED.items())})
    for seed in ("1", "2"):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "s.py"), used, repr(RECIPE)], cwd=ROOT,
                              check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": seed}, timeout=60)
        assert done.stdout == first
    assert pack.shrink_source(REACHING, RECIPE, dict(reversed(USED.items()))) == pack.shrink_source(
        REACHING, RECIPE, USED)
    assert len(first) + 150 < len(pack.pack_source(REACHING, RECIPE, "x"))


def test_sections_of_a_pruned_file_sum_to_it():
    packed = pack.pack(REACHING, RECIPE, "x", USED)
    sizes = pack.section_bytes(REACHING, packed)
    assert list(sizes) == ["HEADER", "01 IMPORTS", "02 SETTINGS", "03 PARTS", "04 GONE", "05 MAIN"]
    assert sum(sizes.values()) == len(packed.data) and sizes["04 GONE"] == 0
    assert all(size > 30 for name, size in sizes.items() if name not in ("HEADER", "04 GONE"))
    whole = pack.pack(REACHING, RECIPE, "x")
    assert pack.section_bytes(REACHING, whole)["04 GONE"] > 0
    rows = packed.stripped.rows
    body = ast.parse(packed.source).body
    lines = REACHING.split("\n")
    assert len(rows) == len(body) and rows == sorted(rows)
    for node, row in zip(body, rows, strict=True):
        if getattr(node, "name", "") not in ("", "PrunedRows"):
            assert node.name in lines[row - 1] or lines[row - 1].startswith("@")


def test_traceback_of_a_pruned_file_shows_its_lines(tmp_path):
    path = tmp_path / "train_gpt.py"
    path.write_bytes(pack.pack_source(REACHING, RECIPE, "x", {**USED, "CODECS": {"short"}}))
    done = run(path, "no such row at all", "x")
    assert done.returncode == 2
    path.write_bytes(pack.pack_source(REACHING.replace("text.upper()", "text.no()"), RECIPE, "x", USED))
    done = run(path, "long")
    assert done.returncode == 1 and "in by_call_from_a_row\n    return text.no()\n" in done.stderr, done.stderr


@pytest.mark.parametrize(("line", "tight"), [
    ("x = a + b * -c ** 2", "x=a+b*-c**2"), ("x = 1 if a else 2", "x=1 if a else 2"),
    ("x = a if 'b' in c else d", "x=a if 'b' in c else d"),
    ("return_ = not a and b or c is not d", "return_=not a and b or c is not d"), ("x = 0x1f or 0o7", "x=31 or 7"),
    ("x = [f'{a!r:>{b}} {{c}}', rb'\\x00', 'it''s', b'c']", None), ("x = 1.0.real + 1j .imag", None),
    ("x = '''a\n\n   b''' + f'''c\n  {d}\n\n'''", None), ("print(* a, ** b)", "print(*a,**b)"),
    ("x = [a for b in (1, 2) if (c)]", "x=[a for b in (1,2) if c]"),
    ("x = lambda a, *b, c = 1, **d: (yield)", None), ("x = a[1:2, ::3]", "x=a[1:2,::3]"),
    ("assert (a := 1) != - 1", "assert (a:=1)!=-1"), ("async def f(a, /, b: int = 1) -> 'c': await a", None),
    ("if a:\n    x = 1\n\n\n    def g(): pass\nelse:\n    pass",
     "if a:\n x=1\n def g():\n  pass\nelse:\n pass"),
    ("x = a @ b; y = ...", "x=a@b\ny=..."),
])
def test_gaps_close_without_changing_the_program(line, tight):
    text = pack._reindent(ast.unparse(ast.parse(line)))
    closed = pack._close_gaps(text)
    assert ast.dump(ast.parse(closed)) == ast.dump(ast.parse(line)) and len(closed) <= len(text)
    assert tight is None or closed == tight + "\n"


@pytest.mark.parametrize(("line", "opened"), [
    ("return (a, b)", "return a, b"), ("x = (a, (b, c))", "x = a, (b, c)"), ("x = y, z = (1, 2)", "x = y, z = 1, 2"),
    ("x = (a,)", "x = a,"), ("x = ()", None), ("x = ('é', 'ü')", "x = 'é', 'ü'"), ("x = (a, b) + (c, d)", None),
    ("x = (*a, b)", "x = *a, b"), ("return (a, b)[0]", None), ("x[1, 2] = (3, 4)", "x[1, 2] = 3, 4"),
    ("x = f((a, b), (c, d))", None), ("x: int = (a, b)", "x: int = a, b"),
    ("x = (a, lambda: (b, c))", "x = a, lambda: (b, c)"),
    ("x = ('a)(', b)", None), ("return (yield (a, b))", "return (yield a, b)"), ("x += (a, b)", "x += a, b"),
    ("x = ('a', '()', b)", "x = 'a', '()', b"), ("x = any((y for y in z))", "x = any(y for y in z)"),
    ("x = any((y for y in z), 1)", None), ("x = a or (not b)", "x = a or not b"), ("x = (a or b) and c", None),
    ("x = a or (b and c)", "x = a or b and c"), ("x = a and (b and c)", None), ("x = (1).real", None),
    ("x = f\"{('a' if b else c)}\"", "x = f\"{'a' if b else c}\""), ("x = f'{(lambda: 1)}'", None),
    ("x = '(a)' + f'(a){b}'", None), ("x = (a)(b)", "x = a(b)"), ("x = (a.b)", "x = a.b"), ("x = -(-1) ** 2", None),
    ("x = (a := 1)", None), ("f((a := 1))", "f(a := 1)"), ("assert (a, b), (c)", "assert (a, b), c"),
    ("del (a), b", "del a, b"), ("x = not (a == b)", "x = not a == b"), ("x = ((a))", "x = a"),
    ("raise (E(a)) from (b)", "raise E(a) from b"), ("x = 1 if (a) else (2)", "x = 1 if a else 2"),
])
def test_parentheses_go_without_changing_the_program(line, opened):
    code = f"def f():\n {line}\n"
    done = pack._drop_parens(code)
    assert ast.dump(ast.parse(done)) == ast.dump(ast.parse(code))
    assert done == (code if opened is None else f"def f():\n {opened}\n")


@pytest.mark.parametrize(("code", "opened"), [
    ("if (a or b):\n (c)\nelif (d):\n e\nelse:\n f\n", "if a or b:\n c\nelif d:\n e\nelse:\n f\n"),
    ("try:\n a\nexcept (B, C):\n d\nexcept (D):\n e\n", "try:\n a\nexcept (B, C):\n d\nexcept D:\n e\n"),
    ("match a:\n case (1):\n  b\n case (C(x=(1, 2))):\n  d\n", "match a:\n case 1:\n  b\n case C(x=(1, 2)):\n  d\n"),
    ("@(a.b)\nclass C((D)):\n def f(x=(1, 2)) -> (E): pass\n", "@a.b\nclass C(D):\n def f(x=(1, 2)) -> E: pass\n"),
    ("for (a, b) in (c, d):\n pass\n", "for a, b in c, d:\n pass\n"), ("while (a):\n pass\n", "while a:\n pass\n"),
    ("with (a) as b, (c):\n pass\n", "with a as b, c:\n pass\n"),
    ("async def f():\n await (a)\n", "async def f():\n await a\n"),
])
def test_parentheses_go_from_the_heads_of_compound_statements(code, opened):
    assert pack._drop_parens(code) == opened and ast.dump(ast.parse(opened)) == ast.dump(ast.parse(code))


def test_neighbouring_imports_become_one_line():
    source = f"import os\nimport sys as s\n{TINY_MAIN}import a.b\nfrom c import d\nimport e\nprint(T, os, s, a, d, e)\n"
    text = prune(source)[0]
    assert text.startswith("import os,sys as s\n") and "\nimport a.b\nfrom c import d\nimport e\n" in text
    assert "import os\nimport sys" in pack.strip_source(source, {})[0]


@pytest.mark.parametrize("name", ["argparse", "ast", "dataclasses", "difflib", "tarfile", "typing", "test.test_fstring",
                                  "test.test_grammar", "test.test_patma"])
def test_gaps_close_in_the_standard_library(name):
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip(f"{name} is not installed")
    text = pack._reindent(ast.unparse(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))))
    closed = pack._close_gaps(pack._drop_parens(text))
    assert ast.dump(ast.parse(closed)) == ast.dump(ast.parse(text)) and len(closed) < 0.98 * len(text)
    assert pack.unfold_indents(pack.fold_indents(closed)) == closed


def test_command_prunes_for_its_words_and_prints_a_line_a_table(project):
    more = ("CODECS = {'a': 1, 'b': 2}\ndef dead(): pass\n"
            "def used_rows(config): return {'CODECS': {'a' if config.width < 50 else 'b'}}\n")
    source = MINIATURE.replace("def load_config(", f"{more}def load_config(")
    source = source.replace("assert used_string", "assert CODECS and used_string")
    source = source.replace("sys.modules[__name__].Config is Config and ", "").replace("print(__name__, ", "print(")
    (project / "train_gpt.py").write_text(source)
    for width, line, kept in (("12", "CODECS: kept a; dropped b", "{'a':1}"),
                              ("60", "CODECS: kept b; dropped a", "{'b':2}")):
        done = pack_command(project, f"WIDTH={width}")
        assert done.returncode == 0 and line in done.stderr.split("\n"), done.stderr
        path = Path(done.stdout.strip())
        assert f"CODECS=PrunedRows('CODECS',{kept})" in pack.unpack_source(path.read_bytes())
        assert "dropped because nothing reaches it: " in done.stderr and "dead" in done.stderr
        total = sum(int(size.replace(",", "")) for size in re.findall(r"^  .{16} *([\d,]+) bytes", done.stderr, re.M))
        assert total == path.stat().st_size
    done = pack_command(project, "WIDTH=12")
    (project / "train_gpt.py").write_text(source.replace("'a': 1", "'c': 1"))
    done = pack_command(project, "WIDTH=12")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "used_rows: CODECS has no row 'a'\n")


# ---- command line


@pytest.fixture
def project(tmp_path):
    """A miniature repository: this packer and the stand-in train_gpt.py."""
    folder = tmp_path / "a project"
    (folder / "tools").mkdir(parents=True)
    shutil.copy(ROOT / "tools" / "pack.py", folder / "tools")
    (folder / "train_gpt.py").write_text(MINIATURE)
    return folder


def pack_command(project, *words, env=None):
    return run(project / "tools" / "pack.py", *words, env=env, cwd=project.parent)


def git(project, *words):
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", "-C", str(project), *who, *words], check=True, capture_output=True)


def test_command_prints_the_path_of_a_file_named_by_its_hash(project):
    done = pack_command(project, "WIDTH=12")
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.rstrip("\n"))
    data = path.read_bytes()
    assert path == project / "runs" / "packed" / hashlib.sha256(data).hexdigest()[:16] / "train_gpt.py"
    assert "'WIDTH': 12" in pack.unpack_source(data)
    assert pack_command(project, "WIDTH=12").stdout == done.stdout
    assert [p.name for p in path.parent.iterdir()] == ["train_gpt.py"]
    for part in ("readable", "stripped", "compressed", "packed", "HEADER", "01 IMPORTS", "02 SETTINGS"):
        assert part in done.stderr
    assert run(path).returncode == 3


def test_sections_sum_to_the_packed_file(project):
    packed = pack.pack(MINIATURE, BAKED, "x")
    sizes = pack.section_bytes(MINIATURE, packed)
    assert list(sizes) == ["HEADER", "01 IMPORTS", "02 SETTINGS", "03 PARTS"]
    assert sum(sizes.values()) == len(packed.data) and min(sizes.values()) >= 0
    assert sizes["03 PARTS"] > sizes["01 IMPORTS"] > 0


def test_command_out_and_mistakes(project, tmp_path):
    out = tmp_path / "x" / "packed.py"
    done = pack_command(project, "--out", str(out))
    assert (done.stdout, done.returncode) == (f"{out}\n", 0) and pack.unpack_source(out.read_bytes())
    done = pack_command(project, env=without_ppmd(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "pyppmd: not installed; pip install -r requirements.txt\n"
    done = pack_command(project, "WIDHT=12")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "WIDHT=12: unknown setting\nsecond line\n")
    for words in (["width"], ["--frobnicate"], ["--out"]):
        done = pack_command(project, *words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and words[0] in done.stderr
    (tmp_path / "file").write_text("")
    done = pack_command(project, "--out", str(tmp_path / "file" / "packed.py"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot write" in done.stderr


def first_line(done):
    return Path(done.stdout.strip()).read_bytes().split(b"\n")[0].decode()


def test_provenance_without_git_and_outside_a_repository(project, tmp_path):
    digest = hashlib.sha256(MINIATURE.encode()).hexdigest()
    head = f"# sixteen train_gpt.py, packed; source sha256 {digest}"
    expected = f"{head}; commit unknown"
    assert first_line(pack_command(project)) == expected
    assert first_line(pack_command(project, env={"PATH": str(tmp_path)})) == expected


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_provenance_in_a_repository(project):
    git(project, "init", "-q")
    assert "commit unknown" in first_line(pack_command(project))  # no commit yet
    (project / ".gitignore").write_text("runs/\n__pycache__/\n")
    git(project, "add", ".")
    git(project, "commit", "-qm", "one")
    clean = first_line(pack_command(project))
    assert re.search(r"; commit [0-9a-f]{40} without local changes$", clean)
    (project / "notes.txt").write_text("an untracked file is not part of the program")
    assert first_line(pack_command(project)) == clean
    # Nor is another file that is changed, or committed: the same run can be audited later.
    (project / ".gitignore").write_text("runs/\n__pycache__/\nnotes.txt\n")
    assert first_line(pack_command(project)) == clean
    git(project, "commit", "-qam", "two")
    assert first_line(pack_command(project)) == clean
    (project / "tools" / "pack.py").write_text((project / "tools" / "pack.py").read_text() + "\n")
    assert first_line(pack_command(project)) == clean.replace("without", "with")
    git(project, "commit", "-qam", "three")
    later = first_line(pack_command(project))
    assert later != clean and later.endswith(" without local changes")
    # A copy inside another repository has no commit of its own.
    inner = project / "inner"
    shutil.copytree(project / "tools", inner / "tools")
    shutil.copy(project / "train_gpt.py", inner)
    assert "commit unknown" in first_line(pack_command(inner))


# ---- the real file


@pytest.mark.skipif(not (ROOT / "train_gpt.py").exists(), reason="train_gpt.py is not written yet")
def test_the_real_file_packs_and_its_import_does_nothing(tmp_path):
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    data = pack.pack_source(source, {}, "x")
    path = tmp_path / "train_gpt.py"
    path.write_bytes(data)
    assert len(data) < len(source) / 2
    code = "import train_gpt; print(train_gpt.BAKED, train_gpt.SHARD_MAGIC)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          timeout=120)
    assert (done.stdout, done.returncode) == ("{} 20240520\n", 0), done.stderr


@pytest.fixture(scope="module")
def real():
    """The readable train_gpt.py as a module, where it says which rows it needs."""
    train_gpt = pytest.importorskip("train_gpt")
    if not hasattr(train_gpt, "used_rows"):
        pytest.skip("train_gpt.py has no used_rows yet, so nothing of it is pruned")
    return train_gpt


def load_packed(data, folder):
    """The module of a packed file."""
    path = folder / "packed" / "train_gpt.py"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    spec = importlib.util.spec_from_file_location("packed_train_gpt", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("overlay", ["", "tiny"])
def test_every_system_resolves_and_plans_as_the_readable_file_does(real, tmp_path, overlay):
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    for preset in real.PRESETS:
        config = real.load_config([f"PRESET={preset}", f"OVERLAY={overlay}"], {}, gpus=0)
        data = pack.pack_source(source, real.baked(config), "x", real.used_rows(config))
        assert len(data) <= 68_000, preset  # 0.4 % of the cap
        module = load_packed(data, tmp_path)
        again = module.load_config([], {}, gpus=0)
        assert again.flat() == config.flat() and again.digest() == config.digest(), preset
        assert module.plan_report(again, len(data)) == real.plan_report(config, len(data)), preset
        assert set(module.PRESETS) == {preset}
        assert module.help_text().count("\n") == real.help_text().count("\n")


@pytest.mark.parametrize("preset", ["sixteen", "baseline"])
def test_plan_of_the_packed_file_alone_is_the_readable_files(real, tmp_path, preset):
    """Text for text, the bytes of the code among it: so the readable file packs itself with its used rows."""
    words = [f"PRESET={preset}", "OVERLAY=tiny"]
    clean = {name: value for name, value in os.environ.items() if name not in {*real.SETTINGS, *real.RENAMED}}
    (tmp_path / "train_gpt.py").write_bytes(real.pack_self(real.load_config(words, {}, gpus=0)))
    texts = []
    for folder, more in ((ROOT, words), (tmp_path, [])):
        done = subprocess.run([sys.executable, "train_gpt.py", "--plan", *more], cwd=folder, capture_output=True,
                              text=True, env=clean, timeout=120)
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert texts[0] == texts[1]


def test_what_only_one_part_needs_goes_with_it(real):
    """All that the bias by what is open reaches, and a mixer's own functions."""
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    for words, gone in ((["PRESET=baseline"], True), (["PRESET=baseline", "GRAMMAR_BIAS=1", "STACK=K A"], False)):
        config = real.load_config([*words, "OVERLAY="], {}, gpus=0)
        dropped = pack.shrink_source(source, real.baked(config), real.used_rows(config)).dropped
        for name in ("Grammar", "grammar_features", "sum_since", "BRACKETS", "OPEN_LEVELS", "RESET", "LONG_OPEN",
                     "SpanKnot", "knot_fields", "KNOT_NEAR"):
            assert (name in dropped) == gone, (words, name)


def test_a_packed_file_refuses_other_systems_and_rows(real, tmp_path, capsys, monkeypatch):
    config = real.load_config(["PRESET=baseline", "OVERLAY=", "CODEC=zlib"], {}, gpus=0)
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    module = load_packed(pack.pack_source(source, real.baked(config), "x", real.used_rows(config)), tmp_path)
    for word in ("PRESET=sixteen", "OVERLAY=tiny"):
        assert module.main([word, "--plan"], {}) == 2
        assert f"{word}: the packed file was made with " in capsys.readouterr().err
    assert list(module.CODECS) == ["zlib"]
    monkeypatch.setattr(module, "load_config", lambda words, env: module.CODECS["brotli"])
    assert module.main([], {}) == 2
    assert capsys.readouterr().err == ("CODECS=brotli: not in this packed file, which was made for other settings; "
                                       "run the readable train_gpt.py\n")
