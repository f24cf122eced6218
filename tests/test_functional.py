"""The layer in one step against the equations: values, gradients, dtypes, and everything that wraps a layer."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adalora
from adalora import functional
from adalora.functional import adapted_linear, keep_mask, low_rank_linear
from adalora.injection import named_adapters

F64 = torch.float64
OUT, IN, R, S = 7, 5, 3, 1.7
Factors = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(params=["split", "split, narrows", "merged"])
def graph(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Either graph, whatever the number of tokens; a layer that narrows keeps diag(E) Bᵀ for backward."""
    monkeypatch.setattr(functional, "_merging_pays", lambda tokens, weight: request.param == "merged")
    if request.param == "split, narrows":
        monkeypatch.setitem(globals(), "OUT", 4)
    name: str = request.param
    return name


def factors(dtype: torch.dtype = F64, rank: int = R) -> Factors:
    shapes = ((rank, IN), (rank, 1), (OUT, rank))
    A, E, B = (torch.randn(shape, dtype=F64).to(dtype).requires_grad_() for shape in shapes)
    return A, E, B


def slow(x: Tensor, weight: Tensor, bias: Tensor | None, three: Factors, scaling: float = S) -> Tensor:
    return F.linear(x, weight, bias) + low_rank_linear(x, *three, scaling)


def inputs(shape: tuple[int, ...] = (2, 4), dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(*shape, IN, dtype=F64).to(dtype).requires_grad_()
    return x, torch.randn(OUT, IN, dtype=F64).to(dtype), torch.randn(OUT, dtype=F64).to(dtype)


def gradients(output: Tensor, wanted: list[Tensor], seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(output.shape, generator=generator, dtype=F64).to(output.dtype)
    return list(torch.autograd.grad((output * weights).sum(), wanted))


@pytest.mark.usefixtures("graph")
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(), (6,), (2, 4), (2, 1, 3)], ids=str)
def test_gradients_are_the_derivatives(shape: tuple[int, ...], with_bias: bool) -> None:
    x, weight, bias = inputs(shape)
    three = factors()
    bias = bias.requires_grad_() if with_bias else None

    def layer(x: Tensor, A: Tensor, E: Tensor, B: Tensor, *b: Tensor) -> Tensor:
        return adapted_linear(x, weight, b[0] if b else None, (A, E, B), S)

    assert torch.autograd.gradcheck(layer, (x, *three, *([bias] if with_bias else [])))


@pytest.mark.usefixtures("graph")
@pytest.mark.parametrize("layout", ["plain", "transposed input", "strided input", "transposed weight"])
def test_output_and_gradients_equal_the_slow_path(layout: str) -> None:
    x, weight, bias = inputs((4, 6))
    if layout == "transposed input":
        x = x.detach().transpose(0, 1).requires_grad_()
    elif layout == "strided input":
        x = torch.randn(4, 6, 2 * IN, dtype=F64)[..., ::2].requires_grad_()
    elif layout == "transposed weight":
        weight = weight.t().contiguous().t()
    three = factors()
    fast, twin = adapted_linear(x, weight, bias, three, S), slow(x, weight, bias, three)
    torch.testing.assert_close(fast, twin, rtol=1e-13, atol=1e-13)
    for own, other in zip(gradients(fast, [x, *three]), gradients(twin, [x, *three]), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)
        assert own.shape == other.shape


@pytest.mark.usefixtures("graph")
def test_each_triplet_obeys_the_identity_of_its_three_gradients() -> None:
    """λ ∂λ = ⟨p, ∂p⟩ = ⟨q, ∂q⟩, because only the product of the three counts."""
    x, weight, bias = inputs((30,))
    A, E, B = three = factors()
    grad_A, grad_E, grad_B = gradients(adapted_linear(x, weight, bias, three, S).tanh(), [*three])
    of_E = (E * grad_E).view(-1)
    torch.testing.assert_close((A * grad_A).sum(1), of_E, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((B * grad_B).sum(0), of_E, rtol=1e-12, atol=1e-12)
    assert float(of_E.detach().abs().min()) > 1e-3


@pytest.mark.usefixtures("graph")
def test_at_lambda_zero_the_output_is_the_base_bit_for_bit_and_only_lambda_learns() -> None:
    x, weight, bias = inputs()
    A, _, B = factors()
    E = torch.zeros(R, 1, dtype=F64, requires_grad=True)
    output = adapted_linear(x, weight, bias, (A, E, B), S)
    assert torch.equal(output, F.linear(x, weight, bias))
    grad_A, grad_E, grad_B = gradients(output, [A, E, B])
    assert (float(grad_A.abs().max()), float(grad_B.abs().max())) == (0.0, 0.0)
    assert float(grad_E.abs().min()) > 0


@pytest.mark.usefixtures("graph")
@pytest.mark.parametrize("wanted", list(product([True, False], repeat=4)), ids=str)
def test_only_what_needs_a_gradient_gets_one(wanted: tuple[bool, ...]) -> None:
    if not any(wanted):
        return
    x, weight, bias = inputs()
    everything = [x, *factors()]
    for tensor, wants in zip(everything, wanted, strict=True):
        tensor.requires_grad_(wants)
    x, *three = everything
    chosen = [tensor for tensor, wants in zip(everything, wanted, strict=True) if wants]
    A, E, B = three
    fast, twin = adapted_linear(x, weight, bias, (A, E, B), S), slow(x, weight, bias, (A, E, B))
    for own, other in zip(gradients(fast, chosen), gradients(twin, chosen), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("out,kept", [(OUT, {(R, 6)}), (4, {(R, 6), (R, 4)})], ids=["widens", "narrows"])
def test_kept_for_backward_are_the_projections_and_in_a_layer_that_does_not_widen_the_gated_factor(
    out: int, kept: set[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "OUT", out)
    monkeypatch.setattr(functional, "_merging_pays", lambda tokens, weight: False)
    (x, weight, bias), three, packed = inputs((6,)), factors(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        adapted_linear(x, weight, bias, three, S)
    own = {t.data_ptr() for t in (x, weight, bias, *three)}
    assert {tuple(t.shape) for t in packed if t.data_ptr() not in own} == kept


@pytest.mark.usefixtures("graph")
def test_nothing_that_was_saved_is_written_to() -> None:
    x, weight, bias = inputs()
    three = factors()
    before = [t.detach().clone() for t in (x, weight, bias, *three)]
    output = adapted_linear(x, weight, bias, three, S)
    first = torch.autograd.grad(output.sum(), [x, *three], retain_graph=True)
    second = torch.autograd.grad(output.sum(), [x, *three])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (x, weight, bias, *three), strict=True))


@pytest.mark.usefixtures("graph")
def test_a_second_derivative_is_refused() -> None:
    x, weight, bias = inputs()
    three = factors()
    (grad,) = torch.autograd.grad(adapted_linear(x, weight, bias, three, S).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.usefixtures("graph")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_lower_precision_stays_near_the_exact_result(dtype: torch.dtype, autocast: bool) -> None:
    """fp32 factors on a base of fewer bits, or under autocast: what 16 bits round is all that differs."""
    if autocast and dtype is torch.float32:
        return
    x, weight, bias = inputs((64,), torch.float32 if autocast else dtype)
    three = factors(torch.float32)
    exact = [t.detach().double().requires_grad_() for t in (x, *three)]
    with torch.autocast("cpu", dtype, enabled=autocast):
        output = adapted_linear(x, weight, bias, three, S)
    twin = slow(exact[0], weight.double(), bias.double(), (exact[1], exact[2], exact[3]))
    assert output.dtype is dtype
    tolerance = 8 * torch.finfo(dtype).eps
    assert float(((output.double() - twin).abs().max() / twin.abs().max()).detach()) <= tolerance
    for own, other in zip(gradients(output, [x, *three]), gradients(twin, exact), strict=True):
        assert float((own.double() - other).abs().max() / other.abs().max()) <= tolerance
    assert [t.dtype for t in gradients(adapted_linear(x, weight, bias, three, S), [*three])] == [torch.float32] * 3


def test_backward_inside_autocast_is_the_backward_outside() -> None:
    x, weight, bias = inputs((8,), torch.float32)
    three = factors(torch.float32)
    wanted = gradients(adapted_linear(x, weight, bias, three, S), [x, *three])
    output = adapted_linear(x, weight, bias, three, S)
    with torch.autocast("cpu", torch.bfloat16):
        own = gradients(output, [x, *three])
    assert all(torch.equal(a, b) for a, b in zip(own, wanted, strict=True))


@pytest.mark.usefixtures("graph")
def test_dropout_acts_on_the_increment_alone_and_has_its_own_derivative() -> None:
    x, weight, bias = inputs((50,))
    three = factors()
    torch.manual_seed(5)
    fast = adapted_linear(x, weight, bias, three, S, dropout=0.3)
    torch.manual_seed(5)
    mask, kept = keep_mask(x, 0.3)
    twin = F.linear(x, weight, bias) + low_rank_linear(x * mask / kept, *three, S)
    assert 0 < int(mask.sum()) < mask.numel()
    torch.testing.assert_close(fast, twin, rtol=1e-13, atol=1e-13)
    for own, other in zip(gradients(fast, [x, *three]), gradients(twin, [x, *three]), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", [1e-4, 0.05, 0.1, 0.5, 0.9, 0.999999])
def test_masks_keep_each_entry_with_the_stated_probability(dropout: float) -> None:
    """Five standard errors, over all entries and over each of the four that share a random number."""
    torch.manual_seed(0)
    mask, kept = keep_mask(torch.empty(400, 1000), dropout)
    assert abs(kept - (1 - dropout)) <= 2**-16
    assert set(mask.unique().tolist()) <= {0, 1}
    for part in (mask.view(-1), *(mask.view(-1)[lane::4] for lane in range(4))):
        error = (kept * (1 - kept) / part.numel()) ** 0.5
        assert abs(float(part.double().mean()) - kept) <= 5 * error


def test_entries_that_share_a_random_number_are_dropped_independently() -> None:
    torch.manual_seed(0)
    mask, kept = keep_mask(torch.empty(4 * 100_001), 0.5)  # an odd number of words
    centred = mask.view(-1, 4).double() - kept
    covariance = centred.T @ centred / len(centred)
    assert float((covariance - 0.25 * torch.eye(4, dtype=F64)).abs().max()) <= 5 * 0.25 / len(centred) ** 0.5
    assert keep_mask(torch.empty(3, 3), 0.5)[0].shape == (3, 3)


def test_merging_begins_where_the_benchmark_says() -> None:
    weight = torch.empty(768, 384)
    first = 8 * 768 * 384 // (768 + 384)
    assert functional.MERGE_FROM == 8
    assert [functional._merging_pays(tokens, weight) for tokens in (first - 1, first)] == [False, True]


def model_and_input(**options: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    adalora.inject(model, adalora.AdaLoraConfig(init_r=4, target_r=2, **options))
    with torch.no_grad():
        for _, module in named_adapters(model):
            module.lora_E.normal_()
    return model, torch.randn(8, 16)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output.square().mean().backward()
    return trained(model)


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert len(one) == 6
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does, for its own ends
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiles_as_one_graph(dropout: float) -> None:
    model, x = model_and_input(lora_dropout=dropout)
    torch.manual_seed(1)
    wanted = step(model, model(x))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    close(step(model, compiled(x)), wanted)
    assert torch._dynamo.explain(model)(x).graph_break_count == 0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, dropout: float) -> None:
    model, x = model_and_input(lora_dropout=dropout)
    x.requires_grad_()
    torch.manual_seed(1)
    wanted = step(model, model(x))
    torch.manual_seed(1)
    output = checkpoint(model, x, use_reentrant=reentrant)
    assert isinstance(output, Tensor)
    close(step(model, output), wanted)


def test_functional_call_and_torch_func_see_the_parameters_given_to_them() -> None:
    model, x = model_and_input()
    wanted = step(model, model(x))
    given = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)

    def loss(adapters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, given | adapters, (x,)).square().mean()

    own = torch.func.grad(loss)({name: given[name] for name in wanted})
    close(own, wanted)
    leaves = {name: value.requires_grad_() for name, value in given.items() if name in wanted}
    close(dict(zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values())), strict=True)), wanted)


def test_a_weight_that_trains_or_another_dtype_takes_the_slow_path() -> None:
    model, x = model_and_input()
    slow_model, _ = model_and_input()
    wanted = step(model, model(x))
    slow_model[0].weight.requires_grad_()
    found = step(slow_model, slow_model(x))
    assert float(found.pop("0.weight").abs().max()) > 0
    close(found, wanted)
    assert model(x).grad_fn.name() == "_AdaptedLinearBackward"
    slow_model[2].weight.requires_grad_()
    assert slow_model(x).grad_fn.name() == "AddBackward0"


def test_dropout_takes_any_layout_also_where_the_mask_has_the_layout_of_its_input(monkeypatch: Any) -> None:
    """On other devices the mask is made like x; a permuted one must not meet a view."""
    monkeypatch.setattr(
        functional, "keep_mask", lambda x, p: (torch.empty_like(x, dtype=torch.uint8).bernoulli_(1 - p), 1 - p)
    )
    x = torch.randn(2, IN, 4, dtype=F64).transpose(1, 2).requires_grad_()
    _, weight, bias = inputs()
    (grad,) = gradients(adapted_linear(x, weight, bias, factors(), S, dropout=0.5), [x])
    assert grad.shape == x.shape


def test_a_layer_without_inputs_gives_its_bias() -> None:
    A, E, B = (torch.randn(shape) for shape in ((R, 0), (R, 1), (OUT, R)))
    output = adapted_linear(torch.empty(3, 0), torch.empty(OUT, 0), torch.ones(OUT), (A, E, B), S)
    assert torch.equal(output, torch.ones(3, OUT))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_can_be_saved(tmp_path: Any) -> None:
    model, x = model_and_input()
    torch.jit.trace(model, x).save(str(tmp_path / "traced.pt"))
    torch.testing.assert_close(torch.jit.load(str(tmp_path / "traced.pt"))(x), model(x))


def test_the_meta_device_gives_shapes() -> None:
    model, x = model_and_input(lora_dropout=0.1)
    assert model.to("meta")(x.to("meta")).shape == (8, 16)


@pytest.mark.parametrize("kind", [nn.Linear(6, 5), nn.Conv2d(6, 5, 1)], ids=["linear", "conv"])
def test_merging_between_forward_and_backward_raises(kind: nn.Module) -> None:
    model = nn.Sequential(nn.Tanh(), kind)
    adalora.inject(model, adalora.AdaLoraConfig(target_modules=["1"], init_r=2, target_r=1))
    x = torch.randn(2, 6, 3, 3) if isinstance(kind, nn.Conv2d) else torch.randn(2, 6)
    output = model(x.requires_grad_())
    adalora.merge(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    output = model(x)
    adalora.unmerge(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
