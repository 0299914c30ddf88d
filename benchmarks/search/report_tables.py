"""Tables and plots of embed_search.py, from its rows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks folder

import report
from search.inputs import TEACHER, markdown

Rows = Sequence[dict[str, Any]]
DEFAULTS = "default"
"""Name of the search parameters that a kind of index comes with."""


def quality_table(rows: Rows) -> str:
    """Every index with its default parameters; shares and nDCG x 100."""
    titles = (
        "set, arm, index, recall@10, recall@100, fidelity@10, nDCG@10, loss by the model, loss by the index"
    )
    cells = []
    for r in (r for r in rows if r["parameters"] == DEFAULTS):
        figures = ("recall10", "recall100", "fidelity10", "ndcg10", "loss_by_model", "loss_by_index")
        queries = r["queries_per_second"]
        cells.append(
            [r["set"], r["arm"], r["kind"], *(r[f] for f in figures)]
            + [f"{queries['median']:,.0f}", f"[{queries['p20']:,.0f} {queries['p80']:,.0f}]"]
            + [r["bytes"]["faiss"] / 1e6, r["bytes"]["vectors"] / 1e6, r["faiss"]]
        )
    return markdown([*titles.split(", "), "searches/s", "[p20 p80]", "index MB", "vectors MB", "with"], cells)


def means_table(rows: Rows, arm: str) -> str:
    """Every kind of index with its default parameters, original and ternary: means over the sets."""
    titles = [
        "index, default settings", "bytes a vector in memory", "recall@10 of the index", "nDCG@10 original",
        "nDCG@10 ternary", "lost by the model", "lost by the index", "of the original's ten",
    ]  # fmt: skip
    cells = []
    found = [r for r in rows if r["parameters"] == DEFAULTS]
    for kind in dict.fromkeys(r["kind"] for r in found):
        dense, ours = ([r for r in found if (r["kind"], r["arm"]) == (kind, a)] for a in (TEACHER, arm))
        size = sum(r["bytes"]["faiss"] for r in ours) / sum(r["documents"] for r in ours)
        figures = [_mean(ours, f) for f in ("recall10", "ndcg10", "loss_by_model", "loss_by_index")]
        figures.insert(1, _mean(dense, "ndcg10"))
        cells.append([f"`{kind}`", f"{size:,.0f}", *figures, f"{_mean(ours, 'fidelity10'):.1f} %"])
    return markdown(titles, cells)


def paper_table(rows: Rows, arm: str) -> str:
    """ann.py's indexes, original and ternary: means over the sets."""
    titles = ["", "precision@10 original", "ternary", "nDCG@10 original", "ternary"]
    titles += ["same ten as Flat, original", "ternary"]
    cells = []
    for index in dict.fromkeys(r["index"] for r in rows):
        both = [[r for r in rows if (r["index"], r["arm"]) == (index, a)] for a in (TEACHER, arm)]
        figures = [_mean(one, f) for f in ("precision10", "ndcg10") for one in both]
        cells.append([index, *figures, *(f"{_mean(one, 'same10'):.1f} %" for one in both)])
    return markdown(titles, cells)


def _mean(rows: Rows, figure: str) -> float:
    return sum(r[figure] for r in rows) / len(rows)


def throughput_table(rows: Rows) -> str:
    """Embed + add, against the pipeline by hand."""
    titles = ["arm", "texts/s", "[p20 p80]", "embed only", "by hand", "embed only", "ratio", "[p20 p80]"]
    titles += ["to", "ratio", "largest difference", "smallest cosine", "same top 10", "with"]
    cells = []
    for r in rows:
        speed, ratio = r["texts_per_second"], r["ratio"]
        cells.append(
            [r["arm"], speed["median"], f"[{speed['p20']:.1f} {speed['p80']:.1f}]", r["embed_only"]["median"]]
            + [r["by_hand"]["median"], r["by_hand_embed_only"]["median"]]
            + [f"{ratio['median']:.2f}x", f"[{ratio['p20']:.2f} {ratio['p80']:.2f}]"]
            + [r["baseline"], f"{r['over_baseline']['median']:.2f}x"]
            + [f"{r['largest_difference']:.1e}", f"{r['smallest_cosine']:.6f}", f"{r['same_top10']:.2%}"]
            + [r["faiss"]]
        )
    return markdown(titles, cells)


def latency_table(rows: Rows) -> str:
    """Embed + search per batch size, whole and by stage, in ms."""
    titles = ["arm", "index", "rows", "batch", "queries/s", "p50", "p99", "embed p50", "search p50"]
    cells = []
    for r in rows:
        ms = r["ms"]
        cells.append(
            [r["arm"], r["kind"], r["rows"], r["batch"], r["queries_per_second"], ms["total"]["p50"]]
            + [ms["total"]["p99"], *(ms[stage]["p50"] for stage in ("embed", "search", "lookup"))]
            + [r["calls"], r["faiss"]]
        )
    return markdown([*titles, "lookup p50", "calls", "with"], cells)


def scale_table(rows: Rows) -> str:
    """Builds of any size; memory in MB at parts of the build."""
    titles = ["arm", "index", "rows", "texts/s", "hours", "resident before", "at 10 %", "at 50 %", "peak"]
    cells = []
    for r in rows:
        samples = r["resident"]["samples"]

        def at(share: float, r: Any = r, samples: Any = samples) -> float | None:
            return next((mb for taken, mb, _ in samples if taken >= share * r["rows"]), None)

        cells.append(
            [r["arm"], r["kind"], f"{r['rows']:,}", r["texts_per_second"], r["seconds"] / 3600]
            + [r["resident_before_mb"], at(0.1), at(0.5), r["resident"]["peak_mb"]]
            + [", ".join(f"{k} {v / 1e6:,.0f}" for k, v in r["bytes"].items()), r["faiss"]]
        )
    return markdown([*titles, "bytes, MB", "with"], cells) + (
        "\n\nReal texts varied by templates: speed and memory alone are measured." if rows else ""
    )


def draw(rows: Rows, path: Path) -> None:
    """Recall against queries per second, and the losses of nDCG by the model beside those by the index."""
    pyplot = report.load_pyplot()
    names = list(dict.fromkeys(r["set"] for r in rows))
    labelled = [name for name in names if any(r["set"] == name and isfinite(r["ndcg10"]) for r in rows)]
    shape = {"figsize": (4.6 * len(names) + 2, 8.5 if labelled else 4.5), "squeeze": False}
    figure, axes = pyplot.subplots(2 if labelled else 1, len(names), **shape)
    for i, name in enumerate(names):
        mine = [r for r in rows if r["set"] == name]
        _draw_curves(axes[0, i], name, mine)
        if name in labelled:
            _draw_losses(axes[1, i], mine)
    for row in axes:
        row[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)


def _draw_curves(axes: Any, name: str, rows: Rows) -> None:
    """Colours are kinds of index, lines and markers arms."""
    kinds, arms = (list(dict.fromkeys(r[key] for r in rows)) for key in ("kind", "arm"))
    for arm in arms:
        for kind in kinds:
            points = sorted(
                (r["recall10"], r["queries_per_second"]["median"])
                for r in rows
                if r["arm"] == arm and r["kind"] == kind
            )
            style = ("-o", "--s", ":^", "-.D", "-x", "--v")[arms.index(arm) % 6]
            color = f"C{kinds.index(kind)}"
            axes.plot(*zip(*points), style, color=color, label=f"{kind}, {arm}", markersize=4, alpha=0.8)
    axes.set(yscale="log", title=name, xlabel="recall@10 of the index", ylabel="searches per second")
    axes.grid(True, which="both", alpha=0.2)


def _draw_losses(axes: Any, rows: Rows) -> None:
    """For every ternary arm a bar for the model's loss and one for each kind of index."""
    shown = [r for r in rows if r["parameters"] == DEFAULTS]
    arms = list(dict.fromkeys(r["arm"] for r in shown))
    kinds = list(dict.fromkeys(r["kind"] for r in rows))
    bars = ["the model", *(kind for kind in kinds if kind != "flat")]
    width = 0.85 / len(bars)
    for i, bar in enumerate(bars):
        found = []
        for arm in arms:
            mine = [r for r in shown if r["arm"] == arm and (bar == "the model" or r["kind"] == bar)]
            found.append(mine[0]["loss_by_model" if bar == "the model" else "loss_by_index"])
        places = [n + (i - (len(bars) - 1) / 2) * width for n in range(len(arms))]
        color = "black" if bar == "the model" else f"C{kinds.index(bar)}"
        axes.bar(places, found, width, label=f"loss by {bar}", color=color)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xticks(range(len(arms)), [f"{a} (teacher)" if a == TEACHER else a for a in arms], fontsize=8)
    axes.set_ylabel("loss of nDCG@10, points of 100")
    axes.grid(True, axis="y", alpha=0.3)
