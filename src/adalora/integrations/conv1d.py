"""The adapter for transformers' Conv1D (GPT-2): a linear layer that stores its weight transposed."""

from __future__ import annotations

from typing import Any

from transformers.pytorch_utils import Conv1D

from ..layers import SVDDense


class SVDConv1D(SVDDense, Conv1D):
    """y = x W + b + s · x Aᵀ diag(E) Bᵀ with W (in, out)."""

    base_type = Conv1D
    transposed = True

    @staticmethod
    def shape_of(module: Any) -> tuple[int, int]:
        return module.nf, module.nx
