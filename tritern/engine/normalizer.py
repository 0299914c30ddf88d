"""BERT's text normalizer in Python, for texts where Python is faster and gives the same characters."""

from __future__ import annotations

import copy
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any


class BertNormalizer:
    """BERT's normalizer in Python for simple texts. (In Rust it takes a third of the tokenizer's time.)

    ASCII is lowered by Python. Every other character is normalized alone by Rust, once, and then kept.
    ``rust`` tokenizes the result.
    """

    def __init__(self, rust: Any, known: Any) -> None:
        self.rust = rust
        self._ask: Callable[[str], str] = known.normalize_str
        self._lower = bool(known.lowercase)
        self._others = re.compile(r"[^\x20-\x7e]")
        self._known: dict[str, str | None] = {}
        self._special = [t.content for t in rust.get_added_tokens_decoder().values()]
        starts = {content[:1] for content in self._special}
        self._start = starts.pop() if len(starts) == 1 else ""  # "" is in every text

    @classmethod
    def of(cls, rust: Any) -> BertNormalizer | None:
        """For a Rust tokenizer; None if it has another normalizer or finds added tokens after normalizing."""
        from tokenizers import normalizers

        known = rust.normalizer
        added = rust.get_added_tokens_decoder().values()
        if type(known) is not normalizers.BertNormalizer or any(t.normalized for t in added):
            return None
        plain = copy.deepcopy(rust)
        plain.normalizer = normalizers.Sequence([])
        return cls(plain, known)

    def __call__(self, texts: Sequence[str]) -> list[str | None]:
        """The texts as Rust would normalize them; None for one that Rust must do (it has a special token)."""
        start, lower = self._start, self._lower
        return [
            (text.lower() if lower else text)
            if text.isascii() and text.isprintable() and start not in text
            else self._slowly(text)
            for text in texts
        ]

    def _slowly(self, text: str) -> str | None:
        lower = text.lower()
        if any(content in text or content in lower for content in self._special):
            return None
        try:
            text = self._others.sub(self._one, text)
        except _Unsafe:
            return None
        return text.lower() if self._lower else text

    def _one(self, match: re.Match[str]) -> str:
        character = match.group()
        if character not in self._known:
            given = self._ask(character)
            # unsafe: marks can change places among others; Python and Rust can lower characters differently
            safe = given.lower() == given or not self._lower
            self._known[character] = given if safe and not any(map(unicodedata.combining, given)) else None
        known = self._known[character]
        if known is None:
            raise _Unsafe
        return known


class _Unsafe(Exception):
    """A character's normal form depends on its neighbours."""
