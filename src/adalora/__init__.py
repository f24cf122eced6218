"""AdaLoRA: a parameter budget that moves to where the model needs it. See README.md for the picture."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .allocator import RankAllocator
    from .checkpoint import load_adapter, save_adapter
    from .config import AdaLoraConfig
    from .errors import AdaLoraError, AdaLoraWarning
    from .export import export_lora
    from .grouping import parameter_groups
    from .injection import adapter_parameters, eject, inject
    from .merging import disabled, merge, merged, unmerge
    from .regularizer import orthogonality_penalty
    from .report import rank_report
    from .whole import export_merged

__version__ = "0.1.0"

# Each name is fetched from its file at first use, so that the command line answers --help without torch.
_HOME = {
    "AdaLoraConfig": "config",
    "AdaLoraError": "errors",
    "AdaLoraWarning": "errors",
    "RankAllocator": "allocator",
    "adapter_parameters": "injection",
    "disabled": "merging",
    "eject": "injection",
    "export_lora": "export",
    "export_merged": "whole",
    "inject": "injection",
    "load_adapter": "checkpoint",
    "merge": "merging",
    "merged": "merging",
    "orthogonality_penalty": "regularizer",
    "parameter_groups": "grouping",
    "rank_report": "report",
    "save_adapter": "checkpoint",
    "unmerge": "merging",
}

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
    "merged",
    "orthogonality_penalty",
    "parameter_groups",
    "rank_report",
    "save_adapter",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
