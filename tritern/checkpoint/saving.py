"""Additions to a saved ternary model: the manifest, the requirement of tritern and a model card."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import TriternError
from ..inputs import check_folder
from ..nn.replace import is_ternary
from .adapters import check_adapters, patched_here, quantizer_of
from .card import model_card, settings_of
from .digest import sealed


def extend(attach: Callable[[nn.Module], None]) -> None:
    """Extend saving for ternary models, and make peft's refusals of them say what to do. Called at the first
    ternary model.
    """
    _extend_save(attach)
    if "peft" in sys.modules:  # as after transformers loaded any model, where peft is installed
        from ..adapters import explain

        explain()


@cache
def _extend_save(attach: Callable[[nn.Module], None]) -> None:
    """Extend ``save`` of transformers and sentence-transformers for ternary models. Others save as before.

    The classes are changed, not the model: when a SentenceTransformer is loaded from disk, the quantizer sees
    only the transformers model inside.
    """
    from sentence_transformers.base.model import BaseModel

    PreTrainedModel.save_pretrained = _sealing(PreTrainedModel.save_pretrained, attach)
    BaseModel.save = _with_requirement(BaseModel.save)


def _sealing(
    save_pretrained: Callable[..., None], attach: Callable[[nn.Module], None]
) -> Callable[..., None]:
    signature = inspect.signature(save_pretrained)

    @wraps(save_pretrained)
    def save(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        if not is_ternary(model):
            return save_pretrained(model, *args, **kwargs)
        call = signature.bind(model, *args, **kwargs)
        given = call.arguments
        check_adapters(model)
        if not given.get("save_original_format", True):
            raise TriternError(
                "save_original_format must be True for ternary models: the digest is of that format"
            )
        if quantizer_of(model) is None:  # part of a model that was patched
            attach(model)
        folder = given["save_directory"]
        writes = model.should_save_on_this_rank(given.get("is_main_process", True))
        if not writes:
            return save_pretrained(*call.args, **call.kwargs)
        check_folder(folder, "save_directory")
        push = given.pop("push_to_hub", False)
        with sealed(folder):
            save_pretrained(*call.args, **call.kwargs)
        if push:  # at the end, so that the manifest is uploaded, too
            known = inspect.signature(model.push_to_hub).parameters
            named = {**given, **given.get("kwargs", {})}
            hub = {name: value for name, value in named.items() if name in known and name != "self"}
            model.push_to_hub(**{"repo_id": Path(folder).name, **hub})

    return save


def _with_requirement(plain: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(plain)

    @wraps(plain)
    def save(model: Any, path: str | None, *args: Any, **kwargs: Any) -> None:
        if path is None or not is_ternary(model):
            return plain(model, path, *args, **kwargs)
        check_adapters(model)
        if not signature.bind(model, path, *args, **kwargs).arguments.get("safe_serialization", True):
            raise TriternError(
                "safe_serialization must be True for ternary models: they are saved without pickles"
            )
        check_folder(path, "path")
        patched_while_loading = next(patched_here(model), None) is not None
        if patched_while_loading and "tritern" not in (model._model_card_text or ""):
            model._model_card_text = model_card(model, settings_of(model))
        with sealed(path):
            plain(model, path, *args, **kwargs)
            file = Path(path, "config_sentence_transformers.json")
            config = json.loads(file.read_text(encoding="utf-8"))
            # without tritern, loading says what to install
            config["requirements"] = {**config.get("requirements", {}), "tritern": ">=0.1"}
            file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")

    return save
