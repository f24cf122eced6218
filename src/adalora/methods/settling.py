"""What is common to methods that get smaller while they train, and so cannot go back to an earlier checkpoint."""

from __future__ import annotations

from typing import Any

from torch import distributed
from transformers import TrainerCallback

from ..errors import ConfigError, TrainingError


class Settling(TrainerCallback):
    """Refuses what would put back what was cut, or cut it on one process only."""

    def __init__(self, method: str) -> None:
        self.method = method

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise ConfigError or TrainingError."""
        if args.load_best_model_at_end:
            raise ConfigError(
                f"method {self.method} meets its budget on the way, so an earlier checkpoint does not fit; unset "
                "training.load_best_model_at_end and training.early_stopping_patience."
            )
        several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        if several or args.deepspeed or args.fsdp:
            raise TrainingError(
                f"method {self.method} runs on one device; start one process, without DeepSpeed or FSDP."
            )
