"""What a fine-tuned score must be held against: a linear probe on the frozen encoder, and a bag of words.

Both tune one number, the strength of the regularisation, on source files held out from the training set.
The test set is looked at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .docstrings import Example

CS = (0.1, 1.0, 10.0, 100.0)
HELD_OUT = 0.2
MAX_TOKENS = 32
BATCH = 64


@dataclass(frozen=True)
class BaselineResult:
    """Scores on the test set in [0, 1], the chosen inverse regularisation, and the call's wall seconds."""

    accuracy: float
    macro_f1: float
    c: float
    seconds: float


def linear_probe(encoder_folder: str | Path, train: Sequence[Example], test: Sequence[Example]) -> BaselineResult:
    """Logistic regression on mean-pooled embeddings of the frozen encoder at `encoder_folder`."""
    start = time.perf_counter()
    embeddings = embed(encoder_folder, [example.text for example in (*train, *test)])  # (train + test, hidden)

    def features(fitted_on: list[int]) -> Any:
        return embeddings

    return _fit_and_score(features, train, test, start)


def bag_of_words(train: Sequence[Example], test: Sequence[Example]) -> BaselineResult:
    """Logistic regression on TF-IDF weights of words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    start = time.perf_counter()
    texts = [example.text for example in (*train, *test)]

    def features(fitted_on: list[int]) -> Any:
        # The vocabulary comes from the rows being fitted, so that held-out rows stay unseen.
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        return vectorizer.fit([texts[i] for i in fitted_on]).transform(texts)  # (train + test, words), sparse

    return _fit_and_score(features, train, test, start)


def embed(encoder_folder: str | Path, texts: Sequence[str]) -> Any:
    """Mean over the real tokens of the encoder's last hidden states, as a (texts, hidden) numpy array."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(encoder_folder))
    encoder = AutoModel.from_pretrained(str(encoder_folder)).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # batches of equal length waste no padding
    pooled = torch.empty(len(texts), encoder.config.hidden_size)
    with torch.inference_mode():
        for first in range(0, len(order), BATCH):
            rows = order[first : first + BATCH]
            batch = tokenizer(
                [texts[i] for i in rows],
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            )
            hidden = encoder(**batch).last_hidden_state  # (batch, tokens, hidden)
            mask = batch["attention_mask"].unsqueeze(-1)  # (batch, tokens, 1)
            pooled[rows] = (hidden * mask).sum(1) / mask.sum(1)
    return pooled.numpy()


def _fit_and_score(
    features: Callable[[list[int]], Any], train: Sequence[Example], test: Sequence[Example], start: float
) -> BaselineResult:
    """`features(rows)` gives the matrix of all rows, train before test, with nothing fitted on other rows."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.model_selection import GroupShuffleSplit
    from threadpoolctl import threadpool_limits

    labels = [example.label for example in train]
    sources = [example.source for example in train]
    folds = GroupShuffleSplit(n_splits=1, test_size=HELD_OUT, random_state=0).split(labels, groups=sources)
    fit, held_out = (rows.tolist() for rows in next(folds))

    def predict(c: float, matrix: Any, rows: list[int], asked: list[int]) -> Any:
        # One thread: on a busy machine small solvers spend most of their time waiting for the other one.
        with threadpool_limits(1):
            model = LogisticRegression(C=c, max_iter=2000).fit(matrix[rows], [labels[i] for i in rows])
            return model.predict(matrix[asked])

    matrix = features(fit)
    held_out_labels = [labels[i] for i in held_out]
    best = max(CS, key=lambda c: accuracy_score(held_out_labels, predict(c, matrix, fit, held_out)))

    rows = list(range(len(train)))
    predicted = predict(best, features(rows), rows, list(range(len(train), len(train) + len(test))))
    truth = [example.label for example in test]
    accuracy = float(accuracy_score(truth, predicted))
    macro_f1 = float(f1_score(truth, predicted, average="macro"))
    return BaselineResult(accuracy, macro_f1, best, time.perf_counter() - start)
