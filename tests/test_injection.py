"""What injection, ejection and the questions about a whole model leave behind."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import adalora
import tiny
from adalora.errors import InjectionError
from adalora.injection import adapter_config, named_adapters, training_progress


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def config(**settings: Any) -> adalora.AdaLoraConfig:
    return adalora.AdaLoraConfig(**{"init_r": 3, "target_r": 2} | settings)


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


FACTORS = [f"body.{index}.lora_{part}" for index in (0, 2) for part in "AEB"]
TRAINS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "adapters alone": ({}, []),
    "a new head": ({"modules_to_save": ["head"]}, ["head.weight", "head.bias"]),
    "all biases": ({"bias": "all"}, ["body.0.bias", "body.1.bias", "body.2.bias", "head.bias"]),
    "biases of adapted modules": ({"bias": "lora_only"}, ["body.0.bias", "body.2.bias"]),
    "both": (
        {"bias": "lora_only", "modules_to_save": ["head"]},
        ["body.0.bias", "body.2.bias", "head.weight", "head.bias"],
    ),
}


@pytest.mark.parametrize(("settings", "extra"), TRAINS.values(), ids=TRAINS)
def test_exactly_what_was_asked_for_trains(settings: dict[str, Any], extra: list[str]) -> None:
    model = adalora.inject(Net(), config(target_modules=["0", "2"], **settings))
    assert sorted(trainable(model)) == sorted(FACTORS + extra)
    named = dict(model.named_parameters())
    assert [id(p) for p in adalora.adapter_parameters(model)] == [
        id(named[name]) for name in named if name in FACTORS + extra
    ]


def test_inject_returns_the_same_model_and_remembers_the_configuration() -> None:
    model, settings = Net(), config()
    assert adalora.inject(model, settings) is model
    assert adapter_config(model) is settings
    assert training_progress(model) == (0, None)
    assert adapter_config(adalora.inject(Net())) == adalora.AdaLoraConfig()


def test_shared_parameters_reach_the_optimizer_once() -> None:
    shared = nn.Linear(5, 5)
    model = adalora.inject(nn.Sequential(shared, shared), config())
    assert len(adalora.adapter_parameters(model)) == 3


@pytest.mark.parametrize("merged", [False, True])
def test_eject_gives_back_the_model_bit_for_bit(merged: bool) -> None:
    model = Net()
    types = {name: type(module) for name, module in model.named_modules()}
    state, attributes = copy.deepcopy(model.state_dict()), set(vars(model))
    adalora.inject(model, config(modules_to_save=["head"], bias="all"))
    with torch.no_grad():
        for _, module in named_adapters(model):
            module.lora_E.normal_()
    if merged:
        adalora.merge(model)
    assert adalora.eject(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert set(vars(model)) == attributes


@pytest.mark.parametrize(
    "action",
    [
        adalora.eject,
        adalora.merge,
        adalora.unmerge,
        adalora.adapter_parameters,
        adalora.rank_report,
        adalora.orthogonality_penalty,
        lambda model: adalora.disabled(model).__enter__(),
    ],
)
def test_a_model_without_adapter_is_an_error_that_says_how_to_get_one(action: Any) -> None:
    with pytest.raises(
        InjectionError, match=r"Net has no adapter; call adalora\.inject\(model, config\) or adalora\.load"
    ):
        action(Net())


def test_everything_works_through_a_wrapper() -> None:
    """Peers A8: DDP, accelerate and others put the model one level down."""
    model = adalora.inject(Net(), config())
    wrapped = nn.Sequential(model)
    x = torch.randn(2, 6)
    assert len(adalora.adapter_parameters(wrapped)) == 9
    with torch.no_grad():
        model.head.lora_E.fill_(5.0)
    adapted = wrapped(x).detach()
    with adalora.disabled(wrapped):
        assert not torch.equal(wrapped(x), adapted)
    adalora.merge(wrapped)
    torch.testing.assert_close(wrapped(x).detach(), adapted)
    adalora.unmerge(wrapped)
    adalora.eject(wrapped)
    assert type(model.head) is nn.Linear


def test_two_adapted_models_in_one_container_are_told_apart() -> None:
    """The first found must not stand for both in silence."""
    pair = nn.ModuleList([adalora.inject(Net(), config()), adalora.inject(Net(), config())])
    assert len(adalora.adapter_parameters(pair[0])) == 9
    with pytest.raises(InjectionError, match=r"ModuleList holds 2 adapted models .*inject once"):
        adalora.adapter_parameters(pair)


def test_what_holds_an_adapted_model_is_not_adapted_around_it() -> None:
    inner = adalora.inject(Net(), config())
    outer = nn.Sequential(nn.Linear(6, 6), inner)
    with pytest.raises(InjectionError, match=r"'1' has adapters already; call adalora\.eject"):
        adalora.inject(outer, config(target_modules=["0"], exclude_modules=["1.body.0"]))
    assert type(outer[0]) is nn.Linear


def test_a_copied_model_is_adapted_on_its_own() -> None:
    model = adalora.inject(Net(), config())
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.lora_E.fill_(1.0)
    assert not model.head.lora_E.detach().any()
    adalora.eject(other)
    assert len(list(named_adapters(model))) == 3


def test_a_failed_merge_changes_no_module() -> None:
    """The tied one comes last; those before it must not be merged by then."""
    model = Net()
    model.tail = nn.Linear(6, 3)
    model.tail.weight = model.head.weight
    adalora.inject(model, config(exclude_modules=["tail"]))
    with torch.no_grad():
        for _, module in named_adapters(model):
            module.lora_E.normal_()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InjectionError, match="cannot merge 'head'"):
        adalora.merge(model)
    assert not any(module.merged for _, module in named_adapters(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_transformers_model_keeps_its_output_and_finds_every_matrix() -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = transformers.BertModel(transformers.BertConfig(vocab_size=30, intermediate_size=24, **sizes)).eval()
    ids = torch.randint(30, (2, 7))
    base.requires_grad_(False)
    before = base(ids).last_hidden_state
    adalora.inject(base, config(target_modules=r"encoder\..*(query|key|value|dense)"))
    assert len(list(named_adapters(base))) == 12
    assert torch.equal(base(ids).last_hidden_state, before)


def test_gradient_checkpointing_sees_the_adapter() -> None:
    """Peers D6: each parameter is used in the forward only, so the reentrant form works too."""
    model = adalora.inject(Net(), config())
    with torch.no_grad():
        for _, module in named_adapters(model):
            module.lora_E.normal_()
    x = torch.randn(4, 6, requires_grad=True)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in adalora.adapter_parameters(model)]
    for reentrant in (False, True):
        model.zero_grad()
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        for one, other in zip(expected, adalora.adapter_parameters(model), strict=True):
            torch.testing.assert_close(one, other.grad)


def test_injecting_into_a_wrapper_is_refused_untouched() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(InjectionError, match=r"inject into model\.module before wrapping"):
        adalora.inject(nn.DataParallel(model), adalora.AdaLoraConfig(target_modules=["0"], init_r=2, target_r=1))
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_merging_a_disabled_adapter_is_refused() -> None:
    config = adalora.AdaLoraConfig(target_modules=["0"], init_r=2, target_r=1)
    model = adalora.inject(nn.Sequential(nn.Linear(3, 2)), config)
    with adalora.disabled(model), pytest.raises(InjectionError, match=r"leave adalora\.disabled first"):
        adalora.merge(model)


def test_a_wrapper_of_an_adapted_model_gives_all_that_trains_in_it() -> None:
    config = adalora.AdaLoraConfig(target_modules=["0"], init_r=2, target_r=1)
    body = adalora.inject(nn.Sequential(nn.Linear(3, 4)), config)
    whole = nn.Sequential(body, nn.Linear(4, 2))
    assert len(adalora.adapter_parameters(body)) == 3
    assert len(adalora.adapter_parameters(whole)) == 5


def test_eject_freezes_all_and_leaves_no_hook() -> None:
    config = adalora.AdaLoraConfig(target_modules=["0"], init_r=2, target_r=1, bias="all")
    model = adalora.eject(adalora.inject(nn.Sequential(nn.Linear(3, 2)), config))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert len(model._load_state_dict_post_hooks) == 0


def test_groups_hold_everything_once_and_decay_matrices_of_the_head_alone() -> None:
    model = adalora.inject(
        tiny.net(), adalora.AdaLoraConfig(target_modules=["linear", "conv"], modules_to_save=["head"], bias="lora_only")
    )
    own, decayed = adalora.parameter_groups(model, weight_decay=0.3)
    assert (own["weight_decay"], decayed["weight_decay"]) == (0.0, 0.3)
    assert [id(p) for p in decayed["params"]] == [id(model.head.weight)]
    everything = [id(p) for group in (own, decayed) for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in adalora.adapter_parameters(model))
    before = [p.detach().clone() for p in own["params"]], model.head.weight.detach().clone()
    optimizer = torch.optim.AdamW([own, decayed], lr=0.1)
    adalora.RankAllocator(model, total_step=10).attach(optimizer)
    for parameter in adalora.adapter_parameters(model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.head.weight, before[1] * (1 - 0.1 * 0.3))
    # What is left is the regularizer, whose gradient Λ does not have.
    assert all(
        torch.equal(p, b) for p, b in zip(own["params"], before[0], strict=True) if p.shape[1:] == (1,) or p.dim() < 2
    )
    plain = adalora.inject(tiny.net(), adalora.AdaLoraConfig(target_modules=["linear"]))
    assert [group["weight_decay"] for group in adalora.parameter_groups(plain)] == [0.0]
