"""``tritern.patch``: choose a model's linear layers and replace them by ternary ones, in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm

from tritern_kernels.dispatch import FLOATS
from tritern_kernels.formats import check_shape

from . import hf
from .config import TernaryConfig
from .errors import TriternError
from .linear import TernaryLinear

Model = TypeVar("Model", bound=nn.Module)

_SMALL_AND_SENSITIVE = {
    "pooler": "pooler",
    "head": "head",
    "classifier": "head",
    "pre_classifier": "head",
    "lm_head": "head",
    "score": "head",
    "cls": "head",
    "qa_outputs": "head",
    "vocab_transform": "head",
    "vocab_projector": "head",
}
"""Parts of a model that are left alone, by the component of their name: few weights, directly at the
output.
"""


@dataclass(frozen=True)
class Choice:
    """What happens to one linear layer: ``reason`` says why it is skipped, or is empty."""

    names: tuple[str, ...]
    module: nn.Module
    reason: str

    @property
    def name(self) -> str:
        """The layer's first name; shared layers have several."""
        return self.names[0]


def patch(
    model: Model,
    config: TernaryConfig | None = None,
    *,
    skip: Iterable[str] | None = None,
    rule: str | None = None,
    activation_bits: int | None = None,
) -> Model:
    """Make a model's linear layers ternary, in place, and return it.

    Works on a SentenceTransformer or any ``nn.Module``. Left in full precision: poolers, heads, T5's ``wo``,
    sentence-transformers' Dense modules, weights shared with an embedding, subclasses of ``nn.Linear``, and
    what ``skip`` names; ``tritern.summary(model)`` lists them. Layers are converted one by one, so that
    memory stays near the model's own. Untrained, a ternary model loses quality: measure it with
    ``tritern.evaluate``.

    Args:
        model: the model; its weights must be loaded, finite, in float32, float16 or bfloat16.
        config: settings; the defaults of ``TernaryConfig`` if None.
        skip, rule, activation_bits: replace the config's field of that name.

    Raises:
        TriternError: nothing to patch, already patched, already quantized otherwise, weights on the meta
            device, not finite or of an unsupported dtype. The model is then unchanged.
    """
    changes: dict[str, Any] = {"rule": rule, "activation_bits": activation_bits}
    changes["skip"] = None if skip is None else tuple([skip] if isinstance(skip, str) else skip)
    config = replace(config or TernaryConfig(), **{k: v for k, v in changes.items() if v is not None})
    if not isinstance(model, nn.Module):
        raise TriternError(
            f"model must be a torch.nn.Module or a SentenceTransformer; received {type(model).__name__}"
        )
    if isinstance(model, nn.Linear):
        raise TriternError(
            "a bare nn.Linear cannot be replaced in place; use tritern.TernaryLinear.from_linear(layer)"
        )
    choices = list(choose(model, config.skip))
    chosen = [c for c in choices if not c.reason]
    _check(model, config, choices, chosen)

    first: dict[
        int, str
    ] = {}  # of several layers with the very same weight, the first is packed and the others share it
    plan = [(c.names, first.setdefault(id(c.module.weight), c.name)) for c in chosen]
    del choices, chosen  # so that each full-precision weight is freed as soon as its layer is replaced

    for names, source in tqdm(plan, desc="Ternarizing", unit="layer", delay=2, leave=False, disable=None):
        old = model.get_submodule(names[0])
        assert isinstance(old, nn.Linear)
        if source == names[0]:
            new = TernaryLinear.from_linear(old, rule=config.rule, activation_bits=config.activation_bits)
        else:
            twin = model.get_submodule(source)
            assert isinstance(twin, TernaryLinear)
            new = TernaryLinear.from_packed(twin.packed(), old.bias, activation_bits=config.activation_bits)
            new.train(old.training)
        new._forward_hooks, new._forward_pre_hooks = old._forward_hooks, old._forward_pre_hooks
        for name in names:
            model.set_submodule(name, new)
        del old
    hf.attach(model, config, [name for names, _ in plan for name in names])
    return model


def choose(model: nn.Module, skip: tuple[str, ...] = ()) -> Iterator[Choice]:
    """Every ``nn.Linear`` (or subclass) of a model with the decision on it."""
    names: dict[int, list[str]] = {}
    parameters: dict[int, set[str]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        names.setdefault(id(module), []).append(name)
        if not isinstance(module, nn.Linear):
            for parameter in module.parameters(recurse=False):
                parameters.setdefault(id(parameter), set()).add(type(module).__name__)
    seen: set[int] = set()
    for module in modules.values():
        if isinstance(module, nn.Linear) and id(module) not in seen:
            seen.add(id(module))
            reason = _reason(names[id(module)], module, modules, parameters, skip)
            yield Choice(tuple(names[id(module)]), module, reason)


def _reason(
    names: list[str],
    module: nn.Linear,
    modules: dict[str, nn.Module],
    tied: dict[int, set[str]],
    skip: tuple[str, ...],
) -> str:
    for name in names:
        for pattern in skip:
            if fnmatchcase(name, pattern) or name.startswith(pattern + "."):
                return f"skip={pattern!r}"
    if type(module) is not nn.Linear:
        return f"subclass of nn.Linear: {type(module).__name__}"
    if id(module.weight) in tied:
        return f"weight shared with {', '.join(sorted(tied[id(module.weight)]))}"
    for name in names:
        parent_name, _, last = name.rpartition(".")
        parent = modules[parent_name]
        for component in name.split("."):
            if component in _SMALL_AND_SENSITIVE:
                return _SMALL_AND_SENSITIVE[component]
        if type(parent).__module__.startswith("sentence_transformers.") and type(parent).__name__ == "Dense":
            return "sentence-transformers Dense"
        if last == "wo" and "T5" in type(parent).__name__:
            return "T5 wo (kept in higher precision by transformers too)"
    return ""


def _check(model: nn.Module, config: TernaryConfig, choices: list[Choice], chosen: list[Choice]) -> None:
    """Everything that can be wrong, before anything is changed."""
    method = hf.foreign_quantization(model)
    if method:
        raise TriternError(
            f"the model is already quantized ({method}); load it in full precision and patch that"
        )
    ternary = sum(isinstance(m, TernaryLinear) for m in model.modules())
    if ternary:
        raise TriternError(
            f"the model is already ternary ({ternary} TernaryLinear layers); patch a full-precision one"
        )
    for pattern in config.skip:
        if not any(c.reason == f"skip={pattern!r}" for c in choices):
            raise TriternError(
                f"skip={pattern!r} matches no linear layer. Names look like {choices[0].name!r}."
                if choices
                else f"skip={pattern!r} matches nothing: the model has no linear layers"
            )
    if not chosen:
        detail = "; ".join(f"{c.name}: {c.reason}" for c in choices[:5]) or "it has no nn.Linear at all"
        raise TriternError(f"no linear layer to make ternary in {type(model).__name__} ({detail})")
    for c in chosen:
        weight = c.module.weight
        assert isinstance(weight, torch.Tensor)
        if weight.is_meta:
            raise TriternError(f"{c.name}.weight is on the meta device: load the weights before patching")
        if weight.dtype not in FLOATS:
            raise TriternError(
                f"{c.name}.weight is {weight.dtype}; float32, float16 or bfloat16 are supported: cast it"
            )
        if not torch.isfinite(weight).all():
            raise TriternError(
                f"{c.name}.weight holds NaN or infinity; repair the checkpoint or name it in skip="
            )
        try:
            check_shape(*weight.shape)
        except ValueError as error:
            raise TriternError(f"{c.name}: {error} Or name it in skip=.") from None
