"""Going on with a run that was cut short: its folder, its last complete checkpoint, its records up to there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .claiming import locked
from .errors import ConfigError
from .files import write_files
from .integrations.checkpoints import checkpoints, flaw
from .jsonfiles import believed, read_object, read_records
from .recipe import Recipe, load_recipe
from .resolve import DECAY, HEAD_RATE
from .runfiles import BEGUN, CHECKPOINTS, FAILED, METRICS_FILE, RANKS_FILE, RESULT

_FREE = {"max_minutes"}  # keys of a recipe that may differ in a resumed run


@contextmanager
def resumed(out: Path) -> Iterator[None]:
    """`out` for the process that goes on with its run.

    Raises ConfigError if there is no run in it, if the run is complete, or if it still goes on.
    """
    if not (out / BEGUN).is_file():
        raise ConfigError(f"there is no run in {str(out)!r} to resume; leave --resume out to begin one.")
    if (out / RESULT).is_file() and read_object(out / RESULT).get("complete", True):
        raise ConfigError(f"the run in {str(out)!r} is complete; there is nothing to resume.")
    (out / CHECKPOINTS).mkdir(exist_ok=True)
    with locked(out):
        try:
            yield
        except BaseException as error:
            with suppress(OSError):
                if (out / FAILED).exists():
                    (out / FAILED).write_text(f"{type(error).__name__}: {error}\n", encoding="utf-8")
            raise
        (out / FAILED).unlink(missing_ok=True)


def require_same(recipe: Recipe, out: Path) -> None:
    """Raise ConfigError unless `recipe`, fully resolved, is the one that the run in `out` began with."""
    before, now = _flat(load_recipe(str(out / BEGUN)).model_dump()), _flat(recipe.model_dump())
    # Runs that began before there was this key decayed everything alike.
    before.setdefault(f"training.{DECAY}", bool(before.get("training.weight_decay")) or now[f"training.{DECAY}"])
    before.setdefault(f"training.{HEAD_RATE}", None)
    for key in sorted(before | now):
        if before.get(key) != now.get(key) and key not in _FREE:
            raise ConfigError(
                f"{key} is {now.get(key)!r}, but the run in {str(out)!r} began with {before.get(key)!r}. Resume it "
                f"with its own recipe: adalora train {out / BEGUN} --out {out} --resume"
            )
    if recipe.training.get("save_only_model"):
        raise ConfigError(f"training.save_only_model was set, so the run in {str(out)!r} cannot be resumed.")


def last_checkpoint(out: Path, say: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint of the run in `out`; later ones that are torn are removed, and `say` tells so."""
    for path in checkpoints(out / CHECKPOINTS):
        lack = flaw(path)
        if lack is None:
            say(f"resuming from {path.name}")
            return path
        say(f"{path.name} is incomplete ({lack}); it is removed")
        shutil.rmtree(path)
    say("there is no complete checkpoint: the run starts again at its first step")
    return None


def no_checkpoint(out: Path, say: Callable[[str], None]) -> None:
    """For a method whose checkpoints do not hold all that it needs to go on: they are removed."""
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)  # there is none before the first one was written
    say("this method cannot go on from a checkpoint: the run starts again at its first step")


def step_of(checkpoint: Path | None) -> int:
    """The optimizer step after which a checkpoint was written; 0 for none."""
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def rewind(out: Path, step: int) -> list[tuple[int, int]]:
    """Cut metrics.jsonl and ranks.jsonl to the first `step` steps; returns (step, cost) of allocations."""
    with believed(out):
        return _rewind(out, step)


def _rewind(out: Path, step: int) -> list[tuple[int, int]]:
    metrics = [r for r in read_records(out / METRICS_FILE) if r["step"] <= step and step and "train_runtime" not in r]
    # Allocations are numbered from 0, logs from 1.
    ranks = [r for r in read_records(out / RANKS_FILE) if r["step"] < step and not r.get("forced")]
    for name, records in ((METRICS_FILE, metrics), (RANKS_FILE, ranks)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        if (out / name).exists():
            write_files(out, {name: lambda path, text=text: path.write_text(text, encoding="utf-8")})  # type: ignore[misc]
    # Runs that began before budgets had units have triplets alone.
    return [(record["step"], record.get("spent", sum(record["ranks"].values()))) for record in ranks]


def _flat(values: dict[str, Any], front: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{front}{key}.") if isinstance(value, dict) else {f"{front}{key}": value}
    return flat
