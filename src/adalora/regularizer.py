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
    for index, gradient in enumerate(penalty_gradients(rows, form)):
        parameter = parameters[index]
        if not parameter.requires_grad:
            continue
        if id(parameter) in maximized:
            gradient = -gradient
        gradient = (gradient if index % 2 == 0 else gradient.T) * weight
        if parameter.grad is None:
            parameter.grad = gradient.contiguous()
        else:
            parameter.grad.add_(gradient)


def penalty(matrices: Sequence[Tensor], form: OrthForm) -> Tensor:
    """Penalty of matrices (r, d); 0 for none."""
    if not matrices:
        return torch.zeros(())
    norms = torch.stack([torch.linalg.matrix_norm(_excess(matrix)) for matrix in matrices])
    return norms.mean() if form == "norm" else norms.square().sum()


def penalty_gradients(matrices: Sequence[Tensor], form: OrthForm) -> list[Tensor]:
    """∂penalty/∂M for each M (r, d), with C = M Mᵀ - I: 2 C M / (n ‖C‖) for "norm", 4 C M for "squared".

    Where C is 0 so is the gradient. Equal shapes are computed together; nothing is added to any graph.
    """
    gradients: list[Tensor] = [torch.empty(0)] * len(matrices)
    by_shape: dict[tuple[torch.Size, torch.device], list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        by_shape[matrix.shape, matrix.device].append(index)
    with torch.no_grad():
        for indices in by_shape.values():
            stacked = torch.stack([matrices[index] for index in indices])  # (k, r, d)
            excess = _excess(stacked)  # (k, r, r)
            factor: Tensor | float = 4.0
            if form == "norm":
                norm = torch.linalg.matrix_norm(excess, keepdim=True)
                factor = 2.0 / (len(matrices) * norm.clamp_min(torch.finfo(norm.dtype).tiny))
            for index, gradient in zip(indices, (excess * factor) @ stacked, strict=True):
                gradients[index] = gradient
    return gradients


def _excess(matrix: Tensor) -> Tensor:
    """M Mᵀ - I for M (..., r, d)."""
    return matrix @ matrix.mT - torch.eye(matrix.shape[-2], dtype=matrix.dtype, device=matrix.device)
