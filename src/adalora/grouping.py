"""Which parameters weight decay is for: not those that an adapter adds."""

from __future__ import annotations

from typing import Any

from torch import nn

from .injection import adapter_parameters, adapter_root, named_adapters


def factors(model: nn.Module) -> list[nn.Parameter]:
    """A, E and B of every adapted module, in the order of the model."""
    return [p for _, m in named_adapters(adapter_root(model)) for p in (m.lora_A, m.lora_E, m.lora_B)]


def parameter_groups(model: nn.Module, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """What an optimizer should get, everything trainable once, with `weight_decay` for matrices outside the adapters.

        optimizer = torch.optim.AdamW(adalora.parameter_groups(model), lr=1e-3)

    Decay pulls Λ, and with it what was learned, towards the base model, and P and Q from the length that the scale
    counts on. Vectors, as biases and norms, are left out as usual.
    """
    own, trained = {id(parameter) for parameter in factors(model)}, adapter_parameters(model)
    decayed = [p for p in trained if id(p) not in own and p.dim() > 1]
    others = [p for p in trained if id(p) in own or p.dim() < 2]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]
    return [group for group in groups if group["params"]]
