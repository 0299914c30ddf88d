"""The vocabulary of a model in llama.cpp's form."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

from ..errors import TriternError

QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""The regular expression that llama.cpp calls "qwen2"."""


def _token_types(gguf: ModuleType, tokenizer: Any, size: int) -> tuple[list[str], list[int]]:
    """Texts and types of the tokens in order of their ids, padded to ``size``."""
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    added, types = tokenizer.added_tokens_decoder, gguf.TokenType
    kinds = [
        types.UNUSED if i not in texts
        else types.NORMAL if i not in added
        else types.CONTROL if added[i].special
        else types.USER_DEFINED
        for i in range(size)
    ]  # fmt: skip
    return [texts.get(i, f"[PAD{i}]") for i in range(size)], kinds


def add_wordpiece(gguf: ModuleType, writer: Any, tokenizer: Any, config: Any) -> None:
    """Write a BERT vocabulary of word pieces."""
    settings = _tokenizer_settings(tokenizer)
    normalizer = settings["normalizer"] or {}
    lower, accents = normalizer.get("lowercase"), normalizer.get("strip_accents")
    if settings["model"]["type"] != "WordPiece" or not lower or accents is False:
        raise TriternError(
            f"a BERT for llama.cpp must have a WordPiece tokenizer in lower case and without accents; this "
            f"one is {settings['model']['type']}, lowercase={lower}, strip_accents={accents}"
        )
    texts, kinds = _token_types(gguf, tokenizer, config.vocab_size)
    # llama.cpp marks the start of a word, WordPiece its continuation
    words = [
        text if kind == gguf.TokenType.CONTROL else text[2:] if text.startswith("##") else "\u2581" + text
        for text, kind in zip(texts, kinds)
    ]
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(tokenizer.cls_token_id)
    writer.add_sep_token_id(tokenizer.sep_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_mask_token_id(tokenizer.mask_token_id)


def add_bpe(gguf: ModuleType, writer: Any, tokenizer: Any, config: Any) -> None:
    """Write a vocabulary of byte pairs with its merges."""
    settings = _tokenizer_settings(tokenizer)
    pattern = json.dumps(QWEN2_WORDS)[1:-1]
    if settings["model"]["type"] != "BPE" or pattern not in json.dumps(settings["pre_tokenizer"]):
        raise TriternError("a Qwen3 for llama.cpp must have Qwen2's BPE tokenizer; this one is another")
    texts, kinds = _token_types(gguf, tokenizer, config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in settings["model"]["merges"]])
    last = tokenizer("a")["input_ids"][-1]  # Qwen3-Embedding ends texts with <|endoftext|> and pools there
    ends = kinds[last] == gguf.TokenType.CONTROL
    writer.add_eos_token_id(last if ends else tokenizer.eos_token_id)
    writer.add_add_eos_token(ends)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)


def _tokenizer_settings(tokenizer: Any) -> dict[str, Any]:
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise TriternError(f"export_gguf needs a fast tokenizer; received {type(tokenizer).__name__}")
    return json.loads(tokenizer.backend_tokenizer.to_str())
