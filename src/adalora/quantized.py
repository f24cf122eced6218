"""A base layer whose weight is quantized: what it holds, and what a merge makes of it.

Known are bitsandbytes' Linear4bit and Linear8bitLt, and nn.Linear with a torchao tensor for its weight. Neither
library is imported here: where such a layer stands, its library is loaded.

The quantized weight stays frozen and is never written to. A merge has to say what becomes of it: "dequantize" puts
W + s·ΔW there in floating point; "requantize" rounds that to the base's few bits again, which can cost more than
training added.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InjectionError

Into = Literal["dequantize", "requantize"]
CHOICES = ("dequantize", "requantize")

_LINEAR4, _LINEAR8 = "bitsandbytes.nn.modules.Linear4bit", "bitsandbytes.nn.modules.Linear8bitLt"


def library_of(module: nn.Module) -> str | None:
    """The library whose quantized linear layer `module` is: "bitsandbytes", "torchao", or None."""
    if _is(module, _LINEAR4) or _is(module, _LINEAR8):
        return "bitsandbytes"
    weight = module._parameters.get("weight")
    return "torchao" if any(kind.__module__.startswith("torchao.") for kind in type(weight).__mro__) else None


def is_quantized(module: nn.Module) -> bool:
    """Whether the weight is held in a few bits now: not before it is quantized, and not after merging in full."""
    library, weight = library_of(module), module._parameters.get("weight")
    return library == "torchao" or (library is not None and weight is not None and not weight.is_floating_point())


def overrides_forward_knowingly(kind: type[nn.Module]) -> bool:
    """Whether a layer's own forward is that of one of the quantized layers known here."""
    owner = next(ancestor for ancestor in kind.__mro__ if "forward" in vars(ancestor))
    return f"{owner.__module__}.{owner.__qualname__}" in (_LINEAR4, _LINEAR8)


def weight_size(parameter: Tensor) -> int:
    """Numbers that a parameter stands for: bitsandbytes packs two and more into one."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else torch.Size(state.shape).numel()


def dequantized(module: Any) -> Tensor:
    """W (out, in) as the forward pass sees it, in fp32, from a quantized layer."""
    weight = module.weight
    if library_of(module) == "torchao":
        return weight.dequantize().float()
    functional = sys.modules["bitsandbytes"].functional
    if _is(module, _LINEAR4):
        return functional.dequantize_4bit(weight.data, weight.quant_state).float()
    scale = module.state.SCB if weight.SCB is None else weight.SCB
    return functional.int8_vectorwise_dequant(weight.data, scale).float()


def requantized(module: Any, value: Tensor) -> nn.Parameter:
    """`value` (out, in), quantized as the weight of `module` is. Raises InjectionError for a kind that cannot be."""
    weight = module.weight
    if library_of(module) == "torchao":
        return nn.Parameter(_torchao(weight, value.to(weight.dtype)), requires_grad=False)
    layers = sys.modules["bitsandbytes"].nn
    if _is(module, _LINEAR8):
        return layers.Int8Params(value, requires_grad=False, has_fp16_weights=False)._quantize(value.device)
    options = {key: getattr(weight, key) for key in ("blocksize", "compress_statistics", "quant_type", "quant_storage")}
    made = layers.Params4bit(value.to(weight.quant_state.dtype), requires_grad=False, **options)
    return made._quantize(value.device)


def merged_weight(module: Any, delta: Tensor, into: Into | None, dtype: torch.dtype | None) -> nn.Parameter:
    """The weight that shall stand for W + `delta` (out, in). Raises InjectionError without a choice of what it is.

    `dtype` is for "dequantize" where the layer does not tell: 8 bits of bitsandbytes come from any type.
    """
    if into not in CHOICES:
        raise InjectionError(
            f"cannot merge into a weight that {library_of(module)} quantized without rounding (quantized={into!r}). "
            "Say quantized='dequantize' for a model in floating point, or quantized='requantize' for one of the same "
            "few bits, which can lose what was trained; either states the error."
        )
    if into == "requantize" and not delta.any():
        return module.weight  # as it is, which no rounding can better
    value = dequantized(module) + delta
    if into == "requantize":
        return requantized(module, value)
    return nn.Parameter(value.to(input_type(module, dtype)), requires_grad=False)


def put_weight(module: Any, weight: Tensor) -> None:
    """Make `weight`, plain or quantized, the one that the layer holds; bitsandbytes notes parts of it elsewhere."""
    if module._parameters["weight"] is weight:
        return
    module._parameters["weight"] = weight
    if _is(module, _LINEAR4):
        module.quant_state = getattr(weight, "quant_state", None)
    elif _is(module, _LINEAR8):
        module.state.CB = module.state.SCB = None  # taken from the weight in the next forward


def whole_weight(module: Any) -> Tensor:
    """The quantized weight with all that belongs to it, so that `put_weight` can put it back."""
    weight: Any = module.weight
    if _is(module, _LINEAR8) and weight.SCB is None:
        weight.CB, weight.SCB = weight.data, module.state.SCB
    return weight


def plain_output(module: Any, x: Tensor) -> Tensor:
    """What a layer gives that holds a plain weight in the place of a quantized one, in the dtype of x."""
    weight, bias = module.weight, module.bias
    return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).to(x.dtype)


def input_type(module: Any, default: torch.dtype | None = None) -> torch.dtype:
    """The floating point type of the layer's inputs, so far as the layer tells."""
    weight = module.weight
    state = getattr(weight, "quant_state", None)
    if weight.is_floating_point() or state is not None:
        return weight.dtype if state is None else state.dtype
    return default or (torch.float32 if module.bias is None else module.bias.dtype)


def from_conv1d(module: nn.Module) -> bool:
    """Whether transformers put a layer of bitsandbytes in the place of its Conv1D, which stores (in, out)."""
    return getattr(getattr(module, "source_cls", None), "__name__", "") == "Conv1D" and library_of(module) is not None


def _torchao(weight: Any, value: Tensor) -> Any:
    kind, symmetric = type(weight), weight.zero_point is None or not weight.zero_point.any()
    if symmetric and kind.__name__ == "Int8Tensor":
        granularity = sys.modules["torchao.quantization"]
        rows, columns = weight.block_size
        whole = granularity.PerTensor() if rows > 1 else granularity.PerGroup(columns)
        return kind.from_hp(value, whole, act_quant_kwargs=weight.act_quant_kwargs)
    if symmetric and kind.__name__ == "IntxUnpackedToInt8Tensor":
        return kind.from_hp(value, weight.block_size, weight.target_dtype)
    raise InjectionError(
        f"cannot quantize anew as a {kind.__name__} of torchao is; use quantized='dequantize' and quantize the result."
    )


def _is(module: nn.Module, name: str) -> bool:
    return any(f"{ancestor.__module__}.{ancestor.__qualname__}" == name for ancestor in type(module).__mro__)
