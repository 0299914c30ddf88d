"""Fitted layers on disk, so that a calibration that was interrupted goes on where it ended."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tritern_kernels import PackedWeight

from ..checkpoint.digest import digest
from ..config import TernaryConfig
from ..errors import TriternError
from ..inputs import check_folder
from ..nn.linear import TernaryLinear


class Store:
    """A folder with a file for each fitted group of layers, ``<number>.safetensors``, and the chosen bits.

    Args:
        folder: made if it is missing.
        model: the original.
        inputs: the calibration's inputs.
        config: the calibration's settings.
        bits: the budget, if there is one.

    Raises:
        TriternError: not a folder that can be written, or one with the calibration of another model, other
            texts or other settings.
    """

    def __init__(
        self, folder: Path, model: nn.Module, inputs: Sequence[Any], config: TernaryConfig, bits: float | None
    ) -> None:
        self.folder = check_folder(folder, "calibration_folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = [config.to_dict(), bits, list(map(_text, inputs)), digest(model.state_dict().items())]
        self._of = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
        own = self.folder / "calibration.json"
        known: dict[str, Any] = json.loads(own.read_text()) if own.exists() else {"of": self._of}
        if known["of"] != self._of or (not own.exists() and any(self.folder.iterdir())):
            raise TriternError(
                f"calibration_folder={str(folder)!r} holds something else: the calibration of another model, "
                "with other texts or settings. Name an empty folder, or remove this one"
            )
        self._bits: dict[str, int] | None = known.get("bits")
        self._write(self._bits)

    def bits(self) -> dict[str, int] | None:
        """The bits chosen for a budget; None if they are not chosen yet."""
        return self._bits

    def keep_bits(self, bits: Mapping[str, int]) -> None:
        """Keep the choice."""
        self._bits = dict(bits)
        self._write(self._bits)

    def layers(self, number: int, model: nn.Module, activation_bits: int) -> dict[str, TernaryLinear] | None:
        """The layers of a group by their names, or None if they are not fitted yet.

        Args:
            number: of the group.
            model: the original; biases take dtype and device from it.
            activation_bits: of the layers.
        """
        file = self.folder / f"{number}.safetensors"
        if not file.exists():
            return None
        found: dict[str, TernaryLinear] = {}
        with safe_open(file, "pt") as tensors:
            for name in json.loads(tensors.metadata()["layers"]):
                old: Any = model.get_submodule(name)
                device = old.weight.device
                parts = [
                    tensors.get_tensor(f"{name}.{part}").to(device) for part in ("weight", "weight_scale")
                ]
                bias = old.bias
                if bias is not None:
                    values = tensors.get_tensor(f"{name}.bias").to(bias)
                    bias = nn.Parameter(values, bias.requires_grad)
                packed = PackedWeight(parts[0], parts[1], (old.out_features, old.in_features))
                found[name] = TernaryLinear.from_packed(packed, bias, activation_bits=activation_bits)
        return found

    def keep(self, number: int, layers: Mapping[str, TernaryLinear]) -> None:
        """Keep the layers of a group (none, if it could not be fitted)."""
        tensors: dict[str, Tensor] = {
            f"{name}.{key}": value.detach().contiguous()
            for name, layer in layers.items()
            for key, value in layer.state_dict().items()
        }
        tensors = tensors or {
            "none": torch.zeros(1, dtype=torch.uint8, device="cpu")
        }  # a file must hold something
        partial = self.folder / f"{number}.partial"
        save_file(tensors, partial, {"layers": json.dumps(list(layers))})
        os.replace(partial, self.folder / f"{number}.safetensors")

    def _write(self, bits: dict[str, int] | None) -> None:
        partial = self.folder / "calibration.partial"
        partial.write_text(json.dumps({"of": self._of, "bits": bits}))
        os.replace(partial, self.folder / "calibration.json")


def _text(value: Any) -> str:
    """An input, for comparison: its text, or what ``repr`` shows of it."""
    return value if isinstance(value, str) else repr(value)
