"""The texts of a run: training texts, and texts held out to measure closeness on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from datasets import Dataset

from ..errors import TriternError
from ..inputs import check_texts, check_vectors, whole_number
from ..texts.sample import drawn
from .arguments import TernaryDistillationArguments
from .data import clean, joined, prefixed

LEAST_HELD = 12
"""With fewer texts, a text has no 10 neighbours."""


class Split(NamedTuple):
    """The training texts, the held-out texts with their prefixes, and the teacher's vectors of the latter
    [len(held), width], if given.
    """

    train: Dataset
    held: list[str]
    vectors: np.ndarray | None = None


def check_holdout(holdout: int) -> int:
    """The number of texts to hold out: 0, or enough to compare neighbours."""
    holdout = whole_number(holdout, "holdout", 0)
    if holdout and holdout < LEAST_HELD:
        raise TriternError(f"holdout must be 0 or at least {LEAST_HELD}; received {holdout}")
    return holdout


def split(
    texts: Sequence[str],
    prefixes: Sequence[str],
    holdout: int,
    joined_ratio: float,
    args: TernaryDistillationArguments,
) -> Split:
    """Clean texts: ``holdout`` of them are drawn from all, the others are training texts.

    Raises:
        TriternError: a text that is not a string, or too few texts.
    """
    kept = clean(texts, holdout + args.train_batch_size * args.world_size)
    numbers = drawn(kept, holdout, seed_of(args))
    out = set(numbers)
    train = [text for i, text in enumerate(kept) if i not in out]
    train = prefixed(joined(train, joined_ratio, args.seed), prefixes)
    return Split(Dataset.from_dict({"text": train}), prefixed([kept[i] for i in numbers], prefixes))


def split_with_vectors(
    texts: Sequence[str],
    vectors: np.ndarray,
    prefixes: Sequence[str],
    holdout: int,
    joined_ratio: float,
    args: TernaryDistillationArguments,
) -> Split:
    """The same for texts with the teacher's vectors. Texts equal to a held-out one are left out.

    Raises:
        TriternError: a text that is empty or not a string; vectors of a wrong shape; too few texts.
    """
    check_texts(texts)
    check_vectors(vectors, "teacher vectors", len(texts))
    if joined_ratio:
        raise TriternError("joined_ratio must be 0 with teacher vectors: joined texts have none")
    numbers = drawn(texts, holdout, seed_of(args))
    if len(numbers) < holdout:
        raise TriternError(f"holdout must be at most the number of different texts, {len(numbers)}")
    held = {texts[i] for i in numbers}
    train = [i for i, text in enumerate(texts) if text not in held]
    texts = prefixed(texts, prefixes)
    data = {"text": [texts[i] for i in train], "label": list(vectors[train].astype(np.float32))}
    return Split(Dataset.from_dict(data), [texts[i] for i in numbers], vectors[numbers])


def seed_of(args: TernaryDistillationArguments) -> int:
    """The seed of the random choice of held-out texts."""
    return args.seed if args.data_seed is None else args.data_seed
