"""Ternary models in transformers' own save and load: a quantizer plug-in named "tritern"."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from tritern_kernels.devices import unsupported
from tritern_kernels.formats import check_codes, check_scale, packed_width

from ..config import TernaryConfig
from ..conversion import convert
from ..engine import encoder
from ..engine.fused import fuse_what_fits
from ..errors import CheckpointError, TriternError
from ..nn.embedding import Int4Embedding, QuantizedEmbedding, embedding_of, multiplier
from ..nn.linear import TernaryLinear, linear_of
from ..nn.replace import is_ternary, replace_by_plain
from .card import model_card
from .digest import DIGEST_KEY, digest, verify, verify_files
from .saving import extend
from .settings import METHOD, TernaryQuantizationConfig

Module = TypeVar("Module", bound=nn.Module)


class TernaryHfQuantizer(HfQuantizer):
    """Builds ternary layers before a ternary checkpoint is loaded, patches any other model after loading, and
    writes the digest when a model is saved.
    """

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to patch with anything but a ``TernaryConfig``."""
        if not self.pre_quantized and not isinstance(self.quantization_config, TernaryConfig):
            raise TriternError(
                "quantization_config must be a tritern.TernaryConfig to make a model ternary while it is "
                f"loaded; received a {type(self.quantization_config).__qualname__}"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Note the weights' devices for ``update_attn_implementation``, which is called next."""
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        named = all(str(place) in ("cpu", "disk") for place in places)
        self._on_cpu = named or unsupported(torch.device("cuda")) is not None
        return device_map

    def update_attn_implementation(self, config: Any) -> Any:
        """Load 16-bit weights as float32 on a CPU; that is many times faster there. transformers reads the
        dtype from the configuration after this call, unless the caller names one.
        """
        if (
            self.pre_quantized
            and self._on_cpu
            and getattr(config, "dtype", None) in (None, torch.float16, torch.bfloat16)
        ):
            config.dtype = torch.float32
        return config

    update_tp_plan = update_attn_implementation
    """Older versions of transformers call this at the same place."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            return model
        files = kwargs.get("checkpoint_files")
        if files:
            verify_files(Path(files[0]).parent)
            verify(files)
        settings = self.quantization_config
        assert isinstance(settings, TernaryQuantizationConfig)
        names_now = _names_now(model, [*settings.modules, *settings.embeddings])
        int4 = set(settings.int4_modules)
        for name in settings.modules:
            old = _submodule(model, names_now[name])
            if type(old) is not nn.Linear:  # a subclass may compute something else
                raise CheckpointError(
                    f"config.json names the ternary layer {name!r}, but the model has no nn.Linear there"
                )
            new = linear_of(4 if name in int4 else 2)(
                old.in_features, old.out_features, old.bias is not None,
                activation_bits=settings.activation_bits, norm_eps=settings.norms.get(name), device="meta",
                dtype=old.weight.dtype,
            )  # fmt: skip
            model.set_submodule(names_now[name], new)
        for name in settings.embeddings:
            table = _submodule(model, names_now[name])
            if not isinstance(table, nn.Embedding) or multiplier(table) is None:
                raise CheckpointError(
                    f"config.json names the rounded table {name!r}, but the model has no nn.Embedding there"
                )
            model.set_submodule(names_now[name], embedding_of(settings.embedding_bits).like(table))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # transformers forbids .half() and .float() on quantized models; ternary layers allow both.
        model.is_quantized = False  # type: ignore[assignment]
        if isinstance(self.quantization_config, TernaryConfig):
            encoder.attach_to_loading()
            return _converted(model, self.quantization_config)
        extend(attach)
        for name, module in [*_named(model, TernaryLinear), *_named(model, QuantizedEmbedding)]:
            _check_loaded(name, module)
        encoder.attach_to_loading()
        if any(p.is_cuda for p in model.parameters()):
            fuse_what_fits(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Metadata for the safetensors files: the digest of the tensors that save_pretrained will write.

        This also updates the settings, because layers may have changed since the model was patched.
        """
        from transformers.core_model_loading import revert_weight_conversion
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # adapters only
        model.config.quantization_config = self.quantization_config = _described(model)
        state = {
            k: v for k, v in model.state_dict().items() if k not in (model._keys_to_ignore_on_save or ())
        }
        state: dict[str, torch.Tensor] = revert_weight_conversion(
            model, remove_tied_weights_from_state_dict(state, model)
        )
        if offloaded := [name for name, tensor in state.items() if tensor.is_meta]:
            raise TriternError(
                f"{offloaded[0]} and {len(offloaded) - 1} more tensors are on the meta device: load the "
                "model without offloading to save it"
            )
        return None, {DIGEST_KEY: digest(state.items())}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """True: ternary models are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes are constants."""
        return False

    @property
    def is_compileable(self) -> bool:
        """torch.compile traces the ternary operators."""
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # transformers passes config.dtype, which is a name after a model was saved
        replace_by_plain(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32)
        return model


# A TernaryConfig may be passed for a model that is ternary already. transformers then compares the names of
# the two classes: if they are equal it warns that the model's own settings are used, otherwise it raises.
TernaryQuantizationConfig.__name__ = TernaryConfig.__name__

# Called as functions, because as decorators they would hide the classes' own types.
register_quantization_config(METHOD)(TernaryQuantizationConfig)
register_quantizer(METHOD)(TernaryHfQuantizer)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _names_now(model: PreTrainedModel, names: list[str]) -> dict[str, str]:
    """The present names of the layers that config.json names. Some versions of transformers name layers
    differently and rename a checkpoint's weights while loading; this renames the layers in the same way.
    """
    found = {name: name for name in names}
    missing = [name for name in names if _submodule(model, name) is None]
    if missing:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
        here = model.state_dict()
        for name in missing:
            key, _ = rename_source_key(f"{name}.weight", renamings, [], model.base_model_prefix, here)
            found[name] = key.removesuffix(".weight")
    return found


def attach(model: nn.Module, config: TernaryConfig | None = None, calibrated_on: int = 0) -> None:
    """Tell the transformers models inside ``model`` which layers are ternary and which tables rounded, for
    saving and loading. Put the engine behind ``encode``.

    Args:
        model: has ternary layers.
        config: their settings; None: those in the models' configurations.
        calibrated_on: number of texts that the weights were fitted to, for the model card.
    """
    outermost: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(
            name.startswith(f"{o}." if o else "") for o in outermost
        ):
            outermost.append(name)
            if is_ternary(module):
                module.config.quantization_config = settings = _described(module, config)
                module.hf_quantizer = TernaryHfQuantizer(settings, pre_quantized=False)  # type: ignore[assignment]
    extend(attach)
    if hasattr(model, "_model_card_text"):  # a sentence-transformers model
        vars(model)["_model_card_text"] = model_card(model, config or TernaryConfig(), calibrated_on)
    encoder.attach(model)


def _converted(model: PreTrainedModel, config: TernaryConfig) -> PreTrainedModel:
    """Make a plain model ternary while it is loaded."""
    convert(model, config)
    attach(model, config)
    if any(p.is_cuda for p in model.parameters()):
        fuse_what_fits(model)
    return model


def detach(model: nn.Module) -> None:
    """Undo ``attach``: the model saves as a plain one, with sentence-transformers' own ``encode``."""
    encoder.detach(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):  # its config may be that of the model around it
            if isinstance(getattr(module.config, "quantization_config", None), TernaryQuantizationConfig):
                del module.config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
            vars(module).pop("hf_quantizer", None)
    if "_model_card_text" in vars(model):
        vars(model)["_model_card_text"] = None


def _described(model: PreTrainedModel, made_by: Any = None) -> TernaryQuantizationConfig:
    """config.json's entry for the ternary layers and rounded tables of a model.

    Args:
        model: the model.
        made_by: has ``rule`` and ``skip``; None: those in the model's configuration.

    Raises:
        TriternError: layers with different ``activation_bits``, tables of different ``bits``.
    """
    if made_by is None:
        known = getattr(model.config, "quantization_config", None)
        made_by = known if isinstance(known, TernaryQuantizationConfig) else TernaryConfig()
    layers = _named(model, TernaryLinear)
    by_bits = {m.activation_bits: n for n, m in layers}
    if len(by_bits) > 1:
        raise TriternError(
            "activation_bits must be the same in all ternary layers of a model that is saved; they are "
            + " and ".join(f"{bits} in {name}" for bits, name in by_bits.items())
        )
    norms = {n: m.norm.eps for n, m in layers if m.norm is not None}
    bits = next(iter(by_bits), made_by.activation_bits)
    tables = {n: m.bits for n, m in _named(model, QuantizedEmbedding)}
    if len(set(tables.values())) > 1:
        raise TriternError(
            f"embedding tables of a model that is saved must have the same bits; they are {tables}"
        )
    table_bits = next(iter(tables.values()), 16)
    names, int4 = [n for n, _ in layers], [n for n, m in layers if m.weight_bits == 4]
    return TernaryQuantizationConfig(
        names, bits, made_by.rule, made_by.skip, list(tables), table_bits, norms, int4
    )


def _check_loaded(name: str, layer: TernaryLinear | QuantizedEmbedding) -> None:
    """Refuse impossible layers. A digest does not show these: it vouches for bytes, not for their writer.

    Raises:
        CheckpointError: a tensor of the layer is missing or of another dtype or shape, or holds impossible
            values.
    """
    for key, tensor in layer.state_dict(keep_vars=True).items():
        if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False):  # transformers loaded it
            raise CheckpointError(f"the checkpoint has no {name}.{key}: save the model again")
    if layer.weight.is_meta or layer.weight_scale.is_meta:
        return  # offloaded by accelerate
    try:
        if isinstance(layer, TernaryLinear):
            packed = layer.packed()
            if packed.bits != layer.weight_bits:
                wanted = [layer.out_features, packed_width(layer.in_features, layer.weight_bits)]
                received = list(layer.weight.shape)
                raise ValueError(
                    f"weight must have shape {wanted} in {layer.weight_bits} bits; received {received}"
                )
            for part in _parts(packed.packed):
                check_codes(part, packed.bits)
        elif layer.weight.dtype != (wanted := torch.uint8 if layer.bits == 4 else torch.int8):
            raise TypeError(f"the table must be {wanted}; received {layer.weight.dtype}")
        signed = isinstance(layer, Int4Embedding)
        for part in _parts(layer.weight_scale):
            check_scale(part.abs() if signed else part)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{name}: {error}") from None


def _parts(tensor: torch.Tensor) -> Iterable[torch.Tensor]:
    """Parts of a tensor. On a CPU they are too small for torch to start threads, which would block forks."""
    return tensor.flatten().split(1 << 14) if tensor.device.type == "cpu" else [tensor]


def _named(model: nn.Module, kind: type[Module]) -> list[tuple[str, Module]]:
    return [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, kind)]
