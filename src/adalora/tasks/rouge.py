"""ROUGE by Google's rouge_score, the implementation that papers and transformers' own examples report."""

from __future__ import annotations

from collections.abc import Sequence

from nltk.tokenize.punkt import PunktSentenceTokenizer
from rouge_score.rouge_scorer import RougeScorer

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge(guesses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean F-measures in percent, words stemmed, each text against that of its references which fits it best.

    Also `mean_rouge`, the mean of ROUGE-1, -2 and -L. ROUGE-Lsum goes by sentences: lines, or what nltk's Punkt
    finds in them with its plain rules, because its lists of abbreviations would have to be downloaded.
    """
    scorer, splitter = RougeScorer(KINDS, use_stemmer=True), PunktSentenceTokenizer()

    def lines(text: str) -> str:
        return "\n".join(sentence for line in text.splitlines() for sentence in splitter.tokenize(line))

    rows = [
        scorer.score_multi([lines(text) for text in texts], lines(guess))
        for guess, texts in zip(guesses, references, strict=True)
    ]
    scores = {kind: 100.0 * sum(row[kind].fmeasure for row in rows) / len(rows) for kind in KINDS}
    return scores | {"mean_rouge": (scores["rouge1"] + scores["rouge2"] + scores["rougeL"]) / 3}
