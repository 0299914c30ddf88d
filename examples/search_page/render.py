"""Passages as HTML for the page: Markdown rendered, everything else escaped, the question's words marked."""

from __future__ import annotations

import html
import re

try:
    from markdown_it import MarkdownIt
except ImportError:  # passages are then shown as plain text
    MarkdownIt = None

COMMON = frozenset(
    "a an and are as at be by can do does for from how i if in is it its me my of on or our that the their "
    "this to was we what when where which who why will with you your".split()
)
"""Words of a question that are not marked."""

FENCE = re.compile(r"^ {0,3}(?:```+|~~~+)(.*)$", re.MULTILINE)
NO_TITLE = re.compile(r"\s|```|~~~|---|[-*+>|] |#+ |\d+[.)] ")
"""How a first line begins that is Markdown and not the titles that ``documents.passages`` puts there."""


def render(id: str, text: str, query: str = "") -> str:
    """Safe HTML of a passage: no tag of it comes from the text."""
    name = re.sub(r":\d+(#\d+)?$", "", id).lower()
    title, body = split_title(name, text)
    made = f"<h3>{html.escape(title.replace('`', ''))}</h3>" if title else ""
    if body and MarkdownIt is not None and name.endswith(".md"):
        made += _markdown(body)
    elif body:
        made += f'<p class="plain">{html.escape(body)}</p>'
    return mark(made, query)


def split_title(name: str, text: str) -> tuple[str, str]:
    """(titles, body) of a passage of a file; titles are empty where its first line is none."""
    title, _, body = text.partition("\n")
    if not name.lower().endswith((".md", ".rst")) or NO_TITLE.match(title) or title[-1:] in (".", ",", ":"):
        return "", text
    return title, body


def mark(made: str, query: str) -> str:
    """The HTML with the question's words in ``<mark>``; tags and their attributes stay as they are."""
    words = {_stem(word) for word in re.findall(r"\w+", query)} - COMMON
    parts = re.split(r"(<[^>]*>)", made)  # texts, with a tag between two
    parts[::2] = [
        "".join(_marked(p, words) for p in re.split(r"(\w+)", html.unescape(t))) for t in parts[::2]
    ]
    return "".join(parts)


def _marked(part: str, words: set[str]) -> str:
    escaped = html.escape(part)
    return f"<mark>{escaped}</mark>" if part and _stem(part) in words else escaped


def _stem(word: str) -> str:
    word = word.casefold()
    return word[:-1] if len(word) > 3 and word.endswith("s") else word


def _markdown(text: str) -> str:
    fences = FENCE.findall(text)
    if len(fences) % 2 and not fences[0].strip():  # the passage begins inside a block of code
        text = f"```\n{text}"
    assert MarkdownIt is not None
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    for rule in ("link_open", "link_close"):  # the text of a link: its target means nothing on this page
        parser.add_render_rule(rule, lambda *_: "")
    parser.add_render_rule("image", lambda self, tokens, n, *_: html.escape(tokens[n].content))
    return parser.render(text)
