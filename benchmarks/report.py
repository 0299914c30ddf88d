"""Reports of benchmarks: what they ran on, JSON, tables and plots."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import triton
from cases import Roofs, Row, Times


def environment() -> dict[str, Any]:
    """GPU, driver, versions, date and commit; None where there is none."""
    here = Path(__file__).parent
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _first_line("git", "-C", str(here), "describe", "--always", "--dirty", "--exclude=*"),
    }


def _first_line(*command: str) -> str | None:
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return out.splitlines()[0] if out else None


def row_record(row: Row) -> dict[str, Any]:
    """A row as plain values, with its rate and intensity."""
    return asdict(row) | {"tflops": row.tflops, "intensity": row.intensity}


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write the report whole or not at all: a killed run leaves the one before. NaN becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_name(path.name + ".partial")
    partial_file.write_text(json.dumps(_finite(report), indent=1, allow_nan=False) + "\n")
    os.replace(partial_file, path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _times(found: Times | None, speed: float | None) -> str:
    if found is None:
        return f"{'-':>9s} {'':>19s} {'-':>6s}"
    spread = f"[{found.p20:.1f} {found.p80:.1f}]"
    return f"{found.median:9.1f} {spread:>19s} " + ("     -" if speed is None else f"{speed:6.2f}")


def case_table(rows: list[Row]) -> str:
    """The rows of one shape as aligned text; a row without times gives its reason instead."""
    first = rows[0]
    zeros = "" if first.zeros is None else f"   {first.zeros:.1%} of the ternary weights are zero"
    lines = [
        f"M={first.M} N={first.N} K={first.K}{zeros}",
        f"  {'':21s} {'cold us':>9s} {'[p20 p80]':>19s} {'speed':>6s} {'hot us':>9s} {'[p20 p80]':>19s} "
        f"{'speed':>6s} {'TFLOP/s':>8s} {'rms':>8s}",
    ]
    for r in rows:
        if r.reason:
            lines.append(f"  {r.contestant:21s} no time: {r.reason}")
            continue
        rate = "-" if r.tflops is None else f"{r.tflops:.1f}"
        rms = "-" if r.errors is None else f"{r.errors.rms:.1e}"
        both = f"{_times(r.cold, r.cold_speed)} {_times(r.hot, r.hot_speed)}"
        lines.append(f"  {r.contestant:21s} {both} {rate:>8s} {rms:>8s}  {r.note}".rstrip())
    return "\n".join(lines)


def load_pyplot() -> Any:
    """matplotlib.pyplot drawing to files.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the message says how to get it.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        message = "plots are drawn with matplotlib, which is not installed: pip install tritern[bench]"
        raise ModuleNotFoundError(message, name=error.name) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_roofline(rows: list[Row], roofs: Roofs, title: str, path: Path) -> None:
    """Achieved TFLOP/s, weights cold, against operations per byte, under the measured roofs."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(9, 6))
    timed = [r for r in rows if r.tflops and r.intensity]
    for i, name in enumerate(dict.fromkeys(r.contestant for r in timed)):
        points = [(r.intensity, r.tflops) for r in timed if r.contestant == name]
        marker = "o" if name.startswith("tritern") else "x^vs<>D*"[i % 8]
        axes.plot(*zip(*points, strict=True), marker, label=name, color=f"C{i % 10}", alpha=0.8)
    ridge = roofs.bf16_tflops / roofs.copy_tb_s
    low = min([0.1 * ridge, *(r.intensity or ridge for r in timed)])
    xs = [low, ridge, max([10 * ridge, *(r.intensity or ridge for r in timed)])]
    label = f"copy {roofs.copy_tb_s:.2f} TB/s, bf16 products {roofs.bf16_tflops:.0f} TFLOP/s (measured)"
    axes.plot(xs, [roofs.at(x) for x in xs], "k-", linewidth=1, label=label)
    axes.set(xscale="log", yscale="log", title=title)
    axes.set_xlabel("operations per byte of activations, stored weights and results")
    axes.set_ylabel("TFLOP/s, weights cold (8-bit products may pass the bf16 roof)")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
