"""Data-driven starts: directions from gradients or inputs of a few batches, with Λ = 0, so that nothing changes yet.

With G (out, in) the mean weight gradient of an adapted layer, P ← -U_r and Q ← V_rᵀ of its leading singular vectors.
Then ∂L/∂λ_i = -s·σ_i(G), the steepest that r orthonormal pairs allow, where a random pair has about
s·‖G‖_F / √(out·in); the sign lets descent make λ positive, which singular values are.

`init_lora_weights="gradient"` or `"activation"` asks for one of them. In a Trainer `AdaLoraCallback` makes it; in other
loops call it between `inject` and the first step, which is refused without it. After "gaussian" and "orthogonal" either
may be called, and need not be; after "lora", whose Λ is 1, neither can.

G is sketched, never formed (`sketch`), in a few passes over few batches; one would do at a larger error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .basis import thin_qr
from .errors import TrainingError
from .gathering import refuse_sharded
from .injection import adapter_root, named_adapters
from .layers import SVDAdapter, SVDDense
from .pending import start_made
from .sketch import Listener, Sketch, listening, undisturbed

PASSES = 4  # over the batches: onto one side, onto the other, and once more each, which is a power iteration

_Directions = tuple[Tensor | None, Tensor, Tensor]  # P (out, l) if found, Q (in, l), and whether each l counts


def gradient_start_(
    model: nn.Module,
    batches: Iterable[Any],
    loss_of: Callable[[Any, Any], Tensor],
    *,
    oversampling: int = 8,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Turn P and Q of each dense adapted layer to the leading singular vectors of its mean gradient over `batches`.

    `loss_of(model, batch)` returns the scalar loss, for example `lambda model, batch: model(**batch).loss`. Four
    passes, in evaluation mode, each with torch's generators at `seed`; `batches` is read once and held. Returns
    σ (r,) of the mean gradient for those layers, by name: the prior importance of their triplets. Directions beyond
    the rank of G, and all of other layers, are what was there, made orthonormal.

    Nothing but lora_A and lora_B changes. Raises TrainingError, with nothing changed, if Λ is not zero, for frozen or
    merged adapters, no batches, a loss that cannot be differentiated, gradients that are not finite, and for
    DistributedDataParallel: call it before wrapping, which then makes the processes equal.
    """
    modules, dense = _adapters(model)
    leaves = [module.lora_E for module in modules.values()]
    with undisturbed(model, seed) as begin:
        held, sketches = _held(batches), _sketches(dense, oversampling, seed, square=False)

        def visit(batch: Any) -> None:
            with torch.enable_grad():
                loss = _checked(loss_of(model, batch))
                # Not backward(): parameters keep their gradients, and hooks on those stay silent.
                torch.autograd.grad(loss / len(held), leaves, allow_unused=True)

        listeners = {name: _of_gradients(sketch) for name, sketch in sketches.items()}
        _pass_over(held, visit, begin, dense, sketches, listeners)
    found = {name: sketch.triplets() for name, sketch in sketches.items()}
    _place_(modules, {name: (-U, V, _counts(values, dense[name])) for name, (U, values, V) in found.items()})
    start_made(adapter_root(model), "gradient")
    return {name: _prior(values, dense[name]) for name, (_, values, _) in found.items()}


def activation_start_(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[Any, Any], Any],
    *,
    oversampling: int = 8,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Turn Q of each dense adapted layer to the principal components of its whitened inputs over `batches`.

    Each feature is brought to mean 0 and variance 1 first, else a few outlier features are all that is found. With v_i
    the leading eigenvectors of the correlations and D the deviations, Q spans the D⁻¹v_i, so that Qx are the
    components up to a linear map and an offset. P is what was there, made orthonormal, as are both in other layers.
    `forward(model, batch)` runs the model; what it returns is not used. Five passes. Returns the eigenvalues (r,) by
    name; all of them together would be the number of features. State and errors as in `gradient_start_`.
    """
    modules, dense = _adapters(model)
    with undisturbed(model, seed) as begin, torch.no_grad():
        held, sketches = _held(batches), _sketches(dense, oversampling, seed, square=True)
        moments = {name: m.lora_A.new_zeros(3, m.shape[1], dtype=torch.float64) for name, m in dense.items()}

        def visit(batch: Any) -> None:
            forward(model, batch)

        with listening(dense, {name: _of_moments(total) for name, total in moments.items()}):
            for batch in held:
                visit(batch)
        scales = {name: _whitener(total, dense[name].lora_A.dtype) for name, total in moments.items()}

        listeners = {name: _of_inputs(sketches[name], *scales[name]) for name in dense}
        _pass_over(held, visit, begin, dense, sketches, listeners)
    found = {name: sketch.triplets() for name, sketch in sketches.items()}
    turned = {name: scales[name][1].unsqueeze(1) * V for name, (_, _, V) in found.items()}
    _place_(modules, {n: (None, turned[n], _counts(values, dense[n])) for n, (_, values, _) in found.items()})
    start_made(adapter_root(model), "activation")
    return {name: _prior(values, dense[name]) for name, (_, values, _) in found.items()}


def _of_gradients(sketch: Sketch) -> Listener:
    def hear(x: Tensor, y: Tensor) -> None:
        if y.requires_grad:
            y.register_hook(lambda gradient: sketch.add(gradient, x))  # type: ignore[no-untyped-call]

    return hear


def _of_moments(total: Tensor) -> Listener:
    """Adds up number, sum and sum of squares of each feature, (3, in)."""

    def hear(x: Tensor, _: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).double()
        total.add_(torch.stack([torch.ones_like(rows).sum(0), rows.sum(0), rows.square().sum(0)]))

    return hear


def _of_inputs(sketch: Sketch, mean: Tensor, inverse: Tensor, count: Tensor) -> Listener:
    def hear(x: Tensor, _: Tensor) -> None:
        white = (x - mean) * inverse
        sketch.add(white / count, white)

    return hear


def _adapters(model: nn.Module) -> tuple[dict[str, SVDAdapter], dict[str, SVDDense]]:
    """All adapted modules of `model` with a triplet, and those of them that are one matrix product."""
    refuse_sharded(model, "a start cannot reach its factors", "call it before fully_shard")
    if isinstance(model, DataParallel | DistributedDataParallel):
        raise TrainingError(
            f"{type(model).__name__} keeps its processes equal through gradients, which a start does not use; call it "
            "on the model itself, before wrapping."
        )
    modules = {name: module for name, module in named_adapters(adapter_root(model)) if module.capacity}
    for name, module in modules.items():
        if module.lora_E.detach().any():
            raise TrainingError(
                f"Λ of {name!r} is not zero, so new directions would change the model: a start comes before training, "
                'and to another init_lora_weights than "lora".'
            )
        if module.merged or not module.adapter_enabled:
            raise TrainingError(f"{name!r} is merged or disabled; a start needs the adapter in place.")
        if not module.lora_E.requires_grad:
            raise TrainingError(f"{name}.lora_E is frozen; a start is for an adapter that will train.")
    dense = {name: module for name, module in modules.items() if isinstance(module, SVDDense)}
    if not dense:
        raise TrainingError("no adapted module is a linear layer, so there is nothing to start from; leave it out.")
    return modules, dense


def _held(batches: Iterable[Any]) -> list[Any]:
    held = list(batches)
    if not held:
        raise TrainingError("a start needs at least one batch, got none; a generator that was read before is empty.")
    return held


def _sketches(modules: Mapping[str, SVDAdapter], oversampling: int, seed: int, square: bool) -> dict[str, Sketch]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Sketch(
            (m.shape[1], m.shape[1]) if square else m.shape, m.capacity + oversampling, m.lora_A.detach(), generator
        )
        for name, m in modules.items()
    }


def _pass_over(
    held: list[Any],
    visit: Callable[[Any], None],
    begin: Callable[[], None],
    modules: Mapping[str, nn.Module],
    sketches: Mapping[str, Sketch],
    listeners: Mapping[str, Listener],
) -> None:
    for number in range(PASSES):
        for sketch in sketches.values() if number else ():
            sketch.turn()
        begin()
        with listening(modules, listeners):
            for batch in held:
                visit(batch)
        finite = [bool(value) for value in torch.stack([s.total.isfinite().all().cpu() for s in sketches.values()])]
        for name, fine in zip(sketches, finite, strict=True):
            if not fine:
                raise TrainingError(
                    f"what passes through {name!r} is not finite, so it has no directions; look for the batch with NaN "
                    "or Inf in it, or use more bits than the run overflowed."
                )


def _checked(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise TrainingError(
            f"loss_of returned {found}; it must return the scalar loss, attached to the graph of the adapted model."
        )
    return loss


def _whitener(total: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and 1 / deviation (in,), 0 for a feature that does not vary, and the count, from (3, in) sums of powers."""
    count = total[0].clamp_min(1.0)
    mean, square = total[1] / count, total[2] / count
    variance = square - mean.square()
    inverse = torch.where(variance > 1e-10 * square, variance.abs().rsqrt(), 0.0)
    return mean.to(dtype), inverse.to(dtype), count[0].to(dtype)


def _counts(values: Tensor, module: SVDAdapter) -> Tensor:
    """Whether a singular value (l,) is more than the rounding of sums in the dtype of `module`."""
    return values > values.amax() * torch.finfo(module.lora_A.dtype).eps * max(module.shape)


def _prior(values: Tensor, module: SVDAdapter) -> Tensor:
    values = values[: module.capacity]
    return F.pad(values, (0, module.capacity - len(values))).to(module.lora_E.dtype)


def _place_(modules: Mapping[str, SVDAdapter], found: Mapping[str, _Directions]) -> None:
    with torch.no_grad():
        for name, module in modules.items():
            P, Q, counts = found.get(name, (None, None, None))
            A, B = module.lora_A.detach(), module.lora_B.detach()
            empty = (A == 0).all(0)  # the row of a padding token stays zero
            A.copy_(torch.where(empty, 0.0, _orthonormal(A.T.double(), Q, counts).T))
            B.copy_(_orthonormal(B.double(), P, counts))


def _orthonormal(columns: Tensor, first: Tensor | None, counts: Tensor | None) -> Tensor:
    """Columns (n, r) of length 1, orthogonal as far as there is room, that begin with what counts of first (n, l)."""
    columns = F.normalize(columns, dim=0)
    if first is not None and counts is not None:
        number = min(first.shape[1], columns.shape[1])
        columns[:, :number] = torch.where(counts[:number], F.normalize(first[:, :number], dim=0), columns[:, :number])
    Q, _ = thin_qr(columns)
    return torch.cat([Q, columns[:, Q.shape[1] :]], 1)
