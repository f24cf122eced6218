"""Image classification: every source gives the same pixels, and a tiny ViT learns two classes."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pillow
from rich.console import Console
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from adalora.errors import ConfigError, DataError
from adalora.recipe import Recipe, load_recipe
from adalora.tasks.images import ImagesTask, build_task, read_image, without_data
from adalora.train import run
from folders import assert_check_agrees

COLOURS = ("blue", "red")


def picture(index: int) -> np.ndarray[Any, Any]:
    """(16, 16, 3): noise, bluish in even ones and reddish in odd ones."""
    noise = np.random.default_rng(index).integers(0, 120, (16, 16, 3))
    noise[..., 0 if index % 2 else 2] += 60
    return noise.astype(np.uint8)


def png(index: int) -> bytes:
    buffer = io.BytesIO()
    Pillow.fromarray(picture(index)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and 40 images as files with a jsonl, an imagefolder, and a parquet file with the images in it."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ViTModel(ViTConfig(image_size=16, patch_size=4, initializer_range=0.15, **shape)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    (folder / "pictures").mkdir()
    lines = []
    for index in range(40):
        name, side = f"{index:02}.png", COLOURS[index % 2]
        (folder / "pictures" / name).write_bytes(png(index))
        lines.append({"file": f"pictures/{name}", "side": side})
        for split, chosen in (("train", index < 32), ("validation", index >= 32)):
            if chosen:
                place = folder / "sorted" / split / side
                place.mkdir(parents=True, exist_ok=True)
                (place / name).write_bytes(png(index))
    for name, part in (("train", lines[:32]), ("validation", lines[32:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part))
        kinds = Features({"file": Image(), "side": Value("string")})
        rows = [{"file": {"bytes": (folder / p["file"]).read_bytes(), "path": None}, "side": p["side"]} for p in part]
        Dataset.from_list(rows, features=kinds).to_parquet(folder / f"{name}.parquet")
        arrays = [{"file": picture(int(p["file"][9:11])).tolist(), "side": p["side"]} for p in part]
        Dataset.from_list(arrays).to_parquet(folder / f"{name}-arrays.parquet")
    return folder


def recipe(folder: Path, ending: str, *settings: str) -> Recipe:
    path = folder / "recipe.yaml"
    data = f"train: {folder}/train{ending}, validation: {folder}/validation{ending}, image: file, label: side"
    if ending == "folder":
        data = f"name: imagefolder, config: {folder}/sorted, train: train, validation: validation"
    path.write_text(
        f"task: image-classification\nmodel: {{name_or_path: {folder}}}\ndata: {{{data}}}\n"
        "method: {name: adalora, init_r: 4, target_r: 2}\n"
    )
    return load_recipe(str(path), settings)


def task(folder: Path, ending: str, *settings: str) -> ImagesTask:
    return build_task(str(folder), recipe(folder, ending, *settings))


@pytest.mark.parametrize("ending", [".jsonl", ".parquet", "-arrays.parquet", "folder"])
def test_every_source_gives_the_same_pixels(folder: Path, ending: str) -> None:
    built = task(folder, ending)
    assert built.labels == ["blue", "red"]
    assert built.describe() == "2 classes (blue, red); 32 train, 8 validation rows"
    rows = built.splits["validation"]
    found = {tuple(np.asarray(row["image"]).ravel()): row["labels"] for row in rows}
    assert found == {tuple(picture(index).ravel()): index % 2 for index in range(32, 40)}
    batch = built.collator([rows[i] for i in range(8)])
    assert batch["pixel_values"].shape == (8, 3, 16, 16) and sorted(batch["labels"].tolist()) == [0] * 4 + [1] * 4
    # The processor's own scaling: 0 to 255 become -1 to 1.
    first = torch.tensor(np.asarray(rows[0]["image"])).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(batch["pixel_values"][0], first, atol=1e-5)


def test_limits_draw_every_class_from_a_folder_of_folders(folder: Path) -> None:
    splits = task(folder, "folder", "data.train_rows=6", "data.validation_rows=2").splits
    assert [sorted(splits[name][:]["labels"]) for name in ("train", "validation")] == [[0, 0, 0, 1, 1, 1], [0, 1]]


def test_a_held_out_validation_set_finds_its_files(folder: Path) -> None:
    built = task(folder, ".jsonl", "data.validation=null")
    assert [len(built.splits[split]) for split in ("train", "validation")] == [28, 4]
    assert built.splits["validation"][3]["image"].size == (16, 16)


@pytest.mark.parametrize(
    "value",
    [
        picture(0),
        picture(0).tolist(),
        picture(0) / 255.0,
        png(0),
        {"bytes": png(0), "path": None},
        Pillow.fromarray(picture(0)),
    ],
)
def test_an_image_may_come_in_many_ways(value: Any) -> None:
    assert np.array_equal(np.asarray(read_image(value, Path(), "row 0")), picture(0))


def test_grey_and_transparent_images_become_rgb() -> None:
    grey = picture(0)[..., :1]
    assert np.array_equal(np.asarray(read_image(grey, Path(), "")), np.repeat(grey, 3, axis=2))
    see_through = np.concatenate([picture(0), np.full((16, 16, 1), 255, np.uint8)], axis=2)
    assert np.array_equal(np.asarray(read_image(see_through, Path(), "")), picture(0))


@pytest.mark.parametrize(
    "value,message",
    [
        ("nowhere.png", "row 3: the image cannot be read: .*No such file"),
        (b"no image", "row 3: the image cannot be read: cannot identify image"),
        (np.zeros((2, 2, 7)), "row 3: the image cannot be read"),
        (None, "row 3: there is no image, but None; give a path, bytes or an array"),
    ],
)
def test_what_is_no_image_is_refused(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_image(value, Path(), "row 3")


def test_missing_files_and_columns_are_told_before_training(folder: Path) -> None:
    lines = (folder / "train.jsonl").read_text().replace("pictures/04", "pictures/99")
    (folder / "gone.jsonl").write_text(lines)
    with pytest.raises(DataError, match=r"1 of 32 images are not there, the first is row 4 \('pictures/99\.png'\)"):
        task(folder, ".jsonl", f"data.train={folder / 'gone.jsonl'}")
    with pytest.raises(DataError, match=r"no column 'picture', which data\.image names"):
        task(folder, ".jsonl", "data.image=picture")
    with pytest.raises(DataError, match=r"label 'up' .* does not occur in the training set"):
        (folder / "odd.jsonl").write_text('{"file": "pictures/00.png", "side": "up"}\n')
        task(folder, ".jsonl", f"data.validation={folder / 'odd.jsonl'}")


def test_a_folder_without_image_processor_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="AutoImageProcessor cannot load"):
        without_data(str(tmp_path), recipe(folder, ".jsonl"), ["a"])


def test_a_check_prints_the_recipe_of_the_run(folder: Path, tmp_path: Path) -> None:
    assert_check_agrees(recipe(folder, ".jsonl", "training.max_steps=1"), tmp_path)


@pytest.mark.slow
def test_a_tiny_vit_learns_two_classes_and_predicts_new_images(folder: Path, tmp_path: Path) -> None:
    settings = [
        "training.num_train_epochs=12",
        "training.learning_rate=1e-2",
        "training.per_device_train_batch_size=8",
    ]
    result = run(recipe(folder, ".jsonl", *settings), tmp_path / "out", Console(quiet=True))
    assert result.scores == {"accuracy": 1.0, "macro_f1": 1.0}
    new = [{"file": picture(index)} for index in range(100, 140)]
    answers = result.task.predict(result.model, new)
    assert [answer["label"] for answer in answers] == [COLOURS[index % 2] for index in range(100, 140)]
    assert all(0.5 < answer["score"] <= 1.0 for answer in answers)
    assert json.loads(json.dumps(answers)) == answers
    again = without_data(str(folder), recipe(folder, ".jsonl"), ["blue", "red"])
    assert again.predict(result.model, [{"file": str(folder / "pictures" / "07.png")}])[0]["label"] == "red"
