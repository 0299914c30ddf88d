"""Texts to train on: their selection and their order."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.sampler import SetEpochMixin
from torch import Tensor
from torch.utils.data import BatchSampler
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..errors import TriternError
from ..inputs import check_texts, many

logger = logging.getLogger(__name__)

_SHORTEST = 3
JOINED_RATIO = 0.05
"""Share of training texts that join several lines. These are longer than most lines."""


def clean(texts: Iterable[str], least: int) -> list[str]:
    """The stripped texts, without empty, very short and repeated ones.

    Raises:
        TriternError: not an iterable of strings, or fewer than ``least`` texts are left.
    """
    texts = list(many(texts, "texts"))
    check_texts(texts, empty=True)
    stripped = (text.strip() for text in texts)
    kept = list(dict.fromkeys(text for text in stripped if len(text) >= _SHORTEST))
    if out := len(texts) - len(kept):
        logger.warning("left out %d texts that are empty, below %d characters or repeated", out, _SHORTEST)
    if len(kept) < least:
        raise TriternError(
            f"distillation needs at least {least} different texts of {_SHORTEST} characters or more; "
            f"received {len(kept)} (of {len(texts)}). Lower per_device_train_batch_size or holdout, or bring "
            "more."
        )
    return kept


def joined(texts: Sequence[str], ratio: float, seed: int = 0) -> list[str]:
    """The texts, some of them joined, two to eight in a row, into longer ones.

    Args:
        texts: the texts.
        ratio: share of joined texts in the result.
        seed: of the random choice.

    Raises:
        TriternError: a ratio that is not from 0 to 1.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, Real) or not 0 <= ratio <= 1:
        raise TriternError(f"joined_ratio is a share of the texts, from 0 to 1; received {ratio}")
    generator, source = random.Random(seed), iter(texts)
    result = []
    for text in source:
        if generator.random() < ratio:
            text = " ".join([text, *islice(source, generator.randint(1, 7))])
        result.append(text)
    return result


def usual_prefixes(model: str) -> list[str] | None:
    """The prefixes that an e5 model (known by its name) expects before texts; None for others."""
    name = Path(model).name
    return ["query: ", "passage: "] if "e5-" in name and "instruct" not in name else None


def prefixed(texts: Iterable[str], prefixes: Sequence[str]) -> list[str]:
    """Each text with one of the prefixes before it, in turn."""
    return [prefixes[i % len(prefixes)] + text for i, text in enumerate(texts)] if prefixes else list(texts)


def token_counts(tokenizer: Any, texts: Sequence[str], most: int | None) -> list[int]:
    """Number of tokens of each text, cut to ``most``; of characters if there is no tokenizer.

    Batches sorted by tokens hold far less padding than batches sorted by characters.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return [len(text) for text in texts]
    counts: list[int] = []
    for start in tqdm(range(0, len(texts), 10_000), "Counting tokens", disable=len(texts) < 500_000):
        part = list(texts[start : start + 10_000])
        encoded = tokenizer(part, truncation=most is not None, max_length=most, return_attention_mask=False)
        counts += [len(ids) for ids in encoded["input_ids"]]
    return counts


class LengthBatches(SetEpochMixin, BatchSampler):
    """Shuffled batches of texts of similar length.

    Texts are shuffled, sorted by length within pools, and cut into global batches (one batch per process);
    these are shuffled. Two processes together see the same as one with twice the batch size. The texts that
    do not fill a global batch are a random choice in every epoch; they come last, unsorted, or are left out.

    Args:
        lengths: of the texts, in any unit.
        batch_size: texts in a batch of one process.
        drop_last: leave out an incomplete last global batch.
        processes: their number.
        seed: it gives the order, together with the epoch.
    """

    POOL = 50
    """Global batches sorted together."""

    def __init__(
        self, lengths: Sequence[int], batch_size: int, drop_last: bool, processes: int = 1, seed: int = 0
    ) -> None:
        self.lengths = torch.tensor(lengths, dtype=torch.int64)
        self.batch_size, self.drop_last, self.processes, self.seed = batch_size, drop_last, processes, seed
        self.epoch = 0

    def __len__(self) -> int:
        if self.drop_last:
            return len(self.lengths) // (self.batch_size * self.processes) * self.processes
        return math.ceil(len(self.lengths) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        size = self.batch_size * self.processes
        shuffled = torch.randperm(len(self.lengths), generator=generator)
        whole, rest = shuffled.tensor_split([len(shuffled) // size * size])
        batches: list[Tensor] = []
        for pool in whole.split(size * self.POOL):
            batches += pool[self.lengths[pool].argsort(stable=True)].split(size)
        order = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        for batch in order if self.drop_last or not len(rest) else [*order, rest]:
            yield from (part.tolist() for part in batch.split(self.batch_size))
