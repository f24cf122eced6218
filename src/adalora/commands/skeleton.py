"""A model without weights, from its configuration alone: what it would train, keep and compute."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..errors import ConfigError
from ..injection import adapter_config, adapter_root, named_adapters, trained_biases
from ..methods.base import Method
from ..pending import start_made
from ..recipe import Recipe
from ..targets import saved_modules
from ..tasks.foreign import one_line, silenced
from ..tasks.pretrained import from_pretrained

_MODELS = {
    "classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "causal-lm": "AutoModelForCausalLM",
    "image-classification": "AutoModelForImageClassification",
}
MEASURED_STEPS = 3


@dataclass(frozen=True)
class Load:
    """What one batch costs: bytes that autograd keeps for the backward pass, and multiplications and additions."""

    activations: int
    flops: int


def build(path: str, recipe: Recipe, labels: int, device: str = "meta") -> nn.Module:
    """The recipe's model with random weights, or none on the meta device. Raises ConfigError."""
    config = from_pretrained(transformers.AutoConfig, path, recipe, **recipe.model.config)
    if recipe.task.endswith("classification"):
        config.num_labels = labels
        # Said here, it is not guessed from the labels, for which DeBERTa looks at their values.
        config.problem_type = "single_label_classification" if labels > 1 else "regression"
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:  # as in GPT-2, where a run takes the tokenizer's
        text.pad_token_id = 0
    auto = getattr(transformers, _MODELS[recipe.task])
    try:
        with torch.device(device):
            model: nn.Module = auto.from_config(config, trust_remote_code=recipe.model.trust_remote_code)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{recipe.model.name_or_path!r} cannot be a model for {recipe.task}: {one_line(error)} Choose another "
            "--task, or another model."
        ) from error
    return model


def shapes_of(model: nn.Module) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, ...]]]:
    """((out, in) of each adapted matrix, shapes of the tensors trained whole) of a model adapted by AdaLoRA."""
    config = adapter_config(model)
    whole = {
        f"{name}.{key}": tuple(value.shape)
        for name, module in saved_modules(model, config)
        for key, value in module.state_dict().items()
    }
    whole |= {name: tuple(bias.shape) for name, bias in trained_biases(model, config)}
    return {name: module.shape for name, module in named_adapters(model)}, whole


def batch_of(model: Any, recipe: Recipe, size: int, device: str = "meta") -> dict[str, Tensor]:
    """A batch of the recipe's longest rows: every text as long as it may be."""
    config, data = model.config, recipe.data
    whole: dict[str, Any] = {"dtype": torch.long, "device": device}
    if recipe.task == "image-classification":
        side, channels = config.image_size, getattr(config, "num_channels", 3)
        sides = tuple(side) if isinstance(side, list | tuple) else (side, side)
        pixels = torch.zeros(size, channels, *sides, device=device)
        return {"pixel_values": pixels, "labels": torch.zeros(size, **whole)}
    length = longest(model, recipe)
    ids = torch.ones(size, length, **whole)
    match recipe.task:
        case "classification":
            kind = torch.long if config.num_labels > 1 else torch.float32
            return {"input_ids": ids, "labels": torch.zeros(size, dtype=kind, device=device)}
        case "question-answering":
            ends = torch.zeros(size, **whole)
            return {"input_ids": ids, "start_positions": ends, "end_positions": ends}
        case "seq2seq":
            return {"input_ids": ids, "labels": torch.ones(size, int(getattr(data, "max_target_length", 0)), **whole)}
        case "token-classification":
            return {"input_ids": ids, "labels": torch.zeros(size, length, **whole)}
    return {"input_ids": ids, "labels": ids}


def longest(model: Any, recipe: Recipe) -> int:
    """Tokens of the longest text: what the recipe allows, or the model where it takes fewer."""
    data, config = recipe.data, model.config.get_text_config()
    limits = [int(getattr(data, "max_length", 0) or getattr(data, "max_source_length", 0))]
    if positions := getattr(config, "max_position_embeddings", None):
        limits.append(positions)
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from behind the padding index.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min(limits)


def count_load(model: nn.Module, recipe: Recipe, size: int) -> Load | str:
    """One forward and backward pass of a model on the meta device, by tensors without values, as on a CPU; or why
    the model cannot do that. Its parameters are replaced by such tensors.
    """
    try:
        with FakeTensorMode(), silenced("torch"):
            _imitate(model)
            return _count(model.train(), batch_of(model, recipe, size, "cpu"))
    except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError) as error:  # it looks at its values
        return one_line(error)


def _imitate(model: nn.Module) -> None:
    """From meta to a CPU that is only imitated: the meta device lacks autocast, about which models ask."""
    made: dict[int, Tensor] = {}  # tied weights stay tied

    def like(value: Tensor) -> Tensor:
        if id(value) not in made:
            copy = torch.empty(value.shape, dtype=value.dtype, device="cpu")
            made[id(value)] = nn.Parameter(copy, value.requires_grad) if isinstance(value, nn.Parameter) else copy
        return made[id(value)]

    for module in model.modules():
        holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for held in holders:
            for name, value in held.items():
                if value is not None:
                    held[name] = like(value)


def _count(model: nn.Module, batch: Mapping[str, Tensor]) -> Load:
    kept: dict[int, Any] = {}
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage._cdata, storage)  # holding it, so that its address is not given away again
        return tensor

    with FlopCounterMode(display=False) as flops:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**batch).loss
        loss.backward()
    activations = sum(storage.nbytes() for address, storage in kept.items() if address not in own)
    return Load(activations, flops.get_total_flops())


def machine_flops() -> float:
    """Floating point operations per second of this machine in a matrix product of training's precision, fp32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, count = torch.ones(1024, 1024, device=device), 8
    float((a @ a)[0, 0])
    started = time.perf_counter()
    for _ in range(count):
        b = a @ a
    float(b[0, 0])  # waits for the device
    return count * 2 * 1024**3 / (time.perf_counter() - started)


def measure_step(path: str, recipe: Recipe, method: Method, labels: int, size: int) -> float:
    """Seconds of one optimizer step on random weights: forward, backward, AdamW, and AdaLoRA's own work."""
    from ..allocator import RankAllocator
    from ..integrations.models import is_adapted

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = method.prepare(build(path, recipe, labels, device)).to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    if is_adapted(model):
        start_made(adapter_root(model))  # directions make no difference to time
        RankAllocator(model, total_step=1000).attach(optimizer)
    batch = batch_of(model, recipe, size, device)
    started = 0.0
    for step in range(MEASURED_STEPS + 1):
        if step == 1:  # the first one also warms up
            started = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())  # waits for the device
    return (time.perf_counter() - started) / MEASURED_STEPS
