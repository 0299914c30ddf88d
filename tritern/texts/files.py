"""``read_texts``: the unchanged texts of files and data sets. ``columns`` splits files with columns."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..errors import TriternError
from ..inputs import whole_number
from . import columns

_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_KINDS = {
    ".txt": "text",
    ".jsonl": "JSON",
    ".ndjson": "JSON",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "TSV",
    ".parquet": "Parquet",
}
_NOTHING = {
    "text": "it has no line",
    "JSON": "it has no object",
    "CSV": "it has no row below the names of its columns",
    "TSV": "it has no row below the names of its columns",
    "Parquet": "its table has no row",
}
_CONTENTS = (
    ((b"\xff\xfe\0\0", b"\0\0\xfe\xff"), "UTF-32; convert it, for example with iconv -f utf-32 -t utf-8"),
    ((b"\xff\xfe", b"\xfe\xff"), "UTF-16; convert it, for example with iconv -f utf-16 -t utf-8"),
    ((b"\x1f\x8b",), "gzip data; give its name the ending .gz, as in texts.txt.gz"),
    ((b"\x28\xb5\x2f\xfd",), "zstd data; give its name the ending .zst, as in texts.txt.zst"),
    (
        tuple(b"BZh%d1AY&SY" % level for level in range(1, 10)),
        "bzip2 data; give its name the ending .bz2, as in texts.txt.bz2",
    ),
    ((b"\xfd7zXZ",), "xz data; give its name the ending .xz, as in texts.txt.xz"),
    ((b"PAR1\x15",), "a Parquet file; give its name the ending .parquet"),
    (
        (b"PK\x03\x04",),
        "a zip archive, as .xlsx and .docx are; save the sheet as .csv, or unpack the archive",
    ),
    ((b"\xd0\xcf\x11\xe0",), "an old Office file; save the sheet as .csv, or the document as text"),
    ((b"%PDF-",), "a PDF document; extract its text first"),
    ((b"\x89PNG", b"\xff\xd8\xff", b"GIF87a", b"GIF89a"), "an image"),
)
"""First bytes of files that are not UTF-8 text, and what to do with such files."""
_BUFFER = 2**17


def read_texts(source: str | Path, *, column: str | None = None, limit: int | None = None) -> list[str]:
    """Texts of a file or of a data set, unchanged.

    The ending, in upper or lower case, tells the kind of a file:

    - ``.csv``: quotes as in RFC 4180; the first line names the columns and shows the separator (commas,
      semicolons, tabs or bars).
    - ``.tsv``: the first line names the columns; a cell in quotes ends on its line.
    - ``.jsonl``, ``.ndjson``: one object per line. ``.json``: the same, or a list of objects or strings.
    - ``.parquet``.
    - Any other ending: UTF-8, one text per line.

    A further ending ``.gz``, ``.zst``, ``.bz2`` or ``.xz`` is unpacked.

    Args:
        source: a file, otherwise the name of a data set on the hub (its train split).
        column: the column of the texts; default: ``text``, or else the first column that holds strings.
        limit: read at most this many texts.

    Returns:
        One string per row; a null, a missing or an empty cell is an empty string.

    Raises:
        TriternError: a missing or empty source, no such column; a value that is not a string, a row with too
            many or too few cells, bytes that are not UTF-8 (with file and line or row); a file that does not
            match its ending; a table whose first line may be a text.
        ImportError: a package of the ``train`` extra is missing: for ``.parquet``, ``.zst`` and data sets.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TriternError(f"source must be the name of a file or data set; received {type(source).__name__}")
    if column is not None and not isinstance(column, str):
        raise TriternError(f"column must be the name of a column; received {column!r}")
    if limit is not None:
        limit = whole_number(limit, "limit", 1)
    path = Path(source)
    *_, ending = ("", *(s for s in map(str.lower, path.suffixes) if s not in _COMPRESSED))
    kind = _KINDS.get(ending, "text")
    is_file = True
    try:
        is_file = path.exists()
        local = ending in _KINDS or path.is_absolute() or str(source).startswith((".", "~"))
        if path.is_dir() or (not is_file and local):
            raise TriternError(f"texts: {source} is {'a folder' if is_file else 'not there'}; name a file")
        found = _of_file(path, kind, column) if is_file else _of_data_set(str(source), column)
        texts = list(islice(found, limit))
    except (TriternError, ImportError):
        raise
    except Exception as error:  # of files, pyarrow, every decompressor, the hub
        what, cause = kind if is_file else "a data set", error or type(error).__name__
        raise TriternError(f"texts: {source} cannot be read as {what}: {cause}") from error
    if not texts:
        raise TriternError(f"texts: {source} is empty: {_NOTHING[kind] if is_file else 'it has no row'}")
    return texts


def _of_file(path: Path, kind: str, column: str | None) -> Iterator[str]:
    name = str(path)
    with _opened(path) as file:
        if kind == "Parquet":
            packed = path.suffix.lower() in _COMPRESSED  # a Parquet file is read from its end
            yield from columns.parquet_texts(io.BytesIO(file.read()) if packed else file, column, name)
        elif kind == "JSON":
            yield from columns.column_texts(columns.json_rows(lines(file, name), name), column, name)
        elif kind != "text":
            yield from columns.csv_texts(lines(file, name), kind == "TSV", column, name)
        elif column in (None, "text"):
            yield from (line.rstrip("\r\n") for line in lines(file, name))
        else:
            raise TriternError(f"texts: {name} has no text column {column!r}: it is plain text")


def _opened(path: Path) -> BinaryIO:
    """A file's bytes, unpacked."""
    ending = path.suffix.lower()
    if ending not in _COMPRESSED:
        return path.open("rb", _BUFFER)
    if ending == ".zst":
        try:
            import pyarrow
        except ImportError as error:
            raise ImportError(f"texts: .zst needs pyarrow: pip install 'tritern[train]' ({error})") from None
        # pyarrow notices a file that was cut off; the zstandard package does not
        raw = pyarrow.input_stream(str(path), compression="zstd")
    else:
        raw = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[ending](path)
    return cast(BinaryIO, io.BufferedReader(cast(Any, raw), _BUFFER))


def _of_data_set(name: str, column: str | None) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"texts: {name!r} is not a file, and a data set needs more packages: pip install "
            f"'tritern[train]' ({error})"
        ) from None
    try:
        rows = load_dataset(name, split="train", streaming=True)
    except Exception as error:  # the hub may answer anything
        raise TriternError(
            f"texts: {name!r} is not a file, and loading it as a data set failed: {error}"
        ) from error
    numbered = ((f"row {number}", cast(dict, row)) for number, row in enumerate(rows, 1))
    yield from columns.column_texts(numbered, column, name)


def lines(file: Iterable[bytes], name: str) -> Iterator[str]:
    r"""Lines of UTF-8 with their ends (``\n``, ``\r\n``, ``\r``), without a byte-order mark.

    Raises:
        TriternError: bytes that are not UTF-8 (with the line), or another kind of file (named if known).
    """
    for number, line in enumerate(file, 1):
        if number == 1:
            _check_start(line, name)
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise TriternError(
                f"texts: {name}, line {number}: not UTF-8 ({error.reason}, byte {byte:#04x}). Convert "
                "the file, for example with iconv -f latin1 -t utf-8, or remove the line."
            ) from None
        if "\r" in text:
            yield from io.StringIO(text, newline="")
        else:
            yield text


def _check_start(line: bytes, name: str) -> None:
    """Refuse a file that starts like another kind of file."""
    for starts, kind in _CONTENTS:
        if line.startswith(starts):
            raise TriternError(f"texts: {name} is not a UTF-8 text file but {kind}")
    if b"\0" in line:
        raise TriternError(
            f"texts: {name} is not a text file: its first line holds NUL bytes. If it is UTF-16, convert it, "
            "for example with iconv -f utf-16 -t utf-8"
        )
