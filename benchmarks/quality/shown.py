"""The scores as text, as a figure and in a model card."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import report


def line(label: str, values: Mapping[str, float], columns: Sequence[str]) -> str:
    cells = (f"{values[c]:.2f}" if np.isfinite(values.get(c, np.nan)) else "-" for c in columns)
    return f"{label:24s}" + "".join(f"{cell:>{max(8, len(c) + 2)}s}" for c, cell in zip(columns, cells))


def heading(title: str, columns: Sequence[str]) -> str:
    return f"{title:24s}" + "".join(f"{c:>{max(8, len(c) + 2)}s}" for c in columns)


def draw(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str], teacher: str, path: Path) -> None:
    """Retention as grouped bars: a group for each set and mean, a bar for each model but the teacher."""
    pyplot = report.load_pyplot()
    figure, axes = pyplot.subplots(figsize=(max(8, 0.9 * len(columns)), 5))
    shown = {label: row["retention"] for label, row in rows.items() if label != "teacher"}
    width = 0.8 / max(1, len(shown))
    for i, (label, kept) in enumerate(shown.items()):
        places = np.arange(len(columns)) + (i - (len(shown) - 1) / 2) * width
        bars = axes.bar(places, [kept[c] for c in columns], width, label=label, color=f"C{i % 10}")
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.axhline(100, color="black", linewidth=1, label=f"teacher: {teacher}")
    names = [c if c in rows["teacher"]["scores"] else f"mean: {c}" for c in columns]
    axes.set_xticks(range(len(columns)), names, rotation=35, ha="right")
    axes.set_ylabel("retention, % of the teacher's score")
    axes.set_title("Quality kept by ternary models")
    axes.grid(True, axis="y", alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def update_card(folder: Path, name: str, teacher: Mapping[str, float], row: Mapping[str, Any]) -> None:
    """Put a model's scores beside those of its teacher into its README.md, in place of old ones."""
    card, title = folder / "README.md", "## Scores"
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    text = re.sub(rf"{title}\n.*?(?=\n## |\Z)", "", text, flags=re.DOTALL).rstrip()
    kept, within = row["retention"], row.get("intervals", {})
    lines = []
    for k, value in (row["scores"] | row["means"]).items():
        low_high = " to ".join(f"{v:.1f}" for v in within.get(k, ()) if np.isfinite(v)) or "-"
        lines.append(f"| {k} | {teacher[k]:.2f} | {value:.2f} | {kept[k]:.1f} % | {low_high} |")
    text += f"""

{title}

x 100, on test splits, beside {name}; the share kept, and its 95 % interval by a bootstrap over the items of
each set (`benchmarks/quality/scores.py`):

| | teacher | this model | kept | interval |
|---|---|---|---|---|
"""
    card.write_text(text.lstrip() + "\n".join(lines) + "\n", encoding="utf-8")
