"""The low-rank maps themselves, as functions of tensors.

Shapes: A (r, in) = Q of the paper, E (r, 1) = diagonal of Λ, B (out, r) = P, W (out, in) the frozen weight.

`low_rank_linear` and `low_rank_embedding` return s·ΔW applied to the input, as equation 3 reads: autograd does the
rest. `adapted_linear` is the whole layer in one step, with a backward written by hand that passes over the
activations as rarely as it can; the tests hold it against the former.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# On a CPU the product x·(W + s·ΔW)ᵀ is cheaper than two products from about this many times mn/(m+n) tokens on:
# `python -m benchmarks.graphs` measures it.
MERGE_FROM = 8


def delta_matrix(A: Tensor, E: Tensor, B: Tensor, scaling: float) -> Tensor:
    """s · B diag(E) A, shape (out, in): the increment of equation 3."""
    return (B * (E.view(-1) * scaling)) @ A  # (out, r) @ (r, in)


def low_rank_linear(x: Tensor, A: Tensor, E: Tensor, B: Tensor, scaling: float) -> Tensor:
    """s · x Aᵀ diag(E) Bᵀ for x (..., in); returns (..., out)."""
    projected = F.linear(like(x, A), A)  # (..., r)
    return F.linear(_gate(projected, E, scaling), B)


def low_rank_embedding(ids: Tensor, A: Tensor, E: Tensor, B: Tensor, scaling: float, padding_idx: int | None) -> Tensor:
    """Rows `ids` of s · (B diag(E) A)ᵀ for ids (...); returns (..., out). A is (r, num_embeddings)."""
    rows = F.embedding(ids, A.T, padding_idx)  # (..., r)
    return F.linear(_gate(rows, E, scaling), B)


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: tuple[Tensor, Tensor, Tensor],
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """x Wᵀ + b + s · drop(x) Aᵀ diag(E) Bᵀ for x (..., in) and factors (A, E, B); returns (..., out).

    W is frozen: it gets no gradient. The products run in the dtype of W, or of autocast; factors of more bits keep
    them, and get gradients in their own dtype. `dropout` is as in `keep_mask`. Differentiable once: a second backward
    through it raises RuntimeError.
    """
    A, E, B = factors
    device = x.device.type
    if autocasts(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    mask = None
    if dropout:
        mask, kept = keep_mask(x, dropout)
        scaling /= kept
    tokens = math.prod(x.shape[:-1])
    merge = mask is None and device == "cpu" and weight.dtype == A.dtype and _merging_pays(tokens, weight)
    with _without_autocast(device):
        return cast(Tensor, _apply(x, mask, weight, bias, A, E, B, scaling, merge))


def keep_mask(x: Tensor, dropout: float) -> tuple[Tensor, float]:
    """1 where dropout keeps an entry of x, as uint8 in x's shape, and the probability of that.

    On a CPU one 64-bit random number decides four entries, which is several times faster than a Bernoulli draw for
    each; the probability is then the nearest multiple of 2⁻¹⁶.
    """
    if x.device.type != "cpu":
        return torch.empty_like(x, dtype=torch.uint8).bernoulli_(1 - dropout), 1 - dropout
    steps = min(round(dropout * 2**16), 2**16 - 1)  # the last one lies outside 16 bits
    limits = torch.iinfo(torch.int64)
    words = torch.randint(limits.min, limits.max, ((x.numel() + 3) // 4,), device=x.device)
    lanes = words.view(torch.int16)[: x.numel()]  # uniform over -2¹⁵ … 2¹⁵-1
    return (lanes >= steps - 2**15).view(torch.uint8).view(x.shape), 1 - steps / 2**16


class _AdaptedLinear(torch.autograd.Function):
    """Two graphs of one map. Split: the increment is added into the base output, and x Aᵀ is kept. Merged: one
    product with W + s·ΔW, which is made anew in backward rather than kept. The thin products have the rank as their
    first dimension, (r, T) and (r, out): BLAS does them faster than transposed.

    `setup_context` would open it to torch.func, but binds a signature in every call; there the slow path serves.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        E: Tensor,
        B: Tensor,
        scaling: float,
        merge: bool,
    ) -> Tensor:
        low, gated, projected = A.to(x.dtype), (B.t() * E).to(x.dtype), None  # (r, in), (r, out)
        if merge:
            output = F.linear(x, _merged(weight, gated, low, scaling), bias)
        else:
            output = F.linear(x, weight, bias)  # of x as it comes: torch's kernel, and so its bits, depend on strides
            projected = low @ (x if mask is None else x * mask).reshape(-1, x.shape[-1]).t()  # (r, T)
            output.view(-1, output.shape[-1]).addmm_(projected.t(), gated, alpha=scaling)  # (T, out)
        # Where the layer widens, diag(E) Bᵀ is most of what it would keep beyond a plain LoRA: made again in backward.
        kept = None if merge or weight.shape[0] > weight.shape[1] else gated
        ctx.save_for_backward(x, mask, weight, A, E, B, kept, projected)
        ctx.scaling = scaling
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 9
        with _without_autocast(grad.device.type):
            return (*_gradients(ctx, grad), None, None)


_apply: Any = _AdaptedLinear.apply


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """∂ of x, mask, W, b, A, E, B."""
    x, mask, weight, A, E, B, gated, projected = ctx.saved_tensors
    need_x, _, _, need_bias, need_A, need_E, need_B = ctx.needs_input_grad[:7]
    scaling, low, merge = ctx.scaling, A.to(x.dtype), projected is None
    if gated is None:
        gated = (B.t() * E).to(x.dtype)
    grads = grad.reshape(-1, grad.shape[-1])  # (T, out)
    back = gated @ grads.t()  # (r, T)
    grad_x = grad_A = grad_E = grad_B = None
    if need_x:
        grad_x = grads @ (_merged(weight, gated, low, scaling) if merge else weight)
        if mask is not None:
            grad_x.addcmul_(back.t() @ low, mask.reshape(grad_x.shape), value=scaling)
        elif not merge:
            grad_x.addmm_(back.t(), low, alpha=scaling)
        grad_x = grad_x.view(x.shape)
    rows = (x if mask is None else x * mask).reshape(-1, x.shape[-1])  # (T, in)
    if need_A:
        # beta=0 ignores the first argument; it is there because only so a product takes a factor at no cost.
        grad_A = torch.addmm(low, back, rows, beta=0, alpha=scaling).to(A.dtype)
    if need_E or need_B:
        projected = low @ rows.t() if merge else projected
        grad_PL = torch.addmm(gated, projected, grads, beta=0, alpha=scaling).to(B.dtype)  # of diag(E) Bᵀ, (r, out)
        grad_E = torch.bmm(grad_PL.unsqueeze(1), B.t().unsqueeze(2)).view(E.shape) if need_E else None
        # Written where it will stay: of another layout than B's it would be copied once more.
        grad_B = torch.mul(grad_PL.t(), E.t(), out=torch.empty_like(B)) if need_B else None
    return grad_x, None, None, grads.sum(0) if need_bias else None, grad_A, grad_E, grad_B


def _merged(weight: Tensor, gated: Tensor, A: Tensor, scaling: float) -> Tensor:
    """W + s·ΔW, laid out in memory as W is: the kernel that torch picks depends on it."""
    if weight.is_contiguous():
        return torch.addmm(weight, gated.t(), A, alpha=scaling)
    return torch.addmm(weight.t(), A.t(), gated, alpha=scaling).t()


def _merging_pays(tokens: int, weight: Tensor) -> bool:
    out, in_ = weight.shape
    return tokens * (out + in_) >= MERGE_FROM * out * in_


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


def _gate(projected: Tensor, E: Tensor, scaling: float) -> Tensor:
    # s·E scales r numbers a token here; applied to the output it would pass over all `out` of them. A view and
    # not a transpose: the gradient of E comes out contiguous, as DistributedDataParallel wants it.
    return projected * (E.view(-1) * scaling).to(projected.dtype)  # (..., r)


def like(x: Tensor, weight: Tensor) -> Tensor:
    """x in the dtype that it needs beside `weight`: a bf16 input meets fp32 adapters, unless autocast decides."""
    return x if autocasts(x.device.type) else x.to(weight.dtype)


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device; torch refuses the question for the meta device."""
    return device != "meta" and torch.is_autocast_enabled(device)
