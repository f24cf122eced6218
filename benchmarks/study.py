"""A study's results in the repository, and its tables and rank maps in docs/results.md.

    python -m benchmarks.study first-cut --from runs/first-cut

takes over what `adalora compare first-cut --out runs/first-cut` has found so far, one line a run, into
benchmarks/results/first-cut.jsonl; without --from the tables are made anew from there, which trains nothing.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from adalora.commands.comparing import study_grid, study_ledger
from adalora.study.rankmaps import RANKS
from adalora.study.results import RESULTS
from adalora.study.summary import summarize
from adalora.study.tables import write_tables
from benchmarks import records
from benchmarks.table import filled

DOCUMENT = Path(__file__).parent.parent / "docs" / "results.md"


def main(arguments: Sequence[str] | None = None) -> None:
    """Bring the document up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="a built-in study")
    parser.add_argument("--from", dest="folder", type=Path, help="the --out of `adalora compare`")
    options = parser.parse_args(arguments)
    kept = records.RESULTS / f"{options.study}.jsonl"
    if options.folder:
        shutil.copyfile(options.folder / RESULTS, kept)
    DOCUMENT.write_text(filled(DOCUMENT.read_text(), options.study, tables(options.study, kept)))


def tables(study: str, results: Path) -> str:
    """All tables of a study, to stand under a heading of the second level; its rank maps go beside the document."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        shutil.copyfile(results, out / RESULTS)
        text = write_tables(summarize(study_ledger(study_grid(study, out))), out)
        picture = DOCUMENT.parent / "images" / f"{study}-{RANKS}"
        if (out / RANKS).exists():
            picture.parent.mkdir(exist_ok=True)
            shutil.copyfile(out / RANKS, picture)
            text += f"\n## Ranks\n\n![Mean rank of each matrix over the seeds](images/{picture.name})\n"
    _, _, body = text.partition("\n")  # the document has its own title
    return "\n".join("#" + line if line.startswith("#") else line for line in body.strip().splitlines())


if __name__ == "__main__":
    main()
