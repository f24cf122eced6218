"""The orthogonality regularizer of equation 4 on any pairs A, B, for methods that have no rank allocator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from ..config import OrthForm
from ..optimizers import loss_scale, step_is_skipped, unwrap
from ..regularizer import penalty_gradients

Factors = Sequence[tuple[nn.Parameter, nn.Parameter]]  # A (r, in), B (out, r) of each matrix


class OrthogonalityCallback(TrainerCallback):
    """Adds the regularizer's gradient before each optimizer step, behind clipping, as RankAllocator does."""

    def __init__(self, find: Callable[[nn.Module], Factors], weight: float, form: OrthForm) -> None:
        self.find, self.weight, self.form = find, weight, form
        self._hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hook into the optimizer."""
        factors = self.find(kwargs["model"])

        def before_step(optimizer: Any, *_: Any) -> None:
            if not step_is_skipped(optimizer):
                add_gradients_(factors, self.form, self.weight * loss_scale(optimizer))

        self.on_train_end(args, state, control)
        if self.weight:
            self._hook = unwrap(kwargs["optimizer"]).register_step_pre_hook(before_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of it."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def add_gradients_(factors: Factors, form: OrthForm, weight: float | Tensor) -> None:
    """Add weight · ∂R/∂A and ∂R/∂B to the gradients; see `regularizer.penalty`."""
    rows = [matrix for A, B in factors for matrix in (A.detach(), B.detach().T)]
    gradients = penalty_gradients(rows, form, weight)
    for index, parameter in enumerate(parameter for pair in factors for parameter in pair):
        gradient = gradients[index].T if index % 2 else gradients[index]
        if parameter.grad is None:
            parameter.grad = gradient.clone()
        else:
            parameter.grad.add_(gradient)
