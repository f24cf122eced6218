from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, disable_progress_bars
from transformers import EvalPrediction

from adalora.errors import DataError
from adalora.recipe import Recipe, load_recipe
from adalora.tasks import data as data_module
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
        ("data.text=sentence", "no column 'sentence'; its columns are text, label, pair, score"),
        ("data.text_pair=other", "no column 'other'"),
        ("metric=pearson", "use accuracy or macro_f1 or matthews"),
        ("data.text=score", "must hold text"),
        ("data.validation=odd.jsonl", "label 'stone'"),
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
        build_task(str(folder), recipe(folder, setting))


def test_labels_are_sorted_names_and_rows_are_cut_to_length(folder: Path) -> None:
    write(folder / "long.jsonl", [row | {"text": f"{row['text']} " * 4} for row in rows(8)])
    long = f"data.validation={folder / 'long.jsonl'}"
    task = build_task(str(folder), recipe(folder, "data.max_length=4", "data.text_pair=pair", long))
    assert task.labels == ["animal", "plant"]
    assert task.splits["train"]["labels"][:4] == [1, 0, 1, 0]
    assert set(task.splits["validation"]["length"]) == {4}
    model = task.build_model(str(folder), recipe(folder))
    assert model.config.id2label == {0: "animal", 1: "plant"}
    assert set(task.predict(model.eval(), ["the cat", "oak"])) <= {"animal", "plant"}


def test_metrics_equal_hand_counted_numbers(folder: Path) -> None:
    task = build_task(str(folder), recipe(folder))
    logits = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]])  # guesses 0 0 1 1
    scores = task.compute_metrics(EvalPrediction(logits, np.array([0, 1, 1, 1])))
    assert scores["accuracy"] == 0.75
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert scores["matthews"] == pytest.approx((2 * 1 - 0 * 1) / np.sqrt(2 * 3 * 1 * 2))


def test_numbers_as_labels_make_it_regression(folder: Path) -> None:
    task = build_task(str(folder), recipe(folder, "data.label=score"))
    assert task.labels == [] and task.metric == "pearson"
    assert task.build_model(str(folder), recipe(folder)).config.problem_type == "regression"
    scores = task.compute_metrics(EvalPrediction(np.array([[1.0], [2], [4]]), np.array([1.0, 2, 3])))
    assert scores["spearman"] == 1.0
    assert scores["pearson"] == pytest.approx(np.corrcoef([1, 2, 4], [1, 2, 3])[0, 1])
