"""Runs killed by SIGKILL at random moments and resumed: each must end as one that was left alone, bit for bit.

    python -m benchmarks.kills --kills 50

Most victims are forked from one process, which has imported everything; the last are real `adalora train` commands.
A third of the kills wait until the run is writing a checkpoint.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adalora.schedule import Schedule
from benchmarks import accelerated, loops, records, victims
from benchmarks.board import FINAL, MICRO, SCHEDULE, STEPS, Board, Victim
from benchmarks.world import make_world, settings

SHARES: dict[str, tuple[Victim, float]] = {
    "plain loop": (loops.plain, 0.3),
    "plain loop, compacting": (loops.compacting, 0.16),
    "Accelerate": (accelerated.accelerated, 0.14),
    "Trainer": (victims.trainer, 0.2),
    "adalora train": (victims.command, 0.12),
}  # the rest are commands in processes of their own
COMMANDS = "adalora train, a process"
ENOUGH = 120.0  # seconds for any run
PHASES = Schedule(2, 1, total_step=STEPS, **{name: SCHEDULE[name] for name in ("tinit", "tfinal", "deltaT")})


def main(arguments: Sequence[str] | None = None) -> None:
    """Kill, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=records.RESULTS / "kills.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    counts = {kind: max(1, round(share * options.kills)) for kind, (_, share) in SHARES.items()}
    rest = options.kills - sum(counts.values())
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        make_world(world)
        different = 0
        for kind, count in [*counts.items(), *([(COMMANDS, rest)] if rest > 0 else [])]:
            one = commands if kind == COMMANDS else series
            record = one(kind, count, options.seed, world)
            print(f"{kind}: {record}", flush=True)
            records.store(options.out, kind, record | {"environment": records.environment()})
            different += record["different"]
    if different:
        sys.exit(f"{different} resumed runs ended differently")


def series(kind: str, kills: int, seed: int, world: Path) -> records.Record:
    """Runs of one kind, each killed one to three times at random places, until there were `kills`."""
    chance, victim = random.Random(f"{kind} {seed}"), SHARES[kind][0]
    begun, places = time.monotonic(), Counter[str]()
    whole = world / "whole"
    finish(start(victim, whole, Board()))
    done, runs, different = 0, 0, 0
    while done < kills:
        out = world / "run"
        for place in sorted(chance.sample(range(STEPS * MICRO), min(chance.randint(1, 3), kills - done))):
            where = kill(victim, out, place, chance, within_write=chance.random() < 1 / 3)
            if where is not None:
                places.update(where)
                done += 1
        finish(start(victim, out, Board()))
        runs += 1
        different += not same(torch.load(out / FINAL, weights_only=True), torch.load(whole / FINAL, weights_only=True))
        shutil.rmtree(out)
    shutil.rmtree(whole)
    seconds = round(time.monotonic() - begun, 1)
    return {"kills": done, "runs": runs, "different": different, "places": dict(sorted(places.items())), "s": seconds}


def kill(victim: Victim, out: Path, place: int, chance: random.Random, within_write: bool = False) -> list[str] | None:
    """Let a run begin or go on in `out` and kill it behind `place`; where it was then. None if it was over by then.

    `within_write` waits for the next checkpoint that it writes.
    """
    board = Board()
    board.tell(-1)
    child = start(victim, out, board)
    deadline = time.monotonic() + ENOUGH
    while True:
        at, writing = board.look()
        if at >= place and (writing or not within_write):
            break
        if os.waitpid(child, os.WNOHANG)[0] or time.monotonic() > deadline:
            raise RuntimeError(f"a run in {out} ended before it came to {place}")
        time.sleep(0.0002)
    time.sleep(chance.random() * (0.001 if within_write else 0.004))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    at, writing = board.look()
    return words(at, writing) if os.WIFSIGNALED(status) else None


def words(at: int, writing: bool) -> list[str]:
    """The phase, and what else is to be counted of a place."""
    step = at // MICRO
    phase = "after the last step" if step >= STEPS else PHASES.phase(step).value
    between = not writing and at % MICRO > 0
    return [phase, *(["while writing"] if writing else []), *(["between micro-batches"] if between else [])]


def start(victim: Victim, out: Path, board: Board) -> int:
    """Run `victim` in a child process; returns its number."""
    out.mkdir(exist_ok=True)
    child = os.fork()
    if child:
        return child
    try:
        warnings.simplefilter("ignore")
        victim(out, board)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def finish(child: int) -> None:
    """Wait for a run that nobody disturbs."""
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("a run failed; what it said stands above")


def commands(kind: str, kills: int, seed: int, world: Path) -> records.Record:
    """`adalora train` as a user calls it, killed at random times of its training, then resumed."""
    chance, begun = random.Random(f"{kind} {seed}"), time.monotonic()
    chosen = [f"--set={text}" for text in settings(world)]
    train = [sys.executable, "-W", "ignore", "-m", "adalora", "train", "text-classification", *chosen, "--out"]
    whole, out = world / "whole", world / "run"
    subprocess.run([*train, str(whole)], check=True, capture_output=True, timeout=ENOUGH)
    span = (whole / "result.json").stat().st_mtime - (whole / "recipe.yaml").stat().st_mtime
    victims.gather(whole)
    done = different = 0
    for _ in range(kills):
        done += kill_command([*train, str(out)], out, chance.random() * span)
        again = ["--resume"] if (out / "recipe.yaml").exists() else []
        if not (out / "result.json").exists():
            subprocess.run([*train, str(out), *again], check=True, capture_output=True, timeout=ENOUGH)
        victims.gather(out)
        different += not same(torch.load(out / FINAL, weights_only=True), torch.load(whole / FINAL, weights_only=True))
        shutil.rmtree(out)
    shutil.rmtree(whole)
    seconds = round(time.monotonic() - begun, 1)
    return {"kills": done, "runs": kills, "different": different, "places": {}, "s": seconds}


def kill_command(command: list[str], out: Path, delay: float) -> bool:
    """Whether the process was still alive `delay` seconds after it had begun to train."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (out / "recipe.yaml").exists() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
    return process.returncode == -signal.SIGKILL


def same(one: Any, other: Any) -> bool:
    """Equal in structure, in every number and in every bit of every tensor."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


if __name__ == "__main__":
    main()
