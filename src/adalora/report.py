"""Where the budget went: rank for each layer and kind of matrix, as rows, table and heat map (Figure 3)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from .injection import adapter_root, named_adapters

_COLUMNS = 100  # that a line of the heat map may take

# 256-colour backgrounds from pale to dark, and the foreground that is readable on each.
_SHADES = ((255, 16), (194, 16), (157, 16), (114, 16), (71, 16), (29, 231), (23, 231), (22, 231))


@dataclass(frozen=True)
class ModuleRank:
    """One adapted matrix. `layer` is None where the name holds no index; `kind` is the name without it."""

    name: str
    layer: int | None
    kind: str
    rank: int
    capacity: int
    parameters: int


@dataclass(frozen=True)
class RankReport:
    """The state of an adapter; parameters count A, E and B of live triplets."""

    rows: tuple[ModuleRank, ...]
    capacity_parameters: int

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by module name."""
        return {row.name: row.rank for row in self.rows}

    @property
    def total_rank(self) -> int:
        """Live triplets over all matrices."""
        return sum(row.rank for row in self.rows)

    @property
    def parameters(self) -> int:
        """Parameters of the live triplets."""
        return sum(row.parameters for row in self.rows)

    def grid(self) -> tuple[list[str], list[int | None], list[list[int | None]]]:
        """(kinds, layers, ranks): ranks[i][j] of kind i in layer j, None where there is no such matrix."""
        kinds = list(dict.fromkeys(row.kind for row in self.rows))
        layers: list[int | None] = [*sorted({row.layer for row in self.rows if row.layer is not None})]
        if any(row.layer is None for row in self.rows):
            layers.append(None)
        cells = {(row.kind, row.layer): row.rank for row in self.rows}
        return kinds, layers, [[cells.get((kind, layer)) for layer in layers] for kind in kinds]

    def table(self) -> str:
        """One line for each matrix, and the totals."""
        width = max([len(row.name) for row in self.rows] + [len("module")])
        lines = [f"{'module':<{width}}  rank  capacity  parameters"]
        lines += [f"{r.name:<{width}}  {r.rank:>4}  {r.capacity:>8}  {r.parameters:>10,}" for r in self.rows]
        capacity = sum(row.capacity for row in self.rows)
        return "\n".join([*lines, f"{'total':<{width}}  {self.total_rank:>4}  {capacity:>8}  {self.parameters:>10,}"])

    def heatmap(self, color: bool = True) -> str:
        """Kinds down, layers across, the rank in each cell; darker is higher. Without `color`, numbers only.

        Layers that do not fit into 100 columns go on in a block below.
        """
        kinds, layers, ranks = self.grid()
        labels, top = short_labels(kinds), max([row.capacity for row in self.rows] + [1])
        width = max([len(label) for label in labels] + [5])
        size = max(4, len(str(top)) + 1)
        count = -(-len(layers) // max(1, (_COLUMNS - width - 1) // size)) or 1  # blocks
        step = -(-len(layers) // count) or 1  # layers in each
        blocks = []
        for start in range(0, max(len(layers), 1), step):
            part = slice(start, start + step)
            names = "".join(f"{'–' if layer is None else layer:>{size}}" for layer in layers[part])
            lines = [f"{'layer':>{width}} {names}"]
            for label, row in zip(labels, ranks, strict=True):
                lines.append(f"{label:>{width}} " + "".join(_cell(rank, top, size, color) for rank in row[part]))
            blocks.append("\n".join(lines))
        return "\n\n".join(blocks)


def rank_report(model: nn.Module) -> RankReport:
    """Read the ranks of an adapted model. Raises InjectionError if it has no adapter."""
    rows, whole = [], 0
    for name, module in named_adapters(adapter_root(model)):
        layer, kind = split_name(name)
        cost, rank = sum(module.shape) + 1, module.rank
        rows.append(ModuleRank(name, layer, kind, rank, module.capacity, rank * cost))
        whole += module.capacity * cost
    return RankReport(tuple(rows), whole)


def split_name(name: str) -> tuple[int | None, str]:
    """The layer index in a module name, its first number, and the name with * in its place.

    A name that is a number and nothing else, as in nn.Sequential, is no layer of anything.
    """
    found = re.search(r"(?:^|\.)(\d+)(?=\.|$)", name)
    if not found or found.group(1) == name:
        return None, name
    return int(found.group(1)), f"{name[: found.start(1)]}*{name[found.end(1) :]}"


def short_labels(kinds: list[str]) -> list[str]:
    """As few trailing parts of each kind as tell it from all others."""
    parts = [kind.split(".") for kind in kinds]
    labels = []
    for own in parts:
        count = 1
        while count < len(own) and (own[-count:] == ["*"] or sum(p[-count:] == own[-count:] for p in parts) > 1):
            count += 1
        labels.append(".".join(own[-count:]).removeprefix("*."))
    return labels


def _cell(rank: int | None, top: int, size: int, color: bool) -> str:
    text = f"{'' if rank is None else rank:>{size}}"
    if rank is None or not color:
        return text
    background, foreground = _SHADES[round(rank / top * (len(_SHADES) - 1))]
    return f"\x1b[48;5;{background}m\x1b[38;5;{foreground}m{text}\x1b[0m"
