"""Commands' output: results, refusals, checks of folders, the environment in a line."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any


@dataclass(frozen=True)
class Result:
    """The result of a verb: ``data`` for ``--json``, ``text`` for people."""

    data: dict[str, Any]
    text: str


class Refused(Exception):
    """An error that the user can fix; the message says how."""


def check_output(output: Path, force: bool, how: str = "") -> None:
    """Refuse a folder that is not empty or cannot be written, before the work starts."""
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        if not force:
            what = "is there already" if output.is_file() else "is not empty"
            raise Refused(f"{output} {what}: name another, or write into it with --force{how}")
        if output.is_file():
            raise Refused(f"{output} is a file; name a folder")
    check_writable(output)


def check_writable(path: Path) -> None:
    """Refuse a file or folder that cannot be made or written."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if there != path and not there.is_dir():
        raise Refused(f"cannot write {path}: {there} is a file")
    if not os.access(there, os.W_OK):
        raise Refused(f"cannot write {path}: no permission to write {there}")
    try:
        with TemporaryFile(dir=there if there.is_dir() else there.parent):
            pass
    except OSError as error:
        raise Refused(f"cannot write {path}: {error.strerror} in {there}") from None


def environment() -> dict[str, str | None]:
    """Versions and torch's device."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("tritern", "torch", "triton", "transformers", "sentence-transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    cuda = torch.cuda.is_available()
    found["gpu"] = torch.cuda.get_device_name() if cuda else None
    found["cpu"] = f"{torch.get_num_threads()} threads"
    return found


def footer(found: dict[str, str | None]) -> str:
    """The environment in a line."""
    return ", ".join(f"{name} {value or 'none'}" for name, value in found.items())
