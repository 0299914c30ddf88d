"""Texts from files: every string as it stands there, or an error that names file and line or row."""

import bz2
import gzip
import json
import logging
import lzma
import os
import re
import sys
import threading
import zlib

import pyarrow as pa
import pytest
import zstandard

from tritern import TriternError
from tritern.distillation import read_texts

from .cli import run
from .text_files import objects, parquet

PACKERS = {".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def test_files_of_all_kinds(read):
    texts = ["one text", "käse, naïve", "third"]
    contents = {
        ".txt": "\n".join(texts),
        ".jsonl": objects(*({"id": 1, "text": t} for t in texts)),
        ".ndjson": objects(*({"id": "a", "text": t} for t in texts)),
        ".json": json.dumps([{"text": t} for t in texts], indent=1),
        ".csv": "id,body\n" + "\n".join(f'{i},"{t}"' for i, t in enumerate(texts)),
        ".tsv": "id\tbody\n" + "\n".join(f"{i}\t{t}" for i, t in enumerate(texts)),
        ".parquet": parquet(text=texts, other=texts[::-1]),
    }
    for ending, content in contents.items():
        for name in ("a" + ending, "A" + ending.upper()):
            assert read(name, content) == texts, name
            assert read(name, content, limit=2) == texts[:2], name
        for packed, compress in PACKERS.items():
            data = compress(content if isinstance(content, bytes) else content.encode())
            assert read("a" + ending + packed, data) == texts
            assert read("A" + ending.upper() + packed.upper(), data) == texts
    assert read("a.parquet", contents[".parquet"], column="other") == texts[::-1]
    assert read("a.log", contents[".txt"]) == texts
    assert read("a.gz", gzip.compress(contents[".txt"].encode())) == texts


@pytest.mark.parametrize("name", ["[2024].txt", "a::b.txt", "what?*.txt", "dir[1]/a.txt", "zip::x.jsonl"])
def test_a_name_is_a_name(read, name):
    if "/" in name:
        os.mkdir(os.path.dirname(name))
    content = objects({"text": "one"}) if name.endswith("jsonl") else "one"
    assert read(name, content) == ["one"]


def test_lines_of_text(read):
    assert read("a.txt", b"\xef\xbb\xbffirst\r\nse\tcond \r\n\r\nlast") == ["first", "se\tcond ", "", "last"]
    assert read("a.txt", b"old\rMac\r") == ["old", "Mac"]
    assert read("a.txt", "a\u2028b\x0bc\x85d\n") == ["a\u2028b\x0bc\x85d"]  # no ends of lines
    assert read("a.txt", b"\xef\xbb\xbf") == [""]
    many = [f"text {i}" for i in range(2500)]
    assert read("many.txt", "\n".join(many)) == many
    assert read("many.txt", "\n".join(many), limit=1500) == many[:1500]
    assert read("a.txt", "PAR1, BZh, PK and GIF begin") == ["PAR1, BZh, PK and GIF begin"]
    with pytest.raises(TriternError, match="a.txt has no text column 'body': it is plain text"):
        read("a.txt", "one", column="body")


def test_no_more_is_read_than_asked_for(read):
    """What follows is broken: reading it would be an error."""
    for name, start, line in (
        ("a.txt", b"", b"one\n"),
        ("a.jsonl", b"", b'{"text": "one"}\n'),
        ("a.csv", b"text,id\n", b"one,1\n"),
        ("a.tsv", b"text\tid\n", b"one\t1\n"),
    ):
        content = start + 2 * line + b"\xff\xff\n"
        assert read(name, content, limit=2) == ["one", "one"]
        with pytest.raises(TriternError, match="not UTF-8"):
            read(name, content, limit=3)
        noise = os.urandom(2**20)  # does not shrink
        packed = gzip.compress(start + 20_000 * line) + gzip.compress(noise)[: 2**19]
        assert read(name + ".gz", packed, limit=2) == ["one", "one"]


def test_a_pipe_is_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    writer = threading.Thread(target=(tmp_path / "pipe.csv").write_text, args=("text,id\na,1\nb,2\n",))
    writer.start()
    assert read_texts(tmp_path / "pipe.csv") == ["a", "b"]
    writer.join()


PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + zlib.compress(b"0" * 1000)


@pytest.mark.parametrize("ending", [".txt", ".csv", ".jsonl", ".tsv", ".json", ""])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("one\ntwo\n".encode("utf-16"), "is not a UTF-8 text file but UTF-16; convert"),
        (b"\xfe\xff" + "one\ntwo\n".encode("utf-16-be"), "but UTF-16"),
        ("one\n".encode("utf-32"), "but UTF-32; convert it"),
        ("one\n".encode("utf-16-le"), "is not a text file: its first line holds NUL bytes. If it is UTF-16"),
        (gzip.compress(b"one\n" * 50), r"but gzip data; give its name the ending .gz"),
        (zstandard.compress(b"one\n" * 50), r"but zstd data; give its name the ending .zst"),
        (bz2.compress(b"one\n" * 50), r"but bzip2 data; .* .bz2"),
        (lzma.compress(b"one\n" * 50), r"but xz data; .* .xz"),
        (b"PK\x03\x04\x14\0\x06\0[Content", r"but a zip archive, as .xlsx .* are; save the sheet"),
        (parquet(text=["a"]), "but a Parquet file; give its name the ending .parquet"),
        (PNG, "but an image"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n", "but a PDF document; extract its text first"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500), "but an old Office file; save the sheet as .csv"),
        (b"\x93NUMPY\x01\0v\0{'descr'", "is not a text file: its first line holds NUL bytes"),
    ],
    # named: what gzip writes differs from one second to the next, and then two workers collect two names
    ids="utf16 utf16-be utf32 utf16-no-mark gzip zstd bzip2 xz zip parquet png pdf office numpy".split(),
)  # fmt: skip
def test_other_files_are_named(read, ending, content, message):
    with pytest.raises(TriternError, match=f"a{re.escape(ending)} .*{message}") as failed:
        read("a" + ending, content)
    assert "latin1" not in str(failed.value)
    with pytest.raises(TriternError, match=message):
        read(f"a{ending}.gz", gzip.compress(content))


def test_bytes_that_are_not_utf8(read):
    for name, content, line in (
        ("bad.txt", b"fine\nalso fine\nna\xefve\n", 3),
        ("bad.jsonl", b'{"text": "fine"}\n{"text": "na\xefve"}\n', 2),
        ("bad.csv", b"\xef\xbb\xbftext\nfine\n\nna\xefve\n", 4),
        ("bad.tsv", b"te\xefxt\n", 1),
    ):
        for packed in ("", ".gz"):
            data = gzip.compress(content) if packed else content
            with pytest.raises(
                TriternError, match=f"{name}{packed}, line {line}: not UTF-8 .*byte 0xef.*iconv -f latin1"
            ):
                read(name + packed, data)


def test_compressed_files_that_are_cut_off_are_refused(read):
    content = "".join(f"line {i * i}\n" for i in range(50_000)).encode()
    for ending, compress in PACKERS.items():
        whole = compress(content)
        name = f"a.txt{ending}"
        assert len(read(name, whole + whole)) == 100_000  # parts put together
        for end in (len(whole) // 2, -3):
            with pytest.raises(TriternError, match=f"a.txt{ending} cannot be read as text: "):
                read(name, whole[:end])
        with pytest.raises(TriternError, match=f"a.txt{ending} cannot be read as text: "):
            read(name, b"not compressed\n" * 100)


def test_files_without_texts(read, tmp_path):
    for name, reason in (
        ("a.txt", "it has no line"),
        ("a.jsonl", "it has no object"),
        ("a.json", "it has no object"),
        ("a.csv", "it has no row below the names of its columns"),
        ("a.tsv", "it has no row below the names of its columns"),
    ):
        with pytest.raises(TriternError, match=f"{name} is empty: {reason}"):
            read(name, "")
        with pytest.raises(TriternError, match=f"{name}.gz is empty: {reason}"):
            read(name + ".gz", gzip.compress(b""))
    with pytest.raises(TriternError, match="a.json is empty: it has no object"):
        read("a.json", "[]")
    with pytest.raises(TriternError, match="a.parquet is empty: its table has no row"):
        read("a.parquet", parquet(text=pa.array([], pa.string())))
    with pytest.raises(TriternError, match="a.parquet cannot be read as Parquet: .*0 bytes"):
        read("a.parquet", "")
    for name in (
        "missing.txt",
        "missing.CSV",
        "missing.ndjson",
        "./missing",
        "~/missing",
        tmp_path / "missing",
    ):
        with pytest.raises(TriternError, match="missing.* is not there; name a file"):
            read_texts(name)
    with pytest.raises(TriternError, match="is a folder; name a file"):
        read_texts(tmp_path)


def test_wrong_arguments(read):
    for limit, received in ((0, "0"), (-1, "-1"), (2.0, "2.0"), ("2", "'2'"), (True, "True")):
        with pytest.raises(TriternError, match=f"limit must be .*at least 1; received {received}"):
            read("a.txt", "one", limit=limit)
    with pytest.raises(TriternError, match="column must be the name of a column; received 2"):
        read("a.csv", "text\none\n", column=2)
    for source in (["a.txt"], None, b"a.txt"):
        with pytest.raises(TriternError, match="source must be the name of a file or data set; received"):
            read_texts(source)


def test_data_sets(monkeypatch):
    rows = [{"id": "a", "text": None}] * 1200 + [{"id": "b", "text": "late"}]
    monkeypatch.setattr("datasets.load_dataset", lambda name, **settings: iter(rows))
    assert read_texts("a/set") == [""] * 1200 + ["late"]
    rows.append({"id": "c", "text": 3})
    with pytest.raises(TriternError, match="a/set, row 1202: column 'text' must hold strings; received int"):
        read_texts("a/set")
    rows.clear()
    with pytest.raises(TriternError, match="a/set is empty: it has no row"):
        read_texts("a/set")
    monkeypatch.setattr("datasets.load_dataset", lambda name, **settings: 1 / 0)
    with pytest.raises(
        TriternError, match="'a/set' is not a file, and loading it as a data set failed: division"
    ):
        read_texts("a/set")


def test_what_needs_the_extra(read, monkeypatch):
    for package, name in (("pyarrow", "a.txt.zst"), ("pyarrow", "a.parquet"), ("datasets", "a/set")):
        with monkeypatch.context() as missing:
            missing.setitem(sys.modules, package, None)
            assert read("a.csv", "text\none\n") == ["one"]
            with pytest.raises(ImportError, match=r"texts: .*pip install 'tritern\[train\]'"):
                read_texts(name) if "/" in name else read(name, b"x")


def test_the_command_says_what_is_wrong(ternary_path, read, caplog):
    caplog.set_level(logging.CRITICAL)
    for name, content, message in (
        (
            "x.jsonl",
            objects({"text": "fine"}, {"text": 3}),
            "x.jsonl, line 2: column 'text' must hold strings",
        ),
        (
            "x.jsonl",
            objects({"text": ["a"]}),
            "x.jsonl, line 1: column 'text' must hold strings; received list",
        ),
        ("x.txt", PNG, "x.txt is not a UTF-8 text file but an image"),
        ("x.txt", "one\n".encode("utf-16"), "x.txt is not a UTF-8 text file but UTF-16"),
        ("x.csv", "text\na, b\n", "x.csv, line 2: 2 cells"),
    ):
        with open(name, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
        result = run("search", ternary_path, name, "query")
        assert result.exit_code == 1 and message in result.stderr, result.stderr
    result = run("search", ternary_path, "-", "query", input=PNG)
    assert result.exit_code == 1 and "standard input is not a UTF-8 text file but an image" in result.stderr
    with open("x.NDJSON", "w") as file:
        file.write(objects({"text": "a text"}, {"text": None}))
    assert "a text" in run("search", ternary_path, "x.NDJSON", "query").stdout
