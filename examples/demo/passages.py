"""Texts for the quickstart: docstrings of the installed Python, or the lines of a file."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

MIN_TEXTS = 100
UNWANTED = {"site-packages", "dist-packages", "test", "tests", "testing", "idlelib", "turtledemo"}
NOT_PROSE = re.compile(r"::|://|[|{}<>\\]|==|--|\w=|^\s|^[-*+•#.:@]|^\d+[.)]", re.MULTILINE)
MARKUP = re.compile(r":[\w:]+:(?=`)|`+[~!]?|(?<!\w)\*+(?=\w)|(?<=\w)\*+(?!\w)")


def prose(docstring: str) -> Iterator[str]:
    """Paragraphs that read as sentences, on one line each, 40 to 600 characters; no code, lists or tables."""
    for paragraph in re.split(r"\n\s*\n", MARKUP.sub("", docstring)):
        line = " ".join(paragraph.split())
        if len(line) > 600:
            line = line[: line.rfind(". ", 0, 600) + 1]
        letters = sum(c.isalpha() or c == " " for c in line) >= 0.9 * len(line)
        if len(line) >= 40 and line[-1] in ".!?" and letters and not NOT_PROSE.search(paragraph):
            yield line


def docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of a module, class or function and of what is defined directly in it."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        yield name, ast.get_docstring(node) or ""
        for child in node.body:
            yield from docstrings(child, f"{name}.{getattr(child, 'name', '')}")


def python_passages(enough: int) -> dict[str, str]:
    """Passage -> ``json.decoder.JSONDecoder`` or the like: the standard library, then package by package."""
    library, installed = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    packages = sorted((p for p in installed.glob("*") if p.is_dir()), key=lambda p: p.name.lower())
    found: dict[str, str] = {}
    for root in [library, *packages]:
        for file in sorted(root.rglob("*.py")) if len(found) < enough else ():
            parts = file.relative_to(library if root == library else installed).with_suffix("").parts
            if UNWANTED.isdisjoint(parts):
                try:
                    tree = ast.parse(file.read_bytes())
                except (OSError, SyntaxError, ValueError, RecursionError):
                    continue
                for name, docstring in docstrings(tree, ".".join(parts).removesuffix(".__init__")):
                    for text in prose(docstring):
                        found.setdefault(text, name)
    return found


def file_passages(path: Path) -> dict[str, str]:
    """Line -> its number, for the different lines of a UTF-8 file."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        raise SystemExit(f"--texts must name a UTF-8 text file; {path}: {error}") from None
    return {" ".join(line.split()): f"line {n}" for n, line in enumerate(lines, 1) if line.strip()}


def shuffled(found: dict[str, str], limit: int, seed: int) -> tuple[list[str], list[str]]:
    """At most ``limit`` passages and their origins, in random order; those of one docstring stay together."""
    if len(found) < MIN_TEXTS:
        raise SystemExit(
            f"found {len(found)} different passages; at least {MIN_TEXTS} are needed (see --texts)"
        )
    texts = sorted(found, key=lambda text: random.Random(f"{seed} {found[text]}").random())[:limit]
    return texts, [found[text] for text in texts]
