"""The two averages of importance, kept in the optimizer's state beside each parameter's own.

There they are saved, restored and moved with everything else that the optimizer holds.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from .config import AdaLoraConfig
from .errors import TrainingError
from .importance import entry_scores, magnitude_scores, triplet_scores, update_averages_
from .layers import SVDAdapter

logger = logging.getLogger("adalora")

SENSITIVITY, UNCERTAINTY = "adalora_sensitivity", "adalora_uncertainty"


def update_averages(optimizer: Optimizer, modules: Iterable[SVDAdapter], config: AdaLoraConfig) -> bool:
    """Take the gradients of the step just done into the averages. False if one is not finite: nothing changes."""
    if config.importance == "magnitude":
        return True
    parameters = [p for m in modules for p in (m.lora_A, m.lora_E, m.lora_B)]
    # A parameter that never had a gradient has no averages: they would be zero, and an optimizer that finds
    # any state takes its own for initialized.
    parameters = [p for p in parameters if p.grad is not None or SENSITIVITY in optimizer.state[p]]
    if not parameters:
        return True
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    if not torch.stack([norm.isfinite().to(gradients[0].device) for norm in torch._foreach_norm(gradients)]).all():
        logger.warning("a gradient is not finite; the importance of this step is left out")
        return False
    for parameter in parameters:
        for key in (SENSITIVITY, UNCERTAINTY):
            optimizer.state[parameter].setdefault(key, torch.zeros_like(parameter))
    sensitivity, uncertainty = ([optimizer.state[p][key] for p in parameters] for key in (SENSITIVITY, UNCERTAINTY))
    weights = [parameter.detach() for parameter in parameters]
    update_averages_(sensitivity, uncertainty, weights, gradients, config.beta1, config.beta2)
    return True


def module_scores(optimizer: Optimizer, modules: Mapping[str, SVDAdapter], config: AdaLoraConfig) -> list[Tensor]:
    """S of every triplet, (r,) for each module. Raises TrainingError, with the name, if one is not finite."""
    scores = []
    for name, module in modules.items():
        if config.importance == "magnitude":
            score = magnitude_scores(module.lora_E)
        else:
            factors = (module.lora_A, module.lora_E, module.lora_B)
            score = triplet_scores(*(_entries(optimizer, p, config) for p in factors))
        if not (score + module.lora_E.detach().view(-1)).isfinite().all():
            raise TrainingError(
                f"the triplets of {name!r} or their scores are not finite: the run has diverged. Lower the "
                "learning rate, or clip gradients."
            )
        scores.append(score)
    return scores


def _entries(optimizer: Optimizer, parameter: Tensor, config: AdaLoraConfig) -> Tensor:
    state = optimizer.state.get(parameter, {})
    if SENSITIVITY not in state:
        return torch.zeros_like(parameter)
    return entry_scores(state[SENSITIVITY], state[UNCERTAINTY], config.importance)
