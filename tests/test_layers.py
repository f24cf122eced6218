"""Every adapted layer against W + ΔW computed by the twin: outputs, gradients, dtypes, and what converting keeps."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

import adalora
import reference
from adalora.errors import InjectionError
from adalora.functional import keep_mask
from adalora.injection import named_adapters
from adalora.layers import SVDAdapter, SVDLinear

# torch's remark on its own convolution, adapted or not.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

F64 = torch.float64
R, ALPHA = 4, 8.0
Layer = Any  # an adapted layer: attributes of the base class and of SVDAdapter


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def config(**settings: Any) -> adalora.AdaLoraConfig:
    defaults = {
        "target_modules": ["layer"],
        "init_r": R,
        "target_r": min(2, settings.get("init_r", R)),
        "lora_alpha": ALPHA,
    }
    return adalora.AdaLoraConfig(**defaults | settings)


def adapt(layer: nn.Module, randomize: bool = True, **settings: Any) -> tuple[One, Layer]:
    """The layer in a model, with an increment that is not zero."""
    model = adalora.inject(One(layer), config(**settings))
    adapted: Layer = model.layer
    if randomize:
        with torch.no_grad():
            for parameter in (adapted.lora_A, adapted.lora_E, adapted.lora_B):
                parameter.copy_(torch.randn(parameter.shape, dtype=F64))
            if getattr(adapted, "padding_idx", None) is not None:
                adapted.lora_A[:, adapted.padding_idx] = 0
    return model, adapted


def factors(layer: Layer, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
    """Copies that the twin may differentiate."""
    return tuple(p.detach().to(dtype).clone().requires_grad_() for p in (layer.lora_A, layer.lora_E, layer.lora_B))


def conv_twin(layer: Layer, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
    geometry = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")}
    bias = None if layer.bias is None else layer.bias.detach().to(x.dtype)
    return reference.conv_forward(x, layer.weight.detach().to(x.dtype), bias, A, E, B, ALPHA, R, **geometry)


def linear_twin(layer: Layer, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
    weight = layer.weight.detach().to(x.dtype)
    weight = weight.T if isinstance(layer, Conv1D) else weight
    bias = None if layer.bias is None else layer.bias.detach().to(x.dtype)
    return reference.linear_forward(x, weight, bias, A, E, B, ALPHA, R)


def embedding_twin(layer: Layer, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
    scale = float(getattr(layer, "embed_scale", 1.0))
    if layer.padding_idx is not None:  # its row takes no part
        mask = torch.ones(A.shape[1], dtype=A.dtype)
        mask[layer.padding_idx] = 0
        A = A * mask
    return reference.embedding_forward(x, layer.weight.detach().to(A.dtype), A, E, B, ALPHA, R, scale)


def conv(dims: int, **geometry: Any) -> Callable[[], tuple[nn.Module, Tensor]]:
    def make() -> tuple[nn.Module, Tensor]:
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        arguments = {"in_channels": 4, "out_channels": 8, "kernel_size": 3} | geometry
        return kind(**arguments), torch.randn(2, 4, *(9, 7, 6)[:dims], dtype=F64)

    return make


def ids() -> Tensor:
    return torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 3]])


Case = tuple[Callable[[], tuple[nn.Module, Tensor]], Callable[..., Tensor]]
MODES = ("zeros", "reflect", "replicate", "circular")
CASES: dict[str, Case] = {
    "linear 2-D": (lambda: (nn.Linear(6, 5), torch.randn(7, 6, dtype=F64)), linear_twin),
    "linear 3-D": (lambda: (nn.Linear(6, 5), torch.randn(2, 7, 6, dtype=F64)), linear_twin),
    "linear 1-D": (lambda: (nn.Linear(6, 5), torch.randn(6, dtype=F64)), linear_twin),
    "linear without bias": (lambda: (nn.Linear(6, 5, bias=False), torch.randn(7, 6, dtype=F64)), linear_twin),
    "linear, not contiguous": (
        lambda: (nn.Linear(6, 5), torch.randn(6, 7, 2, dtype=F64).permute(2, 1, 0)),
        linear_twin,
    ),
    "linear, wider than long": (lambda: (nn.Linear(2, 3), torch.randn(7, 2, dtype=F64)), linear_twin),
    "Conv1D of GPT-2": (lambda: (Conv1D(5, 6), torch.randn(2, 7, 6, dtype=F64)), linear_twin),
    "Conv1D of GPT-2, not contiguous": (
        lambda: (Conv1D(5, 6), torch.randn(2, 7, 12, dtype=F64)[..., ::2]),
        linear_twin,
    ),
    **{f"conv{d}d, {mode}": (conv(d, padding=2, padding_mode=mode), conv_twin) for d in (1, 2, 3) for mode in MODES},
    **{
        f"conv{d}d, same, {mode}": (conv(d, padding="same", padding_mode=mode), conv_twin)
        for d in (1, 2, 3)
        for mode in MODES
    },
    **{f"conv{d}d, valid": (conv(d, padding="valid"), conv_twin) for d in (1, 2, 3)},
    **{f"conv{d}d, two groups": (conv(d, groups=2), conv_twin) for d in (1, 2, 3)},
    **{f"conv{d}d, depthwise": (conv(d, groups=4, padding=1), conv_twin) for d in (1, 2, 3)},
    **{f"conv{d}d, strided": (conv(d, stride=2, bias=False), conv_twin) for d in (1, 2, 3)},
    **{f"conv{d}d, dilated": (conv(d, dilation=2, padding=2), conv_twin) for d in (1, 2, 3)},
    "conv2d, same, even kernel, dilated": (conv(2, kernel_size=(2, 4), padding="same", dilation=(1, 2)), conv_twin),
    "conv2d, everything at once": (
        conv(2, kernel_size=(3, 2), stride=(2, 1), padding=(2, 1), groups=2, padding_mode="circular"),
        conv_twin,
    ),
    "conv2d, pointwise": (conv(2, kernel_size=1), conv_twin),
    "conv2d, one image": (lambda: (nn.Conv2d(4, 8, 3), torch.randn(4, 7, 6, dtype=F64)), conv_twin),
    "conv2d, channels last": (
        lambda: (nn.Conv2d(4, 8, 3), torch.randn(2, 4, 7, 6, dtype=F64).to(memory_format=torch.channels_last)),
        conv_twin,
    ),
    "embedding": (lambda: (nn.Embedding(10, 6), ids()), embedding_twin),
    "embedding with padding": (lambda: (nn.Embedding(10, 6, padding_idx=1), ids()), embedding_twin),
    "embedding with negative padding": (lambda: (nn.Embedding(10, 6, padding_idx=-1), ids()), embedding_twin),
    "embedding of BART": (lambda: (BartScaledWordEmbedding(10, 6, 1, embed_scale=2.5), ids()), embedding_twin),
    "embedding of Gemma": (lambda: (Gemma3TextScaledWordEmbedding(10, 6, 0, embed_scale=8.0), ids()), embedding_twin),
}

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_kind = pytest.mark.parametrize(
    "case",
    [CASES[name] for name in ("linear 3-D", "Conv1D of GPT-2", "conv2d, everything at once", "embedding of BART")],
    ids=["linear", "Conv1D", "conv2d", "embedding"],
)


def relative(one: Tensor, other: Tensor) -> float:
    return float((one.to(F64) - other.to(F64)).abs().max() / other.to(F64).abs().max().clamp_min(1e-12))


def check_against_twin(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    make, twin = case
    base, x = make()
    _, layer = adapt(base.to(dtype))
    x = x.to(dtype) if x.is_floating_point() else x
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_() if x.is_floating_point() else x
    exact = x.to(F64).clone().requires_grad_() if x.is_floating_point() else x
    copies = factors(layer)
    y, expected = layer(leaf), twin(layer, exact, *copies)
    assert y.dtype is dtype
    assert relative(y.detach(), expected.detach()) <= tolerance
    cotangent = torch.randn(y.shape, dtype=F64)
    y.backward(cotangent.to(dtype))
    expected.backward(cotangent)
    for parameter, copied in zip((layer.lora_A, layer.lora_E, layer.lora_B), copies, strict=True):
        assert relative(parameter.grad, copied.grad) <= tolerance
        assert parameter.grad.stride() == parameter.stride()  # DistributedDataParallel warns otherwise
    if x.is_floating_point():
        assert relative(leaf.grad, exact.grad) <= tolerance
    assert layer.weight.grad is None


@each_case
def test_forward_and_gradients_equal_the_twin_in_fp64(case: Case) -> None:
    check_against_twin(case, F64, 1e-10)


@each_case
def test_forward_and_gradients_equal_the_twin_in_fp32(case: Case) -> None:
    check_against_twin(case, torch.float32, 1e-5)


@each_kind
def test_autocast_to_bf16_stays_near_the_twin(case: Case) -> None:
    """bf16 holds 8 bits: 2⁻⁸ for each of a few products in a row; master gradients are fp32."""
    make, twin = case
    base, x = make()
    _, layer = adapt(base)
    copies = factors(layer)
    x = x.float() if x.is_floating_point() else x
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    expected = twin(layer, x.to(F64) if x.is_floating_point() else x, *copies)
    assert relative(y.detach(), expected.detach()) <= 0.02
    cotangent = torch.randn(y.shape, dtype=F64)
    y.backward(cotangent.to(y.dtype))
    expected.backward(cotangent)
    for parameter, copied in zip((layer.lora_A, layer.lora_E, layer.lora_B), copies, strict=True):
        assert parameter.grad.dtype is torch.float32
        assert relative(parameter.grad, copied.grad) <= 0.03


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_get_fp32_adapters(case: Case, dtype: torch.dtype) -> None:
    """Peers C7 and C1: the input is 16-bit, the adapter is not, the output is the base's."""
    make, twin = case
    base, x = make()
    _, layer = adapt(base.to(dtype))
    assert {p.dtype for p in (layer.lora_A, layer.lora_E, layer.lora_B)} == {torch.float32}
    x = x.to(dtype) if x.is_floating_point() else x
    copies = factors(layer)
    y, expected = layer(x), twin(layer, x.to(F64) if x.is_floating_point() else x, *copies)
    assert y.dtype is dtype
    assert relative(y.detach(), expected.detach()) <= 0.02
    cotangent = torch.randn(y.shape, dtype=F64).to(dtype)
    y.backward(cotangent)
    expected.backward(cotangent.to(F64))
    for parameter, copied in zip((layer.lora_A, layer.lora_E, layer.lora_B), copies, strict=True):
        assert relative(parameter.grad, copied.grad) <= 0.02


# --- At the start and at rank 0 -----------------------------------------------------------------------------


@each_case
def test_injection_does_not_change_a_bit_of_the_output(case: Case) -> None:
    """Peers C9: E is 0, whatever A and B are."""
    base, x = case[0]()
    # torch picks another kernel for weights that train, so the base is frozen before its output is taken.
    base = base.double().requires_grad_(False)
    before = base(x)
    model, layer = adapt(base, randomize=False)
    assert torch.equal(model(x), before)
    assert float(layer.lora_A.detach().std()) == pytest.approx(0.02, rel=0.6)
    assert float(layer.lora_B.detach().std()) == pytest.approx(0.02, rel=0.6)
    assert float(layer.lora_E.detach().abs().max()) == 0.0


def test_initial_factors_have_standard_deviation_two_hundredths() -> None:
    _, layer = adapt(nn.Linear(3000, 2000), randomize=False)
    assert float(layer.lora_A.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert float(layer.lora_B.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert abs(float(layer.lora_A.detach().mean())) < 1e-3


@each_kind
def test_at_the_start_only_the_diagonal_has_a_gradient(case: Case) -> None:
    """V5: with E = 0 the task moves E alone; A and B wait for the regularizer or the next step."""
    base, x = case[0]()
    model, layer = adapt(base.double(), randomize=False)
    model(x).square().sum().backward()
    assert float(layer.lora_E.grad.abs().max()) > 0
    assert float(layer.lora_A.grad.abs().max()) == 0.0
    assert float(layer.lora_B.grad.abs().max()) == 0.0


@each_kind
def test_rank_zero_computes_the_base(case: Case) -> None:
    """Peers E4: no triplets is a rank like any other."""
    base, x = case[0]()
    before = base.double()(x).detach()
    model, layer = adapt(base, max_rank=0, target_r=0)
    assert (layer.capacity, layer.rank) == (0, 0)
    assert torch.equal(model(x), before)
    assert not layer.delta_weight().detach().any()
    adalora.merge(model)
    assert torch.equal(model(x), before)
    adalora.unmerge(model)
    copy.deepcopy(model).load_state_dict(model.state_dict())
    assert torch.equal(adalora.eject(model)(x), before)


def test_scaling_follows_the_initial_rank_for_life() -> None:
    _, layer = adapt(nn.Linear(6, 5), init_r=4, max_rank=2)
    assert layer.scaling == reference.scaling(ALPHA, 4)
    with torch.no_grad():
        layer.lora_keep[0] = False
    assert layer.rank == 1
    assert layer.scaling == ALPHA / (4 + 1e-5)


# --- merge, unmerge, eject, disabled ------------------------------------------------------------------------


@each_case
def test_merged_weights_compute_the_same_and_unmerge_is_bit_exact(case: Case) -> None:
    base, x = case[0]()
    model, layer = adapt(base.double())
    weight, output = layer.weight.detach().clone(), model(x).detach()
    adalora.merge(model)
    assert layer.merged
    assert not torch.equal(layer.weight, weight)
    torch.testing.assert_close(model(x).detach(), output, rtol=1e-10, atol=1e-10)
    merged = layer.weight.detach().clone()
    adalora.merge(model)  # a second time does nothing
    assert torch.equal(layer.weight, merged)
    adalora.unmerge(model)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(model(x), output)
    adalora.unmerge(model)
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_leaves_no_trace_in_any_dtype(dtype: torch.dtype) -> None:
    """Subtracting the increment again would: 16 bits round it away."""
    model, layer = adapt(nn.Linear(64, 64).to(dtype))
    before = layer.weight.detach().clone()
    for _ in range(3):
        adalora.merge(model)
        adalora.unmerge(model)
    assert torch.equal(layer.weight, before)
    delta = layer.delta_weight().detach()
    assert delta.dtype is torch.float32
    adalora.merge(model)
    assert torch.equal(layer.weight, (before.float() + delta).to(dtype))


@each_case
def test_delta_weight_is_the_twins_product_in_the_shape_of_the_weight(case: Case) -> None:
    base, _ = case[0]()
    _, layer = adapt(base.double())
    expected = reference.delta_weight(*factors(layer), ALPHA, R)
    expected = expected.T if layer.transposed else expected
    assert layer.delta_weight().shape == layer.weight.shape
    assert relative(layer.delta_weight().detach(), expected.reshape(layer.weight.shape).detach()) <= 1e-12


@each_case
@pytest.mark.parametrize("merged", [False, True])
def test_eject_restores_type_keys_values_and_attributes(case: Case, merged: bool) -> None:
    base, x = case[0]()
    base = base.double().requires_grad_(False)
    kind, state, attributes = type(base), copy.deepcopy(base.state_dict()), set(vars(base))
    output, repr_before = base(x).detach(), repr(base)
    model, layer = adapt(base)
    assert isinstance(layer, SVDAdapter)
    assert isinstance(layer, kind)
    if merged:
        adalora.merge(model)
    assert adalora.eject(model) is model
    assert type(model.layer) is kind
    assert list(model.layer.state_dict()) == list(state)
    assert all(torch.equal(model.layer.state_dict()[key], value) for key, value in state.items())
    assert set(vars(model.layer)) == attributes
    assert repr(model.layer) == repr_before
    assert torch.equal(model(x), output)
    with pytest.raises(InjectionError, match=r"One has no adapter; call adalora\.inject"):
        adalora.eject(model)
    adalora.inject(model, config())  # and again


@each_kind
def test_disabled_computes_the_base_and_nests(case: Case) -> None:
    base, x = case[0]()
    before = base.double()(x).detach()
    model, _ = adapt(base)
    adapted = model(x).detach()
    assert not torch.equal(adapted, before)
    with adalora.disabled(model):
        assert torch.equal(model(x), before)
        with adalora.disabled(model):
            assert torch.equal(model(x), before)
        assert torch.equal(model(x), before)
    assert torch.equal(model(x), adapted)
    with pytest.raises(KeyError), adalora.disabled(model):
        raise KeyError
    assert torch.equal(model(x), adapted)


def test_a_merged_adapter_cannot_be_disabled() -> None:
    model, _ = adapt(nn.Linear(6, 5))
    adalora.merge(model)
    with (
        pytest.raises(InjectionError, match=r"merged into the weights; call adalora\.unmerge"),
        adalora.disabled(model),
    ):
        pass


# --- Dropout ------------------------------------------------------------------------------------------------


@each_kind
def test_dropout_acts_on_the_increment_in_training_only(case: Case) -> None:
    base, x = case[0]()
    before = base.double()(x).detach()
    model, layer = adapt(base, lora_dropout=0.5)
    model.eval()
    assert torch.equal(model(x), model(x))
    expected = model(x).detach()
    model.train()
    assert not torch.equal(model(x), model(x))
    layer.lora_dropout = 0.999999
    assert torch.equal(model(x).detach(), before)
    layer.lora_dropout = 0.5
    mean = torch.stack([model(x).detach() for _ in range(3000)]).mean(0)
    assert relative(mean, expected) <= 0.1


def test_dropout_of_a_linear_layer_drops_inputs_and_rescales_the_rest() -> None:
    base = nn.Linear(6, 5, bias=False).double()
    x = torch.randn(3, 6, dtype=F64)
    model, layer = adapt(base, lora_dropout=0.25)
    torch.manual_seed(7)
    y = model(x)
    torch.manual_seed(7)
    mask, kept = keep_mask(x, 0.25)
    dropped = x * mask / kept
    assert (int((dropped == 0).sum()) > 0, kept) == (True, 0.75)
    delta = reference.delta_weight(*factors(layer), ALPHA, R)
    torch.testing.assert_close(y, x @ layer.weight.T + dropped @ delta.T, rtol=1e-12, atol=1e-12)


# --- Life in other people's code ----------------------------------------------------------------------------


@each_case
def test_deepcopy_and_pickle_keep_class_and_function(case: Case) -> None:
    base, x = case[0]()
    model, layer = adapt(base.double())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for other in copies:
        assert type(other.layer) is type(layer)
        assert torch.equal(other(x), model(x))
        assert other.layer.weight is not layer.weight
        assert type(adalora.eject(other).layer) is layer.base_type


@each_kind
def test_state_dict_has_base_keys_plus_three(case: Case) -> None:
    base, x = case[0]()
    keys = [f"layer.{key}" for key in base.state_dict()]
    model, _ = adapt(base.double())
    assert list(model.state_dict()) == [*keys, "layer.lora_A", "layer.lora_E", "layer.lora_B"]
    other, _ = adapt(case[0]()[0].double())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


@each_kind
def test_a_merged_state_never_applies_the_increment_twice(case: Case) -> None:
    base, x = case[0]()
    model, _ = adapt(base.double())
    expected, unmerged = model(x), copy.deepcopy(model.state_dict())
    adalora.merge(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert list(state) == [key for key in unmerged if ".lora_" not in key]
    fresh = case[0]()[0].double()  # a base model: the state is that of a base model
    fresh.load_state_dict({key.removeprefix("layer."): value for key, value in state.items()})
    torch.testing.assert_close(fresh(x), expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(RuntimeError, match="lora_A"):
        model.load_state_dict(state)
    other, layer = adapt(case[0]()[0].double())
    adalora.merge(other)
    other.load_state_dict(unmerged)
    assert not layer.merged
    torch.testing.assert_close(other(x), expected, rtol=1e-12, atol=1e-12)


def test_representation_tells_rank_and_capacity() -> None:
    model, layer = adapt(nn.Linear(6, 5))
    layer.lora_keep[1] = False
    assert "SVDLinear(in_features=6, out_features=5, bias=True, rank=3/4)" in repr(model)


def test_moving_and_casting_take_the_adapter_along() -> None:
    model, layer = adapt(nn.Linear(6, 5))
    model.double()
    assert (layer.lora_A.dtype, layer.lora_keep.dtype) == (F64, torch.bool)
    model.to("meta")
    assert layer.lora_keep.device.type == layer.lora_E.device.type == "meta"


def test_two_models_of_one_subclass_share_one_adapter_class() -> None:
    _, one = adapt(BartScaledWordEmbedding(10, 6, 1))
    _, two = adapt(BartScaledWordEmbedding(10, 6, 1))
    assert type(one) is type(two)
    assert type(one).__name__ == "SVDBartScaledWordEmbedding"


def test_a_module_used_at_two_places_is_adapted_at_both() -> None:
    shared = nn.Linear(5, 5, dtype=F64)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    adalora.inject(model, adalora.AdaLoraConfig(init_r=R, target_r=2))
    assert [name for name, _ in named_adapters(model)] == ["0"]
    assert isinstance(model[0], SVDLinear)
    assert model[2] is model[0]
    with torch.no_grad():
        model[0].lora_E.fill_(1.0)
    x = torch.randn(3, 5, dtype=F64)
    before = model(x).detach()
    adalora.merge(model)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


class Tied(nn.Module):
    """A decoder whose head is the transposed embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


def test_adapting_one_of_two_tied_modules_leaves_the_other_alone_and_refuses_to_merge() -> None:
    model = Tied().double()
    h = torch.randn(3, 6, dtype=F64)
    before = model.head(h).detach()
    adalora.inject(model, adalora.AdaLoraConfig(target_modules=["embed"], init_r=R, target_r=2))
    with torch.no_grad():
        model.embed.lora_E.fill_(1.0)
    assert torch.equal(model.head(h), before)
    assert model.head.weight is model.embed.weight
    weight = model.embed.weight.detach().clone()
    with pytest.raises(InjectionError, match="cannot merge 'embed': its weight is tied to another module"):
        adalora.merge(model)
    assert torch.equal(model.embed.weight, weight)
    assert not model.embed.merged


def test_forward_hooks_and_training_mode_survive_conversion() -> None:
    base, calls = nn.Linear(6, 5), []
    base.register_forward_hook(lambda *_: calls.append(1))
    base.eval()
    model, layer = adapt(base)
    model(torch.randn(2, 6))
    assert (calls, layer.training) == ([1], False)


@pytest.mark.slow
def test_a_compiled_model_runs_and_trains() -> None:
    model = adalora.inject(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), adalora.AdaLoraConfig(init_r=R, target_r=2)
    )
    with torch.no_grad():
        for _, module in named_adapters(model):
            module.lora_E.normal_()
    x = torch.randn(4, 6)
    with warnings.catch_warnings():
        # torch's own compiler on this Python.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        compiled = torch.compile(model)
        y = compiled(x)
        y.square().sum().backward()
    compiled_grads = [p.grad.clone() for p in adalora.adapter_parameters(model)]
    model.zero_grad()
    expected = model(x)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(compiled_grads, adalora.adapter_parameters(model), strict=True):
        torch.testing.assert_close(one, other.grad, rtol=1e-4, atol=1e-5)


@each_kind
def test_merged_evaluates_in_the_weights_and_gives_back_the_same_bits_in_the_same_memory(case: Case) -> None:
    base, x = case[0]()
    model, layer = adapt(base.double())
    before, memory = layer.weight.detach().clone(), layer.weight.data_ptr()
    expected = model(x).detach()
    with adalora.merged(model):
        assert layer.merged
        assert layer.base_weight is not None
        assert layer.base_weight.data_ptr() == memory  # stepped aside, not copied
        torch.testing.assert_close(model(x).detach(), expected, rtol=1e-12, atol=1e-12)
    assert not layer.merged
    assert (torch.equal(layer.weight, before), layer.weight.data_ptr()) == (True, memory)
    adalora.merge(model)
    with adalora.merged(model):
        pass
    assert layer.merged  # as it was found
