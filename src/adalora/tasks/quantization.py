"""Section model.quantization_config of a recipe → what transformers loads a quantized model by.

Keys are those of transformers' own BitsAndBytesConfig, as in a config.json on the hub, or a configuration class of
torchao by name with its arguments. The task head and whatever else trains whole stay in floating point.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers.quantizers.base import get_keys_to_not_convert

from ..errors import ConfigError, did_you_mean
from ..integrations.models import task_head
from ..recipe import Recipe
from ..targets import matches
from .foreign import one_line

METHODS = ("adalora", "lora", "peft-adalora")  # of a recipe: those that leave the base weights alone

_SKIP = {"bitsandbytes": "llm_int8_skip_modules", "torchao": "modules_to_not_convert"}
# As in QLoRA, and as TRL and axolotl have it; transformers' own default is FP4.
_QLORA = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
_WHERE = "model.quantization_config"


def check_quantization(recipe: Recipe) -> None:
    """Raise ConfigError for a section that cannot work; loads no model."""
    if recipe.model.quantization_config is not None:
        quantization(recipe, [])


def resolved_quantization(section: dict[str, Any] | None) -> dict[str, Any] | None:
    """The section with our defaults written out."""
    if section is None:
        return None
    section = {"quant_method": "bitsandbytes"} | section if _is_bitsandbytes(section) else section
    return _QLORA | section if section.get("load_in_4bit") else section


def quantization(recipe: Recipe, skip: Sequence[str]) -> Any:
    """A BitsAndBytesConfig or TorchAoConfig that leaves the modules `skip` in floating point. Raises ConfigError."""
    section, method = resolved_quantization(recipe.model.quantization_config) or {}, recipe.method.get("name")
    library = section.get("quant_method")
    if library not in _SKIP:
        raise ConfigError(
            f"{_WHERE} is {section!r}; it must say load_in_4bit: true or load_in_8bit: true (bitsandbytes), or "
            "quant_method: torchao with quant_type, the name of one of its configurations, e.g. Int8WeightOnlyConfig."
        )
    if method not in METHODS:
        raise ConfigError(
            f"method.name is {method!r}, which is not for a quantized base; those are {', '.join(METHODS)}. Leave "
            f"{_WHERE} out, or take one of them."
        )
    if importlib.util.find_spec(library) is None:
        raise ConfigError(f"{_WHERE} needs {library}, which is not installed: pip install 'adalora[quantized]'.")
    options = {key: value for key, value in section.items() if key != "quant_method"}
    options[_SKIP[library]] = sorted({*(options.get(_SKIP[library]) or ()), *skip}) or None
    try:
        return _bitsandbytes(options) if library == "bitsandbytes" else _torchao(options)
    except ConfigError:
        raise
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(f"{_WHERE}: {one_line(error)}") from error


def floating_modules(auto: Any, config: Any, recipe: Recipe) -> list[str]:
    """Names of the modules to leave in floating point: output embeddings, task head, modules_to_save."""
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{recipe.model.name_or_path!r} is quantized already; leave {_WHERE} out.")
    model = skeleton(auto, config, recipe)
    names = {*get_keys_to_not_convert(model), *task_head(model)}
    whole = recipe.method.get("modules_to_save")
    return sorted(names | {name for name, _ in model.named_modules() if name and matches(name, whole)})


def skeleton(auto: Any, config: Any, recipe: Recipe) -> Any:
    """The model of class `auto` without weights."""
    with torch.device("meta"):
        return auto.from_config(config, trust_remote_code=recipe.model.trust_remote_code)


def frozen_bytes(model: Any, recipe: Recipe) -> int:
    """Memory of what does not train in a prepared model, in the recipe's type and bits; known for 4 and 8 bits."""
    size = getattr(torch, recipe.model.dtype or "float32").itemsize
    frozen = sum(p.numel() * size for p in model.parameters() if not p.requires_grad)
    getter = getattr(model, "get_output_embeddings", None)
    for module in model.modules() if recipe.model.quantization_config else ():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and module is not (getter and getter()):
            frozen -= int(module.weight.numel() * (size - _weight_bytes(recipe, module.in_features, size)))
    return frozen


def _weight_bytes(recipe: Recipe, inputs: int, else_: float) -> float:
    """Bytes for a number in a linear layer's weight, its scales included."""
    section = resolved_quantization(recipe.model.quantization_config) or {}
    if section.get("load_in_4bit"):  # a scale for 64 numbers, of one byte with another scale for 256, or of four
        return 0.5 + (1 / 64 + 4 / (64 * 256) if section.get("bnb_4bit_use_double_quant") else 4 / 64)
    if section.get("load_in_8bit") or section.get("quant_type") == "Int8WeightOnlyConfig":
        return 1 + 4 / inputs
    return else_


def _is_bitsandbytes(section: dict[str, Any]) -> bool:
    return "quant_method" not in section and any(section.get(f"load_in_{bits}bit") for bits in (4, 8))


def _bitsandbytes(options: dict[str, Any]) -> Any:
    kind = transformers.BitsAndBytesConfig
    known = [name for name in inspect.signature(kind).parameters if name != "kwargs"]
    for key in options:
        if key not in known:
            raise ConfigError(f"there is no key '{_WHERE}.{key}' in {kind.__name__}; " + did_you_mean(key, known))
    if options.get("llm_int8_has_fp16_weight"):
        raise ConfigError(f"'{_WHERE}.llm_int8_has_fp16_weight' quantizes anew in each forward; leave it out.")
    return kind(**options)


def _torchao(options: dict[str, Any]) -> Any:
    import torchao.quantization as torchao
    from torchao.core.config import AOBaseConfig, config_from_dict

    own = {
        key: options.pop(key) for key in ("modules_to_not_convert", "include_input_output_embeddings") if key in options
    }
    kind = options.pop("quant_type", None)
    if isinstance(kind, dict):  # as transformers writes it into config.json
        return transformers.TorchAoConfig(config_from_dict(kind.get("default", kind)), **own)
    classes = {name: value for name, value in vars(torchao).items() if isinstance(value, type)}
    known = [name for name, value in classes.items() if issubclass(value, AOBaseConfig)]
    if kind not in known:
        raise ConfigError(f"'{_WHERE}.quant_type' is {kind!r}; " + did_you_mean(str(kind), known))
    parameters = list(inspect.signature(classes[kind]).parameters)
    if "granularity" in parameters and "group_size" in options:
        options["granularity"] = torchao.PerGroup(options.pop("group_size"))
    for key in options:
        if key not in parameters:
            raise ConfigError(f"there is no key '{_WHERE}.{key}' in {kind}; " + did_you_mean(key, parameters))
    options |= {key: getattr(torch, value) for key, value in options.items() if key.endswith("dtype")}
    return transformers.TorchAoConfig(classes[kind](**options), **own)
