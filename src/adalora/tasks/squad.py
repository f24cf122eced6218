"""Scores of SQuAD v1.1 and v2.0: the arithmetic of the official scripts, evaluate-v1.1.py and evaluate-v2.0.py.

Every list has one item for each question, in one order. Scores are percentages.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

Golds = Sequence[Sequence[str]]

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case without ASCII punctuation, English articles and more than one blank in a row."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def score_v1(guesses: Sequence[str], golds: Golds) -> dict[str, float]:
    """`exact_match` and `f1`, each question at the best of its golds; every question has at least one."""
    rows = list(zip(guesses, golds, strict=True))
    exact = [max(normalize(guess) == normalize(gold) for gold in texts) for guess, texts in rows]
    f1 = [max(_overlap(guess, gold) for gold in texts) for guess, texts in rows]
    return {"exact_match": _percent(exact), "f1": _percent(f1)}


def score_v2(guesses: Sequence[str], golds: Golds, no_answer: Sequence[float], threshold: float) -> dict[str, float]:
    """All that the script writes for predictions, probabilities of no answer and a threshold on these.

    `guesses` are texts as if every question had an answer; above `threshold` they count as no answer. A question
    without golds has none. Keys are the script's: exact, f1, total, the same with HasAns_ and NoAns_ where there
    are such questions, and best_exact, best_f1 with the lowest threshold that gives them, *_thresh.
    """
    has = [bool(texts) for texts in golds]
    # A gold that normalizes to nothing leaves a question without answer, yet it counts as one that has.
    told = [[text for text in texts if normalize(text)] or [""] for texts in golds]
    rows = list(zip(guesses, told, strict=True))
    exact: list[float] = [max(int(normalize(guess) == normalize(text)) for text in texts) for guess, texts in rows]
    f1 = [max(_agreement(guess, text) for text in texts) for guess, texts in rows]
    scores: dict[str, float] = {}
    cut = {name: _cut(values, no_answer, has, threshold) for name, values in (("exact", exact), ("f1", f1))}
    for prefix, kinds in (("", (True, False)), ("HasAns_", (True,)), ("NoAns_", (False,))):
        chosen = [i for i, kind in enumerate(has) if kind in kinds]
        if chosen:
            scores |= {prefix + name: _percent([values[i] for i in chosen]) for name, values in cut.items()}
            scores[prefix + "total"] = len(chosen)
    for name, values in (("exact", exact), ("f1", f1)):
        scores[f"best_{name}"], scores[f"best_{name}_thresh"] = _best(guesses, values, no_answer, has)
    return scores


def _overlap(guess: str, gold: str) -> float:
    """F1 of the words as bags; 0 if either has none."""
    words, wanted = normalize(guess).split(), normalize(gold).split()
    same = sum((Counter(words) & Counter(wanted)).values())
    if not same:
        return 0
    precision, recall = same / len(words), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _agreement(guess: str, gold: str) -> float:
    """The same, but two texts without a word agree: that is v2.0's `no answer`."""
    if not normalize(guess) or not normalize(gold):
        return int(normalize(guess) == normalize(gold))
    return _overlap(guess, gold)


def _cut(scores: Sequence[float], no_answer: Sequence[float], has: Sequence[bool], threshold: float) -> list[float]:
    rows = zip(scores, no_answer, has, strict=True)
    return [float(not answered) if probability > threshold else score for score, probability, answered in rows]


def _best(
    guesses: Sequence[str], scores: Sequence[float], no_answer: Sequence[float], has: Sequence[bool]
) -> tuple[float, float]:
    """(best score, its threshold): from nothing answered, one question more at a time."""
    best = current = float(has.count(False))
    threshold = 0.0
    for i in sorted(range(len(scores)), key=lambda i: no_answer[i]):
        current += scores[i] if has[i] else -1 if guesses[i] else 0
        if current > best:
            best, threshold = current, no_answer[i]
    return 100.0 * best / len(scores), threshold


def _percent(scores: Sequence[float]) -> float:
    return 100.0 * sum(scores) / len(scores)
