"""A run in the middle, in a folder: what trains and what its optimizer holds, each process writing its part.

`torch.distributed.checkpoint` does the writing, and the cutting anew for another number of processes. The files are
safetensors, by parameter name; `run.json` comes last and lists them with their digests. Nothing is pickled.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from .errors import AdapterFileError
from .files import digest
from .gathering import reshard_
from .injection import adapter_config, adapter_root
from .jsonfiles import believed
from .optimizers import unwrap
from .runmanifest import FORMAT, MANIFEST, TYPES, check_optimizer, check_stored, read_manifest, write_manifest
from .sharding import around, local
from .targets import saved_modules

T = TypeVar("T")


def save_run(
    model: nn.Module,
    optimizer: Any,
    folder: str | Path,
    extra: Mapping[str, Any] | None = None,
    process_group: Any = None,
) -> None:
    """Write the run of an adapted `model`, sharded or not, to `folder`; all processes of the group call it.

    `extra`, of JSON's types, is what `load_run` returns: a scheduler's state, the place in the data. Raises
    AdapterFileError, also if there is a run in `folder` already. A folder without `run.json` is no checkpoint.
    """
    folder, optimizer = Path(folder), unwrap(optimizer)
    reshard_(model)
    tensors, names = _trained(model), _names(model, optimizer)
    numbers: dict[str, Any] = {}
    for index, group in enumerate(optimizer.param_groups):
        for key in group.keys() - {"params"}:
            _put(f"group.{index}.{key}", group[key], tensors, numbers)
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            _put(f"optimizer.{names[parameter]}.{key}", value, tensors, numbers)
    rank, count = _seat(process_group)
    _together(process_group, lambda: _begin(folder) if rank == 0 else None)
    parts = _together(process_group, lambda: _write_part(folder, tensors, rank, count, process_group))
    text = {
        "format": FORMAT,
        "files": {name: told for part in parts for name, told in part.items()},
        "tensors": {key: [str(value.dtype).removeprefix("torch."), *value.shape] for key, value in tensors.items()},
        "numbers": numbers,
        "groups": [[names[p] for p in group["params"]] for group in optimizer.param_groups],
        "extra": dict(extra or {}),
    }
    _together(process_group, lambda: write_manifest(folder, text) if rank == 0 else None)


def load_run(model: nn.Module, optimizer: Any, folder: str | Path, process_group: Any = None) -> dict[str, Any]:
    """Continue the run in `folder`, in as many processes as the group has now; returns its `extra`.

    `model` is adapted as it was then, and `optimizer` is of the same kind, over the same parameters. Attach the
    allocator before or after. Raises AdapterFileError, naming what does not fit, with model and optimizer unchanged.
    """
    folder, optimizer = Path(folder), unwrap(optimizer)
    reshard_(model)
    text = _together(process_group, lambda: read_manifest(folder, *_seat(process_group)))[0]
    own, names = _trained(model), _names(model, optimizer)
    stored = {key: shape for key, (_, *shape) in text["tensors"].items() if key.startswith("model.")}
    wanted = {key: list(value.shape) for key, value in own.items()}
    if stored != wanted or text["groups"] != [[names[p] for p in group["params"]] for group in optimizer.param_groups]:
        differ = sorted(key for key in stored | wanted if stored.get(key) != wanted.get(key)) or [
            "the parameter groups"
        ]
        raise AdapterFileError(
            f"{str(folder)!r} holds the run of another model or optimizer: {differ[0]} differs. Build both as they "
            "were when it was saved."
        )
    check_optimizer(folder, text, [name for group in text["groups"] for name in group], optimizer.param_groups)
    _together(process_group, lambda: check_stored(folder, text))
    parameters = {name: parameter for parameter, name in names.items()}
    room = {key: _room(key, TYPES[dtype], shape, own, parameters) for key, (dtype, *shape) in text["tensors"].items()}
    _together(process_group, lambda: _read(folder, room, process_group))
    with believed(folder, RuntimeError):  # first, as it is what may still refuse
        optimizer.load_state_dict(_optimizer_state(optimizer, names, room | text["numbers"]))
    with torch.no_grad():
        for key, value in own.items():
            local(value).copy_(local(room[key]))
    extra: dict[str, Any] = text["extra"]
    return extra


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters, and the buffers of `modules_to_save`, by name, in their own memory."""
    root = adapter_root(model)
    found = {f"model.{name}": p.detach() for name, p in root.named_parameters() if p.requires_grad}
    for name, module in saved_modules(root, adapter_config(root)):
        found |= {f"model.{name}.{key}": buffer for key, buffer in module.named_buffers()}
    return found


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[Tensor, str]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in adapter_root(model).named_parameters()}
    if any(parameter not in names for group in optimizer.param_groups for parameter in group["params"]):
        raise AdapterFileError(
            "the optimizer trains a parameter that is not one of the model; build it after fully_shard, from "
            "adalora.adapter_parameters(model)."
        )
    return names


def _put(key: str, value: Any, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    if isinstance(value, Tensor):
        tensors[key] = value.detach()
    elif value is None or isinstance(value, bool | int | float | str | list | tuple):
        numbers[key] = value
    else:
        raise AdapterFileError(f"the optimizer's {key!r} is a {type(value).__name__}, which cannot be stored.")


def _room(
    key: str, dtype: torch.dtype, shape: list[int], own: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> Tensor:
    """What to load a tensor into: as its parameter is cut, if it has the parameter's shape."""
    kind, _, name = key.partition(".")
    like = own[key] if kind == "model" else parameters.get(name.rpartition(".")[0]) if kind == "optimizer" else None
    if like is None or list(like.shape) != shape:
        return torch.zeros(shape, dtype=dtype)
    return around(torch.zeros_like(local(like).detach(), dtype=dtype), like)


def _optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], values: Mapping[str, Any]
) -> dict[str, Any]:
    found = optimizer.state_dict()
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in values.items():
        kind, _, rest = key.partition(".")
        name, _, entry = rest.rpartition(".")
        if kind == "optimizer":
            state.setdefault(order.index(name), {})[entry] = value
        elif kind == "group":
            found["param_groups"][int(name)][entry] = value
    return {"state": state, "param_groups": found["param_groups"]}


def _begin(folder: Path) -> None:
    if (folder / MANIFEST).exists():
        raise AdapterFileError(f"{str(folder)!r} holds a run already; give every checkpoint a folder of its own.")
    for torn in folder.glob("shard-*.safetensors"):
        torn.unlink()


def _write_part(folder: Path, tensors: dict[str, Tensor], rank: int, count: int, group: Any) -> dict[str, str]:
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save  # type: ignore[attr-defined]

    writer = HuggingFaceStorageWriter(path=str(folder), save_distributed=True)
    with _one_process_is_meant():
        save(tensors, storage_writer=writer, process_group=group, no_dist=count == 1)
    return {file.name: digest(file) for file in sorted(folder.glob(f"shard-{rank + 1:05d}-*.safetensors"))}


def _read(folder: Path, room: dict[str, Tensor], group: Any) -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load  # type: ignore[attr-defined]

    reader = HuggingFaceStorageReader(path=str(folder))
    with _one_process_is_meant():
        load(room, storage_reader=reader, process_group=group, no_dist=_seat(group)[1] == 1)


@contextmanager
def _one_process_is_meant() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def _seat(group: Any) -> tuple[int, int]:
    """Which process of how many this is."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(group), distributed.get_world_size(group)


def _together(group: Any, action: Callable[[], T]) -> list[T]:
    """The results of `action` in all processes. If it failed in one, every process raises AdapterFileError."""
    outcome: tuple[T | None, str | None]
    try:
        outcome, failure = (action(), None), None
    except Exception as error:
        outcome, failure = (None, str(error) or type(error).__name__), error
    outcomes = [outcome]
    if _seat(group)[1] > 1:
        distributed.all_gather_object(outcomes := [outcome] * _seat(group)[1], outcome, group=group)
    for rank, (_, message) in enumerate(outcomes):
        if message is not None:
            where = f"in process {rank} of {len(outcomes)}: " if len(outcomes) > 1 else ""
            raise AdapterFileError(f"{where}{message}") from failure
    return [result for result, _ in outcomes]  # type: ignore[misc]
