"""`make bench`: a set of every measurement that takes about a quarter of an hour on two cores, and the tables.

Larger batches, more models and other devices: `python -m benchmarks.step --help`. Their cells stay in the tables.
"""

from __future__ import annotations

import argparse

from benchmarks import counts, start, step, table

# Short texts and a full batch on one and two threads; dropout; the other shapes, each at one size.
STEPS = (
    "--shape minilm --tokens 256 2048 --threads 1 2",
    "--shape minilm --tokens 256 2048 --dropout 0.1 --stage budget",
    "--shape deberta-base --tokens 256 --threads 2 --rounds 10",
    "--shape llama --tokens 2048 --threads 2 --stage budget",
)
COUNTS = ("--shape deberta-base --tokens 256", "--shape minilm --tokens 2048")


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="measure only the times that results/step.json lacks")
    options = parser.parse_args()
    for choices in STEPS:
        step.main([*choices.split(), *([] if options.keep else ["--again"])])
    for choices in COUNTS:
        counts.main(choices.split())
    start.main([])
    table.main()


if __name__ == "__main__":
    main()
