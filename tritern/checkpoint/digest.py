"""Detection of altered checkpoints: a digest of the weights and a manifest of the other files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError

DIGEST_KEY = "tritern_sha256"
"""Name of the digest in the safetensors metadata."""

MANIFEST = "tritern_manifest.json"
"""File beside a saved model. It holds the sha256 of every other file that affects the vectors."""

EDITABLE = "config_sentence_transformers.json"
"""File with a sentence-transformers model's prompts, similarity and versions. Users may change it."""

_MODULE_FOLDER = re.compile(r"(\w+_)?\d+_\w+")
"""sentence-transformers' names for the folders of its modules: ``1_Pooling``, ``query_0_Transformer``."""

_SAVED_AS = {
    ("U8", "F32", 1),
    *((codes, kind, rank) for codes, rank in (("I8", 1), ("U8", 2)) for kind in ("F32", "F16", "BF16")),
}
"""Types of codes and scales in safetensors files, and the number of dimensions of the scales: for ternary
layers, 8-bit tables and 4-bit tables.
"""

_NO_PART_OF_A_MODEL = (".csv", ".err", ".jsonl", ".log", ".md", ".out")
"""Model cards and logs. They may change at any time."""


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 of the names, dtypes, shapes and bytes of all tensors, in order of their names."""
    return _digest(sorted(tensors, key=lambda item: item[0]))


def _digest(in_order: Iterable[tuple[str, Tensor]]) -> str:
    total = hashlib.sha256()
    for name, tensor in in_order:
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def verify(files: Iterable[str | Path]) -> None:
    """Read a checkpoint's safetensors files, one tensor at a time, and compare them with the saved digest.

    Raises:
        CheckpointError: a file cannot be read, has no digest, or has changed since it was saved; codes or
            scales of a wrong dtype.
    """
    files = [Path(f) for f in files]
    where = files[0].parent if files else "the checkpoint"
    expected: set[str | None] = set()
    owner = {}
    with ExitStack() as stack:
        for file in files:
            if file.suffix != ".safetensors":
                raise CheckpointError(
                    f"{file}: ternary models are read from safetensors files only; save the model again"
                )
            try:
                content = stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file} cannot be read ({error}): it is truncated or damaged. Copy it again."
                ) from None
            expected.add((content.metadata() or {}).get(DIGEST_KEY))
            owner.update(dict.fromkeys(content.keys(), content))
        if expected == {None} or len(expected) != 1:
            raise CheckpointError(
                f"{where}: the weights carry no single digest ({DIGEST_KEY} in the safetensors metadata), so "
                "they were rewritten after saving. Save the model again with model.save_pretrained()."
            )
        _check_dtypes(owner)
        found = _digest((name, owner[name].get_tensor(name)) for name in sorted(owner))
    if found != expected.pop():
        raise CheckpointError(
            f"{where}: the weights are not those that were saved (sha256 differs). Copy them again."
        )


def _check_dtypes(owner: dict[str, Any]) -> None:
    """Refuse codes and scales that transformers would silently cast to the layer's dtype."""
    for name in owner:
        if name.endswith(".weight_scale"):
            weight = name.removesuffix("_scale")
            kinds = [owner[n].get_slice(n).get_dtype() if n in owner else "" for n in (weight, name)]
            rank = len(owner[name].get_slice(name).get_shape())
            if (*kinds, rank) not in _SAVED_AS and "" not in kinds:
                raise CheckpointError(
                    f"{weight} and its scale must be uint8 and float32 [N] (in an 8-bit table int8 and "
                    "floating point [rows], in a 4-bit one uint8 and floating point [rows, groups]); the "
                    f"file holds {kinds[0]} and {kinds[1]} of {rank} dimensions. Save the model again with "
                    "model.save_pretrained()."
                )


@contextmanager
def sealed(folder: str | Path) -> Iterator[None]:
    """Write a manifest of the files that the body writes into ``folder`` and its modules' folders.

    The manifest leaves out model cards, logs, prompts, and safetensors files that carry a digest.
    """
    folder = Path(folder)
    before = _files(folder)
    yield
    written = [name for name, state in _files(folder).items() if before.get(name) != state]
    sums = {name: _sha256(folder / name) for name in sorted(written) if not _has_digest(folder / name)}
    _write(folder / MANIFEST, json.dumps({"sha256": sums}, indent=1) + "\n")
    as_readable_as(folder / MANIFEST, (folder / name for name in written))


def as_readable_as(model: Path, files: Iterable[Path]) -> None:
    """Give safetensors files the mode of ``model``, an ordinary file. safetensors makes them readable by
    their owner alone.
    """
    mode = stat.S_IMODE(model.stat().st_mode)
    for file in files:
        if file.suffix == ".safetensors" and stat.S_IMODE(file.stat().st_mode) != mode:
            file.chmod(mode)


@contextmanager
def resealed(folder: str | Path) -> Iterator[list[str]]:
    """Update a model's manifests to its present files; restore them if the body raises.

    Yields:
        The names of the files that have changed.

    Raises:
        CheckpointError: the folder has no manifest, or one that cannot be read.
    """
    folder = Path(folder)
    roots = [Path(parent) for parent, names in _walk(folder) if MANIFEST in names]
    if folder not in roots:
        raise CheckpointError(
            f"{folder} holds no {MANIFEST}: none of its files is sealed. Load the model and save it again "
            "with model.save_pretrained(), which seals them"
        )
    before = {root / MANIFEST: (root / MANIFEST).read_text(encoding="utf-8") for root in roots}
    known = {root: _manifest(root / MANIFEST) for root in roots}
    now = {
        root: {name: _sha256(root / name) for name in sums if (root / name).is_file()}
        for root, sums in known.items()
    }
    changed = [
        (root / name).relative_to(folder).as_posix()
        for root, sums in now.items()
        for name in sums
        if sums[name] != known[root][name]
    ]
    try:
        for root, sums in now.items():
            _write(root / MANIFEST, json.dumps({"sha256": sums}, indent=1) + "\n")
        yield list(dict.fromkeys(changed))
    except BaseException:
        for file, text in before.items():
            _write(file, text)
        raise


def _write(file: Path, text: str) -> None:
    """Write in one step, so that a reader never finds half of it."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def verify_files(folder: str | Path) -> None:
    """Compare the files in a model's folder with its manifest. If the model is a module of another, compare
    with the manifest of that one, too.

    Unlisted files and missing files are skipped: a hub's cache holds only the files that were asked for.
    Without a manifest nothing is compared.

    Raises:
        CheckpointError: a file has changed since it was saved, or the manifest cannot be read.
    """
    folder = Path(os.path.abspath(folder))
    for root in (folder, *folder.parents[:2]):
        sums = _manifest(root / MANIFEST)
        below = folder.relative_to(root).as_posix() + "/"
        if root != folder and not any(name.startswith(below) for name in sums):
            continue  # the manifest of another model in the folder above
        for name, expected in sums.items():
            if (root / name).is_file() and _sha256(root / name) != expected:
                raise CheckpointError(
                    f"{root / name} is not the file that was saved (sha256 differs), and vectors depend on "
                    "it. Copy it again. If it was changed on purpose, seal the folder with "
                    f"`tritern info {root} --seal`"
                )


def _manifest(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    try:
        sums = json.loads(file.read_text(encoding="utf-8"))["sha256"]
        if not all(isinstance(v, str) and ".." not in k.split("/") and k[0] != "/" for k, v in sums.items()):
            raise ValueError("not a table of file names and sha256 sums")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): it is damaged. Copy it again.") from None
    return {name: total for name, total in sums.items() if PurePosixPath(name).name != EDITABLE}


def _files(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Files that may be part of the model in a folder, with values that change when they are written."""
    found = {}
    for parent, names in _walk(folder):
        for name in names:
            # the only text files of a model are its tokenizer's; others are notes and logs
            other_text = name.endswith(".txt") and name not in ("vocab.txt", "merges.txt")
            other = name.startswith(MANIFEST) or name == EDITABLE or other_text
            if not (other or name.endswith(_NO_PART_OF_A_MODEL)):
                file = Path(parent, name)
                try:
                    state = file.stat()
                except OSError:  # a dead link, or just deleted
                    continue
                key = str(PurePosixPath(file.relative_to(folder)))
                found[key] = (state.st_mtime_ns, state.st_size, state.st_ino)
    return found


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A model's folder and its modules' folders, with the names of the files in each."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if _MODULE_FOLDER.fullmatch(f)]
        yield parent, names


def _has_digest(file: Path) -> bool:
    if file.suffix != ".safetensors":
        return False
    with safe_open(file, framework="pt") as content:
        return DIGEST_KEY in (content.metadata() or {})


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        total = hashlib.sha256()
        while block := content.read(1 << 20):
            total.update(block)
    return total.hexdigest()
