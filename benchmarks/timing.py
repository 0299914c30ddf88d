"""Timing a contestant on a GPU, and the race of all contestants at one shape."""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from cases import Case, Contestants, Entry, Roofs, Row, Shape, Times, check, make_case
from torch import Tensor

COLD_BYTES = 180_000_000
"""Weights a cold measurement walks through before the first comes again: three times an H200's L2 (60 MB)."""


def clone(value: Any) -> Any:
    """A copy of a contestant's weights in memory of its own."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return tuple(clone(v) for v in value) if isinstance(value, tuple) else copy.deepcopy(value)


def stored_bytes(value: Any) -> int:
    """Bytes of a tensor, or of the tensors in a tuple, a module or another object."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, tuple):
        return sum(map(stored_bytes, value))
    if isinstance(value, torch.nn.Module):
        return sum(map(stored_bytes, (*value.parameters(), *value.buffers())))
    return sum(stored_bytes(v) for v in vars(value).values() if isinstance(v, Tensor))


def times(samples: list[float], calls: int) -> Times:
    """Percentiles of the seconds that replays of ``calls`` calls took."""
    tenths = statistics.quantiles([1e6 * s / calls for s in samples], n=10, method="inclusive")
    return Times(tenths[4], tenths[1], tenths[7], len(samples), calls)


def replay_times(calls: list[Callable[[], Tensor]], replays: int) -> tuple[Times, Tensor]:
    """Capture the calls as one CUDA graph and time its replays: ``replays``, or fewer (but five) in 0.3 s.

    Returns:
        The times, and the last call's result of a replay into poisoned memory: what was timed, to be checked.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # workspaces of this stream are made outside the capture
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    out = torch.empty(0)
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            out = call()  # the result before it returns to the graph's pool

    def replay(count: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        graph.replay()  # while this one runs the host gets ahead: launching stays out of the times
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        events[-1].synchronize()
        return [1e-3 * a.elapsed_time(b) for a, b in pairwise(events)]

    affordable = int(0.3 / max(replay(1)[0], 1e-6))
    found = times(replay(max(5, min(replays, affordable))), len(calls))
    out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).min)
    graph.replay()
    return found, out


def copies_needed(weight_bytes: int, cache_bytes: int = 0) -> int:
    """Copies of the weights that exceed ``COLD_BYTES`` and three times the cache together; at least two."""
    return max(2, max(COLD_BYTES, 3 * cache_bytes) // max(weight_bytes, 1) + 1)


def measure(entry: Entry, replays: int) -> tuple[Times, Times, Tensor, Tensor]:
    """Cold and hot times of an entry that has run before, and the results of both graphs."""
    call, start, end = entry.call, *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(3):
        call(entry.weights)
    end.record()
    end.synchronize()
    calls = max(5, min(100, int(3.0 / max(start.elapsed_time(end) / 3, 1e-3))))  # about 3 ms a replay
    hot, hot_out = replay_times([partial(call, entry.weights)] * calls, replays)
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    needed = copies_needed(stored_bytes(entry.weights), cache)
    copies = [clone(entry.weights) for _ in range(needed)]
    cold, cold_out = replay_times([partial(call, w) for w in copies], replays)
    return cold, hot, cold_out, hot_out


def measure_roofs() -> Roofs:
    """Bandwidth of a kernel that reads and writes up to 2 GiB (the driver's own copy can be slower) and the
    rate of a large bf16 product.
    """
    size = min(2**31, torch.cuda.mem_get_info()[0] // 8)
    source = torch.randn(size // 2, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    seconds = replay_times([lambda: torch.neg(source, out=target)] * 4, 10)[0].median * 1e-6
    side = 8192 if size >= 2**30 else 4096
    a, b = (torch.randn(side, side, device="cuda").bfloat16() for _ in range(2))
    product = replay_times([lambda: torch.nn.functional.linear(a, b)] * 4, 10)[0].median * 1e-6
    return Roofs(2e-12 * size / seconds, 2e-12 * side**3 / product)


def reason_of(error: Exception) -> str:
    """One line: what is missing, or the error's type and first line."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"


def race_one(name: str, build: Callable[[Case], Entry], case: Case, replays: int) -> Row:
    """Build, check, time and check again; whatever goes wrong becomes the row's reason."""
    row = Row(name, *case.shape, zeros=case.zeros)
    try:
        entry = build(case)
        weight_bytes = stored_bytes(entry.weights)
        row = replace(row, note=entry.note, tolerance=entry.tolerance, weight_bytes=weight_bytes)
        out = entry.call(entry.weights)
        found, problem = check("first call", out, entry)
        moved = entry.x_bytes + weight_bytes + stored_bytes(out)
        row = replace(row, errors=found, reason=problem, bytes_moved=moved)
        if problem:
            return row
        cold, hot, *results = measure(entry, replays)
        for when, result in zip(("cold replay", "hot replay"), results, strict=True):
            found, problem = check(when, result, entry)
            if problem:
                return replace(row, errors=found, reason=problem)
        return replace(row, cold=cold, hot=hot)
    except Exception as error:  # third-party code may raise anything
        return replace(row, reason=reason_of(error))


def with_speeds(rows: list[Row], baselines: tuple[str, ...]) -> list[Row]:
    """Fill in the speeds of one shape's rows over the faster of the dense ``baselines`` that has times."""
    dense = [r for r in rows if r.contestant in baselines]
    cold = min((r.cold.median for r in dense if r.cold), default=None)
    hot = min((r.hot.median for r in dense if r.hot), default=None)
    return [
        replace(
            r,
            cold_speed=cold / r.cold.median if cold and r.cold else None,
            hot_speed=hot / r.hot.median if hot and r.hot else None,
        )
        for r in rows
    ]


def race_shape(
    shape: Shape, contestants: Contestants, baselines: tuple[str, ...], seed: int, quick: bool, lost: str
) -> tuple[list[Row], str]:
    """All contestants at one shape; and, once the GPU is lost, why (until then an empty string)."""
    rows: list[Row] = []
    case, reason = None, lost
    if not lost:
        try:
            case = make_case(shape, seed, quick)
        except Exception as error:
            reason = f"the data could not be made: {reason_of(error)}"
    for name, build in contestants.items():
        if case is None or lost:
            rows.append(Row(name, *shape, reason=lost or reason))
            continue
        rows.append(race_one(name, build, case, 10 if quick else 20))
        gc.collect()  # copied modules hold themselves in cycles
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:  # a crashed kernel takes the process's GPU with it
            at = "x".join(map(str, shape))
            lost = f"not run: the GPU was lost after {name} at {at}: {reason_of(error)}"
    return with_speeds(rows, baselines), lost
