"""Speeds of forward passes over the fastest 16-bit arm, and their table."""

from __future__ import annotations

from typing import Any


def with_speeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with its speed over the fastest 16-bit arm of its model and shape, and over that of its kind.

    The first needs a compiled 16-bit arm, timed or failed with a reason, and for a graph one in a graph.
    """
    for row in rows:
        row.pop("speed", None)
        same = [
            r for r in rows
            if (r["model"], r["texts"], r["tokens"]) == (row["model"], row["texts"], row["tokens"])
            and r["arm"] in ("fp16", "bf16")
        ]  # fmt: skip
        compiled = any("compiled" in r["kind"] for r in same)
        same = [r for r in same if "p50_ms" in r]
        graphs = any("graph" in r["kind"] for r in same) or "graph" not in row["kind"]
        if same and "p50_ms" in row:
            if compiled and graphs:
                row["speed"] = min(r["p50_ms"] for r in same) / row["p50_ms"]
            kind = [r["p50_ms"] for r in same if r["kind"] == row["kind"]]
            row["speed_of_kind"] = min(kind) / row["p50_ms"] if kind else None
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    lines = [
        f"{'model':11s} {'texts x tokens':>14s} {'arm':13s} {'kind':15s} {'p50 ms':>8s} {'p99 ms':>8s} "
        f"{'texts/s':>9s} {'speed':>6s} {'of kind':>7s} {'held MB':>8s} {'peak MB':>8s}"
    ]
    for r in rows:
        head = f"{r['model']:11s} {r['texts']:6d} x {r['tokens']:5d} {r['arm']:13s} {r['kind']:15s}"
        if "reason" in r:
            lines.append(f"{head} not measured: {r['reason']}")
            continue
        of_kind = f"{r['speed_of_kind']:7.2f}" if r.get("speed_of_kind") else f"{'-':>7s}"
        speed = f"{r['speed']:6.2f}" if "speed" in r else f"{'-':>6s}"
        lines.append(
            f"{head} {r['p50_ms']:8.3f} {r['p99_ms']:8.3f} {r['sentences_per_second']:9.0f} {speed} "
            f"{of_kind} {r['held_mb']:8.1f} {r.get('peak_mb', float('nan')):8.0f}"
        )
    return "\n".join(lines)
