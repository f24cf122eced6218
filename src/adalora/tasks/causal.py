"""What causal language models need beside their texts: batches, losses by row, final answers of what they write."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ConfigError
from .chat import IGNORED


@dataclass(frozen=True)
class Collator:
    """Rows → tensors (rows, longest row). Packed rows get no attention mask: their positions tell the texts apart."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The padding of a packed row is one more text, without loss."""
        free = [max(len(row["input_ids"]) for row in rows) - len(row["input_ids"]) for row in rows]
        pairs = list(zip(rows, free, strict=True))
        batch = {
            "input_ids": [[*row["input_ids"], *[self.pad_token_id] * n] for row, n in pairs],
            "labels": [[*row["labels"], *[IGNORED] * n] for row, n in pairs],
        }
        if "position_ids" in rows[0]:
            batch["position_ids"] = [[*row["position_ids"], *range(n)] for row, n in pairs]
        else:
            batch["attention_mask"] = [[1] * len(row["input_ids"]) + [0] * n for row, n in pairs]
        return {key: torch.tensor(values) for key, values in batch.items()}


def row_losses(logits: Any, labels: Tensor) -> Tensor:
    """(rows, 2): sum of the losses and number of the learned tokens. `logits` (rows, tokens, vocabulary)."""
    scores: Tensor = logits[0] if isinstance(logits, tuple) else logits
    # Row by row: in float32, the logits of a batch would be there twice.
    sums = [
        functional.cross_entropy(row[:-1].float(), target[1:], ignore_index=IGNORED, reduction="sum")
        for row, target in zip(scores, labels, strict=True)
    ]
    return torch.stack([torch.stack(sums), (labels[:, 1:] != IGNORED).sum(1).float()], dim=1)


def require_isolation(model: Any, name: str) -> None:
    """Raise ConfigError unless a text gets the same logits behind another one as alone. Tried, not looked up."""
    device = next(model.parameters()).device
    ids = torch.arange(3, 11, device=device)[None] % model.get_input_embeddings().num_embeddings
    positions = torch.arange(8, device=device)[None] % 4
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = model(input_ids=ids[:, 4:], use_cache=False).logits.float()
            behind = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 4:].float()
        difference = float((alone - behind).abs().max() / alone.abs().max())
    except TypeError:  # no position_ids
        difference = math.inf
    model.train(training)
    if not difference < (1e-3 if next(model.parameters()).dtype == torch.float32 else 5e-2):
        raise ConfigError(
            f"data.packing is true, but in {name!r} ({type(model).__name__}) a text would see the one before it in the "
            f"same row (its logits differ by {difference:.1e}). Set data.packing=false."
        )


def final_answer(text: str, pattern: str | None) -> str | None:
    """The last match of `pattern` (its first group, if it has one) in normal form, or None; no pattern takes all."""
    if pattern is None:
        return normal_form(text)
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    last = matches[-1]
    return normal_form(last.group(1) or "" if last.re.groups else last.group())


def normal_form(answer: str) -> str:
    """`$1,234.50` → `1234.5`: numbers without currency, commas, idle zeros; other texts in lower case."""
    plain = " ".join(answer.split()).rstrip(".")
    try:
        number = Decimal(plain.replace(",", "").replace("$", "").replace(" ", ""))
        return f"{number.normalize() + 0:f}" if number.is_finite() else plain.casefold()
    except InvalidOperation:
        return plain.casefold()
