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
from fastapi.responses import HTMLResponse, PlainTextResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

import tritern
from tritern.search import SearchIndex, embed

from .corpus import Corpus, link
from .page import PAGE, POLICY
from .render import render

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

LONGEST_QUERY, MOST_HITS = 1000, 100
BATCH = 32
"""Questions that wait together are embedded together, so many at most."""


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
        return [
            {
                **stages,
                "hits": [
                    {**asdict(h), "html": render(str(h.id), h.text, query), "link": link(str(h.id))}
                    for h in hits
                ],
            }
            for query, hits in zip(queries, found)
        ]


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


def application(sides: Sequence[Side], corpus: Corpus, hosts: Sequence[str]) -> FastAPI:
    """The page at ``/``, answers at ``/api/search?q=&k=``, ``/api/corpus``, ``/api/health``, ``/source``.

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

    @app.get("/api/corpus")
    async def start() -> dict[str, Any]:
        sizes = {"documents": len(corpus.documents), "passages": len(sides[0].index)}
        return {"name": corpus.name, **sizes, "examples": corpus.examples}

    @app.get("/source", response_class=PlainTextResponse)
    def source(path: str = "") -> PlainTextResponse:
        file = corpus.source(path)
        if file is None or not file.is_file():
            raise HTTPException(404, "no such document in the index")
        text = file.read_bytes().decode("utf-8-sig", errors="replace")
        return PlainTextResponse(text, headers={"X-Content-Type-Options": "nosniff"})

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


def serve(sides: Sequence[Side], corpus: Corpus, listening: socket.socket, host: str) -> None:
    """Answer until interrupted; what is under way is answered first."""
    local = host in ("127.0.0.1", "localhost")
    app = application(sides, corpus, ["127.0.0.1", "localhost"] if local else ["*"])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn raises its signal again at the end
    name = f"[{host}]" if ":" in host else host
    print(f"http://{name}:{listening.getsockname()[1]}/ (Ctrl-C ends)", file=sys.stderr, flush=True)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
