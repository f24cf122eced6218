"""A model with quantized layers: that gradients pass them, what may train in it, and how it is stored."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InjectionError
from .quantized import dequantized, from_conv1d, input_type, is_quantized, library_of

_TRAINABLE = ("is_trainable", "is_qat_trainable")
_PACKS = "support_avx512bf16_for_cpu"
_REMEDY = {
    "bitsandbytes": "BitsAndBytesConfig(llm_int8_skip_modules=[...])",
    "torchao": "TorchAoConfig(..., modules_to_not_convert=[...])",
}


def prepare(model: nn.Module) -> None:
    """Make sure that gradients pass each quantized layer of `model`, adapted or not, in training and after evaluation.

    Raises InjectionError, with nothing changed, for a layer that they do not pass, or that is not quantized yet.
    """
    layers = {name: module for name, module in model.named_modules() if library_of(module)}
    passed: set[Any] = set()
    for name, module in layers.items():
        kind = _kind(module)
        reason = _refusal(module, kind in passed)
        if reason:
            raise InjectionError(f"cannot train through {name!r} ({type(module).__name__}): {reason}")
        passed.add(kind)
    for module in layers.values():
        if hasattr(module, _PACKS):
            # On a CPU with AVX512-BF16 the first evaluation would round the scales to bf16, for good, and end in a
            # kernel without a derivative.
            setattr(module, _PACKS, False)
    for module in model.modules():
        quantizer = vars(module).get("hf_quantizer")
        if quantizer is not None and layers:
            # transformers' Trainer knows no adapters but PEFT's; that gradients pass was tried above.
            base = type(quantizer)
            quantizer.__class__ = type(base.__name__, (base,), dict.fromkeys(_TRAINABLE, True))


def release(model: nn.Module) -> None:
    """Undo `prepare`."""
    for module in model.modules():
        if hasattr(module, _PACKS):
            setattr(module, _PACKS, sys.modules["bitsandbytes"].functional.has_avx512bf16())
        quantizer = vars(module).get("hf_quantizer")
        if quantizer is not None and all(vars(type(quantizer)).get(key) is True for key in _TRAINABLE):
            quantizer.__class__ = type(quantizer).__mro__[1]


def rounds_inputs(model: nn.Module) -> bool:
    """Whether a layer rounds its inputs to a few bits, so that two orders of one sum may give outputs a step apart."""
    return any(library_of(module) == "bitsandbytes" and hasattr(module, "state") for module in model.modules())


def refuse_trained(name: str, module: nn.Module) -> None:
    """Raise InjectionError if `module`, which shall train whole, holds a quantized layer."""
    for inner, layer in module.named_modules():
        library = library_of(layer)
        if library is not None:
            raise InjectionError(
                f"modules_to_save names {name!r}, but {f'{name}.{inner}'.rstrip('.')!r} is quantized by {library} and "
                f"cannot train. Load the model with that part left out: {_REMEDY[library]}."
            )


def dequantized_state(model: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict of `model` with every quantized weight in floating point."""
    plain = dict(state)
    for name, module in model.named_modules():
        if library_of(module) is None:
            continue
        front = f"{name}.weight"
        for key in [key for key in plain if key.startswith(f"{front}.")]:
            del plain[key]
        for key in (f"{name}.SCB", f"{name}.weight_format"):
            plain.pop(key, None)
        if is_quantized(module):
            plain[front] = dequantized(module).to(input_type(module, dtype))
        if from_conv1d(module):  # which stores (in, out)
            plain[front] = plain[front].T.contiguous()
    return plain


@contextmanager
def unquantized_saving(model: nn.Module, forget: bool) -> Iterator[None]:
    """Within the context transformers saves `model` as it would any other; `forget` also what config.json says."""
    config: Any = getattr(model, "config", None)
    quantizer = vars(model).pop("hf_quantizer", None)
    stated = vars(config).pop("quantization_config", None) if forget and config is not None else None
    try:
        yield
    finally:
        if quantizer is not None:
            setattr(model, "hf_quantizer", quantizer)  # noqa: B010
        if stated is not None:
            config.quantization_config = stated


def _refusal(module: Any, tried: bool) -> str | None:
    weight = module.weight
    if weight.is_meta:
        return None
    if not isinstance(module, nn.Linear):
        return "only linear layers may have a weight of torchao; leave embeddings in floating point."
    if not is_quantized(module):
        if getattr(getattr(module, "state", None), "has_fp16_weights", False):
            return "it keeps 16-bit weights and quantizes them in each forward; use has_fp16_weights=False."
        return (
            "its weight is not quantized yet. Move the model to its device first, which quantizes it; a new head must "
            f"be left out when loading: {_REMEDY['bitsandbytes']}."
        )
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        return (
            "bitsandbytes packed its weight for inference in an evaluation before, which rounds it and lets no "
            "gradient through. Load the model anew and inject before the first forward pass."
        )
    if not tried and not _passes_gradient(module):
        return (
            "its kernel passes no right gradient to its input, so that layers below would not learn. Use a weight-only "
            "quantization, such as torchao's Int8WeightOnlyConfig."
        )
    return None


def _kind(module: Any) -> tuple[Any, ...]:
    """What decides about a layer's kernel."""
    weight = module.weight
    options = [str(getattr(weight, key, None)) for key in ("act_quant_kwargs", "activation_quantization")]
    return (type(module), type(weight), weight.device.type, *options)


def _passes_gradient(module: Any) -> bool:
    """Try it: the gradient of vᵀ(Wx + b) is vᵀW."""
    generator = torch.Generator().manual_seed(0)
    dtype, device = input_type(module), module.weight.device
    x, v = (torch.randn(2, n, generator=generator).to(device, dtype) for n in (module.in_features, module.out_features))
    # The first forward pass of a Linear4bit settles its type of computation.
    before = {key: vars(module)[key] for key in ("compute_dtype", "compute_type_is_set") if key in vars(module)}
    with torch.enable_grad():
        y = type(module).forward(module, x.requires_grad_(True))
        found = torch.autograd.grad(y, x, v.to(y.dtype), allow_unused=True)[0] if y.requires_grad else None
    vars(module).update(before)
    if found is None:
        return False
    wanted = v.float() @ dequantized(module)
    return bool((found.float() - wanted).norm() <= 0.05 * wanted.norm())
