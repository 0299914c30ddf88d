"""What follows from the scores of a teacher and of its students: means, shares kept, and their intervals."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks folder

import numpy as np
from quality.eval_sets import Items
from tqdm.auto import tqdm

DRAWS = 1000
"""Of the items of every set, with replacement."""

Figure = TypeVar("Figure", float, np.ndarray)


def means(scores: Mapping[str, Figure], tasks: Mapping[str, str]) -> dict[str, Figure]:
    """Mean of every task's sets, ``overall``, the mean of those, and ``all sets``, the mean of the sets.

    Args:
        scores: of each set, or of each of its draws.
        tasks: of each set.
    """
    by_task: dict[str, list[Figure]] = {}
    for name, value in scores.items():
        by_task.setdefault(tasks[name], []).append(value)
    if not scores:
        return {}
    found = {task: _mean(values) for task, values in by_task.items()}
    return found | {"overall": _mean(list(found.values())), "all sets": _mean(list(scores.values()))}


def _mean(values: list[Figure]) -> Figure:
    return sum(values[1:], start=values[0]) / len(values)  # pyright: ignore[reportReturnType]


def retention(figures: Mapping[str, float], teacher: Mapping[str, float]) -> dict[str, float]:
    """Per cent of the teacher's figures; NaN where the teacher's is not above zero."""
    return {k: 100 * (v / teacher[k]) if teacher[k] > 0 else float("nan") for k, v in figures.items()}


def draws(results: Mapping[str, Items]) -> dict[str, np.ndarray]:
    """Scores [DRAWS] of each set on draws of its items, which are the same ones for every model."""
    found = {}
    for name, items in tqdm(results.items(), "Drawing", disable=not sys.stderr.isatty(), leave=False):
        generator = np.random.default_rng(list(name.encode()))
        found[name] = np.array(
            [items.score(generator.integers(items.count, size=items.count)) for _ in range(DRAWS)]
        )
    return found


def intervals(
    student: Mapping[str, np.ndarray], teacher: Mapping[str, np.ndarray], tasks: Mapping[str, str]
) -> dict[str, tuple[float, float]]:
    """Where 95 % of the draws' retentions lie, per cent, for every set and mean: bootstrap intervals.

    Student and teacher meet the same items in a draw, sets are drawn apart. What a classifier or a clustering
    made of the vectors is not done again. NaN where a draw of the teacher's is not above zero.
    """
    ours, theirs = ({**scores, **means(scores, tasks)} for scores in (student, teacher))
    found = {}
    for name, scores in ours.items():
        kept = 100 * scores / np.where(theirs[name] > 0, theirs[name], np.nan)
        low, high = np.percentile(kept, [2.5, 97.5])
        found[name] = float(low), float(high)
    return found
