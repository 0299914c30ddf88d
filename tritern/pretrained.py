"""``tritern.load``: ternary models by name or folder; some come with the package."""

from __future__ import annotations

import warnings
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from tritern_kernels.devices import SUPPORTED, check_device, unsupported

from .engine.encoder import attach
from .errors import CheckpointError, TriternError
from .inputs import true_or_false
from .nn.replace import is_ternary

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_FOLDER = Path(__file__).parent / "models"


def shipped() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(file.parent.name for file in _FOLDER.glob("*/modules.json"))


def resolve(name: str | Path) -> str:
    """A name that ``SentenceTransformer`` can load: the folder of a shipped model, any other name unchanged.

    A folder of that name in the working directory comes first, as everywhere in sentence-transformers.

    Raises:
        TriternError: not a name, or a misspelt name of a shipped model; the hub is not asked for that.
    """
    if not isinstance(name, (str, Path)) or not str(name):
        raise TriternError(f"name must be the name or folder of a model; received {name!r}")
    name, known = str(name), shipped()
    if name in known:
        return name if (Path(name) / "modules.json").is_file() else str(_FOLDER / name)
    near = get_close_matches(name.lower(), known, 1, cutoff=0.8)
    if near and Path(name).name == name and not Path(name).exists():
        raise TriternError(
            f"there is no model {name!r}: tritern comes with {', '.join(known)}; did you mean {near[0]!r}? "
            "A model on the hub is named with its owner, as owner/name"
        )
    return name


def device_with_kernels(device: str | torch.device | None) -> str | None:
    """The device for a ternary model: ``device`` if given, otherwise sentence-transformers' choice (None).

    It is "cpu" if that choice has no kernels, such as "mps" on a Mac.

    Raises:
        TriternError: ``device`` is not a device, or has no kernels.

    Warns:
        UserWarning: the CPU is taken because sentence-transformers' choice has no kernels.
    """
    if device is None:
        from sentence_transformers.util import get_device_name

        chosen = get_device_name()
        if (why := unsupported(torch.device(chosen))) is None:
            return None
        warnings.warn(f"the model runs on the CPU, not on {chosen}: {why}; {SUPPORTED}", stacklevel=3)
        return "cpu"
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError):
        raise TriternError(
            f"device must be 'cpu', 'cuda', a GPU such as 'cuda:1', or None; received {device!r}"
        ) from None
    try:
        check_device(where)
    except ValueError as error:
        raise TriternError(f"device={str(device)!r}: {error}") from None
    return str(device)


def in_float32_on_cpu(model: SentenceTransformer, dtype: Any) -> SentenceTransformer:
    """Cast a ternary model on a CPU to float32, unless it was loaded with a ``dtype``.

    Loading itself does so on a machine without a GPU; with one it does not learn of ``device="cpu"``.
    """
    if dtype in (None, "auto") and model.device.type == "cpu" and is_ternary(model):
        model.float()
    return model


def model_of(given: Any, argument: str, *, encoder: bool = False) -> SentenceTransformer:
    """The given model, ternary or not, loaded if its name is given.

    Args:
        given: a SentenceTransformer, or the folder or name of one.
        argument: its name, for the error.
        encoder: accept anything with an ``encode``.

    Raises:
        TriternError: another type, or no such model. CheckpointError: a file is not what was saved.
    """
    from sentence_transformers import SentenceTransformer

    if not isinstance(given, (str, Path)):
        alike = encoder and not isinstance(given, type) and callable(getattr(given, "encode", None))
        if alike or isinstance(given, SentenceTransformer):
            return cast(Any, given)
        kind = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
        or_vectors = ", or a NumPy array of its vectors" if argument == "teacher" else ""
        raise TriternError(
            f"{argument} must be a SentenceTransformer, or the name or folder of one{or_vectors}; "
            f"received {kind}"
        )
    path, device = resolve(given), device_with_kernels(None)
    try:
        _refuse_missing(path)
        return in_float32_on_cpu(SentenceTransformer(path, device=device), None)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise TriternError(
            f"{argument}: cannot load {str(given)!r}; it must be the folder or hub name of a "
            f"sentence-transformers model, or one of {', '.join(shipped())}: {_first_line(error)}"
        ) from error


def _refuse_missing(path: str) -> None:
    """Refuse a path that is not a folder and cannot be a name on the hub."""
    if not Path(path).exists() and (path[0] in "./~" or path[-1] == "/" or path.count("/") > 1):
        raise OSError(f"there is no folder {path!r}")


def _first_line(error: Exception) -> str:
    """The first line of an error: the cause, without the advice of transformers and huggingface_hub."""
    return str(error).strip().partition("\n")[0]


def load(
    name: str | Path, *, device: str | None = None, fuse: bool = True, **settings: Any
) -> SentenceTransformer:
    """A ternary sentence-transformer, ready to encode.

    Args:
        name: the folder or hub name of a saved ternary model, or ``"minilm-l6-ternary"``. That one comes with
            the package and needs no network.
        device: as for ``SentenceTransformer``; by default a CUDA GPU with kernels, otherwise the CPU.
        fuse: fuse blocks on a CUDA GPU (``tritern.fuse``).
        **settings: further arguments of ``SentenceTransformer``, such as ``cache_folder``. On a CPU a model
            saved in 16 bits becomes float32, unless ``model_kwargs`` name a ``dtype``.

    Raises:
        CheckpointError: a file is not what was saved. TriternError: no such model, or one that is not
            ternary; a device without kernels.
    """
    from sentence_transformers import SentenceTransformer

    path, device = resolve(name), device_with_kernels(device)
    try:
        _refuse_missing(path)
        model = SentenceTransformer(path, device=device, **settings)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise TriternError(
            f"cannot load {str(name)!r}: it must be the folder or hub name of a saved ternary model, or the "
            f"name of one that comes with tritern ({', '.join(shipped())}): {_first_line(error)}"
        ) from error
    if not is_ternary(model):
        raise TriternError(
            f"{name} is not a ternary model; tritern.patch(SentenceTransformer({str(name)!r})) makes it one"
        )
    attach(model, fuse=true_or_false(fuse, "fuse"))
    named = settings.get("model_kwargs") or {}
    return in_float32_on_cpu(model, named.get("dtype", named.get("torch_dtype")))
