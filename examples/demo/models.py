"""The models of ``quickstart.py``: loaded, made ternary, distilled, saved."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import Progress

from .comparison import K, console, embed, say

if TYPE_CHECKING:  # imported once the arguments are known to be good: it takes seconds
    from sentence_transformers import SentenceTransformer

    from tritern import Fidelity


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


def saved(model: SentenceTransformer, folder: str, texts: list[str]) -> None:
    """Save a model and see that what is loaded again is the same."""
    model.save_pretrained(folder)
    if not np.array_equal(embed(load(folder, str(model.device)), texts), embed(model, texts)):
        raise SystemExit(f"the model loaded from {folder} gives other vectors: a bug, please report it")
    say(f"Saved in {folder} and loaded again: the same vectors, bit for bit.", soft_wrap=True)


def made_ternary(
    name: str,
    original: SentenceTransformer,
    texts: list[str],
    sample: int,
    held: np.ndarray,
    args: argparse.Namespace,
) -> tuple[SentenceTransformer, Fidelity, Fidelity]:
    """The user's model, patched and distilled on the texts after the sample.

    Its closeness to the original follows, after distillation and before.
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
