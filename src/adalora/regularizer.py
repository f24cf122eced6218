"""The orthogonality regularizer R(P, Q) of equation 4, as a loss and as a closed-form gradient.

Form "norm" is the authors' code (`compute_orth_regu`): the mean over all A and B of the unsquared Frobenius
norm of the Gram matrix minus identity. Form "squared" is the paper's sum of squared norms. They differ in
scale by the number of matrices and in shape by the norm itself, so their weights do not compare.

Of sharded matrices each process multiplies the columns that it holds; the Gram matrices are added up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .config import OrthForm
from .injection import adapter_config, adapter_root, named_adapters
from .layers import SVDAdapter
from .sharding import add_up_, around, is_sharded, local, place, turned, whole


def orthogonality_penalty(model: nn.Module) -> Tensor:
    """R(P, Q) of all adapters of `model`, without its weight; scalar, differentiable.

    RankAllocator already adds the weighted gradient in each step. This is for reports, and for loops that
    want the term in the loss itself with `orth_reg_weight=0`; of a sharded model every process calls it, and it has no
    gradient. Raises InjectionError without an adapter.
    """
    modules = [module for _, module in named_adapters(adapter_root(model)) if module.capacity]
    rows = [matrix for module in modules for matrix in (_all(module.lora_A), _all(module.lora_B).T)]
    return penalty(rows, adapter_config(model).orth_reg_form)


def add_penalty_gradient_(
    modules: Iterable[SVDAdapter], form: OrthForm, weight: float | Tensor, maximized: Collection[int] = ()
) -> None:
    """Add weight · ∂R to the gradients of every lora_A and lora_B, which must have at least one triplet.

    A parameter that the task left without a gradient gets one: the regularizer is part of its objective. A
    frozen one gets none. Those whose id is in `maximized` get it with the sign that lets R fall too.
    """
    parameters = [p for module in modules for p in (module.lora_A, module.lora_B)]
    gradients = _all_gradients(parameters, form, weight)
    own: list[Tensor] = []
    added: list[Tensor] = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if id(parameter) in maximized:
            gradient = -gradient
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = around(gradient.clone(), parameter)
        else:
            own.append(local(parameter.grad))
            added.append(gradient)
    if own:
        torch._foreach_add_(own, added)


def penalty(matrices: Sequence[Tensor], form: OrthForm) -> Tensor:
    """Penalty of matrices (r, d); 0 for none."""
    if not matrices:
        return torch.zeros(())
    device = matrices[0].device  # a model may live on several
    norms = torch.stack([torch.linalg.matrix_norm(_excess(_gram(matrix))).to(device) for matrix in matrices])
    return norms.mean() if form == "norm" else norms.square().sum()


def penalty_gradients(
    matrices: Sequence[Tensor],
    form: OrthForm,
    weight: float | Tensor = 1.0,
    count: int | None = None,
    add_up: Callable[[list[Tensor]], list[Tensor]] | None = None,
) -> list[Tensor]:
    """weight · ∂penalty/∂M for each M (r, d), with C = M Mᵀ - I: 2 C M / (n ‖C‖) for "norm", 4 C M for "squared".

    Where C is 0 so is the gradient. Equal shapes are computed together, in memory as they lie: what comes back has
    the strides of its matrix. Nothing is added to any graph. n is `count`, where these are not all matrices. Where
    they are some columns of each, `add_up` turns their products, in order, into those of the whole matrices.
    """
    gradients: list[Tensor] = [torch.empty(0)] * len(matrices)
    alike: dict[tuple[torch.Size, torch.device, torch.dtype, bool], list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        alike[matrix.shape, matrix.device, matrix.dtype, matrix.is_contiguous()].append(index)
    with torch.no_grad():
        stacks = [
            torch.stack([matrices[index] if upright else matrices[index].T for index in indices])
            for (*_, upright), indices in alike.items()
        ]
        grams = [_gram(s if upright else s.mT) for (*_, upright), s in zip(alike, stacks, strict=True)]  # (k, r, r)
        if add_up is not None:
            grams = _regrouped(grams, list(alike.values()), add_up)
        for (*_, upright), indices, stacked, gram in zip(alike, alike.values(), stacks, grams, strict=True):
            excess = _scaled(_excess(gram), form, weight, count or len(matrices))
            together = excess @ stacked if upright else stacked @ excess  # C is symmetric
            for index, gradient in zip(indices, together, strict=True):
                gradients[index] = gradient if upright else gradient.T
    return gradients


def _all_gradients(parameters: Sequence[Tensor], form: OrthForm, weight: float | Tensor) -> list[Tensor]:
    """The gradients of lora_A and lora_B in turn; of a sharded one, of the part that is here."""
    gradients: list[Tensor] = [torch.empty(0)] * len(parameters)
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, parameter in enumerate(parameters):
        where = place(parameter)
        groups[where and where.group].append(index)
    for group, indices in groups.items():
        own = [parameters[index] for index in indices]
        parts, long = [local(p).detach() for p in own], [1 if index % 2 == 0 else 0 for index in indices]
        if group is not None:
            parts = turned(own, parts, long, back=False)
        rows = [part if dim else part.T for part, dim in zip(parts, long, strict=True)]
        add_up = None if group is None else partial(_added_up, group=group)
        found = penalty_gradients(rows, form, weight, len(parameters), add_up)
        found = [part if dim else part.T for part, dim in zip(found, long, strict=True)]
        if group is not None:
            found = turned(own, found, long, back=True)
        for index, gradient in zip(indices, found, strict=True):
            gradients[index] = gradient
    return gradients


def _added_up(grams: list[Tensor], group: Any) -> list[Tensor]:
    joined = add_up_(torch.cat([gram.reshape(-1) for gram in grams]), group)
    parts = torch.split(joined, [gram.numel() for gram in grams])
    return [part.view_as(gram) for part, gram in zip(parts, grams, strict=True)]


def _regrouped(
    stacks: list[Tensor], groups: list[list[int]], add_up: Callable[[list[Tensor]], list[Tensor]]
) -> list[Tensor]:
    """`add_up` of the members of `stacks` in their own order: how they are stacked may differ between processes."""
    members = dict(zip([i for group in groups for i in group], [m for s in stacks for m in s.unbind()], strict=True))
    order = sorted(members)
    total = dict(zip(order, add_up([members[index] for index in order]), strict=True))
    return [torch.stack([total[index] for index in group]) for group in groups]


def _scaled(excess: Tensor, form: OrthForm, weight: float | Tensor, count: int) -> Tensor:
    """The factor of M in the gradient, (k, r, r), from C."""
    if form == "squared":
        return excess * (4.0 * weight)
    norm = torch.linalg.vector_norm(excess, dim=(-2, -1), keepdim=True)
    return excess * ((2.0 * weight / count) / norm.clamp_min(torch.finfo(norm.dtype).tiny))


def _gram(matrix: Tensor) -> Tensor:
    """M Mᵀ for M (..., r, d)."""
    return matrix @ matrix.mT


def _excess(gram: Tensor) -> Tensor:
    """M Mᵀ - I."""
    return gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def _all(parameter: Tensor) -> Tensor:
    return whole(parameter) if is_sharded(parameter) else parameter
