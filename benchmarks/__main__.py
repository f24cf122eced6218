"""`make bench`: a set of every measurement that takes less than half an hour on two cores, and the tables.

Larger batches, more models and other devices: `python -m benchmarks.step --help`. Their cells stay in the tables.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from benchmarks import table

# Short texts and a full batch on one and two threads; dropout; the other shapes, each at one size.
STEPS = (
    "--shape minilm --tokens 256 2048 --threads 1 2",
    "--shape minilm --tokens 256 2048 --dropout 0.1 --stage budget",
    "--shape deberta-base --tokens 256 --threads 2 --rounds 10",
    "--shape llama --tokens 2048 --threads 2 --stage budget",
)
COUNTS = (
    "--shape deberta-base --tokens 256 --stage budget",
    "--shape deberta-base --tokens 256 --stage compacted",
    "--shape minilm --tokens 2048 --stage budget",
    "--shape minilm --tokens 2048 --stage compacted",
)


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="measure only the times that results/step.json lacks")
    options = parser.parse_args()
    for choices in STEPS:
        run("step", [*choices.split(), *([] if options.keep else ["--again"])])
    for choices in COUNTS:
        run("counts", choices.split())
    run("start", [])
    table.main()


def run(name: str, arguments: list[str]) -> None:
    """In a process of its own: the profiler of one measurement must not fill the memory of the next."""
    subprocess.run([sys.executable, "-W", "ignore", "-m", f"benchmarks.{name}", *arguments], check=True)


if __name__ == "__main__":
    main()
