"""``tritern.patch``: select a model's linear layers and replace them by ternary ones, in place."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import nn
from transformers import PreTrainedModel

from .calibration.fitting import checked
from .calibration.sensitivity import budget
from .checkpoint import quantizer
from .checkpoint.card import model_card, settings_of
from .config import EMBEDDING_BITS, TernaryConfig
from .config import bits as one_of
from .conversion import convert, refuse_adapters
from .engine.encoder import attach
from .engine.fused import fuse_what_fits
from .errors import TriternError
from .inputs import check_folder, check_model, many, true_or_false
from .nn.embedding import QuantizedEmbedding, embedding_of
from .nn.linear import TernaryLinear
from .nn.replace import is_ternary, put
from .pretrained import model_of
from .selection import select_tables

Model = TypeVar("Model", bound=nn.Module)
_logger = logging.getLogger(__name__)

PREVIEW = (
    "Patched without calibration or training: a preview of size and speed, not a model to serve. So patched, "
    "all-MiniLM-L6-v2 kept 42 % of its retrieval scores and all-mpnet-base-v2 57 % of STS-B; "
    "tritern.evaluate(model, teacher, texts) measures yours. Pass weight_bits=4 or calibration_texts=, a "
    "thousand texts of yours, or train it with tritern.distill."
)
"""What the log says of such a model."""


def patch(
    model: Model | str | Path,
    config: TernaryConfig | None = None,
    *,
    skip: Iterable[str] | None = None,
    rule: str | None = None,
    activation_bits: int | None = None,
    weight_bits: int | Mapping[str, int] | None = None,
    embedding_bits: int | None = None,
    bits: float | None = None,
    calibration_texts: Iterable[Any] | None = None,
    calibration_folder: str | Path | None = None,
    fuse: bool = True,
) -> Model:
    """Make a model's linear layers ternary, in place, and return the model.

    Without ``calibration_texts`` a ternary result is a preview of size and speed, not a model to serve: it
    loses quality. ``tritern.evaluate(model, teacher, texts)`` measures how much. ``tritern.distill`` trains
    a model that keeps its quality.

    Layers left in full precision are poolers, heads, projections at the output, patch embeddings, routers of
    experts, T5's ``wo``, sentence-transformers' Dense modules, weights shared with an embedding, subclasses
    of ``nn.Linear``, matrices that are no ``nn.Linear`` (``Conv1D``, fused experts, convolutions), and what
    ``skip`` names. ``tritern.summary(model)`` lists them with their reasons. Layers are converted one by one:
    memory stays near the model's own.

    Calibration fits weights and biases, layer by layer, to texts of the kind that will be embedded, a
    thousand or so (``tritern.calibration``). It trains nothing and takes a minute for a small model and
    minutes for a base model on a CPU. The vectors come far closer to the original's. It holds the outputs
    of one block for all texts in memory.

    Layers that lose too much in two bits can have four: all (``weight_bits=4``), those that patterns name, or
    with ``bits=2.5`` those that lose most on the calibration texts.

    Word-embedding tables (every ``nn.Embedding`` of at least 1,024 rows) become int8 by default. These stay:
    tables with max_norm, tables in sentence-transformers' own modules, weights shared with another module
    (T5, an lm_head), and subclasses that do more than multiply the output (Gemma's).

    ``encode`` of a SentenceTransformer goes through tritern's engine from then on, with the same arguments
    and, but for last bits, the same results, in less time. ``tritern.summary(model)`` says which path the
    texts take. On a CUDA GPU blocks are fused (``tritern.fuse``).

    A model that is ternary already takes ``embedding_bits`` alone: ``patch(model, embedding_bits=N)`` changes
    its tables only, and 16 makes them plain. (A ``skip`` is remembered for transformers' models only.)

    Args:
        model: a SentenceTransformer, CrossEncoder, SparseEncoder or any ``nn.Module``, with weights loaded,
            finite, in float32, float16 or bfloat16. Or the folder or hub name of a SentenceTransformer, which
            is loaded.
        config: settings; None: the defaults of ``TernaryConfig``.
        skip, rule, activation_bits, weight_bits, embedding_bits: replace the config's field of that name.
        bits: from 2 to 4, with ``calibration_texts``: average bits of a weight. Layers that lose most in two
            bits get four, as many as fit; the rest is ternary.
        calibration_texts: at least 16 different texts in any iterable, or other inputs of a
            sentence-transformers model, such as pairs. Empty and repeated texts are left out. The model's
            prompts are put before them in turn.
        calibration_folder: a folder that keeps each layer as soon as it is fitted. A calibration that was
            interrupted goes on from there.
        fuse: fuse blocks on a CUDA GPU.

    Returns:
        The model.

    Raises:
        TriternError: no such model; nothing to patch; already patched (but for ``embedding_bits`` alone);
            already quantized otherwise; adapters; weights on the meta device, not finite or of an unsupported
            dtype; too few texts, or a model that takes none. The model is then unchanged.

    Warns:
        UserWarning: most of the model's matrix weights are no ``nn.Linear``, as in mixtures of experts.
    """
    if isinstance(model, (str, Path)):
        model = cast(Model, model_of(model, "model"))
    check_model(model)
    fuse = true_or_false(fuse, "fuse")
    if config is not None and not isinstance(config, TernaryConfig):
        raise TriternError(f"config must be a tritern.TernaryConfig; received {type(config).__name__}")
    others_given = (config, skip, rule, activation_bits, weight_bits, bits, calibration_texts)
    ternary = any(isinstance(m, TernaryLinear) for m in model.modules())
    if ternary and embedding_bits is not None and others_given == (None,) * 7:
        return _with_tables(model, one_of(embedding_bits, "embedding_bits", EMBEDDING_BITS))
    changes: dict[str, Any] = {"rule": rule, "activation_bits": activation_bits}
    changes |= {"weight_bits": weight_bits, "embedding_bits": embedding_bits}
    changes["skip"] = None if skip is None else tuple([skip] if isinstance(skip, str) else many(skip, "skip"))
    config = replace(config or TernaryConfig(), **{k: v for k, v in changes.items() if v is not None})
    if bits is not None:
        bits = budget(bits)
        if config.weight_bits != 2:
            raise TriternError("bits chooses the weight_bits of each layer; leave one of the two out")
    for name, value in (("bits", bits), ("calibration_folder", calibration_folder)):
        if value is not None and calibration_texts is None:
            raise TriternError(f"{name} goes with calibration_texts: name a few hundred texts, too")
    texts = None if calibration_texts is None else checked(calibration_texts)
    folder = None if calibration_folder is None else check_folder(calibration_folder, "calibration_folder")
    config = convert(model, config, texts, bits, folder)
    quantizer.attach(model, config, len(texts or ()))
    attach(model, fuse=fuse)
    if fuse and any(p.is_cuda for p in model.parameters()):
        fuse_what_fits(model)
    if texts is None and any(m.weight_bits == 2 for m in model.modules() if isinstance(m, TernaryLinear)):
        _logger.warning(PREVIEW)
    return model


def _with_tables(model: Model, wanted: int) -> Model:
    """Round the embedding tables of a ternary model to so many bits, or with 16 make them plain, in place."""
    refuse_adapters(model)
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedEmbedding):
            found.setdefault(id(module), (module, []))[1].append(name)
    if not found and wanted != 16:
        skipped = _skipped_tables(model)
        plain = (c for c in select_tables(model) if not c.reason and id(c.module) not in skipped)
        found = {id(c.module): (c.module, list(c.names)) for c in plain}
        if not found:
            raise TriternError("the model has no embedding table to round; tritern.summary(model) says why")
    new: list[tuple[list[str], nn.Module]] = []
    for table, names in found.values():
        if getattr(table, "bits", 16) == wanted:
            continue
        try:
            whole: Any = table.to_embedding() if isinstance(table, QuantizedEmbedding) else table
            new.append((names, whole if wanted == 16 else embedding_of(wanted).from_embedding(whole)))
        except TriternError as error:
            raise TriternError(f"{names[0]}: {error}") from None
    for names, table in new:  # all of them are good
        put(model, names, table)
    if new:
        quantizer.attach(model)
        if hasattr(model, "_model_card_text"):
            vars(model)["_model_card_text"] = model_card(model, settings_of(model), tables_alone=True)
    return model


def _skipped_tables(model: nn.Module) -> set[int]:
    """ids of the tables that ``skip`` left plain when the transformers models inside were patched."""
    return {
        id(c.module)
        for part in model.modules()
        if isinstance(part, PreTrainedModel) and is_ternary(part)
        for c in select_tables(part, tuple(settings_of(part).skip))
        if c.reason.startswith("skip=")
    }
