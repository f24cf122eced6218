"""Every reader of files, fed with damaged and hostile ones: only AdaLoraError may come out, soon, in little memory.

    python -m benchmarks.fuzz --inputs 10000

Inputs are valid files with bytes or values changed; some are hostile by construction (deep nesting, aliases that
multiply, huge numbers, lengths that lie). The number of an input is its seed, so that one that fails can be made
again.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from adalora.errors import AdaLoraError
from benchmarks import records
from benchmarks.damage import damage
from benchmarks.fuzzed import Reader, make_readers

SECONDS = 10.0  # for one input, on a busy machine
MEGABYTES = 256  # by which the memory of the process may grow over all inputs


def main(arguments: Sequence[str] | None = None) -> None:
    """Feed, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--only", help="one reader")
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each reader")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "fuzz.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        readers = make_readers(Path(folder) / "made")
        whole = sum(reader.share for reader in readers.values())
        for name, reader in readers.items():
            if options.only in (None, name):
                count = round(options.inputs * (1.0 if options.only else reader.share / whole))
                record, errors = feed(reader, count, Path(folder) / "fed", options.first)
                failed += len(errors)
                print(f"{name}: {record}", *_kinds(errors), sep="\n  ", flush=True)
                records.store(options.out, name, record | {"environment": records.environment()})
    if failed:
        sys.exit(f"{failed} inputs gave what they must not")


def feed(reader: Reader, count: int, folder: Path, first: int = 0) -> tuple[records.Record, list[tuple[int, str]]]:
    """Read `count` damaged inputs in `folder`; the record, and (number, what it was) of what should not have come."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in reader.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for name in reader.damaged:  # which are fine yet; and what is imported at first use is no growth
        reader.read(folder, name)
    accepted, slowest, errors = 0, 0.0, []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(first, first + count):
        chance = random.Random(number)
        name = chance.choice(reader.damaged)
        (folder / name).write_bytes(damage(reader.files[name], name, chance))
        begun = time.monotonic()
        try:
            with limited():
                reader.read(folder, name)
            accepted += 1
        except AdaLoraError as error:
            if not str(error):
                errors.append((number, "an error without a message"))
        except Exception as error:
            errors.append((number, _told(error)))
        slowest = max(slowest, time.monotonic() - begun)
        (folder / name).write_bytes(reader.files[name])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    if grown > MEGABYTES:
        errors.append((first, f"memory grew by {grown} MB"))
    record = {"inputs": count, "accepted": accepted, "failed": len(errors), "slowest_s": round(slowest, 2)}
    return record | {"grown_MB": grown}, errors


def _told(error: BaseException) -> str:
    """What came, and the last line of ours that it came through."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "adalora" in frame.filename]
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "outside"
    return f"{type(error).__name__} in {where}: {str(error)[:160]!r}"


def _kinds(errors: list[tuple[int, str]]) -> list[str]:
    """One line for each kind of error, with the first input that gave it."""
    kinds: dict[str, list[tuple[int, str]]] = {}
    for number, text in errors:
        kinds.setdefault(text.partition(": ")[0], []).append((number, text))
    return [f"{len(found)} like input {found[0][0]}: {found[0][1]}" for found in kinds.values()]


@contextmanager
def limited() -> Iterator[None]:
    """At most `SECONDS`; no more memory than two gigabytes beyond what is mapped."""

    def late(*_: Any) -> None:
        raise TimeoutError

    before, limits = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + 2**31, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


if __name__ == "__main__":
    main()
