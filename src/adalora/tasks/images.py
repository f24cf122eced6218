"""Classification of images."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer

from ..errors import DataError
from ..recipe import Recipe
from ..sections import ImagesData
from .data import SPLITS, describe_rows, load_splits
from .foreign import one_line
from .labels import encode_labels, label_names, read_labels
from .pretrained import from_pretrained, load_model

PREDICTED_AT_ONCE = 32  # images
PROBED = 8  # rows
SHOWN = 8  # names of classes in a description


@dataclass
class ImagesTask:
    """Splits of raw images with labels. Images are read batch by batch and made ready by the model's processor."""

    splits: DatasetDict
    labels: list[str]
    processor: Any
    data: ImagesData
    folders: Mapping[str, Path]  # of each split, to which the paths of its images are relative
    metric: str = "accuracy"

    task_type: ClassVar[str | None] = None
    trainer_type: ClassVar[type[Trainer]] = Trainer
    # The raw image is no argument of the model, and has no length to group by.
    argument_options: ClassVar[Mapping[str, Any]] = {
        "remove_unused_columns": False,
        "train_sampling_strategy": "random",
    }

    def describe(self) -> str:
        """In words, e.g. `2 classes (cat, dog); 64 train, 16 validation rows`."""
        names = ", ".join(self.labels[:SHOWN]) + (", …" if len(self.labels) > SHOWN else "")
        return f"{len(self.labels)} classes ({names}); {describe_rows(self.splits)}"

    @property
    def trainer_options(self) -> Mapping[str, Any]:
        """Scores of the evaluations on the way."""
        return {"compute_metrics": self.compute_metrics}

    def collator(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """pixel_values (rows, channels, height, width) and, where rows have them, labels (rows,)."""
        batch = {"pixel_values": self._pixels([row["image"] for row in rows])}
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch

    def build_model(self, path: str, recipe: Recipe) -> nn.Module:
        """The pre-trained model with a head for these labels. Raises ConfigError if it lacks weights."""
        names = dict(enumerate(self.labels))
        ids = {name: index for index, name in names.items()}
        options = {"num_labels": len(names), "id2label": names, "label2id": ids}
        return load_model(AutoModelForImageClassification, path, recipe, lengths=(), **options)

    def compute_metrics(self, prediction: Any) -> dict[str, float]:
        """Accuracy and macro F1 from an EvalPrediction."""
        scores = prediction.predictions
        guess = (scores[0] if isinstance(scores, tuple) else scores).argmax(-1)
        truth = prediction.label_ids
        return {
            "accuracy": float(accuracy_score(truth, guess)),
            "macro_f1": float(f1_score(truth, guess, average="macro")),
        }

    def evaluate(self, trainer: Trainer, split: str) -> dict[str, float]:
        """All metrics on a split."""
        return self.compute_metrics(trainer.predict(self.splits[split], metric_key_prefix=split))

    def probe(self, model: nn.Module, split: str) -> tuple[dict[str, Tensor], str]:
        """A few images."""
        rows = self.splits[split]
        batch = self.collator([rows[i] for i in range(min(PROBED, len(rows)))])
        return {"pixel_values": batch["pixel_values"].to(next(model.parameters()).device)}, "logits"

    def predict(self, model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """`label` of each image and its `score`, the probability. An image is a path, bytes, or an array."""
        column, answers = self.data.image, []
        for start in range(0, len(rows), PREDICTED_AT_ONCE):
            chosen = rows[start : start + PREDICTED_AT_ONCE]
            images = [read_image(row.get(column), Path(), f"row {start + i}") for i, row in enumerate(chosen)]
            with torch.no_grad():
                pixels = self._pixels(images).to(next(model.parameters()).device)
                best = model(pixel_values=pixels).logits.float().softmax(-1).max(-1)
            answers += [
                {"label": self.labels[int(index)], "score": float(score)}
                for score, index in zip(best.values, best.indices, strict=True)
            ]
        return answers

    def _pixels(self, images: Sequence[Image.Image]) -> Tensor:
        pixels: Tensor = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        return pixels


def read_image(value: Any, folder: Path, where: str) -> Image.Image:
    """An RGB image from a path (relative to `folder`), bytes, an array (height, width[, channels]), or PIL's.

    Arrays hold 0 to 255, or fractions in floating point. Raises DataError that begins with `where`.
    """
    if isinstance(value, Mapping):  # an image of `datasets` that was not decoded
        value = value.get("bytes") or value.get("path")
    try:
        if isinstance(value, str | Path):
            value = Image.open(folder / value)
        elif isinstance(value, bytes):
            value = Image.open(io.BytesIO(value))
        elif isinstance(value, list | np.ndarray):
            value = _from_array(np.asarray(value))
        if isinstance(value, Image.Image):
            return value.convert("RGB")
    except (OSError, ValueError, TypeError) as error:  # no file, no image, no such shape
        raise DataError(f"{where}: the image cannot be read: {one_line(error)}") from error
    raise DataError(f"{where}: there is no image, but {value!r:.60}; give a path, bytes or an array.")


def build_task(path: str, recipe: Recipe) -> ImagesTask:
    """The recipe's images for the model at `path`. Raises DataError, or ConfigError for the model."""
    data = recipe.data
    assert isinstance(data, ImagesData)
    folders = {split: _folder(data, split) for split in SPLITS}

    def check(split: str, rows: Dataset) -> list[Any]:
        _require_files(split, rows, data, folders[split])
        return read_labels(split, rows, data.label)

    raw = load_splits(data, recipe.seed, ("image", "label"), check)
    held_out = [] if data.validation else ["validation"]  # may have the only row of a class
    values = [value for split in ["train", *held_out] for value in read_labels(split, raw[split], data.label)]
    labels = label_names(values, "classes", data.label, raw["train"].features[data.label])
    if not data.validation:
        folders["validation"] = folders["train"]
    task = without_data(path, recipe, labels)
    task.folders = folders
    for split, rows in raw.items():
        encoded = encode_labels(split, rows, data.label, labels)
        task.splits[split] = _with_images(split, rows, data, folders[split], encoded)
        task.splits[split][0]  # a column that holds no images is told now, not in the first batch
    return task


def without_data(path: str, recipe: Recipe, labels: list[str]) -> ImagesTask:
    """The task for predicting. Raises ConfigError."""
    data = recipe.data
    assert isinstance(data, ImagesData)
    processor = from_pretrained(AutoImageProcessor, path, recipe)
    return ImagesTask(DatasetDict(), labels, processor, data, {}, recipe.metric or "accuracy")


def _with_images(split: str, rows: Dataset, data: ImagesData, folder: Path, encoded: Sequence[Any]) -> Dataset:
    """Rows of `image` and `labels`; the image is read when a row is."""

    def read(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        images = [read_image(value, folder, f"data.{split}") for value in batch["image"]]
        return {"image": images} | ({"labels": batch["labels"]} if "labels" in batch else {})

    plain = rows.select_columns([data.image])
    if data.image != "image":
        plain = plain.rename_column(data.image, "image")
    return plain.add_column("labels", list(encoded)).with_transform(read)


def _require_files(split: str, rows: Dataset, data: ImagesData, folder: Path) -> None:
    """Where images are paths, all must be there before training begins."""
    if getattr(rows.features[data.image], "dtype", None) not in ("string", "large_string"):
        return
    missing = [i for i, name in enumerate(rows[data.image]) if not name or not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"data.{split}: {len(missing)} of {len(rows)} images are not there, the first is row {missing[0]} "
            f"({rows[missing[0]][data.image]!r}); paths are relative to {str(folder)!r}. Correct column {data.image!r}."
        )


def _folder(data: ImagesData, split: str) -> Path:
    file = getattr(data, split)
    return Path(file).absolute().parent if file and data.name is None else Path()


def _from_array(array: np.ndarray[Any, Any]) -> Image.Image:
    if np.issubdtype(array.dtype, np.floating):
        array = array * 255.0
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return Image.fromarray(np.clip(array, 0, 255).round().astype(np.uint8))
