"""CaseOps: letter case moved out of the words into control characters, so that The, THE and the share their pieces.

The bijection `lossless_caps_caseops_v1` of the challenge's CaseOps tokenizers (its encoder "v2"), written from its
description. Four private-use characters, each a piece of its own in the tokenizer:

    U+E001 TITLE     the word that follows has a capital first letter
    U+E002 ALLCAPS   the word that follows, of two letters or more, is all capitals
    U+E003 CAPNEXT   the letter that follows, inside a word, is a capital
    U+E004 ESC       the control character that follows is one of the text itself

A word is a maximal run of ASCII letters. All lowercase: unchanged. All capitals, two letters or more: ALLCAPS and the
word in lowercase. A capital and then only lowercase letters, or none: TITLE and the word in lowercase. Any other: TITLE
if its first letter is a capital, the letters in lowercase, CAPNEXT before each later capital. Every other character,
letters beyond ASCII among them, stays as it is, but one of the four gets ESC before it.

    The NASA Launch -> <T>the <A>nasa <T>launch        iPhone OpenAI -> i<C>phone <T>open<C>a<C>i
"""

from __future__ import annotations

import re

import numpy as np

TRANSFORM = "lossless_caps_caseops_v1"
TITLE, ALLCAPS, CAPNEXT, ESC = CONTROLS = "\ue001\ue002\ue003\ue004"
NAMES = dict(zip(CONTROLS, ("TITLE", "ALLCAPS", "CAPNEXT", "ESC"), strict=True))
FIRST_ID = 4  # the four are the pieces 4 to 7 of a CaseOps tokenizer

# A match starts at the first capital of its word, for an earlier one would have started it.
_CAPITALS = re.compile(f"[A-Z][A-Za-z]*|[{CONTROLS}]")
_CAPNEXT = {code: CAPNEXT + chr(code).lower() for code in range(ord("A"), ord("Z") + 1)}
_MARKED = re.compile(f"{ESC}(.?)|{ALLCAPS}([A-Za-z]*)|[{TITLE}{CAPNEXT}]([A-Za-z]?)")
_ESCAPED = re.compile(f"{ESC}([{CONTROLS}])")


class CaseError(ValueError):
    """A text that is not what was expected; the message names the position (in characters, from 0) and the rule."""


def encode(text: str) -> str:
    """The text with its ASCII capitals and control characters replaced as the module says; any str is allowed."""
    return _CAPITALS.sub(_mark, text)


def _mark(match: re.Match[str]) -> str:
    """What stands for a control character, or for a word from its first capital on."""
    word, start = match[0], match.start()
    if word in NAMES:
        return ESC + word
    if start and "a" <= match.string[start - 1] <= "z":
        return word.translate(_CAPNEXT)
    if len(word) == 1 or word[1:].islower():
        return TITLE + word.lower()
    if word.isupper():
        return ALLCAPS + word.lower()
    return TITLE + word[0].lower() + word[1:].translate(_CAPNEXT)


def decode(text: str, strict: bool = True) -> str:
    """The text whose encoding `text` is.

    Strictly, exactly the results of `encode` are accepted; any other text raises CaseError with position and rule.
    Without `strict` nothing raises: a marker applies to the letters behind it, if there are any, and ESC to whatever is
    behind it. That is for text that a lossy tokenizer has changed (NFKC alone makes letters that encode never saw) or
    that a model made up.
    """
    found = _MARKED.sub(_restore, text)
    if strict and encode(found) != text:
        decode_plainly(text)
        raise AssertionError("decode and decode_plainly differ")  # a defect of this module: a law of the tests
    return found


def _restore(match: re.Match[str]) -> str:
    """What a marker and the letters it applies to stand for."""
    escaped, word, letter = match.groups()
    return (word or letter or "").upper() if escaped is None else escaped


def decode_plainly(text: str) -> str:
    """The same as strict `decode`, one character at a time: the state machine that names position and rule."""
    decoded = []
    pending, at = "", 0  # the control character whose character has yet to come, and its position
    opening, word_at, letters, capitals = "", 0, 0, 0  # the current word: its first marker, place and counts

    def fail(position: int, rule: str) -> None:
        raise CaseError(f"position {position}: {rule}")

    def end_word() -> None:
        if opening == ALLCAPS and letters == 1:
            fail(word_at, "ALLCAPS before a word of one letter, which takes TITLE")
        if opening != ALLCAPS and 2 <= letters == capitals:
            fail(word_at, "a word all of whose letters are capitals takes ALLCAPS")

    for position, character in enumerate(text):
        if pending == ESC:
            if character not in NAMES:
                fail(at, f"ESC must stand before a control character, not before {character!r}")
            decoded.append(character)
            pending = ""
        elif "a" <= character <= "z":
            if not letters:
                opening, word_at = pending, at if pending else position
            capital = bool(pending) or opening == ALLCAPS
            decoded.append(character.upper() if capital else character)
            pending, letters, capitals = "", letters + 1, capitals + capital
        elif "A" <= character <= "Z":
            fail(position, f"{character!r}, but encoded text has no ASCII capital")
        elif pending:
            fail(at, f"{NAMES[pending]} must stand before a lowercase ASCII letter, not before {character!r}")
        elif character in (TITLE, ALLCAPS):
            if letters:
                fail(position, f"{NAMES[character]} inside a word")
            pending, at = character, position
        elif character == CAPNEXT:
            if not letters:
                fail(position, "CAPNEXT outside a word, whose first capital takes TITLE")
            if opening == ALLCAPS:
                fail(position, "CAPNEXT inside a word of ALLCAPS")
            pending, at = character, position
        else:
            end_word()
            letters = capitals = 0
            if character == ESC:
                pending, at = ESC, position
            else:
                decoded.append(character)
    if pending:
        fail(at, f"{NAMES[pending]} at the end of the text")
    end_word()
    return "".join(decoded)


def character_bytes(text: str) -> np.ndarray:
    """UTF-8 bytes of the original text that each character of the encoded `text` stands for, int64 (len(text),).

    A marker and ESC stand for none, every other character for its own, so the sum is the original text's length.
    Raises CaseError at half of a surrogate pair.
    """
    try:
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    except UnicodeEncodeError as error:
        raise CaseError(f"position {error.start}: half of a surrogate pair, which is no text") from None
    sizes = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    counted = (codes < ord(TITLE)) | (codes > ord(ESC))
    counted[[match.start(1) for match in _ESCAPED.finditer(text)]] = True
    return sizes * counted


def piece_bytes(text: str, ends: np.ndarray) -> np.ndarray:
    """UTF-8 bytes of the original text that each piece of the encoded `text` stands for, int64 (pieces,).

    `ends` (pieces,), not decreasing, has the end of each piece's surface in characters. A piece begins where the one
    before it ends, the first at 0, and the last goes on to the end of the text: what no surface covers (SentencePiece
    drops white space at the ends of a text) falls to the piece behind it, or else to the last. With one piece or more
    the sum is the original text's length. Raises CaseError where `ends` are no ends of pieces of this text.
    """
    if not len(ends):
        return np.zeros(0, np.int64)
    bounds = np.concatenate([[0], ends[:-1], [len(text)]])
    if ends[-1] > len(text) or (np.diff(bounds) < 0).any():
        raise CaseError(f"the ends of the pieces are not in order within the {len(text)} characters of the text")
    return np.diff(np.concatenate([[0], np.cumsum(character_bytes(text))])[bounds])
