"""Passages of text, Markdown and reStructuredText files: what ``semantic_search.py`` embeds."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

SUFFIXES = ".txt", ".md", ".rst"
MOST_WORDS = 120
"""In a passage, headings apart: with them it fits the 256 tokens that small embedding models read."""

FEW = 3
"""A passage takes in the next paragraph while it has less than one in so many of the words it may have."""

LETTERS = 10
"""Characters that count as a word where there are no spaces; a Chinese, Japanese or Korean one is a word."""

LONGEST_TITLE = 200
"""Characters in its line; what is longer is text."""

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\s\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
CUTS = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|(?<=[。！？])"), re.compile(r"\n"), re.compile(r"\s+")
"""Where a long paragraph is cut: ends of sentences, where that is not enough ends of lines, then spaces."""

FENCE = re.compile(r" {0,3}(```+|~~~+)")
HEADING = re.compile(r" {0,3}(#{1,6})\s+(.*)")
RULE = re.compile(r"([=\-~^\"'`#*+.:_])\1{2,}\s*$")
"""A line of one sign: under a title, or over and under it."""


class Title(NamedTuple):
    """A title's lines, ``start`` up to ``end`` (counted from 0), its level (the highest: 1) and its text."""

    start: int
    end: int
    level: int
    text: str


class Section(NamedTuple):
    """What lies under a title: the titles down to it, its line (from 1), paragraphs with their lines, and
    whether neither they nor titles of a lower level follow it.
    """

    titles: tuple[str, ...]
    line: int
    paragraphs: list[tuple[int, str]]
    is_leaf: bool


def read_folder(
    folder: Path, most_words: int = MOST_WORDS, strict: bool = False, leave: Sequence[Path] = ()
) -> dict[str, str]:
    """Passages of all files below a folder by their ids, such as ``notes/a.md:12``: path and line.

    Hidden files and folders are left out, and so are the folders of ``leave``. A file that is not UTF-8 text
    or cannot be read is named on standard error and left out, or with ``strict`` an error.

    Raises:
        SystemExit: no such folder, or nothing to read in it.
    """
    if not folder.is_dir():
        raise SystemExit(f"{folder} is {'a file' if folder.exists() else 'missing'}; name a folder of texts")
    found: dict[str, str] = {}
    files = sorted(_files(folder, {path.resolve() for path in leave}))
    for path in files:
        name = path.relative_to(folder).as_posix()
        try:
            name.encode()  # a name whose bytes are not UTF-8 cannot be stored as an id
            text = path.read_bytes().decode("utf-8-sig")
            if "\0" in text:
                raise ValueError("it holds NUL bytes")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 text: {error}"
            if strict:
                raise SystemExit(f"{name!a} cannot be read: {reason}") from None
            print(f"left out: {name!a}: {reason}", file=sys.stderr)
            continue
        found.update(passages(name, text, most_words))
    if not found:
        kinds = ", ".join("*" + suffix for suffix in SUFFIXES)
        raise SystemExit(f"{folder} holds no text to search: {len(files)} files of the kinds {kinds}")
    return found


def _files(folder: Path, leave: set[Path]) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        kept = (d for d in folders if d[0] != "." and (Path(root) / d).resolve() not in leave)
        folders[:] = sorted(kept)
        yield from (Path(root) / n for n in names if n[0] != "." and n.lower().endswith(SUFFIXES))


def passages(name: str, text: str, most_words: int = MOST_WORDS) -> Iterator[tuple[str, str]]:
    """(id, text) of a file's passages: paragraphs under the same titles, short ones joined, long ones cut.

    The titles stand in the first line of each, as in ``Guide > Install``, so that they are embedded with it.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    used: dict[int, int] = {}
    for section in _sections(lines, name[name.rfind(".") :].lower()):
        context = " > ".join(section.titles)
        for line, body in _joined(section.paragraphs, most_words) or [(section.line, "")]:
            if not body and not (section.is_leaf and context):
                continue
            used[line] = used.get(line, 0) + 1
            again = f"#{used[line]}" if used[line] > 1 else ""  # several passages of one long line
            yield f"{name}:{line}{again}", "\n".join(part for part in (context, body) if part)


def _sections(lines: Sequence[str], suffix: str) -> Iterator[Section]:
    find = {".md": _markdown_titles, ".rst": _rst_titles}.get(suffix)
    end = Title(len(lines), len(lines), 0, "")
    above: list[Title] = []
    for title, following in pairwise([Title(0, 0, 0, ""), *(find(lines) if find else ()), end]):
        if title.level:
            above = [*(t for t in above if t.level < title.level), title]
        found = list(_paragraphs(lines, title.end, following.start))
        is_leaf = title.level > 0 and following.level <= title.level
        yield Section(tuple(t.text for t in above if t.text), title.start + 1, found, is_leaf)


def _paragraphs(lines: Sequence[str], start: int, end: int) -> Iterator[tuple[int, str]]:
    """(number of the first line, text) of what lies between blank lines and holds a letter or digit."""
    for blank, group in groupby(range(start, end), key=lambda n: not lines[n].strip()):
        numbers = list(group)
        text = "\n".join(lines[n].rstrip() for n in numbers)
        if not blank and re.search(r"\w", text):
            yield numbers[0] + 1, text


def _markdown_titles(lines: Sequence[str]) -> Iterator[Title]:
    fence, start = "", 0
    if lines[0].rstrip() == "---":  # settings, up to the next such line
        start = next((n for n, line in enumerate(lines[1:], 2) if line.rstrip() == "---"), 0)
    for n, line in enumerate(lines[start:], start):
        mark, heading = FENCE.match(line), HEADING.match(line)
        if mark and (not fence or mark[1].startswith(fence)):
            fence = "" if fence else mark[1]
        elif fence:
            continue
        elif heading and len(line) <= LONGEST_TITLE:
            yield Title(n, n + 1, len(heading[1]), heading[2].rstrip("# "))
        elif n > start and line[:1] in ("=", "-") and _underlines(lines, n):
            yield Title(n - 1, n + 1, 1 + (line[0] == "-"), lines[n - 1].strip())


def _rst_titles(lines: Sequence[str]) -> Iterator[Title]:
    styles: list[tuple[str, bool]] = []  # sign and whether there is a line over the title too: first, level 1
    for n, line in enumerate(lines):
        if _underlines(lines, n) and len(line.rstrip()) >= len(lines[n - 1].strip()):
            over = n > 1 and bool(RULE.match(lines[n - 2]))
            if (line[0], over) not in styles:
                styles.append((line[0], over))
            yield Title(n - 1 - over, n + 1, styles.index((line[0], over)) + 1, lines[n - 1].strip())


def _underlines(lines: Sequence[str], n: int) -> bool:
    """Whether a line is the rule under a title of one line."""
    if n == 0 or not RULE.match(lines[n]) or not lines[n - 1].strip() or RULE.match(lines[n - 1]):
        return False
    if len(lines[n - 1]) > LONGEST_TITLE:
        return False
    return n == 1 or not lines[n - 2].strip() or bool(RULE.match(lines[n - 2]))


def _joined(paragraphs: Sequence[tuple[int, str]], most: int) -> list[tuple[int, str]]:
    """(line, text) of passages of at most so many words."""
    found: list[tuple[int, str]] = []
    for line, text in paragraphs:
        for piece in cut(text, most):
            joined = f"{found[-1][1]}\n\n{piece}".rstrip() if found else ""
            if found and size(found[-1][1]) * FEW < most and size(joined) <= most:
                found[-1] = found[-1][0], joined
            elif piece.strip():
                found.append((line + _leading(piece), piece.strip("\n").rstrip()))
            line += piece.count("\n")
    return found


def _leading(text: str) -> int:
    """Blank lines at the start."""
    return text[: len(text) - len(text.lstrip())].count("\n")


def cut(text: str, most: int, cuts: Sequence[re.Pattern[str]] = CUTS) -> list[str]:
    """Pieces of at most so many words; put together they are the text."""
    if size(text) <= most:
        return [text]
    if not cuts:
        return [text[i : i + most] for i in range(0, len(text), most)]
    ends = [0, *(m.end() for m in cuts[0].finditer(text)), len(text)]
    pieces = [""]
    for start, end in pairwise(ends):
        for unit in cut(text[start:end], most, cuts[1:]):
            if size(pieces[-1] + unit) <= most:
                pieces[-1] += unit
            else:
                pieces.append(unit)
    return [piece for piece in pieces if piece]


def size(text: str) -> int:
    """Words, with a long run of letters counted as several."""
    return max(len(WORD.findall(text)), len(text) // LETTERS)
