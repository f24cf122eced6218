"""Counting instead of timing: ATen calls, host syncs and bytes of one training step, which do not wobble."""

from __future__ import annotations

import gc
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result, or its shape, the host must know: on a GPU it waits for everything before them.
SYNCING = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount"}
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index"}
ALLOCATING = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
HOST_READS = ("tolist", "numpy")  # methods of a tensor that read it without any operator


class Tracer(TorchDispatchMode):
    """Counts what passes the dispatcher below autograd, by the phase that `phase` names (None: not counted).

    calls: operators that compute or copy; views and bare allocations do neither. A foreach or fused operator is
    one call, whatever it does inside. syncs: reads of a tensor by the host. lists: tensors made of Python
    numbers, each a copy from the host on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase: str | None = None
        self.calls: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.lists: Counter[str] = Counter()

    def enter(self, phase: str | None) -> None:
        """Count under another name from here on."""
        self.phase = phase

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # The profiler's own marks, around every optimizer step, are no work.
        if self.phase is not None and func.namespace != "profiler":
            self.calls[self.phase] += works(func)
            self.syncs[self.phase] += waits(func, args)
            self.lists[self.phase] += func.overloadpacket.__name__ == "lift_fresh"
        return func(*args, **(kwargs or {}))


def works(func: Any) -> bool:
    """Whether an operator touches data. `_unsafe_view` is a view, though its schema does not say so."""
    return not func.is_view and func.overloadpacket.__name__ not in ALLOCATING | {"_unsafe_view"}


def waits(func: Any, args: Sequence[Any]) -> bool:
    """Whether the host waits for an operator's result when the tensors are on a GPU."""
    name = func.overloadpacket.__name__
    if name in SYNCING:
        return True
    if name not in INDEXING:
        return False
    masks = [index for index in args[1] if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)]
    # A mask becomes indices, whose number the host must know, unless one value fills it: that is masked_fill.
    fills = name.startswith("index_put") and args[2].numel() == 1 and not any(args[3:])
    return bool(masks) and not fills


@contextmanager
def tracing() -> Iterator[Tracer]:
    """A tracer that also sees the reads which pass by the dispatcher."""
    tracer = Tracer()
    originals = {name: getattr(Tensor, name) for name in HOST_READS}

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            phase = tracer.phase
            if phase is not None:
                tracer.syncs[phase] += 1
            tracer.enter(None)  # what it does inside is this one read
            try:
                return original(self, *args, **kwargs)
            finally:
                tracer.enter(phase)

        return read

    for name, original in originals.items():
        setattr(Tensor, name, counted(original))
    try:
        with tracer:
            yield tracer
    finally:
        for name in originals:
            delattr(Tensor, name)  # Tensor's base class has them


@contextmanager
def own_update_apart(optimizer: Optimizer, tracer: Tracer) -> Iterator[None]:
    """Count the optimizer's own update as "update", what hooks do before and after it as "bookkeeping".

    One hook runs last of those before the update, the other first of those after it.
    """
    before = optimizer.register_step_pre_hook(lambda *_: tracer.enter("update"))
    after = optimizer.register_step_post_hook(lambda *_: tracer.enter("bookkeeping"))
    hooks: Any = optimizer._optimizer_step_post_hooks  # torch has no public way to be the first
    hooks.move_to_end(after.id, last=False)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def living(device: str) -> list[Tensor]:
    """Every tensor on `device` that Python can reach, whoever holds it."""
    gc.collect()
    # Subclasses such as the compiler's fakes have no memory of their own.
    tensors = [item for item in gc.get_objects() if type(item) in (Tensor, torch.nn.Parameter)]
    return [tensor for tensor in tensors if tensor.device.type == device]


def storages(tensors: Sequence[Tensor]) -> dict[int, int]:
    """Address and bytes of the distinct storages behind tensors: views count once, and with all they hold on to."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def saved_bytes(forward: Callable[[], Tensor], known: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps from `forward` for backward, beside the storages of `known`."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    del loss
    mine = storages(known)
    return sum(size for address, size in storages(kept).items() if address not in mine)


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """The most that `work` holds at once beyond what was there before it, in bytes.

    On the CPU from the allocator's own log in torch's profiler, so that memory inside an operator counts as
    well; what `work` frees of earlier memory does not. On a GPU from the allocator's peak counter.
    """
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: (event["ts"], event["args"]["Ev Idx"])):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
