"""What it costs to begin: `import adalora` beyond torch, and `adalora --help`. `python -m benchmarks.start`."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import records
from benchmarks.table import start_table

# Names are fetched at first use, so a plain import would measure nothing: here every public name is fetched.
IMPORT = """
import time, torch
begin = time.perf_counter()
{statement}
print(time.perf_counter() - begin)
"""
HELP = """
import sys
from adalora.__main__ import main
sys.argv = ["adalora", "--help"]
try:
    main()
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


def import_seconds(statement: str) -> float:
    """Seconds that `statement` takes in a fresh interpreter which holds torch already."""
    return float(_python(IMPORT.format(statement=statement)).stdout)


def help_seconds() -> float:
    """Seconds of `adalora --help` as a whole process, interpreter included."""
    begin = time.perf_counter()
    _run([sys.executable, "-m", "adalora", "--help"])
    return time.perf_counter() - begin


def help_imports_torch() -> bool:
    """Whether `adalora --help` loads torch."""
    return _python(HELP).stderr.split()[-1] == "True"


def measure(repeats: int) -> records.Record:
    """Medians and quartiles in milliseconds. The first call of each, which fills the file cache, is left out."""
    return {
        "import adalora": _milliseconds(lambda: import_seconds("import adalora"), repeats),
        "every public name": _milliseconds(lambda: import_seconds("from adalora import *"), repeats),
        "adalora --help": _milliseconds(help_seconds, repeats),
        "help imports torch": help_imports_torch(),
        "repeats": repeats,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=records.RESULTS / "start.json")
    options = parser.parse_args(arguments)
    record = measure(options.repeats)
    print(start_table([record]))
    records.store(options.out, records.processor(), record | {"environment": records.environment()})


def _milliseconds(measured: Callable[[], float], repeats: int) -> list[float]:
    measured()
    quartiles = statistics.quantiles([measured() for _ in range(repeats)], n=4, method="inclusive")
    return [round(value * 1000, 2) for value in quartiles]


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return _run([sys.executable, "-c", code])


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True)


if __name__ == "__main__":
    main()
