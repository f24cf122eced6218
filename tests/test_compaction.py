"""Compaction frees pruned triplets everywhere at once, or changes nothing."""

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adalora import eject, merge, unmerge
from adalora.compaction import compact_
from adalora.errors import TrainingError
from adalora.injection import adapter_parameters, named_adapters
from adalora.layers import SVDAdapter
from tiny import TOKENS, adapted, assert_unchanged, gpt2, net, pair, snapshot

FACTORS = {"lora_A": 0, "lora_E": 0, "lora_B": 1}

# Every torch optimizer that takes dense gradients: options, and the state that has an entry per parameter entry.
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], set[str]]] = {
    "asgd": (torch.optim.ASGD, {}, {"ax"}),
    "adadelta": (torch.optim.Adadelta, {}, {"square_avg", "acc_delta"}),
    "adafactor": (torch.optim.Adafactor, {}, set()),
    "adagrad": (torch.optim.Adagrad, {}, {"sum"}),
    "adagrad fused": (torch.optim.Adagrad, {"fused": True}, {"sum"}),
    "adam": (torch.optim.Adam, {}, {"exp_avg", "exp_avg_sq"}),
    "adam amsgrad": (torch.optim.Adam, {"amsgrad": True}, {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}, {"exp_avg", "exp_avg_sq"}),
    "adamw foreach": (torch.optim.AdamW, {"foreach": True}, {"exp_avg", "exp_avg_sq"}),
    "adamw fused": (torch.optim.AdamW, {"fused": True}, {"exp_avg", "exp_avg_sq"}),
    "adamax": (torch.optim.Adamax, {}, {"exp_avg", "exp_inf"}),
    "nadam": (torch.optim.NAdam, {}, {"exp_avg", "exp_avg_sq"}),
    "radam": (torch.optim.RAdam, {}, {"exp_avg", "exp_avg_sq"}),
    "rmsprop": (torch.optim.RMSprop, {}, {"square_avg"}),
    "rmsprop full": (
        torch.optim.RMSprop,
        {"centered": True, "momentum": 0.5},  # with 0.9 the run is unstable: it magnifies rounding, compacted or not
        {"square_avg", "grad_avg", "momentum_buffer"},
    ),
    "rprop": (torch.optim.Rprop, {}, {"prev", "step_size"}),
    "sgd": (torch.optim.SGD, {}, set()),
    "sgd momentum": (torch.optim.SGD, {"momentum": 0.9}, {"momentum_buffer"}),
    "sgd fused": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "fused": True}, {"momentum_buffer"}),
}
if hasattr(torch.optim, "Muon"):  # since torch 2.9
    OPTIMIZERS["muon"] = (torch.optim.Muon, {}, {"momentum_buffer"})
MIXING = {"adafactor", "muon"}  # the update of one entry depends on the others


def make(name: str, parameters: Any) -> torch.optim.Optimizer:
    cls, options, _ = OPTIMIZERS[name]
    return cls(parameters, lr=1e-2, **options)


def adapters(model: nn.Module) -> dict[str, SVDAdapter]:
    return dict(named_adapters(model))


def factors(model: nn.Module) -> Iterator[tuple[SVDAdapter, str, nn.Parameter]]:
    for module in adapters(model).values():
        for key in FACTORS:
            yield module, key, getattr(module, key)


def batches(count: int, width: int = 6, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(8, width, generator=generator).double(), torch.randn(8, 4, generator=generator).double())
        for _ in range(count)
    ]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]]) -> None:
    """Steps in which pruned triplets stay pruned."""
    for x, y in data:
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        mask(model)


def mask(model: nn.Module) -> None:
    with torch.no_grad():
        for module in adapters(model).values():
            module.lora_E.masked_fill_(~module.lora_keep.view(-1, 1), 0.0)


def prune(model: nn.Module, ranks: list[int]) -> None:
    """Leave every module the rank in turn; the survivors are neither the first nor in one piece."""
    for module, rank in zip(adapters(model).values(), ranks, strict=True):
        module.lora_keep[torch.tensor([1, 3, 0, 2])[rank:]] = False
    mask(model)


def trained_pair(optimizer: str = "adamw", ranks: tuple[int, int] = (2, 3)) -> tuple[nn.Module, torch.optim.Optimizer]:
    """fp64, capacity 4, five steps with every triplet alive, then pruned; gradients are still there."""
    model = adapted(pair().double(), [4], target_modules=["first", "second"])
    chosen = make(optimizer, adapter_parameters(model))
    train(model, chosen, batches(5))
    prune(model, list(ranks))
    return model, chosen


def twin_of(name: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A copy of the run, its optimizer made anew and loaded."""
    optimizer.load_state_dict(optimizer.state_dict())  # casts NAdam's mu_product to fp64, which any loading does
    twin = copy.deepcopy(model)
    fresh = make(name, adapter_parameters(twin))
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # without the copy both would count one `step`
    return twin, fresh


def elements(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Numbers held in adapter parameters, gradients and optimizer state."""
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    gradients = [p.grad for _, _, p in factors(model) if p.grad is not None]
    return sum(t.numel() for t in [*(p for _, _, p in factors(model)), *gradients, *state])


# What becomes of the model


def test_the_function_of_every_layer_stays() -> None:
    model = adapted(net().double(), [2, 1, 3, 0, 2], target_modules=["embed", "conv", "grouped", "line", "linear"])
    optimizer = make("adamw", adapter_parameters(model))
    before, deltas = model(TOKENS), {name: module.delta_weight() for name, module in adapters(model).items()}
    assert compact_(adapters(model), optimizer) == 20 - 8
    assert [module.capacity for module in adapters(model).values()] == [2, 1, 3, 0, 2]
    assert (model(TOKENS) - before).abs().max() <= 1e-15
    for name, module in adapters(model).items():
        assert (module.delta_weight() - deltas[name]).abs().max() <= 1e-15


def test_at_rank_0_every_kind_of_layer_is_its_base() -> None:
    layers = ["embed", "conv", "grouped", "line", "linear"]
    model = adapted(net().double(), [0, 0, 0, 0, 0, 2], target_modules=[*layers, "head"])
    optimizer = make("adamw", adapter_parameters(model))
    assert compact_(adapters(model), optimizer) == 5 * 4 + 2
    inputs: list[Tensor] = []
    for one in (model, net().double()):
        one.head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        one(TOKENS).sum()
    assert torch.equal(*inputs)
    model(TOKENS).sum().backward()
    optimizer.step()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert trained == ["head.lora_A", "head.lora_E", "head.lora_B"]
    assert [model.get_submodule(layer).delta_weight().count_nonzero() for layer in layers] == [0] * 5


def test_the_function_of_transformers_conv1d_stays() -> None:
    pytest.importorskip("transformers")
    model = adapted(gpt2().double(), [1, 3], target_modules=["c_attn"])
    before = model(TOKENS).logits
    assert compact_(adapters(model), make("adamw", adapter_parameters(model))) == 4
    assert (model(TOKENS).logits - before).abs().max() <= 1e-14


def test_parameters_are_the_live_slices_and_everything_about_them_stays() -> None:
    model, optimizer = trained_pair()
    first = adapters(model)["first"]
    first.lora_A.requires_grad_(False)
    first.lora_A.tag = "kept"
    wanted = {
        (name, key): getattr(module, key).detach().index_select(dim, module.lora_keep.nonzero().view(-1))
        for name, module in adapters(model).items()
        for key, dim in FACTORS.items()
    }
    scaling = first.scaling
    keys, trains = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    assert compact_(adapters(model), optimizer) == 3
    assert [key for key in model.state_dict() if not key.endswith("lora_scaling")] == keys
    assert [p.requires_grad for p in model.parameters()] == trains
    assert first.lora_A.tag == "kept"
    for (name, key), value in wanted.items():
        parameter = getattr(adapters(model)[name], key)
        assert type(parameter) is nn.Parameter
        assert parameter.is_leaf and parameter.is_contiguous() and parameter.dtype == torch.float64
        assert torch.equal(parameter, value)
    assert [(m.lora_keep.tolist(), m.rank, m.scaling) for m in adapters(model).values()] == [
        ([True] * 2, 2, scaling),
        ([True] * 3, 3, scaling),
    ]


def test_gradients_shrink_too() -> None:
    model, optimizer = trained_pair(ranks=(2, 0))
    first, second = adapters(model).values()
    wanted = [first.lora_A.grad[first.lora_keep], first.lora_E.grad[first.lora_keep]]
    wanted.append(first.lora_B.grad[:, first.lora_keep])
    compact_(adapters(model), optimizer)
    for parameter, gradient in zip((first.lora_A, first.lora_E, first.lora_B), wanted, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert [p.grad for p in (second.lora_A, second.lora_E, second.lora_B)] == [None] * 3


def test_modules_without_pruned_triplets_are_left_alone() -> None:
    model, optimizer = trained_pair(ranks=(4, 1))
    first, second = adapters(model).values()
    state = {p: optimizer.state[p] for p in (first.lora_A, first.lora_E, first.lora_B)}
    keep, old = first.lora_keep, second.lora_A
    assert compact_(adapters(model), optimizer) == 3
    assert first.lora_keep is keep and second.lora_A is not old
    for key, parameter in zip(FACTORS, state, strict=True):
        assert getattr(first, key) is parameter and optimizer.state[parameter] is state[parameter]
    assert compact_(adapters(model), optimizer) == 0


def test_a_merged_model_is_compacted_and_unmerged_to_its_own_weights() -> None:
    model, optimizer = trained_pair()
    weight, x = model.first.weight.clone(), batches(1)[0][0]
    merge(model)
    before = model(x)
    compact_(adapters(model), optimizer)
    assert torch.equal(model(x), before)
    unmerge(model)
    assert torch.equal(model.first.weight, weight)
    assert (model(x) - before).abs().max() <= 1e-14


def test_a_compacted_model_is_copied_saved_and_ejected_like_any_other() -> None:
    model, optimizer = trained_pair(ranks=(2, 0))
    x = batches(1)[0][0]
    compact_(adapters(model), optimizer)
    assert "first.lora_keep" not in model.state_dict()
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    missing = copy.deepcopy(model).load_state_dict(model.state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys
    assert torch.equal(eject(model)(x), pair().double()(x))


def test_modules_may_share_parameters_whose_masks_agree() -> None:
    model, optimizer = trained_pair(ranks=(2, 2))
    first, second = adapters(model).values()
    second.lora_E = first.lora_E
    assert compact_(adapters(model), optimizer) == 4
    assert second.lora_E is first.lora_E and first.lora_E.shape == (2, 1)
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert ids.count(id(first.lora_E)) == 1


def test_a_module_in_two_places_is_freed_once() -> None:
    shared = nn.Linear(5, 5)
    model = adapted(nn.Sequential(shared, nn.Tanh(), shared).double(), [1], target_modules=["0"])
    before = model(torch.ones(1, 5).double())
    optimizer = make("adamw", adapter_parameters(model))
    module = model[0]
    assert compact_({"0": module, "2": module}, optimizer) == 3
    assert model[2].lora_A.shape == (1, 5)
    assert (model(torch.ones(1, 5).double()) - before).abs().max() <= 1e-15


# What becomes of the optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_cut_along_the_triplets_and_nothing_else_of_it_changes(name: str) -> None:
    model, optimizer = trained_pair(name)
    old = {(name, key): p for name, m in adapters(model).items() for key in FACTORS for p in [getattr(m, key)]}
    keeps = {name: module.lora_keep.nonzero().view(-1) for name, module in adapters(model).items()}
    states = {place: dict(optimizer.state.get(p, {})) for place, p in old.items()}
    compact_(adapters(model), optimizer)
    assert not any(p in optimizer.state for p in old.values())
    for (module, key), state in states.items():
        now = optimizer.state.get(getattr(adapters(model)[module], key), {})
        assert list(now) == list(state)
        sliced = OPTIMIZERS[name][2] | ({"row_var"} if key != "lora_B" else {"col_var"})
        assert OPTIMIZERS[name][2] <= set(state)
        for entry, value in state.items():
            if entry in sliced:
                assert torch.equal(now[entry], value.index_select(FACTORS[key], keeps[module]))
                assert now[entry].shape[FACTORS[key]] == keeps[module].numel()
            else:
                assert now[entry] is value


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - MIXING))
def test_a_compacted_run_is_the_masked_run_in_its_live_entries(name: str) -> None:
    model, optimizer = trained_pair(name)
    masked, masked_optimizer = twin_of(name, model, optimizer)
    compact_(adapters(model), optimizer)
    data = batches(50, seed=2)
    start = model.first.lora_E.detach().clone()
    train(model, optimizer, data)
    train(masked, masked_optimizer, data)
    assert (model.first.lora_E - start).abs().max() > 1e-4  # it did train
    for module, twin in zip(adapters(model).values(), adapters(masked).values(), strict=True):
        assert (module.lora_A - twin.lora_A[twin.lora_keep]).abs().max() <= 1e-12
        assert (module.lora_E - twin.lora_E[twin.lora_keep]).abs().max() <= 1e-12
        assert (module.lora_B - twin.lora_B[:, twin.lora_keep]).abs().max() <= 1e-12


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_goes_into_a_fresh_optimizer_and_continues_bit_exactly(name: str) -> None:
    model, optimizer = trained_pair(name, (3, 0))
    compact_(adapters(model), optimizer)
    twin, fresh = twin_of(name, model, optimizer)
    for step in range(2):
        train(model, optimizer, batches(5, seed=3 + step))
        train(twin, fresh, batches(5, seed=3 + step))
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(parameter, other)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("to_none", [True, False])
def test_rank_0_is_the_base_layer_and_every_optimizer_steps(name: str, to_none: bool) -> None:
    model, optimizer = trained_pair(name, (0, 2))
    assert compact_(adapters(model), optimizer) == 6
    x, y = batches(1, seed=4)[0]
    assert torch.equal(model.first(x), pair().double().first(x))
    for _ in range(3):
        optimizer.zero_grad(set_to_none=to_none)
        (model(x) - y).square().mean().backward()
        nn.utils.clip_grad_norm_(adapter_parameters(model), 1.0, error_if_nonfinite=True)
        before = model.second.lora_E.detach().clone()
        optimizer.step()
        assert not torch.equal(model.second.lora_E, before)
    assert model.first.delta_weight().abs().max() == 0
    assert [tuple(getattr(model.first, key).shape) for key in FACTORS] == [(0, 6), (0, 1), (5, 0)]


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - MIXING))
def test_even_empty_gradients_are_stepped(name: str) -> None:
    model, optimizer = trained_pair(name, (0, 0))
    compact_(adapters(model), optimizer)
    for _, _, parameter in factors(model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(model(batches(1)[0][0]), pair().double()(batches(1)[0][0]))


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize(("width", "rank"), [(1, 1), (1, 0), (6, 0)])
def test_matrices_with_a_side_of_1_are_cut_along_the_triplets(name: str, width: int, rank: int) -> None:
    """Where parameter, factor and scalar have the same shape, or nearly: capacity 1 to 0, 2 to 1, one input."""
    model = adapted(nn.Sequential(nn.Linear(width, 1)).double(), target_modules=["0"], init_r=rank + 1, target_r=1)
    module, optimizer = model[0], make(name, adapter_parameters(model))
    module.lora_keep.fill_(True)
    model(torch.ones(2, width).double()).sum().backward()
    optimizer.step()
    module.lora_keep[0] = False
    mask(model)
    assert compact_({"0": module}, optimizer) == 1
    for key, shape in (("lora_A", (rank, width)), ("lora_E", (rank, 1)), ("lora_B", (1, rank))):
        state = optimizer.state[getattr(module, key)]
        assert tuple(getattr(module, key).shape) == shape
        assert state["step"].shape == ()
        if name == "adamw":
            assert state["exp_avg"].shape == state["exp_avg_sq"].shape == shape
        else:
            assert (state["row_var"].shape, state["col_var"].shape) == ((shape[0], 1), (1, shape[1]))


def test_state_that_others_keep_beside_the_optimizers_own_is_cut_too() -> None:
    model, optimizer = trained_pair()
    first = adapters(model)["first"]
    own, keep = torch.randn(5, 4), first.lora_keep
    optimizer.state[first.lora_B] |= {"own": own, "count": torch.ones(1), "when": 3, "why": None, "how": "fast"}
    compact_(adapters(model), optimizer)
    state = optimizer.state[first.lora_B]
    assert torch.equal(state["own"], own[:, keep])
    assert [state[key] for key in ("count", "when", "why", "how")] == [torch.ones(1), 3, None, "fast"]


def test_an_optimizer_that_has_not_stepped_gets_no_state() -> None:
    model = adapted(pair().double(), [1], target_modules=["first"])
    optimizer = make("adamw", adapter_parameters(model))
    compact_(adapters(model), optimizer)
    assert len(optimizer.state) == 0
    train(model, optimizer, batches(2))
    assert {value.numel() for value in optimizer.state[model.first.lora_E].values()} == {1}


def test_places_in_param_groups_stay() -> None:
    model = adapted(net(), [2], target_modules=["linear", "line"], bias="lora_only")
    module = adapters(model)["linear"]
    groups = [
        {"params": [("b", module.bias), ("e", module.lora_E), ("a", module.lora_A)], "lr": 1e-3},
        {
            "params": [("o", module.lora_B), *((str(id(p)), p) for p in adapters(model)["line"].parameters())],
            "lr": 1e-4,
        },
    ]
    optimizer = torch.optim.AdamW(groups)
    lists, names = [g["params"] for g in optimizer.param_groups], [g["param_names"] for g in optimizer.param_groups]
    compact_({"linear": module}, optimizer)
    assert [group["params"] is before for group, before in zip(optimizer.param_groups, lists, strict=True)] == [
        True
    ] * 2
    assert [group["param_names"] for group in optimizer.param_groups] == names
    assert [id(p) for p in lists[0]] == [id(module.bias), id(module.lora_E), id(module.lora_A)]
    assert lists[1][0] is module.lora_B and len(lists[1]) == 6


@pytest.mark.parametrize(("name", "copies"), [("sgd", 0), ("sgd momentum", 1), ("adamw", 2), ("adam amsgrad", 3)])
def test_memory_shrinks_by_every_number_of_every_pruned_triplet(name: str, copies: int) -> None:
    model, optimizer = trained_pair(name, (1, 2))
    before = elements(model, optimizer)
    compact_(adapters(model), optimizer)
    freed = 3 * (6 + 1 + 5) + 2 * (5 + 1 + 4)  # triplets times (in + 1 + out)
    assert before - elements(model, optimizer) == freed * (1 + 1 + copies)  # parameter, gradient, state
    assert sum(p.untyped_storage().nbytes() for _, _, p in factors(model)) == 8 * (12 + 20)


# What works with the optimizer


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=20),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    ],
    ids=["cosine", "one cycle", "lambda"],
)
def test_learning_rate_schedules_go_on(schedule: Callable[[torch.optim.Optimizer], Any]) -> None:
    model, optimizer = trained_pair()
    twin, twin_optimizer = trained_pair()
    schedulers = schedule(optimizer), schedule(twin_optimizer)
    for step in range(10):
        for one, chosen, scheduler in zip((model, twin), (optimizer, twin_optimizer), schedulers, strict=True):
            train(one, chosen, batches(1, seed=step))
            scheduler.step()
        if step == 4:
            compact_(adapters(model), optimizer)
    assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr() == [optimizer.param_groups[0]["lr"]]
    assert (model.first.lora_E - twin.first.lora_E[twin.first.lora_keep]).abs().max() <= 1e-14


@pytest.mark.parametrize("name", ["adamw", "adamw fused"])
@pytest.mark.parametrize("moment", ["between steps", "after unscale_"])
def test_a_grad_scaler_goes_on(name: str, moment: str) -> None:
    runs = [trained_pair(name), trained_pair(name)]
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in runs]
    for step, (x, y) in enumerate(batches(6)):
        for index, ((model, optimizer), scaler) in enumerate(zip(runs, scalers, strict=True)):
            now = index == 0 and step == 3
            if now and moment == "between steps":
                compact_(adapters(model), optimizer)
            optimizer.zero_grad()
            scaler.scale((model(x) - y).square().mean()).backward()
            scaler.unscale_(optimizer)
            if now and moment == "after unscale_":
                compact_(adapters(model), optimizer)
            scaler.step(optimizer)
            scaler.update()
            mask(model)
    (model, _), (twin, _) = runs
    assert scalers[0].get_scale() == scalers[1].get_scale() == 8192.0
    assert (model.first.lora_A - twin.first.lora_A[twin.first.lora_keep]).abs().max() <= 1e-14


def test_it_may_run_in_a_hook_of_the_step_while_the_loss_is_alive() -> None:
    model, optimizer = trained_pair()
    optimizer.register_step_post_hook(lambda *_: compact_(adapters(model), optimizer) and None)
    optimizer.zero_grad()
    x, y = batches(1)[0]
    loss = (model(x) - y).square().mean()
    loss.backward()
    with torch.no_grad():  # as an allocator does, before the mask is final
        for module in adapters(model).values():
            module.lora_E.grad[~module.lora_keep] = 0
            for value in (optimizer.state[module.lora_E][key] for key in ("exp_avg", "exp_avg_sq")):
                value[~module.lora_keep] = 0
    optimizer.step()
    assert model.first.capacity == 2 and loss.isfinite()
    train(model, optimizer, batches(2))


def test_a_wrapped_optimizer_is_found() -> None:
    model, optimizer = trained_pair()

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    assert compact_(adapters(model), Wrapper(optimizer)) == 3
    assert optimizer.param_groups[0]["params"][0] is model.first.lora_A


# Refusals


def _unknown_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[model.second.lora_B]["blocks"] = torch.zeros(7)


def _transposed_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[model.second.lora_B]["exp_avg"] = torch.zeros(4, 4)[:, :3]


def _list_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[model.second.lora_E]["history"] = [torch.zeros(4, 1)]


def _hook(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.second.lora_A.register_hook(lambda gradient: gradient)


def _post_hook(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.second.lora_E.register_post_accumulate_grad_hook(lambda parameter: None)


def _live_lambda(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        model.second.lora_E[~model.second.lora_keep] = 0.25


def _absent(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"].pop()  # second.lora_B


def _shared(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.second.lora_E = model.first.lora_E
    model.second.lora_keep.copy_(model.first.lora_keep.roll(1))
    mask(model)


def _shared_with_alive(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.second.lora_E = model.first.lora_E
    model.second.lora_keep.fill_(True)


class Special(nn.Parameter):
    pass


def _special(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.second._parameters["lora_A"] = Special(model.second.lora_A.detach())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_unknown_state, r"'blocks' for second.lora_B has shape \(7,\), the parameter has \(4, 4\)"),
        (_transposed_state, r"'exp_avg' for second.lora_B has shape \(4, 3\), the parameter has \(4, 4\)"),
        (_list_state, r"'history' for second.lora_E is a list"),
        (_hook, "second.lora_A has gradient hooks"),
        (_post_hook, "second.lora_E has gradient hooks"),
        (_live_lambda, r"2 pruned triplets of 'second' still act, with λ up to 0.25"),
        (_absent, "second.lora_B trains, but not in this optimizer"),
        (_shared, "first.lora_E and second.lora_E are one parameter"),
        (_shared_with_alive, "first.lora_E and second.lora_E are one parameter"),
        (_special, "second.lora_A is a Special, not a plain parameter"),
    ],
)
def test_what_cannot_be_compacted_is_refused_and_nothing_has_changed(
    spoil: Callable[[nn.Module, torch.optim.Optimizer], None], message: str
) -> None:
    model, optimizer = trained_pair(ranks=(2, 2))
    spoil(model, optimizer)
    before, held = snapshot(model), _held(model, optimizer)
    with pytest.raises(TrainingError, match=message):
        compact_(adapters(model), optimizer)
    assert_unchanged(model, before)
    assert _held(model, optimizer) == held


def _held(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, ...]:
    """Identities and values of everything in the optimizer, and of masks and gradients."""
    places = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    state = {
        id(p): {key: (id(v), v.tolist() if isinstance(v, Tensor) else None) for key, v in entries.items()}
        for p, entries in optimizer.state.items()
    }
    masks = [(id(m.lora_keep), m.lora_keep.tolist()) for m in adapters(model).values()]
    return places, state, masks, [(id(p.grad), p.grad.tolist()) for _, _, p in factors(model) if p.grad is not None]


def test_hooks_that_were_removed_are_no_obstacle() -> None:
    model, optimizer = trained_pair()
    model.first.lora_A.register_hook(lambda gradient: gradient).remove()
    model.first.lora_A.register_post_accumulate_grad_hook(lambda parameter: None).remove()
    assert compact_(adapters(model), optimizer) == 3


def test_lbfgs_is_refused_even_where_its_history_lies_with_another_parameter() -> None:
    model = adapted(pair().double(), [4], target_modules=["first"], bias="lora_only")
    optimizer = torch.optim.LBFGS(sorted(adapter_parameters(model), key=lambda p: p.ndim))
    x, y = batches(1)[0]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert list(optimizer.state) == [model.first.bias]
    prune(model, [2])
    before = snapshot(model)
    with pytest.raises(TrainingError, match="LBFGS keeps its history in flat vectors"):
        compact_(adapters(model), optimizer)
    assert_unchanged(model, before)


def test_several_processes_are_refused_and_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained_pair()
    before, held = snapshot(model), _held(model, optimizer)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(TrainingError, match=r"group of 2 processes.*after training.*before it is made"):
        compact_(adapters(model), optimizer)
    assert_unchanged(model, before)
    assert _held(model, optimizer) == held
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    assert compact_(adapters(model), optimizer) == 3


def test_nothing_to_free_is_no_error_whatever_the_optimizer() -> None:
    model = adapted(pair(), [4], target_modules=["first"])
    before = snapshot(model)
    assert compact_(adapters(model), torch.optim.LBFGS(adapter_parameters(model))) == 0
    assert compact_({}, make("adamw", adapter_parameters(model))) == 0
    assert_unchanged(model, before)


def test_every_torch_optimizer_is_in_the_table() -> None:
    known = {cls for cls, _, _ in OPTIMIZERS.values()} | {torch.optim.LBFGS, torch.optim.SparseAdam}
    found = {cls for _, cls in inspect.getmembers(torch.optim, inspect.isclass)}
    assert {cls for cls in found if issubclass(cls, torch.optim.Optimizer)} - known == {torch.optim.Optimizer}
