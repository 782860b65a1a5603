"""The small files of a checkpoint's folder, and which files count as inside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spmd_infer.errors import CheckpointError

CONFIG_NAME = "config.json"
_JSON_LIMIT = 64 << 20


def inside(folder: Path, name: str) -> Path:
    """The file of that base name in a folder.

    A symbolic link is followed only to a place inside the folder or, in a Hugging Face cache
    (``<repository>/snapshots/<revision>``), inside the same repository's ``blobs``.

    Raises:
        CheckpointError: the name is not a base name, or the link leads elsewhere.
    """
    if name in ("", ".", "..") or "\0" in name or "\\" in name or Path(name).name != name:
        raise CheckpointError(f"{folder}: file name {name!r} is not a plain name inside the folder")
    file = folder / name
    try:
        home, target = folder.resolve(), file.resolve()
    except (OSError, RuntimeError) as error:  # Python before 3.13 raises RuntimeError for links in a circle
        raise CheckpointError(f"{file}: cannot be resolved: {error}") from error
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{file}: is a link to {target}, outside its folder")
    return file


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a folder; empty where there is none.

    Raises:
        CheckpointError: it is not a JSON object, or is larger than a configuration can be.
    """
    if not (folder / CONFIG_NAME).is_file():
        return {}
    return read_json(inside(folder, CONFIG_NAME))


def read_json(file: Path) -> dict[str, Any]:
    """A small file that holds one JSON object.

    Raises:
        CheckpointError: it cannot be read, is too large, or holds something else.
    """
    try:
        size = file.stat().st_size
        if size > _JSON_LIMIT:
            raise CheckpointError(f"{file}: {size} bytes of JSON, more than the {_JSON_LIMIT} that are read")
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: expected a JSON object, but it cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found a {type(value).__name__}")
    return value


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """The architecture that a Hugging Face configuration names: the first of ``architectures``, or ``model_type``."""
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    kind = config.get("model_type")
    return kind if isinstance(kind, str) else None
