"""The rows of text, JSON Lines and Parquet files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = ".txt", ".jsonl", ".parquet"
BATCH = 1024
"""Texts in a table of ``read``: Ray hands one such table to an actor, which sorts its texts by length."""


def read(file: Any, column: str, id_column: str | None) -> Iterator[pa.Table]:
    """The texts of one file, a batch at a time, as tables of strings ``id`` and ``text``."""
    import pyarrow as pa

    (name,), (path,) = file["name"], file["path"]
    ids, texts = [], []
    for number, (own_id, text) in enumerate(records(str(path), column, id_column), 1):
        if not isinstance(text, str):
            raise ValueError(f"{path}, row {number}: {column!r} holds {text!r}; it must be a string")
        if id_column is not None and own_id is None:
            raise ValueError(f"{path}, row {number}: {id_column!r} holds no id")
        if text.strip():
            ids.append(f"{name}:{number}" if id_column is None else str(own_id))
            texts.append(text)
        if len(texts) == BATCH:
            yield pa.table({"id": ids, "text": texts})
            ids, texts = [], []
    yield pa.table({"id": pa.array(ids, pa.string()), "text": pa.array(texts, pa.string())})


def records(path: str, column: str, id_column: str | None) -> Iterator[tuple[Any, Any]]:
    """Id (None without a column of them) and text of every row of a file."""
    if path.endswith(".parquet"):
        import pyarrow.parquet as pq

        file = pq.ParquetFile(path)
        columns = [column] if id_column is None else [column, id_column]
        if missing := set(columns) - set(file.schema_arrow.names):
            there = ", ".join(file.schema_arrow.names)
            raise ValueError(f"{path} has no column {missing.pop()!r}; it has {there}")
        for batch in file.iter_batches(BATCH, columns=columns):
            texts = batch.column(column).to_pylist()
            yield from zip(batch.column(id_column).to_pylist() if id_column else [None] * len(texts), texts)
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if path.endswith(".txt"):
                    yield None, text
                else:
                    row = json.loads(text)
                    yield row[id_column] if id_column else None, row[column]
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason})") from None
            except (KeyError, TypeError, json.JSONDecodeError) as error:
                wanted = " and ".join(repr(c) for c in (column, id_column) if c)
                raise ValueError(
                    f"{path}, line {number}: not a JSON object with {wanted} ({error!r})"
                ) from None
