"""Texts to train on: where they come from and in what order they are seen."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.sampler import SetEpochMixin
from torch import Tensor
from torch.utils.data import BatchSampler
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..errors import TriternError

logger = logging.getLogger(__name__)

_BUILDERS = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_SHORTEST = 3
_LOOKED_AT = 1000  # rows, to tell which columns hold strings: cells may be empty
JOINED_RATIO = 0.05
"""Share of training texts that are made by joining several: longer ones than most lines hold."""


def read_texts(source: str | Path, *, column: str | None = None, limit: int | None = None) -> list[str]:
    """Texts of a file or of a data set.

    Args:
        source: a file with one text a line (.txt), or .jsonl, .csv or .parquet with a text column, each also
            compressed (.gz, .zst, .bz2, .xz); otherwise the name of a data set on the hub, its train split.
        column: where the text is; default: ``text``, or else the first column that holds strings.
        limit: read no more than so many. Empty cells give empty strings.

    Raises:
        TriternError: nothing there, no such column, bytes that are not UTF-8 (with the line), a file that its
            ending does not describe.
    """
    from datasets import load_dataset

    path = Path(source)
    suffixes = [s for s in path.suffixes if s not in _COMPRESSED]
    kind = _BUILDERS.get(suffixes[-1] if suffixes else "")
    if limit is not None and limit < 1:
        raise TriternError(f"limit must be at least 1; received {limit}")
    if path.is_file():
        kind = kind or "text"
        options: dict[str, Any] = {"sep": "\t"} if suffixes[-1:] == [".tsv"] else {}
        try:
            rows = load_dataset(kind, data_files=str(path), split="train", streaming=True, **options)
            return _column(rows, column, limit, source)
        except TriternError:
            raise
        except Exception as error:  # of Unicode, pyarrow, pandas, of every decompressor
            raise TriternError(_unreadable(path, kind, error)) from None
    if path.exists() or kind or path.is_absolute():
        raise TriternError(f"texts: {source} is {'a folder' if path.is_dir() else 'not there'}; name a file")
    try:
        rows = load_dataset(str(source), split="train", streaming=True)
    except Exception as error:  # whatever the hub answers
        raise TriternError(
            f"texts: {source!r} is no file, and loading it as a data set failed: {error}"
        ) from error
    return _column(rows, column, limit, source)


def _column(rows: Iterable[dict], column: str | None, limit: int | None, source: str | Path) -> list[str]:
    rows = iter(rows)
    head = list(islice(rows, min(_LOOKED_AT, limit or _LOOKED_AT)))
    if not head:
        raise TriternError(f"texts: {source} is empty")
    values = {name: next((r[name] for r in head if r[name] is not None), None) for name in head[0]}
    strings = [name for name, value in values.items() if isinstance(value, str)]
    name = column or ("text" if "text" in strings else next(iter(strings), None))
    if name not in strings:
        raise TriternError(
            f"texts: {source} has no text column {column or 'text'!r}; its columns with strings: "
            f"{', '.join(strings) or 'none'}"
        )
    rest = islice(rows, None if limit is None else limit - len(head))
    return [row[name] or "" for row in chain(head, rest)]  # an empty cell is None


def _unreadable(path: Path, kind: str, error: Exception) -> str:
    """What is wrong with a file that could not be read: most often bytes that are not UTF-8."""
    where, cause = str(path), error
    if path.suffix not in _COMPRESSED and kind != "parquet":
        with path.open("rb") as file:
            for number, content in enumerate(file, 1):
                try:
                    content.decode("utf-8")
                except UnicodeDecodeError as found:
                    where, cause = f"{path}, line {number}", found
                    break
    if not isinstance(cause, UnicodeDecodeError):
        return f"texts: {path} cannot be read as {kind}: {error or type(error).__name__}"
    return (
        f"texts: {where}: not UTF-8 ({cause.reason}, byte {cause.object[cause.start]:#04x}). Convert the "
        "file, for example with iconv -f latin1 -t utf-8, or remove the line."
    )


def clean(texts: Iterable[str], least: int) -> list[str]:
    """Texts without surrounding white space, without empty, very short and repeated ones.

    Raises:
        TypeError: something that is not a string. TriternError: fewer than ``least`` are left.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be many strings, not one; to read a file use read_texts(path)")
    kept: dict[str, None] = {}
    total = 0
    for total, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise TypeError(f"texts must be strings; number {total - 1} is {type(text).__name__}")
        text = text.strip()
        if len(text) >= _SHORTEST:
            kept[text] = None
    if len(kept) < total:
        out = total - len(kept)
        logger.warning("left out %d texts that are empty, below %d characters or repeated", out, _SHORTEST)
    if len(kept) < least:
        raise TriternError(
            f"distillation needs at least {least} different texts of {_SHORTEST} characters or more; "
            f"received {len(kept)} (of {total}). Lower per_device_train_batch_size or holdout, or bring more."
        )
    return list(kept)


def joined(texts: Sequence[str], ratio: float, seed: int = 0) -> list[str]:
    """The texts with a share of them joined, two to eight in a row, into longer ones.

    Args:
        texts: the texts.
        ratio: share of the results that are joined.
        seed: chooses which.

    Raises:
        TriternError: a ratio that is not from 0 to 1.
    """
    if not 0 <= ratio <= 1:
        raise TriternError(f"joined_ratio is a share of the texts, from 0 to 1; received {ratio}")
    generator, source = random.Random(seed), iter(texts)
    result = []
    for text in source:
        if generator.random() < ratio:
            text = " ".join([text, *islice(source, generator.randint(1, 7))])
        result.append(text)
    return result


def usual_prefixes(model: str) -> list[str] | None:
    """What an e5 model, told by its name, expects before its texts; None for others."""
    name = Path(model).name
    return ["query: ", "passage: "] if "e5-" in name and "instruct" not in name else None


def prefixed(texts: Iterable[str], prefixes: Sequence[str]) -> list[str]:
    """Each text with one of the prefixes before it, in turn."""
    return [prefixes[i % len(prefixes)] + text for i, text in enumerate(texts)] if prefixes else list(texts)


def token_counts(tokenizer: Any, texts: Sequence[str], most: int | None) -> list[int]:
    """Tokens of each text as the model will see it, cut to ``most`` (characters where there is no tokenizer).

    Batches sorted by these hold far less padding than batches sorted by characters.
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

    Texts are shuffled, sorted by length within pools, cut into global batches (one batch for each process)
    and the global batches shuffled: two processes see, together, what one with twice the batch sees. What
    does not fill a global batch comes last, unsorted, or is left out: a random choice in every epoch.

    Args:
        lengths: of the texts, in any unit.
        batch_size: texts in a batch of one process.
        drop_last: leave out an incomplete last global batch.
        processes: their number.
        seed: of the order, with the epoch.
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
