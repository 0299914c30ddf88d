"""The page of ``semantic_search.py`` and its server: FastAPI, run by uvicorn."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import HTMLResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

import tritern
from tritern.search import SearchIndex, embed

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

LONGEST_QUERY, MOST_HITS = 1000, 100
BATCH = 32
"""Questions that wait together are embedded together, so many at most."""

PAGE = r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Semantic search</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --ink: #1c2430; --soft: #59636f; --paper: #f6f7f9; --card: #fff;
  --line: #c9d0d8; --accent: #0b57d0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #a3adb9; --paper: #13171d;
  --card: #1c222b; --line: #434d5a; --accent: #8ab4f8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.25rem 1rem 3rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.25rem; margin: 0 0 .75rem; }
form { display: flex; gap: .5rem; flex-wrap: wrap; }
input, select, button { font: inherit; color: inherit; background: var(--card); padding: .55rem .75rem;
  border: 1px solid var(--line); border-radius: .5rem; }
input { flex: 1 1 18rem; min-width: 0; }
button { background: var(--accent); color: var(--paper); font-weight: 600; cursor: pointer; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
#status { margin: .75rem 0; min-height: 1.5em; color: var(--soft); }
#sides { display: grid; gap: 1.25rem;
  grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); }
dl, dl div, header { display: flex; flex-wrap: wrap; gap: .1rem .7rem; font-size: .85rem;
  color: var(--soft); }
dl { margin: .75rem 0 0; font-size: .75rem; }
h2 { font-size: 1rem; margin: 0 0 .5rem; }
dl div { gap: .3rem; }
dd { margin: 0; color: var(--ink); }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: .6rem; }
li { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .6rem .8rem; }
code { overflow-wrap: anywhere; }
li p { margin: .25rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .92rem;
  max-height: 9.2em; overflow: auto; }
</style></head><body><main><h1>Semantic search</h1>
<form role="search"><input type="search" name="q" aria-label="Question" placeholder="Ask in your own words"
  maxlength="1000" autocomplete="off" autofocus>
<select name="k" aria-label="Hits shown"><option>5<option selected>10<option>20<option>50</select>
<button>Search</button></form>
<p id="status" role="status"></p><div id="sides"></div>
<noscript>This page needs JavaScript; api/search?q=...&amp;k=10 answers in JSON.</noscript></main>
<script>
const form = document.querySelector("form"), { q: box, k: many } = form.elements, plain = document.title;
const said = document.getElementById("status"), sides = document.getElementById("sides");
let running;
const mb = bytes => bytes === null ? "unknown" : (bytes / 1e6).toFixed(1) + " MB";
function add(parent, tag, text = "") {
  const made = parent.appendChild(document.createElement(tag));
  made.textContent = text;  // never as HTML: passages may hold anything
  return made;
}
function show(answer) {
  sides.replaceChildren();
  const found = answer.sides.map(side => new Set(side.hits.map(hit => hit.id)));
  for (const side of answer.sides) {
    const part = add(sides, "section"), title = add(part, "h2", side.name), facts = add(part, "dl");
    part.setAttribute("aria-labelledby", title.id = "side-" + sides.childElementCount);
    const unpacked = side.unpacked_bytes ? ` + ${mb(side.unpacked_bytes)} unpacked` : "";
    for (const [name, value] of [["embed", side.embed_ms.toFixed(1) + " ms"],
        ["search", side.search_ms.toFixed(2) + " ms"], ["weights", mb(side.weight_bytes) + unpacked],
        ["index", mb(side.index_bytes)]]) {
      const pair = add(facts, "div");
      add(pair, "dt", name);
      add(pair, "dd", value);
    }
    const list = add(part, "ol");
    for (const hit of side.hits) {
      const item = add(list, "li"), head = add(item, "header"), text = add(item, "p", hit.text);
      add(head, "b", hit.score.toFixed(3));
      add(head, "code", hit.id);
      if (!found.every(ids => ids.has(hit.id))) add(head, "span", "only here");
      if (text.scrollHeight > text.clientHeight) text.tabIndex = 0;  // so that keys can scroll it
    }
    part.append(facts);  // below the hits
  }
  const shared = [...found[0]].filter(id => found.every(ids => ids.has(id))).length;
  said.textContent = `${answer.passages.toLocaleString("en")} passages, ${answer.total_ms.toFixed(1)} ms` +
    (answer.batch > 1 ? ` in a batch of ${answer.batch}` : "") +
    (found.length > 1 ? `; ${shared} of ${found[0].size} hits on both sides` : "") +
    `; the process holds ${mb(answer.resident_bytes)}`;
}
async function ask() {
  const q = box.value.trim();
  document.title = q ? q + " - " + plain : plain;
  running?.abort();
  sides.replaceChildren();
  said.textContent = q ? "Searching ..." : "";
  if (!q) return;
  const signal = (running = new AbortController()).signal;
  try {
    const reply = await fetch("api/search?" + new URLSearchParams({ q, k: many.value }), { signal });
    const answer = await reply.json();
    if (reply.ok) show(answer);
    else said.textContent = answer.detail;
  } catch (error) {
    if (error.name !== "AbortError") said.textContent = "The server does not answer: " + error.message;
  }
}
function fromAddress() {
  const address = new URLSearchParams(location.search);
  box.value = address.get("q") ?? "";
  if ([...many.options].some(option => option.value === address.get("k"))) many.value = address.get("k");
  ask();
}
form.addEventListener("submit", event => {
  event.preventDefault();
  history.pushState(null, "", "?" + new URLSearchParams({ q: box.value.trim(), k: many.value }));
  ask();
});
many.addEventListener("change", () => form.requestSubmit());
addEventListener("popstate", fromAddress);
fromAddress();
</script></body></html>"""
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'self'"
)
"""Nothing is fetched from elsewhere, and nothing is sent there."""


@dataclass
class Side:
    """A model with its index of the passages, and what is said of both."""

    model: SentenceTransformer
    index: SearchIndex
    name: str

    def facts(self) -> dict[str, Any]:
        """Bytes in memory; on a CPU ternary weights are kept unpacked too."""
        size, on_disk = tritern.summary(self.model), self.index.bytes
        return {
            "name": self.name,
            "weight_bytes": size.model_bytes_after,
            "unpacked_bytes": size.unpacked_bytes,
            "index_bytes": on_disk["vectors"] + on_disk["faiss"],
        }

    def answer(self, queries: Sequence[str], k: int) -> list[dict[str, Any]]:
        """For each question the hits, and the milliseconds that all of the questions took together."""
        begin = time.perf_counter()
        vectors = embed(self.model, queries, task="query")
        embedded = time.perf_counter()
        found = self.index.hits(*self.index.search_vectors(vectors, k))
        stages = {"embed_ms": 1e3 * (embedded - begin), "search_ms": 1e3 * (time.perf_counter() - embedded)}
        return [{**stages, "hits": [asdict(hit) for hit in hits]} for hits in found]


class Batcher:
    """Answers the questions that wait together as one batch, and one batch after the other."""

    def __init__(self, sides: Sequence[Side]) -> None:
        self.sides = [(side, side.facts()) for side in sides]
        self.waiting: asyncio.Queue[tuple[str, int, asyncio.Future[dict[str, Any]]]] = asyncio.Queue()

    async def ask(self, query: str, k: int) -> dict[str, Any]:
        """The answer of all sides, when its turn has come."""
        begin, future = time.perf_counter(), asyncio.get_running_loop().create_future()
        self.waiting.put_nowait((query, k, future))
        answer = await future
        return {**answer, "total_ms": 1e3 * (time.perf_counter() - begin), "resident_bytes": resident_bytes()}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            batch = [await self.waiting.get()]
            while len(batch) < BATCH and not self.waiting.empty():
                batch.append(self.waiting.get_nowait())
            try:
                answers = await asyncio.to_thread(
                    self._answer, [q for q, _, _ in batch], [k for _, k, _ in batch]
                )
            except Exception as error:
                answers = [error] * len(batch)  # told to those who asked; the next ones are served
            for (_, _, future), answer in zip(batch, answers):
                if future.done():  # nobody waits any more
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)

    def _answer(self, queries: list[str], many: list[int]) -> list[dict[str, Any]]:
        found = [(facts, side.answer(queries, max(many))) for side, facts in self.sides]
        shared = {"passages": len(self.sides[0][0].index), "batch": len(queries)}
        return [
            {"query": query, **shared, "sides": [{**f, **a[n], "hits": a[n]["hits"][:k]} for f, a in found]}
            for n, (query, k) in enumerate(zip(queries, many))
        ]


def resident_bytes() -> int | None:
    """What this process holds in memory, where the system says it as Linux does."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def application(sides: Sequence[Side], hosts: Sequence[str]) -> FastAPI:
    """The page at ``/``, answers at ``/api/search?q=&k=``, and ``/api/health``.

    ``hosts`` are the names that it may be called by: else a page elsewhere could read the passages by giving
    its own name this machine's address.
    """
    batcher = Batcher(sides)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        work = asyncio.create_task(batcher.run())
        yield
        work.cancel()
        with suppress(asyncio.CancelledError):
            await work

    app = FastAPI(title="Semantic search", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY})

    @app.get("/api/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "passages": len(sides[0].index), "waiting": batcher.waiting.qsize()}

    @app.get("/api/search")
    async def search(q: str = "", k: str = "10") -> dict[str, Any]:
        if not q.strip():
            raise HTTPException(422, "q is empty: ask something, as in api/search?q=roof")
        if len(q) > LONGEST_QUERY:
            raise HTTPException(422, f"q must have at most {LONGEST_QUERY:,} characters; received {len(q):,}")
        if not (k.isascii() and k.isdigit() and len(k) < 10 and 1 <= int(k) <= MOST_HITS):
            raise HTTPException(422, f"k must be a number from 1 to {MOST_HITS}; received {k[:20]!r}")
        try:
            return await batcher.ask(q, int(k))
        except (RuntimeError, ValueError) as error:
            raise HTTPException(500, f"the search failed: {error}") from error

    return app


def bound(host: str, port: int) -> socket.socket:
    """A socket that will listen there.

    Raises:
        SystemExit: the port is in use, or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SystemExit(f"cannot listen on {host}, port {port}: {reason}; try another --port") from None
    return made


def serve(sides: Sequence[Side], listening: socket.socket, host: str) -> None:
    """Answer until interrupted; what is under way is answered first."""
    local = host in ("127.0.0.1", "localhost")
    app = application(sides, ["127.0.0.1", "localhost"] if local else ["*"])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn raises its signal again at the end
    name = f"[{host}]" if ":" in host else host
    print(f"http://{name}:{listening.getsockname()[1]}/ (Ctrl-C ends)", file=sys.stderr, flush=True)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
