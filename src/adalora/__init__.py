"""AdaLoRA: a parameter budget that moves to where the model needs it. See README.md for the picture."""

from .allocator import RankAllocator
from .checkpoint import load_adapter, save_adapter
from .config import AdaLoraConfig
from .errors import AdaLoraError, AdaLoraWarning
from .export import export_lora, export_merged
from .injection import adapter_parameters, disabled, eject, inject, merge, unmerge
from .regularizer import orthogonality_penalty
from .report import rank_report

__version__ = "0.1.0"
__all__ = [
    "AdaLoraConfig",
    "AdaLoraError",
    "AdaLoraWarning",
    "RankAllocator",
    "adapter_parameters",
    "disabled",
    "eject",
    "export_lora",
    "export_merged",
    "inject",
    "load_adapter",
    "merge",
    "orthogonality_penalty",
    "rank_report",
    "save_adapter",
    "unmerge",
]
