"""The packed file is the readable one: same program, same bytes each time, readable tracebacks."""

import ast
import hashlib
import lzma
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

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

    def baked(self: Config) -> dict[str, object]:
        '''What the packed file carries.'''
        return {"WIDTH": self.width, "RATE": -0.5, "NAME": "it's", "LIST": [1, None, True]}


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


def literal_value(text):
    """The bytes that Python itself reads from a file with this literal."""
    scope = {}
    exec(compile(f"# x\n# coding: latin-1\nvalue = '{text}'\n".encode("latin-1"), "f", "exec"), scope)
    return scope["value"].encode("latin-1")


def test_literal_of_every_byte_and_of_every_pair_around_the_escapes():
    every = bytes(range(256))
    assert literal_value(pack.escape_latin1(every)) == every
    special = b"\0\n\r\\'\"01789abnrtxuUN{\x1a\x0c\x80\x85\xa0\xff"
    pairs = b"".join(bytes([a, b]) for a in special for b in special)
    assert literal_value(pack.escape_latin1(pairs)) == pairs
    assert literal_value(pack.escape_latin1(b"")) == b""


@pytest.mark.parametrize("seed", range(20))
def test_literal_of_random_payloads(seed):
    rng = random.Random(seed)
    alphabet = bytes(range(256)) if seed % 2 else b"\0\n\r\\'07x\xff"
    data = bytes(rng.choice(alphabet) for _ in range(rng.randrange(1, 3000)))
    text = pack.escape_latin1(data)
    assert literal_value(text) == data
    assert "\n" not in text and "\r" not in text and "\0" not in text
    if seed % 2:
        assert len(text) < len(data) * 1.04 + 16


def test_a_file_whose_payload_holds_every_byte_value_runs(tmp_path):
    noise = random.Random(5).randbytes(6000).hex()
    source = f"{BAKED_LINE}NOISE = {noise!r}\nprint(hash(NOISE) == hash({noise!r}), len(NOISE))\n"
    packed = pack.pack(source, {}, "x")
    assert set(packed.compressed) == set(range(256))
    assert len(packed.data) < 1.03 * len(packed.compressed) + 600
    done = run(write_packed(tmp_path, source, {}))
    assert (done.stdout, done.returncode) == ("True 12000\n", 0)


def test_unpack_runs_nothing_and_returns_what_runs(tmp_path):
    source = BAKED_LINE + "raise SystemExit('executed')\n"
    text = pack.unpack_source(pack.pack_source(source, {}, "x"))
    assert text.strip().splitlines() == ["BAKED = {}", "raise SystemExit('executed')"]


def with_payload(payload):
    text = pack.STUB_HEAD.format(provenance="# x") + pack.escape_latin1(payload) + pack.STUB_TAIL
    return text.encode("latin-1")


def damaged_files():
    good = pack.pack_source(MINIATURE, BAKED, "x")
    middle = len(good) // 2
    yield "truncated", good[:middle]
    yield "readable", MINIATURE.encode()
    yield "empty", b""
    yield "extra code before", good.replace(b"_packed=", b"import os;_packed=", 1)
    yield "extra code after", good + b"print(1)\n"
    yield "expression in literal", good.replace(b"decompress('", b"decompress('a'+open('x').read()+'", 1)
    yield "payload cut", re.sub(rb".{9}'\.encode", b"'.encode", good, count=1, flags=re.S)
    yield "payload flipped", re.sub(rb"(decompress\('.{500}).{3}", rb"\1abc", good, count=1, flags=re.S)
    yield "not utf-8", with_payload(pack.compress(b"\xff" * 99))
    yield "character beyond latin-1", re.sub(rb"decompress\('", rb"decompress('\\u2028", good, count=1)
    yield "second cookie", b"# x coding: utf-8" + good[3:]
    yield "followed", with_payload(pack.compress(b"x = 1\n") + b"more")
    yield "bomb", with_payload(lzma.compress(bytes(pack.SOURCE_LIMIT_BYTES + 1), format=lzma.FORMAT_ALONE))
    yield "too long", good + bytes(pack.PACKED_LIMIT_BYTES)


@pytest.mark.parametrize("kind", [kind for kind, _ in damaged_files()])
def test_unpack_refuses_what_is_not_a_packed_file(kind):
    data = dict(damaged_files())[kind]
    with pytest.raises(pack.PackError) as caught:
        pack.unpack_source(data)
    assert "\n" not in str(caught.value)


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
    assert done.stderr.split("\n")[1] == f'  File "{path}", line {pack.STUB_LINES}, in <module>'
    assert done.stderr.split("\n")[2].startswith("  File ")
    assert text[: pack.STUB_LINES] == [""] * pack.STUB_LINES


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


@pytest.mark.parametrize("provenance", ["two\nlines", "é", "coding: utf-8", "\0"])
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
    (project / "tools" / "pack.py").write_text((project / "tools" / "pack.py").read_text() + "\n")
    assert first_line(pack_command(project)) == clean.replace("without", "with")
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
