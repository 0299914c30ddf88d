"""Batches of texts of one length or padded to one, for CPUs and for models without a packed form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..modes import without_cudnn_attention
from .tokens import FastTokenizer, Tokens


class Padded:
    """Texts of one call as batches, and their vectors.

    On a CPU each core, up to 8, runs a batch of its own: small models gain nothing from several cores in one
    layer. Texts of one length share a batch there and nothing is padded, so a text's vector does not depend
    on the texts beside it.

    Args:
        model: the model.
        tokenizer: the Rust part of its tokenizer.
        prompt: put before every text.
        task: passed to the modules.
        tokens: most in a batch, unless one text has more; None: 1,024 on a CPU and 16,384 on a GPU.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: FastTokenizer,
        prompt: str,
        task: str | None,
        tokens: int | None,
    ) -> None:
        self.model, self.tokenizer, self.prompt, self.task = model, tokenizer, prompt, task
        self.on_cpu = model.device.type == "cpu"
        self.workers = min(8, torch.get_num_threads()) if self.on_cpu else 1
        self.tokens = tokens or (1024 if self.on_cpu else 16384)
        self.chunk = 1024 if self.on_cpu else 8192
        # on a GPU shorter texts join a batch if they add at most this much padding: it is worth a batch less
        self.round_to, self.most_padding = (1, 0) if self.on_cpu else (8, 1024)
        transformer = model[0]
        self.side, pad = model.tokenizer.padding_side, model.tokenizer.pad_token_id
        self.pad = 0 if pad is None else pad
        self.types = "token_type_ids" in model.tokenizer.model_input_names
        self.features: dict[str, Any] = {"modality": "text"}
        if prompt:
            own = {} if task is None else {"task": task}
            self.features["prompt_length"] = transformer._get_prompt_length(prompt, **own)

    def batches(self, texts: Sequence[str]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Numbers of texts and their features, longest texts first, so a lack of memory shows at once."""
        order = np.argsort([-len(text) for text in texts], kind="stable")
        for start in range(0, len(order), self.chunk):
            numbers = order[start : start + self.chunk]
            chunk: list[int] = numbers.tolist()
            tokens = self.tokenizer([self.prompt + texts[i] for i in chunk])
            for rows, width in self._groups(tokens.lengths):
                yield torch.from_numpy(numbers[rows]), self._features(tokens, rows, width)

    def _groups(self, lengths: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """Texts that share a batch, longest first, and the width of the batch."""
        longest_of_all = int(max(lengths, default=0))
        limit = max(longest_of_all, min(self.model.max_seq_length or 0, 1 << 20))
        rounded = np.minimum(-(-lengths // self.round_to) * self.round_to, limit)
        by_length = np.argsort(-rounded, kind="stable")
        cuts = np.flatnonzero(np.diff(rounded[by_length])) + 1
        group: list[np.ndarray] = []
        for same in np.split(by_length, cuts):
            if group and (rounded[group[0][0]] - rounded[same[0]]) * len(same) > self.most_padding:
                yield from self._parts(np.concatenate(group), lengths, rounded)
                group = []
            group.append(same)
        if len(lengths):
            yield from self._parts(np.concatenate(group), lengths, rounded)

    def _parts(
        self, group: np.ndarray, lengths: np.ndarray, rounded: np.ndarray
    ) -> Iterator[tuple[np.ndarray, int]]:
        texts = max(1, self.tokens // max(int(rounded[group[0]]), 1))
        # padding on the left may move positions, so no more is added than the longest text needs
        widths = rounded if self.side == "right" else lengths
        for first in range(0, len(group), texts):
            part = group[first : first + texts]
            yield part, int(widths[part].max())

    def _features(self, tokens: Tokens, rows: np.ndarray, width: int) -> dict[str, Any]:
        starts = np.cumsum(tokens.lengths) - tokens.lengths
        lengths = tokens.lengths[rows, None]
        columns = np.arange(width)[None, :] - (0 if self.side == "right" else width - lengths)
        mask = (columns >= 0) & (columns < lengths)
        ids = np.full(mask.shape, self.pad, np.int64)
        ids[mask] = tokens.ids[(starts[rows, None] + columns)[mask]]
        tensors = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
        }
        if self.types:
            tensors["token_type_ids"] = torch.zeros_like(tensors["input_ids"])
        return {k: t if self.on_cpu else t.pin_memory() for k, t in tensors.items()} | self.features

    def vectors(self, batch: dict[str, Any]) -> Tensor:
        """[texts, width], in the model's dtype."""
        own = {} if self.task is None else {"task": self.task}
        if self.on_cpu:
            return self.model(dict(batch), **own)["sentence_embedding"]
        device = self.model.device
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        with without_cudnn_attention():
            return self.model(moved, **own)["sentence_embedding"]
