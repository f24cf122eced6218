"""The ten-second demo: plain PyTorch, no pre-trained weights, no transformers.

A small network learns scikit-learn's 8 × 8 digits upright. Then the digits lie on their side, and it has 300
of them to get used to that: with its head alone, with all of its weights, or with AdaLoRA.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..allocator import RankAllocator
from ..config import AdaLoraConfig
from ..errors import DataError
from ..injection import adapter_parameters, inject
from ..report import RankReport, rank_report

UPRIGHT, ADAPT = 957, 300  # images to pre-train on and to adapt with; the other 540 are the test set
HIDDEN = (128, 128, 64)
BATCH = 50
PRETRAIN_RATE, PRETRAIN_EPOCHS, ADAPT_EPOCHS = 2e-3, 30, 60
# Each method has its own best rate of 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, found on seeds 100 to 103.
HEAD_RATE, FULL_RATE, ADALORA_RATE = 1e-1, 1e-2, 5e-2
CONFIG = AdaLoraConfig(
    target_modules=tuple(f"hidden{number + 1}" for number in range(len(HIDDEN))),
    modules_to_save=("head",),
    init_r=8,
    target_r=3,
)

Split = tuple[Tensor, Tensor]  # images (n, 64) in [0, 1] and digits (n,)


@dataclass(frozen=True)
class DigitsRow:
    """One way to adapt: accuracy on the test set, numbers that had to be stored, wall seconds of adapting."""

    method: str
    accuracy: float
    parameters: int
    seconds: float


@dataclass(frozen=True)
class DigitsResult:
    """The comparison, and where AdaLoRA spent its `budget` of triplets."""

    rows: tuple[DigitsRow, ...]
    report: RankReport
    budget: int

    def table(self) -> str:
        """One line for each way to adapt."""
        lines = [f"{'adapted by':<20} {'accuracy':>8} {'parameters':>11} {'seconds':>8}"]
        for row in self.rows:
            lines.append(f"{row.method:<20} {row.accuracy:>8.3f} {row.parameters:>11,} {row.seconds:>8.1f}")
        return "\n".join(lines)


def run(seed: int = 0) -> DigitsResult:
    """Pre-train, adapt in three ways, compare. The caller's random state and thread count stay as they were.

    Raises:
        DataError: scikit-learn is not installed.
    """
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        upright, adapt, test = load_splits()
        base = build_model()
        _fit(base, base.parameters(), upright, PRETRAIN_RATE, PRETRAIN_EPOCHS)
        rows = [DigitsRow("nothing", _accuracy(base, test), 0, 0.0)]

        model = copy.deepcopy(base).requires_grad_(False)
        head = model.get_submodule("head").requires_grad_(True)
        seconds = _fit(model, head.parameters(), adapt, HEAD_RATE, ADAPT_EPOCHS)
        rows.append(DigitsRow("the head alone", _accuracy(model, test), _count(head), seconds))

        model = copy.deepcopy(base)
        seconds = _fit(model, model.parameters(), adapt, FULL_RATE, ADAPT_EPOCHS)
        rows.append(DigitsRow("all weights", _accuracy(model, test), _count(model), seconds))

        model = inject(copy.deepcopy(base), CONFIG)
        seconds = _fit(model, adapter_parameters(model), adapt, ADALORA_RATE, ADAPT_EPOCHS, adalora=True)
        report = rank_report(model)
        stored = report.parameters + _count(head)
        rows.append(DigitsRow("AdaLoRA and the head", _accuracy(model, test), stored, seconds))
    return DigitsResult(tuple(rows), report, CONFIG.target_r * len(HIDDEN))


def load_splits() -> tuple[Split, Split, Split]:
    """(upright, rotated to adapt with, rotated to test on); no image is in two of them.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError('scikit-learn, which has the digits, is not installed; pip install "adalora[hf]"') from error
    data = load_digits()
    order = torch.randperm(len(data.target))
    digits = torch.from_numpy(data.target)[order]
    images = torch.from_numpy(data.images)[order].float() / 16  # (1797, 8, 8)
    upright, rotated = images.flatten(1), images.rot90(1, (1, 2)).flatten(1)  # (1797, 64) each
    end = UPRIGHT + ADAPT
    return (
        (upright[:UPRIGHT], digits[:UPRIGHT]),
        (rotated[UPRIGHT:end], digits[UPRIGHT:end]),
        (rotated[end:], digits[end:]),
    )


def build_model() -> nn.Sequential:
    """Four linear layers, 64 → 128 → 128 → 64 → 10: `hidden1` to `hidden3` and `head`."""
    model, width = nn.Sequential(), 64
    for number, wider in enumerate(HIDDEN, start=1):
        model.add_module(f"hidden{number}", nn.Linear(width, wider))
        model.add_module(f"relu{number}", nn.ReLU())
        width = wider
    model.add_module("head", nn.Linear(width, 10))
    return model


def _fit(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    data: Split,
    rate: float,
    epochs: int,
    adalora: bool = False,
) -> float:
    """An ordinary training loop; AdaLoRA costs it one line. Returns the wall seconds."""
    start = time.perf_counter()
    images, digits = data
    steps = epochs * -(-len(digits) // BATCH)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=steps)
    if adalora:
        RankAllocator(model, total_step=steps).attach(optimizer)
    for _ in range(epochs):
        order = torch.randperm(len(digits))
        for first in range(0, len(digits), BATCH):
            rows = order[first : first + BATCH]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[rows]), digits[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return time.perf_counter() - start


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second thread, and on a busy machine lose much waiting for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def _accuracy(model: nn.Module, data: Split) -> float:
    images, digits = data
    return float((model(images).argmax(1) == digits).float().mean())


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
