"""Packs the readable train_gpt.py into the one self-extracting file that runs, is counted and is committed.

    python tools/pack.py NAME=value ... [--out FILE]

The configuration is resolved exactly as training resolves it and becomes the packed file's defaults.
Comments, docstrings and annotations that nothing reads are dropped, the rest is compressed and embedded as
one latin-1 string literal, which costs about 2 % where base85 would cost 25 %. Standard output holds the
path of the packed file and nothing else; the sizes go to standard error.

A packed file is six lines: where it came from, the encoding, the payload, `linecache` (so that tracebacks,
`inspect.getsource` and Triton see the embedded source), tracebacks that read `linecache`, and the execution
in the module's own globals. `unpack_source` gives the embedded source back without running anything.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import lzma
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKED_LIMIT_BYTES = 4_000_000  # no file of this project comes near; keeps unpacking strangers' files bounded
SOURCE_LIMIT_BYTES = 16_000_000

# Decorators under which no one looks at the signature. Under any other decorator the annotations stay:
# Triton reads `constexpr` from them, torch.library infers a schema from them, singledispatch picks a type
# by them.
PLAIN_DECORATORS = {
    "abstractmethod", "cache", "cached_property", "classmethod", "compile", "contextmanager", "deleter",
    "disable", "getter", "inference_mode", "lru_cache", "no_grad", "override", "property", "setter",
    "staticmethod", "wraps",
}
# Calls that read the signature of a function given to them by name.
SIGNATURE_READERS = {
    "autotune", "custom_op", "heuristics", "infer_schema", "jit", "register_kernel", "script", "triton_op",
}
SCOPES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
ANNOTATION_READERS = {"__annotations__", "get_annotations", "get_type_hints"}

BANNER = re.compile(r"# ={4} (\d\d) ([A-Z][A-Z ]*?) =*\s*$")
# What Python itself takes for an encoding cookie in the first two lines.
COOKIE = re.compile(r"^[ \t\f]*#.*?coding[:=][ \t]*([-_.a-zA-Z0-9]+)")

# The stub. Its frame stands in every traceback, so the embedded source starts with as many empty lines as
# the stub has: the frame then shows no text instead of an unrelated line.
STUB_HEAD = "{provenance}\n# coding: latin-1\n_packed=__import__('lzma').decompress('"
STUB_TAIL = """'.encode('latin-1')).decode()
__import__('linecache').cache[__file__]=len(_packed),None,_packed.splitlines(True),__file__
if __name__=='__main__':__import__('sys').excepthook=__import__('traceback').print_exception
exec(compile(_packed,__file__,'exec'))
"""
STUB_LINES = (STUB_HEAD + STUB_TAIL).count("\n")


class PackError(ValueError):
    """The source cannot be packed, or the bytes are not a packed file; the message is one clear line."""


class Packed(NamedTuple):
    """A packed file (`data`), the parts it was made from, and one line for each thing that had to be kept."""

    data: bytes
    source: str
    compressed: bytes
    notes: list[str]


def pack_source(source: str, baked: dict[str, object], provenance: str) -> bytes:
    """Returns the packed file of `source` with `baked` as its configuration; same input, same bytes.

    `provenance` becomes the first line. Raises PackError where the source lacks its one `BAKED` line, a
    baked value is not plain data, or the provenance is not one ASCII line.
    """
    return pack(source, baked, provenance).data


def pack(source: str, baked: dict[str, object], provenance: str) -> Packed:
    """Returns the packed file with its intermediate forms, for the size report; see `pack_source`."""
    first_line = f"# {provenance}"
    if not provenance.isascii() or not provenance.isprintable() or COOKIE.match(first_line):
        raise PackError("provenance must be one line of printable ASCII that is not an encoding cookie")
    text, notes = strip_source(source, baked)
    embedded = "\n" * STUB_LINES + text
    compressed = compress(embedded.encode())
    head = STUB_HEAD.format(provenance=first_line)
    data = (head + escape_latin1(compressed) + STUB_TAIL).encode("latin-1")
    if unpack_source(data) != embedded:
        raise AssertionError("the packed file does not give its own source back")
    return Packed(data, embedded, compressed, notes)


def unpack_source(packed: bytes) -> str:
    """Returns the source embedded in a packed file, line numbers as in its tracebacks; executes nothing.

    Accepts exactly the stub written here, so a file that unpacks runs the returned source and nothing else.
    Raises PackError for anything else, for a damaged payload and for sizes beyond the limits.
    """
    if len(packed) > PACKED_LIMIT_BYTES:
        raise PackError(f"{len(packed)} bytes are more than the {PACKED_LIMIT_BYTES} a packed file may have")
    text = packed.decode("latin-1")
    provenance, _, _ = text.partition("\n")
    head = STUB_HEAD.format(provenance=provenance)
    if not (provenance.startswith("# ") and provenance.isascii() and provenance.isprintable()
            and not COOKIE.match(provenance) and text.startswith(head) and text.endswith(STUB_TAIL)
            and len(text) >= len(head) + len(STUB_TAIL)):
        raise PackError("not a file packed by tools/pack.py: its lines are not the packing stub")
    try:
        payload = ast.literal_eval("'" + text[len(head): len(text) - len(STUB_TAIL)] + "'")
        stream = lzma.LZMADecompressor(format=lzma.FORMAT_ALONE, memlimit=256 << 20)
        data = stream.decompress(payload.encode("latin-1"), max_length=SOURCE_LIMIT_BYTES + 1)
        source = data.decode()
    except (SyntaxError, ValueError, MemoryError, RecursionError, AttributeError, lzma.LZMAError) as error:
        raise PackError(f"damaged payload: {error}") from error
    if len(data) > SOURCE_LIMIT_BYTES:
        raise PackError(f"the payload unpacks to more than {SOURCE_LIMIT_BYTES} bytes")
    if not stream.eof or stream.unused_data:
        raise PackError("damaged payload: truncated, or followed by other bytes")
    return source


def escape_latin1(data: bytes) -> str:
    """Returns the inside of a single-quoted string literal whose value, encoded as latin-1, is `data`.

    One character a byte; only what Python would not read back as itself in one line is escaped.
    """
    text = re.sub("\0(?=[0-7])", r"\\x00", data.decode("latin-1").replace("\\", r"\\"))
    return text.translate({0: r"\0", 10: r"\n", 13: r"\r", 39: r"\'"})


def compress(data: bytes) -> bytes:
    """Returns the smallest LZMA stream over a few literal-coder settings.

    The old one-stream container is used because `lzma.decompress` recognises it without being told a
    filter, and it carries 13 bytes of header where xz has some 60 of header, index and check.
    """
    streams = []
    for literal_context_bits in (2, 3, 4):
        streams.append(_lzma(data, literal_context_bits))
    return min(streams, key=len)


def _lzma(data: bytes, literal_context_bits: int) -> bytes:
    """Returns the LZMA stream of `data`; source text has no alignment, hence no position bits."""
    filters = [{"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 20,
                "lc": literal_context_bits, "lp": 0, "pb": 0, "nice_len": 273}]
    return lzma.compress(data, format=lzma.FORMAT_ALONE, filters=filters)


# ---- Stripping


def strip_source(source: str, baked: dict[str, object]) -> tuple[str, list[str]]:
    """Returns `source` with `baked` in place, without what nothing reads, and notes on what had to stay.

    Dropped: comments, docstrings, other bare strings, annotations of signatures and of variables outside
    classes. Annotations in class bodies stay (dataclass and NamedTuple fields). Whatever the file itself
    reads (`__doc__`, `__annotations__`, signatures under an unknown decorator) stays too. The result's
    syntax tree is compared with the intended one before it is returned, so a wrong indent or a mangled
    string cannot get through.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise PackError(f"train_gpt.py line {error.lineno}: {error.msg}") from error
    _bake(tree, baked)
    stripper = _Stripper(tree)
    tree = ast.fix_missing_locations(stripper.visit(tree))
    text = _reindent(ast.unparse(tree))
    if ast.dump(ast.parse(text)) != ast.dump(tree):
        raise AssertionError("stripping changed the program")
    if text.splitlines() != text.split("\n")[:-1]:
        raise PackError("a form feed or an exotic line separator stands in the source; write it as an escape")
    return text, stripper.notes


def _bake(tree: ast.Module, baked: dict[str, object]) -> None:
    """Replaces the empty dict of the one top-level `BAKED` assignment by `baked`, keys sorted."""
    places = []
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "BAKED" for target in targets):
            places.append(node)
    value = getattr(places[0], "value", None) if len(places) == 1 else None
    if not (isinstance(value, ast.Dict) and not value.keys):
        raise PackError("train_gpt.py: exactly one top-level line `BAKED: dict[str, object] = {}` is needed "
                        "(a file that is packed already has none)")
    places[0].value = _literal({name: baked[name] for name in sorted(baked)}, "BAKED")


def _literal(value: object, where: str) -> ast.expr:
    """Returns the syntax tree of plain data; raises PackError, naming the place, for anything else."""
    if isinstance(value, float) and value != value:
        raise PackError(f"{where}: nan cannot be baked into the packed file")
    if type(value) in (int, float) and repr(value).startswith("-"):
        return ast.UnaryOp(ast.USub(), ast.Constant(-value))
    if value is None or type(value) in (bool, int, float, str):
        return ast.Constant(value)
    if type(value) in (list, tuple):
        items = [_literal(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return (ast.List if type(value) is list else ast.Tuple)(items, ast.Load())
    if type(value) is dict:
        keys = [_literal(key, f"{where} key") for key in value]
        return ast.Dict(keys, [_literal(item, f"{where}[{key!r}]") for key, item in value.items()])
    raise PackError(f"{where}: {type(value).__name__} is not plain data (text, numbers, lists, dicts)")


class _Stripper(ast.NodeTransformer):
    """Drops what nothing reads; `notes` says what had to stay and why."""

    def __init__(self, tree: ast.Module) -> None:
        self.notes: list[str] = []
        self.scopes: list[ast.AST] = []
        self.signatures_read_by_name: set[str] = set()
        self.keep_module_doc = self.keep_docs = self.keep_annotations = False
        for node in ast.walk(tree):
            self._find_readers(node)

    def _find_readers(self, node: ast.AST) -> None:
        """Notices code that reads docstrings or annotations of this very file."""
        name = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "value", None)
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Name) and name == "__doc__":
            self.keep_module_doc = True
        elif isinstance(node, (ast.Attribute, ast.Name, ast.Constant)) and name in ("__doc__", "getdoc"):
            if not self.keep_docs:
                self.notes.append(f"all docstrings kept: line {line} reads {name}")
            self.keep_module_doc = self.keep_docs = True
        elif isinstance(node, (ast.Attribute, ast.Name, ast.Constant)) and name in ANNOTATION_READERS:
            if not self.keep_annotations:
                self.notes.append(f"all annotations kept: line {line} reads {name}")
            self.keep_annotations = True
        elif isinstance(node, ast.Call) and _names_in(node.func) & SIGNATURE_READERS:
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            self.signatures_read_by_name |= {item.id for item in given if isinstance(item, ast.Name)}

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Visits the children, then drops bare strings from every statement list of `node`."""
        is_scope = isinstance(node, SCOPES)
        self.scopes += [node] * is_scope
        super().generic_visit(node)
        if is_scope:
            self.scopes.pop()
        keeps_doc = is_scope and (self.keep_module_doc if isinstance(node, ast.Module) else self.keep_docs)
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list) and statements:
                kept = [item for i, item in enumerate(statements)
                        if not _is_bare_string(item) or (keeps_doc and field == "body" and i == 0)]
                if isinstance(node, ast.Module):
                    node.body = kept
                else:
                    setattr(node, field, kept or [ast.Pass()])
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Drops the annotations of a signature that nothing reads."""
        if not self._signature_is_read(node):
            node.returns = None
            spec = node.args
            for argument in [*spec.posonlyargs, *spec.args, spec.vararg, *spec.kwonlyargs, spec.kwarg]:
                if argument is not None:
                    argument.annotation = None
        return self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef

    def _signature_is_read(self, node: ast.FunctionDef) -> bool:
        """True where the signature may be looked at while the program runs."""
        decorated = any(_last_name(decorator) not in PLAIN_DECORATORS for decorator in node.decorator_list)
        annotations = [node.returns, *(a.annotation for a in ast.walk(node.args) if isinstance(a, ast.arg))]
        constexpr = any("constexpr" in _names_in(note) for note in annotations if note is not None)
        return self.keep_annotations or decorated or constexpr or node.name in self.signatures_read_by_name

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """Makes `x: int = 1` outside a class body a plain assignment; a declaration without value stays."""
        node = self.generic_visit(node)
        if node.value is None or self.keep_annotations or isinstance(self.scopes[-1], ast.ClassDef):
            return node
        return ast.copy_location(ast.Assign([node.target], node.value), node)


def _is_bare_string(node: ast.AST) -> bool:
    """True for a docstring or another string statement that does nothing."""
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _last_name(decorator: ast.expr) -> str:
    """Returns `setter` for `@x.setter`, `lru_cache` for `@functools.lru_cache(maxsize=None)`."""
    while isinstance(decorator, ast.Call):
        decorator = decorator.func
    return getattr(decorator, "attr", getattr(decorator, "id", ""))


def _names_in(node: ast.AST) -> set[str]:
    """Returns every name and attribute in an expression, quoted annotations included."""
    names: set[str] = set()
    for item in ast.walk(node):
        if isinstance(item, ast.Constant) and isinstance(item.value, str):
            names |= set(re.findall(r"\w+", item.value))
        names |= {getattr(item, "attr", None), getattr(item, "id", None)} - {None}
    return names


def _reindent(text: str) -> str:
    """Returns `ast.unparse` text with one space a level and a final newline; strings stay untouched.

    One space compresses half a percent better than one tab.
    """
    inside: set[int] = set()
    pending: list[ast.AST] = [ast.parse(text)]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Constant, ast.JoinedStr)):
            inside.update(range(node.lineno + 1, node.end_lineno + 1))
        else:
            pending.extend(ast.iter_child_nodes(node))
    lines = text.split("\n")
    for row, line in enumerate(lines, 1):
        if row not in inside:
            spaces = len(line) - len(line.lstrip(" "))
            lines[row - 1] = " " * (spaces // 4) + line[spaces:]
    return "\n".join(lines) + "\n"


# ---- Size report


def section_bytes(source: str, packed: Packed) -> dict[str, int]:
    """Returns the packed file's bytes by section of the readable `source`; they sum to the file's size.

    A section's part is what it adds to the compressed size after everything above it, so text that repeats
    earlier text is charged little. Sections are the banner lines; what stands above the first is HEADER.
    """
    starts = [(0, "HEADER")]
    for row, line in enumerate(source.split("\n"), 1):
        if match := BANNER.match(line):
            starts.append((row, f"{match[1]} {match[2]}"))
    names = [name for _, name in starts]
    stripped = ast.parse(packed.source).body
    rows = _statement_rows(source, len(stripped))
    lines = packed.source.split("\n")
    ends: dict[str, int] = {}
    for node, row in zip(stripped, rows, strict=True):
        ends[max((start, name) for start, name in starts if start <= row)[1]] = node.end_lineno
    parts: dict[str, int] = {}
    before = end = 0
    for name in names:
        end = ends.get(name, end)
        size = len(_lzma("\n".join(lines[:end]).encode(), 3)) if end else 0
        parts[name] = max(0, size - before)
        before = max(before, size)
    total = sum(parts.values()) or 1
    scaled = {name: size * len(packed.data) // total for name, size in parts.items()}
    scaled[names[0]] += len(packed.data) - sum(scaled.values())
    return scaled


def _statement_rows(source: str, count: int) -> list[int]:
    """Returns the first line of each top-level statement that packing keeps."""
    body = ast.parse(source).body
    rows = [min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) for node in body
            if not _is_bare_string(node)]
    return rows if len(rows) == count else [body[0].lineno, *rows]  # the module docstring was kept


def report(source: str, packed: Packed) -> str:
    """Returns the table of sizes by part and by section, and the notes, for a person."""
    sizes = {"readable": len(source.encode()), "stripped": len(packed.source.encode()),
             "compressed": len(packed.compressed), "packed": len(packed.data)}
    lines = [f"{name:<12}{size:>9,} bytes" for name, size in sizes.items()]
    lines.append("packed file by section:")
    for name, size in section_bytes(source, packed).items():
        lines.append(f"  {name:<16}{size:>7,} bytes {size / len(packed.data):>6.1%}")
    return "\n".join([*lines, *packed.notes])


# ---- Command line


def provenance_line(source: bytes, root: Path) -> str:
    """Returns the text of the first line: hash of the readable source, commit, local changes; never fails."""
    commit = "unknown"
    top = _git(root, "rev-parse", "--show-toplevel")
    head = _git(root, "rev-parse", "--verify", "HEAD")
    status = _git(root, "status", "--porcelain", "--untracked-files=all")
    # A copy inside somebody else's repository must not take that repository's commit for its own.
    if top and head and status is not None and Path(top.strip()).resolve() == root.resolve():
        changed = [line for line in status.splitlines() if line[:2] != "??" or line[3:] == "train_gpt.py"]
        commit = f"{head.strip()} {'with' if changed else 'without'} local changes"
    digest = hashlib.sha256(source).hexdigest()
    return f"sixteen train_gpt.py, packed; source sha256 {digest}; commit {commit}"


def _git(root: Path, *words: str) -> str | None:
    """Returns git's output, or None where git is missing or refuses."""
    try:
        done = subprocess.run(["git", "--no-optional-locks", "-C", str(root), *words], capture_output=True,
                              text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def import_train_gpt(root: Path = ROOT) -> ModuleType:
    """Returns the module of the readable train_gpt.py in `root`."""
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module("train_gpt")


def write_atomic(path: Path, data: bytes) -> None:
    """Writes `data` so that `path` is at every moment either the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def parse_words(argv: list[str]) -> tuple[list[str], Path | None]:
    """Returns the NAME=value words and the --out file; raises PackError for anything else."""
    words: list[str] = []
    out: Path | None = None
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--out" or word.startswith("--out="):
            value = word.partition("=")[2] if "=" in word else (rest.pop(0) if rest else "")
            if not value:
                raise PackError("--out: a file name must follow")
            out = Path(value)
        elif word.startswith("-") or "=" not in word:
            raise PackError(f"{word}: not a NAME=value word (NAME=value ... [--out FILE])")
        else:
            words.append(word)
    return words, out


def main(argv: list[str]) -> int:
    """Packs for the given words; returns the exit code: 0, or 2 after one line for a user's mistake."""
    if argv in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    try:
        words, out = parse_words(argv)
        train_gpt = import_train_gpt()
    except PackError as error:
        print(error, file=sys.stderr)
        return 2
    raw = (ROOT / "train_gpt.py").read_bytes()
    source = raw.decode()
    try:
        baked = train_gpt.load_config(words, os.environ).baked()
        packed = pack(source, baked, provenance_line(raw, ROOT))
    except (PackError, train_gpt.ConfigError) as error:
        print(error, file=sys.stderr)
        return 2
    path = out or ROOT / "runs" / "packed" / hashlib.sha256(packed.data).hexdigest()[:16] / "train_gpt.py"
    try:
        write_atomic(path, packed.data)
    except OSError as error:
        print(f"{path}: cannot write the packed file: {error.strerror}", file=sys.stderr)
        return 2
    print(report(source, packed), file=sys.stderr)
    print(path.absolute())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
