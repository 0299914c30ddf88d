"""LoRA adapters of peft on a ternary model: the codes stay, small matrices beside them are trained."""

from __future__ import annotations

import warnings
from functools import cache, wraps
from typing import Any

try:
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTuner
except ImportError as error:
    raise ImportError("tritern.adapters.lora needs peft: pip install 'tritern[lora]'") from error

from torch import nn

from .checkpoint.adapters import check_adapters
from .errors import TriternError
from .nn.linear import TernaryLinear
from .nn.replace import is_ternary


class TernaryLoraLinear(Linear):
    """peft's LoRA layer around a ``TernaryLinear``: y = base(x) + scaling * B(A(dropout(x))).

    Raises:
        TriternError: a variant or initialization that reads the base weight, such as DoRA or PiSSA; merging.
    """

    def __init__(self, base_layer: TernaryLinear, adapter_name: str, config: LoraConfig, **kw: Any) -> None:
        start = config.init_lora_weights
        if start not in (True, False, "gaussian", "orthogonal"):
            raise TriternError(
                f"init_lora_weights must be True, False, 'gaussian' or 'orthogonal' on ternary layers; "
                f"received {start!r}, which would change the base weight"
            )
        if config.use_dora:
            raise TriternError("use_dora must be False on ternary layers: DoRA reads the base weight")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unsupported layer type")  # peft warns of unknown types
            super().__init__(base_layer, adapter_name, config, **kw)
        if self.lora_variant:
            variant = type(self.lora_variant[adapter_name]).__name__
            raise TriternError(
                f"only plain LoRA works on ternary layers; this configuration asks for {variant}"
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse to merge: the sum of ternary weights and an adapter is not ternary."""
        if isinstance(self.get_base_layer(), TernaryLinear):
            raise TriternError(
                "an adapter cannot be merged into ternary weights: keep it beside them, or merge it into the "
                "full-precision or dequantized model"
            )
        super().merge(safe_merge, adapter_names)


def lora(config: LoraConfig) -> LoraConfig:
    """Let a peft configuration apply to ternary layers; returns it.

    Pass every configuration through this function, a loaded one too: a saved configuration does not keep the
    registration of ternary layers. A model with adapters saves only the adapters and the name that it was
    loaded from. So save the ternary model, load it, then adapt it. Adapters of a model that was made ternary
    in memory are not saved.

        model = SentenceTransformer("minilm-ternary")
        model.add_adapter(tritern.adapters.lora(LoraConfig(target_modules=["query", "value"])))
        ...
        model = SentenceTransformer("minilm-ternary")
        model.load_adapter(path, peft_config=tritern.adapters.lora(LoraConfig.from_pretrained(path)))

    Raises:
        TriternError: not a ``peft.LoraConfig``.
    """
    if not isinstance(config, LoraConfig):
        raise TriternError(f"config must be a peft.LoraConfig; received {type(config).__name__}")
    config._register_custom_module({TernaryLinear: TernaryLoraLinear})
    _extend_save()
    explain()
    return config


def _check_targets(targets: Any) -> None:
    if targets == "all-linear":
        raise TriternError(
            "target_modules='all-linear' finds each nn.Linear and no ternary layer: name the layers, such as "
            "target_modules=['query', 'value']"
        )


@cache
def explain() -> None:
    """From now on, peft's refusals for ternary models say what to do."""
    plain = BaseTuner.inject_adapter

    @wraps(plain)
    def inject_adapter(tuner: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kw: Any) -> None:
        try:
            if is_ternary(model):
                _check_targets(getattr(tuner.peft_config[adapter_name], "target_modules", None))
            plain(tuner, model, adapter_name, *args, **kw)
        except (TypeError, ValueError) as error:
            if not hasattr(model, "peft_config") and getattr(model, "_hf_peft_config_loaded", False):
                vars(model)["_hf_peft_config_loaded"] = False  # transformers set it beforehand
            if "TernaryLinear" in str(error):
                raise TriternError(
                    "ternary layers take LoRA adapters only, from configurations that went through "
                    "tritern.adapters.lora: model.add_adapter(tritern.adapters.lora(peft.LoraConfig(...)))"
                ) from error
            if "Int8Embedding" in str(error) or "Int4Embedding" in str(error):
                raise TriternError(
                    "rounded tables take no adapters: name linear layers only in target_modules"
                ) from error
            raise

    BaseTuner.inject_adapter = inject_adapter  # pyright: ignore[reportAttributeAccessIssue]


@cache
def _extend_save() -> None:
    """Let peft's own ``save_pretrained`` refuse like that of transformers and sentence-transformers."""
    plain = PeftModel.save_pretrained

    @wraps(plain)
    def save(model: PeftModel, *args: Any, **kwargs: Any) -> None:
        check_adapters(model)
        plain(model, *args, **kwargs)

    PeftModel.save_pretrained = save  # pyright: ignore[reportAttributeAccessIssue]
