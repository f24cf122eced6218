"""From start and end logits of overlapping windows to the best spans of a context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit


@dataclass(frozen=True)
class Span:
    """Characters start to end (not included) of a context; `score` is the sum of two logits."""

    score: float
    start: int
    end: int


def window_spans(
    start_logits: Any, end_logits: Any, starts: Sequence[int], ends: Sequence[int], n_best: int, longest: int
) -> list[Span]:
    """The at most `n_best` best spans of one window, best first.

    They begin at one of the n_best best starts, end at one of the n_best best ends and have at most `longest`
    tokens. `starts` and `ends` are each token's characters in the context, -1 for tokens that are not of it; the
    logits may be longer, by padding. Of equal scores the first in the window wins.
    """
    first = np.asarray(start_logits, dtype=np.float64)[: len(starts)]
    last = np.asarray(end_logits, dtype=np.float64)[: len(ends)]
    valid = np.flatnonzero(np.asarray(starts) >= 0)
    begin = valid[np.argsort(-first[valid], kind="stable")[:n_best]]
    stop = valid[np.argsort(-last[valid], kind="stable")[:n_best]]
    left, right = (grid.reshape(-1) for grid in np.meshgrid(begin, stop, indexing="ij"))
    fits = (left <= right) & (right - left < longest)
    left, right = left[fits], right[fits]
    scores = first[left] + last[right]
    order = np.lexsort((right, left, -scores))
    return _first_of_each((Span(float(scores[i]), starts[left[i]], ends[right[i]]) for i in order), n_best)


def best_spans(windows: Iterable[Sequence[Span]], n_best: int) -> list[Span]:
    """The at most `n_best` best spans of all windows of a context, best first; at equal scores the first window's."""
    spans = [span for window in windows for span in window]
    return _first_of_each(sorted(spans, key=lambda span: -span.score), n_best)


def no_answer_probability(null: float, best: float) -> float:
    """Softmax of the score of `no answer` against that of the best span."""
    return float(expit(null - best))


def probability(score: float, others: Sequence[float]) -> float:
    """Softmax of a score among `others`, which include it."""
    return float(np.exp(score - np.logaddexp.reduce(others)))


def _first_of_each(spans: Iterable[Span], n_best: int) -> list[Span]:
    # Windows overlap, and the bytes of one character may be several tokens: the same characters come up again.
    found: dict[tuple[int, int], Span] = {}
    for span in spans:
        found.setdefault((span.start, span.end), span)
        if len(found) == n_best:
            break
    return list(found.values())
