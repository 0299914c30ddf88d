"""Layers of BitNet checkpoints as they are stored, and their loading by transformers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import BitNetQuantConfig, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from tritern_kernels import PackedWeight, ternarize_weight
from tritern_kernels.formats import pack

from ..errors import CheckpointError
from ..nn.linear import RMSNorm, TernaryLinear

METHOD = "tritern_bitnet"
"""Used only while loading; the model saves as a tritern checkpoint."""

CODES_PER_BYTE = 4


class StoredConfig(BitNetQuantConfig):
    """transformers' settings of a BitNet checkpoint, and the name of the norm inside its layers."""

    def __init__(self, norm_name: str = "rms_norm", **settings: Any) -> None:
        super().__init__(**settings)
        self.norm_name = norm_name
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers takes registered names as str

    @property
    def online(self) -> bool:
        """Whether full-precision weights are stored. A ``bitlinear`` layer is packed in any mode."""
        return self.linear_class == "autobitlinear" and self.quantization_mode == "online"


class Header:
    """Shapes and dtypes of a checkpoint's tensors, by name without the ``model.`` of whole models."""

    def __init__(self, files: Iterable[str | Path]) -> None:
        self.files = [Path(f) for f in files]
        self.tensors: dict[str, tuple[tuple[int, ...], str]] = {}
        for file in self.files:
            try:
                with safe_open(file, framework="pt") as content:
                    for name in content.keys():
                        part = content.get_slice(name)
                        self.tensors[bare(name)] = tuple(part.get_shape()), part.get_dtype()
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file} cannot be read as safetensors ({error}): it is truncated or of another format"
                ) from None

    def check(self, model: PreTrainedModel, settings: StoredConfig) -> None:
        """Raise ``CheckpointError`` unless the file has every tensor of the model in the right shape."""
        where = self.files[0].parent
        tied = set(map(bare, getattr(model, "all_tied_weights_keys", None) or ()))
        shapes = {bare(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for name, shape in shapes.items():
            if name in self.tensors and (stored := self.tensors[name][0]) != shape:
                raise CheckpointError(f"{where}: {name} has shape {list(stored)}; it must be {list(shape)}")
        missing = [name for name in shapes if name not in self.tensors and name not in tied]
        if not missing:
            return
        norm = f"_proj.{settings.norm_name}.weight"
        if settings.use_rms_norm and not any(name.endswith(norm) for name in self.tensors):
            hint = (
                f"It has no {norm.removeprefix('_')} at all: a full-precision model? "
                "Make that ternary with tritern.patch(model)."
            )
        else:
            hint = "Copy it again."
        raise CheckpointError(
            f"{where}: {len(missing)} tensors are missing, among them {', '.join(missing[:3])}. {hint}"
        )


def bare(name: str) -> str:
    """A tensor's name without the prefix of models with a head."""
    return name.removeprefix("model.")


class StoredLinear(nn.Module):
    """A linear layer in the checkpoint's form. After loading it becomes a ``TernaryLinear``."""

    def __init__(self, name: str, linear: nn.Linear, settings: StoredConfig, header: Header) -> None:
        super().__init__()
        self.name, self.settings = name, settings
        self.shape = N, K = linear.out_features, linear.in_features
        dtype = linear.weight.dtype
        stored, stored_dtype = header.tensors.get(bare(name) + ".weight", ((N, K), "none"))
        packed = stored_dtype == "U8"
        allowed: dict[bool, tuple[int, int]] = {}
        if not settings.online:
            allowed[True] = -(-N // CODES_PER_BYTE), K
        if settings.linear_class == "autobitlinear":
            allowed[False] = N, K
        if stored_dtype != "none" and stored != allowed.get(packed):
            kinds = (f"{'uint8' if p else 'float'} {list(shape)}" for p, shape in allowed.items())
            raise CheckpointError(
                f"{name}.weight is {stored_dtype} {list(stored)}; for a layer [{N}, {K}] of linear_class "
                f"{settings.linear_class!r}, {settings.quantization_mode}, it must be {' or '.join(kinds)}"
            )
        empty = torch.empty(stored, dtype=torch.uint8 if packed else dtype, device="meta")
        self.weight = nn.Parameter(empty, requires_grad=False)
        if not settings.online:
            self.weight_scale = nn.Parameter(torch.empty(1, dtype=dtype, device="meta"), requires_grad=False)
        self.bias = linear.bias
        if settings.use_rms_norm:
            norm = RMSNorm(K, settings.rms_norm_eps or 0.0, device="meta", dtype=dtype)
            self.add_module(settings.norm_name, norm)

    def ternary(self) -> TernaryLinear:
        """The ternary layer.

        Raises:
            CheckpointError: impossible codes or an impossible scale.
        """
        if self.settings.online:
            packed = ternarize_weight(self.weight.detach(), "absmean")
        else:
            packed = PackedWeight(pack(self._codes()), self._scale(), self.shape)
        norm = getattr(self, self.settings.norm_name, None)
        return TernaryLinear.from_packed(packed, self.bias, norm=norm).train(self.training)

    def _codes(self) -> Tensor:
        weight = self.weight.detach()
        if weight.dtype == torch.uint8:  # rows [i * N/4, (i + 1) * N/4) are in bits 2i, 2i+1
            lanes = [(weight >> 2 * i & 3) for i in range(CODES_PER_BYTE)]
            weight = torch.cat(lanes)[: self.shape[0]].to(torch.int8) - 1
        codes = weight.to(torch.int8)
        if not torch.equal(codes.to(weight.dtype), weight) or codes.amax() > 1 or codes.amin() < -1:
            raise CheckpointError(
                f"{self.name}.weight holds other codes than -1, 0 and +1: it is damaged, or its "
                "quantization_mode is not 'offline'"
            )
        return codes

    def _scale(self) -> Tensor:
        scale = self.weight_scale.detach().float()
        if not (torch.isfinite(scale) & (scale > 0)).all():
            raise CheckpointError(
                f"{self.name}.weight_scale must be a positive number; received {scale.tolist()}"
            )
        scale = 1 / scale if self.settings.linear_class == "bitlinear" else scale
        return scale.expand(self.shape[0]).contiguous()


class Quantizer(HfQuantizer):
    """Lets transformers load a BitNet checkpoint in its own form, then makes the layers ternary."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        settings = self.quantization_config
        assert isinstance(settings, StoredConfig)
        header = Header(kwargs.get("checkpoint_files") or ())
        skip = self.get_modules_to_not_convert(model, settings.modules_to_not_convert)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and should_convert_module(name, skip):
                model.set_submodule(name, StoredLinear(name, module, settings, header))
        header.check(model, settings)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if isinstance(module, StoredLinear):
                model.set_submodule(name, module.ternary())
        model.is_quantized = False  # type: ignore[assignment]  # as in tritern's own quantizer
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether it saves: no, tritern's own quantizer does."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Codes are constants."""
        return False


register_quantization_config(METHOD)(StoredConfig)
register_quantizer(METHOD)(Quantizer)
