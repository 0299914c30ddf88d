"""The column of texts in CSV, TSV, JSON, Parquet and data sets: find it, and check that it holds strings."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, repeat
from typing import Any, BinaryIO

from ..errors import TriternError
from .sample import POOL

logger = logging.getLogger(__name__)

_LOOKED_AT = 1000
"""Rows to look at when the column must be chosen by its content."""
_SEPARATORS = ",;\t|"
_HOW = "column= or --column"


def column_texts(rows: Iterator[tuple[str, dict[str, Any]]], column: str | None, name: str) -> Iterator[str]:
    """The texts of rows.

    Args:
        rows: pairs of a place, such as ``line 3``, and the cells by column.
        column: the wanted one; None: ``text``, or else the first that holds strings.
        name: of the file or data set, for errors.
    """
    wanted = column if column is not None else "text"
    head = list(islice(rows, 1))
    if head and wanted not in head[0][1]:
        head += islice(rows, _LOOKED_AT - 1)
    names = list(dict.fromkeys(chain.from_iterable(row for _, row in head)))
    before = 0
    if head and column is not None and wanted not in names:
        for where, row in islice(rows, POOL):  # not kept: data sets may have no end
            if wanted in row:
                names, rows = [wanted], chain(repeat(("", {}), before), [(where, row)], rows)
                break
            before += 1
    if head and wanted not in names:
        first = {n: next((r[n] for _, r in head if r.get(n) is not None), None) for n in names}
        strings = [n for n in names if isinstance(first[n], str)]
        if len(head) == 1 and any(isinstance(value, list) for value in first.values()):
            strings = []  # one object around lists: strings beside the lists are not texts
        if column is not None or not strings:
            looked_at = f" in its first {len(head) + before:,} rows" if len(head) == _LOOKED_AT else ""
            raise _no_column(name, wanted, strings, looked_at)
        wanted = _announced(name, strings)
    for where, row in chain(head, rows):
        if wanted != "text" and column is None and "text" in row:
            raise TriternError(
                f"texts: {name}, {where}: has 'text'; earlier rows do not, so {wanted!r} was "
                f"taken: name the column ({_HOW})"
            )
        yield _string(row.get(wanted), wanted, f"{name}, {where}")


def _string(value: Any, column: str, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TriternError(
            f"texts: {where}: column {column!r} must hold strings; received {type(value).__name__} "
            f"({str(value)[:40]!r}). Write it as a string, or name another column ({_HOW})."
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise TriternError(
            f"texts: {where}: column {column!r} holds an invalid character ({value[:40]!a}): remove the row"
        ) from None
    return value


def _no_column(name: str, wanted: str, strings: Sequence[str], where: str = "") -> TriternError:
    return TriternError(
        f"texts: {name} has no text column {wanted!r}{where}; its columns with strings: "
        f"{', '.join(strings) or 'none'}"
    )


def _announced(name: str, strings: Sequence[str]) -> str:
    """The first of several columns; a log line tells the user."""
    if len(strings) > 1:
        logger.warning(
            "texts: %s has no column 'text': took %r, the first with strings; others: %s (%s)",
            name, strings[0], ", ".join(strings[1:]), _HOW,
        )  # fmt: skip
    return strings[0]


def json_rows(content: Iterator[str], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place and value of each object: one per line, a list of them, or one over several lines.

    Strings in a list count as objects with a ``text``.
    """
    numbered = ((number, line) for number, line in enumerate(content, 1) if line.strip())
    start, first = next(numbered, (0, ""))
    if first.lstrip()[:1] == "[" or first.strip() == "{":
        whole = _parsed(first + "".join(content), start, name)
        for number, row in enumerate(whole if isinstance(whole, list) else [whole], 1):
            yield (
                f"row {number}",
                _object({"text": row} if isinstance(row, str) else row, name, f"row {number}"),
            )
        return
    for number, line in chain([(start, first)] if first else [], numbered):
        yield f"line {number}", _object(_parsed(line, number, name), name, f"line {number}")


def _parsed(text: str, start: int, name: str) -> Any:
    """JSON that begins on line ``start``."""
    try:
        return json.loads(text.rstrip())  # without line ends, so that an error names the right line
    except json.JSONDecodeError as error:
        where = f"line {start + error.lineno - 1}"
        raise TriternError(
            f"texts: {name}, {where}: not JSON ({error.msg} at character {error.colno}); a file holds one "
            "object per line, or one list of objects"
        ) from None
    except (ValueError, RecursionError) as error:  # numbers and nesting beyond Python's limits
        raise TriternError(f"texts: {name}, line {start}: JSON that cannot be read ({error})") from None


def _object(value: Any, name: str, where: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise TriternError(
        f'texts: {name}, {where}: must be an object such as {{"text": "..."}}; '
        f"received {type(value).__name__}"
    )


def csv_texts(content: Iterator[str], is_tsv: bool, column: str | None, name: str) -> Iterator[str]:
    """The texts of lines; the first line names the columns.

    Args:
        content: lines with their ends.
        is_tsv: tabs separate cells, and quotes never hold line breaks.
        column: the wanted one; None: ``text``, or else the first with words.
        name: of the file, for errors.
    """
    blank, first = next(((n, line) for n, line in enumerate(content) if line.strip()), (0, ""))
    content = chain(repeat("\n", blank), [first], content)
    separator = "\t" if is_tsv else _separator(first, column, name)
    rows = _tsv_rows(content, name) if is_tsv else _csv_rows(content, separator, name)
    _, header = next(rows, (0, []))
    if not header:
        return
    header = [cell.strip() for cell in header]
    even = _even(rows, len(header), separator, name)
    wanted = column if column is not None else "text"
    if wanted in header:
        if header.count(wanted) > 1:
            raise TriternError(
                f"texts: {name} has {header.count(wanted)} columns {wanted!r}; give each its name"
            )
        index = header.index(wanted)
    elif column is not None:
        raise TriternError(
            f"texts: {name} has no text column {column!r}; its first line names: {', '.join(header)}"
        )
    else:
        head = list(islice(even, _LOOKED_AT))
        index = _column_of_words(header, head, name)
        even = chain(head, even)
    yield from (cells[index] for cells in even)


def _separator(first: str, column: str | None, name: str) -> str:
    """The separator of the first line: the one that yields the wanted column, else the only one in it."""
    names = {s: [n.strip() for n in next(csv.reader([first], delimiter=s), [])] for s in _SEPARATORS}
    there = [s for s in _SEPARATORS if len(names[s]) > 1]
    fitting = [s for s in there if (column if column is not None else "text") in names[s]] or there
    if len(fitting) > 1:
        raise TriternError(
            f"texts: {name}: {' and '.join(map(repr, fitting))} may separate its columns, by its first line: "
            f"{first.strip()[:80]!r}. Name the column of the texts text, or name it ({_HOW})."
        )
    return fitting[0] if fitting else ","


def _csv_rows(content: Iterable[str], separator: str, name: str) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of rows that are not blank."""
    reader = csv.reader(content, delimiter=separator, strict=True)
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise TriternError(
                f"texts: {name}, line {start}: not CSV ({error}). A cell in quotes ends with one, and a "
                "quote within is doubled; a longer cell needs another kind of file, such as .jsonl."
            ) from None
        if cells is None:
            return
        if cells:
            yield start, cells


def _tsv_rows(content: Iterable[str], name: str) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of lines that are not blank. Quotes that do not surround a cell are characters."""
    for number, line in enumerate(content, 1):
        line = line.rstrip("\r\n")
        if not line:
            continue
        cells = line.split("\t")
        if '"' in line and any(cell.startswith('"') for cell in cells):
            try:
                cells = next(csv.reader([line], delimiter="\t", strict=True))
            except csv.Error as error:
                if "end of data" in str(error):
                    raise TriternError(
                        f"texts: {name}, line {number}: a cell begins with a quote that does not end on "
                        "the line. Remove the quote; for cells with line breaks use the ending .csv."
                    ) from None
        yield number, cells


def _even(
    rows: Iterable[tuple[int, list[str]]], width: int, separator: str, name: str
) -> Iterator[list[str]]:
    for number, cells in rows:
        if len(cells) != width:
            raise TriternError(
                f"texts: {name}, line {number}: {len(cells)} cells; the first line has {width} (separated by "
                f"{separator!r}). Put cells that hold separators or line breaks in quotes, and write "
                "empty cells too; a file with one text a line and no columns needs the ending .txt."
            )
        yield cells


def _column_of_words(header: Sequence[str], head: Sequence[Sequence[str]], name: str) -> int:
    """The first column without numbers. Numbers under a name show that the first line holds names."""
    words, numbers = [], []
    for index, title in enumerate(header):
        cells = [row[index] for row in head if row[index].strip()]
        count = sum(map(_is_number, cells))
        if 2 * count < len(cells):
            words.append(index)
        elif cells and count == len(cells) and not _is_number(title):
            numbers.append(index)
    if not numbers or len({*header} - {""}) < len(header):
        raise TriternError(
            f"texts: {name} has no column 'text', and its first line, {', '.join(header)[:80]!r}, may hold "
            f"names or a text. Name the column ({_HOW}), add a first line with names, or, for one text a "
            "line, use the ending .txt."
        )
    if not words:
        raise _no_column(name, "text", [])
    return header.index(_announced(name, [str(header[index]) for index in words]))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return cell.strip().lower() in ("true", "false")
    return True


def parquet_texts(file: BinaryIO, column: str | None, name: str) -> Iterator[str]:
    """The texts of a column of strings; only that column is read."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(f"texts: .parquet needs pyarrow: pip install 'tritern[train]' ({error})") from None

    table = pq.ParquetFile(file)
    schema = table.schema_arrow
    types = {n: str(getattr(t, "value_type", t)) if pa.types.is_dictionary(t) else str(t)
             for n, t in zip(schema.names, schema.types)}  # fmt: skip
    strings = [n for n, kind in types.items() if kind in ("string", "large_string", "string_view")]
    wanted = column if column is not None else "text"
    if wanted not in types:
        if column is not None or not strings:
            raise _no_column(name, wanted, strings)
        wanted = _announced(name, strings)
    if schema.names.count(wanted) > 1:
        raise TriternError(
            f"texts: {name} has {schema.names.count(wanted)} columns {wanted!r}; give each its name"
        )
    if wanted not in strings and types[wanted] != "null":
        raise TriternError(
            f"texts: {name}: column {wanted!r} must hold strings; it holds {types[wanted]}. Columns "
            f"with strings: {', '.join(strings) or 'none'} ({_HOW})"
        )
    batches = table.iter_batches(_LOOKED_AT, columns=[wanted])
    for row, value in enumerate(chain.from_iterable(batch.column(0) for batch in batches), 1):
        try:
            yield value.as_py() or ""
        except UnicodeDecodeError as error:
            raise TriternError(
                f"texts: {name}, row {row}: not UTF-8 ({error.reason}); write it anew"
            ) from None
