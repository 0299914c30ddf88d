"""Vectors of texts for an index: finite, float32, of length 1 if the model compares by cosine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..engine.encoder import embed as embed_texts
from ..engine.encoder import prepare, unit_length
from ..engine.path import way_of
from ..engine.pipeline import Way, embed_windows
from ..errors import TriternError
from ..inputs import check_texts, many, true_or_false, whole_number
from ..pretrained import model_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Task = Literal["query", "document"]
PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}
"""Possible names of a task's prompt, as in sentence-transformers' encode_query and encode_document."""


def embed(
    model: SentenceTransformer | str | Path,
    texts: Iterable[str],
    *,
    task: Task | None = None,
    tokens_per_batch: int | None = None,
    show_progress_bar: bool = False,
) -> Tensor:
    """Vectors of texts, the same as of ``model.encode``, in less time if the model is not ternary.

    Args:
        model: any sentence-transformer for text, or the name or folder of one. A name is loaded anew in every
            call.
        texts: strings, none of them empty, in a list or another iterable; or one string.
        task: "query" or "document" for the prompts of ``encode_query`` and ``encode_document``.
        tokens_per_batch: default 1,024 on a CPU and 16,384 on a GPU.
        show_progress_bar: for more than 64 texts.

    Returns:
        [len(texts), width], float32, on the model's device; of length 1 if the model compares by cosine.

    Raises:
        TriternError: a text that is not a string, empty or not encodable; a vector that is not finite; an
            argument of another type; no such model.
    """
    show_progress_bar = true_or_false(show_progress_bar, "show_progress_bar")
    texts = [texts] if isinstance(texts, str) else list(many(texts, "texts"))
    check_texts(texts)
    model = model_of(model, "model")
    way = _way(model, task, tokens_per_batch)
    if not texts:
        width = model.get_embedding_dimension() or 0
        return torch.empty(0, width, dtype=torch.float32, device=model.device)
    return _checked(embed_texts(way, texts, _finish(model), shown=show_progress_bar), texts)


def embed_each(
    model: SentenceTransformer,
    windows: Iterable[Sequence[str]],
    *,
    task: Task | None = None,
    tokens_per_batch: int | None = None,
    advance: Callable[[int], object] = lambda texts: None,
) -> Iterator[Tensor]:
    """The vectors [len(window), width] of each window in turn. The next windows are computed meanwhile.

    Args:
        windows: lists of non-empty strings, read on another thread. If reading raises, the vectors of the
            earlier windows still come.
        advance: called with the number of texts done.
        model, task, tokens_per_batch: as in ``embed``.
    """
    under_way: list[Sequence[str]] = []

    def taken() -> Iterator[Sequence[str]]:
        for window in many(windows, "windows"):
            under_way.append(window)
            yield window

    way = _way(model, task, tokens_per_batch)
    for vectors in embed_windows(way, taken(), _finish(model), advance=advance):
        yield _checked(vectors, under_way.pop(0))


def tokens_of(tokens_per_batch: int | None) -> int | None:
    """``tokens_per_batch`` as an int; None: the default of the device.

    Raises:
        TriternError: not a whole number, or under 1.
    """
    return None if tokens_per_batch is None else whole_number(tokens_per_batch, "tokens_per_batch", 1)


class _Encode:
    """The model's own ``encode``, for models that the engine does not take."""

    workers = 1

    def __init__(self, model: Any, prompt: str | None, task: str | None) -> None:
        self.model: Any = model
        self.own = {"prompt": prompt or ""} | ({} if task is None else {"task": task})

    def batches(self, texts: Sequence[str]) -> Iterator[tuple[Tensor, list[str]]]:
        order = torch.tensor(sorted(range(len(texts)), key=lambda i: -len(texts[i])), dtype=torch.int64)
        for part in order.split(256):
            numbers: list[int] = part.tolist()
            yield part, [texts[i] for i in numbers]

    def vectors(self, batch: list[str]) -> Tensor:
        kind = getattr(type(self.model), "_tritern_base", type(self.model))
        return kind.encode(self.model, batch, convert_to_tensor=True, show_progress_bar=False, **self.own)


def _way(model: Any, task: str | None, tokens: int | None) -> Way:
    tokens = tokens_of(tokens)
    if task not in (None, *PROMPTS):
        raise TriternError(f"task must be None or one of {', '.join(map(repr, PROMPTS))}; received {task!r}")
    prepare(model)
    names = [name for name in PROMPTS.get(task or "", ()) if name in model.prompts]
    prompt = model.prompts.get(names[0] if names else model.default_prompt_name)
    way = way_of(model, prompt, task, tokens)
    return _Encode(model, prompt, task) if isinstance(way, str) else way


def _finish(model: Any) -> Callable[[Tensor], Tensor]:
    of_length_1 = type(model[-1]).__name__ == "Normalize" and model.truncate_dim is None
    normalize = model.similarity_fn_name == "cosine" and not of_length_1

    def finish(vectors: Tensor) -> Tensor:
        vectors = vectors[:, : model.truncate_dim].float()
        return unit_length(vectors) if normalize else vectors

    return finish


def _checked(vectors: Tensor, texts: Sequence[str]) -> Tensor:
    """The vectors, if they are finite.

    Raises:
        TriternError: a vector is not finite; the error names its text.
    """
    finite = vectors.isfinite().all(1)
    if not finite.all():
        number = int((~finite).nonzero()[0])
        raise TriternError(
            f"the vector of {texts[number][:60]!r} is not finite: the model overflows in its dtype, or its "
            "weights are damaged; load it in float32 or bfloat16"
        )
    return vectors
