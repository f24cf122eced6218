"""Golden numbers: the official scripts evaluate-v1.1.py and evaluate-v2.0.py, run on these rows.

Their texts were those in huggingface/datasets, metrics/squad/evaluate.py at 2a4e037e and metrics/squad_v2/evaluate.py
at 02bb18c7, read in November 2026; they are not part of this project.
"""

import pytest

from adalora.tasks.squad import normalize, score_v1, score_v2

# (guess, golds, probability of no answer)
ROWS: list[tuple[str, list[str], float]] = [
    ("Denver Broncos", ["Denver Broncos", "The Denver Broncos!"], 0.05),
    ("the denver  broncos", ["Denver Broncos"], 0.20),
    ("Broncos of Denver", ["Denver Broncos", "Broncos"], 0.35),
    ("in 1066", ["1066", "the year 1066", "10-66"], 0.35),
    ("U.S.", ["US", "United States"], 0.60),
    ("an apple a day", ["apple", "a day of apples"], 0.10),
    ("São Paulo", ["Sao Paulo", "são paulo,"], 0.70),
    ("the", ["a"], 0.15),
    ("", ["something"], 0.95),
    ("café-bar «x»", ["cafébar x", "bar"], 0.45),
    ("one one two", ["one two two", "two"], 0.50),
    ("anthem theory", ["Anthem theory."], 0.02),
]
NONE: list[tuple[str, list[str], float]] = [
    ("France", [], 0.90),
    ("", [], 0.40),
    ("the", [], 0.30),
    ("Rollo", [], 0.08),
    ("a duke", [], 0.55),
    ("10th century", [], 0.50),
]


def columns(rows: list[tuple[str, list[str], float]]) -> tuple[list[str], list[list[str]], list[float]]:
    guesses, golds, no_answer = zip(*rows, strict=True)
    return list(guesses), list(golds), list(no_answer)


def test_version_1_equals_the_official_script() -> None:
    guesses, golds, _ = columns(ROWS)
    assert score_v1(guesses, golds) == {"exact_match": 50.0, "f1": pytest.approx(69.16666666666667, abs=1e-12)}


@pytest.mark.parametrize(
    "threshold,official",
    [
        (1.0, (44.44444444444444, 62.77777777777778, 50.0, 77.50000000000001, 100 / 3, 100 / 3)),
        (0.5, (44.44444444444444, 62.77777777777778, 100 / 3, 60.833333333333336, 200 / 3, 200 / 3)),
        (0.3, (50.0, 53.70370370370371, 100 / 3, 38.888888888888886, 83.33333333333333, 83.33333333333333)),
    ],
)  # fmt: skip
def test_version_2_equals_the_official_script(threshold: float, official: tuple[float, ...]) -> None:
    mixed = [row for pair in zip(ROWS[:6], NONE, strict=True) for row in pair] + ROWS[6:]
    names = ("exact", "f1", "HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1")
    best = {"best_exact": 50.0, "best_exact_thresh": 0.2, "best_f1": 62.77777777777778, "best_f1_thresh": 0.7}
    totals = {"total": 18, "HasAns_total": 12, "NoAns_total": 6}
    wanted = dict(zip(names, official, strict=True)) | totals | best
    assert score_v2(*columns(mixed), threshold) == pytest.approx(wanted, abs=1e-12)


def test_a_set_of_one_kind_has_no_scores_of_the_other() -> None:
    answered = score_v2(*columns(ROWS), 1.0)
    assert [key for key in answered if key.startswith("NoAns_")] == []
    assert (answered["best_f1"], answered["best_f1_thresh"]) == (pytest.approx(77.5), 0.7)
    unanswerable = score_v2(*columns(NONE), 0.5)
    assert [key for key in unanswerable if key.startswith("HasAns_")] == []
    # Nothing answered is already perfect, and the script then reports the threshold 0.
    assert (unanswerable["best_f1"], unanswerable["best_f1_thresh"]) == (100.0, 0.0)
    assert unanswerable["exact"] == pytest.approx(66.66666666666667, abs=1e-12)


def test_two_empty_texts_agree_in_version_2_only() -> None:
    assert score_v1(["the"], [["a"]]) == {"exact_match": 100.0, "f1": 0.0}
    scores = score_v2(["the"], [["a"]], [0.0], 1.0)
    assert (scores["exact"], scores["f1"], scores["HasAns_total"]) == (100.0, 100.0, 1)


def test_articles_go_after_punctuation_and_only_as_words() -> None:
    assert normalize("The U.S.A.; an-other theatre,  a  ") == "usa another theatre"
    assert normalize("the-an") == "thean"  # punctuation first: no article is left to remove
