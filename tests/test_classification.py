from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, disable_progress_bars
from transformers import EvalPrediction

from adalora.errors import DataError
from adalora.recipe import Recipe, load_recipe
from adalora.sections import QuestionsData
from adalora.tasks import data as data_module
from adalora.tasks.base import build_processor_task
from adalora.tasks.classification import build_task
from adalora.tasks.data import load_splits
from folders import rows, save_bert, write

disable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    save_bert(folder)
    for name in ("a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"):
        write(folder / name, rows(40))
    write(folder / "b.jsonl", rows(10, seed=1))
    return folder


def recipe(folder: Path, *settings: str) -> Recipe:
    files = [f"data.train={folder / 'a.jsonl'}", f"data.validation={folder / 'b.jsonl'}"]
    return load_recipe("text-classification", [*files, *settings])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_every_format_gives_the_same_rows(folder: Path, name: str) -> None:
    splits = load_splits(recipe(folder, f"data.train={folder / name}").data, seed=0)
    assert splits["train"]["text"][:] == [row["text"] for row in rows(40)]
    assert len(splits["validation"]) == 10


def test_without_validation_a_tenth_is_held_out_by_seed(folder: Path) -> None:
    section = recipe(folder, "data.validation=null").data
    splits = load_splits(section, seed=3)
    assert (len(splits["train"]), len(splits["validation"])) == (36, 4)
    assert load_splits(section, seed=3)["validation"][:] == splits["validation"][:]
    assert load_splits(section, seed=4)["validation"][:] != splits["validation"][:]


def test_a_hub_data_set_is_loaded_by_name_and_its_splits_are_checked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No hub here: what `datasets` would return for a name is put in its place.
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    served = Dataset.from_dict({"text": ["cat", "oak", "elm"], "label": [1, 0, 0]}, features=features)
    asked: list[object] = []

    def serve(*args: object) -> DatasetDict:
        asked.append(args)
        return DatasetDict({"train": served, "dev": served})

    monkeypatch.setattr(data_module, "load_dataset", serve)
    named = recipe(folder, "data.name=owner/set", "data.config=en", "data.train=train", "data.validation=dev")
    task = build_task(str(folder), named)
    assert asked == [("owner/set", "en")]
    assert task.labels == ["no", "yes"] and task.splits["train"]["labels"][:] == [1, 0, 0]
    with pytest.raises(DataError, match="the splits of 'owner/set' are train, dev"):
        load_splits(named.data.model_copy(update={"test": "tset"}), seed=0)


@pytest.mark.parametrize(
    "setting,message",
    [
        ("data.train=nowhere.jsonl", "no such file"),
        ("data.train=model.bin", "readable are"),
        ("data.text=sentence", "no column 'sentence', which data.text names; its columns are text, label, pair, score"),
        ("data.text_pair=other", "no column 'other'"),
        ("metric=pearson", "use accuracy or macro_f1 or matthews or f1 or mean_accuracy_f1"),
        ("data.label=score metric=f1", "column 'score' holds numbers; use pearson or spearman or mean_"),
        ("data.text=score", "column 'score' must hold text in every row; 40 of 40 rows do not, the first is row 0"),
        ("data.validation=odd.jsonl", r"label 'stone' in column 'label' \(row 0; 1 of 1 rows\) does not occur"),
        ("data.train=empty.jsonl", "data.train"),
        ("data.train=broken.jsonl", "cannot be read as json"),
        ("data.train=one.jsonl", "at least two labels"),
    ],
)
def test_a_wrong_file_or_column_is_one_clear_error(folder: Path, setting: str, message: str) -> None:
    (folder / "model.bin").write_bytes(b"x")
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text('{"text": "cat", "label"')
    write(folder / "odd.jsonl", [{"text": "cat", "label": "stone", "pair": "", "score": 0.0}])
    write(folder / "one.jsonl", [row | {"label": "animal"} for row in rows(6)])
    key, _, value = setting.partition("=")
    if value.endswith((".jsonl", ".bin")):
        setting = f"{key}={folder / value}"
    with pytest.raises(DataError, match=message):
        build_task(str(folder), recipe(folder, *setting.split(" ")))


LABELLED = [{"text": "cat", "label": "animal"}, {"text": "oak", "label": "plant"}] * 2


@pytest.mark.parametrize(
    "split,items,settings,message",
    [
        (
            "train",
            [{"text": "cat", "label": ["a"]}],
            [],
            r"label \['a'\] .* \(row 0; 1 of 1 rows\) is a list",
        ),
        ("train", [*LABELLED, {"text": "fir", "label": 1}], [], "mixes .* 'animal' in row 0, 1 in row 4"),
        (
            "train",
            [*LABELLED, {"text": "fir", "label": None}],
            [],
            "is missing .* in 1 of 5 rows, first in row 4",
        ),
        ("validation", [*LABELLED, {"text": "fir", "label": None}], [], "data.validation: the label is missing"),
        ("test", [{"text": "fir", "label": None}], [], "data.test: the label is missing .* or leave data.test out"),
        ("train", [{"text": "cat", "label": "animal"}], ["data.validation=null"], "data.train has 1 row"),
        ("train", [*LABELLED, {"text": None, "label": "plant"}], [], "must hold text .* 1 of 5 rows .* row 4"),
        ("train", [*LABELLED, {"text": " ", "label": "plant"}] * 2, [], "'text' is empty in 2 of 10 rows, .* is row 4"),
        ("train", LABELLED, ["data.kind=numbers"], r"label 'animal' .* \(row 0; 4 of 4 rows\) is no finite number"),
        ("validation", [{"text": "a", "score": "high"}], ["data.label=score"], "label 'high' .* is no finite number"),
        ("validation", [{"text": "a", "score": None}], ["data.label=score"], "data.validation: the label is missing"),
    ],
)
def test_rows_that_cannot_be_used_are_counted_and_the_first_is_named(
    folder: Path, split: str, items: list[dict[str, object]], settings: list[str], message: str
) -> None:
    file = write(folder / "bad.jsonl", items)
    with pytest.raises(DataError, match=message):
        build_task(str(folder), recipe(folder, f"data.{split}={file}", *settings))


def test_a_hub_split_without_labels_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    served = [Dataset.from_dict({"text": ["cat", "oak"], "label": labels}, features) for labels in ([1, 0], [-1, -1])]
    splits = DatasetDict(train=served[0], validation=served[0], test=served[1])
    monkeypatch.setattr(data_module, "load_dataset", lambda *_: splits)
    hub = recipe(folder, "data.name=owner/set", "data.train=train", "data.validation=validation", "data.test=test")
    with pytest.raises(DataError, match=r"data\.test: the label is missing .* in 2 of 2 rows, first in row 0"):
        build_task(str(folder), hub)


@pytest.mark.parametrize(
    "values,kind,labels,encoded",
    [
        ([True, False], None, ["False", "True"], [1, 0]),
        ([3, 1], None, ["1", "3"], [1, 0]),
        ([3, 1], "numbers", [], [3.0, 1.0]),
        ([3.0, 1.0], None, [], [3.0, 1.0]),
        ([3.0, 1.0], "classes", ["1", "3"], [1, 0]),
        ([2.5, 1.0], "classes", ["1", "2.5"], [1, 0]),
        (["b", "a"], None, ["a", "b"], [1, 0]),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_labels_are_classes_or_numbers_as_the_recipe_says(
    folder: Path, ending: str, values: list[object], kind: str | None, labels: list[str], encoded: list[float]
) -> None:
    file = write(folder / f"kind.{ending}", [{"text": "cat", "label": value} for value in values])
    both = [f"data.train={file}", f"data.validation={file}"]
    task = build_task(str(folder), recipe(folder, *both, f"data.kind={kind or 'null'}"))
    assert task.labels == labels
    assert task.splits["validation"]["labels"][:] == encoded


def test_a_class_whose_only_row_is_held_out_is_known(folder: Path) -> None:
    file = write(folder / "rare.jsonl", [*LABELLED * 4, {"text": "hen", "label": "bird"}])
    named = [
        build_task(str(folder), recipe(folder, f"data.train={file}", "data.validation=null", f"seed={seed}")).labels
        for seed in range(9)
    ]
    assert named == [["animal", "bird", "plant"]] * 9


def test_a_task_describes_itself(folder: Path) -> None:
    assert build_task(str(folder), recipe(folder)).describe() == (
        "2 classes (animal, plant); 40 train, 10 validation rows"
    )
    task = build_task(str(folder), recipe(folder, "data.label=score"))
    assert task.describe() == "regression; 40 train, 10 validation rows"


def test_a_quote_in_tsv_and_words_for_nothing_are_text(folder: Path) -> None:
    texts = ['the "old cat', "None", "NA", "null", 'oak"', "nan"]
    lines = [f"{text}\t{index % 2}" for index, text in enumerate(texts)]
    (folder / "quotes.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
    rows = load_splits(recipe(folder, f"data.train={folder / 'quotes.tsv'}").data, seed=0)["train"]
    assert rows["text"][:] == texts
    assert rows["label"][:] == [0, 1] * 3
    (folder / "words.csv").write_text("text,label\ncat,None\noak,NA\nfir,\n")
    with pytest.raises(DataError, match=r"in 1 of 3 rows, first in row 2"):
        build_task(str(folder), recipe(folder, f"data.train={folder / 'words.csv'}"))


def test_a_mistake_is_told_once_and_in_one_line(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "ragged.csv").write_text("text,label\na,b\na,b,c\n")
    with pytest.raises(DataError, match="cannot be read as csv") as caught:
        build_task(str(folder), recipe(folder, f"data.train={folder / 'ragged.csv'}"))
    assert "\n" not in str(caught.value)
    assert caplog.records == []
    for name in ("/no/such/set", "./set"):
        with pytest.raises(DataError, match="there is no such folder"):
            load_splits(recipe(folder, f"data.name={name}").data, seed=0)


def test_labels_are_sorted_names_and_rows_are_cut_to_length(folder: Path) -> None:
    write(folder / "long.jsonl", [row | {"text": f"{row['text']} " * 4} for row in rows(8)])
    long = f"data.validation={folder / 'long.jsonl'}"
    task = build_task(str(folder), recipe(folder, "data.max_length=4", "data.text_pair=pair", long))
    assert task.labels == ["animal", "plant"]
    assert task.splits["train"]["labels"][:4] == [1, 0, 1, 0]
    assert set(task.splits["validation"]["length"]) == {4}
    model = task.build_model(str(folder), recipe(folder))
    assert model.config.id2label == {0: "animal", 1: "plant"}
    answers = task.predict(model.eval(), [{"text": "the cat", "pair": "a"}, {"text": "oak", "pair": "the"}])
    for answer in answers:
        assert answer["scores"].keys() == {"animal", "plant"}
        assert sum(answer["scores"].values()) == pytest.approx(1.0)
        assert answer["score"] == max(answer["scores"].values()) == answer["scores"][answer["label"]]
    with pytest.raises(DataError, match="the input: column 'pair' must hold text in every row; 1 of 2 rows do not"):
        task.predict(model, [{"text": "cat", "pair": "a"}, {"text": "oak"}])


def test_metrics_equal_hand_counted_numbers(folder: Path) -> None:
    task = build_task(str(folder), recipe(folder))
    logits = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]])  # guesses 0 0 1 1
    scores = task.compute_metrics(EvalPrediction(logits, np.array([0, 1, 1, 1])))
    assert scores["accuracy"] == 0.75
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert scores["matthews"] == pytest.approx((2 * 1 - 0 * 1) / np.sqrt(2 * 3 * 1 * 2))


@pytest.mark.parametrize("seed", range(5))
def test_the_metrics_of_glue_are_those_of_their_formulas(folder: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    truth, logits = generator.integers(0, 2, 50), generator.normal(size=(50, 2))
    scores = build_task(str(folder), recipe(folder)).compute_metrics(EvalPrediction(logits, truth))
    guess = logits.argmax(-1)
    hits, extra, missed = ((guess & truth).sum(), (guess & ~truth & 1).sum(), (~guess & truth & 1).sum())
    f1, accuracy = 2 * hits / (2 * hits + extra + missed), (guess == truth).mean()
    wanted = {"accuracy": accuracy, "f1": f1, "mean_accuracy_f1": (accuracy + f1) / 2}
    wanted["matthews"] = np.corrcoef(guess, truth)[0, 1]  # of two classes, Pearson's correlation
    assert {name: scores[name] for name in wanted} == pytest.approx(wanted)
    numbers, values = generator.normal(size=(50, 1)), generator.normal(size=50)
    task = build_task(str(folder), recipe(folder, "data.label=score"))
    scores = task.compute_metrics(EvalPrediction(numbers, values))
    ranks = [np.argsort(np.argsort(x)) for x in (numbers[:, 0], values)]
    wanted = {"pearson": np.corrcoef(numbers[:, 0], values)[0, 1], "spearman": np.corrcoef(*ranks)[0, 1]}
    wanted["mean_pearson_spearman"] = sum(wanted.values()) / 2
    assert scores == pytest.approx(wanted)


def test_more_classes_have_no_f1_of_the_second_one(folder: Path) -> None:
    file = write(folder / "three.jsonl", [*LABELLED, {"text": "old", "label": "thing"}])
    both = [f"data.train={file}", f"data.validation={file}"]
    scores = build_task(str(folder), recipe(folder, *both)).compute_metrics(
        EvalPrediction(np.eye(3), np.array([0, 1, 2]))
    )
    assert scores == {"accuracy": 1.0, "macro_f1": 1.0, "matthews": 1.0}
    with pytest.raises(DataError, match=r"metric is 'f1', but column 'label' holds classes \(3\); use accuracy"):
        build_task(str(folder), recipe(folder, *both, "metric=f1"))


def test_correlations_with_a_constant_are_not_numbers(folder: Path) -> None:
    task = build_task(str(folder), recipe(folder, "data.label=score"))
    for guess, truth in (([[1.0], [1.0]], [0.0, 1.0]), ([[1.0]], [0.0])):
        scores = task.compute_metrics(EvalPrediction(np.array(guess), np.array(truth)))
        assert all(np.isnan(value) for value in scores.values()) and len(scores) == 3


def test_without_data_a_task_predicts_classes_and_numbers(folder: Path) -> None:
    task = build_processor_task(str(folder), recipe(folder), ["animal", "plant"])
    model = task.build_model(str(folder), recipe(folder)).eval()
    assert task.predict(model, []) == []
    assert task.predict(model, [{"text": "cat"}])[0].keys() == {"label", "score", "scores"}
    numbers = recipe(folder, "data.label=score")
    task = build_processor_task(str(folder), numbers, [])
    (answer,) = task.predict(task.build_model(str(folder), numbers).eval(), [{"text": "cat", "score": 1.0}])
    assert answer.keys() == {"value"} and isinstance(answer["value"], float)


def test_both_validation_sets_of_mnli_can_be_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features(
        {"premise": Value("string"), "hypothesis": Value("string"), "label": ClassLabel(names=["e", "c"])}
    )
    parts = {
        name: Dataset.from_dict({"premise": [text] * 2, "hypothesis": ["the"] * 2, "label": [0, 1]}, features=features)
        for name, text in (("train", "old"), ("validation_matched", "cat"), ("validation_mismatched", "oak"))
    }
    monkeypatch.setattr(data_module, "load_dataset", lambda *_: DatasetDict(parts))
    columns = ["data.name=nyu-mll/glue", "data.config=mnli", "data.text=premise", "data.text_pair=hypothesis"]
    splits = ["data.train=train", "data.validation=validation_matched", "data.test=validation_mismatched"]
    task = build_task(str(folder), recipe(folder, *columns, *splits))
    first = {split: task.processor.decode(rows[0]["input_ids"][:1]) for split, rows in task.splits.items()}
    assert first == {"train": "old", "validation": "cat", "test": "oak"}


def sorted_by_class(folder: Path) -> list[str]:
    """Settings for 100, 30, 9 and 1 rows of four classes, one class behind another; validation the other way round."""
    counts = {"a": 100, "b": 30, "c": 9, "d": 1}
    items: list[dict[str, object]] = [
        {"text": f"cat {n}", "label": name} for name, count in counts.items() for n in range(count)
    ]
    write(folder / "sorted.jsonl", items)
    write(folder / "turned.jsonl", items[::-1])
    return [f"data.train={folder / 'sorted.jsonl'}", f"data.validation={folder / 'turned.jsonl'}"]


@pytest.mark.parametrize("seed", range(5))
def test_limits_draw_every_class_in_its_share_from_a_sorted_file(folder: Path, seed: int) -> None:
    limits = ["data.train_rows=28", "data.validation_rows=56", f"seed={seed}"]
    task = build_task(str(folder), recipe(folder, *sorted_by_class(folder), *limits))
    assert task.labels == ["a", "b", "c", "d"]
    counts = {name: np.bincount(task.splits[name]["labels"][:]).tolist() for name in ("train", "validation")}
    for found, share in ((counts["train"], 28 / 140), (counts["validation"], 56 / 140)):
        assert min(found) >= 1
        assert np.abs(np.array(found) - share * np.array([100, 30, 9, 1])).max() <= 1


@pytest.mark.slow
def test_limits_draw_by_seed_and_a_larger_one_adds_rows(folder: Path) -> None:
    files = sorted_by_class(folder)

    def drawn(count: int, seed: int) -> list[str]:
        task = load_splits(recipe(folder, *files, f"data.train_rows={count}").data, seed, check=lambda _, r: r["label"])
        return [f"{row['label']} {row['text']}" for row in task["train"]]

    assert drawn(20, 0) == drawn(20, 0) != drawn(20, 1)
    assert len(set(drawn(20, 0))) == 20 and set(drawn(20, 0)) < set(drawn(50, 0)) < set(drawn(140, 0))
    whole = [f"{row['label']} {row['text']}" for row in load_splits(recipe(folder, *files).data, 0)["train"]]
    assert drawn(140, 0) == drawn(999, 0) == whole  # in the order of the file
    assert [whole.index(text) for text in drawn(20, 0)] == sorted(whole.index(text) for text in drawn(20, 0))


def test_fewer_training_rows_than_classes_are_refused(folder: Path) -> None:
    files = sorted_by_class(folder)
    with pytest.raises(DataError, match=r"data\.train_rows is 3, but data\.train has rows of 4 classes, .* at least 4"):
        build_task(str(folder), recipe(folder, *files, "data.train_rows=3"))
    task = build_task(str(folder), recipe(folder, *files, "data.train_rows=4", "data.validation_rows=1"))
    assert sorted(task.splits["train"]["labels"]) == [0, 1, 2, 3] and len(task.splits["validation"]) == 1


def test_limits_of_a_regression_draw_by_seed(folder: Path) -> None:
    items: list[dict[str, object]] = [{"text": "cat", "label": n + 0.5} for n in range(200)]
    file = write(folder / "numbers.jsonl", items)
    settings = [f"data.train={file}", f"data.validation={file}", "data.train_rows=40"]
    values = build_task(str(folder), recipe(folder, *settings)).splits["train"]["labels"][:]
    assert len(set(values)) == 40 and abs(np.mean(values) - 100) < 30  # the first 40 have a mean of 20
    assert build_task(str(folder), recipe(folder, *settings, "seed=1")).splits["train"]["labels"][:] != values


def test_limits_draw_from_what_is_left_behind_the_held_out_rows(folder: Path) -> None:
    section = recipe(folder, "data.validation=null").data
    whole = load_splits(section, seed=3)
    cut = load_splits(section.model_copy(update={"train_rows": 5, "validation_rows": 2}), seed=3)
    for split, count in (("train", 5), ("validation", 2)):
        assert len(cut[split]) == count
        assert all(row in list(whole[split]) for row in cut[split])
    more = load_splits(recipe(folder, "data.train_rows=41", "data.validation_rows=3").data, seed=3)
    assert (len(more["train"]), len(more["validation"])) == (40, 3)


def test_lists_and_records_in_columns_stay_what_they_are(folder: Path) -> None:
    items: list[dict[str, object]] = [
        {"text": "a", "answers": {"text": ["x", "y"], "answer_start": [0, 4]}, "tags": ["B", "O"]},
        {"text": "b", "answers": {"text": [], "answer_start": []}, "tags": []},
    ]
    seen: list[tuple[str, int]] = []
    for ending in ("jsonl", "parquet"):
        file = write(folder / f"nested.{ending}", items)
        section = QuestionsData(train=str(file), validation=str(file), train_rows=1)
        splits = load_splits(section, 0, ("answers",), lambda split, rows: seen.append((split, len(rows))))
        assert [dict(row) for row in splits["validation"]] == items
        assert len(splits["train"]) == 1
    assert seen == [("train", 2), ("validation", 2)] * 2  # whole, before they are cut
    with pytest.raises(DataError, match=r"no column 'question', which data.question names; its columns are text, ans"):
        load_splits(section, 0, ("answers", "question"))


def test_metrics_take_the_logits_of_an_encoder_and_decoder(folder: Path) -> None:
    task = build_task(str(folder), recipe(folder))
    outputs = (np.array([[1.0, 0], [0, 1]]), np.zeros((2, 5, 32)))  # logits, last hidden states
    assert task.compute_metrics(EvalPrediction(outputs, np.array([0, 1])))["accuracy"] == 1.0


def test_a_new_head_of_a_regression_starts_at_the_mean_label(folder: Path) -> None:
    task = build_task(str(folder), recipe(folder, "data.label=score"))
    mean = float(np.mean(task.splits["train"]["labels"]))
    assert abs(mean) > 0.01
    model = task.build_model(str(folder), recipe(folder))
    assert model.classifier.bias.item() == pytest.approx(mean, rel=1e-6)
    trained = folder.parent / "trained-regression"
    with torch.no_grad():
        model.classifier.bias.fill_(-7.0)
    model.save_pretrained(trained)
    task.processor.save_pretrained(trained)
    assert task.build_model(str(trained), recipe(folder)).classifier.bias.item() == -7.0
    classes = build_task(str(folder), recipe(folder))
    assert classes.build_model(str(folder), recipe(folder)).classifier.bias.abs().max() == 0


def test_numbers_as_labels_make_it_regression(folder: Path) -> None:
    task = build_task(str(folder), recipe(folder, "data.label=score"))
    assert task.labels == [] and task.metric == "pearson"
    assert task.build_model(str(folder), recipe(folder)).config.problem_type == "regression"
    scores = task.compute_metrics(EvalPrediction(np.array([[1.0], [2], [4]]), np.array([1.0, 2, 3])))
    assert scores["spearman"] == 1.0
    assert scores["pearson"] == pytest.approx(np.corrcoef([1, 2, 4], [1, 2, 3])[0, 1])
