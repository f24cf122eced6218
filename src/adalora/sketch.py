"""Leading singular vectors of matrices that are never formed, and hearing what passes through layers meanwhile.

A randomized SVD (Halko, Martinsson and Tropp, 2011) needs only products of M with thin matrices. Where M is a sum over
tokens of left rightᵀ, so are they: Y = MΩ in one pass over the data, Mᵀ·orth(Y) in the next, and so on in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Listener = Callable[[Tensor, Tensor], None]  # of a layer's input x (…, in) and output y (…, out)


class Sketch:
    """The `width` leading singular triplets of M = Σ left rightᵀ (out, in), from rows that pass by several times."""

    def __init__(self, shape: tuple[int, int], width: int, like: Tensor, generator: torch.Generator) -> None:
        self._shape, width = shape, min(width, *shape)
        self._basis = torch.randn(shape[1], width, generator=generator, dtype=torch.float64).to(like)  # Ω (in, l)
        self._side = 0  # that the product lies on: 0 out, 1 in
        self.total = like.new_zeros(shape[0], width)

    def add(self, left: Tensor, right: Tensor) -> None:
        """Take in rows left (…, out) and right (…, in)."""
        with torch.no_grad(), torch.autocast(self.total.device.type, enabled=False):
            rows = [part.detach().reshape(-1, part.shape[-1]).to(self.total.dtype) for part in (left, right)]
            to, by = rows[self._side], rows[1 - self._side]
            self.total += to.T @ (by @ self._basis)

    def turn(self) -> None:
        """Go on with the other side, on an orthonormal basis of what was found on this one."""
        self._basis, self._side = torch.linalg.qr(self.total.double()).Q.to(self.total), 1 - self._side
        self.total = self.total.new_zeros(self._shape[self._side], self._basis.shape[1])

    def triplets(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (out, l), σ (l,) falling, V (in, l), in fp64, after an even number of passes."""
        V, values, Wh = torch.linalg.svd(self.total.double(), full_matrices=False)
        return self._basis.double() @ Wh.T, values, V


@contextmanager
def listening(modules: Mapping[str, nn.Module], listeners: Mapping[str, Listener]) -> Iterator[None]:
    """Tell the listener of each module, by name, its input and its output whenever it runs."""

    def hook(listener: Listener) -> Callable[..., None]:
        def hear(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            listener((args[0] if args else next(iter(kwargs.values()))).detach(), output)

        return hear

    with ExitStack() as stack:
        for name, module in modules.items():
            # Before hooks of others, which may put another tensor in the place of the output.
            handle = module.register_forward_hook(hook(listeners[name]), prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def undisturbed(model: nn.Module, seed: int) -> Iterator[Callable[[], None]]:
    """Evaluation mode inside; modes, buffers and torch's generators are as before afterwards.

    Yields what puts the generators of the CPU and of the model's devices to `seed`, as it does at once. Those of
    Python and NumPy are not touched.
    """
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    generators = [torch.default_generator, *(torch.cuda.default_generators[index] for index in devices)]
    states = [generator.get_state() for generator in generators]
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module._buffers, name, buffer, buffer.detach().clone())
        for module in modes
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]

    def begin() -> None:
        for generator in generators:
            generator.manual_seed(seed)

    try:
        for module in modes:
            module.training = False
        begin()
        yield begin
    finally:
        for module, mode in modes.items():
            module.training = mode
        for owner, name, buffer, value in buffers:
            owner[name] = buffer
            with torch.no_grad():
                buffer.copy_(value)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
