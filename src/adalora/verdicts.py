"""Answers of an accelerator to yes-or-no questions, heard without making the host wait for the device.

A step that asked "is this finite?" and waited would stop the host from launching ahead. On a CPU the answer is
there at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor


class Verdicts:
    """Questions on their way, in order."""

    def __init__(self) -> None:
        self._pending: deque[tuple[torch.cuda.Event, Tensor, Callable[[], None]]] = deque()

    def ask(self, answer: Tensor, if_not: Callable[[], None]) -> None:
        """Call `if_not` if the bool scalar `answer` is false: now, or from a later `hear` if it is on a GPU."""
        if not answer.is_cuda:
            if not answer:
                if_not()
            return
        heard = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
        heard.copy_(answer, non_blocking=True)
        arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrival.record(torch.cuda.current_stream(answer.device))
        self._pending.append((arrival, heard, if_not))

    def hear(self, wait: bool = False) -> None:
        """Act on the answers that have arrived; with `wait`, on all."""
        while self._pending and (wait or self._pending[0][0].query()):  # type: ignore[no-untyped-call]
            arrival, heard, if_not = self._pending.popleft()
            arrival.synchronize()
            if not heard:
                if_not()
