"""Texts to token ids by a tokenizer's Rust part: the same as ``preprocess``, without its Python lists."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from .normalizer import BertNormalizer

_NO_LIMIT = 10**20
"""transformers' number for "any length", if a tokenizer names none."""
CHARACTERS = 6
"""A long text is first cut to this many characters per token of the maximum (English has 4 to 5). Few texts
must then be tokenized again, whole.
"""
_LOCAL = ("BertPreTokenizer", "ByteLevel", "Metaspace", "WhitespaceSplit", "Whitespace(")
"""Rust's pre-tokenizers that never join words across a space."""


class Tokens(NamedTuple):
    """Texts end to end: ids, int32 [tokens], and the number of tokens of each text, int64 [texts]."""

    ids: np.ndarray
    lengths: np.ndarray


class FastTokenizer:
    """A copy of a tokenizer's Rust part. It truncates like the tokenizer and never pads.

    It is a copy because other code may use the tokenizer meanwhile and change its padding. Threads may share
    it.

    Args:
        tokenizer: a tokenizer of transformers, with a Rust part.
        max_length: most tokens of a text, special ones included; None: any number.

    Raises:
        ValueError: the tokenizer gives other ids than its Rust part.
    """

    def __init__(self, tokenizer: Any, max_length: int | None) -> None:
        self.state = _state(tokenizer)
        self._rust = copy.deepcopy(tokenizer.backend_tokenizer)
        self._rust.no_padding()
        self._rust.no_truncation()
        self._rust.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
        side = getattr(tokenizer, "truncation_side", "right")
        self._before, self._after = _around(self._rust)
        added = len(self._before) + len(self._after)
        if max_length is not None and max_length <= added:  # then Rust decides which special tokens stay
            self._before, self._after, added = [], [], 0
        self._specials = not added  # whether Rust adds them; that takes a tenth longer
        self._most = None if max_length is None else max_length - added
        if self._most is not None:
            self._rust.enable_truncation(self._most, stride=0, strategy="longest_first", direction=side)
        self._max_length = max_length
        # characters after this many are always cut by max_length
        self._characters = (
            CHARACTERS * max_length if max_length and side == "right" and _local(self._rust) else 0
        )
        self._normalizer = BertNormalizer.of(self._rust)
        self._check(tokenizer)

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Tokens of strings, with special tokens, truncated.

        Raises:
            TypeError: a string that Rust does not take, such as one with lone surrogates.
        """
        most = self._characters or sys.maxsize
        cut = [text if len(text) <= most else self._cut(text) for text in texts]
        ids = self._ids(cut)
        short = [i for i, t in enumerate(cut) if t is not texts[i] and len(ids[i]) < (self._most or 0)]
        for i, whole in zip(short, self._ids([texts[i] for i in short])):
            ids[i] = whole
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return self._with_specials(
            np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths
        )

    def _with_specials(self, ids: np.ndarray, lengths: np.ndarray) -> Tokens:
        """The texts with the special tokens before and after each."""
        before, after = len(self._before), len(self._after)
        if not before + after:
            return Tokens(ids, lengths)
        whole = lengths + before + after
        ends = np.cumsum(whole)
        out = np.empty(int(whole.sum()), np.int32)
        places = np.arange(len(ids)) + np.repeat(np.arange(len(lengths)) * (before + after) + before, lengths)
        out[places] = ids
        out[(ends - whole)[:, None] + np.arange(before)] = self._before
        out[(ends - after)[:, None] + np.arange(after)] = self._after
        return Tokens(out, whole)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        if self._normalizer is None:
            return self._by(self._rust, texts)
        done = self._normalizer(texts)
        others = [i for i, text in enumerate(done) if text is None]
        kept = [text for text in done if text is not None]
        ids = self._by(self._normalizer.rust, kept)
        if others:
            known, slow = iter(ids), iter(self._by(self._rust, [texts[i] for i in others]))
            ids = [next(slow) if text is None else next(known) for text in done]
        return ids

    def _by(self, rust: Any, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in rust.encode_batch_fast(texts, add_special_tokens=self._specials)]

    def _cut(self, text: str) -> str:
        """The text cut at a space between words, after all tokens that can count, or the whole text."""
        end = self._characters
        for _ in range(8):
            end = text.rfind(" ", 1, end)
            if end < 0:
                return text
            around = text[end - 1] + text[end + 1 : end + 2]
            if len(around) == 2 and around.isascii() and around.isalnum():
                return text[:end]
        return text

    def _check(self, tokenizer: Any) -> None:
        probes = [
            "",
            " a  b ",
            "Hello, World! It's 3.14 [SEP] </s> <s>",
            "Ünïcode Ωσς İ ﬁ 北京 мир e\u0301\x00\x07\n\t\u200b😀",
        ]
        most = min(self._max_length or 64, 512)
        probes += ["Zebra-crossings, naïve " * most + "end", f"{'x' * 7 * most} and a word"]
        options = (
            {}
            if self._max_length is None
            else {"truncation": "longest_first", "max_length": self._max_length}
        )
        expected = tokenizer(probes, padding=False, return_attention_mask=False, **options)
        tokens = self(probes)
        types = expected.get("token_type_ids") or []
        if tokens.ids.tolist() != list(chain.from_iterable(expected["input_ids"])) or any(map(any, types)):
            raise ValueError("its tokenizer gives other ids than its Rust part alone")


def _around(rust: Any) -> tuple[list[int], list[int]]:
    """The special tokens before and after every text; none if Rust has to add them."""
    alone, whole = rust.encode("a", add_special_tokens=False).ids, rust.encode("a").ids
    for i in range(len(whole) - len(alone) + 1):
        before, after = whole[:i], whole[i + len(alone) :]
        if alone and whole[i : i + len(alone)] == alone and rust.encode("").ids == before + after:
            return before, after
    return [], []


def _local(rust: Any) -> bool:
    kind = str(rust.pre_tokenizer)
    return any(name in kind for name in _LOCAL) and "split=False" not in kind


def _state(tokenizer: Any) -> tuple[Any, ...]:
    """The settings that a copy of the Rust part depends on. It is cheap, for a check before every use."""
    rust = tokenizer.backend_tokenizer
    return (
        rust,
        len(tokenizer),
        str(rust.post_processor),
        getattr(tokenizer, "truncation_side", "right"),
        getattr(tokenizer, "split_special_tokens", False),
    )


_tokenizers: WeakKeyDictionary[Any, dict[int | None, FastTokenizer]] = WeakKeyDictionary()
_making = threading.Lock()


def fast_tokenizer(transformer: Any, task: str | None = None) -> FastTokenizer | str:
    """For a Transformer module of sentence-transformers, or a string that says why it needs ``preprocess``.

    Args:
        transformer: the module.
        task: "query", "document" or None: some models truncate these differently.
    """
    if why := _unlike(transformer, task):
        return why
    tokenizer = transformer.tokenizer
    limit = {"query": "query_length", "document": "document_length"}.get(task or "")
    max_length = getattr(transformer, limit, None) if limit else None
    if max_length is None and (tokenizer.model_max_length or 0) < _NO_LIMIT:
        max_length = tokenizer.model_max_length
    with _making:
        of_this_one = _tokenizers.setdefault(tokenizer, {})
        known = of_this_one.get(max_length)
        state = _state(tokenizer)
        if known is None or known.state[0] is not state[0] or known.state[1:] != state[1:]:
            try:
                known = of_this_one[max_length] = FastTokenizer(tokenizer, max_length)
            except ValueError as error:
                return str(error)
    return known


def _unlike(transformer: Any, task: str | None) -> str:
    """Why a Transformer module needs more than its tokenizer's Rust part, or an empty string."""
    from sentence_transformers.base.modules import Transformer

    tokenizer = getattr(transformer, "tokenizer", None)
    if type(transformer) is not Transformer or "preprocess" in vars(transformer):
        return f"its first module is a {type(transformer).__name__}"
    if not getattr(tokenizer, "is_fast", False) or transformer.processor is not tokenizer:
        return "its tokenizer is not a fast one (Rust)"
    modalities = transformer.modality_config
    if "message" in modalities or modalities.get("text", {}).get("method") != "forward":
        return "its texts go through a chat template or a method of the model's own"
    if transformer.processing_kwargs:
        return "it has processing_kwargs"
    if transformer.can_flatten_inputs:
        return "sentence-transformers packs its texts for flash attention"
    if task == "query" and getattr(transformer, "query_expansion", None) is not None:
        return "it expands queries"
    if _overridden(tokenizer):
        return f"a {type(tokenizer).__name__} does more than its Rust part"
    return ""


def _overridden(tokenizer: Any) -> bool:
    from transformers import PreTrainedTokenizerFast

    names = ("__call__", "_encode_plus", "_batch_encode_plus", "set_truncation_and_padding", "_call_one")
    kind, base = type(tokenizer), PreTrainedTokenizerFast
    return any(getattr(kind, n, None) is not getattr(base, n, None) or n in vars(tokenizer) for n in names)
