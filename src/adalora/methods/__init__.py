"""The methods that a recipe can name, one file each; the registry is here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, did_you_mean
from .base import Method

# By name, so that a run imports no other method's packages.
_METHODS = {
    "adalora": "adalora:AdaLora",
    "lora": "lora:Lora",
    "full": "full:Full",
    "bitfit": "bitfit:BitFit",
    "houlsby": "houlsby:Houlsby",
    "pfeiffer": "pfeiffer:Pfeiffer",
    "peft-adalora": "peft_adalora:PeftAdaLora",
    "prune-lora": "prune_lora:PruneLora",
    "lora-regu": "lora_regu:LoraRegu",
    "svd-lora": "svd_lora:SvdLora",
    "static-lora": "static_lora:StaticLora",
    "squeeze-lora": "squeeze_lora:SqueezeLora",
}


def build_method(section: Mapping[str, Any]) -> Method:
    """The method that a recipe's `method` section describes. Raises ConfigError, naming the key."""
    options = dict(section)
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in _METHODS:
        raise ConfigError(f"method.name is {name!r}; " + did_you_mean(str(name), list(_METHODS)))
    module, _, cls = _METHODS[name].partition(":")
    try:
        method: Method = getattr(importlib.import_module(f".{module}", __name__), cls)(options)
    except ConfigError as error:
        raise ConfigError(f"in section method: {error}") from error
    except ModuleNotFoundError as error:
        raise ConfigError(f"method {name!r} needs {error.name!r}: pip install 'adalora[peft]'.") from error
    return method
