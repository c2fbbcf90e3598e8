"""A stranger's train_gpt.py, unpacked and looked at, never run.

Packed scripts execute the text that a literal unpacks to. `decode` follows such layers: it evaluates the argument of
`exec` only as far as that is made of literals, names bound to literals, and the few functions in UNPACKERS and METHODS,
each with a bound on what comes out. What cannot be evaluated so is reported as hidden, not tried. Our own packed files
go through tools/pack.py, which accepts nothing but its own stub.

Facts about code are about what the start of the script can reach by name: a definition that nothing reaches is no
evidence of anything (a call that is there and dead has caused false accusations).
"""

from __future__ import annotations

import ast
import base64
import binascii
import bz2
import collections
import functools
import io
import lzma
import re
import sys
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools import pack  # noqa: E402

SCRIPT_LIMIT_BYTES = 4 << 20
SOURCE_LIMIT_BYTES = 1 << 20  # of all layers together; the longest known script has 0.5 MB
MOST_LAYERS, MOST_NODES = 5, 400_000
MOST_STEPS, MADE_LIMIT_BYTES = 20_000, 32 << 20  # of evaluating what a packed script executes
DICTIONARY_LIMIT_BYTES = 64 << 20


class ScriptError(Exception):
    """Something that is not evaluated here; the message is one clear line."""


class Script(NamedTuple):
    """A script layer by layer: bytes of each text from the file inward, how each was unpacked, the innermost text that
    could be read, its syntax tree (None where it has none), and why it goes no further ("" where it is whole)."""

    sizes: list[int]
    shims: list[str]
    text: str
    tree: ast.Module | None
    fault: str
    mark: bool  # whether the file begins with a byte order mark
    ours: bool  # packed by tools/pack.py
    outer: tuple[tuple[ast.Module, ast.expr], ...] = ()  # layers around it, each with what it executes of the next


# ---- bounded unpacking


def _bounded(step: Callable[[bytes, int], bytes], ended: Callable[[], bool], data: bytes) -> bytes:
    """All that a decompressor gives, in pieces; ScriptError beyond the limit or before its end."""
    out = step(data, SOURCE_LIMIT_BYTES + 1)
    while len(out) <= SOURCE_LIMIT_BYTES and not ended():
        more = step(b"", SOURCE_LIMIT_BYTES + 1 - len(out))
        if not more:
            raise ScriptError("a compressed text is cut short")
        out += more
    if len(out) > SOURCE_LIMIT_BYTES:
        raise ScriptError(f"unpacks to more than {SOURCE_LIMIT_BYTES} bytes")
    return out


def unpack_lzma(data: bytes, format: int = lzma.FORMAT_AUTO, memlimit: int | None = None,
                filters: list[dict[str, int]] | None = None) -> bytes:
    """lzma.decompress within the limits."""
    if format == lzma.FORMAT_RAW:
        for row in filters or []:
            if row.get("dict_size", 0) > DICTIONARY_LIMIT_BYTES:
                raise ScriptError(f"lzma wants a dictionary of more than {DICTIONARY_LIMIT_BYTES} bytes")
        maker = lzma.LZMADecompressor(format, None, filters)
    else:
        maker = lzma.LZMADecompressor(format, 2 * DICTIONARY_LIMIT_BYTES)
    return _bounded(maker.decompress, lambda: maker.eof, data)


def unpack_zlib(data: bytes, wbits: int = zlib.MAX_WBITS, bufsize: int = 0) -> bytes:
    """zlib.decompress within the limits."""
    maker = zlib.decompressobj(wbits)
    return _bounded(lambda new, most: maker.decompress(new or maker.unconsumed_tail, most), lambda: maker.eof, data)


def unpack_gzip(data: bytes) -> bytes:
    """gzip.decompress of one member within the limits."""
    return unpack_zlib(data, 31)


def unpack_bz2(data: bytes) -> bytes:
    """bz2.decompress within the limits."""
    maker = bz2.BZ2Decompressor()
    return _bounded(maker.decompress, lambda: maker.eof, data)


def unpack_brotli(data: bytes) -> bytes:
    """brotli.decompress within the limits; ScriptError without the package."""
    try:
        import brotli
    except ImportError:
        raise ScriptError("is packed with brotli, which is not installed here") from None
    maker, out = brotli.Decompressor(), b""
    try:
        out = maker.process(data, output_buffer_limit=SOURCE_LIMIT_BYTES + 1)
        while not maker.is_finished() and len(out) <= SOURCE_LIMIT_BYTES:
            more = maker.process(b"", output_buffer_limit=SOURCE_LIMIT_BYTES + 1)
            if not more:
                raise ScriptError("a compressed text is cut short")
            out += more
    except brotli.error as error:
        raise ScriptError(f"a compressed text is damaged ({error})") from None
    if len(out) > SOURCE_LIMIT_BYTES:
        raise ScriptError(f"unpacks to more than {SOURCE_LIMIT_BYTES} bytes")
    return out


def unpack_zstd(data: bytes) -> bytes:
    """A zstd frame within the limits; ScriptError without the package."""
    try:
        import zstandard
    except ImportError:
        raise ScriptError("is packed with zstd, which is not installed here") from None
    try:
        with zstandard.ZstdDecompressor(max_window_size=DICTIONARY_LIMIT_BYTES).stream_reader(io.BytesIO(data)) as file:
            out = file.read(SOURCE_LIMIT_BYTES + 1)
    except zstandard.ZstdError as error:
        raise ScriptError(f"a compressed text is damaged ({error})") from None
    if len(out) > SOURCE_LIMIT_BYTES:
        raise ScriptError(f"unpacks to more than {SOURCE_LIMIT_BYTES} bytes")
    return out


def _self_bytes(*_: object) -> bytes:
    raise ScriptError("reads its payload from its own file")


# What a packed script may call, by its full name.
UNPACKERS: dict[str, Callable[..., Any]] = {
    "lzma.decompress": unpack_lzma, "zlib.decompress": unpack_zlib, "gzip.decompress": unpack_gzip,
    "bz2.decompress": unpack_bz2, "brotli.decompress": unpack_brotli, "zstandard.decompress": unpack_zstd,
    "zstd.decompress": unpack_zstd, "base64.b85decode": base64.b85decode, "base64.b64decode": base64.b64decode,
    "base64.a85decode": base64.a85decode, "base64.b32decode": base64.b32decode, "base64.b16decode": base64.b16decode,
    "base64.standard_b64decode": base64.b64decode, "base64.urlsafe_b64decode": base64.urlsafe_b64decode,
    "binascii.a2b_base64": binascii.a2b_base64, "binascii.unhexlify": binascii.unhexlify,
    "bytes.fromhex": bytes.fromhex, "codecs.decode": lambda data, name="utf-8": _plain_decode(data, name),
    "open": _self_bytes}
# Methods of texts and bytes that a packed script may call.
METHODS: dict[str, Callable[..., Any]] = {
    "decode": lambda data, *words, **more: _plain_decode(data, *words),
    "encode": lambda text, *words: _plain_encode(text, *words), "strip": lambda text, *words: text.strip(*words),
    "replace": lambda text, old, new: _bounded_replace(text, old, new),
    "split": lambda text, *words: text.split(*words), "join": lambda text, parts: _bounded_join(text, parts)}
CONSTANTS = {f"lzma.{name}": getattr(lzma, name) for name in dir(lzma) if name.startswith(("FORMAT_", "FILTER_",
                                                                                          "PRESET_", "CHECK_"))}
CODINGS = {"utf-8", "utf8", "ascii", "latin-1", "latin1", "iso-8859-1", "hex", "base64"}


def _plain_decode(data: bytes, name: str = "utf-8", *_: object) -> Any:
    """Bytes as text, or hexadecimal digits and base64 as bytes."""
    if name.lower() not in CODINGS:
        raise ScriptError(f"decodes with {name[:20]!r}")
    if name in ("hex", "base64"):
        return UNPACKERS["binascii.unhexlify" if name == "hex" else "base64.b64decode"](data)
    return data.decode(name)


def _plain_encode(text: str, name: str = "utf-8", *_: object) -> bytes:
    """Text as bytes."""
    if name.lower() not in CODINGS - {"hex", "base64"}:
        raise ScriptError(f"encodes with {name[:20]!r}")
    return text.encode(name)


def _bounded_join(text: Any, parts: Any) -> Any:
    """str.join and bytes.join where the result stays small."""
    if sum(map(len, parts)) + len(text) * len(parts) > SCRIPT_LIMIT_BYTES:
        raise ScriptError(f"makes more than {SCRIPT_LIMIT_BYTES} bytes")
    return text.join(parts)


def _bounded_replace(text: Any, old: Any, new: Any) -> Any:
    """str.replace and bytes.replace where the result stays small."""
    if len(text) + text.count(old) * (len(new) - len(old)) > SCRIPT_LIMIT_BYTES:
        raise ScriptError(f"makes more than {SCRIPT_LIMIT_BYTES} bytes")
    return text.replace(old, new)


# ---- evaluating what a packed script executes


def aliases(nodes: Iterable[ast.AST]) -> dict[str, str]:
    """Local name -> full name of everything that these nodes import."""
    names: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for item in node.names:
                names[item.asname or item.name.partition(".")[0]] = item.name if item.asname else (
                    item.name.partition(".")[0])
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and node.value.args and full_name(
                node.value.func, {}) in ("__import__", "importlib.import_module") and isinstance(
                node.value.args[0], ast.Constant):
            module = str(node.value.args[0].value)
            names |= {target.id: module if "import_module" in ast.dump(node.value.func) else module.partition(".")[0]
                      for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {item.asname or item.name: f"{node.module}.{item.name}" for item in node.names}
    return names


def full_name(node: ast.AST, known: dict[str, str]) -> str:
    """The dotted name of what a Name or a chain of attributes stands for, imports resolved; "" for anything else.
    `__import__("x")` counts as x."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "__import__" and (
            node.args and isinstance(node.args[0], ast.Constant)):
        parts.append(str(node.args[0].value))
    elif isinstance(node, ast.Name):
        parts.append(known.get(node.id, node.id))
    else:
        return ""
    return ".".join(reversed(parts))


def bindings(tree: ast.AST) -> Iterator[str]:
    """Every name that is bound anywhere, once for each time; an attribute that is set by its full name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield full_name(node, {})
        elif isinstance(node, DEFINITIONS):
            yield node.name
        elif isinstance(node, ast.alias):
            yield node.asname or node.name.partition(".")[0]


def full_name_text(name: str, known: dict[str, str]) -> str:
    """A dotted name with its root resolved."""
    root, dot, rest = name.partition(".")
    return known.get(root, root) + dot + rest


class Evaluator:
    """The value of an expression of literals; ScriptError for all else."""

    def __init__(self, tree: ast.Module) -> None:
        self.known = aliases(ast.walk(tree))
        self.bound = {target.id: node.value for node in tree.body if isinstance(node, ast.Assign)
                      for target in node.targets if isinstance(target, ast.Name)}
        self.times = collections.Counter(bindings(tree))
        for name in self.times:
            if name in ("exec", "eval", "compile", "open", "bytes") or (
                    "." in name and full_name_text(name, self.known) in UNPACKERS):
                raise ScriptError(f"{name[:40]} is changed by the script")
        self.open: set[str] = set()
        self.used: list[str] = []
        self.held: dict[str, Any] = {}  # values of names: each is made once
        self.steps = self.made = 0

    def value(self, node: ast.expr) -> Any:
        """Of one expression."""
        made = getattr(self, f"_{type(node).__name__}", None)
        if made is None:
            raise ScriptError(f"line {node.lineno}: a {type(node).__name__} is not evaluated here")
        self.steps += 1
        found = made(node)
        if isinstance(found, (str, bytes)) and len(found) > SCRIPT_LIMIT_BYTES:
            raise ScriptError(f"makes more than {SCRIPT_LIMIT_BYTES} bytes")
        self.made += len(found) if isinstance(found, (str, bytes, list)) else 0
        if self.steps > MOST_STEPS or self.made > MADE_LIMIT_BYTES:
            raise ScriptError(f"takes more than {MOST_STEPS} steps or {MADE_LIMIT_BYTES} bytes to evaluate")
        return found

    def _Constant(self, node: ast.Constant) -> Any:  # noqa: N802
        return node.value

    def _Tuple(self, node: ast.Tuple) -> Any:  # noqa: N802
        return [self.value(item) for item in node.elts]

    _List = _Tuple

    def _Dict(self, node: ast.Dict) -> Any:  # noqa: N802
        return {self.value(key): self.value(item) for key, item in zip(node.keys, node.values, strict=True) if key}

    def _UnaryOp(self, node: ast.UnaryOp) -> Any:  # noqa: N802
        found = self.value(node.operand)
        if not isinstance(node.op, ast.USub) or type(found) is not int:
            raise ScriptError(f"line {node.lineno}: an operator that is not evaluated here")
        return -found

    def _BinOp(self, node: ast.BinOp) -> Any:  # noqa: N802
        left, right = self.value(node.left), self.value(node.right)
        if isinstance(node.op, ast.BitOr) and type(left) is type(right) is int:
            return left | right
        if not isinstance(node.op, ast.Add) or type(left) is not type(right) or not isinstance(left, (str, bytes)):
            raise ScriptError(f"line {node.lineno}: an operator that is not evaluated here")
        return left + right

    def _Subscript(self, node: ast.Subscript) -> Any:  # noqa: N802
        found = self.value(node.value)
        if isinstance(node.slice, ast.Slice):
            return found[slice(*(self.value(part) if part else None for part in (
                node.slice.lower, node.slice.upper, node.slice.step)))]
        return found[self.value(node.slice)]

    def _Name(self, node: ast.Name) -> Any:  # noqa: N802
        if self.known.get(node.id) in CONSTANTS:
            return CONSTANTS[self.known[node.id]]
        if node.id not in self.bound or node.id in self.open:
            raise ScriptError(f"line {node.lineno}: {node.id[:40]} is not bound to a literal")
        if self.times[node.id] > 1:
            raise ScriptError(f"line {node.lineno}: {node.id[:40]} is bound more than once")
        if node.id not in self.held:
            self.open.add(node.id)
            self.held[node.id] = self.value(self.bound[node.id])
            self.open.discard(node.id)
        return self.held[node.id]

    def _Attribute(self, node: ast.Attribute) -> Any:  # noqa: N802
        name = full_name(node, self.known)
        if name not in CONSTANTS:
            raise ScriptError(f"line {node.lineno}: {name[:60] or 'an attribute'} is not evaluated here")
        return CONSTANTS[name]

    def _Call(self, node: ast.Call) -> Any:  # noqa: N802
        name = full_name(node.func, self.known)
        more = {item.arg: self.value(item.value) for item in node.keywords if item.arg}
        if name == "compile" and node.args:
            return self.value(node.args[0])
        if name.endswith("ZstdDecompressor"):
            name = "zstandard.decompress"
        if isinstance(node.func, ast.Attribute) and node.func.attr == "decompress" and name not in UNPACKERS and (
                "ZstdDecompressor" in ast.dump(node.func.value)):
            name = "zstandard.decompress"
        if name in UNPACKERS:
            self.used.append(name.rpartition(".")[2] if "decode" in name else name.partition(".")[0])
            return UNPACKERS[name](*map(self.value, node.args), **more)
        if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            owner = self.value(node.func.value)
            if isinstance(owner, (str, bytes)):
                return METHODS[node.func.attr](owner, *map(self.value, node.args), **more)
        raise ScriptError(f"line {node.lineno}: the call of {name[:60] or 'an expression'} is not evaluated here")


def parse(text: str) -> ast.Module:
    """The syntax tree; ScriptError for what this Python cannot parse."""
    try:
        return ast.parse(text)
    except SyntaxError as error:
        raise ScriptError(f"line {error.lineno}: {error.msg}, in Python {sys.version_info[0]}.{sys.version_info[1]}"
                          ) from None
    except (MemoryError, RecursionError):
        raise ScriptError("is nested too deeply to be parsed") from None
    except ValueError as error:  # NUL bytes
        raise ScriptError(str(error)) from None


def executed(tree: ast.Module) -> ast.expr | None:
    """What a statement of the module itself executes: the argument of its last top-level `exec`, or None."""
    found = [node.value.args[0] for node in tree.body
             if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and node.value.args
             and isinstance(node.value.func, ast.Name) and node.value.func.id in ("exec", "eval")]
    return found[-1] if found else None


def file_text(data: bytes) -> str:
    """A script's text as Python reads it; ScriptError where Python could not."""
    try:
        coding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return data.decode(coding).removeprefix("\ufeff")
    except (SyntaxError, UnicodeDecodeError, LookupError) as error:
        raise ScriptError(f"is no Python text ({str(error)[:80]})") from None


def decode(data: bytes) -> Script:
    """The script's layers; never raises for what a stranger wrote."""
    sizes, shims, text, tree, fault, own, outer = [len(data)], [], "", None, "", False, []
    mark = data.startswith(b"\xef\xbb\xbf")
    try:
        text = file_text(data)
        if data.startswith(b"# sixteen train_gpt.py, packed"):
            text, own = pack.unpack_source(data), True
            shims.append("tools/pack.py")
            sizes.append(len(text.encode()))
        tree = parse(text)
        while not own and (argument := executed(tree)) is not None:
            if len(shims) >= MOST_LAYERS:
                raise ScriptError(f"more than {MOST_LAYERS} layers")
            maker = Evaluator(tree)
            inner = maker.value(argument)
            if isinstance(inner, bytes):
                inner = file_text(inner)
            if not isinstance(inner, str):
                raise ScriptError("executes what is no text")
            shims.append("+".join(reversed(maker.used)) or "literal")
            sizes.append(len(inner.encode()))
            if sum(sizes[1:]) > SOURCE_LIMIT_BYTES:
                raise ScriptError(f"unpacks to more than {SOURCE_LIMIT_BYTES} bytes")
            outer.append((tree, argument))
            text, tree = inner, None
            tree = parse(text)
    except (ScriptError, pack.PackError) as error:
        fault = str(error)
    except RecursionError:
        fault = "is nested too deeply to be read"
    # What a decompressor or a literal of the wrong kind raises.
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError, OSError, MemoryError,
            zlib.error, lzma.LZMAError) as error:
        fault = f"cannot be unpacked ({type(error).__name__}: {str(error)[:80]})"
    return Script(sizes, shims, text, tree, fault, mark, own, tuple(outer))


# ---- facts about the code


class Use(NamedTuple):
    """A call or import: its full name, line, whether the start of the script reaches it, whether it stands in a `try`
    that goes on without it."""

    name: str
    line: int
    reached: bool
    optional: bool


DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
NETWORK = ("urllib.request", "urllib3", "requests", "httpx", "aiohttp", "http.client", "ftplib", "huggingface_hub",
           "datasets", "wget", "gdown", "boto3", "socket")
HARMLESS = {"socket.gethostname", "socket.getfqdn", "socket.error", "socket.timeout"}
SHELLS = ("subprocess.", "os.system", "os.popen", "os.exec", "pty.spawn")
FETCHING = re.compile(r"\b(curl|wget|pip3? install|git (clone|fetch|pull)|huggingface-cli|hf download|aws s3|gsutil|"
                      r"rclone|scp|rsync)\b")
RUNS_TEXT = {"exec", "eval"}
# Roots of decorators that change what they get and call nothing by themselves.
PLAIN_DECORATORS = {"dataclass", "dataclasses", "functools", "torch", "triton", "contextlib", "contextmanager",
                    "staticmethod", "classmethod", "property", "lru_cache", "cache", "wraps", "jit", "typing",
                    "override", "final"}


def runs_text(name: str) -> bool:
    """Whether a full name is that of what executes a text."""
    return name.removeprefix("builtins.") in RUNS_TEXT


def at_import(node: ast.AST) -> list[ast.AST]:
    """The parts of a definition that run when the module is read: decorators, defaults, annotations, bases, the
    statements of a class and what of its own they name."""
    if not isinstance(node, DEFINITIONS):
        return [node]
    parts: list[ast.AST] = list(node.decorator_list)
    if isinstance(node, ast.ClassDef):
        parts += [*node.bases, *node.keywords]
        called = names_in(inner for inner in node.body if not isinstance(inner, DEFINITIONS))
        for inner in node.body:
            parts += [inner] if isinstance(inner, DEFINITIONS) and inner.name in called else at_import(inner)
    else:
        given = node.args
        told = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        parts += [value for value in (*given.defaults, *given.kw_defaults, node.returns, *(
            argument.annotation for argument in told if argument is not None)) if value is not None]
    return parts


def names_in(nodes: Iterable[ast.AST]) -> set[str]:
    """Every name that stands in these nodes: as a name, an attribute, or a text by itself."""
    return {part.id if isinstance(part, ast.Name) else part.attr if isinstance(part, ast.Attribute) else part.value
            for node in nodes for part in ast.walk(node) if isinstance(part, (ast.Name, ast.Attribute)) or (
                isinstance(part, ast.Constant) and isinstance(part.value, str))}


def is_handed_over(node: ast.AST) -> bool:
    """Whether a decorator of unknown intent has a definition, which it may call by itself."""
    return any((full_name(part.func if isinstance(part, ast.Call) else part, {}).partition(".")[0] or "?")
               not in PLAIN_DECORATORS for part in node.decorator_list)


def walk_reached(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Names of the top-level definitions that the module's own statements reach, directly or through each other, and
    of all. A name counts wherever it stands, and what is read with the module is run with it, so this is hardly ever
    too few."""
    defined = {node.name: node for node in tree.body if isinstance(node, DEFINITIONS)}
    names = {name: names_in([node]) & defined.keys() for name, node in defined.items()}
    todo = [name for name, node in defined.items() if is_handed_over(node)]
    todo += names_in(part for node in tree.body for part in at_import(node)) & defined.keys()
    reached: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += names[name]
    return reached, set(defined)


Nodes = list[tuple[ast.AST, bool]]  # every node of a tree, and whether the start of the script reaches it


def list_nodes(tree: ast.Module, followed: ast.expr | None = None, depth: int = 0) -> Nodes:
    """The nodes of a tree, and of the texts that it executes as they stand there, but for the one that is `followed`
    already; ScriptError where there are more than anybody writes."""
    reached, _ = walk_reached(tree)
    nodes: Nodes = []
    for node in tree.body:
        if isinstance(node, DEFINITIONS) and node.name not in reached:
            early = {id(part) for piece in at_import(node) for part in ast.walk(piece)}
            nodes += [(part, id(part) in early) for part in ast.walk(node)]
        else:
            nodes += [(part, True) for part in ast.walk(node)]
        if len(nodes) > MOST_NODES:
            raise ScriptError(f"has more than {MOST_NODES} nodes")
    for node, live in list(nodes):
        if isinstance(node, ast.Call) and node.args and node.args[0] is not followed and (
                runs_text(full_name(node.func, {}))) and isinstance(node.args[0], ast.Constant):
            if depth == MOST_LAYERS:
                raise ScriptError(f"more than {MOST_LAYERS} layers")
            value = node.args[0].value
            inner = list_nodes(parse((file_text(value) if isinstance(value, bytes) else str(value)).strip()), None,
                               depth + 1)
            nodes += [(part, live and own) for part, own in inner]
            if len(nodes) > MOST_NODES:
                raise ScriptError(f"has more than {MOST_NODES} nodes")
    return nodes


def optional_lines(nodes: Nodes) -> set[int]:
    """Lines inside the body of a `try` whose handler takes a missing import and goes on."""
    lines: set[int] = set()
    for node, _ in nodes:
        if isinstance(node, ast.Try) and any(
                handler.type is None or {"ImportError", "ModuleNotFoundError", "Exception", "BaseException"}
                & {part.id for part in ast.walk(handler.type) if isinstance(part, ast.Name)}
                for handler in node.handlers) and not any(
                isinstance(part, ast.Raise) for handler in node.handlers for part in ast.walk(handler)):
            lines |= {part.lineno for statement in node.body for part in ast.walk(statement) if hasattr(part, "lineno")}
    return lines


def find_imports(nodes: Nodes) -> list[Use]:
    """Every imported module, relative imports apart."""
    optional, found = optional_lines(nodes), []
    for node, live in nodes:
        names = ([item.name for item in node.names] if isinstance(node, ast.Import) else
                 [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else [])
        if isinstance(node, ast.Call) and full_name(node.func, {}) in ("__import__", "importlib.import_module") and (
                node.args and isinstance(node.args[0], ast.Constant)):
            names = [str(node.args[0].value)]
        found += [Use(name, node.lineno, live, node.lineno in optional) for name in names]
    return found


def calls(nodes: Nodes, known: dict[str, str]) -> Iterator[tuple[ast.Call, str, bool]]:
    """Every call with its full name and whether it is reached."""
    for node, live in nodes:
        if isinstance(node, ast.Call):
            yield node, full_name(node.func, known), live


def is_imported(node: ast.AST, known: dict[str, str]) -> bool:
    """Whether the root of a dotted name is something that is imported, and no variable of that name."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Call) or isinstance(node, ast.Name) and node.id in known


def find_network(nodes: Nodes, known: dict[str, str]) -> list[Use]:
    """Every call that can use a network: of a module that does nothing else, or of a shell that fetches."""
    found = []
    for node, name, live in calls(nodes, known):
        if not is_imported(node.func, known):
            continue
        by_module = name not in HARMLESS and any(name == part or name.startswith(f"{part}.") for part in NETWORK)
        texts = " ".join(str(part.value) for argument in (*node.args, *(item.value for item in node.keywords))
                         for part in ast.walk(argument) if isinstance(part, ast.Constant)
                         and isinstance(part.value, str) and len(part.value) < 4000) if name.startswith(SHELLS) else ""
        if by_module or FETCHING.search(texts):
            found.append(Use(name if by_module else f"{name}({FETCHING.search(texts)[0]})", node.lineno, live, False))
    return found


def find_hidden(nodes: Nodes, known: dict[str, str], followed: ast.expr | None = None) -> list[Use]:
    """Every `exec` and `eval` of something that is no literal, and is not `followed`."""
    return [Use(name, node.lineno, live, False) for node, name, live in calls(nodes, known)
            if runs_text(name) and node.args and node.args[0] is not followed
            and not isinstance(node.args[0], ast.Constant)]


def find_programs(nodes: Nodes, known: dict[str, str]) -> list[Use]:
    """The programs that are run or looked for, where their names stand in the call."""
    found = []
    for node, name, live in calls(nodes, known):
        if node.args and (name.startswith(SHELLS) or name == "shutil.which"):
            first = node.args[0]
            first = first.elts[0] if isinstance(first, (ast.List, ast.Tuple)) and first.elts else first
            if isinstance(first, ast.Constant) and isinstance(first.value, str) and first.value.split():
                found.append(Use(first.value.split()[0].rpartition("/")[2], node.lineno, live, False))
    return found


def find_literal(tree: ast.Module, name: str) -> Any:
    """The value that a top-level assignment gives to a name; None where it is no plain literal."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None and any(
                isinstance(target, ast.Name) and target.id == name for target in targets):
            try:
                return ast.literal_eval(node.value)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                return None
    return None


class Looked(NamedTuple):
    """A script and what the code of all its layers uses; empty where it could not be read to the end. `texts` are its
    short string literals, `definitions` how many of the innermost layer are reached from its start, and of how many."""

    script: Script
    imports: list[Use]
    network: list[Use]
    hidden: list[Use]
    programs: list[Use]
    texts: frozenset[str]
    definitions: tuple[int, int]


@functools.lru_cache(maxsize=4)
def look(data: bytes) -> Looked:
    """The facts of a script; never raises for what a stranger wrote."""
    script = decode(data)
    if script.tree is None or script.fault:
        return Looked(script, [], [], [], [], frozenset(), (0, 0))
    try:
        reached, defined = walk_reached(script.tree)
        found: tuple[list[Use], ...] = ([], [], [], [])
        texts: set[str] = set()
        for tree, followed in (*script.outer, (script.tree, None)):
            nodes = list_nodes(tree, followed)
            known = aliases(node for node, _ in nodes)
            texts |= {node.value for node, _ in nodes if isinstance(node, ast.Constant)
                      and isinstance(node.value, str) and len(node.value) < 200}
            for uses, more in zip(found, (find_imports(nodes), find_network(nodes, known),
                                          find_hidden(nodes, known, followed), find_programs(nodes, known)),
                                  strict=True):
                uses += more
        return Looked(script, *found, frozenset(texts), (len(reached), len(defined)))
    except ScriptError as error:
        fault = str(error)
    except RecursionError:
        fault = "is nested too deeply to be read"
    return Looked(script._replace(fault=fault), [], [], [], [], frozenset(), (0, 0))
