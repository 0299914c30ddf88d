"""Attention over texts of different lengths: tritern's packed kernel, torch's varlen_attn, padded SDPA.

    python benchmarks/ops/attention.py --json attention.json
    TRITON_INTERPRET=1 python benchmarks/ops/attention.py --models minilm --tokens 200   no GPU, no times

fp16, texts of random lengths in a range until there are --tokens of them, heads of the models' widths;
Qwen3's attention is causal, and its keys have fewer heads. The packed kernel and varlen_attn get texts end
to end, SDPA gets them padded to the longest: with a mask, and without one, which is no attention of these
texts where lengths differ and bidirectional, but a bound. Times are microseconds of a call in a CUDA graph,
inputs in the L2 cache as far as they fit: median, 20th and 80th percentile. Every result is checked against
float64, text by text, before it is timed and after; "speed" is the fastest other that passed over this one.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from inspect import signature
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks folder

import report
import torch
from cases import Errors, Tolerance
from timing import reason_of, replay_times
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

MODELS = {  # heads, heads of keys, their width, causal
    "minilm": (12, 12, 32, False),
    "bge-base": (12, 12, 64, False),
    "bge-large": (16, 16, 64, False),
    "qwen3-0.6b": (16, 8, 128, True),
}
RANGES = ((12, 40), (60, 250), (128, 128))
TOLERANCE = Tolerance(rms=1e-3, largest=2e-3)
"""The probabilities and the result are rounded to fp16."""
UNCHECKED = "SDPA padded, no mask"


@dataclass(frozen=True)
class Texts:
    """Texts end to end.

    Attributes:
        lengths: tokens of each.
        q, k, v: fp16 [T, heads, D], parts of one buffer as a block has them.
        causal: a token attends to itself and those before it.
    """

    lengths: list[int]
    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool

    def starts(self) -> Tensor:
        """int32 [texts + 1]."""
        return torch.tensor([0, *self.lengths]).cumsum(0).int()

    def tiles(self) -> Tensor:
        """int32 [tiles, 3], as the packed kernel takes them."""
        from tritern_kernels.config import QUERY_ROWS

        starts = self.starts().tolist()
        found = [(i, a, b) for a, b in zip(starts, starts[1:]) for i in range(a, b, QUERY_ROWS)]
        return torch.tensor(found, dtype=torch.int32, device=self.q.device)

    def padded(self, x: Tensor) -> Tensor:
        """[texts, heads, longest, D]."""
        longest = max(self.lengths)
        parts = [pad(part, (0, 0, 0, 0, 0, longest - len(part))) for part in x.split(self.lengths)]
        return torch.stack(parts).transpose(1, 2).contiguous()

    def packed(self, y: Tensor) -> Tensor:
        """[T, heads, D] of what ``padded`` gave."""
        return torch.cat([part[:, :n].transpose(0, 1) for part, n in zip(y, self.lengths)])


def make_texts(name: str, span: tuple[int, int], tokens: int, device: str) -> Texts:
    """At least ``tokens`` tokens, the same in every run."""
    heads, key_heads, width, causal = MODELS[name]
    generator, lengths = random.Random(0), []
    while sum(lengths) < tokens:
        lengths.append(generator.randint(*span))
    seeded = torch.Generator().manual_seed(0)
    buffer = torch.randn(sum(lengths), heads + 2 * key_heads, width, generator=seeded).half().to(device)
    q, k, v = buffer.split([heads, key_heads, key_heads], 1)
    return Texts(lengths, q, k, v, causal)


def exact(texts: Texts) -> Tensor:
    """float64 [T, heads, D], text by text."""
    found = []
    for q, k, v in zip(*(x.split(texts.lengths) for x in (texts.q, texts.k, texts.v))):
        groups = q.shape[1] // k.shape[1]
        q, k, v = (x.double().transpose(0, 1) for x in (q, *(y.repeat_interleave(groups, 1) for y in (k, v))))
        score = q @ k.mT * q.shape[-1] ** -0.5
        if texts.causal:
            seen = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).tril()
            score = score.masked_fill(~seen, -torch.inf)
        found.append((score.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(found)


def tritern_packed(texts: Texts) -> Callable[[], Tensor]:
    from tritern_kernels.attention import packed_attention

    q, k, v = (x.transpose(0, 1) for x in (texts.q, texts.k, texts.v))
    tiles, scale = texts.tiles(), q.shape[-1] ** -0.5
    return lambda: packed_attention(q, k, v, tiles, scale=scale, causal=texts.causal)


def torch_varlen(texts: Texts) -> Callable[[], Tensor]:
    from torch.nn.attention import varlen

    attend: Any = varlen.varlen_attn
    starts, longest = texts.starts().to(texts.q.device), max(texts.lengths)
    settings: dict[str, Any] = {"window_size": (-1, 0)} if texts.causal else {}
    if "enable_gqa" in signature(attend).parameters:  # before torch 2.13 it needs no telling
        settings["enable_gqa"] = texts.q.shape[1] != texts.k.shape[1]
    return lambda: attend(texts.q, texts.k, texts.v, starts, starts, longest, longest, **settings)


def sdpa(texts: Texts, masked: bool) -> Callable[[], Tensor]:
    q, k, v = (texts.padded(x) for x in (texts.q, texts.k, texts.v))
    settings: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1], "is_causal": texts.causal}
    if masked:
        at = torch.arange(q.shape[2], device=q.device)
        mask = (at < torch.tensor(texts.lengths, device=q.device)[:, None])[:, None, None, :]
        if texts.causal:
            mask = mask & (at <= at[:, None])
        settings |= {"attn_mask": mask, "is_causal": False}
    return lambda: scaled_dot_product_attention(q, k, v, **settings)


CONTESTANTS: dict[str, Callable[[Texts], Callable[[], Tensor]]] = {
    "tritern packed": tritern_packed,
    "torch varlen_attn": torch_varlen,
    "SDPA padded, mask": lambda texts: sdpa(texts, True),
    UNCHECKED: lambda texts: sdpa(texts, False),
}


def check(texts: Texts, out: Tensor, wanted: Tensor) -> Errors:
    """The relative errors of a result.

    Raises:
        ArithmeticError: they are larger than accepted.
    """
    error = (texts.packed(out) if out.dim() == 4 else out).double() - wanted
    rms = (error.square().mean() / wanted.square().mean()).sqrt().item()
    found = Errors(rms, (error.abs().max() / wanted.abs().max()).item())
    if not found.within(TOLERANCE):
        raise ArithmeticError(f"failed the check against float64: {found}, accepted {TOLERANCE}")
    return found


def measure(name: str, texts: Texts, wanted: Tensor) -> dict[str, Any]:
    """A contestant's times and errors, or the reason why there are none."""
    checked = name != UNCHECKED or texts.causal or len(set(texts.lengths)) == 1
    row: dict[str, Any] = {"contestant": name, "checked": checked}
    try:
        call = CONTESTANTS[name](texts)
        out = call()
        row |= {"errors": asdict(check(texts, out, wanted))} if checked else {}
        if texts.q.is_cuda:
            times, out = replay_times([call] * 10, 20)
            row |= {"errors": asdict(check(texts, out, wanted))} if checked else {}
            row["us"] = asdict(times)
    except Exception as error:  # third-party code may raise anything
        row["reason"] = reason_of(error)
    return row


def with_speeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one case, each with its speed over the fastest other that is right."""
    timed = [row for row in rows if "us" in row and "reason" not in row]
    for row in timed:
        others = [r["us"]["median"] for r in timed if r is not row and r["checked"]]
        row["speed"] = min(others) / row["us"]["median"] if others else None
    return rows


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    head = f"{row['model']:11s} {row['texts']:4d} texts of {row['lengths']:7s} {row['contestant']:21s}"
    if "reason" in row:
        return f"{head} no time: {row['reason']}"
    errors = f"largest error {row['errors']['largest']:.1e}" if "errors" in row else "not checked"
    if "us" not in row:
        return f"{head} {errors}"
    speed = f"{row['speed']:.2f}x" if row["speed"] else "-"
    us = row["us"]
    return f"{head} {us['median']:8.1f} us [{us['p20']:.1f} {us['p80']:.1f}] {speed:>6s}  {errors}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="default: all")
    add("--tokens", type=int, default=16384, help="of a case (default: 16384)")
    add("--seconds", type=float, default=float("inf"), help="start no further case after this")
    add("--json", type=Path, help="write all rows, rewritten after each case")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts, rows, begin = report.environment() | {"tokens": options.tokens}, [], time.perf_counter()
    for name, span in ((n, s) for n in options.models for s in RANGES):
        if time.perf_counter() - begin > options.seconds:
            print(f"out of time: {name}, texts of {span[0]} to {span[1]}, not measured")
            continue
        texts = make_texts(name, span, options.tokens, device)
        case = {"model": name, "texts": len(texts.lengths), "lengths": f"{span[0]}-{span[1]}"}
        wanted = exact(texts)
        found = with_speeds([case | measure(contestant, texts, wanted) for contestant in CONTESTANTS])
        print("\n".join(map(line, found)) + "\n", flush=True)
        rows += found
        if options.json:
            report.write_json(options.json, facts | {"rows": rows})
    if any("failed the check" in row.get("reason", "") for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
