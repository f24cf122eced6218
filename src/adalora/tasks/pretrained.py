"""Pre-trained models and tokenizers; what would train on random weights or unknown tokens is refused."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from ..errors import ConfigError, did_you_mean
from ..integrations.models import task_head
from ..recipe import Recipe
from ..targets import matches
from .foreign import one_line, silenced
from .quantization import floating_modules, quantization

LOOKED_AT = 1000  # training rows in which unknown tokens are counted

_NO_LIMIT = 10**6  # tokenizers without one say 1e30


def load_tokenizer(path: str, recipe: Recipe, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of the model at `path`, with a token to pad with. Raises ConfigError."""
    config = from_pretrained(AutoConfig, path, recipe)
    tokenizer = from_pretrained(AutoTokenizer, path, recipe, **options)
    size = getattr(config.get_text_config(), "vocab_size", None) or 0
    # transformers makes up a tokenizer of special tokens alone where a folder has no tokenizer files.
    if len(tokenizer) < size / 2:
        raise ConfigError(
            f"the tokenizer of {recipe.model.name_or_path!r} has {len(tokenizer)} tokens, the model {size}: the folder "
            "lacks its tokenizer files, or has those of another model. Add the files that came with the model "
            "(tokenizer.json, tokenizer_config.json)."
        )
    if tokenizer.pad_token is None:  # as in GPT-2 and Llama
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"the tokenizer of {recipe.model.name_or_path!r} has neither a pad token nor an end token, so that "
                "texts cannot stand in one batch. Set pad_token in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def require_known_tokens(rows: Dataset, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise ConfigError if more than half of the tokens in tokenized `rows` are unknown ones."""
    unknown = tokenizer.unk_token_id
    special = set(tokenizer.all_special_ids) - {unknown}
    ids = [token for row in rows.select(range(min(LOOKED_AT, len(rows))))["input_ids"] for token in row]
    ids = [token for token in ids if token not in special]
    share = ids.count(unknown) / len(ids) if ids and unknown is not None else 0.0
    if share > 0.5:
        raise ConfigError(
            f"{share:.0%} of the tokens of data.train are {tokenizer.unk_token!r} to the tokenizer of {name!r}: it is "
            "made for other texts, or its files are incomplete. Choose a model for the language of the data."
        )


def load_model(
    auto: Any,
    path: str,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None = None,
    lengths: Sequence[str] = ("max_length",),
    **options: Any,
) -> nn.Module:
    """The model of class `auto` (e.g. AutoModelForQuestionAnswering), all but a new task head from the checkpoint.

    `lengths` are keys of section data, each of which must be within what the model takes. Raises ConfigError.
    """
    # Mismatches are asked for, because the error that transformers raises itself does not say which they are.
    if recipe.model.config:
        options = {"config": _configuration(auto, path, recipe, options)}
    loading: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if recipe.model.dtype is not None:
        loading["dtype"] = recipe.model.dtype
    if recipe.model.quantization_config is not None:
        config = options.get("config") or from_pretrained(AutoConfig, path, recipe, **options)
        loading["quantization_config"] = quantization(recipe, floating_modules(auto, config, recipe))
    model, info = from_pretrained(auto, path, recipe, **options, **loading)
    _require_all_weights(model, info, recipe)
    if tokenizer is not None:  # decoders look for the last token before the padding, which is the tokenizer's
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    for key in lengths:
        _require_length(model, tokenizer, recipe, key)
    return model


def _configuration(auto: Any, path: str, recipe: Recipe, options: dict[str, Any]) -> Any:
    """The model's configuration with the recipe's own entries; `options` as for from_pretrained."""
    config = from_pretrained(AutoConfig, path, recipe, **options)
    known = list(config.to_dict())
    for key, value in recipe.model.config.items():
        # Some models ask for entries that their configuration does not list, as DeBERTa's for cls_dropout.
        if key not in known and f'"{key}"' not in _model_code(auto, config):
            raise ConfigError(
                f"there is no key 'model.config.{key}' in the configuration of {recipe.model.name_or_path!r}; "
                + did_you_mean(key, known)
            )
        setattr(config, key, value)
    return config


def _model_code(auto: Any, config: Any) -> str:
    try:
        return inspect.getsource(sys.modules[auto._model_mapping[type(config)].__module__])
    except (AttributeError, KeyError, OSError):  # code that came with the model: its configuration must do
        return ""


def _require_all_weights(model: Any, info: dict[str, Any], recipe: Recipe) -> None:
    """Weights may be missing only where all of them train: in the head, and in what `modules_to_save` names.

    That holds for the pooler of a masked language model, too: frozen, it would stay a random projection.
    """
    where = f"the checkpoint {recipe.model.name_or_path!r}"
    if info["mismatched_keys"]:
        key, there, here = min(info["mismatched_keys"])
        raise ConfigError(
            f"{where} holds {key} of shape {tuple(there)}, but the model needs {tuple(here)}: it was trained for other "
            "labels, or its config.json belongs to another model. Give the base model that it was trained from."
        )
    head, whole = task_head(model), recipe.method.get("modules_to_save")
    random = [
        key
        for key in sorted(info["missing_keys"])
        if key.partition(".")[0] not in head and not any(matches(module, whole) for module in _modules_around(key))
    ]
    if random:
        names = ", ".join([*head, random[0].rpartition(".")[0]])
        raise ConfigError(
            f"{where} has no weights for {len(random)} of the model's tensors, e.g. {random[0]}, which would be random "
            f"and frozen. Give a complete base model; if the layer is meant to be new, let it train whole: "
            f"method.modules_to_save=[{names}]."
        )


def _modules_around(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _require_length(model: Any, tokenizer: PreTrainedTokenizerBase | None, recipe: Recipe, key: str) -> None:
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None) or _NO_LIMIT]
    if tokenizer is not None:
        limits.append(tokenizer.model_max_length)
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from behind the padding index.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    wanted = getattr(recipe.data, key)
    if wanted > min(limits):
        raise ConfigError(
            f"data.{key} is {wanted}, but {recipe.model.name_or_path!r} takes at most "
            f"{min(limits)} tokens. Set data.{key}={min(limits)} or lower; longer texts are cut."
        )


def from_pretrained(auto: Any, path: str, recipe: Recipe, **options: Any) -> Any:
    """`auto.from_pretrained` by the recipe's model section, with whatever it raises as a ConfigError of one line."""
    section = recipe.model
    if path.startswith(("/", ".", "~")) and not Path(path).exists():
        raise ConfigError(f"model.name_or_path is {section.name_or_path!r}, and there is no such folder.")
    options |= {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    try:
        with silenced("transformers", "huggingface_hub"):
            return auto.from_pretrained(path, **options)
    except Exception as error:  # broken files raise what they like: safetensors and tokenizers know no narrower class
        raise ConfigError(
            f"model.name_or_path is {section.name_or_path!r}, which {auto.__name__} cannot load: {one_line(error)} "
            "Give the folder or the hub name of a pre-trained base model, with all its files."
        ) from error
