"""Layers with an increment in SVD form: the class of an existing module is replaced by a subclass.

`SVDAdapter` holds the idea: base output plus s·ΔW applied to the input. The subclasses only say how the
matrices of equation 3 meet their kind of layer. Converting in place keeps every base key, hook, tie and
`isinstance` (design D1). How a module becomes one of these is in `conversion`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import adapted_linear, autocasts, delta_matrix, like, low_rank_embedding, low_rank_linear
from .quantized import Into, is_quantized, library_of, merged_weight, plain_output, put_weight, whole_weight


class SVDAdapter(nn.Module):
    """Mixin in front of a layer class. Abstract: `shape_of`, `delta_output`.

    lora_A (r, in) = Q, lora_E (r, 1) = Λ, lora_B (out, r) = P; lora_keep (r,) marks the live triplets.
    `scaling` is a plain float that never changes, whatever the rank becomes.
    """

    base_type: ClassVar[type[nn.Module]]
    transposed: ClassVar[bool] = False  # whether the weight is stored (in, out)

    weight: Tensor
    lora_A: nn.Parameter
    lora_E: nn.Parameter
    lora_B: nn.Parameter
    lora_keep: Tensor
    base_weight: Tensor | None
    scaling: float
    lora_dropout: float
    adapter_enabled: bool
    init_capacity: int  # before compaction

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        if not self.adapter_enabled or self.merged or not self.capacity:
            return y
        return y + self.delta_output(x).to(y.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the increment as a matrix."""
        return self.shape_of(self)

    @staticmethod
    def shape_of(module: Any) -> tuple[int, int]:
        """(out, in) that an increment of the base layer `module` has."""
        raise NotImplementedError

    def delta_output(self, x: Tensor) -> Tensor:
        """s·ΔW applied to the layer's input."""
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """s·ΔW in the shape of the base weight, before any packing, and the dtype of the adapter."""
        delta = delta_matrix(self.lora_A, self.lora_E, self.lora_B, self.scaling)
        return delta.T if self.transposed else delta

    def dropped(self, x: Tensor) -> Tensor:
        """The input after the adapter's own dropout."""
        return F.dropout(x, self.lora_dropout, self.training) if self.lora_dropout else x

    @property
    def capacity(self) -> int:
        """Triplets allocated in memory."""
        return self.lora_E.shape[0]

    @property
    def rank(self) -> int:
        """Triplets that are live: granted by the last allocation."""
        return int(self.lora_keep.sum())

    @property
    def merged(self) -> bool:
        """Whether the weight already contains ΔW."""
        return self.base_weight is not None

    def merge(self, into: Into | None = None, dtype: torch.dtype | None = None) -> None:
        """Put W + s·ΔW in the place of the weight, and the original aside: nothing is copied. No-op if merged.

        `into` and `dtype` are for quantized weights, as in `quantized.merged_weight`.
        """
        if self.merged:
            return
        with torch.no_grad():
            merged = (self.weight + self.delta_weight()).to(self.weight.dtype)
            self.register_buffer("base_weight", self.weight.data, persistent=False)
            self._show(merged)

    def unmerge(self) -> None:
        """Put the original weight back, the same bits in the same memory. No-op if not merged."""
        if self.base_weight is not None:
            self._show(self.base_weight)
            self.register_buffer("base_weight", None, persistent=False)

    def _show(self, weight: Tensor) -> None:
        self.weight.data = weight
        # So that a backward pass of before, which would see the wrong weight, raises.
        torch.autograd.graph.increment_version(self.weight)

    def extra_repr(self) -> str:
        rank = "?" if self.lora_keep.is_meta else self.rank
        return f"{super().extra_repr()}, rank={rank}/{self.capacity}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:  # the weight holds the increment, which must not be applied a second time
            for name in ("lora_A", "lora_E", "lora_B"):
                del destination[prefix + name]
        elif self.capacity < self.init_capacity:  # the scaling is that of the initial rank, which is no longer seen
            destination[f"{prefix}lora_scaling"] = torch.tensor(self.scaling, dtype=torch.float64)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)


class SVDDense(SVDAdapter):
    """A matrix product with its bias: y = x Wᵀ + b + s · x Aᵀ diag(E) Bᵀ."""

    bias: Any

    def forward(self, x: Tensor) -> Tensor:
        acts = self.adapter_enabled and not self.merged and self.capacity
        if not acts or not self._in_one_step(x):
            plain = self.merged and library_of(self) and not is_quantized(self)
            return plain_output(self, x) if plain else super().forward(x)
        weight, factors = self.weight.t() if self.transposed else self.weight, (self.lora_A, self.lora_E, self.lora_B)
        dropout = self.lora_dropout if self.training else 0.0
        return adapted_linear(x, weight, self.bias, factors, self.scaling, dropout)

    def delta_output(self, x: Tensor) -> Tensor:
        return low_rank_linear(self.dropped(x), self.lora_A, self.lora_E, self.lora_B, self.scaling)

    def _in_one_step(self, x: Tensor) -> bool:
        """Whether `adapted_linear` may do it: a frozen weight in plain memory, of x's dtype, outside torch.func and
        of traces, which cannot hold an autograd function.
        """
        weight = self.weight
        known = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and not weight.requires_grad
        if torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return False
        return known and (x.dtype == weight.dtype or autocasts(x.device.type))


class SVDLinear(SVDDense, nn.Linear):
    """nn.Linear with an increment."""

    base_type = nn.Linear

    @staticmethod
    def shape_of(module: Any) -> tuple[int, int]:
        return module.out_features, module.in_features

    def merge(self, into: Into | None = None, dtype: torch.dtype | None = None) -> None:
        if self.merged or not is_quantized(self):
            return super().merge()
        with torch.no_grad():
            merged = merged_weight(self, self.delta_weight(), into, dtype)
            self.register_buffer("base_weight", whole_weight(self), persistent=False)
            put_weight(self, merged)

    def unmerge(self) -> None:
        if not isinstance(self.base_weight, nn.Parameter):  # a plain weight is swapped by its data
            return super().unmerge()
        put_weight(self, self.base_weight)
        self.register_buffer("base_weight", None, persistent=False)


class SVDConv(SVDAdapter):
    """A convolution with the base's geometry to r channels a group, then a 1×1 convolution.

    The matrix of the increment is (out, in/groups · kernel). With groups the same A serves each group, as
    the weight's own layout says: output channel o has row o of B.
    """

    groups: int
    kernel_size: tuple[int, ...]

    @staticmethod
    def shape_of(module: Any) -> tuple[int, int]:
        return module.weight.shape[0], module.weight[0].numel()

    def delta_weight(self) -> Tensor:
        return super().delta_weight().reshape(self.weight.shape)

    def delta_output(self, x: Tensor) -> Tensor:
        spatial = (1,) * len(self.kernel_size)
        x = self.dropped(x)
        x = like(x, self.lora_A)
        kernel = self.lora_A.view(self.capacity, *self.weight.shape[1:]).repeat(self.groups, 1, *spatial)
        # _conv_forward, not F.conv: it alone knows the padding mode.
        projected = self._conv_forward(x, kernel, None)  # type: ignore[operator]  # (…, groups·r, spatial)
        gate = (self.lora_E * self.scaling).repeat(self.groups, 1).view(-1, *spatial)
        point = self.lora_B.view(*self.lora_B.shape, *spatial)  # (out, r, 1, …)
        convolve = getattr(F, f"conv{len(spatial)}d")
        output: Tensor = convolve(projected * gate.to(projected.dtype), point, groups=self.groups)
        return output


class SVDConv1d(SVDConv, nn.Conv1d):
    """Conv1d with an increment."""

    base_type = nn.Conv1d


class SVDConv2d(SVDConv, nn.Conv2d):
    """Conv2d with an increment."""

    base_type = nn.Conv2d


class SVDConv3d(SVDConv, nn.Conv3d):
    """Conv3d with an increment."""

    base_type = nn.Conv3d


class SVDEmbedding(SVDAdapter, nn.Embedding):
    """Rows of W + s·(B diag(E) A)ᵀ; A is (r, num_embeddings), as in PEFT's LoRA for embeddings.

    Dropout is that of a one-hot input: it drops the increment of whole tokens. Subclasses that multiply the
    rows by `embed_scale` (BART, Gemma) have the increment multiplied too.
    """

    base_type = nn.Embedding
    transposed = True

    @staticmethod
    def shape_of(module: Any) -> tuple[int, int]:
        return module.embedding_dim, module.num_embeddings

    def delta_output(self, x: Tensor) -> Tensor:
        delta = low_rank_embedding(x, self.lora_A, self.lora_E, self.lora_B, self.scaling, self.padding_idx)
        if self.lora_dropout and self.training:
            delta = delta * F.dropout(delta.new_ones(*x.shape, 1), self.lora_dropout)
        return delta * embed_scale(self)


def embed_scale(module: nn.Module) -> Tensor | float:
    """The factor that a scaled embedding applies to its rows, in the dtype in which it applies it."""
    scale: Tensor | float = getattr(module, "embed_scale", 1.0)
    return scale.to(module.weight.dtype) if isinstance(scale, Tensor) else scale  # type: ignore[arg-type]
