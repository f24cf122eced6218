"""Processes forked from one interpreter, so that torch is imported once: for a test file's own `worker`, and here

four that train one small model in every parallel way; `python processes.py FOLDER`. Runs on two processes happen twice,
on 0 and 1 and on 2 and 3, at the same time. What each process saw stands in FOLDER/<name>.<rank>.json.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import adalora
from adalora.errors import AdaLoraError
from adalora.injection import named_adapters
from adalora.runfolder import load_run, save_run
from adalora.sharding import is_sharded, local, whole

WORLD, STEPS, ROWS, VOCABULARY = 4, 16, 8, 11
SCHEDULE: dict[str, Any] = {"tinit": 2, "tfinal": 4, "deltaT": 2, "total_step": STEPS}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(10, 14), nn.Linear(14, 10)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


class Net(nn.Module):
    """Five adapted matrices of rank 3, which neither 2 nor 4 divides, a head, and a branch that may stay unused."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 10)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(10, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).mean(1)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Branched(Net):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(10, 10)


def adapted(kind: type[Net] = Net, **settings: Any) -> Net:
    torch.manual_seed(3)
    config = {
        "init_r": 3,
        "target_r": 1,
        "target_modules": ".*(embed|up|down|unused)",
        "modules_to_save": ["head"],
    }
    model = adalora.inject(kind(), adalora.AdaLoraConfig(**config | SCHEDULE | settings))
    with torch.no_grad():  # steep enough that no two scores are nearly equal
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(VOCABULARY, (ROWS, 4), generator=generator)
    return ids, ids.sum(1) % 3


class Run:
    """A model in training by process `rank` of `count`, which takes its share of each batch."""

    def __init__(self, model: nn.Module, rank: int = 0, count: int = 1, optimizer: Any = None) -> None:
        self.model, self.rank, self.count = model, rank, count
        self.optimizer = optimizer or torch.optim.AdamW(adalora.adapter_parameters(model), lr=0.03, foreach=True)
        self.allocator = adalora.RankAllocator(model).attach(self.optimizer)
        self.masks: list[dict[str, list[bool]]] = []
        self.allocator.on_allocate.append(self._hear)

    def _hear(self, step: int, budget: int, keeps: Any) -> None:
        self.masks.append({name: keep.tolist() for name, keep in keeps.items()})

    def train(self, steps: range = range(STEPS), micro: int = 1, factor: float = 4.0, spoil: int = -1) -> Run:
        for step in steps:
            ids, labels = (part.chunk(self.count)[self.rank] for part in batch(step))
            for index, (x, y) in enumerate(zip(ids.chunk(micro), labels.chunk(micro), strict=True)):
                last = index == micro - 1
                quiet = self.model.no_sync() if hasattr(self.model, "no_sync") and not last else nullcontext()
                with quiet:
                    loss = nn.functional.cross_entropy(self.model(x) * factor, y) / micro
                    loss.backward()
            if step == spoil and self.rank == 0:  # one entry of one process
                module = next(module for _, module in named_adapters(self.model))
                local(module.lora_E.grad).view(-1)[0] = float("nan")
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def report(self) -> dict[str, Any]:
        allocator = self.allocator
        return {
            "masks": self.masks,
            "factors": {
                f"{name}.{key}": whole(getattr(module, key)).tolist()
                for name, module in named_adapters(self.allocator.root)
                for key in ("lora_A", "lora_E", "lora_B")
            },
            "head": [whole(p).tolist() for n, p in self.allocator.root.named_parameters() if "head." in n],
            "skipped": allocator.skipped_steps,
            "live": allocator.live,
            "step": allocator.step,
        }


def bytes_held(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of this process, counted: parameters, and what the optimizer holds for those that train."""
    parameters = list(model.parameters())
    entries = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return {
        "frozen": sum(local(p).nbytes for p in parameters if not p.requires_grad),
        "trained": sum(local(p).nbytes for p in parameters if p.requires_grad),
        "state": sum(local(value).detach().nbytes for value in entries if value.dim()),
    }


def sharded(model: nn.Module, mesh: DeviceMesh, long_side: bool = False, **choices: Any) -> nn.Module:
    """`model` under FSDP2, block by block; `long_side` cuts A along its columns."""

    def placement(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if parameter.shape in ((3, 10), (3, 14)) and not parameter.shape[1] % mesh.size() else None

    choices |= {"mesh": mesh} | ({"shard_placement_fn": placement} if long_side else {})
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, **choices)
    return fully_shard(model, **choices)


def penalty_alone(run: Run) -> list[float]:
    """Norm of what a step with a gradient of zero finds in lora_A and lora_B: the regularizer's."""
    found = []

    def look(*_: Any) -> None:
        for _, module in named_adapters(run.model):
            found.extend(float(whole(factor.grad).norm()) for factor in (module.lora_A, module.lora_B))

    handle = run.optimizer.register_step_pre_hook(look)
    run.train(range(1), factor=0.0)
    handle.remove()
    return found


# --- What the processes do ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Here:
    """This process: its number among four, the pair it belongs to, and where it writes."""

    rank: int
    folder: Path
    pair: Any
    of_pair: int
    four: DeviceMesh
    two: DeviceMesh


CHECKS: dict[str, Callable[[Here], Any]] = {}


def check(function: Callable[[Here], Any]) -> Callable[[Here], Any]:
    CHECKS[function.__name__] = function
    return function


def ddp(model: nn.Module, group: Any = None, **choices: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model, process_group=group, **choices)


@check
def ddp_4(here: Here) -> Any:
    return Run(ddp(adapted()), here.rank, WORLD).train().report()


@check
def ddp_2_accumulating(here: Here) -> Any:
    return Run(ddp(adapted(), here.pair), here.of_pair, 2).train(micro=2).report()


@check
def ddp_4_with_an_unused_branch(here: Here) -> Any:
    return Run(ddp(adapted(Branched), find_unused_parameters=True), here.rank, WORLD).train().report()


@check
def penalty(here: Here) -> Any:
    return {
        "ddp 4": penalty_alone(Run(ddp(adapted()), here.rank, WORLD)),
        "fsdp 4": penalty_alone(Run(sharded(adapted(), here.four), here.rank, WORLD)),
        "fsdp 2": penalty_alone(Run(sharded(adapted(), here.two, long_side=True), here.of_pair, 2)),
        "fsdp 4 squared": penalty_alone(Run(sharded(adapted(orth_reg_form="squared"), here.four), here.rank, WORLD)),
    }


@check
def fsdp_4(here: Here) -> Any:
    model = sharded(adapted(), here.four)
    run = Run(model, here.rank, WORLD).train(range(8))
    held = bytes_held(model, run.optimizer)
    run.train(range(8, STEPS))
    with torch.no_grad():
        model(batch(0)[0])  # leaves the root's parameters whole
    run.allocator.finalize()
    difference = adalora.save_adapter(model, here.folder / "adapter")
    adalora.export_lora(model, here.folder / "lora")
    penalty = float(adalora.orthogonality_penalty(model))
    return run.report() | {"bytes": held, "difference": difference, "penalty": penalty}


@check
def fsdp_2(here: Here) -> Any:
    return Run(sharded(adapted(), here.two, long_side=True), here.of_pair, 2).train().report()


@check
def fsdp_2_fisher(here: Here) -> Any:
    return Run(sharded(adapted(importance="fisher"), here.two), here.of_pair, 2).train().report()


@check
def fsdp_2_magnitude(here: Here) -> Any:
    return Run(sharded(adapted(importance="magnitude"), here.two), here.of_pair, 2).train().report()


@check
def fsdp_with_replicas(here: Here) -> Any:
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("replicas", "shards"))
    model = sharded(adapted(), mesh)
    run = Run(model, here.rank, WORLD).train()
    adalora.save_adapter(model, here.folder / "replicated")
    return run.report()


@check
def fsdp_4_with_a_fault_in_one_shard(here: Here) -> Any:
    run = Run(sharded(adapted(), here.four), here.rank, WORLD).train(range(7))
    before = [local(value).detach().clone() for value in averages(run)]
    run.train(range(7, 8), spoil=7)
    after = [local(value).detach() for value in averages(run)]
    return {
        "averages": len(before),
        "kept": all(torch.equal(a, b) for a, b in zip(before, after, strict=True)),
        "skipped": run.allocator.skipped_steps,
        "next allocation": said(lambda: run.train(range(8, 9))),  # Adam has spoiled a λ of one process
    }


def averages(run: Run) -> Iterator[Tensor]:
    for state in run.optimizer.state.values():
        yield from (value for key, value in state.items() if key.startswith("adalora"))


@check
def resuming(here: Here) -> Any:
    """Saved by four processes in the reduction; continued by four, by two, and (in the test) by one."""
    folder = here.folder / "run"
    run = Run(sharded(adapted(), here.four), here.rank, WORLD).train(range(9))
    save_run(run.model, run.optimizer, folder, {"step": 9})
    whole_run = run.train(range(9, STEPS)).report()
    again = Run(sharded(adapted(), here.four), here.rank, WORLD)
    extra = load_run(again.model, again.optimizer, folder)
    four = again.train(range(extra["step"], STEPS)).report()
    fewer = Run(sharded(adapted(), here.two), here.of_pair, 2)
    load_run(fewer.model, fewer.optimizer, folder, here.pair)
    two = fewer.train(range(9, STEPS)).report()
    other = Run(sharded(adapted(target_modules=["up", "down"]), here.four), here.rank, WORLD)
    return {
        "same masks": whole_run["masks"][len(whole_run["masks"]) - len(four["masks"]) :]
        == four["masks"]
        == two["masks"],
        "same bits": whole_run["factors"] == four["factors"] and whole_run["head"] == four["head"],
        "two": two,
        "twice": said(lambda: save_run(run.model, run.optimizer, folder)),
        "other": said(lambda: load_run(other.model, other.optimizer, folder)),
    }


@check
def resuming_with_torchs_own_functions(here: Here) -> Any:
    """What a loop that knows only of torch.distributed.checkpoint does, before and after the pattern is final."""
    same: dict[Any, Any] = {}
    fresh = Run(sharded(adapted(), here.four), here.rank, WORLD)
    get_state_dict(fresh.model, fresh.optimizer)  # takes a step of its own
    same["steps counted by a look"] = fresh.allocator.step
    for group in fresh.optimizer.param_groups:
        group["lr"] = 0.0
    fresh.optimizer.state.clear()
    fresh.train(range(1))  # the first step of a warm-up, where some processes hold nothing but zeros
    same["steps counted of a warm-up"] = fresh.allocator.step
    for step in (9, 13):
        run = Run(sharded(adapted(), here.four), here.rank, WORLD).train(range(step))
        parts = dict(zip(("model", "optimizer"), get_state_dict(run.model, run.optimizer), strict=True))
        dcp.save(parts, checkpoint_id=here.folder / f"torch-{step}")
        report = run.train(range(step, STEPS)).report()
        again = Run(sharded(adapted(), here.four), here.rank, WORLD)
        parts = dict(zip(("model", "optimizer"), get_state_dict(again.model, again.optimizer), strict=True))
        dcp.load(parts, checkpoint_id=here.folder / f"torch-{step}")
        set_state_dict(
            again.model, again.optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"]
        )
        later = again.train(range(step, STEPS)).report()
        same[step] = [later[key] == report[key] for key in ("factors", "live", "step")]
    return same


@check
def refusals(here: Here) -> Any:
    model = sharded(adapted(), here.four)
    optimizer = torch.optim.AdamW(adalora.adapter_parameters(model))
    bare = Net()
    for block in bare.blocks:
        fully_shard(block, mesh=here.four)
    first = FullyShardedDataParallel(adapted(), device_id=torch.device("cpu"), use_orig_params=True)
    refactored = sharded(adapted(refactor=True), here.four)
    return {
        "merge": said(lambda: adalora.merge(model)),
        "eject": said(lambda: adalora.eject(model)),
        "export_merged": said(lambda: adalora.export_merged(model, here.folder / "merged")),
        "inject": said(lambda: adalora.inject(bare, adalora.AdaLoraConfig())),
        "first version": said(lambda: adalora.RankAllocator(first)),
        "flattened": said(lambda: adalora.RankAllocator(first.module).attach(flat_optimizer(first))),
        "refactor": said(lambda: Run(refactored, here.rank, WORLD)),
        "compact": said(lambda: compacted(here)),
        "unwritable": said(lambda: adalora.save_adapter(model, "/proc/nowhere", warn=False)),
        "stale": said(lambda: stale(here)),
        "of processes": distributed.get_world_size(),
        "untouched": is_sharded(next(p for group in optimizer.param_groups for p in group["params"])),
    }


def flat_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])


def compacted(here: Here) -> None:
    run = Run(sharded(adapted(), here.four), here.rank, WORLD).train()
    run.allocator.compact()


def stale(here: Here) -> None:
    """The optimizer was made before the model was sharded."""
    model = adapted()
    optimizer = torch.optim.AdamW(adalora.adapter_parameters(model))
    adalora.RankAllocator(sharded(model, here.four)).attach(optimizer)


@check
def accelerated(here: Here) -> Any:
    """FSDP2 as accelerate prepares it. It takes CPUs for DDP only, so it is told that it does FSDP."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
    )
    reports = []
    for resume in (False, True):
        accelerator = Accelerator(cpu=True)
        accelerator.state.fsdp_plugin = plugin
        for state in (accelerator.state, PartialState()):
            state.distributed_type = DistributedType.FSDP
        model = adapted()
        optimizer = torch.optim.AdamW(adalora.adapter_parameters(model), lr=0.03, foreach=True)
        model, optimizer = accelerator.prepare(model, optimizer)
        run = Run(model, here.rank, WORLD, optimizer)
        if resume:
            accelerator.load_state(str(here.folder / "accelerated"))
            run.train(range(9, STEPS))
        else:
            run.train(range(9))
            accelerator.save_state(str(here.folder / "accelerated"))
            run.train(range(9, STEPS))
            adalora.save_adapter(accelerator.unwrap_model(model), here.folder / "from accelerate")
        reports.append(run.report() | {"sharded": [is_sharded(p) for p in adalora.adapter_parameters(model)]})
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return reports


def said(action: Callable[[], Any]) -> str:
    """The message of the error that an action raises."""
    try:
        action()
    except AdaLoraError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


# --- Starting them ------------------------------------------------------------------------------------------


def run_script(script: str, folder: Path) -> None:
    """`script`, a file whose last lines call `forked`, in an interpreter of its own; raises what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def forked(worker: Callable[[int, Path], None], folder: Path, count: int) -> int:
    """`worker(rank, folder)` in `count` processes of one gloo group; returns the highest exit code."""
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29777"}
    import torch._dynamo  # noqa: F401  # what DDP imports when it is first used, once instead of in each process

    gc.freeze()  # what was imported is no garbage of any process
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=_process, args=(worker, rank, folder, count)) for rank in range(count)]
    for one in started:
        one.start()
    while any(one.is_alive() for one in started):
        sleep(0.02)
        if any(one.exitcode for one in started):  # the others would wait for it
            for one in started:
                one.kill()
    return max(abs(one.exitcode or 0) for one in started)


def _process(worker: Callable[[int, Path], None], rank: int, folder: Path, count: int) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    worker(rank, folder)
    distributed.destroy_process_group()


def all_checks(rank: int, folder: Path, names: list[str]) -> None:
    pairs = [distributed.new_group([0, 1]), distributed.new_group([2, 3])]
    pair = rank // 2
    two = DeviceMesh.from_group(pairs[pair], "cpu")
    here = Here(rank, folder, pairs[pair], rank % 2, DeviceMesh("cpu", list(range(WORLD))), two)
    for name in names or CHECKS:
        begun = perf_counter()
        found = CHECKS[name](here)
        print(name, f"{perf_counter() - begun:.1f} s", file=sys.stderr)
        (folder / f"{name}.{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    import accelerate  # noqa: F401  # once, too

    sys.exit(forked(partial(all_checks, names=sys.argv[2:]), Path(sys.argv[1]), WORLD))
