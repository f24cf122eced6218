"""What one graph for q, k and v together would gain over three: `python -m benchmarks.groups`.

The best case of shared-input groups: the matrices A of the group lie side by side already, and nothing is spent on
finding out that the modules read the same tensor. Forward and backward of the three layers, fp32, rank 12.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adalora import functional

RANK, MEMBERS = 12, 3


class Group(torch.autograd.Function):
    """y_i = x W_iᵀ + b_i + s·x Aᵢᵀ diag(Eᵢ) Bᵢᵀ for all i: one product with all A, and one gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, scaling: float, *rest: Tensor) -> tuple[Tensor, ...]:
        weights, biases, Es, Bs = (rest[i * MEMBERS : (i + 1) * MEMBERS] for i in range(4))
        projected = A @ x.t()  # (3r, T)
        gated = [B.t() * E for B, E in zip(Bs, Es, strict=True)]
        outputs = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        for output, part, gate in zip(outputs, torch.split(projected, RANK), gated, strict=True):
            output.addmm_(part.t(), gate, alpha=scaling)
        ctx.save_for_backward(x, A, projected, *weights, *Es, *Bs, *gated)
        ctx.scaling = scaling
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, A, projected, *rest = ctx.saved_tensors
        weights, Es, Bs, gated = (rest[i * MEMBERS : (i + 1) * MEMBERS] for i in range(4))
        back = torch.empty_like(projected)
        grad_x, grad_E, grad_B = grads[0] @ weights[0], [], []
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            grad_x.addmm_(grad, weight)
        for i, (grad, E, B) in enumerate(zip(grads, Es, Bs, strict=True)):
            rows = slice(i * RANK, (i + 1) * RANK)
            torch.mm(gated[i], grad.t(), out=back[rows])
            grad_PL = torch.addmm(gated[i], projected[rows], grad, beta=0, alpha=ctx.scaling)
            grad_E.append(torch.bmm(grad_PL.unsqueeze(1), B.t().unsqueeze(2)).view(E.shape))
            grad_B.append(torch.mul(grad_PL.t(), E.t(), out=torch.empty_like(B)))
        grad_x.addmm_(back.t(), A, alpha=ctx.scaling)
        grad_A = torch.addmm(A, back, x, beta=0, alpha=ctx.scaling)
        return (grad_x, grad_A, None, *[None] * MEMBERS, *[grad.sum(0) for grad in grads], *grad_E, *grad_B)


def measure(width: int, tokens: int, rounds: int) -> list[float]:
    """Quartiles of the paired ratio: one graph for the group / one for each member."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, requires_grad=True)

    x, weights = leaf(tokens, width), [torch.randn(width, width) / width**0.5 for _ in range(MEMBERS)]
    biases, A = [leaf(width) for _ in weights], leaf(MEMBERS * RANK, width)
    Es, Bs = [leaf(RANK, 1) for _ in weights], [leaf(width, RANK) for _ in weights]
    own = [part.detach().clone().requires_grad_() for part in torch.split(A, RANK)]
    grads = [torch.randn(tokens, width) for _ in weights]

    def apart() -> tuple[Tensor, ...]:
        members = zip(weights, biases, own, Es, Bs, strict=True)
        return tuple(functional.adapted_linear(x, w, b, (a, e, f), 1.3) for w, b, a, e, f in members)

    def together() -> tuple[Tensor, ...]:
        return tuple(Group.apply(x, A, 1.3, *weights, *biases, *Es, *Bs))  # type: ignore[no-untyped-call]

    for one, other in zip(apart(), together(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    graphs: dict[str, Callable[[], tuple[Tensor, ...]]] = {"apart": apart, "together": together}
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(rounds + 2):
        for name in list(graphs)[:: 1 if turn % 2 else -1]:
            for tensor in (x, A, *biases, *own, *Es, *Bs):
                tensor.grad = None
            begin = time.perf_counter()
            torch.autograd.backward(graphs[name](), grads)
            if turn >= 2:
                seconds[name].append(time.perf_counter() - begin)
    pairs = zip(seconds["together"], seconds["apart"], strict=True)
    return statistics.quantiles((one / other for one, other in pairs), n=4)


def main() -> None:
    """Print one line for each width and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for width in (384, 768):
        for tokens in (256, 2048):
            low, middle, high = measure(width, tokens, options.rounds)
            print(f"{options.threads} thread(s)  {width} wide  {tokens} tokens  {middle:.3f} ({low:.3f}-{high:.3f})")


if __name__ == "__main__":
    main()
