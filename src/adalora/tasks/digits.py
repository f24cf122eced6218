"""The ten-second demo: plain PyTorch, no pre-trained weights, no transformers.

A small network learns scikit-learn's 8 × 8 digits upright. Then the digits lie on their side, and it has 300
examples to get used to that: by its head alone, by all of its weights, or by AdaLoRA.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..allocator import RankAllocator
from ..config import AdaLoraConfig
from ..errors import DataError
from ..injection import adapter_parameters, inject
from ..report import RankReport, rank_report

UPRIGHT, ADAPT = 957, 300  # images to pre-train on and to adapt on; the other 540 are the test set
HIDDEN = (128, 128, 64)
BATCH = 50
PRETRAIN_EPOCHS, ADAPT_EPOCHS = 30, 60
# Each method's own rate, the best of 1e-3, 2e-3, 5e-3, 1e-2, 2e-2 on seeds that the demo does not use.
RATES = {"head only": 1e-2, "full": 2e-3, "AdaLoRA": 1e-2}
CONFIG = AdaLoraConfig(init_r=6, target_r=4, modules_to_save=("head",))

Split = tuple[Tensor, Tensor]  # images (n, 64) in [0, 1], digits (n,)


@dataclass(frozen=True)
class DigitsRow:
    """One way to adapt: accuracy on the test set, parameters that remain changed, wall seconds of adapting."""

    method: str
    accuracy: float
    parameters: int
    seconds: float


@dataclass(frozen=True)
class DigitsResult:
    """The comparison, best understood printed, and where AdaLoRA kept its ranks."""

    rows: tuple[DigitsRow, ...]
    report: RankReport
    budget: int

    def table(self) -> str:
        """The rows as aligned text."""
        lines = [f"{'method':<12} {'accuracy':>8} {'parameters':>10} {'seconds':>8}"]
        for row in self.rows:
            lines.append(f"{row.method:<12} {row.accuracy:>8.3f} {row.parameters:>10,} {row.seconds:>8.1f}")
        return "\n".join(lines)


def run(seed: int = 0) -> DigitsResult:
    """Pre-train, adapt in three ways, compare. The global random state is left as it was.

    Raises:
        DataError: scikit-learn is not installed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        upright, adapt, test = load_splits()
        base = build_model()
        _fit(base, list(base.parameters()), upright, 2e-3, PRETRAIN_EPOCHS)
        rows = [DigitsRow("unadapted", _accuracy(base, test), 0, 0.0)]
        for method in ("head only", "full"):
            model = copy.deepcopy(base)
            parameters = list((model.head if method == "head only" else model).parameters())
            seconds = _fit(model, parameters, adapt, RATES[method], ADAPT_EPOCHS)
            rows.append(DigitsRow(method, _accuracy(model, test), _count(parameters), seconds))

        model = inject(copy.deepcopy(base), CONFIG)
        parameters = adapter_parameters(model)
        seconds, allocator = _fit_adalora(model, parameters, adapt)
        report = rank_report(model)
        kept = report.parameters + _count(model.head.parameters())
        rows.append(DigitsRow("AdaLoRA", _accuracy(model, test), kept, seconds))
    return DigitsResult(tuple(rows), report, allocator.schedule.target_budget)
