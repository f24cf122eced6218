"""Checkpoints of a Trainer: the last whole one is found, no torn one is used, and none of them is unpickled."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import adalora
from adalora.errors import TrainingError
from adalora.injection import named_adapters
from adalora.integrations.checkpoints import checkpoints, flaw, last_complete_checkpoint
from adalora.integrations.transformers import AdaLoraCallback
from tiny import bert

CONFIG = adalora.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=8, tinit=2, tfinal=4, deltaT=1)


def trainer(folder: Path, **choices: Any) -> Trainer:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 40, (32, 8), generator=generator)
    usual: dict[str, Any] = {
        "max_steps": 9,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_steps": 3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return Trainer(
        bert(),
        TrainingArguments(str(folder), **usual | choices),
        train_dataset=[{"input_ids": row.tolist(), "labels": int(row.sum() % 2)} for row in ids],
        callbacks=[AdaLoraCallback(CONFIG)],
    )


def state(run: Trainer) -> list[Any]:
    names = [p.detach() for p in run.model.parameters() if p.requires_grad]
    return [*names, *(module.lora_keep for _, module in named_adapters(run.model))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Any]]]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(folder)
    run.train()
    yield folder, state(run)


@pytest.fixture
def folder(whole: tuple[Path, list[Any]], tmp_path: Path) -> Path:
    shutil.copytree(whole[0], tmp_path / "out")
    return tmp_path / "out"


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    """A bit of a number: between the entries of the archive there are bytes that mean nothing."""
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        entry = max((info for info in archive.infolist() if "/data/" in info.filename), key=lambda info: info.file_size)
    content[content.index(file_content(file, entry)) + 5] ^= 4
    file.write_bytes(content)


def flip_last(file: Path) -> None:
    """A bit of the last number."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 4
    file.write_bytes(content)


def file_content(file: Path, entry: zipfile.ZipInfo) -> bytes:
    with zipfile.ZipFile(file) as archive:
        return archive.read(entry)


TORN: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "weights cut off": ("model.safetensors", halve, "incomplete"),
    "weights with a flipped bit": ("model.safetensors", flip_last, "model.safetensors is damaged"),
    "a list of checksums cut off": ("weights.sha256", halve, ""),
    "checksums of files elsewhere": ("weights.sha256", lambda file: file.write_text("0  ../x"), "none of ours"),
    "no weights": ("*.safetensors", lambda file: [path.unlink() for path in file.parent.glob(file.name)], "no weights"),
    "optimizer cut off": ("optimizer.pt", halve, "zip"),
    "optimizer with a flipped bit": ("optimizer.pt", flip, "optimizer.pt is damaged"),
    "no optimizer": ("optimizer.pt", Path.unlink, "optimizer.pt is missing"),
    "no scheduler": ("scheduler.pt", Path.unlink, "scheduler.pt is missing"),
    "no random state": ("rng_state.pth", Path.unlink, "rng_state.pth is missing"),
    "no state of the trainer": ("trainer_state.json", Path.unlink, "trainer_state.json is missing"),
    "state of the trainer cut off": ("trainer_state.json", halve, ""),
    "state of the trainer too deep": ("trainer_state.json", lambda file: file.write_text("[" * 100_000), ""),
    "state of the trainer no object": ("trainer_state.json", lambda file: file.write_text("[]"), "holds no object"),
}


@pytest.mark.parametrize(("name", "tear", "told"), TORN.values(), ids=TORN)
def test_the_last_whole_checkpoint_is_found_behind_a_torn_one(
    folder: Path, name: str, tear: Callable[[Path], Any], told: str
) -> None:
    assert last_complete_checkpoint(folder) == folder / "checkpoint-9"
    tear(folder / "checkpoint-9" / name)
    found = flaw(folder / "checkpoint-9")
    assert found is not None and told in found and "\n" not in found
    assert last_complete_checkpoint(folder) == folder / "checkpoint-6"


def test_a_checkpoint_without_checksums_serves_too(folder: Path) -> None:
    (folder / "checkpoint-9" / "weights.sha256").unlink()
    assert last_complete_checkpoint(folder) == folder / "checkpoint-9"


@pytest.mark.slow
def test_a_trainer_goes_on_from_it_bit_by_bit(folder: Path, whole: tuple[Path, list[Any]]) -> None:
    shutil.rmtree(folder / "checkpoint-9")
    (folder / "checkpoint-6" / "trainer_state.json").unlink()
    run = trainer(folder)
    run.train(resume_from_checkpoint=str(last_complete_checkpoint(folder)))
    assert run.state.global_step == 9
    assert all(torch.equal(one, other) for one, other in zip(state(run), whole[1], strict=True))


def test_where_there_is_no_checkpoint_none_is_found(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "checkpoint-3").write_text("a file")
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-4").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4"]
    assert last_complete_checkpoint(str(tmp_path)) is None


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_with_code_in_it_is_passed_over_and_the_code_does_not_run(folder: Path, name: str) -> None:
    file, mark = folder / "checkpoint-9" / name, folder / "it ran"
    torch.save({"state": Bomb(mark)}, file)
    assert flaw(folder / "checkpoint-9") == f"{name} holds more than tensors and plain values, which is never loaded"
    assert last_complete_checkpoint(folder) == folder / "checkpoint-6"
    with pytest.raises(Exception, match="Weights only load failed"):
        trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-9"))
    assert not mark.exists()


@pytest.mark.slow
def test_nothing_that_a_resumed_trainer_loads_is_unpickled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: dict[str, bool] = {}
    load = torch.load

    def watched(file: Any, *args: Any, **kwargs: Any) -> Any:
        loads[Path(file).name] = kwargs["weights_only"]
        return load(file, *args, **kwargs)

    monkeypatch.setattr(torch, "load", watched)
    run = trainer(folder, max_steps=10)
    run.train(resume_from_checkpoint=str(folder / "checkpoint-9"))
    assert loads == {"optimizer.pt": True, "scheduler.pt": True, "rng_state.pth": True}


def test_a_checkpoint_without_the_optimizers_state_does_not_start_the_schedule_over(folder: Path) -> None:
    """The Trainer itself goes on without: global step 3, but an optimizer, and so an allocator, at step 0."""
    for name in ("optimizer.pt", "scheduler.pt"):
        (folder / "checkpoint-3" / name).unlink()
    run = trainer(folder)
    with pytest.raises(TrainingError, match=r"goes on behind step 3.*no state of the optimizer.*save_only_model"):
        run.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert len(run.optimizer.state) == 0
