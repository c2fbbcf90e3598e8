"""The layout of train_gpt.py: banners match the index, a section uses only what stands above it, nothing reads the
environment but the last line."""

import ast
import re

from conftest import ROOT

import train_gpt

TEXT = (ROOT / "train_gpt.py").read_text()
TREE = ast.parse(TEXT)
BANNER = re.compile(r"^# ==== (\d\d) ([A-Z]+) =+$", re.M)


def test_index_equals_banners():
    assert re.findall(r"^    (\d\d) ([A-Z]+) ", train_gpt.__doc__, re.M) == BANNER.findall(TEXT)
    assert [int(number) for number, _ in BANNER.findall(TEXT)] == list(range(1, 15))


def test_every_banner_is_followed_by_its_reason():
    lines = TEXT.splitlines()
    for place, line in enumerate(lines):
        if BANNER.match(line):
            assert lines[place + 1].startswith("# ") and len(line) == 110


def test_a_section_uses_only_what_stands_above_it():
    starts = [TEXT[:match.start()].count("\n") + 1 for match in BANNER.finditer(TEXT)]

    def section(line):
        return sum(start <= line for start in starts)
    defined = {}
    for node in TREE.body:
        names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else [
            target.id for target in getattr(node, "targets", [getattr(node, "target", None)])
            if isinstance(target, ast.Name)]
        for name in names:
            assert name not in defined, f"{name} is defined twice"
            defined[name] = section(node.lineno)
    read = [node for node in ast.walk(TREE) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    wrong = [f"line {node.lineno}: {node.id}" for node in read if defined.get(node.id, 0) > section(node.lineno)]
    assert not wrong, wrong


def test_environment_is_read_in_the_guard_only():
    reads = [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Attribute) and node.attr == "environ"]
    assert reads == [len(TEXT.splitlines())]


def test_no_catch_all_no_global_no_assert():
    for node in ast.walk(TREE):
        assert not isinstance(node, ast.Assert)
        # Triton finds the names in a kernel among those of its module only, and must not be imported before it is used.
        assert not isinstance(node, ast.Global) or set(node.names) == {"tl", "triton"}
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None and getattr(node.type, "id", "") not in ("Exception", "BaseException")


def test_every_definition_is_reached():
    """A top-level name that nothing uses is dead, unless it is the entry point or the tests' and tools' interface."""
    used = {node.id for node in ast.walk(TREE) if isinstance(node, ast.Name)} | {
        node.attr for node in ast.walk(TREE) if isinstance(node, ast.Attribute)}
    names = [node.name for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert [name for name in names if name not in used] == []


def test_public_definitions_have_a_docstring():
    missing = [node.name for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
               and not node.name.startswith("_") and not ast.get_docstring(node)
               and not node.name.endswith("Settings")]
    assert missing == []
