"""Texts as batches for a model, and the vectors of a batch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..errors import TriternError
from ..inputs import whole_number

Task = Literal["query", "document"]
PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}
"""Names that the prompt of a task may have, as in sentence-transformers' encode_query, encode_document."""


@dataclass(frozen=True)
class Batching:
    """How texts become batches on a kind of device.

    Attributes:
        tokens: most tokens in a batch, unless one text has more.
        round_to: texts are padded to a multiple of so many tokens, and share batches with others of that
            length. On CPUs what padding adds to a sum of numbers in groups of 16 is zeros: rounded to 16, or
            not padded at all, a text has the same vector whatever it is embedded with.
        padding: shorter texts join a batch if that pads them with no more tokens altogether: so much is a
            batch less worth.
        chunk: texts tokenized at a time, similar in length.
        workers: threads that run the model.
    """

    tokens: int
    round_to: int
    padding: int
    chunk: int
    workers: int


def tokens_of(tokens_per_batch: int | None) -> int | None:
    """The argument of that name as an int; None: the default of the device.

    Raises:
        TriternError: it is no whole number, or under 1.
    """
    return None if tokens_per_batch is None else whole_number(tokens_per_batch, "tokens_per_batch", 1)


def batching(device: torch.device, task: str | None, tokens: int | None = None) -> Batching:
    """On a CPU a thread per core, up to 8, with a batch each: small models gain nothing from several cores
    in one layer. On a GPU large batches and one thread, for the GPU takes them one after the other.

    Queries are few and wait for every batch, so they are padded; for many texts padding costs more.

    Raises:
        TriternError: ``task`` is none, or ``tokens`` is no whole number of 1 or more.
    """
    tokens = tokens_of(tokens)
    if task not in (None, *PROMPTS):
        raise TriternError(f"task must be None or one of {', '.join(map(repr, PROMPTS))}; received {task!r}")
    if device.type == "cpu":
        round_to, padding = (16, 32) if task == "query" else (1, 0)
        workers = min(8, torch.get_num_threads())
        return Batching(tokens or 1024, round_to, padding, chunk=1024, workers=workers)
    return Batching(tokens or 16384, round_to=8, padding=1024, chunk=8192, workers=1)


_tokenizers: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""A lock for each model: Rust tokenizers used by two threads raise "Already borrowed"."""


def batches(
    model: Any, texts: Sequence[str], task: str | None, plan: Batching
) -> Iterator[tuple[Tensor, Any]]:
    """Numbers of texts and their features, longest texts first: a lack of memory shows at once."""
    names = [name for name in PROMPTS.get(task or "", ()) if name in model.prompts]
    prompt = model.prompts.get(names[0] if names else model.default_prompt_name)
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    tokenizer, longest = (getattr(model, name, None) for name in ("tokenizer", "max_seq_length"))
    for start in range(0, len(order), plan.chunk):
        numbers = torch.tensor(order[start : start + plan.chunk], dtype=torch.int64)
        chunk = [texts[i] for i in numbers.tolist()]
        with _tokenizers.setdefault(model, threading.Lock()):
            features = model.preprocess(chunk, prompt=prompt, **_task(task))
        mask = features.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2 or len(mask) != len(chunk):
            for part in torch.arange(len(chunk)).split(32):  # of a kind that cannot be cut: as encode does it
                with _tokenizers[model]:
                    some = model.preprocess([chunk[i] for i in part.tolist()], prompt=prompt, **_task(task))
                yield numbers[part], some
            continue
        lengths = mask.sum(1)
        rounded = (lengths + plan.round_to - 1) // plan.round_to * plan.round_to
        rounded = rounded.clamp(max=max(int(lengths.max()), longest or 0))
        if getattr(tokenizer, "padding_side", "right") == "right":  # on the left it may move positions
            lengths = rounded
        for group in _groups(rounded, plan.padding):
            for part in group.split(max(1, plan.tokens // int(rounded[group[0]]))):
                cut = _cut(features, part, int(lengths[part].max()), tokenizer)
                yield numbers[part], cut if model.device.type == "cpu" else _pinned(cut)


def _groups(lengths: Tensor, padding: int) -> Iterator[Tensor]:
    """Numbers of texts that share batches, longest first: those of a length, and shorter ones after them."""
    group, longest = [], 0
    for length in lengths.unique().flip(0).tolist():
        same = (lengths == length).nonzero()[:, 0]
        if group and (longest - length) * len(same) > padding:
            yield torch.cat(group)
            group = []
        longest = longest if group else length
        group.append(same)
    if group:
        yield torch.cat(group)


def _cut(features: dict[str, Any], rows: Tensor, length: int, tokenizer: Any) -> dict[str, Any]:
    """The features of some texts with so many tokens: less of the padding that they share, or more."""
    mask = features["attention_mask"]
    on_the_left = bool((mask[:, 0] == 0).any())
    columns = slice(max(0, mask.shape[1] - length), None) if on_the_left else slice(length)
    missing = max(0, length - mask.shape[1])

    def part(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != len(mask):
            return value
        if value.shape[1:2] != mask.shape[1:]:
            return value[rows]
        filling = (getattr(tokenizer, "pad_token_id", None) or 0) if name == "input_ids" else 0
        return torch.nn.functional.pad(value[rows][:, columns], (0, missing), value=filling)

    return {name: part(name, value) for name, value in features.items()}


def _pinned(features: dict[str, Any]) -> dict[str, Any]:
    return {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in features.items()}


def _task(task: str | None) -> dict[str, str]:
    return {} if task is None else {"task": task}


@torch.inference_mode()
def vectors_of(model: Any, features: dict[str, Any], task: str | None) -> Tensor:
    """Vectors [texts, width], float32, on the model's device."""
    device = model.device
    features = {
        k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in features.items()
    }
    vectors = model(features, **_task(task))["sentence_embedding"][:, : model.truncate_dim].float()
    if model.similarity_fn_name != "cosine":
        return vectors
    of_length_1 = type(model[-1]).__name__ == "Normalize" and model.truncate_dim is None
    return vectors if of_length_1 else torch.nn.functional.normalize(vectors)


def checked(vectors: Tensor, texts: Sequence[str]) -> Tensor:
    """The vectors, if they are finite.

    Raises:
        TriternError: names the text of the first that is not.
    """
    finite = vectors.isfinite().all(1)
    if not finite.all():
        number = int((~finite).nonzero()[0])
        raise TriternError(
            f"the vector of {texts[number][:60]!r} is not finite: the model overflows in its dtype, or its "
            "weights are damaged; load it in float32 or bfloat16"
        )
    return vectors
