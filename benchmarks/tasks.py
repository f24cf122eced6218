"""Every task once through the command line: AdaLoRA, then plain LoRA of the same final size.

    python -m benchmarks.tasks --data ../shared/data --out runs/tasks

trains, evaluates and predicts with the built-in recipes of benchmarks.shows, one thread a process, and brings
docs/results.md up to date. What is finished is not done again; what was cut short goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

from benchmarks import records, table
from benchmarks.shows import SHOWS, Show, first_rows
from benchmarks.tasktable import METHODS, tasks_table

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "results.md"
RESULTS = records.RESULTS / "tasks.json"
SHOWN_FOLDER = Path("runs/tasks")  # stands for --out in the commands of the document
TOLERANCE = 1e-4  # of a score, between `train` and `evaluate`

Store = Callable[[str, records.Record], None]
_building, _storing = Lock(), Lock()  # what two shows share: a model from scratch, the file of results


@dataclass(frozen=True)
class Arm:
    """One run of a show: its folder and the commands that fill it."""

    show: Show
    method: str
    final: int | None  # parameters that plain LoRA may have

    def folder(self, out: Path) -> Path:
        """Where the run is."""
        return out / self.show.recipe / self.method

    def rows(self, out: Path, key: str) -> Path:
        """A file of first rows: for `key` of the recipe, or those that are predicted."""
        return out / self.show.recipe / f"{key}.jsonl"

    def train(self, out: Path) -> list[str]:
        """Arguments of `adalora train`."""
        show = self.show
        changes = list(show.changes)
        changes += [f"{key}={self.rows(out, key)}" for key in show.firsts]
        changes += [f"model.name_or_path={out / 'models' / show.scratch}"] if show.scratch else []
        if self.method == "lora":
            changes.append(f"method={{name: lora, parameters: {self.final}, {show.lora}}}")
            changes += [f"training.learning_rate={show.lora_rate}"] if show.lora_rate else []
        return ["train", show.recipe, "--out", str(self.folder(out)), *(f"--set={change}" for change in changes)]

    def evaluate(self, out: Path) -> list[str]:
        """Arguments of `adalora evaluate`."""
        return ["evaluate", str(self.folder(out)), "--json"]

    def predict(self, out: Path) -> list[str]:
        """Arguments of `adalora predict`."""
        answers = self.folder(out) / "answers.jsonl"
        return ["predict", str(self.folder(out)), "--file", str(self.rows(out, "asked")), "--out", str(answers)]

    def commands(self) -> list[str]:
        """All three as they are typed in the folder of the data."""
        lines = (self.train(SHOWN_FOLDER), self.evaluate(SHOWN_FOLDER), self.predict(SHOWN_FOLDER))
        return [shlex.join(["adalora", *line]) for line in lines]


def play(show: Show, data: Path, out: Path, store: Store) -> None:
    """All runs of a show, as far as they are not done; `store` gets each one's record when it ends."""
    for key, (file, count) in {**show.firsts, "asked": (show.predicts, show.asked)}.items():
        first_rows(data / file, count, out / show.recipe / f"{key}.jsonl")
    if show.scratch:
        with _building:
            model = out / "models" / show.scratch
            run("benchmarks.scratch", [show.scratch, "--data", str(data), "--out", str(model)], ROOT, log(model))
    final = None
    for method in METHODS:
        arm = Arm(show, method, final)
        result = trained(arm, data, out)
        final = int(result["parameters"]["final"])
        evaluated, answers = used(arm, data, out)
        require_equal(result["scores"], evaluated, arm.folder(out))
        kept = ("base", "split", "rows", "scores", "metric", "parameters", "train_seconds", "resumed_from", "steps")
        record = {key: result[key] for key in kept} | {"evaluated": evaluated, "answers": answers}
        record |= {"recipe": show.recipe, "method": method, "shown": list(show.scores), "commands": arm.commands()}
        store(f"{show.recipe}/{method}", record | {"environment": records.environment()})


def trained(arm: Arm, data: Path, out: Path) -> records.Record:
    """The result of a run, which is done, or gone on with, if it is not complete."""
    folder = arm.folder(out)
    if not complete(folder):
        resume = ["--resume"] if any(folder.glob("checkpoints/checkpoint-*")) else []
        run("adalora", [*arm.train(out), *resume], data, log(folder))
    return records_of(folder / "result.json")


def used(arm: Arm, data: Path, out: Path) -> tuple[dict[str, float], int]:
    """(scores that `adalora evaluate` finds, how many rows `adalora predict` answered); done if it is not yet."""
    folder = arm.folder(out)
    scores, answers = folder / "evaluated.json", folder / "answers.jsonl"
    if not scores.is_file():
        fresh = scores.with_suffix(".part")
        run("adalora", arm.evaluate(out), data, log(folder), fresh)
        fresh.replace(scores)
    if not answers.is_file() or lines_in(answers) != lines_in(arm.rows(out, "asked")):
        answers.unlink(missing_ok=True)  # a command that was cut
        run("adalora", arm.predict(out), data, log(folder))
    return records_of(scores)["scores"], lines_in(answers)


def run(module: str, arguments: Sequence[str], where: Path, screen: Path, answer: Path | None = None) -> None:
    """`python -m module` with one thread in the folder `where`. What it prints goes to the end of the file `screen`,
    standard output to the file `answer` if that is given. Raises CalledProcessError."""
    screen.parent.mkdir(parents=True, exist_ok=True)
    with screen.open("a") as lines, (answer or screen).open("w" if answer else "a") as output:
        subprocess.run(
            [sys.executable, "-W", "ignore", "-m", module, *arguments],
            cwd=where,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdout=output,
            stderr=lines,
            check=True,
        )


def complete(folder: Path) -> bool:
    """Whether the run in `folder` came to its end. One that was stopped has a result, but is not complete."""
    result = folder / "result.json"
    return result.is_file() and bool(records_of(result)["complete"])


def require_equal(found: dict[str, float], again: dict[str, float], folder: Path) -> None:
    """Raise ValueError if `evaluate` gives other scores than the training run did."""
    wrong = {
        name: (value, again.get(name))
        for name, value in found.items()
        if not math.isclose(value, again.get(name, math.nan), rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    }
    if wrong or found.keys() != again.keys():
        raise ValueError(f"{folder}: `evaluate` differs from the run, (run, evaluate) = {wrong or (found, again)}.")


def log(folder: Path) -> Path:
    """Where the output of a run's commands goes: a file beside its folder."""
    return folder.with_name(folder.name + ".log")


def lines_in(file: Path) -> int:
    """How many lines a file has."""
    return file.read_bytes().count(b"\n")  # not splitlines: an answer may hold other separators


def records_of(file: Path) -> records.Record:
    """A JSON object."""
    found: records.Record = json.loads(file.read_text())
    return found


def write_document(document: Path, results: Path) -> None:
    """Bring the tables in `document` up to date with `results`."""
    cells = list(records.load(results).values())
    order = [show.recipe for show in SHOWS]
    cells.sort(key=lambda cell: (order.index(cell["recipe"]), METHODS.index(cell["method"])))
    body = f"{tasks_table(cells)}\n\n{table.environments(cells)}" if cells else "Not measured yet."
    document.write_text(table.filled(document.read_text(), "tasks", body))


def main(arguments: Sequence[str] | None = None, shows: Sequence[Show] = SHOWS) -> None:
    """Run what is missing, write the results. Exit code 1 if a show failed; the others are done all the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", nargs="+", choices=[show.recipe for show in shows], help="some of the recipes")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    options = parser.parse_args(arguments)
    data, out = options.data.resolve(), options.out.resolve()

    def store(key: str, record: records.Record) -> None:
        with _storing:
            records.store(options.results, key, record)
            write_document(options.document, options.results)

    chosen = [show for show in shows if not options.only or show.recipe in options.only]
    with ThreadPoolExecutor(options.workers) as pool:
        futures = {show.recipe: pool.submit(partial(play, show, data, out, store)) for show in chosen}
    failed = {recipe: error for recipe, future in futures.items() if (error := future.exception())}
    for recipe, error in failed.items():
        print(f"{recipe}: {error}; see {out / recipe}", file=sys.stderr)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
