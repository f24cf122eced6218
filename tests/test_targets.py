"""Which modules a configuration means, and every refusal: by name, with the remedy, and nothing changed."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

import adalora
from adalora.errors import ConfigError, InjectionError
from adalora.injection import named_adapters
from adalora.targets import bound, find_targets, matches


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(6, 6)
        self.value = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.value(torch.tanh(self.query(x))))


class Net(nn.Module):
    """An embedding, two lists of blocks, a convolution, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.tower = nn.ModuleList(Block() for _ in range(2))
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.prequery = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.prequery(self.embed(ids))
        for block in [*self.layers, *self.tower]:
            x = block(x)
        return self.head(self.conv(x.mT).mT)


def found(**settings: Any) -> list[str]:
    return list(find_targets(Net(), adalora.AdaLoraConfig(**settings)))


LINEAR = [
    *[
        f"{part}.{index}.{kind}"
        for part, n in (("layers", 3), ("tower", 2))
        for index in range(n)
        for kind in ("query", "value")
    ],
    "prequery",
    "head",
]


def test_all_linear_finds_every_linear_layer_and_no_other_kind() -> None:
    assert found() == LINEAR


def test_a_list_matches_whole_names_and_dotted_endings_only() -> None:
    """`prequery` ends in "query", but not at a dot."""
    assert found(target_modules=["query"]) == [name for name in LINEAR if name.endswith(".query")]
    assert found(target_modules=["tower.1.value", "embed", "conv"]) == ["embed", "tower.1.value", "conv"]


def test_a_string_is_a_regular_expression_for_the_whole_name() -> None:
    assert found(target_modules=r"layers\.[02]\.(query|value)") == [
        "layers.0.query",
        "layers.0.value",
        "layers.2.query",
        "layers.2.value",
    ]
    assert found(target_modules=r".*query") == [name for name in LINEAR if name.endswith("query")]


@pytest.mark.parametrize("exclude", [["head", "prequery"], r"head|prequery"])
def test_excluded_modules_are_left_alone(exclude: Any) -> None:
    assert found(exclude_modules=exclude) == LINEAR[:-2]


def test_layers_to_transform_chooses_by_index() -> None:
    assert found(target_modules=["query"], layers_to_transform=1) == ["layers.1.query", "tower.1.query"]
    assert found(target_modules=["query"], layers_to_transform=[0, 2]) == [
        "layers.0.query",
        "layers.2.query",
        "tower.0.query",
    ]
    assert found(target_modules=["query"], layers_to_transform=0, layers_pattern="tower") == ["tower.0.query"]
    assert found(target_modules=["query"], layers_to_transform=[0, 1], layers_pattern=["tower", "layers"]) == [
        "layers.0.query",
        "layers.1.query",
        "tower.0.query",
        "tower.1.query",
    ]


def test_modules_to_save_and_what_is_in_them_are_not_adapted() -> None:
    assert found(modules_to_save=["head"]) == LINEAR[:-1]
    assert found(modules_to_save=["layers"]) == [name for name in LINEAR if not name.startswith("layers")]


def test_all_linear_leaves_a_language_models_head_alone_and_a_name_still_reaches_it() -> None:
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2, tie_word_embeddings=False
    )
    model = transformers.GPT2LMHeadModel(config)
    names = list(find_targets(model, adalora.AdaLoraConfig()))
    assert names == [
        f"transformer.h.{index}.{part}"
        for index in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert list(find_targets(model, adalora.AdaLoraConfig(target_modules=["lm_head"]))) == ["lm_head"]


def test_nothing_found_lists_what_could_be() -> None:
    with pytest.raises(InjectionError, match=r"no module of Net fits target_modules=\('q_proj',\)") as caught:
        found(target_modules=["q_proj"])
    for ending in ("embed (Embedding)", "query (Linear)", "value (Linear)", "conv (Conv1d)", "head (Linear)"):
        assert ending in str(caught.value)
    with pytest.raises(InjectionError, match=r"layers_to_transform=7"):
        found(layers_to_transform=7)
    with pytest.raises(InjectionError, match=r"exclude_modules='\.\*'"):
        found(exclude_modules=".*")


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("a.query", ["query"], True),
        ("query", ["query"], True),
        ("a.myquery", ["query"], False),
        ("a.b.query", ["b.query"], True),
        ("a.query", "query", False),
        ("a.query", r".*\.query", True),
        ("a.query", None, False),
        ("a.query", [], False),
    ],
)
def test_matching_rules(name: str, pattern: Any, expected: bool) -> None:
    assert matches(name, pattern) is expected


def test_rank_bounds_are_found_by_ending() -> None:
    assert bound(3, "a.query", 0) == 3
    assert bound(None, "a.query", 7) == 7
    assert bound({"value": 1, "query": 2}, "a.query", 7) == 2
    assert bound({"value": 1}, "a.query", 7) == 7


# --- Refusals -----------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """A good layer first, so that a refusal that comes late would have changed something."""

    def __init__(self, bad: nn.Module) -> None:
        super().__init__()
        self.good = nn.Linear(6, 6)
        self.bad = bad


class Louder(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OddlyScaled(nn.Embedding):
    embed_scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale + 1


def replaced_forward() -> nn.Module:
    layer: Any = nn.Linear(6, 6)
    original = layer.forward
    layer.forward = lambda x: original(x)
    return layer


REFUSALS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "attention's output projection": (
        lambda: nn.MultiheadAttention(6, 2),
        "bad.out_proj",
        "MultiheadAttention reads this weight without calling the layer",
    ),
    "the encoder layer's fast path": (
        lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True),
        "bad.linear1",
        r"reads this weight without calling the layer; switch that off with "
        r"torch\.backends\.mha\.set_fastpath_enabled\(False\)",
    ),
    "parametrized": (lambda: parametrizations.orthogonal(nn.Linear(6, 6)), "bad", "its weight is parametrized; remove"),
    "new weight norm": (lambda: parametrizations.weight_norm(nn.Linear(6, 6)), "bad", "its weight is parametrized"),
    "spectral norm": (lambda: spectral_norm(nn.Linear(6, 6)), "bad", "its weight is parametrized"),
    "pruned by torch": (lambda: prune.random_unstructured(nn.Linear(6, 6), "weight", 0.5), "bad", "is parametrized"),
    "overridden forward": (lambda: Louder(6, 6), "bad", "its class overrides forward in a way that no adapter knows"),
    "oddly scaled embedding": (lambda: OddlyScaled(10, 6), "bad", "its class overrides forward"),
    "forward of the instance": (replaced_forward, "bad", "its forward was replaced on the instance"),
    "max_norm": (lambda: nn.Embedding(10, 6, max_norm=1.0), "bad", "max_norm rewrites the base weight"),
    "scale_grad_by_freq": (lambda: nn.Embedding(10, 6, scale_grad_by_freq=True), "bad", "scale_grad_by_freq would"),
    "a kind without adapter": (
        lambda: nn.LayerNorm(6),
        "bad",
        "there is an adapter for Linear, Conv1d/2d/3d, Embedding",
    ),
    "transposed convolution": (lambda: nn.ConvTranspose2d(6, 6, 3), "bad", "there is an adapter for Linear"),
}


def fingerprint(model: nn.Module) -> tuple[Any, ...]:
    parameters = {n: (p.requires_grad, id(p)) for n, p in model.named_parameters()}
    types = {name: (type(module), sorted(vars(module))) for name, module in model.named_modules()}
    return parameters, types, list(model.state_dict())


def values(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.clone()
        for name, value in model.state_dict().items()
        if not isinstance(value, nn.parameter.UninitializedParameter)
    }


@pytest.mark.parametrize(("make", "name", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_refusal_names_module_reason_and_remedy_and_changes_nothing(
    make: Callable[[], nn.Module], name: str, reason: str
) -> None:
    model = Holder(make())
    before, numbers = fingerprint(model), values(model)
    with pytest.raises(InjectionError, match=reason) as caught:
        adalora.inject(model, adalora.AdaLoraConfig(target_modules=["good", name], init_r=2, target_r=1))
    assert str(caught.value).startswith(f"cannot adapt '{name}' (")
    assert f"exclude_modules=['{name.rpartition('.')[2]}']" in str(caught.value)
    assert fingerprint(model) == before
    assert all(torch.equal(value, numbers[key]) for key, value in values(model).items())
    adalora.inject(
        model, adalora.AdaLoraConfig(target_modules=["good", name], exclude_modules=[name], init_r=2, target_r=1)
    )
    assert [name for name, _ in named_adapters(model)] == ["good"]


@pytest.mark.parametrize(
    ("exclude", "reason"),
    [(None, "cannot adapt 'bad'.*it is lazy and has no weight yet"), (["bad"], "'bad.weight' is lazy")],
)
def test_lazy_modules_are_refused_adapted_or_not(exclude: Any, reason: str) -> None:
    """What has no shape can neither be adapted nor frozen."""
    model = Holder(nn.LazyLinear(6))
    with pytest.raises(InjectionError, match=rf"{reason}.*run one forward pass first"):
        adalora.inject(model, adalora.AdaLoraConfig(exclude_modules=exclude))
    assert type(model.good) is nn.Linear
    assert model.good.weight.requires_grad
    model.bad(torch.randn(2, 6))
    adalora.inject(model, adalora.AdaLoraConfig(exclude_modules=exclude))


def test_old_weight_norm_is_refused() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = Holder(weight_norm(nn.Linear(6, 6)))
    with pytest.raises(InjectionError, match=r"cannot adapt 'bad'.*its weight is parametrized"):
        adalora.inject(model, adalora.AdaLoraConfig())


def test_all_linear_meets_the_same_refusals() -> None:
    """A default must not skip in silence what a name would be refused for."""
    model = Holder(nn.MultiheadAttention(6, 2))
    with pytest.raises(InjectionError, match=r"cannot adapt 'bad\.out_proj' \(NonDynamicallyQuantizableLinear\)"):
        adalora.inject(model)


def test_encoder_layers_are_adapted_once_the_fast_path_is_off() -> None:
    model = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 5, 6)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        before = model(x)
        adalora.inject(model, adalora.AdaLoraConfig(target_modules=["linear1", "linear2"], init_r=2, target_r=1))
        torch.testing.assert_close(model(x), before)
        with torch.no_grad():
            for _, module in named_adapters(model):
                module.lora_E.fill_(100.0)
            assert not torch.allclose(model(x), before, atol=1e-3)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_model_is_adapted_once() -> None:
    model = adalora.inject(Net(), adalora.AdaLoraConfig())
    before = fingerprint(model)
    with pytest.raises(
        InjectionError, match=r"'layers\.0\.query'.*already has an adapter; call adalora\.eject\(model\)"
    ):
        adalora.inject(model, adalora.AdaLoraConfig())
    assert fingerprint(model) == before


def test_a_peft_model_is_refused() -> None:
    model = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["query"]))
    before = fingerprint(model)
    with pytest.raises(InjectionError, match=r"PeftModel already carries PEFT adapters; .*model\.unload\(\)"):
        adalora.inject(model, adalora.AdaLoraConfig(target_modules=["value"]))
    assert fingerprint(model) == before


def test_a_subclass_that_does_not_touch_forward_is_adapted() -> None:
    class Named(nn.Linear):
        purpose = "projection"

    model = Holder(Named(6, 6))
    x = torch.randn(2, 6)
    before = model.bad(x)
    adalora.inject(model, adalora.AdaLoraConfig())
    assert isinstance(model.bad, Named)
    assert model.bad.purpose == "projection"
    torch.testing.assert_close(model.bad(x), before)
    assert type(adalora.eject(model).bad) is Named


def test_a_scaled_embedding_is_recognized_by_trying() -> None:
    model = Holder(BartScaledWordEmbedding(10, 6, 1, embed_scale=3.0))
    adalora.inject(model, adalora.AdaLoraConfig(target_modules=["bad"], init_r=2, target_r=1))
    assert [name for name, _ in named_adapters(model)] == ["bad"]


# --- Ranks and budgets --------------------------------------------------------------------------------------

UNREACHABLE: dict[str, tuple[dict[str, Any], str]] = {
    "more than max_rank allows": (
        {"init_r": 8, "target_r": 6, "max_rank": 4},
        r"target_r=6 over 12 modules asks for 72 triplets.*max_rank allow 0 to 48",
    ),
    "less than min_rank demands": (
        {"init_r": 8, "target_r": 2, "min_rank": 3},
        r"asks for 24 triplets.*allow 36 to 96",
    ),
    "min above max for one": (
        {"init_r": 8, "target_r": 4, "min_rank": {"head": 5}, "max_rank": {"head": 3}},
        "for 'head' min_rank is 5, above max_rank 3",
    ),
}


@pytest.mark.parametrize(("settings", "message"), UNREACHABLE.values(), ids=UNREACHABLE)
def test_unreachable_budgets_are_refused_before_anything_changes(settings: dict[str, Any], message: str) -> None:
    model = Net()
    before = fingerprint(model)
    with pytest.raises(ConfigError, match=message):
        adalora.inject(model, adalora.AdaLoraConfig(**settings))
    assert fingerprint(model) == before


@pytest.mark.parametrize("field", ["min_rank", "max_rank"])
def test_a_bound_for_a_module_that_is_not_adapted_is_refused(field: str) -> None:
    model = Net()
    before = fingerprint(model)
    with pytest.raises(
        InjectionError, match=rf"{field} names 'key', but no adapted module ends in that; they end in: "
    ):
        adalora.inject(model, adalora.AdaLoraConfig(init_r=4, target_r=2, **{field: {"query": 2, "key": 2}}))
    assert fingerprint(model) == before


def test_capacities_follow_max_rank_by_ending() -> None:
    model = adalora.inject(
        Net(), adalora.AdaLoraConfig(init_r=8, target_r=2, max_rank={"layers.0.query": 1, "query": 5})
    )
    capacities = {name: module.capacity for name, module in named_adapters(model)}
    assert capacities["layers.0.query"] == 1
    assert capacities["layers.1.query"] == capacities["tower.1.query"] == 5
    assert capacities["prequery"] == capacities["head"] == 8


def test_an_unknown_module_to_save_is_refused() -> None:
    model = Net()
    before = fingerprint(model)
    with pytest.raises(InjectionError, match="modules_to_save names 'classifier', but Net has no such module"):
        adalora.inject(model, adalora.AdaLoraConfig(modules_to_save=["classifier"]))
    assert fingerprint(model) == before


def test_refusals_survive_a_copy() -> None:
    """deepcopy keeps `forward` in the instance's own dictionary, so the refusal holds for copies too."""
    model = copy.deepcopy(Holder(replaced_forward()))
    with pytest.raises(InjectionError, match="replaced on the instance"):
        adalora.inject(model, adalora.AdaLoraConfig())


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_a_listed_name_that_means_nothing_is_refused(field: str) -> None:
    model = nn.ModuleDict({"query": nn.Linear(2, 2), "value": nn.Linear(2, 2)})
    choices = {"target_modules": ["value"], field: ["value", "qurey"] if field == "target_modules" else ["qurey"]}
    with pytest.raises(InjectionError, match=f"{field} names 'qurey'.*did you mean 'query'"):
        adalora.inject(model, adalora.AdaLoraConfig(**choices, init_r=2, target_r=1))
