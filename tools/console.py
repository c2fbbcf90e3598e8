"""What the command lines of tools share: an option parser whose mistakes are one line, readers of numbers, a table."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any, NoReturn


class UsageError(Exception):
    """A user's mistake in the words of a tool: one line with name, value and rule. Exit code 2."""


class Parser(argparse.ArgumentParser):
    """An option parser that raises UsageError with `--name: value: rule`, and takes no shortened names."""

    def __init__(self, usage: str, text: str) -> None:
        super().__init__(usage=usage, description=text, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


def number(kind: type, least: float, most: float = math.inf, above: bool = False) -> Callable[[str], Any]:
    """Reads an option's number of a kind that is at least `least`, or `above` it, and at most `most`."""
    bound = f"{'above' if above else 'of at least'} {least:g}" + (f" and at most {most:g}" if most < math.inf else "")
    rule = f"must be a {'whole number' if kind is int else 'number'} {bound}"

    def read(text: str) -> Any:
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(text)
            if math.isfinite(value) and least <= value <= most and not (above and value == least):
                return value
        raise argparse.ArgumentTypeError(f"{text}: {rule}")

    return read


def choice(names: Iterable[str]) -> Callable[[str], str]:
    """Reads an option that is one of some names."""
    names = list(names)

    def read(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text}: must be one of {', '.join(names)}")
        return text

    return read


def table_text(columns: dict[str, str], rows: list[list[Any]]) -> str:
    """Columns with their formats over rows of numbers, texts, and None for nothing: words to the left, numbers to the
    right."""
    texts = [["-" if cell is None else cell if isinstance(cell, str) else format(cell, form)
              for cell, form in zip(row, columns.values(), strict=True)] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *texts, strict=True)]
    return "\n".join("  ".join(f"{cell:{'>' if form else '<'}{width}}" for cell, form, width in
                               zip(row, columns.values(), widths, strict=True)).rstrip()
                     for row in [list(columns), *texts])


def duration(seconds: float) -> str:
    """Seconds as 12 s, 3:05 or 2:03:05."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, hours = whole // 60, whole // 3600
    return f"{hours}:{minutes % 60:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
