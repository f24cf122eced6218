"""The orthogonality regularizer R(P, Q) of equation 4, as a loss and as a closed-form gradient.

Form "norm" is the authors' code (`compute_orth_regu`): the mean over all A and B of the unsquared Frobenius
norm of the Gram matrix minus identity. Form "squared" is the paper's sum of squared norms. They differ in
scale by the number of matrices and in shape by the norm itself, so their weights do not compare.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from .config import OrthForm
from .injection import adapter_config, adapter_root, named_adapters
from .layers import SVDAdapter


def orthogonality_penalty(model: nn.Module) -> Tensor:
    """R(P, Q) of all adapters of `model`, without its weight; scalar, differentiable.

    RankAllocator already adds the weighted gradient in each step. This is for reports, and for loops that
    want the term in the loss itself with `orth_reg_weight=0`. Raises InjectionError without an adapter.
    """
    modules = [module for _, module in named_adapters(adapter_root(model)) if module.capacity]
    rows = [matrix for module in modules for matrix in (module.lora_A, module.lora_B.T)]
    return penalty(rows, adapter_config(model).orth_reg_form)


def add_penalty_gradient_(
    modules: Iterable[SVDAdapter], form: OrthForm, weight: float | Tensor, maximized: Collection[int] = ()
) -> None:
    """Add weight · ∂R to the gradients of every lora_A and lora_B, which must have at least one triplet.

    A parameter that the task left without a gradient gets one: the regularizer is part of its objective. A
    frozen one gets none. Those whose id is in `maximized` get it with the sign that lets R fall too.
    """
    parameters = [p for module in modules for p in (module.lora_A, module.lora_B)]
    rows = [p.detach() if index % 2 == 0 else p.detach().T for index, p in enumerate(parameters)]
    gradients = [g if index % 2 == 0 else g.T for index, g in enumerate(penalty_gradients(rows, form, weight))]
    own: list[Tensor] = []
    added: list[Tensor] = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if id(parameter) in maximized:
            gradient = -gradient
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = gradient.clone()
        else:
            own.append(parameter.grad)
            added.append(gradient)
    if own:
        torch._foreach_add_(own, added)


def penalty(matrices: Sequence[Tensor], form: OrthForm) -> Tensor:
    """Penalty of matrices (r, d); 0 for none."""
    if not matrices:
        return torch.zeros(())
    norms = torch.stack([torch.linalg.matrix_norm(_excess(matrix)) for matrix in matrices])
    return norms.mean() if form == "norm" else norms.square().sum()


def penalty_gradients(matrices: Sequence[Tensor], form: OrthForm, weight: float | Tensor = 1.0) -> list[Tensor]:
    """weight · ∂penalty/∂M for each M (r, d), with C = M Mᵀ - I: 2 C M / (n ‖C‖) for "norm", 4 C M for "squared".

    Where C is 0 so is the gradient. Equal shapes are computed together, in memory as they lie: what comes back has
    the strides of its matrix. Nothing is added to any graph.
    """
    gradients: list[Tensor] = [torch.empty(0)] * len(matrices)
    alike: dict[tuple[torch.Size, torch.device, torch.dtype, bool], list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        alike[matrix.shape, matrix.device, matrix.dtype, matrix.is_contiguous()].append(index)
    with torch.no_grad():
        for (*_, upright), indices in alike.items():
            stacked = torch.stack([matrices[index] if upright else matrices[index].T for index in indices])
            excess = _excess(stacked if upright else stacked.mT)  # (k, r, r)
            if form == "norm":
                norm = torch.linalg.vector_norm(excess, dim=(-2, -1), keepdim=True)
                factor = (2.0 * weight / len(matrices)) / norm.clamp_min(torch.finfo(norm.dtype).tiny)
            else:
                factor = 4.0 * weight
            excess = excess * factor
            together = excess @ stacked if upright else stacked @ excess  # C is symmetric
            for index, gradient in zip(indices, together, strict=True):
                gradients[index] = gradient if upright else gradient.T
    return gradients


def _excess(matrix: Tensor) -> Tensor:
    """M Mᵀ - I for M (..., r, d)."""
    return matrix @ matrix.mT - torch.eye(matrix.shape[-2], dtype=matrix.dtype, device=matrix.device)
