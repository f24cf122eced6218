"""The adapter for transformers' Conv1D (GPT-2): a linear layer that stores its weight transposed."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ..functional import low_rank_linear
from ..layers import SVDAdapter


class SVDConv1D(SVDAdapter, Conv1D):
    """y = x W + b + s · x Aᵀ diag(E) Bᵀ with W (in, out)."""

    base_type = Conv1D
    transposed = True

    @staticmethod
    def shape_of(module: Any) -> tuple[int, int]:
        return module.nf, module.nx

    def delta_output(self, x: Tensor) -> Tensor:
        return low_rank_linear(self.dropped(x), self.lora_A, self.lora_E, self.lora_B, self.scaling)
