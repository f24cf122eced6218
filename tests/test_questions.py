import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import disable_progress_bars
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn
from transformers import TrainingArguments

from adalora import AdaLoraConfig
from adalora.errors import ConfigError, DataError
from adalora.integrations.transformers import AdaLoraCallback
from adalora.methods import build_method
from adalora.recipe import Recipe
from adalora.tasks.ordered import OrderedTrainer
from adalora.tasks.questions import QuestionsTask, build_task, without_data
from adalora.tasks.spans import Span, best_spans, no_answer_probability, window_spans
from adalora.tasks.squad import score_v1, score_v2
from adalora.train import run
from folders import Row, save_tokenizer, train_and_validation

disable_progress_bars()

ANIMALS, PLANTS = ("cat", "dog", "cow", "hen"), ("oak", "elm", "fir", "ash")
FILLERS = ("small", "green", "near", "with", "and", "old", "house", "river")
WORDS = ("which", "animal", "plant", *ANIMALS, *PLANTS, *FILLERS)


def question(answer: str, context: str, start: int | None = None, **more: Any) -> Row:
    found = context.index(answer) if start is None else start
    row = {"id": "q", "question": "which animal", "context": context}
    return row | {"answers": {"text": [answer] if answer else [], "answer_start": [found] if answer else []}} | more


def toy(count: int, length: int, seed: int, without: bool = False) -> list[Row]:
    """An animal and a plant among other words, of which a question asks for one; `without`, for half nothing fits."""
    pick, rows = random.Random(seed), []
    for index in range(count):
        kinds = {"animal": pick.choice(ANIMALS), "plant": pick.choice(PLANTS)}
        kind = pick.choice(list(kinds))
        missing = without and index % 2 == 0
        words = [word for name, word in kinds.items() if not (missing and name == kind)]
        words += pick.choices(FILLERS, k=length - len(words))
        pick.shuffle(words)
        answer = "" if missing else kinds[kind]
        rows.append(question(answer, " ".join(words), id=f"q{index}", question=f"which {kind}"))
    return rows


def bert_tokenizer() -> Any:
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
    return transformers.BertTokenizer(vocab={word: index for index, word in enumerate(words)})


def save(folder: Path, kind: str = "bert") -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"max_position_embeddings": 130, "initializer_range": 0.15}
    if kind == "bert":
        tokenizer = bert_tokenizer()
        model: Any = transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer), **sizes))
    elif kind == "roberta":
        letters = {letter: 5 + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyzĠ.,éÃ©")}
        special = {"<pad>": 0, "<unk>": 1, "<s>": 2, "</s>": 3, "<mask>": 4}
        tokenizer = transformers.RobertaTokenizer(vocab=special | letters, merges=[])
        config = transformers.RobertaConfig(vocab_size=len(tokenizer), pad_token_id=0, **sizes)
        model = transformers.RobertaModel(config)
    elif kind == "bart":
        tokenizer = bert_tokenizer()
        halves = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 130}
        ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
        config = transformers.BartConfig(vocab_size=len(tokenizer), **halves, **heads, **ids)
        model = transformers.BartModel(config)
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    else:
        special_pieces = [("[PAD]", 0.0), ("[UNK]", 0.0), ("[CLS]", 0.0), ("[SEP]", 0.0), ("[MASK]", 0.0)]
        pieces = [(f"▁{word}", -1.0) for word in WORDS] + [("▁", -3.0), (".", -3.0), (",", -3.0)]
        tokenizer = transformers.DebertaV2Tokenizer(vocab=special_pieces + pieces)
        config = transformers.DebertaV2Config(
            vocab_size=len(tokenizer), relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0, **sizes
        )
        model = transformers.DebertaV2Model(config)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def recipe(folder: Path, train: list[Row], validation: list[Row] | None = None, **data: Any) -> Recipe:
    section = train_and_validation(folder, train, validation) | {"max_length": 24, "stride": 4} | data
    return Recipe(
        task="question-answering", model={"name_or_path": str(folder)}, data=section, method={"name": "adalora"}
    )


def build(folder: Path, train: list[Row], validation: list[Row] | None = None, **data: Any) -> QuestionsTask:
    return build_task(str(folder), recipe(folder, train, validation, **data))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("bert"))


# Spans


def naive_window(start: Any, end: Any, starts: Any, ends: Any, n_best: int, longest: int) -> list[tuple[Any, ...]]:
    valid = [i for i in range(len(starts)) if starts[i] != -1]
    begins = sorted(valid, key=lambda i: (-start[i], i))[:n_best]
    stops = sorted(valid, key=lambda i: (-end[i], i))[:n_best]
    return [(-(start[i] + end[j]), i, j) for i in begins for j in stops if i <= j and j - i + 1 <= longest]


def naive_best(windows: list[Any], n_best: int, longest: int) -> list[Span]:
    everything = []
    for number, (start, end, starts, ends) in enumerate(windows):
        for score, i, j in naive_window(start, end, starts, ends, n_best, longest):
            everything.append((score, number, i, j, starts[i], ends[j]))
    spans: list[Span] = []
    for score, _, _, _, first, last in sorted(everything):
        if all((span.start, span.end) != (first, last) for span in spans):
            spans.append(Span(-score, first, last))
    return spans[:n_best]


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 6), st.integers(1, 5), st.booleans())
def test_spans_equal_a_naive_search_also_where_scores_tie(seed: int, n_best: int, longest: int, ties: bool) -> None:
    pick = random.Random(seed)
    windows = []
    for _ in range(pick.randint(1, 3)):
        first = pick.randint(0, 4)  # windows overlap, and two tokens may share their characters
        starts = [first + i - (pick.random() < 0.2) for i in range(pick.randint(1, 8))]
        ends = [s + 1 for s in starts]
        for i in range(len(starts)):
            if pick.random() < 0.3 or starts[i] < 0:
                starts[i] = ends[i] = -1
        value = (lambda: float(pick.randint(-2, 2))) if ties else (lambda: pick.uniform(-5, 5))
        padded = len(starts) + pick.randint(0, 2)
        windows.append(([value() for _ in range(padded)], [value() for _ in range(padded)], starts, ends))
    found = best_spans([window_spans(*window, n_best, longest) for window in windows], n_best)
    assert found == naive_best(windows, n_best, longest)


def test_a_span_has_at_most_the_allowed_tokens_and_no_outside_ones() -> None:
    start, end = [9.0, 1.0, 0.0, 0.0], [0.0, 0.0, 5.0, 9.0]
    spans = window_spans(start, end, [-1, 10, 12, -1], [-1, 11, 13, -1], 20, 1)
    assert spans == [Span(5.0, 12, 13), Span(1.0, 10, 11)]
    assert window_spans(start, end, [-1, 10, 12, -1], [-1, 11, 13, -1], 20, 2)[0] == Span(6.0, 10, 13)


def test_the_probability_of_no_answer_is_a_half_at_equal_scores_and_never_overflows() -> None:
    assert no_answer_probability(3.0, 3.0) == 0.5
    assert no_answer_probability(1.0, 0.0) == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-15)
    assert (no_answer_probability(-1e4, 1e4), no_answer_probability(1e4, -1e4)) == (0.0, 1.0)


# Windows


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta"])
def test_labels_of_all_windows_give_back_the_answer(tmp_path: Path, kind: str) -> None:
    save(tmp_path, kind)
    rows = toy(20, length=40, seed=0)
    rows.append(question("cow, near house", "small green.  river,\n cow, near house and old", question="which animal"))
    task = build(tmp_path, rows, max_length=40, stride=18)
    windows = task.splits["train"]
    assert len(windows) > len(rows)
    held = dict.fromkeys(range(len(rows)), 0)
    for window in windows:
        first, last, null = window["start_positions"], window["end_positions"], window["null"]
        assert len(window["input_ids"]) == window["length"] <= 40
        assert null == 0 and window["input_ids"][0] == task.processor.cls_token_id
        if (first, last) != (null, null):
            row = rows[window["row"]]
            text = row["context"][window["starts"][first] : window["ends"][last]]
            assert text == row["answers"]["text"][0]
            held[window["row"]] += 1
    assert min(held.values()) >= 1


def test_windows_cover_the_context_and_share_the_stride(folder: Path) -> None:
    row = question("cat", " ".join(["small"] * 30 + ["cat"] + ["green"] * 9))
    task = build(folder, [row], max_length=20, stride=5)
    windows = list(task.splits["train"])
    inside = [[s for s in window["starts"] if s >= 0] for window in windows]
    # 20 tokens less CLS, two SEP and two of the question are 15, of which 10 are new in each further window.
    assert [len(part) for part in inside] == [15, 15, 15, 10]
    assert [len(set(a) & set(b)) for a, b in pairwise(inside)] == [5, 5, 5]
    assert sorted(set().union(*inside)) == [
        m for m in range(len(row["context"])) if m == 0 or row["context"][m - 1] == " "
    ]
    answered = [(w["start_positions"], w["end_positions"]) != (0, 0) for w in windows]
    assert answered == ["cat" in row["context"][part[0] : part[-1] + 5].split() for part in inside]


# Learning and scoring


def train(task: QuestionsTask, model: nn.Module, out: Path, steps: int, rate: float = 2e-2) -> Any:
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=32, per_device_eval_batch_size=64,
        learning_rate=rate, report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no",
        train_sampling_strategy="group_by_length", use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = OrderedTrainer(
        model=model, args=arguments, train_dataset=task.splits["train"], eval_dataset=task.splits["validation"],
        data_collator=task.collator, callbacks=[AdaLoraCallback(AdaLoraConfig(init_r=12, target_r=8, lora_alpha=24.0))],
        **task.trainer_options,
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer


def by_predicting(task: QuestionsTask, model: nn.Module, rows: list[Row]) -> dict[str, float]:
    """The scores, by the other road: one answer at a time, from the rows of the file."""
    answers = task.predict(model, [{k: v for k, v in row.items() if k != "answers"} for row in rows])
    golds = [row["answers"]["text"] for row in rows]
    guesses = [answer["answer"] for answer in answers]
    if not task.data.no_answer:
        return score_v1(guesses, golds)
    scores = score_v2(guesses, golds, [0.0] * len(rows), 1.0)
    return {"exact_match": scores["exact"], "f1": scores["f1"]}


@pytest.mark.slow
def test_a_tiny_bert_learns_to_find_what_is_asked_for(folder: Path, tmp_path: Path) -> None:
    held = toy(60, 16, seed=1) + toy(40, 30, seed=2)
    task = build(folder, toy(600, 16, seed=0), held, max_length=24, stride=6)
    assert len(task.splits["validation"]) > len(task.questions["validation"]) == 100
    model = task.build_model(str(folder), recipe(folder, toy(2, 16, 0)))
    before = by_predicting(task, model, held)
    trainer = train(task, model, tmp_path, steps=200)
    scores = task.evaluate(trainer, "validation")
    assert before["exact_match"] < 50 and scores["exact_match"] > 90
    # The Trainer groups by length, the rows of the file do not: had it shuffled the windows, this would differ.
    assert by_predicting(task, model, held) == pytest.approx(scores, abs=1e-9)
    logged = trainer.evaluate()
    assert logged["eval_exact_match"] == pytest.approx(scores["exact_match"], abs=1e-9)
    assert task.evaluate(trainer, "train")["exact_match"] > 90  # another split than the one of compute_metrics
    answers = task.predict(model, held)
    assert [answer["id"] for answer in answers] == [row["id"] for row in held]
    for row, answer in zip(held, answers, strict=True):
        assert row["context"][answer["start"] : answer["end"]] == answer["answer"]
        assert 0 < answer["score"] <= 1 and answer["no_answer_probability"] is None


@pytest.mark.slow
def test_a_tiny_bert_learns_when_there_is_no_answer(folder: Path, tmp_path: Path) -> None:
    held = toy(60, 16, seed=1, without=True) + toy(40, 30, seed=2, without=True)
    task = build(folder, toy(800, 16, seed=0, without=True), held, max_length=24, stride=6, no_answer=True)
    model = task.build_model(str(folder), recipe(folder, toy(2, 16, 0)))
    trainer = train(task, model, tmp_path, steps=250)
    scores = task.evaluate(trainer, "validation")
    assert set(scores) == {
        *("exact_match", "f1", "HasAns_exact_match", "HasAns_f1", "NoAns_exact_match", "NoAns_f1"),
        *("best_exact_match", "best_exact_match_thresh", "best_f1", "best_f1_thresh"),
    }
    assert scores["exact_match"] > 85 and scores["best_f1"] >= scores["f1"]
    assert scores["HasAns_exact_match"] > 75 and scores["NoAns_exact_match"] > 75
    # Predictions are cut at the same threshold as the plain scores.
    assert by_predicting(task, model, held) == pytest.approx({k: scores[k] for k in ("exact_match", "f1")}, abs=1e-9)
    for answer in task.predict(model, held):
        none = answer["no_answer_probability"] > 0.5
        assert (answer["answer"] == "", answer["start"] is None, answer["end"] is None) == (none, none, none)
        assert 0 < answer["score"] <= 1


@pytest.mark.parametrize("method", [{"name": "adalora", "init_r": 6, "target_r": 4}, {"name": "lora", "r": 4}])
@pytest.mark.slow
def test_a_run_can_be_used_from_its_folder(tmp_path: Path, method: dict[str, Any]) -> None:
    save(tmp_path)
    rows, held = toy(200, 16, seed=0), toy(20, 30, seed=1)
    training = {"num_train_epochs": 3, "learning_rate": 2e-2, "use_cpu": True}
    wanted = recipe(tmp_path, rows, held).model_copy(update={"method": method, "training": training})
    result = run(wanted, tmp_path / "out", Console(quiet=True))
    bare = without_data(str(tmp_path), wanted, [])
    fresh = bare.build_model(str(tmp_path), wanted)
    model = build_method(wanted.method).load(fresh, tmp_path / "out" / "adapter")
    assert by_predicting(bare, model, held) == pytest.approx(result.scores, abs=1e-9)
    assert result.metric == "f1" and 0 < result.scores["f1"] <= 100


@pytest.mark.parametrize("kind", ["roberta", "deberta", "bart"])
def test_other_architectures_score_as_they_predict(tmp_path: Path, kind: str) -> None:
    save(tmp_path, kind)
    rows = toy(12, 14, seed=0)
    task = build(tmp_path, rows, rows, max_length=40, stride=8)
    model = task.build_model(str(tmp_path), recipe(tmp_path, rows))
    trainer = train(task, model, tmp_path / "out", steps=1)
    assert task.evaluate(trainer, "validation") == pytest.approx(by_predicting(task, model, rows), abs=1e-9)


def test_the_task_says_what_a_run_asks(folder: Path) -> None:
    rows = toy(8, 30, seed=0)
    task = build(folder, rows, rows[:4])
    assert (task.labels, task.task_type, task.metric) == ([], "QUESTION_ANS", "f1")
    windows = len(task.splits["train"]) + len(task.splits["validation"])
    assert task.describe() == (
        f"spans that answer questions; 8 train, 4 validation rows ({windows} windows of 24 tokens)"
    )
    model = task.build_model(str(folder), recipe(folder, rows)).eval()
    batch, name = task.probe(model, "validation")
    assert getattr(model(**batch), name).shape == (8, 24) and set(batch) == set(task.processor.model_input_names)


def test_predictions_without_data_are_those_of_the_trained_task(folder: Path) -> None:
    rows = toy(5, 30, seed=3)
    task, bare = build(folder, rows), without_data(str(folder), recipe(folder, rows), [])
    model = task.build_model(str(folder), recipe(folder, rows))
    assert bare.predict(model, rows) == task.predict(model, rows)
    assert bare.predict(model, [{"question": "which cat", "context": "cat"}])[0]["answer"] == "cat"
    assert bare.predict(model, []) == []


# Mistakes


@pytest.mark.parametrize(
    "rows,message",
    [
        (
            [question("cat", "a cat"), question("cat", "a cat", 1)],
            r"row 1: .*'cat' begins at character 1 .*' ca' stands",
        ),
        ([question("cat", "a cat", -1)], r"row 0: .*begins at character -1"),
        ([question("", "a cat")], r"row 0: .*no answer\. .*data\.no_answer=true"),
        ([question("cat", "a cat", answers={"text": ["cat"], "answer_start": []})], r"row 0: .*a start for each text"),
        ([question("cat", "a cat", answers="cat")], r"row 0: column 'answers' is 'cat'"),
        ([question("", " ")], r"'context' is empty in 1 of 1 rows, the first is row 0"),
        (
            [question("cat", "a cat"), question("cat", "a cat", question=None)],
            r"'question' must hold text in every row",
        ),
        ([question("cat", "a cat", question="which " * 18)], r"row 0: the question has 18 tokens, .*is 17"),
        ([{"question": "which", "context": "cat"}], r"no column 'answers'"),
        ([question("\u200b", "\u200b")], r"gives no tokens"),
    ],
)
def test_bad_rows_are_named(folder: Path, rows: list[Row], message: str) -> None:
    with pytest.raises(DataError, match=message):
        build(folder, rows)


@pytest.mark.parametrize(
    "row,message",
    [
        ({"question": "which"}, r"row 1: 'context' is None"),
        ({"question": 3, "context": "cat"}, r"row 1: 'question' is 3"),
        ({"question": "which", "context": " "}, r"'context' is empty in 1 of 2 rows, the first is row 1"),
        ({"question": "which " * 18, "context": "cat"}, r"row 1: the question has 18 tokens"),
    ],
)
def test_bad_rows_to_predict_are_named(folder: Path, row: Row, message: str) -> None:
    task = without_data(str(folder), recipe(folder, toy(2, 5, 0)), [])
    with pytest.raises(DataError, match=message):
        task.predict(nn.Linear(1, 1), [{"question": "which", "context": "cat"}, row])


def test_tokenizers_that_cannot_place_answers_are_refused(folder: Path, tmp_path: Path) -> None:
    rows = toy(4, 10, seed=0)
    transformers.BertModel.from_pretrained(folder).save_pretrained(tmp_path)
    bert_tokenizer().from_pretrained(folder, padding_side="left").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="pads on the left"):
        build(tmp_path, rows)
    with pytest.raises(ConfigError, match=r"data\.stride is 21.*max_length=24"):
        build(folder, rows, stride=21)
    slow = tmp_path / "slow"
    transformers.ByT5Tokenizer(extra_ids=0).save_pretrained(slow)
    transformers.T5Config(vocab_size=300).save_pretrained(slow)
    with pytest.raises(ConfigError, match=r"\(ByT5Tokenizer\) cannot say which characters"):
        build(slow, rows)
    plain = tmp_path / "plain"
    transformers.BertModel.from_pretrained(folder).save_pretrained(plain)
    save_tokenizer(plain, ("[PAD]", "[UNK]", *WORDS), pad_token="[PAD]", unk_token="[UNK]")
    with pytest.raises(ConfigError, match="no CLS token"):
        build(plain, rows, no_answer=True)
    assert {window["null"] for window in build(plain, rows).splits["train"]} == {0}
