"""A run's folder, and what it tells while it lasts: a line on the screen, one JSON line for each record."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from .errors import AdaLoraError, AdapterFileError, ConfigError, TrainingError
from .files import write_files
from .integrations.transformers import AdaLoraCallback
from .recipe import Recipe
from .tasks.foreign import one_line

_ROOM_FOR_A_BAR = 90  # columns
_TORCH_WRITER = re.compile("PytorchStreamWriter|inline_container|unexpected pos")  # torch.save on a full disk
BEGUN, CHECKPOINTS, FAILED, RESULT = "recipe.yaml", "checkpoints", "FAILED.txt", "result.json"
METRICS, RANKS = "metrics.jsonl", "ranks.jsonl"


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """`out` for one run alone: a new folder, an empty one, or that of a run that failed, which is replaced, or of
    one that was killed before it began to train.

    What fails before training has begun leaves everything as it was; what fails later leaves the reason in
    FAILED.txt. Raises ConfigError if `out` is a file, or in use.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    _claim(out)
    with locked(out):
        try:
            yield
        except BaseException as error:
            with suppress(OSError):  # the disk may be full, and the error itself is what the user must see
                if (out / BEGUN).exists():
                    (out / FAILED).write_text(f"{type(error).__name__}: {error}\n", encoding="utf-8")
                else:
                    _empty(out)
                    for folder in made:
                        folder.rmdir()
            raise


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the run in `out` against a second process, by a lock that the system drops with the process.

    What a process that was killed left half-written is removed. Raises ConfigError while another one holds the lock.
    """
    with _lock(out):
        for left in out.glob("**/.adalora-*"):  # as files.py names them
            _remove(left)
        yield


@contextmanager
def _lock(out: Path) -> Iterator[bool]:
    """Whether the lock is held: not every system has such locks."""
    if sys.platform == "win32":
        yield False
        return
    import fcntl

    handle, held = os.open(out / CHECKPOINTS, os.O_RDONLY), False
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError as error:
                raise ConfigError(f"the run in {str(out)!r} is still going on, in another process.") from error
        yield held
    finally:
        os.close(handle)


@contextmanager
def explained(out: Path) -> Iterator[None]:
    """Turn what the machine or a logger refuses into an AdaLoraError with the remedy."""
    try:
        yield
    except AdaLoraError:
        raise
    except Exception as error:
        _explain(error, out)
        raise


def _explain(error: Exception, out: Path) -> None:
    """Raise the AdaLoraError that `error` comes to, if it is no bug of ours."""
    logger = _logger_in(error)
    if logger is not None:
        raise TrainingError(
            f"{logger} failed: {type(error).__name__}: {one_line(error)} Set it up, or leave it out of "
            "training.report_to (--log-to)."
        ) from error
    if isinstance(error, torch.OutOfMemoryError):
        raise TrainingError(
            f"the device is out of memory: {error}. Lower training.per_device_train_batch_size, and raise "
            "training.gradient_accumulation_steps as much."
        ) from error
    writing = isinstance(error, RuntimeError) and _TORCH_WRITER.search(str(error))
    if writing or isinstance(error, OSError | SafetensorError):
        raise AdapterFileError(
            f"the run in {str(out)!r} could not go on: {error}. Free space there, or choose another folder with --out."
        ) from error


def _logger_in(error: BaseException) -> str | None:
    """The class of transformers' callback for TensorBoard, W&B and the like that was at work, or None."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__") == get_reporting_integration_callbacks.__module__:
            return type(frame.f_locals.get("self")).__name__
    return None


def _claim(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / BEGUN).is_file():  # else a file of that name is somebody else's
            with suppress(FileNotFoundError):
                (out / FAILED).unlink()  # only one of two runs succeeds here
                _empty(out)
        if _abandoned(out):
            return  # who of several gets it, the lock decides
        if any(out.iterdir()):
            raise ConfigError(f"the output folder {str(out)!r} is not empty; choose another with --out, or remove it.")
        (out / CHECKPOINTS).mkdir()  # and here, where the folder was empty
    except (FileExistsError, NotADirectoryError) as error:
        state = "taken by another run" if out.is_dir() else "a file, or within one"
        raise ConfigError(f"the output folder {str(out)!r} is {state}; choose another with --out.") from error
    except OSError as error:
        raise AdapterFileError(
            f"cannot make the output folder {str(out)!r}: {error.strerror}; choose another with --out."
        ) from error


def _abandoned(out: Path) -> bool:
    """Whether `out` holds only what a run leaves that was killed before it began to train."""
    names = {path.name for path in out.iterdir() if not path.name.startswith(".adalora-")}
    if names != {CHECKPOINTS} or not (out / CHECKPOINTS).is_dir() or any((out / CHECKPOINTS).iterdir()):
        return False
    try:
        with _lock(out) as held:
            return held
    except ConfigError:
        return False


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        _remove(path)


def _remove(path: Path) -> None:
    """A file, a folder with all in it, or a link: what it points at stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


class RunRecorder(TrainerCallback):
    """Appends every log of the Trainer to metrics.jsonl and every allocation to ranks.jsonl.

    Stands last in the list of callbacks: behind `source`, whose allocator exists once training has begun, and
    behind whatever may end it; only `loggers_last` stand behind it, and get the ranks from it. The recipe is written
    when training begins: what is wrong with a schedule has shown itself before. `live` are (step, live triplets)
    after each allocation, those of a resumed run's first part included.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, source: AdaLoraCallback | None, live: Sequence[tuple[int, int]] = ()
    ) -> None:
        self.folder, self.recipe, self.source = folder, recipe, source
        self.live = list(live)
        self._ranks: dict[str, int] = {}
        self._within_step = self._over = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the recipe, and listen to the allocator."""
        text = self.recipe.dump()
        write_files(self.folder, {BEGUN: lambda path: path.write_text(text, encoding="utf-8")})
        if self.source is not None and self.source.allocator is not None:
            self._ranks = {name: module.rank for name, module in self.source.allocator.modules.items()}
            self.source.allocator.on_allocate.append(self._on_allocate)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here on, allocations are those of the schedule."""
        self._within_step = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the last step logged, wherever it falls between two logs, and a run that is cut short resumable."""
        self._within_step = False
        if control.should_training_stop and state.global_step < state.max_steps:
            control.should_save = True
        # Before a checkpoint, too: the loss since the last log is not in it.
        if control.should_save or control.should_training_stop or state.global_step >= state.max_steps:
            control.should_log = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The same at the end of an epoch."""
        if control.should_save:
            control.should_log = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What is evaluated later is no part of training."""
        self._over = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """One line for each log. Loggers behind also get the ranks, which ranks.jsonl has."""
        if self._over:
            return
        self._append(METRICS, {"step": state.global_step, **(logs or {})})
        if logs and "loss" in logs:
            logs.update({f"adalora/rank/{name}": rank for name, rank in self._ranks.items()})

    def _on_allocate(self, step: int, budget: int, keep: Mapping[str, Tensor]) -> None:
        ranks = {name: int(mask.sum()) for name, mask in keep.items()}
        self._ranks = ranks
        assert self.source is not None and self.source.allocator is not None
        spent = self.source.allocator.spent
        self.live.append((step, spent))
        # What met the budget of a run that was cut short is no part of it once it is resumed.
        forced = {} if self._within_step else {"forced": True}
        self._append(RANKS, {"step": step, "budget": budget, "spent": spent, "ranks": ranks, **forced})

    def _append(self, name: str, record: dict[str, Any]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def loggers_last(trainer: Trainer) -> None:
    """Let TensorBoard, W&B and the like see a log when every other callback has added its part to it."""
    loggers = get_reporting_integration_callbacks(trainer.args.report_to)
    trainer.callback_handler.callbacks.sort(key=lambda callback: type(callback) in loggers)


class ProgressLine(TrainerCallback):
    """Loss, learning rate, phase, budget and time left: one live line on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console, source: AdaLoraCallback | None, label: str) -> None:
        self.console, self.source, self.label = console, source, label
        self.text, self.started, self.first, self.shown = "", 0.0, 0, 0.0
        columns = [
            TextColumn("{task.description}"),
            *([BarColumn(bar_width=24)] if console.width >= _ROOM_FOR_A_BAR else []),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            TextColumn("left  {task.fields[text]}"),
        ]
        self.bar = Progress(*columns, console=console, transient=True)
        self.task = self.bar.add_task(label, total=None, text="")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the line."""
        self.started, self.first = time.monotonic(), state.global_step
        if self.console.is_terminal:
            self.bar.update(self.task, total=state.max_steps, completed=state.global_step)
            self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move it."""
        if self.console.is_terminal:
            self.bar.update(self.task, completed=state.global_step, text=self._text())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Take loss and rate; without a terminal, print them, a dozen times a run."""
        logs = logs or {}
        if "loss" in logs:
            self.text = f"loss {float(logs['loss']):.3f}  lr {float(logs.get('learning_rate', 0)):.1e}"
        scores = {key[5:]: value for key, value in logs.items() if key.startswith("eval_") and _is_score(key)}
        if scores:
            shown = "  ".join(f"{name} {float(value):.3f}" for name, value in scores.items())
            self.console.print(f"  {self.label} epoch {state.epoch:.1f}: {shown}")
        elif not self.console.is_terminal and "loss" in logs and self._due(state):
            spent = time.monotonic() - self.started
            left = spent / max(state.global_step - self.first, 1) * (state.max_steps - state.global_step)
            line = f"  {self.label} {state.global_step}/{state.max_steps} {self._text()}  {left:.0f} s left"
            self.console.print(line)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the line away."""
        self.close()

    def close(self) -> None:
        """Take the line away; also needed when training ends by an error."""
        if self.bar.live.is_started:  # stopping one that never started prints an empty line
            self.bar.stop()

    def _due(self, state: Any) -> bool:
        done = state.global_step / max(state.max_steps, 1)
        if done - self.shown < 1 / 12 and done < 1:
            return False
        self.shown = done
        return True

    def _text(self) -> str:
        allocator = self.source.allocator if self.source else None
        if allocator is None:
            return self.text
        whole = allocator.schedule.target_budget
        return f"{self.text}  {allocator.phase.value}  budget {allocator.budget} → {whole}"


def _is_score(key: str) -> bool:
    return not key.endswith(("_loss", "_runtime", "_per_second")) and key != "eval_model_preparation_time"
