"""Packs the readable train_gpt.py into the one self-extracting file that runs, is counted and is committed.

    python tools/pack.py NAME=value ... [--out FILE]

The configuration is resolved exactly as training resolves it and becomes the packed file's defaults. What
this configuration cannot reach is dropped, then comments, docstrings and annotations that nothing reads. The
rest has its indents folded, is compressed by PPMd (variant I, package pyppmd; 14 % smaller than LZMA) and stands
as raw bytes in a string that nothing reads: the packed file takes its payload from its own bytes, so that of all
byte values only NUL costs a second byte (0.4 %, where base85 would cost 25 %). Standard output holds the path of
the packed file and nothing else; sizes and what was dropped go to standard error.

A packed file is a few lines: where it came from, the encoding, the payload, its check, its unfolding, `linecache`
(so that tracebacks, `inspect.getsource` and Triton see the embedded source), tracebacks that read `linecache`, and
the execution in the module's own globals. Started without pyppmd it prints one line and exits with 2, with a
damaged payload one line and 1. `unpack_source` gives the embedded source back without running anything.

What train_gpt.py must have:
- one top-level line `BAKED: dict[str, object] = {}`; the packed file has the recipe there;
- for pruning, a function `used_rows(config) -> dict[str, set[str]]`: table -> the rows this configuration can
  reach. Each named table is one top-level dict literal with string keys; a `**` part of it stays whole, and
  so does a table that is not named. Without `used_rows` nothing is pruned;
- for pruning, a top-level class `ConfigError(message)` above those tables: looking a dropped row up raises
  it (see PRUNED_ROWS), and `main` turns it into exit code 2.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import io
import keyword
import os
import re
import string
import subprocess
import sys
import tokenize
import zlib
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

# Tables whose rows hold settings by name. A packed file has the recipe in BAKED, which wins over them.
SETTINGS_TABLES = ("PRESETS", "OVERLAYS")
# Put around a table that lost rows, so that looking one of them up explains itself.
PRUNED_ROWS = """
class PrunedRows(dict):
    def __init__(self, table, rows):
        super().__init__(rows)
        self.table = table
    def __missing__(self, row):
        raise ConfigError(f"{self.table}={row}: not in this packed file, which was made for other settings; "
                          "run the readable train_gpt.py")
"""
# Decorators besides PLAIN_DECORATORS that only make something of what they decorate: unused, it may go.
INERT_DECORATORS = PLAIN_DECORATORS | {"autotune", "dataclass", "heuristics", "jit", "total_ordering"}
# Calls that only make a value; an assignment with any other call may be there for what it does, and stays.
INERT_CALLS = {
    "bool", "bytes", "dataclasses.field", "dict", "field", "float", "frozenset", "functools.partial", "int", "len",
    "list", "max", "min", "partial", "range", "re.compile", "set", "sorted", "str", "struct.calcsize", "sum", "tuple",
    "zip",
}
# Statements and parts of them that bind a name without having it as a Name.
BINDERS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.ExceptHandler,
           ast.Global, ast.Nonlocal, ast.MatchAs, ast.MatchStar, ast.MatchMapping)
# Ways to find a definition of this file without naming it: where one of them is used, every definition stays.
REFLECTION_ATTRIBUTES = {"__globals__", "getmodule"}  # and sys.modules
REFLECTION_NAMES = {"__import__", "__name__", "eval", "exec", "globals"}

BANNER = re.compile(r"# ={4} (\d\d) ([A-Z][A-Z ]*?) =*\s*$")
# What Python itself takes for an encoding cookie in the first two lines.
COOKIE = re.compile(r"^[ \t\f]*#.*?coding[:=][ \t]*([-_.a-zA-Z0-9]+)")

# The stub. It reads the payload from the file's own bytes, between the first two triple quotes; as Python text the same
# bytes are a string that nothing uses. {pair} stands for NUL, which Python does not allow in a source. The line break
# behind the payload belongs to it: PPMd may ask for one byte more than it wrote. In what is unpacked an empty line ends
# an indent, a line that ends in a colon begins one. The stub's frame stands in every traceback with the number of its
# last line, so the embedded source starts with {lines} empty lines: the frame then shows no text instead of another
# line's. Lines are collected in a list because `+=` on a global text takes quadratic time.
STUB_HEAD = """{provenance}
# coding: latin-1
import sys,zlib,linecache,traceback
try:import pyppmd
except ImportError:sys.exit(print('pyppmd: not installed; pip install pyppmd',file=sys.stderr)or 2)
r'''"""
STUB_TAIL = """
'''
_c=open(__file__,'rb').read().split(b"'''")[1].replace(b'{pair}',b'\\0')
if zlib.crc32(_c)!={check}:sys.exit(__file__+': damaged payload')
_p,_d=['\\n']*{lines},0
for _s in pyppmd.Ppmd8Decoder({order},8**8).decode(_c,{size}).decode().split('\\n'):
 if _s:_p+=' '*_d+_s+'\\n',
 _d+=_s[-1:]==':'or-(_s=='')
linecache.cache[__file__]=1,None,_p,__file__
if __name__=='__main__':sys.excepthook=traceback.print_exception
exec(compile(''.join(_p),__file__,'exec'))
"""
MODEL_BYTES = 8**8  # memory of PPMd, of which a source of this project needs a fifth
ORDERS = range(4, 17)  # PPMd has no higher one
PIECE_BYTES = 4096
# STUB_TAIL with a group for each of its blanks.
STUB_BLANKS = {"pair": "[A-Za-z]{2}", **dict.fromkeys(("check", "lines", "order", "size"), r"0|[1-9]\d{0,9}")}
STUB_PATTERN = re.compile(re.sub(r"\\{(\w+)\\}", lambda blank: f"(?P<{blank[1]}>{STUB_BLANKS[blank[1]]})",
                                 re.escape(STUB_TAIL)).encode())


class PackError(ValueError):
    """The source cannot be packed, or the bytes are not a packed file; the message is one clear line."""


class Stripped(NamedTuple):
    """What is left of a source: its text, the line in the source of each of its top-level statements, and for a
    person one line a pruned table, the names that were dropped, and one line for each thing that had to stay."""

    text: str
    rows: list[int]
    tables: list[str]
    dropped: list[str]
    notes: list[str]


class Packed(NamedTuple):
    """A packed file (`data`), the embedded source, its compressed form, and how the source was made."""

    data: bytes
    source: str
    compressed: bytes
    stripped: Stripped

    @property
    def notes(self) -> list[str]:
        """One line for each thing that had to be kept."""
        return self.stripped.notes


def pack_source(source: str, baked: dict[str, object], provenance: str,
                used: dict[str, set[str]] | None = None) -> bytes:
    """Returns the packed file of `source` with `baked` as its configuration; same input, same bytes.

    `provenance` becomes the first line. `used` names the rows of tables that stay, and with them what they need;
    None or empty prunes nothing. Raises PackError where the source lacks its one `BAKED` line, a baked value is
    not plain data, `used` does not fit the source, or the provenance is not one ASCII line.
    """
    return pack(source, baked, provenance, used).data


def pack(source: str, baked: dict[str, object], provenance: str,
         used: dict[str, set[str]] | None = None) -> Packed:
    """Returns the packed file with its intermediate forms, for the size report; see `pack_source`."""
    first_line = f"# {provenance}"
    if not _is_provenance(first_line):
        raise PackError("provenance must be one line of printable ASCII without triple quotes that is not an encoding "
                        "cookie")
    stripped = shrink_source(source, baked, used)
    folded = fold_indents(stripped.text).encode()
    compressed, order = compress(folded)
    data = assemble(first_line, compressed, order, len(folded))
    embedded = unpack_source(data)
    if embedded != "\n" * count_lines(data) + stripped.text:
        raise AssertionError("the packed file does not give its own source back")
    return Packed(data, embedded, compressed, stripped)


def assemble(first_line: str, compressed: bytes, order: int, size: int) -> bytes:
    """Returns the packed file around a PPMd stream of this order, which unpacks to `size` bytes."""
    pair = free_pair(compressed)
    check = zlib.crc32(compressed + b"\n")
    parts = [STUB_HEAD.format(provenance=first_line).encode(), compressed.replace(b"\0", pair), b""]
    for _ in range(2):  # the number of lines is known when the tail is there
        parts[2] = STUB_TAIL.format(pair=pair.decode(), check=check, lines=count_lines(b"".join(parts)), order=order,
                                    size=size).encode()
    return b"".join(parts)


def unpack_source(packed: bytes) -> str:
    """Returns the source embedded in a packed file, line numbers as in its tracebacks; executes nothing.

    Accepts exactly the stub written here, so a file that unpacks runs the returned source and nothing else.
    Raises PackError for anything else, for a damaged payload, for sizes beyond the limits and without pyppmd.
    """
    if len(packed) > PACKED_LIMIT_BYTES:
        raise PackError(f"{len(packed)} bytes are more than the {PACKED_LIMIT_BYTES} a packed file may have")
    provenance = packed.partition(b"\n")[0].decode("latin-1")
    head = STUB_HEAD.format(provenance=provenance).encode("latin-1")
    payload, quotes, rest = packed[len(head):].partition(b"\n'''")
    blanks = STUB_PATTERN.fullmatch(b"\n" + quotes[1:] + rest)
    if not (_is_provenance(provenance) and packed.startswith(head) and blanks and b"'''" not in payload):
        raise PackError("not a file packed by tools/pack.py: its lines are not the packing stub")
    check, lines, order, size = (int(blanks[name]) for name in ("check", "lines", "order", "size"))
    compressed = payload.replace(blanks["pair"], b"\0") + b"\n"
    if zlib.crc32(compressed) != check:
        raise PackError("damaged payload: its checksum is another one")
    if size > SOURCE_LIMIT_BYTES:
        raise PackError(f"the payload unpacks to more than {SOURCE_LIMIT_BYTES} bytes")
    if lines != count_lines(packed) or order not in ORDERS:
        raise PackError("damaged payload: wrong number of lines or order of the model")
    decoder = _ppmd().Ppmd8Decoder(order, MODEL_BYTES)
    try:
        data = decoder.decode(compressed, size)
        folded = data.decode()
    except (ValueError, MemoryError) as error:
        raise PackError(f"damaged payload: {error}") from error
    if len(data) != size:
        raise PackError("damaged payload: truncated")
    return "\n" * lines + unfold_indents(folded)


def count_lines(data: bytes) -> int:
    """Returns the number of lines that Python sees in a file; a carriage return ends one, alone or with a line feed."""
    return data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")


def _is_provenance(line: str) -> bool:
    """True for a comment that can be the first line of a packed file."""
    return (line.startswith("# ") and line.isascii() and line.isprintable() and "'''" not in line
            and not COOKIE.match(line))


def free_pair(data: bytes) -> bytes:
    """Returns the first pair of different letters that does not occur in `data`, to stand for NUL there; because they
    differ, neither it nor its neighbours make a second one. Raises PackError where all occur (in megabytes)."""
    letters = string.ascii_letters
    for pair in (f"{a}{b}".encode() for a in letters for b in letters if a != b):
        if pair not in data:
            return pair
    raise PackError("the source is too long to be packed")


def compress(data: bytes) -> tuple[bytes, int]:
    """Returns the PPMd stream of `data` that takes the fewest bytes in a packed file, and the order of its model."""
    streams = [(_ppmd_stream(data, order), order) for order in ORDERS]
    usable = [item for item in streams if b"'''" not in item[0]]  # triple quotes end the payload: one in 300
    if not usable:
        raise PackError("no PPMd stream of the source is without triple quotes; change any character of it")
    return min(usable, key=lambda item: len(item[0]) + item[0].count(0))


def _ppmd_stream(data: bytes, order: int) -> bytes:
    """Returns the PPMd stream of `data` for a model of this order.

    In pieces, because one call of pyppmd 1.3.1 that returns more than 32768 bytes may lose one of them there.
    """
    encoder = _ppmd().Ppmd8Encoder(order, MODEL_BYTES)
    pieces = [encoder.encode(data[start:start + PIECE_BYTES]) for start in range(0, len(data), PIECE_BYTES)]
    return b"".join([*pieces, encoder.flush()])


def _ppmd() -> ModuleType:
    """Returns the module pyppmd; raises PackError where it is not installed."""
    try:
        return importlib.import_module("pyppmd")
    except ImportError:
        raise PackError("pyppmd: not installed; pip install -r requirements.txt") from None


def fold_indents(text: str) -> str:
    """Returns the text without indents: an empty line ends one, a line that ends in a colon begins one.

    The text has one space a level, no empty lines and a final newline, and no string runs over two lines. Its indents
    cost 1.6 % of the compressed bytes, folded 0.6 %.
    """
    folded, depth = [], 0
    for line in text.removesuffix("\n").split("\n"):
        bare = line.lstrip(" ")
        ended = depth - (len(line) - len(bare))
        folded += [""] * ended + [bare]
        depth += (bare[-1:] == ":") - ended
    joined = "\n".join(folded)
    if unfold_indents(joined) != text:
        raise AssertionError("the indents do not come back")
    return joined


def unfold_indents(text: str) -> str:
    """Returns the text with its indents, as the stub does; raises PackError beyond the size limit."""
    lines, depth, size = [], 0, 0
    for line in text.split("\n"):
        if line:
            size += max(depth, 0) + len(line) + 1
            if size > SOURCE_LIMIT_BYTES:
                raise PackError(f"the payload unpacks to more than {SOURCE_LIMIT_BYTES} bytes")
            lines.append(" " * depth + line + "\n")
        depth += line[-1:] == ":" or -(line == "")
    return "".join(lines)


# ---- Stripping


def strip_source(source: str, baked: dict[str, object]) -> tuple[str, list[str]]:
    """Returns `source` with `baked` in place, without what nothing reads, and notes on what had to stay.

    Dropped: comments, docstrings, other bare strings, annotations of signatures and of variables outside
    classes. Annotations in class bodies stay (dataclass and NamedTuple fields). Whatever the file itself
    reads (`__doc__`, `__annotations__`, signatures under an unknown decorator) stays too. The result's
    syntax tree is compared with the intended one before it is returned, so a wrong indent or a mangled
    string cannot get through.
    """
    stripped = shrink_source(source, baked, None)
    return stripped.text, stripped.notes


def shrink_source(source: str, baked: dict[str, object], used: dict[str, set[str]] | None) -> Stripped:
    """Returns `source` stripped (see `strip_source`) and, where `used` is given, pruned (see Pruning)."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise PackError(f"train_gpt.py line {error.lineno}: {error.msg}") from error
    _bake(tree, baked)
    tables: list[str] = []
    dropped: list[str] = []
    named = _names(tree)
    if used:
        tables = _prune_tables(tree, used, baked)
        tree = _Fold(tree, baked).visit(tree)
        _drop_help_texts(tree)
    stripper = _Stripper(tree)
    tree = stripper.visit(tree)
    if used and not stripper.keep_annotations:  # what reads annotations may find types by their quoted names
        _drop_field_types(tree)
        dropped = _drop_unreached(tree, named, stripper.notes)
        _join_imports(tree)
    tree = ast.fix_missing_locations(tree)
    text = _reindent(ast.unparse(tree))
    text = _close_gaps(_drop_parens(text)) if used else text
    if ast.dump(ast.parse(text)) != ast.dump(tree):
        raise AssertionError("stripping changed the program")
    if text.splitlines() != text.split("\n")[:-1]:
        raise PackError("a form feed or an exotic line separator stands in the source; write it as an escape")
    return Stripped(text, [node.lineno for node in tree.body], tables, dropped, stripper.notes)


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
        """Makes `x: int = 1` outside a class body a plain assignment; a declaration without value stays, and so does a
        `constexpr` of Triton's."""
        node = self.generic_visit(node)
        kept = self.keep_annotations or isinstance(self.scopes[-1], ast.ClassDef)
        if node.value is None or kept or "constexpr" in _names_in(node.annotation):
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
    """Returns `ast.unparse` text with one space a level, no empty lines, each string on one line, a final newline."""
    inside: set[int] = set()
    pending: list[ast.AST] = [ast.parse(text)]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Constant, ast.JoinedStr)):
            inside.update(range(node.lineno + 1, node.end_lineno + 1))
        else:
            pending.extend(ast.iter_child_nodes(node))
    lines: list[str] = []
    for row, line in enumerate(text.split("\n"), 1):
        bare = line.lstrip(" ")
        if row in inside:
            lines[-1] += r"\n" + line
        elif bare:
            lines.append(" " * ((len(line) - len(bare)) // 4) + bare)
    return "\n".join(lines) + "\n"


def _drop_parens(text: str) -> str:
    """Returns the text without the parentheses of `ast.unparse` that Python does not need: `return a, b`, `any(x for x
    in y)`, `a or not b`, also inside f-strings."""
    return "\n".join(map(_drop_parens_of_line, text.split("\n")))


def _drop_parens_of_line(line: str) -> str:
    """Returns the line without each pair of parentheses, first to last, whose loss leaves its syntax tree as it is."""
    meaning = _tree_of_line(line) if "(" in line else None
    start = line.find("(") if meaning else -1
    while start >= 0:
        depth, stop = 1, start
        while depth and stop + 1 < len(line):
            stop += 1
            depth += (line[stop] == "(") - (line[stop] == ")")
        shorter = line[:start] + line[start + 1:stop] + line[stop + 1:]
        # Behind a name or a bracket stands a call; most parentheses do, and to try them all would take seconds.
        is_call = start and (line[start - 1].isalnum() or line[start - 1] in "_)]")
        if not depth and not is_call and _tree_of_line(shorter) == meaning:
            line, start = shorter, start - 1
        start = line.find("(", start + 1)
    return line


def _tree_of_line(line: str) -> str | None:
    """Returns the syntax tree of a simple statement or of the head of a compound one, as text; None where there is
    none."""
    words = line.strip()
    before = {"elif": "if 0:pass\n", "except": "try:pass\n", "case": "match 0:\n "}
    code = next((part for word, part in before.items() if re.match(rf"{word}\b", words)), "") + words
    code += "pass" if words.endswith(":") else "\ndef f():pass" if words.startswith("@") else ""
    try:
        return ast.dump(ast.parse(code))
    except (SyntaxError, ValueError):
        return None


def _close_gaps(text: str) -> str:
    """Returns the text without the spaces that neither Python nor a keyword needs; indents and strings stay."""
    lines = text.split("\n")
    cuts: list[tuple[int, int, int]] = []  # row, from column, to column
    before: tokenize.TokenInfo | None = None
    in_fstring = 0  # since Python 3.12 an f-string is several tokens, whose columns are not always right
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        in_fstring += (name == "FSTRING_START") - (name == "FSTRING_END")
        same_row = before is not None and before.end[0] == token.start[0] and not in_fstring
        if same_row and before.end[1] < token.start[1] and not _stay_apart(before, token):
            cuts.append((token.start[0], before.end[1], token.start[1]))
        before = token
    for row, start, stop in reversed(cuts):
        lines[row - 1] = lines[row - 1][:start] + lines[row - 1][stop:]
    return "\n".join(lines)


def _stay_apart(left: tokenize.TokenInfo, right: tokenize.TokenInfo) -> bool:
    """True where two tokens would become another one, or a number in front of a word, without a space. Keywords keep
    theirs but at `=`: PPMd guesses ` for ` better than `for ` behind this or that bracket (70 bytes)."""
    if left.type == tokenize.NUMBER:
        return right.string[0].isalnum() or right.string[0] in "._"
    words = (tokenize.NAME, tokenize.NUMBER)
    prefix = right.type == tokenize.STRING or tokenize.tok_name[right.type] == "FSTRING_START"
    is_keyword = keyword.iskeyword(left.string) or keyword.iskeyword(right.string)
    return left.type == tokenize.NAME and (right.type in words or prefix) or (
        is_keyword and "=" not in (left.string, right.string))


# ---- Pruning
# Everything here happens only where `used` is given. Dropped are the rows of tables that it does not name; settings
# of presets and overlays that BAKED holds; branches that only the readable file takes (`if not BAKED`); help texts;
# field types of NamedTuples; and then every definition and import that nothing reaches any more.


def _prune_tables(tree: ast.Module, used: dict[str, set[str]], baked: dict[str, object]) -> list[str]:
    """Drops the rows that `used` does not name; returns one line a table for a person."""
    report = []
    pruned = False
    for table in sorted(used):
        places = [node for node in tree.body if table in _bound(node)]
        literal = getattr(places[0], "value", None) if len(places) == 1 else None
        if not isinstance(literal, ast.Dict) or not all(key is None or _is_text(key) for key in literal.keys):
            raise PackError(f"used_rows: {table} must be one top-level dict literal whose keys are strings")
        rows = [(key and key.value, key, row) for key, row in zip(literal.keys, literal.values, strict=True)]
        unknown = sorted(set(used[table]) - {name for name, _, _ in rows})
        # What a `**` part holds is not known here; a name may be one of its rows.
        if unknown and None not in literal.keys:
            raise PackError(f"used_rows: {table} has no row {', '.join(map(repr, unknown))}")
        kept = [row for row in rows if row[0] is None or row[0] in used[table]]
        dropped = [name for name, _, _ in rows if name is not None and name not in used[table]]
        literal.keys, literal.values = [key for _, key, _ in kept], [row for _, _, row in kept]
        if dropped:
            places[0].value = ast.Call(ast.Name("PrunedRows", ast.Load()), [ast.Constant(table), literal], [])
            pruned = True
        names = ", ".join(name or "all computed rows" for name, _, _ in kept)
        report.append(f"{table}: kept {names or 'nothing'}; dropped {', '.join(dropped) or 'nothing'}")
        if table in SETTINGS_TABLES:
            for row in literal.values:
                _drop_keys(row, set(baked))
    if pruned:
        _add_pruned_rows(tree)
    return report


def _drop_keys(node: ast.AST, names: set[str]) -> None:
    """Drops the entries with these keys from every dict literal in `node`."""
    for part in ast.walk(node):
        if isinstance(part, ast.Dict):
            kept = [(key, value) for key, value in zip(part.keys, part.values, strict=True)
                    if not (_is_text(key) and key.value in names)]
            part.keys, part.values = [key for key, _ in kept], [value for _, value in kept]


def _add_pruned_rows(tree: ast.Module) -> None:
    """Puts the class PrunedRows behind ConfigError, which it raises."""
    places = [i for i, node in enumerate(tree.body) if isinstance(node, ast.ClassDef) and node.name == "ConfigError"]
    first_use = min(i for i, node in enumerate(tree.body) if "PrunedRows" in _names(node))
    if len(places) != 1 or places[0] > first_use or any("PrunedRows" in _bound(node) for node in tree.body):
        raise PackError("pruning needs one top-level class ConfigError above the tables, and the name PrunedRows free")
    made = ast.parse(PRUNED_ROWS).body[0]
    made.lineno = tree.body[places[0]].lineno
    tree.body.insert(places[0] + 1, made)


class _Fold(ast.NodeTransformer):
    """Replaces branches on BAKED by the one that is taken, where BAKED is not empty and nothing changes it."""

    def __init__(self, tree: ast.Module, baked: dict[str, object]) -> None:
        changes = 0
        for node in ast.walk(tree):
            inside = getattr(getattr(node, "value", None), "id", "") == "BAKED"
            changes += getattr(node, "id", "") == "BAKED" and not isinstance(node.ctx, ast.Load)
            changes += isinstance(node, ast.Subscript) and inside and not isinstance(node.ctx, ast.Load)
            changes += isinstance(node, ast.Attribute) and inside and node.attr in (
                "clear", "pop", "popitem", "setdefault", "update")
            changes += isinstance(node, ast.arg) and node.arg == "BAKED"
        self.known = bool(baked) and changes == 1  # the one assignment

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Visits the children, then drops what stands behind a branch that is always taken and leaves."""
        super().generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            statements = getattr(node, name, None)
            ends = [i for i, item in enumerate(statements, 1) if hasattr(item, "ends_here")] if isinstance(
                statements, list) else []
            # A name that is bound back there, or a yield, says something about the whole function.
            if ends and not any(isinstance(part, (ast.Yield, ast.YieldFrom)) or not isinstance(
                    getattr(part, "ctx", ast.Load()), ast.Load) or isinstance(part, BINDERS)
                    for item in statements[ends[0]:] for part in ast.walk(item)):
                del statements[ends[0]:]
        return node

    def _truth(self, node: ast.expr) -> bool | None:
        """What an expression is as a condition; None where that is not known."""
        if isinstance(node, ast.Name) and node.id == "BAKED" and self.known:
            return True
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self._truth(node.operand)
            return None if inner is None else not inner
        if isinstance(node, ast.BoolOp):
            decisive = isinstance(node.op, ast.Or)
            known = True
            for item in node.values:
                truth = self._truth(item)
                if truth is decisive:
                    return decisive
                known = known and truth is not None
                if truth is None and not all(isinstance(part, (ast.Name, ast.Attribute, ast.Load))
                                             for part in ast.walk(item)):
                    return None  # it is evaluated first, and may do something
            return not decisive if known else None
        return None

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        """The statements of the branch that is taken, or the statement itself."""
        truth = self._truth(node.test)
        node = self.generic_visit(node)
        if truth is None:
            return node
        taken = (node.body if truth else node.orelse) or [ast.copy_location(ast.Pass(), node)]
        if isinstance(taken[-1], (ast.Return, ast.Raise, ast.Continue, ast.Break)):
            taken[-1].ends_here = True
        return taken

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        """The operand that is taken, or the expression itself."""
        truth = self._truth(node.test)
        node = self.generic_visit(node)
        return node if truth is None else node.body if truth else node.orelse


def _drop_help_texts(tree: ast.Module) -> None:
    """Empties the argument `text` in calls of a top-level function `setting(..., text, ...)`; --help then shows names,
    defaults, units and choices."""
    for maker in [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "setting"]:
        names = [argument.arg for argument in maker.args.args]
        place = names.index("text") if "text" in names else len(names)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setting":
                for text in [*node.args[place:place + 1], *(k.value for k in node.keywords if k.arg == "text")]:
                    if _is_text(text):
                        text.value = ""


def _drop_field_types(tree: ast.Module) -> None:
    """Makes the types of NamedTuple fields a 0: a field must have one, and nothing looks at it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and "NamedTuple" in map(_last_name, node.bases):
            for field in node.body:
                if isinstance(field, ast.AnnAssign):
                    field.annotation = ast.Constant(0)


def _drop_unreached(tree: ast.Module, named: set[str], notes: list[str]) -> list[str]:
    """Drops the top-level definitions and imports that nothing reaches from what runs; returns their names.

    What runs is every top-level statement that does more than bind names (`_is_inert`). `named` are the names
    in the whole source: an import that even it does not name is there for what it does, and stays.
    """
    own = {name: node for node in tree.body if not isinstance(node, (ast.Import, ast.ImportFrom))
           for name in _bound(node)}
    binders: dict[str, list[ast.stmt]] = {}
    waiting = []
    for node in tree.body:
        for name in _bound(node):
            binders.setdefault(name, []).append(node)
        if not _is_inert(node, own) or any(name == "BAKED" or name.startswith("__") for name in _bound(node)):
            waiting.append(node)
    reached: set[int] = set()
    used: set[str] = set()
    while waiting:
        node = waiting.pop()
        if id(node) in reached or isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        if reader := _reflection(node):
            notes.append(f"all definitions kept: {reader}")
            return []
        reached.add(id(node))
        names = _names(node)
        used |= names
        waiting += [binder for name in names for binder in binders.get(name, ())]
    kept, dropped = [], []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module == "__future__" or node.names[0].name == "*"):
            kept.append(node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            stays = [_alias_name(alias) in used or _alias_name(alias) not in named for alias in node.names]
            dropped += [_alias_name(alias) for alias, stay in zip(node.names, stays, strict=True) if not stay]
            node.names = [alias for alias, stay in zip(node.names, stays, strict=True) if stay]
            kept += [node] if node.names else []
        elif id(node) in reached:
            kept.append(node)
        else:
            dropped += _bound(node)
    tree.body = kept
    return dropped


def _join_imports(tree: ast.Module) -> None:
    """Makes neighbouring `import a` and `import b` one `import a, b`."""
    joined: list[ast.stmt] = []
    for node in tree.body:
        if joined and isinstance(node, ast.Import) and isinstance(joined[-1], ast.Import):
            joined[-1].names += node.names
        else:
            joined.append(node)
    tree.body = joined


def _is_text(node: ast.AST | None) -> bool:
    """True for a string constant."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _names(node: ast.AST) -> set[str]:
    """Returns what may name a top-level definition: names, attributes and strings. Attributes and strings never do in
    today's file; counting them costs no byte and forgives a lookup by name."""
    names: set[str] = set()
    for part in ast.walk(node):
        if isinstance(part, (ast.Name, ast.Attribute)):
            names.add(part.id if isinstance(part, ast.Name) else part.attr)
        elif _is_text(part):
            names.add(part.value)
    return names


def _alias_name(alias: ast.alias) -> str:
    """Returns the name that an import binds: `b` of `a as b`, `a` of `a.b`."""
    return alias.asname or alias.name.partition(".")[0]


def _bound(node: ast.stmt) -> list[str]:
    """Returns the names that a definition, an import or an assignment binds; none for other statements."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [_alias_name(alias) for alias in node.names]
    targets = [*getattr(node, "targets", []), *filter(None, [getattr(node, "target", None)])]
    if not isinstance(node, (ast.Assign, ast.AnnAssign)):
        return []
    return [part.id for target in targets for part in ast.walk(target)
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]


def _is_inert(node: ast.stmt, own: dict[str, ast.stmt]) -> bool:
    """True for a statement that only binds names, so that it may go when nothing uses them. `own` are the file's
    definitions: what they do is not known, but for calls of its NamedTuples, which only make a value."""
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.Pass)):
        return True
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        plain = all(isinstance(part, (ast.Name, ast.Tuple, ast.Store)) for target in targets
                    for part in ast.walk(target))
        return plain and _is_value(node.value, own) and _is_value(getattr(node, "annotation", None), own)
    for decorator in getattr(node, "decorator_list", []):
        if _last_name(decorator) not in INERT_DECORATORS or _first_name(decorator) in own:
            return False
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return _is_value(node.args, own) and _is_value(node.returns, own)
    if isinstance(node, ast.ClassDef):
        return not _runs_code(node, own) and all(_is_inert(part, own) or _is_bare_string(part) for part in node.body)
    return False


def _runs_code(node: ast.ClassDef, own: dict[str, ast.stmt]) -> bool:
    """True where defining the class, apart from its body, runs code: metaclass, computed base, `__init_subclass__`."""
    if node.keywords or not all(_is_value(base, own) for base in node.bases):
        return True
    parents = [own[name] for name in map(_last_name, node.bases) if name in own and name != node.name]
    return any(not isinstance(parent, ast.ClassDef) or _runs_code(parent, own)
               or any(getattr(part, "name", "") == "__init_subclass__" for part in parent.body) for parent in parents)


def _is_value(node: ast.AST | None, own: dict[str, ast.stmt]) -> bool:
    """True where evaluating an expression only makes a value."""
    if isinstance(node, (ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr)):
        return False
    if isinstance(node, ast.Call):
        maker = own.get(_first_name(node.func))
        if maker is None and ast.unparse(node.func) not in INERT_CALLS:
            return False
        if maker is not None and not (isinstance(node.func, ast.Name) and isinstance(maker, ast.ClassDef)
                                      and "NamedTuple" in map(_last_name, maker.bases)):
            return False
    # The body of a lambda is not evaluated, its defaults are.
    children = [node.args] if isinstance(node, ast.Lambda) else ast.iter_child_nodes(node) if node else []
    return all(_is_value(child, own) for child in children)


def _first_name(node: ast.expr) -> str:
    """Returns `a` for `a`, `a.b`, `a.b(c).d`; "" where an expression starts with something else."""
    while isinstance(node, (ast.Attribute, ast.Call)):
        node = node.value if isinstance(node, ast.Attribute) else node.func
    return getattr(node, "id", "")


def _reflection(node: ast.stmt) -> str:
    """Returns where and how a statement may find definitions of this file without naming them, or ""."""
    harmless: set[int] = set()
    for part in ast.walk(node):
        found = False
        if isinstance(part, ast.Compare):  # __name__ == "__main__", "x" in sys.modules
            harmless |= {id(item) for item in [part.left, *part.comparators]}
        elif isinstance(part, ast.Subscript) and not isinstance(part.ctx, ast.Load):  # sys.modules[name] = module
            harmless.add(id(part.value))
        elif isinstance(part, ast.Name):
            found = part.id in REFLECTION_NAMES and isinstance(part.ctx, ast.Load)
        elif isinstance(part, ast.Attribute):
            found = part.attr in REFLECTION_ATTRIBUTES or ast.unparse(part) == "sys.modules"
        elif isinstance(part, ast.Call):
            found = not part.args and _last_name(part.func) in ("dir", "locals", "vars")
        elif isinstance(part, (ast.Import, ast.ImportFrom)):
            names = {getattr(part, "module", ""), *(alias.name for alias in part.names)}
            found = bool(names & {"__main__", "train_gpt"}) or names >= {"sys", "modules"}
        if found and id(part) not in harmless:
            return f"line {part.lineno} has {ast.unparse(part)}"
    return ""


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
    lines = packed.stripped.text.split("\n")
    ends: dict[str, int] = {}
    for node, row in zip(ast.parse(packed.stripped.text).body, packed.stripped.rows, strict=True):
        ends[max((start, name) for start, name in starts if start <= row)[1]] = node.end_lineno
    parts: dict[str, int] = {}
    before = end = 0
    for name in names:
        end = ends.get(name, end)
        size = len(_ppmd_stream(fold_indents("\n".join([*lines[:end], ""])).encode(), max(ORDERS))) if end else 0
        parts[name] = max(0, size - before)
        before = max(before, size)
    total = sum(parts.values()) or 1
    scaled = {name: size * len(packed.data) // total for name, size in parts.items()}
    scaled[names[0]] += len(packed.data) - sum(scaled.values())
    return scaled


def report(source: str, packed: Packed) -> str:
    """Returns the table of sizes by part and by section, and the notes, for a person."""
    sizes = {"readable": len(source.encode()), "stripped": len(packed.source.encode()),
             "compressed": len(packed.compressed), "packed": len(packed.data)}
    lines = [f"{name:<12}{size:>9,} bytes" for name, size in sizes.items()]
    lines.append("packed file by section:")
    for name, size in section_bytes(source, packed).items():
        lines.append(f"  {name:<16}{size:>7,} bytes {size / len(packed.data):>6.1%}")
    if packed.stripped.tables:
        lines += packed.stripped.tables
        lines.append(f"dropped because nothing reaches it: {', '.join(packed.stripped.dropped) or 'nothing'}")
    return "\n".join([*lines, *packed.notes])


# ---- Command line


PACKED_FROM = ("train_gpt.py", "tools/pack.py")


def provenance_line(source: bytes, root: Path) -> str:
    """Returns the text of the first line: hash of the readable source, the last commit of what a packed file is made
    of (PACKED_FROM), whether that is changed since; never fails. Other files do not count: a run that is evaluated
    again behind a commit of something else has the same packed file."""
    commit = "unknown"
    top = _git(root, "rev-parse", "--show-toplevel")
    head = _git(root, "log", "-1", "--format=%H", "--", *PACKED_FROM)
    status = _git(root, "status", "--porcelain", "--untracked-files=all", "--", *PACKED_FROM)
    # A copy inside somebody else's repository must not take that repository's commit for its own.
    if top and head and status is not None and Path(top.strip()).resolve() == root.resolve():
        commit = f"{head.strip()} {'with' if status else 'without'} local changes"
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
        config = train_gpt.load_config(words, os.environ)
        used = train_gpt.used_rows(config) if hasattr(train_gpt, "used_rows") else None
        packed = pack(source, train_gpt.baked(config), provenance_line(raw, ROOT), used)
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
