"""`run.json`, which lists what a run's folder holds, and what is checked before anything of it is believed.

Its digest tells damage, not intent: who wrote it may have written anything, so names, types and sizes are held against
the files beside it, the model and the optimizer before memory is taken or a tensor is copied.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import AdapterFileError
from .files import digest, write_files

MANIFEST, FORMAT = "run.json", 1
_FIELDS = {"format": int, "files": dict, "tensors": dict, "numbers": dict, "groups": list, "extra": dict}
_TYPES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64"),
    *("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool"),
)
# By name, as only these are types: getattr(torch, name) has functions, too.
TYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _TYPES}


def write_manifest(folder: Path, text: dict[str, Any]) -> None:
    """Last of all, as a folder without it is no checkpoint. Raises AdapterFileError."""
    try:
        line = json.dumps(text | {"digest": _digest_of(text)}, sort_keys=True)
    except TypeError as error:
        raise AdapterFileError(f"what goes with the run must be of JSON's types: {error}.") from error
    write_files(folder, {MANIFEST: lambda path: path.write_text(line, encoding="utf-8")})


def read_manifest(folder: Path, rank: int, count: int) -> dict[str, Any]:
    """`run.json` in `folder`, once it and this process's share of the files are found whole.

    Raises AdapterFileError; what is returned has the form of what `write_manifest` wrote.
    """
    if not (folder / MANIFEST).is_file():
        raise AdapterFileError(f"{str(folder)!r} holds no complete run: it has no {MANIFEST}. Take an earlier one.")
    try:
        text: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sums = text.pop("digest")
        sound = sums == _digest_of(text) and all(isinstance(text[key], kind) for key, kind in _FIELDS.items())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise AdapterFileError(f"{str(folder / MANIFEST)!r} is damaged: {error}. Take an earlier run.") from error
    if not sound or text["format"] != FORMAT:
        raise AdapterFileError(f"{str(folder / MANIFEST)!r} is damaged, or of another version; take an earlier run.")
    _check_form(folder, text)
    for name in sorted(text["files"])[rank::count]:
        file = folder / name
        if not file.is_file() or digest(file) != text["files"][name]:
            raise AdapterFileError(
                f"{str(file)!r} is {'damaged' if file.is_file() else 'missing'}; take an earlier run."
            )
    return text


def check_stored(folder: Path, text: dict[str, Any]) -> None:
    """Raise AdapterFileError unless the files hold every tensor that `text` names, of its type and size, and no other.

    Only their headers are read; so what is allocated for them is no larger than the files are.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader  # type: ignore[attr-defined]

    found: dict[str, list[Any]] = {}
    headers: dict[str, Any] = dict(HuggingFaceStorageReader(path=str(folder)).read_metadata().state_dict_metadata)
    for key, stored in headers.items():
        complete = sum(math.prod(chunk.sizes) for chunk in stored.chunks) == math.prod(stored.size)
        found[key] = [stored.properties.dtype, *stored.size, *([] if complete else ["in parts"])]
    told = {key: [TYPES[dtype], *shape] for key, (dtype, *shape) in text["tensors"].items()}
    for key in sorted(found.keys() | told.keys()):
        if found.get(key) != told.get(key):
            raise AdapterFileError(
                f"{str(folder)!r}: {key!r} is {told.get(key)} in {MANIFEST} and {found.get(key)} in the files; take an "
                "earlier run."
            )


def check_optimizer(folder: Path, text: dict[str, Any], names: Sequence[str], groups: Sequence[dict[str, Any]]) -> None:
    """Raise AdapterFileError for an entry of no parameter in `names`, of no group, or of another kind than it has."""
    for key, value in (text["tensors"] | text["numbers"]).items():
        kind, _, rest = key.partition(".")
        name, _, entry = rest.rpartition(".")
        fits = kind == "model" and key in text["tensors"]  # whose names and shapes are the model's
        fits |= bool(entry) and kind == "optimizer" and name in names
        if kind == "group" and entry != "params" and name in map(str, range(len(groups))):
            own = groups[int(name)].get(entry)
            fits = _like_tensor(value, own) if key in text["tensors"] else _alike(value, own)
        if not fits or (key in text["tensors"] and key in text["numbers"]):
            raise AdapterFileError(
                f"{str(folder / MANIFEST)!r}: {key!r} is {str(value)[:60]!r}, for which the optimizer has no place. "
                "Build it as it was when the run was saved, or take an earlier run."
            )


def _check_form(folder: Path, text: dict[str, Any]) -> None:
    tensors, files = text["tensors"].values(), text["files"]
    sound = all(isinstance(told, list) and told and told[0] in _TYPES for told in tensors)
    sound = sound and all(type(side) is int and side >= 0 for told in tensors for side in told[1:])
    if not sound or not all(isinstance(group, list) for group in text["groups"]):
        raise AdapterFileError(
            f"{str(folder / MANIFEST)!r} tells of a tensor that has no sizes, or no type of {', '.join(_TYPES)}; take "
            "an earlier run."
        )
    # The reader takes all that are there, so one that is not listed would have no digest.
    there = {file.name for file in folder.glob("*.safetensors")}
    for name in sorted(there - files.keys()) or [name for name in files if name != Path(name).name]:
        raise AdapterFileError(
            f"{str(folder / name)!r} is not among the files that {MANIFEST} lists in this folder; take an earlier run."
        )


def _alike(value: Any, own: Any) -> bool:
    """Whether a group may have `value` where it has `own` now; None is what either has before it is set."""
    if value is None or own is None or isinstance(own, Tensor):
        return value is None or not isinstance(value, str | list) or own is None
    if isinstance(own, list | tuple):
        return isinstance(value, list) and len(value) == len(own) and all(map(_alike, value, own))
    if isinstance(own, bool | str):
        return type(value) is type(own)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _like_tensor(told: list[Any], own: Any) -> bool:
    """Whether a group may have a tensor of this type and shape where it has `own` now."""
    if isinstance(own, Tensor):
        return told[1:] == list(own.shape) and TYPES[told[0]].is_floating_point == own.is_floating_point()
    return own is None or (isinstance(own, int | float) and math.prod(told[1:]) == 1)


def _digest_of(text: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()
