"""The column of texts in CSV, TSV, JSON and Parquet: the right one, strings only, and nothing lost."""

import json

import pyarrow as pa
import pytest

from tritern import TriternError

from .text_files import objects, parquet


def test_csv_keeps_strings_as_they_are(read):
    cells = [
        "NA",
        "None",
        "null",
        "nan",
        "",
        "007",
        "1e3",
        "True",
        " spaced ",
        'say ""hi""',
        "a, b; c",
        "two\nlines",
    ]
    content = "id,text\n" + "".join(f'{i},"{cell}"\n' for i, cell in enumerate(cells))
    assert read("a.csv", content) == [cell.replace('""', '"') for cell in cells]
    assert read("a.csv", content.replace("\n", "\r\n")) == [
        cell.replace('""', '"').replace("\n", "\r\n") for cell in cells
    ]
    assert read("a.csv", "text\nNA\nnull\n0\n") == ["NA", "null", "0"]
    assert read("a.csv", 'text,n\nhe said "no",1\n') == ['he said "no"']
    assert read("a.csv", "\n\n\ufefftext,n\n".replace("\ufeff", "") + "one,1\n\n,2\n") == ["one", ""]
    assert read("a.csv", "\ufefftext\nhello\n") == ["hello"]
    assert read("a.csv", "text, id\rone,1\rtwo,2\r") == ["one", "two"]
    assert read("gap.csv", "id,text\n1,first\n2,\n3,third\n") == ["first", "", "third"]
    assert read("late.csv", "title,id,text\nA,1,\nB,2,a text\n", limit=2) == ["", "a text"]
    long = "word " * 20_000
    assert read("a.csv", f"id,text\n1,{long}\n") == [long]


@pytest.mark.parametrize(
    ("content", "column", "texts"),
    [
        ("id;text\n1;hello, world\n", None, ["hello, world"]),
        ("id;text\n1;hello, world\n", "text", ["hello, world"]),
        ("id\ttext\n1\ta; b, c\n", None, ["a; b, c"]),
        ("id|text\n1|a; b, c\n", None, ["a; b, c"]),
        ("text\nhello; world\n", None, ["hello; world"]),  # one column, as the first line says
        ("text,note; remark\nhello; world,1\n", None, ["hello; world"]),
        ("titre, court;corps\nA;b, c\n", "corps", ["b, c"]),
        ('"a;b",text\n1,2;3\n', None, ["2;3"]),
        ("id,body\n1,one\n2,two\n", None, ["one", "two"]),
        ("id,price,body\n1,NA,one\n2,3.5,two\n3,4,three\n4,5,four\n", None, ["one", "two", "three", "four"]),
    ],
)
def test_separators(read, content, column, texts):
    assert read("a.csv", content, column=column) == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text\nfine\nhello, world of words\n", r"a.csv, line 3: 2 cells; the first line has 1 "),
        ("a.csv", "id,text\n1,one\n2,hello, world\n", r"a.csv, line 3: 3 cells; the first line has 2"),
        ("a.csv", 'id,text\n1,"two\nlines"\n\n3,a,b\n', r"a.csv, line 5: 3 cells; the first line has 2"),
        ("a.csv", "id,text,score\n1,hello\nworld,5\n", r"a.csv, line 2: 2 cells; the first line has 3"),
        ("a.csv", 'id,text\n1,"open\n2,b\n', r"a.csv, line 2: not CSV .unexpected end of data.*doubled"),
        ("a.csv", 'id,text\n1,"open\n2,"b"\n', r"a.csv, line 2: not CSV"),
        ("a.csv", f'id,text\n1,"{"word " * 30_000}"\n', r"line 2: not CSV .field larger.*such as .jsonl"),
        ("a.csv", "a text\nanother\n", r"first line, 'a text', may hold names or a text.*ending .txt"),
        ("a.csv", "sentence\none\ntwo\n", r"first line, 'sentence', may hold names or a text"),
        ("a.csv", "title,abstract\nA,one\n", r"first line, 'title, abstract', may hold names or a text"),
        ("a.csv", "1,one\n2,two\n", r"first line, '1, one', may hold names or a text"),
        ("a.csv", ",body\n0,one\n", r"first line, ', body', may hold names or a text"),
        ("a.csv", "id;a, b\n1;one\n", r"',' and ';' may separate its columns, by its first line"),
        ("a.csv", "id,price\n1,2\n", r"has no text column 'text'; its columns with strings: none"),
        ("a.csv", "text,text\na,b\n", r"has 2 columns 'text'; give each its name"),
        ("a.csv", "text\n", r"a.csv is empty: it has no row below the names of its columns"),
        ("a.tsv", 'id\ttext\n1\t"open\n2\tb"\n', r"a.tsv, line 2: a cell begins with a quote"),
        ("a.tsv", "id\ttext\n1\ta\tb\n", r"a.tsv, line 2: 3 cells; the first line has 2 .separated by '.t'"),
        ("a.tsv", "text\n1\ta\n", r"a.tsv, line 2: 2 cells; the first line has 1"),
        ("a.tsv", "one\ntwo\n", r"first line, 'one', may hold names or a text"),
    ],
)  # fmt: skip
def test_tables_that_would_lose_a_text_are_refused(read, name, content, message):
    with pytest.raises(TriternError, match=message):
        read(name, content)


def test_a_column_that_is_not_there(read):
    for name, content in (("a.csv", "text,id\na,1\n"), ("a.tsv", "text\tid\na\t1\n")):
        with pytest.raises(TriternError, match="no text column 'title'; its first line names: text, id"):
            read(name, content, column="title")
    for name, content in (
        ("a.jsonl", objects({"text": "a", "id": 1})),
        ("a.parquet", parquet(text=["a"], id=[1])),
    ):
        with pytest.raises(TriternError, match="no text column 'title'; its columns with strings: text"):
            read(name, content, column="title")
    assert read("a.csv", "sentence\none\n", column="sentence") == ["one"]
    assert read("a.csv", "id,n\n1,2\n", column="n") == ["2"]


def test_quotes_in_tsv_never_merge_lines(read):
    content = 'id\ttext\n1\t"Hello" he said\n2\t5" long\n3\t"a ""b"" c"\n4\t"whole"\n5\tend"\n\n'
    assert read("a.tsv", content) == ['"Hello" he said', '5" long', 'a "b" c', "whole", 'end"']
    assert read("a.csv", 'id\ttext\n1\t"two\nlines"\n') == ["two\nlines"]


def test_a_column_called_text_or_asked_for_wins(read, caplog):
    rows = [{"id": f"a{i}", "text": None, "body": "b"} for i in range(1200)] + [{"id": "z", "text": "late"}]
    expected = [""] * 1200 + ["late"]
    columns = {n: [row.get(n) for row in rows] for n in rows[0]}
    for name, content in (("a.jsonl", objects(*rows)), ("a.parquet", parquet(**columns))):
        assert read(name, content) == expected
        assert read(name, content, column="text") == expected
        assert read(name, content, column="body", limit=3) == ["b"] * 3
        assert read(name, content, limit=3) == [""] * 3
    assert read("a.csv", "id,text\n" + "a,\n" * 1200 + "z,late\n") == expected
    assert not caplog.messages
    assert read("a.jsonl", objects({"n": 1, "a": None}, {"n": 2, "a": "x", "b": "y"})) == ["", "x"]
    assert (
        "a.jsonl has no column 'text': took 'a', the first with strings; others: b (column= or" in caplog.text
    )
    assert read("a.jsonl", objects({"text": "a"}, {"id": 2})) == ["a", ""]
    assert read("a.parquet", parquet(a=["x"], b=["y"])) == ["x"] and "took 'a'" in caplog.messages[-1]
    late = objects(*({"id": f"a{i}"} for i in range(1000)), {"text": "late"})
    with pytest.raises(
        TriternError, match="a.jsonl, line 1001: has 'text'; earlier rows do not, so 'id' was taken"
    ):
        read("a.jsonl", late)
    assert read("a.jsonl", late, column="text") == [""] * 1000 + ["late"]
    assert read("a.jsonl", late, column="text", limit=2) == [""] * 2
    with pytest.raises(TriternError, match="no text column 'body' in its first 1,001 rows; .*: id"):
        read("a.jsonl", late, column="body")


@pytest.mark.parametrize(
    ("value", "kind"),
    [(3, "int"), (1.5, "float"), (True, "bool"), (["a", "b"], "list"), ({"a": "b"}, "dict")],
)
def test_values_that_are_no_strings_are_refused(read, value, kind):
    first = {"text": "fine", "body": "x"}
    for rows, column in (
        ([{"text": value}], None),
        ([{"text": value, "body": "x"}], None),
        ([first] * 1200, "text"),
    ):
        rows = [*rows, {"text": value}]
        line = next(n for n, row in enumerate(rows, 1) if row["text"] == value)
        message = f"column 'text' must hold strings; received {kind} .*name another column"
        with pytest.raises(TriternError, match=f"a.jsonl, line {line}: {message}"):
            read("a.jsonl", objects(*rows), column=column)
        with pytest.raises(TriternError, match=f"a.json, row {line}: {message}"):
            read("a.json", json.dumps(rows), column=column)
    with pytest.raises(
        TriternError, match=r"a.parquet: column 'text' must hold strings; it holds .*strings: b "
    ):
        read("a.parquet", parquet(text=[value], b=["x"]))


def test_json(read):
    assert read("a.jsonl", '\ufeff{"text": "a"}\r\n\r\n{"text": "b"}') == ["a", "b"]
    assert read("a.json", '["a", "b", null]'.replace(", null", "")) == ["a", "b"]
    assert read("a.json", '{\n "text": "a"\n}\n') == ["a"]
    assert read("a.json", '\n[\n{"text": "a"},\n{"text": "b"}\n]') == ["a", "b"]
    assert read("a.jsonl", '[{"text": "a"}]') == ["a"]
    for content, message in (
        ('{"text": "a"}\n\n{"text": "b\n', "line 3: not JSON .Unterminated string.*one object per line"),
        ('{"text": "a"}\n{"text": "b"\n', "line 2: not JSON .Expecting ',' delimiter"),
        ('{"text": "a"}{"text": "b"}', "line 1: not JSON .Extra data at character 14"),
        ('\n[\n{"text": "a"}\n{"text": "b"}]', "line 4: not JSON .Expecting ',' delimiter"),
        ('"a"\n"b"\n', "line 1: must be an object such as .*received str"),
        ('[{"text": "a"}, 3]', "row 2: must be an object such as .*received int"),
        ('{"text": "\\ud800x"}\n', r"line 1: column 'text' holds an invalid character .'.ud800x'"),
        ("[" * 100_000, "line 1: JSON that cannot be read"),
        (
            '{"data": [{"text": "a"}], "version": "1"}',
            "has no text column 'text'; its columns with strings: none",
        ),
    ):
        with pytest.raises(TriternError, match=f"a.jsonl.*{message}"):
            read("a.jsonl", content)


def test_parquet(read):
    assert read("a.parquet", parquet(**{"a.b": ["x", None], "n": [1, 2]}), column="a.b") == ["x", ""]
    assert read("a.parquet", parquet(text=pa.array(["x", None, "x"]).dictionary_encode())) == ["x", "", "x"]
    assert read("a.parquet", parquet(text=pa.array(["x"], pa.large_string()))) == ["x"]
    many = [f"text {i}" for i in range(2500)]
    assert read("a.parquet", parquet(text=many)) == many
    broken = pa.array([b"fine"] * 1500 + [b"na\xefve"]).view(pa.string())
    with pytest.raises(TriternError, match="a.parquet, row 1501: not UTF-8"):
        read("a.parquet", parquet(text=broken))
    with pytest.raises(TriternError, match="it holds binary"):
        read("a.parquet", parquet(text=[b"bytes"]))
    with pytest.raises(TriternError, match="cut.parquet cannot be read as Parquet: "):
        read("cut.parquet", b"PAR1\xef\xff")
