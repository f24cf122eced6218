"""What a run will need, as numbers: parameters, bytes of the file, bytes of memory. Pure functions, no model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from ..budget import Budget, plan_budget
from ..config import AdaLoraConfig
from ..reading import PREFIX
from ..targets import bound

Shapes = Mapping[str, tuple[int, int]]  # (out, in) of each adapted matrix

FP32 = 4  # bytes: adapters, their gradients, Adam's moments and the averages


@dataclass(frozen=True)
class Sizes:
    """Triplets at the start; the budget; parameters at the start, and in the end for an even spread.

    `least` and `most` bound the parameters in the end over all ways to spread the budget: a budget in parameters is
    spent but for less than the dearest triplet. `unit` is what one rank on every matrix costs in A and B. `head` counts
    what trains whole. Parameters count A, E and B.
    """

    matrices: int
    initial: int
    budget: Budget
    peak: int
    final: int
    least: int
    most: int
    unit: int
    head: int
    file_bytes: int


def adapter_sizes(shapes: Shapes, config: AdaLoraConfig, whole: Mapping[str, tuple[int, ...]], base: int = 0) -> Sizes:
    """Sizes of AdaLoRA on matrices of these `shapes` in a model of `base` parameters.

    `whole` are the shapes of tensors trained and stored whole.
    """
    capacity = {name: bound(config.max_rank, name, config.init_r) for name in shapes}
    costs = {name: sum(shape) + 1 for name, shape in shapes.items()}
    budget = plan_budget(config, shapes, capacity, base)
    counts_triplets = config.budget == "triplets"
    order = sorted(costs, key=lambda name: costs[name])
    rank = config.target_r if config.target_parameters is None else budget.target // sum(costs.values())
    even = {name: min(rank, capacity[name]) for name in shapes}
    spent = max(budget.target - max(costs.values()) + 1, 0)
    return Sizes(
        matrices=len(shapes),
        initial=sum(capacity.values()),
        budget=budget,
        peak=sum(capacity[name] * costs[name] for name in shapes),
        final=sum(even[name] * costs[name] for name in shapes) if counts_triplets else budget.target,
        least=_filled(order, capacity, costs, budget.target) if counts_triplets else spent,
        most=_filled(order[::-1], capacity, costs, budget.target) if counts_triplets else budget.target,
        unit=sum(sum(shape) for shape in shapes.values()),
        head=sum(_product(shape) for shape in whole.values()),
        file_bytes=file_bytes(shapes, even, config, whole),
    )


def file_bytes(
    shapes: Shapes, ranks: Mapping[str, int], config: AdaLoraConfig, whole: Mapping[str, tuple[int, ...]]
) -> int:
    """Size of adapter_model.safetensors with these ranks, to the byte, if everything in it is fp32.

    Eight bytes of length, a JSON header padded to a multiple of eight, then the tensors by name:
    https://huggingface.co/docs/safetensors (format).
    """
    tensors: dict[str, tuple[int, ...]] = {PREFIX + name: shape for name, shape in whole.items()}
    for name, (out, in_) in shapes.items():
        rank = ranks[name]
        tensors |= {f"{PREFIX}{name}.lora_{part}": size for part, size in _factors(rank, out, in_).items()}
    own = {"config": config.to_dict(), "config_sha256": "0" * 64, "tensors_sha256": "0" * 64}
    header: dict[str, object] = {"__metadata__": {"format": "pt", "adalora": json.dumps(own, sort_keys=True)}}
    end = 0
    for name in sorted(tensors):
        begin, end = end, end + FP32 * _product(tensors[name])
        header[name] = {"dtype": "F32", "shape": list(tensors[name]), "data_offsets": [begin, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + end


def memory(frozen: int, peak: int, head: int, averages: int) -> dict[str, int]:
    """Bytes by purpose: `frozen` of the base, and of what trains its weights, gradients, AdamW's moments.

    `averages` are the numbers that importance keeps (`importance.kept_numbers`).
    """
    trained = FP32 * (peak + head)
    parts = {"base weights": frozen, "adapter and head": trained, "gradients": trained, "optimizer": 2 * trained}
    return parts | ({"importance averages": FP32 * averages} if averages else {})


def _factors(rank: int, out: int, in_: int) -> dict[str, tuple[int, int]]:
    return {"A": (rank, in_), "E": (rank, 1), "B": (out, rank)}


def _filled(order: list[str], capacity: Mapping[str, int], costs: Mapping[str, int], budget: int) -> int:
    """Parameters if the budget fills matrices up in this order."""
    total = 0
    for name in order:
        taken = min(capacity[name], budget)
        budget -= taken
        total += taken * costs[name]
    return total


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total
