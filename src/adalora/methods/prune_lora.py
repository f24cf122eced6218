"""LoRA whose doublets are pruned by importance: the paper's ablation Prune-LoRA, structured pruning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..allocation import keep_top
from ..config import AdaLoraConfig
from ..errors import ConfigError
from ..importance import entry_scores, triplet_scores, update_averages_
from ..optimizers import step_is_skipped, unwrap
from ..schedule import Schedule
from .base import ParameterCount
from .cutting import Pair, cut_, lora_pairs
from .lora import Lora, chosen, lora_count, wrap
from .options import CHOICE, check_parameters
from .settling import Settling

_SHARED = ("init_r", "target_r", "lora_alpha", "lora_dropout", "tinit", "tfinal", "deltaT", "beta1", "beta2")


class PruneLora(Lora):
    """Row i of A and column i of B are one doublet, scored by the means of Ī·Ū over each (arXiv 2303.10512, 4.4).

    Options: init_r, target_r (average rank in the end) or parameters (size in the end), lora_alpha, lora_dropout,
    tinit, tfinal, deltaT, beta1, beta2 as in AdaLoraConfig, and which modules. The scale is lora_alpha / init_r.
    Both parts of a pruned doublet are set to zero, as in the authors' code: no gradient brings it back then, but the
    optimizer's momentum may, until the pattern is final. When training ends they are cut out for good.
    """

    name: ClassVar[str] = "prune-lora"
    defaults: ClassVar[dict[str, Any]] = {
        "init_r": 12,
        "target_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        **CHOICE,
        "parameters": None,
        "tinit": 0.1,
        "tfinal": 0.4,
        "deltaT": 0.005,
        "beta1": 0.85,
        "beta2": 0.85,
    }
    resumable = False

    def prepare(self, model: nn.Module) -> nn.Module:
        """Wrap in a PeftModel with rank init_r everywhere."""
        given = self._options
        config, costs = chosen(model, given)
        whole, goal = given["init_r"] * sum(costs.values()), given["parameters"]
        if goal is not None and not min(costs.values()) <= goal <= whole:
            raise ConfigError(
                f"parameters={goal} does not lie between one doublet, {min(costs.values())}, and the {whole} that "
                f"init_r={given['init_r']} starts with; change it, or init_r."
            )
        wrapped = wrap(
            model,
            config,
            dict.fromkeys(costs, given["init_r"]),
            given["lora_alpha"] / given["init_r"],
            given["lora_dropout"],
        )
        lora_pairs(wrapped)  # raises for what cannot be cut
        self._peak = lora_count(wrapped)[0]
        return wrapped

    def callbacks(self) -> list[TrainerCallback]:
        """The one that prunes."""
        return [DoubletPruner(self._config, self._options["parameters"])]

    def count(self, model: nn.Module) -> ParameterCount:
        """`peak` before anything was cut."""
        adapter, head = lora_count(model)
        return ParameterCount(self._peak, adapter, head)

    def _check(self) -> None:
        check_parameters(self._options, "target_r")
        fixed = {} if self._options["parameters"] is None else {"target_r": 1}  # which then says nothing
        self._config = AdaLoraConfig(**({name: self._options[name] for name in _SHARED} | fixed))  # it checks them
        if self._config.target_r < 1:
            raise ConfigError("target_r is 0; give a whole number of at least 1.")


class DoubletPruner(Settling):
    """Runs the allocation of AdaLoRA on the doublets of a PeftModel; see PruneLora."""

    def __init__(self, config: AdaLoraConfig, parameters: int | None) -> None:
        super().__init__(PruneLora.name)
        self.config, self.parameters = config, parameters
        self.frozen = False
        self.keeps: list[Tensor] = []
        self.pairs: dict[str, Pair] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the averages at zero, for the run's number of steps."""
        self.pairs, self.frozen = lora_pairs(kwargs["model"]), False
        ranks = [len(pair.A) for pair in self.pairs.values()]
        costs = [pair.cost for pair in self.pairs.values()]
        # A budget is counted in doublets, or in parameters.
        self.costs = None if self.parameters is None else costs
        start = sum(ranks) if self.costs is None else sum(r * c for r, c in zip(ranks, costs, strict=True))
        goal = self.config.target_r * len(ranks) if self.parameters is None else self.parameters
        self.schedule = Schedule.from_config(self.config, start, goal, state.max_steps)
        self.keeps = [
            torch.ones(rank, dtype=torch.bool, device=p.A.device)
            for rank, p in zip(ranks, self.pairs.values(), strict=True)
        ]
        weights = [weight for pair in self.pairs.values() for weight in (pair.A, pair.B)]
        self.averages = [(w, torch.zeros_like(w), torch.zeros_like(w)) for w in weights]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Follow the schedule, with the gradients that the step used."""
        step = state.global_step
        if step_is_skipped(unwrap(kwargs["optimizer"])):
            return
        if not self.frozen:
            if step < self.schedule.total_step - self.schedule.tfinal:
                self._update()
            if self.schedule.allocates(step):
                self._choose(self.schedule.budget(step))
            self.frozen = step >= self.schedule.freeze_step
            if not self.schedule.allocates(step):
                return
        self._mask()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Meet the budget, also of a run that was cut short, and cut out what is pruned."""
        if not self.frozen:
            self._choose(self.schedule.target_budget)
            self.frozen = True
        self._mask()
        cut_(kwargs["model"], {name: (pair.A[keep], pair.B[:, keep]) for (name, pair), keep in self._kept()})

    def _update(self) -> None:
        for weight, sensitivity, uncertainty in self.averages:
            if weight.grad is None:
                product = torch.zeros_like(sensitivity)
            else:
                product = weight.detach() * weight.grad
            update_averages_(sensitivity, uncertainty, product, self.config.beta1, self.config.beta2)

    def _choose(self, budget: int) -> None:
        entries = [entry_scores(mean, deviation, "sensitivity*uncertainty") for _, mean, deviation in self.averages]
        scores = doublet_scores(entries[::2], entries[1::2])
        self.keeps = keep_top(scores, budget, costs=self.costs)

    def _mask(self) -> None:
        with torch.no_grad():
            for (_, pair), keep in self._kept():
                pair.A.masked_fill_(~keep.unsqueeze(1), 0.0)
                pair.B.masked_fill_(~keep, 0.0)

    def _kept(self) -> list[tuple[tuple[str, Pair], Tensor]]:
        keeps = [keep.to(pair.A.device) for keep, pair in zip(self.keeps, self.pairs.values(), strict=True)]
        return list(zip(self.pairs.items(), keeps, strict=True))


def doublet_scores(A: Sequence[Tensor], B: Sequence[Tensor]) -> list[Tensor]:
    """Scores (r,) of each matrix from the entry scores of its A (r, in) and B (out, r): mean of a row and a column."""
    return [triplet_scores(a, a.new_zeros(len(a), 1), b) for a, b in zip(A, B, strict=True)]
