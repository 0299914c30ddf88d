"""examples/search_page: what the page shows of passages and of their corpus."""

import importlib
from pathlib import Path

import pytest

pytest.importorskip("faiss")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def examples_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture
def rendering():
    return importlib.import_module("search_page.render")


def test_markdown_becomes_headings_lists_and_code(rendering):
    pytest.importorskip("markdown_it")
    text = "Guide > `Install`\n## Next\n\n- a `b`\n- c\n\n```python\nif a:\n    b < c\n```"
    made = rendering.render("deep/a.md:3", text)
    assert made.startswith("<h3>Guide &gt; Install</h3><h2>Next</h2>")
    assert "<li>a <code>b</code></li>" in made
    assert ">if a:\n    b &lt; c\n</code></pre>" in made
    cut = rendering.render("a.md:9", "Guide\nif a:\n    b\n```\nAfter")  # the block began in another passage
    assert cut == "<h3>Guide</h3><pre><code>if a:\n    b\n</code></pre>\n<p>After</p>\n"


@pytest.mark.parametrize("package", [True, False])
@pytest.mark.parametrize("name", ["a.md:1", "a.rst:1", "a.txt:1", "https://example.org/a.md"])
def test_no_tag_comes_from_the_text(rendering, monkeypatch, name, package):
    if not package:
        monkeypatch.setattr(rendering, "MarkdownIt", None)
    tag = "<script>taken()</script> <img src=x onerror='taken()'>"
    image = '![x" onerror="taken()](javascript:taken())'
    link = '[y](javascript:taken()) [z](https://example.org/"onclick=taken())'
    fence = '```"><script>taken()</script>\ncode\n```'
    made = rendering.render(name, f"{tag}\n{tag}\n\n{image}\n\n{link}\n\n{fence}", "script taken img onerror")
    allowed = {"h3", "p", "pre", "code", "mark", "ul", "li"}
    tags = importlib.import_module("re").findall(r"<\s*/?\s*(\w+)([^>]*)>", made)
    assert {tag for tag, _ in tags} <= allowed
    assert all(rest in ("", ' class="plain"') or rest.startswith(' class="language-') for _, rest in tags)
    assert all("onerror=" not in rest.replace("&quot;", "") for _, rest in tags)


def test_only_text_is_marked(rendering):
    assert rendering.render("a.txt:1", "Models & the Class amp", "the models' class, amp?") == (
        '<p class="plain"><mark>Models</mark> &amp; the <mark>Class</mark> <mark>amp</mark></p>'
    )
    assert "<mark>" not in rendering.render("a.txt:1", "remodel <b>", "model class plain p lt")


def test_without_the_package_markdown_is_plain_text(rendering, monkeypatch):
    monkeypatch.setattr(rendering, "MarkdownIt", None)
    assert rendering.render("a.md:1", "- `a`\n    b") == '<p class="plain">- `a`\n    b</p>'


def test_example_questions_are_titles_of_different_documents(tmp_path):
    corpus = importlib.import_module("search_page.corpus")
    passages = [(f"d{n}.md:{line}", f"Book > Title {n} at {line}\ntext") for n in range(6) for line in (1, 5)]
    passages += [
        ("a.txt:1", "What is it? It is long."),
        ("https://example.org:80", "x"),
        ("b.txt:1", "<b> begins with a sign"),
    ]
    made = corpus.Corpus.of(tmp_path, passages)
    assert made.name == tmp_path.name and made.folder is None and len(made.documents) == 9
    assert made.examples == ("Title 0 at 1", "Title 2 at 1", "Title 4 at 1")
    assert corpus.Corpus.of(tmp_path, passages[-3:]).examples == ("What is it?",)
    assert corpus.Corpus.of(tmp_path, passages, ["roof?", "door?"]).examples == ("roof?", "door?")


def test_links_lead_to_addresses_or_to_the_source_route():
    corpus = importlib.import_module("search_page.corpus")
    assert corpus.link("https://example.org/a:8") == "https://example.org/a:8"
    assert corpus.link("deep/a b&c.md:12#2") == "source?path=deep/a%20b%26c.md"
    assert corpus.link("javascript:taken()") == "source?path=javascript%3Ataken%28%29"
