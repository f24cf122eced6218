"""Metrics of classes, numbers and tags, by scikit-learn, scipy and seqeval."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from scipy.stats import ConstantInputWarning, pearsonr, spearmanr
from seqeval.metrics.sequence_labeling import precision_recall_fscore_support
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


def class_scores(guess: Any, truth: Any, classes: int) -> dict[str, float]:
    """Of class indices, each an array (rows,). With two classes also the F1 of the second, and its mean with accuracy.

    As MRPC and QQP are scored, whose second class is the equivalent pair.
    """
    scores = {
        "accuracy": float(accuracy_score(truth, guess)),
        "macro_f1": float(f1_score(truth, guess, average="macro")),
        "matthews": float(matthews_corrcoef(truth, guess)),
    }
    if classes == 2:
        scores["f1"] = float(f1_score(truth, guess, pos_label=1, zero_division=0))
        scores["mean_accuracy_f1"] = (scores["accuracy"] + scores["f1"]) / 2
    return scores


def number_scores(guess: Any, truth: Any) -> dict[str, float]:
    """Correlations of numbers, each an array (rows,); NaN where either is constant."""
    if len(truth) < 2:
        return dict.fromkeys(("pearson", "spearman", "mean_pearson_spearman"), math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        pearson, spearman = (float(test(guess, truth).statistic) for test in (pearsonr, spearmanr))
    return {"pearson": pearson, "spearman": spearman, "mean_pearson_spearman": (pearson + spearman) / 2}


def entity_scores(guess: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of entities over all rows of tags, as conlleval counts them; 0 where there are none."""
    options = {"average": "micro", "zero_division": 0}
    precision, recall, f1, _ = precision_recall_fscore_support(truth, guess, **options)
    return {"f1": float(f1), "precision": float(precision), "recall": float(recall)}


def tag_accuracy(guess: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> float:
    """Share of words with the right tag."""
    pairs = [(g, t) for row in zip(guess, truth, strict=True) for g, t in zip(*row, strict=True)]
    return sum(g == t for g, t in pairs) / len(pairs)
