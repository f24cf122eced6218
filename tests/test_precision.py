"""Precision, recomputed activations, accumulation, compilation, offloading: the same masks and numbers, or a refusal.

What is elsewhere: each layer in 16 bits and under autocast (test_layers, test_functional), the Trainer in bf16 and fp16
(test_transformers), a reentrant checkpoint under DDP with a Trainer (test_peers).
"""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import adalora
import processes
from adalora import AdaLoraConfig, RankAllocator
from adalora.averages import SENSITIVITY, UNCERTAINTY
from adalora.errors import InjectionError, TrainingError
from adalora.injection import named_adapters

STEPS, TARGET = 24, 6
CONFIG = AdaLoraConfig(init_r=4, target_r=2, target_modules=["first", "second", "third"])


class Net(nn.Module):
    """Three adapted layers; the middle one may be recomputed in the backward pass."""

    def __init__(self, recompute: str | None = None) -> None:
        super().__init__()
        self.recompute = recompute
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 8)
        self.third = nn.Linear(8, 4)

    def block(self, x: Tensor) -> Tensor:
        return self.second(x.tanh()).tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.recompute is not None:
            return self.third(checkpoint(self.block, x, use_reentrant=self.recompute == "reentrant"))
        return self.third(self.block(x))


def net(recompute: str | None = None, dtype: torch.dtype = torch.float32, inject: bool = True) -> Net:
    torch.manual_seed(0)
    model = Net(recompute).to(dtype)
    return seeded_inject(model) if inject else model


def seeded_inject(model: Any) -> Any:
    torch.manual_seed(1)
    return adalora.inject(model, CONFIG)


def rows(step: int, count: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(count, 6, generator=generator)
    return x, (x[:, :4] * 2).sin()


def optimizer_of(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(adalora.adapter_parameters(model), lr=2e-2, **options)


def train(
    model: nn.Module,
    call: Callable[[Tensor], Tensor] | None = None,
    autocast: torch.dtype | None = None,
    scaler: Any = None,
    watch: Callable[[int, torch.optim.Optimizer], None] = lambda step, optimizer: None,
) -> tuple[list[float], torch.optim.AdamW]:
    optimizer, losses = optimizer_of(model), []
    RankAllocator(model, total_step=STEPS).attach(optimizer)
    base = next(p.dtype for name, p in model.named_parameters() if name.endswith("weight"))
    for step in range(STEPS):
        x, y = rows(step)
        with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
            loss = ((model if call is None else call)(x.to(base)) - y).float().square().mean()
        (scaler.scale(loss) if scaler else loss).backward()
        scaler.step(optimizer) if scaler else optimizer.step()
        if scaler:
            scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        watch(step, optimizer)
    return losses, optimizer


def masks(model: nn.Module) -> list[list[bool]]:
    return [module.lora_keep.tolist() for _, module in named_adapters(model)]


def values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in adalora.adapter_parameters(model)]


def assert_same(model: nn.Module, other: nn.Module) -> None:
    assert masks(model) == masks(other)
    assert all(torch.equal(one, two) for one, two in zip(values(model), values(other), strict=True))


# --- Precision ----------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "autocast to bf16": {"autocast": torch.bfloat16},
    "autocast to fp16, scaled": {"autocast": torch.float16, "scaler": True},
    "bf16 base": {"dtype": torch.bfloat16},
    "fp16 base, scaled": {"dtype": torch.float16, "scaler": True},
    "bf16 base under autocast": {"dtype": torch.bfloat16, "autocast": torch.bfloat16},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_precision_learns_alike_with_32_bit_adapters_and_averages(way: dict[str, Any]) -> None:
    """Averages are there until the pattern is final."""
    exact, _ = train(net())
    model, seen = net(dtype=way.get("dtype", torch.float32)), []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8) if way.get("scaler") else None

    def watch(step: int, optimizer: torch.optim.Optimizer) -> None:
        states = [optimizer.state[p] for p in adalora.adapter_parameters(model)]
        seen.append({state[key].dtype for state in states for key in (SENSITIVITY, UNCERTAINTY) if key in state})

    losses, _ = train(model, autocast=way.get("autocast"), scaler=scaler, watch=watch)
    assert seen[0] == {torch.float32} and set().union(*seen) == {torch.float32}
    assert {value.dtype for value in values(model)} == {torch.float32}
    assert {module.weight.dtype for _, module in named_adapters(model)} == {way.get("dtype", torch.float32)}
    assert sum(sum(keep) for keep in masks(model)) == TARGET
    assert losses[-1] == pytest.approx(exact[-1], rel=0.05)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_in_the_middle_is_refused_before_anything_moves_and_can_be_taken_back(dtype: torch.dtype) -> None:
    model = net()
    optimizer = optimizer_of(model)
    allocator = RankAllocator(model, total_step=STEPS).attach(optimizer)
    for step in range(5):
        x, y = rows(step)
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moments = {
        p: {k: v.clone() for k, v in state.items() if torch.is_tensor(v)} for p, state in optimizer.state.items()
    }
    model.to(dtype)
    weights = [value.clone() for value in values(model)]
    x, y = rows(5)
    (model(x.to(dtype)) - y.to(dtype)).square().mean().backward()
    with pytest.raises(TrainingError, match="importance is lost in 16 bits"):
        optimizer.step()
    assert all(torch.equal(one, two) for one, two in zip(values(model), weights, strict=True))
    for parameter, state in moments.items():
        assert all(torch.equal(optimizer.state[parameter][key], value) for key, value in state.items())
    assert allocator.step == 5

    model.float()
    optimizer.zero_grad()
    for step in range(5, STEPS):
        x, y = rows(step)
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (allocator.step, sum(sum(keep) for keep in masks(model))) == (STEPS, TARGET)


# --- Recomputed activations, accumulation -------------------------------------------------------------------


@pytest.mark.parametrize("recompute", ["reentrant", "not reentrant"])
def test_recomputed_activations_give_the_same_run_bit_for_bit(recompute: str) -> None:
    exact, model = net(), net(recompute)
    train(exact)
    train(model)
    assert_same(model, exact)


def test_eight_micro_batches_are_one_batch() -> None:
    """In fp64, so that only the order of a sum differs."""
    runs = []
    for pieces in (1, 8):
        model = net(dtype=torch.float64)
        optimizer = optimizer_of(model)
        allocator = RankAllocator(model, total_step=STEPS).attach(optimizer)
        for step in range(STEPS):
            x, y = (part.double() for part in rows(step))
            for part, wanted in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
                ((model(part) - wanted).square().mean() / pieces).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert allocator.step == STEPS
        runs.append(model)
    assert masks(runs[0]) == masks(runs[1])
    gaps = [float((a - b).abs().max()) for a, b in zip(values(runs[0]), values(runs[1]), strict=True)]
    assert max(gaps) < 1e-12


@pytest.mark.slow
def test_two_processes_recompute_to_the_same_bits(tmp_path: Path) -> None:
    """DistributedDataParallel on gloo: no checkpoint, reentrant, not reentrant; and one process with both halves."""
    processes.run_script(__file__, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = net()
    train(alone)
    for recompute in ("none", "reentrant", "not reentrant"):
        for report in (first, second):
            assert report[recompute]["masks"] == first["none"]["masks"] == masks(alone)
            for one, two in zip(report[recompute]["values"], first["none"]["values"], strict=True):
                assert torch.equal(one, two)
    gaps = [float((a - b).abs().max()) for a, b in zip(first["none"]["values"], values(alone), strict=True)]
    assert max(gaps) < 1e-5


def worker(rank: int, folder: Path) -> None:
    """One of two processes: half of each batch."""
    report = {}
    for recompute in (None, "reentrant", "not reentrant"):
        model = net(recompute)
        wrapped = DistributedDataParallel(model)
        optimizer = optimizer_of(model)
        RankAllocator(model, total_step=STEPS).attach(optimizer)
        for step in range(STEPS):
            x, y = (part.chunk(2)[rank] for part in rows(step))
            (wrapped(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        report[recompute or "none"] = {"masks": masks(model), "values": values(model)}
    torch.save(report, folder / f"{rank}.pt")


# --- Compilation --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def compiler() -> Iterator[Any]:
    """Counters of torch's compiler, empty, and its own warnings on this Python ignored."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield counters
    torch._dynamo.reset()


ORDERS = ("compiled after", "compiled before", "called before", "in place", "into the compiled")


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_a_compiled_model_trains_to_the_same_bits_and_is_compiled_once(order: str) -> None:
    """24 steps through warm-up, reduction and the final phase: one graph, no break, no recompilation."""
    exact = net()
    train(exact)
    with compiler() as counters:
        model: Any = net(inject=False)
        if order in ("compiled after", "in place"):
            seeded_inject(model)
        compiled: Any = model
        if order == "in place":
            model.compile(backend="aot_eager")
        else:
            compiled = torch.compile(model, backend="aot_eager")
        if order == "called before":  # the old graph must not be taken for the new layers
            compiled(rows(0)[0])
            counters.clear()
        if order in ("compiled before", "called before", "into the compiled"):
            seeded_inject(compiled if order == "into the compiled" else model)
        seen: list[int] = []
        train(model, compiled, watch=lambda *_: seen.append(counters["stats"]["unique_graphs"]))
        assert seen == [1] * STEPS
        assert sum(counters["graph_break"].values()) == 0
        assert sum(counters["recompiles"].values()) == 0
    assert_same(model, exact)


@pytest.mark.slow
def test_an_adapter_of_a_compiled_model_goes_into_files_by_the_names_of_the_model(tmp_path: Path) -> None:
    with compiler():
        compiled: Any = torch.compile(net(inject=False), backend="aot_eager")
        assert seeded_inject(compiled) is compiled
        train(compiled, compiled)
        assert adalora.save_adapter(compiled, tmp_path) == 0.0
        x, _ = rows(0)
        with torch.no_grad():
            plain = adalora.load_adapter(net(inject=False), tmp_path)(x)
            again: Any = torch.compile(net(inject=False), backend="aot_eager")
            assert adalora.load_adapter(again, tmp_path) is again
            for found in (plain, again(x)):
                torch.testing.assert_close(found, compiled(x), rtol=1e-5, atol=1e-6)


# --- Offloading ---------------------------------------------------------------------------------------------


def offload_base(model: nn.Module) -> list[int]:
    """Base weights stay elsewhere and come for each forward pass only; returns where arrivals are counted."""
    arrivals: list[int] = []
    for _, module in named_adapters(model):
        store = {name: module._parameters[name].detach().clone() for name in ("weight", "bias")}  # type: ignore[union-attr]
        away = {name: nn.Parameter(value.to("meta"), requires_grad=False) for name, value in store.items()}
        module._parameters.update(away)

        def come(module: nn.Module, _: Any, store: dict[str, Tensor] = store) -> None:
            arrivals.append(1)
            module._parameters.update({n: nn.Parameter(v.clone(), requires_grad=False) for n, v in store.items()})

        def go(module: nn.Module, _: Any, __: Any, away: dict[str, nn.Parameter] = away) -> None:
            module._parameters.update(away)

        module.register_forward_pre_hook(come)
        module.register_forward_hook(go)
    return arrivals


@pytest.mark.parametrize("recompute", [None, "reentrant", "not reentrant"])
def test_a_base_that_comes_for_each_forward_only_gives_the_same_run(recompute: str | None) -> None:
    exact, model = net(), net(recompute)
    train(exact)
    arrivals = offload_base(model)
    assert all(module.weight.is_meta for _, module in named_adapters(model))
    train(model)
    assert all(module.weight.is_meta for _, module in named_adapters(model))
    assert len(arrivals) == STEPS * (3 if recompute is None else 4)
    assert_same(model, exact)


def test_a_model_that_accelerate_moves_as_a_whole_gives_the_same_run() -> None:
    accelerate = pytest.importorskip("accelerate")
    exact, model = net(), net()
    train(exact)
    model, _ = accelerate.cpu_offload_with_hook(model, execution_device="cpu")
    train(model)
    assert_same(model, exact)


def test_offloading_by_accelerate_is_refused_where_it_would_take_the_adapter_along() -> None:
    """Its hooks put new parameters into a layer in each forward: the optimizer would train the old ones."""
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(net(inject=False), execution_device="cpu")
    with pytest.raises(InjectionError, match="accelerate offloads it, and would take the adapter along"):
        adalora.inject(model, CONFIG)

    model = accelerate.cpu_offload(net(), execution_device="cpu")
    with pytest.raises(TrainingError, match=r"on the meta device.* offloads it"):
        RankAllocator(model, total_step=STEPS).attach(optimizer_of(model))

    model = net()
    optimizer = optimizer_of(model)
    RankAllocator(model, total_step=STEPS).attach(optimizer)
    before = [value.clone() for value in values(model)]
    accelerate.cpu_offload(model, execution_device="cpu")
    model(rows(0)[0]).sum().backward()
    with pytest.raises(TrainingError, match=r"on the meta device.* offloads it"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(optimizer.param_groups[0]["params"], before, strict=True))


if __name__ == "__main__":
    sys.exit(processes.forked(worker, Path(sys.argv[1]), 2))
