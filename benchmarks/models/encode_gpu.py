"""Whole models on a GPU: original against ternary; eager, compiled and in CUDA graphs.

    python benchmarks/models/encode_gpu.py                               all models, random weights
    python benchmarks/models/encode_gpu.py --models minilm --path DIR    and encode() of a MiniLM on real text
    python benchmarks/models/encode_gpu.py --models bge-base --shapes 32x128 512x64 --json encode.json

Models are built from their public configurations with random weights (a forward pass takes as long as
with the real ones); Qwen3-Embedding-8B with 8 of its 36 blocks. A shape is texts x tokens without padding.
An arm's time is the median of a forward pass on token ids that are on the GPU. "compiled" compiles each
block with torch.compile for the shape; "graph" replays the forward pass as one CUDA graph. fp16 is the
baseline: a GPU measures it in all of these kinds at every shape, whatever --kinds names. "speed" is the time
of the fastest 16-bit arm of that shape over this one's: below 1 is a loss. It is "-" while the baseline is
not compiled, and for a graph while no 16-bit arm is in a graph. Memory: weights held, and the most held
during the pass. Before: all linear layers of bge-base on 16 tokens in one CUDA graph, and forward passes of
new lengths after tritern.warmup, which must not stall. With --path also tokenization, forward pass and
copying of encode(), as shares of its time. Where lengths vary, cuDNN's attention is off: it plans anew for
each shape.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks folder

import report
import torch
from models.pass_table import table, with_speeds
from models.passes import (
    MODELS,
    blocks,
    build,
    forward,
    graphed,
    held,
    host_microseconds,
    milliseconds,
)
from torch import Tensor, nn

import tritern
from tritern.modes import without_cudnn_attention

KINDS = ("eager", "graph", "compiled", "compiled graph")
SHAPES = ((1, 16), (32, 128), (256, 128))


def measure(
    name: str, arm: str, model: nn.Module, kinds: tuple[str, ...], shapes: list[tuple[int, int]], device: str
) -> list[dict[str, Any]]:
    """Rows of one model in one precision; a failure becomes its row's reason."""
    rows = []
    for compiled in sorted({"compiled" in k for k in kinds}):
        for texts, tokens in shapes:
            if compiled:  # afresh, lest shapes before count towards dynamo's limit of recompilations
                torch._dynamo.reset()
                for block in blocks(model):
                    block.compile(dynamic=False)
            ids = torch.randint(1000, 30000, (texts, tokens)).to(device)  # not by a CUDA generator
            for kind in (k for k in kinds if ("compiled" in k) == compiled):
                row: dict[str, Any] = {"model": name, "arm": arm, "kind": kind}
                row |= {"texts": texts, "tokens": tokens}
                rows.append(row)
                if device == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                try:
                    call = partial(forward, model, ids)
                    call()
                    row |= {"first_call_s": round(time.perf_counter() - start, 2)}
                    encoder = MODELS[name]["type"] == "bert"
                    row |= milliseconds(graphed(call, encoder) if "graph" in kind else call)
                except Exception as error:  # a row that says so
                    row["reason"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
                    continue
                row |= {"sentences_per_second": 1e3 * texts / row["p50_ms"], "held_mb": held(model)}
                if device == "cuda":
                    row["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
    return rows


def linears_in_a_graph(name: str, tokens: int) -> list[dict[str, Any]]:
    """All linear layers of a BERT's blocks, one after the other in one CUDA graph: 16-bit against ternary."""
    m = MODELS[name]
    h, i = m["hidden"], m["intermediate"]
    x = {size: torch.randn(tokens, size, device="cuda", dtype=torch.bfloat16) for size in (h, i)}
    rows: list[dict[str, Any]] = []
    for arm in ("bf16", "ternary", "ternary 16"):
        shapes = [(h, h), (h, h), (h, h), (h, h), (i, h), (h, i)] * m["layers"]
        layers = [nn.Linear(K, N, device="cuda", dtype=torch.bfloat16) for N, K in shapes]
        if arm != "bf16":
            bits = 16 if "16" in arm else 8
            layers = [tritern.TernaryLinear.from_linear(layer, activation_bits=bits) for layer in layers]

        def call(layers: list[Any] = layers) -> Tensor:
            return [layer(x[layer.in_features]) for layer in layers][-1]

        row: dict[str, Any] = {"model": name, "arm": arm, "layers": len(layers), "tokens": tokens}
        row |= {"host_us_per_layer": host_microseconds(call) / len(layers)} | milliseconds(graphed(call))
        rows.append(row | {"speed": (rows[0] if rows else row)["p50_ms"] / row["p50_ms"]})
        print(
            f"{len(layers)} linears of {name}, {tokens} tokens, one graph: {arm:10s} {row['p50_ms']:.3f} ms; "
            f"eager calls take the host {row['host_us_per_layer']:.1f} us a layer"
        )
    return rows


@without_cudnn_attention()
def new_lengths(device: str, count: int = 60) -> dict[str, Any]:
    """Forward passes whose numbers of tokens come for the first time, after ``tritern.warmup``: their times,
    and how many kernels they compiled. Without cuDNN's attention.
    """
    from triton.runtime.jit import JITFunction

    found: dict[str, Any] = {}
    compile_ = JITFunction._do_compile
    for arm in ("fp16", "ternary", "ternary fused"):
        model = build("minilm", torch.float16, device)
        warmup_s = 0.0
        if arm != "fp16":
            tritern.patch(model)
            if arm == "ternary fused":
                tritern.fuse(model)
            start = time.perf_counter()
            tritern.warmup(model)
            warmup_s = time.perf_counter() - start
        forward(model, torch.full((3, 7), 1000, device=device))
        samples = []
        watched = mock.patch.object(JITFunction, "_do_compile", autospec=True, side_effect=compile_)
        with watched as compiled:
            for i in range(count):
                ids = torch.full((1 + 5 * i, 8 + 3 * (i % 17)), 1000, device=device)
                torch.cuda.synchronize()
                start = time.perf_counter()
                forward(model, ids)
                torch.cuda.synchronize()
                samples.append(1e3 * (time.perf_counter() - start))
        found[arm] = {
            "warmup_s": warmup_s, "median_ms": statistics.median(samples), "largest_ms": max(samples),
            "compiled": compiled.call_count,
        }  # fmt: skip
        print(f"{count} new lengths, {arm}: {found[arm]}")
    return found


@without_cudnn_attention()
def end_to_end(path: str, device: str, sentences: int, compiled: bool) -> list[dict[str, Any]]:
    """encode() of a real sentence-transformer on real text: rate, and where the time goes.

    Without cuDNN's attention.
    """
    from models.encode import texts_for
    from sentence_transformers import SentenceTransformer

    texts = texts_for(argparse.Namespace(texts=None), sentences)
    rows = []
    for arm in ("fp16", "ternary", "ternary fused"):
        model = SentenceTransformer(path, device=device, model_kwargs={"dtype": torch.float16})
        if arm != "fp16":
            tritern.patch(model)
        if arm == "ternary fused":
            tritern.fuse(model)
        for kind in ("eager", "compiled")[: 2 if compiled and arm != "ternary fused" else 1]:
            if kind == "compiled":
                torch._dynamo.reset()
                for block in blocks(model):
                    block.compile(dynamic=True)
            for batch in (32, 128, 512):
                run = partial(model.encode, batch_size=batch, show_progress_bar=False, convert_to_tensor=True)
                run(texts)
                seconds, parts = [], {"tokenize": 0.0, "forward": 0.0, "copy": 0.0}
                for _ in range(3):
                    start = time.perf_counter()
                    run(texts).cpu()
                    seconds.append(time.perf_counter() - start)
                for i in range(0, sentences, batch):
                    marks = [time.perf_counter()]
                    features = model.preprocess(texts[i : i + batch])
                    marks.append(time.perf_counter())
                    features = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in features.items()}
                    with torch.inference_mode():
                        out = model(features)["sentence_embedding"]
                        if device == "cuda":
                            torch.cuda.synchronize()
                        marks.append(time.perf_counter())
                        out.cpu()
                    marks.append(time.perf_counter())
                    for part, a, b in zip(parts, marks, marks[1:]):
                        parts[part] += b - a
                total = sum(parts.values())
                rows.append({
                    "model": Path(path).name, "arm": arm, "kind": kind, "batch": batch,
                    "sentences_per_second": sentences / statistics.median(seconds),
                    "shares": {k: v / total for k, v in parts.items()},
                })  # fmt: skip
                shares = ", ".join(f"{k} {100 * v:.0f} %" for k, v in rows[-1]["shares"].items())
                rate = rows[-1]["sentences_per_second"]
                print(f"encode() {arm:13s} {kind:9s} batch {batch:4d} {rate:9.0f} sentences/s; {shares}")
    return rows


def arms(name: str, wanted: list[str], device: str, compiled: bool) -> dict[str, tuple[str, ...]]:
    """The arms of a model, each with its kinds, in the pass of compiled kinds or in the one before it.

    On a GPU fp16 has all kinds: the other arms are compared with the fastest.
    """
    baseline = KINDS if device == "cuda" else wanted
    found = {
        arm: tuple(k for k in kinds if ("compiled" in k) == compiled)
        for arm, kinds in (("fp16", baseline), ("ternary", wanted))
    }
    if not compiled:
        found |= {"ternary fused": found["ternary"]}
        if name == "minilm":
            few = found["ternary"][:1]
            found = {"fp32": few, "bf16": few} | found | {"ternary 16": few}
    return {arm: kinds for arm, kinds in found.items() if kinds}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="*", default=list(MODELS), choices=list(MODELS), help="default: all")
    add("--shapes", nargs="+", help="texts x tokens, such as 32x128; default: 1x16 32x128 256x128")
    add("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="of arms but fp16 (default: all)")
    add("--path", help="a sentence-transformer for encode(), such as a folder with all-MiniLM-L6-v2")
    add("--sentences", type=int, default=8192, help="texts for encode() (default: 8192)")
    add("--seconds", type=float, default=float("inf"), help="start no further model after this")
    add("--json", type=Path, help="write all rows, rewritten after each model")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        pairs = [s.split("x") for s in options.shapes or ()]
        shapes = [(int(a), int(b)) for a, b in pairs] or list(SHAPES)
    except ValueError:
        parser.error(f"shapes are texts x tokens, such as 32x128; received {' '.join(options.shapes)}")
    import transformers

    facts = report.environment() | {"transformers": transformers.__version__, "models": MODELS}
    rows: list[dict[str, Any]] = []
    wanted = [k for k in KINDS if k in options.kinds and (device == "cuda" or "graph" not in k)]
    begin = time.perf_counter()

    def write() -> None:
        if options.json:
            report.write_json(options.json, facts | {"rows": rows})

    with torch.no_grad():
        if device == "cuda" and "eager" in wanted:
            facts["linears"] = linears_in_a_graph("bge-base", 16)
            facts["new_lengths"] = new_lengths(device)
            write()
        # compiled ones after the others, for they take longest
        for compiled, name in [(c, n) for c in (False, True) for n in options.models]:
            if time.perf_counter() - begin > options.seconds:
                print(f"out of time: {name}{' compiled' * compiled} not measured")
                continue
            kinds_of = arms(name, wanted, device, compiled)
            for arm, kinds in kinds_of.items():
                dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(arm, torch.float16)
                model = build(name, dtype, device)
                if arm.startswith("ternary"):
                    tritern.patch(model, activation_bits=16 if "16" in arm else 8)
                if arm == "ternary fused":
                    tritern.fuse(model)
                rows += measure(name, arm, model, kinds, shapes, device)
                del model
                gc.collect()
            with_speeds(rows)
            if kinds_of:
                print(table([r for r in rows if r["model"] == name]) + "\n", flush=True)
            write()
    if options.path:
        facts["encode"] = end_to_end(options.path, device, options.sentences, "compiled" in wanted)
        write()


if __name__ == "__main__":
    main()
