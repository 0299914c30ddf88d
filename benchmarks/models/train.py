"""Time and peak memory of a training step: ternary distillation against the same in full precision.

    python benchmarks/models/train.py --texts FILE [--model NAME_OR_PATH] [--steps 12] [--json FILE]

All arms see the same batches, teacher, terms and optimizer, without dropout; the full-precision student keeps
its nn.Linear layers. Each arm runs in two processes of its own: one is timed, in the other, of 4 steps, the
peak of memory is read. On CUDA that is what was allocated; on a CPU it is the resident memory with an
allocator that gives freed memory back at once (glibc's usual one keeps so much that its peak says little).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks folder

import report
from models.encode import packaged_model

FRUGAL = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
ARMS = ("full precision", "ternary", "ternary, 16-bit activations")


def measure(arm: str, options: argparse.Namespace) -> dict[str, float]:
    """Run an arm in this process."""
    import torch
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from transformers import TrainerCallback

    from tritern import TernaryConfig
    from tritern.distillation import TernaryDistillationArguments, TernaryDistiller, read_texts
    from tritern.distillation.kept import without_dropout
    from tritern.distillation.objective import DistillationLoss

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    class Plain(SentenceTransformerTrainer):
        training_args_class = TernaryDistillationArguments

    clock = Clock()
    texts = read_texts(options.texts, limit=options.batch_size * options.steps)
    data, cuda = Dataset.from_dict({"text": texts}), torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        args = TernaryDistillationArguments(
            output_dir=folder, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
            max_steps=options.steps, per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=1, bf16=cuda,
            learning_rate=5e-4, group_by_length=False, cpu_bf16=False,
        )  # fmt: skip
        student = SentenceTransformer(options.model)
        if arm == "full precision":
            teacher = SentenceTransformer(options.model).eval().requires_grad_(False)
            collator = SentenceTransformerTrainer.data_collator_class(
                student.preprocess, max_length=args.max_length
            )
            trainer = Plain(
                student, args, data, loss=DistillationLoss(student, teacher, args), data_collator=collator,
                callbacks=[clock],
            )  # fmt: skip
        else:
            config = TernaryConfig(embedding_bits=8, activation_bits=16 if "16" in arm else 8)
            trainer = TernaryDistiller(student, args, data, config=config, callbacks=[clock])
        with without_dropout(student):
            trainer.train()
    half = len(clock.ends) // 2
    seconds = (clock.ends[-1] - clock.ends[half]) / (len(clock.ends) - 1 - half)
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.cuda.max_memory_allocated() if cuda else resident
    return {"seconds a step": seconds, "peak MB": peak / 1e6}


def measure_apart(
    arm: str, options: argparse.Namespace, steps: int, environment: dict[str, str]
) -> dict[str, float]:
    """``measure`` in a process of its own."""
    command = [sys.executable, __file__, "--arm", arm, "--model", options.model, "--texts", options.texts]
    command += ["--steps", steps, "--batch-size", options.batch_size]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, **environment}
    )
    if done.returncode:
        sys.exit(f"{arm}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=Path, required=True, help="file of texts, as for tritern.distill")
    parser.add_argument("--model", help="hub name or path; default: the packaged all-MiniLM-L6-v2")
    parser.add_argument("--steps", type=int, default=12, help="the second half is timed (default: 12)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 4:
        parser.error(f"--steps must be at least 4; received {options.steps}")
    options.model = options.model or packaged_model()
    if options.arm:
        print(json.dumps(measure(options.arm, options)))
        return
    rows: dict[str, dict[str, float]] = {}
    for arm in ARMS:
        timed, frugal = measure_apart(arm, options, options.steps, {}), measure_apart(arm, options, 4, FRUGAL)
        seconds, peak = timed["seconds a step"], frugal["peak MB"]
        rows[arm] = {"seconds a step": seconds, "peak MB": peak, "peak MB, usual allocator": timed["peak MB"]}
        ratio = peak / rows[ARMS[0]]["peak MB"]
        print(f"{arm:30s}{seconds:10.3f} s a step{peak:10.0f} MB ({ratio:.2f}x)", flush=True)
    if options.json:
        report.write_json(options.json, {"environment": report.environment(), "rows": rows})


if __name__ == "__main__":
    main()
