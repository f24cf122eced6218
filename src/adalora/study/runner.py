"""Does a study's runs, each in a process of its own, until none is left; killed, it goes on where it was."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from ..errors import AdapterFileError, ConfigError
from ..tasks.docstrings import write_jsonl
from ..train import check
from .grid import Grid, Run
from .ledger import Ledger
from .outcome import failed_record, finished_record, last_line, tidy
from .results import Record, append, keep_only, read_results, sole_runner

_PAUSE = 0.2  # seconds between looks at the processes
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
Say = Callable[[str], object]


@dataclass
class _Running:
    """A training that is going on."""

    run: Run
    digest: str
    slot: int
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    started: float


@dataclass
class Runner:
    """The one process that starts runs and writes results.

    `only` limits the runs, as `Ledger.pending` says; `threads` are those of each run, as `environment` says.
    """

    grid: Grid
    workers: int
    say: Say
    only: Mapping[str, set[str]] = field(default_factory=dict)
    threads: int | None = None

    def run(self, retry_failed: bool = False) -> Ledger:
        """Do every run that is pending, also those that results call for. Raises ConfigError before the first one."""
        grid = self.grid
        check_grid(grid)
        with sole_runner(grid.out):
            records = read_results(grid.out)
            kept = [r for r in records if not (retry_failed and r["status"] == "failed" and self._ours(r))]
            keep_only(grid.out, kept)  # also drops a line that was torn
            self.ledger = Ledger(grid, kept)
            prepare_data(grid)
            try:
                with _ended_by_sigterm():
                    self._loop()
            except OSError as error:
                raise AdapterFileError(
                    f"the study in {str(grid.out)!r} could not go on: {error}. Mend that, and give the same command "
                    "again; what is done stays."
                ) from error
        return self.ledger

    def _ours(self, record: Record) -> bool:
        return record["arm"] in self.grid.study.arms and record["task"] in self.grid.study.tasks

    def _loop(self) -> None:
        running: list[_Running] = []
        try:
            while True:
                waiting = [run for run in self.ledger.pending(self.only) if run not in [job.run for job in running]]
                for run in waiting[: self.workers - len(running)]:
                    slot = min(set(range(self.workers)) - {job.slot for job in running})
                    running.append(self._start(run, slot))
                if not running:
                    return
                ended = self._wait(running)
                running.remove(ended)
                self._record(ended)
        finally:
            for job in running:
                job.process.kill()
                job.process.wait()
                job.log.close()

    def _start(self, run: Run, slot: int) -> _Running:
        out, sources = self.grid.out, self.ledger.sources(run)
        assert sources is not None  # else it would not be pending
        folder, recipe, log = out / "runs" / run.id, out / "recipes" / f"{run.id}.yaml", out / "logs" / f"{run.id}.txt"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut
        for file in (recipe, log):
            file.parent.mkdir(exist_ok=True)
        recipe.write_text(self.grid.placed(run, sources).dump(), encoding="utf-8")
        stream = log.open("wb")
        process = subprocess.Popen(
            train_command(recipe, folder),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment(slot, self.workers, self.threads),
            start_new_session=True,  # Ctrl-C is for the runner, which ends its runs itself
            preexec_fn=_die_with_parent() if sys.platform == "linux" else None,
        )
        return _Running(run, self.grid.digest(run, sources), slot, process, stream, time.monotonic())

    def _wait(self, running: list[_Running]) -> _Running:
        while True:
            for job in running:
                if job.process.poll() is not None:
                    return job
            time.sleep(_PAUSE)

    def _record(self, job: _Running) -> None:
        """Read the result, write its line, and only then clear up."""
        job.log.close()
        run, out, code = job.run, self.grid.out, job.process.returncode
        folder, log = out / "runs" / run.id, out / "logs" / f"{run.id}.txt"
        wall = time.monotonic() - job.started
        try:
            if code:
                raise ValueError(f"killed by signal {-code}" if code < 0 else last_line(log))
            record = finished_record(run, job.digest, folder, wall)
        except (ValueError, KeyError, OSError) as error:
            record = failed_record(run, job.digest, str(error) or type(error).__name__, wall)
        append(out, record)
        self.ledger.add(record)
        if record["status"] == "finished":
            tidy(folder)
            log.unlink()
            (out / "recipes" / f"{run.id}.yaml").unlink()  # the run's own has every default, too
        left = len(self.ledger.missing(self.only))
        self.say(_progress(record, left, seconds_left(self.ledger, self.workers, self.only)))


def train_command(recipe: Path, folder: Path) -> list[str]:
    """The command line of a run: what a user would type."""
    return [sys.executable, "-m", "adalora", "train", str(recipe), "--out", str(folder)]


def check_grid(grid: Grid) -> None:
    """Raise ConfigError for a recipe of the study that could not run, before any does."""
    for cell in grid.cells:
        recipe = grid.placed(grid.first(cell), {})
        try:
            check(recipe, grid.out)
        except ConfigError as error:
            raise ConfigError(f"{grid.name}: tasks.{cell.task}, arms.{cell.arm}: {error}") from error
        made = grid.study.tasks[cell.task].prepare
        files = [recipe.data.train, recipe.data.validation, recipe.data.test] if recipe.data.name is None else []
        missing = [file for file in files if file and not made and not Path(file).is_file()]
        if missing:
            raise ConfigError(
                f"{grid.name}: tasks.{cell.task}: there is no file {missing[0]!r}; say where with --data."
            )


def prepare_data(grid: Grid) -> None:
    """Write the files of tasks that are made here."""
    if any(task.prepare == "docstrings" for task in grid.study.tasks.values()):
        write_jsonl(grid.out / "data" / "docstrings")


def seconds_left(ledger: Ledger, workers: int, only: Mapping[str, set[str]]) -> float | None:
    """For the runs that are known to be needed, by the mean of those done in the same task; None without any."""
    done = [record for record in ledger.records.values() if record["status"] == "finished"]
    if not done:
        return None
    whole = sum(record["wall_seconds"] for record in done) / len(done)
    total = 0.0
    for run in ledger.missing(only):
        same = [record["wall_seconds"] for record in done if record["task"] == run.cell.task]
        total += sum(same) / len(same) if same else whole
    return total / workers


def environment(slot: int, workers: int, threads: int | None = None) -> dict[str, str]:
    """Of the run in this slot: its threads, by default its share of the cores, and one of the GPUs in turn."""
    threads = threads or max(1, len(_cores()) // workers)
    own = dict(os.environ) | dict.fromkeys(_THREADS, str(threads)) | {"TOKENIZERS_PARALLELISM": "false"}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    return own | ({"CUDA_VISIBLE_DEVICES": names[slot % len(names)]} if names and visible != "" else {})


def shown_time(seconds: float) -> str:
    """As 45 s, 12 min or 3 h 20 min."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else _hours(minutes)


def _hours(minutes: int) -> str:
    return f"{minutes // 60} h {minutes % 60} min"


def _progress(record: Record, left: int, seconds: float | None) -> str:
    place = "{task} {arm} rank {budget:g}, lr {learning_rate:g}, seed {seed}".format(**record)
    if record["status"] == "failed":
        text = f"failed: {record['error']}"
    else:
        scores = ("–" if record[key] is None else f"{100 * record[key]:.1f}" for key in ("validation", "test"))
        text = "validation {}, test {}, {:.0f} s".format(*scores, record["wall_seconds"])
    rest = "" if seconds is None else f", about {shown_time(seconds)}"
    return f"  {place}: {text}  ({left} runs left{rest})"


def _cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _die_with_parent() -> Callable[[], Any]:
    """For the child, before it becomes another program: die when the runner does, even by SIGKILL."""
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:  # it was quicker
            os._exit(1)

    return ask


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the runner by an exception, so that it ends its runs."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
