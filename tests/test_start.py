"""Data-driven starts: the true leading directions, the steepest slope in Λ, and a model that is as it was."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adalora
import tiny
from adalora import AdaLoraConfig, inject
from adalora.errors import TrainingError
from adalora.injection import named_adapters
from adalora.layers import SVDAdapter, SVDDense
from adalora.start import activation_start_, gradient_start_

F64 = torch.float64
IN, OUT, RANK = 20, 14, 4
SPECTRUM = [5.0, 4.0, 3.0, 2.0, *(0.2 / (1 + k) for k in range(10))]


def adapted_line(r: int = RANK, dtype: torch.dtype = F64, **choices: Any) -> tuple[nn.Module, SVDAdapter]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT, dtype=dtype))
    inject(model, AdaLoraConfig(init_r=r, target_r=r, target_modules=["0"], lora_alpha=3.0, **choices))
    return model, next(module for _, module in named_adapters(model))


def known_gradient() -> tuple[Tensor, Tensor, Tensor]:
    """U (out, out), V (in, out), G = U diag(SPECTRUM) Vᵀ."""
    generator = torch.Generator().manual_seed(3)
    U = torch.linalg.qr(torch.randn(OUT, OUT, dtype=F64, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(IN, OUT, dtype=F64, generator=generator)).Q
    return U, V, U @ torch.diag(torch.tensor(SPECTRUM, dtype=F64)) @ V.T


def batches_of(G: Tensor, number: int = 4) -> list[tuple[Tensor, Tensor]]:
    """(x, c) with Σ cᵀx = number · G: of the loss Σ c·y, the mean gradient is G."""
    eye = torch.eye(IN, dtype=G.dtype)
    return [(rows, rows @ G.T * number) for rows in eye.split(IN // number)]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, c = batch
    return (model(x) * c).sum()


def slopes(model: nn.Module, module: SVDAdapter, batches: list[Any]) -> Tensor:
    losses = [loss_of(model, batch) for batch in batches]
    [gradient] = torch.autograd.grad(torch.stack(losses).mean(), [module.lora_E])
    return gradient.view(-1)


def sines(found: Tensor, true: Tensor) -> float:
    """The sine of the largest principal angle between the spans of orthonormal columns."""
    return float(torch.linalg.matrix_norm(found - true @ (true.T @ found), 2))


def test_directions_span_the_leading_singular_subspaces_and_slopes_are_singular_values() -> None:
    U, V, G = known_gradient()
    model, module = adapted_line()
    batches = batches_of(G)
    rows = module.lora_A.detach().clone(), module.lora_B.detach().clone()
    with torch.no_grad():  # a random orthonormal start, to compare with
        module.lora_A.copy_(torch.linalg.qr(rows[0].T).Q.T)
        module.lora_B.copy_(torch.linalg.qr(rows[1]).Q)
    at_random = slopes(model, module, batches).abs()
    prior = gradient_start_(model, batches, loss_of)
    P, Q = module.lora_B.detach(), module.lora_A.detach().T
    assert sines(P, U[:, :RANK]) < 1e-4
    assert sines(Q, V[:, :RANK]) < 1e-4
    for columns in (P, Q):
        torch.testing.assert_close(columns.T @ columns, torch.eye(RANK, dtype=F64))
    sigma = torch.tensor(SPECTRUM[:RANK], dtype=F64)
    torch.testing.assert_close(prior["0"], sigma, rtol=1e-6, atol=0)
    torch.testing.assert_close(slopes(model, module, batches), -module.scaling * sigma, rtol=1e-4, atol=0)
    assert float(at_random.square().mean().sqrt()) < 0.25 * module.scaling * float(sigma.square().mean().sqrt())
    assert not module.delta_weight().any()


@pytest.mark.parametrize("oversampling", [0, 8])
def test_a_flat_spectrum_loses_little(oversampling: int) -> None:
    """No gap at all: the energy found is near the most there is."""
    generator = torch.Generator().manual_seed(1)
    G = torch.randn(OUT, IN, dtype=F64, generator=generator)
    model, module = adapted_line()
    gradient_start_(model, batches_of(G), loss_of, oversampling=oversampling)
    found = slopes(model, module, batches_of(G)).square().sum() / module.scaling**2
    assert float(found) > (0.99 if oversampling else 0.9) * float(torch.linalg.svdvals(G)[:RANK].square().sum())


def test_single_precision_finds_the_same() -> None:
    U, V, G = known_gradient()
    model, module = adapted_line(dtype=torch.float32)
    gradient_start_(model, batches_of(G.float()), loss_of)
    assert sines(module.lora_B.detach().double(), U[:, :RANK]) < 1e-4
    assert sines(module.lora_A.detach().T.double(), V[:, :RANK]) < 1e-4


def test_beyond_the_rank_of_the_gradient_directions_stay_random_and_orthonormal() -> None:
    U, V, G = known_gradient()
    low = U[:, :2] @ torch.diag(torch.tensor([2.0, 1.0], dtype=F64)) @ V[:, :2].T
    for G, known in ((low, 2), (torch.zeros_like(low), 0)):
        model, module = adapted_line()
        old = F.normalize(module.lora_B.detach(), dim=0)
        prior = gradient_start_(model, batches_of(G), loss_of)["0"]
        B = module.lora_B.detach()
        assert int((prior > 1e-9).sum()) == known
        assert sines(B[:, :known], U[:, :2]) < 1e-9 if known else True
        torch.testing.assert_close(B.T @ B, torch.eye(RANK, dtype=F64))
        # The rest is the old columns less what the others have of them, not unit vectors of some axes.
        rest = old[:, known] - B[:, :known] @ (B[:, :known].T @ old[:, known])
        torch.testing.assert_close(B[:, known], rest / rest.norm())


def test_more_triplets_than_the_matrix_has_room_for() -> None:
    _, _, G = known_gradient()
    model, module = adapted_line(r=17)
    prior = gradient_start_(model, batches_of(G), loss_of)["0"]
    torch.testing.assert_close(prior[:OUT], torch.tensor(SPECTRUM, dtype=F64), rtol=1e-6, atol=0)
    assert prior[OUT:].tolist() == [0.0] * 3
    torch.testing.assert_close(module.lora_B.detach().norm(dim=0), torch.ones(17, dtype=F64))
    torch.testing.assert_close(module.lora_A.detach().norm(dim=1), torch.ones(17, dtype=F64))


class Everything(tiny.Net):
    """Layers of all kinds, dropout, a BatchNorm, a buffer that counts, and one layer that is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.unused = nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        x = self.embed(ids).unsqueeze(1)
        x = self.grouped(self.conv(x).tanh()).mean(3)
        return self.head(self.drop(self.norm(self.linear(x=self.line(x).mean(2)).relu_())).relu_())


TARGETS = ["embed", "conv", "grouped", "line", "linear", "unused"]


def everything() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    config = AdaLoraConfig(init_r=3, target_r=2, target_modules=TARGETS, modules_to_save=["head"], lora_dropout=0.1)
    model = inject(Everything(), config).train()
    model.conv.eval()  # modes differ
    return model, [torch.randint(0, 12, (4, 8)) for _ in range(3)]


def noisy(model: nn.Module, ids: Tensor) -> Tensor:
    """A loss that draws, as masking of tokens does."""
    return model((ids + torch.randint(0, 2, ids.shape)) % 12).square().mean()


@pytest.mark.parametrize("start", [gradient_start_, activation_start_])
def test_nothing_but_the_directions_changes(start: Any) -> None:
    model, batches = everything()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    before, modes = tiny.snapshot(model), {name: module.training for name, module in model.named_modules()}
    states = torch.get_rng_state(), random.getstate()
    start(model, batches, noisy)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    after = tiny.snapshot(model)
    changed = {key for key, value in after["state"].items() if not torch.equal(value, before["state"][key])}
    assert changed == {f"{name}.lora_{factor}" for name in TARGETS for factor in "AB"}
    for part in ("types", "trains", "ids", "attributes"):
        assert after[part] == before[part]
    assert {name: module.training for name, module in model.named_modules()} == modes
    for name, parameter in model.named_parameters():
        assert parameter.grad is None if grads[name] is None else torch.equal(parameter.grad, grads[name])
    assert not any(module._forward_hooks for module in model.modules())
    for name, module in named_adapters(model):
        A, B = module.lora_A.detach(), module.lora_B.detach()
        torch.testing.assert_close(B.T @ B, torch.eye(3), atol=1e-6, rtol=0)
        torch.testing.assert_close(A @ A.T, torch.eye(3), atol=1e-6, rtol=0)
        assert name != "embed" or not A[:, 0].any()  # the padding row


@pytest.mark.parametrize("start", [gradient_start_, activation_start_])
def test_the_seed_alone_decides(start: Any) -> None:
    found = []
    for noise, seed in ((0, 5), (1, 5), (2, 6)):
        model, batches = everything()
        torch.manual_seed(noise)
        prior = start(model, batches, noisy, seed=seed)
        found.append((prior["linear"], dict(named_adapters(model))["linear"].lora_A.detach().clone()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[2][0])  # another draw inside the loss


def test_a_layer_that_never_runs_has_no_prior() -> None:
    model, batches = everything()
    prior = gradient_start_(model, batches, noisy)
    assert set(prior) == {"linear", "unused"}
    assert prior["unused"].tolist() == [0.0, 0.0, 0.0]
    assert float(prior["linear"].min()) > 0


def test_a_language_model_starts_with_its_steepest_directions() -> None:
    """transformers, batches as dicts, GPT-2's Conv1D; every slope is -s·σ, and is that of the dense gradient."""
    model = adalora.inject(tiny.gpt2(), AdaLoraConfig(init_r=3, target_r=2, lora_dropout=0.5)).train()
    batches = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 40, (3, 2, 8))]
    prior = gradient_start_(model, batches, lambda model, batch: model(**batch).loss)
    model.eval()
    dense = {name: m for name, m in named_adapters(model) if isinstance(m, SVDDense)}
    assert set(prior) == set(dense) != set()
    leaves = [leaf for m in dense.values() for leaf in (m.lora_E, m.weight.requires_grad_())]
    gradients = iter(torch.autograd.grad(sum(model(**batch).loss for batch in batches) / 3, leaves))
    for name, module in dense.items():
        slope, G = next(gradients).view(-1), next(gradients)
        torch.testing.assert_close(slope, -module.scaling * prior[name], rtol=1e-4, atol=1e-7)
        true = torch.linalg.svdvals(G)[:3]
        torch.testing.assert_close(prior[name], true, rtol=0.02, atol=0)


def test_whitened_components_ignore_the_scale_of_a_feature() -> None:
    """Two outlier features and a common factor in the others: plain components would be the outliers."""
    model, module = adapted_line(r=2)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4000, IN, dtype=F64, generator=generator)
    factor = torch.randn(4000, 1, dtype=F64, generator=generator)
    x[:, 4:] += 2 * factor
    x[:, 0] = 500 * x[:, 0] + 3000
    x[:, 1] = 7.0  # and one that never varies
    scale = torch.logspace(-1, 1, IN, dtype=F64)
    prior = activation_start_(model, list((x * scale).split(500)), lambda model, batch: model(batch))["0"]
    white = (x - x.mean(0)) / x.std(0, correction=0).clamp_min(1e-9)
    values, vectors = torch.linalg.eigh(white.T @ white / 4000)
    torch.testing.assert_close(prior, values.flip(0)[:2], rtol=1e-3, atol=0)
    projected, score = (x * scale - (x * scale).mean(0)) @ module.lora_A.detach()[0], white @ vectors[:, -1]
    assert abs(float(torch.corrcoef(torch.stack([projected, score]))[0, 1])) > 0.9999
    assert float(module.lora_A.detach()[:, 1].abs().max()) < 1e-9


def broken(model: nn.Module, batch: Any) -> Tensor:
    return loss_of(model, batch) * float("nan")


def test_what_cannot_start_is_refused_with_nothing_changed() -> None:
    _, _, G = known_gradient()
    model, module = adapted_line()
    before, batches = tiny.snapshot(model), batches_of(G)
    empty: Iterator[Any] = iter(())
    for arguments, message in (
        ((empty, loss_of), "at least one batch"),
        ((batches, broken), "what passes through '0' is not finite"),
        ((batches, lambda model, batch: loss_of(model, batch).detach()), "a tensor of shape ()"),
        ((batches, lambda model, batch: model(batch[0])), r"a tensor of shape \(5, 14\)"),
        ((batches, lambda model, batch: 1.0), "a float"),
    ):
        with pytest.raises(TrainingError, match=message):
            gradient_start_(model, *arguments)
        tiny.assert_unchanged(model, before)
    with pytest.raises(TrainingError, match="before wrapping"):
        gradient_start_(nn.DataParallel(model), batches, loss_of)
    with adalora.disabled(model), pytest.raises(TrainingError, match="'0' is merged or disabled"):
        gradient_start_(model, batches, loss_of)
    module.lora_E.requires_grad_(False)
    with pytest.raises(TrainingError, match=r"0\.lora_E is frozen"):
        gradient_start_(model, batches, loss_of)
    module.lora_E.requires_grad_(True)
    with torch.no_grad():
        module.lora_E[1] = 1e-9
    with pytest.raises(TrainingError, match="Λ of '0' is not zero"):
        gradient_start_(model, batches, loss_of)
    convolution = inject(tiny.net(), AdaLoraConfig(init_r=2, target_r=1, target_modules=["conv"]))
    with pytest.raises(TrainingError, match="no adapted module is a linear layer"):
        activation_start_(convolution, batches, loss_of)
