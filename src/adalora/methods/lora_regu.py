"""LoRA with the orthogonality regularizer on its A and B: the paper's ablation LoRA_regu."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from transformers import TrainerCallback

from .cutting import lora_pairs
from .lora import Lora
from .options import check_penalty
from .penalty import Factors, OrthogonalityCallback


class LoraRegu(Lora):
    """Options: those of lora, orth_reg_weight (γ), orth_reg_form ("norm" or "squared", as in AdaLoraConfig).

    The authors' code has another penalty here, the mean cosine between rows, which is no number at rank 1
    (arXiv 2303.10512, table 5); this one is equation 4, as their text says.
    """

    name: ClassVar[str] = "lora-regu"
    defaults: ClassVar[dict[str, Any]] = Lora.defaults | {"orth_reg_weight": 0.1, "orth_reg_form": "norm"}

    def callbacks(self) -> list[TrainerCallback]:
        """The one that adds the regularizer's gradient."""
        weight, form = self._options["orth_reg_weight"], self._options["orth_reg_form"]
        return [OrthogonalityCallback(_factors, weight, form)]

    def _check(self) -> None:
        super()._check()
        check_penalty(self._options)


def _factors(model: nn.Module) -> Factors:
    return [(pair.A, pair.B) for pair in lora_pairs(model).values()]
