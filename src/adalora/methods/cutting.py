"""The factors of a LoRA by PEFT, and giving it other ones of another rank, in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..checkpoint import exact_targets
from ..errors import ConfigError
from ..optimizers import unwrap
from .lora import rank_fields

_ADAPTER = "default"


class Pair(NamedTuple):
    """One adapted matrix: PEFT's layer, and its A (r, in) and B (out, r)."""

    layer: Any
    A: nn.Parameter
    B: nn.Parameter

    @property
    def cost(self) -> int:
        """Parameters of one rank."""
        return self.A.shape[1] + self.B.shape[0]


def lora_pairs(model: Any) -> dict[str, Pair]:
    """The adapted matrices of a PeftModel by their name in the base model, in its order.

    Raises ConfigError for a convolution or an embedding.
    """
    pairs = {}
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if _ADAPTER not in module.lora_A or not isinstance(module.lora_A[_ADAPTER], nn.Linear):
            raise ConfigError(f"{name!r} is no linear layer, and only those can be cut; add it to exclude_modules.")
        pairs[name] = Pair(module, module.lora_A[_ADAPTER].weight, module.lora_B[_ADAPTER].weight)
    return pairs


def cut_(model: PeftModel, factors: Mapping[str, tuple[Tensor, Tensor]], optimizer: Any = None) -> None:
    """Give each matrix its (A (k, in), B (out, k)); without a rank it is the base layer again, unadapted.

    What PEFT stores then says these ranks, at an unchanged scale. The new parameters take the places of the old in
    `optimizer`, without state: moments of entries in another basis say nothing of the new ones.
    """
    pairs, base = lora_pairs(model), model.get_base_model()
    scale = next(iter(pairs.values())).layer.scaling[_ADAPTER]
    fresh: dict[nn.Parameter, nn.Parameter | None] = {}
    for name, pair in pairs.items():
        A, B = factors[name]
        if not len(A):
            parent, _, leaf = name.rpartition(".")
            setattr(base.get_submodule(parent), leaf, pair.layer.get_base_layer())
            fresh |= {pair.A: None, pair.B: None}
            continue
        down, up = pair.layer.lora_A[_ADAPTER], pair.layer.lora_B[_ADAPTER]
        for holder, value in ((down, A), (up, B)):
            old = holder.weight
            holder.weight = fresh[old] = nn.Parameter(value.detach().to(old.dtype).contiguous())
        down.out_features = up.in_features = pair.layer.r[_ADAPTER] = len(A)
        pair.layer.lora_alpha[_ADAPTER] = scale * len(A)
    ranks = {name: len(A) for name, (A, _) in factors.items() if len(A)}
    config = model.peft_config[_ADAPTER]
    config.target_modules = exact_targets(base, ranks)
    for field, value in rank_fields(ranks, scale).items():
        setattr(config, field, value)
    if optimizer is not None:
        _hand_over(unwrap(optimizer), fresh)


def _hand_over(optimizer: Any, fresh: Mapping[nn.Parameter, nn.Parameter | None]) -> None:
    for group in optimizer.param_groups:
        # Into the same list: an optimizer may hold it under another name too.
        group["params"][:] = [new for p in group["params"] if (new := fresh.get(p, p)) is not None]
    for old in fresh:
        optimizer.state.pop(old, None)
