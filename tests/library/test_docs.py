"""Every code block of README.md and docs/*.md is run, or at least parsed by the command that it calls
(``pages`` says how); the site builds; names, links and measured numbers are what they should be.
"""

import json
import re
import subprocess
import sys
from itertools import product

import pytest

from .pages import ROOT, Page, blocks

DOCS = ROOT / "docs"
PAGES = sorted(p.relative_to(ROOT).as_posix() for p in [ROOT / "README.md", *DOCS.glob("*.md")])
RESULTS = "benchmarks/results/README.md"
STAND_INS = "all-MiniLM-L6-v2", "BAAI/bge-base-en-v1.5", "intfloat/e5-small-v2"
WITH_A_TINY_MODEL = (  # MiniLM takes ten times as long
    "README.md",
    "docs/choosing-a-mode.md",
    "docs/distilling-your-model.md",
    "docs/serving.md",
)


@pytest.fixture
def folder(request, tmp_path, minilm_path, tiny_path, monkeypatch):
    """A working folder with short texts and a model under each name that the pages use."""
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    for stand_in in STAND_INS:
        (tmp_path / stand_in).parent.mkdir(exist_ok=True)
        (tmp_path / stand_in).symlink_to(tiny_path if name in WITH_A_TINY_MODEL else minilm_path)
    if name == RESULTS:  # its commands name the folder that the training before them writes
        (tmp_path / "minilm-ternary").symlink_to(tiny_path)
    who = [f"{a} {b}" for a in ("A", "The", "One", "Our") for b in ("man", "cat", "child", "cook", "guide")]
    does = [
        f"{a} {b}"
        for a in ("paints", "finds", "sells", "drops")
        for b in ("a boat", "it", "rice", "two", "tea")
    ]
    texts = [f"{w} {d}." for w, d in product(who, does)]
    (tmp_path / "corpus.txt").write_text("\n".join(texts) + "\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", [*PAGES, RESULTS])
def test_the_blocks_of(name, folder, monkeypatch):
    page = Page(monkeypatch)
    found = list(blocks((ROOT / name).read_text(encoding="utf-8")))
    for block, following in zip(found, [*found[1:], None]):
        print(f"the block of {name}, line {block.line}")  # shown if it fails
        page.examine(block, following)


# ---------------------------------------------------------------- the examiner itself

WRONG = [
    ("```python\nprint(1)\n```\n```text\n2\n```", AssertionError, "1"),
    ("```python\n1 / 0\n```", ZeroDivisionError, "division"),
    ("```sql\nselect\n```", AssertionError, "unknown tag 'sql'"),
    ("```text\n2\n```", AssertionError, "without a block"),
    ("```bash\nfalse\n```", AssertionError, "1"),
    ("```console\n$ echo 1\n2\n```", AssertionError, "1"),
    ("<!-- not run: slow -->\n```bash\npython benchmarks/models/encode.py --no-such\n```", SystemExit, "2"),
    ("    python examples/distill_e5.py --texts a --output b --no_such 3", ValueError, "no_such"),
    ("<!-- not run: slow -->\n```bash\npython benchmarks/no_such.py\n```", FileNotFoundError, "no_such"),
    ("<!-- not run: slow -->\n```bash\nmake nothing\n```", AssertionError, "nothing"),
    ("<!-- not run: slow -->\n```bash\npip install tritern[nothing]\n```", AssertionError, "nothing"),
    ("<!-- not run: slow -->\n```bash\nfrobnicate\n```", pytest.fail.Exception, "no way to check"),
    ("    frobnicate --all", AssertionError, "frobnicate"),
]


@pytest.mark.parametrize("text, error, match", WRONG)
def test_a_wrong_block_fails(text, error, match, folder, monkeypatch):
    page = Page(monkeypatch)
    found = list(blocks(text))
    with pytest.raises(error, match=match):
        for block, following in zip(found, [*found[1:], None]):
            page.examine(block, following)


def test_right_blocks_pass(folder, monkeypatch):
    text = """```python
1 / 0
```
```text
ZeroDivisionError: division by zero
```
<!-- numbers vary -->
```console
$ echo 3.5 ms   1
4,000 ms 2
```
<!-- not run: slow -->
```bash
OUT=results bash benchmarks/gpu_round.sh
python benchmarks/models/encode.py --quick   # with a comment
torchrun --nproc-per-node 4 examples/distill_e5.py --texts a.txt --output b --bf16 --max_steps 3
```
"""
    page = Page(monkeypatch)
    found = list(blocks(text))
    assert [b.tag for b in found] == ["python", "text", "console", "bash"]
    for block, following in zip(found, [*found[1:], None]):
        page.examine(block, following)


# ---------------------------------------------------------------- the pages as a whole


def test_site_builds_strictly_and_needs_no_network(tmp_path):
    pytest.importorskip("mkdocstrings_handlers.python")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) >= len(PAGES) - 1
    fetched = re.compile(
        r"<(?:script|img|iframe)[^>]+src=\S*//|<link[^>]+stylesheet[^>]+href=\S*//|@import\s+\S*//"
    )
    for file in [*pages, *tmp_path.rglob("*.css")]:
        assert not fetched.search(file.read_text(encoding="utf-8")), file


def test_the_readme_is_read_in_two_minutes():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    for mark, rows in (("quality", 4), ("speed", 6)):
        block = lines[lines.index(f"<!-- {mark} -->") + 1 : lines.index(f"<!-- /{mark} -->")]
        assert len([line for line in block if line.startswith("|")]) == rows + 2  # with the heading


def test_every_public_name_is_in_the_api_page():
    import tritern
    import tritern_kernels

    text = (DOCS / "api.md").read_text()
    shown = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    names = set()
    for name in set(tritern.__all__) - {"__version__"}:  # a function may be shown under its module
        home = f"{getattr(tritern, name).__module__}.{name}"
        names.add(home if home in shown else f"tritern.{name}")
    names |= {f"tritern_kernels.{n}" for n in tritern_kernels.__all__ if n.islower()}
    missing = names - shown - {"tritern.PackedWeight"}  # which is tritern_kernels.PackedWeight
    assert not missing


def anchors(file):
    """What headings are linked by."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("name", [*PAGES, RESULTS, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_and_files_named_in(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    folder = (ROOT / name).parent
    targets = [t.partition("#")[::2] for t in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in t]
    missing = [t for t, _ in targets if t and not (folder / t).exists()]
    for target, anchor in targets:
        file = folder / target if target else ROOT / name
        if (
            anchor and file.suffix == ".md" and file.exists() and file.name != "api.md"
        ):  # made by mkdocstrings
            missing += [anchor] if anchor not in anchors(file) else []
    roots = "benchmarks", "docs", "examples", "kernels", "tests", "tritern"
    named = re.findall(rf"`((?:{'|'.join(roots)})/[\w/.-]+)`", text)
    missing += [n for n in named if not (ROOT / n).exists()]
    assert not missing


def test_measured_figures_are_those_of_the_readmes():
    """README.md or that of the results; or of the tables that ``benchmarks/tables.py`` writes here, or of a
    file of results that a page names.
    """
    results = ROOT / "benchmarks" / "results"
    mpnet = json.loads((results / "cpu-mpnet-patched.json").read_text())["rows"]
    known = [f"{value:.2f}" for row in mpnet.values() for value in row["scores"].values()]
    known += [f"{value:.1f} %" for row in mpnet.values() for value in row["retention"].values()]
    for file in (ROOT / "README.md", results / "README.md"):
        known += [file.read_text(encoding="utf-8")] if file.exists() else []
    start = (DOCS / "index.md").read_text().partition("## What it brings")[2].partition("## Install")[0]
    for text, least in (((DOCS / "choosing-a-mode.md").read_text(), 20), (start, 8)):
        table = re.compile(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", re.DOTALL)
        written = table.sub("", text)
        here = "\n".join([*known, *(m.group() for m in table.finditer(text))])
        measured = re.findall(r"(?<![\w.])\d+\.\d+(?:x| %)?(?![\w.])", written)
        assert len(measured) > least
        assert not [m for m in measured if m not in here]


def test_figures_of_the_readme_are_those_of_the_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tables = re.compile(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", re.DOTALL)
    known = "\n".join(
        [(ROOT / RESULTS).read_text(encoding="utf-8"), *(m.group() for m in tables.finditer(text))]
    )
    figures = re.findall(r"\d+\.\d+(?:x| %| minutes)", tables.sub("", text))
    assert len(figures) >= 5 and not [figure for figure in figures if figure not in known]
