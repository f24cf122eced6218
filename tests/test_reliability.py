"""docs/reliability.md and docs/security.md name tests that exist, and figures that the commands wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from benchmarks import soak

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize("name", ["reliability", "security"])
def test_every_test_that_a_page_names_exists(name: str) -> None:
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    named = re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", text)
    assert len(named) > 15
    for file, test in named:
        source = (ROOT / "tests" / (file or f"test_{name}.py")).read_text(encoding="utf-8")
        assert f"def {test}(" in source, (file, test)


def figures(name: str, key: str) -> list[float]:
    cells = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["cells"]
    return [cell[key] for cell in cells.values()]


def test_the_figures_are_those_that_the_commands_wrote() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = {match[1]: match[2] for match in re.finditer(r"^\| `python -m benchmarks\.(\w+)[^|]*\|(.*)$", text, re.M)}
    found = {name: [float(n) for n in re.findall(r"\d+(?:\.\d+)?", row.replace(",", ""))] for name, row in rows.items()}
    places = figures("kills", "places")
    kills = [sum(figures("kills", key)) for key in ("kills", "runs")]
    where = [sum(place.get(what, 0) for place in places) for what in ("while writing", "between micro-batches")]
    assert found["kills"] == [*kills, *where, sum(figures("kills", "different"))]
    assert kills[0] >= 50 and where[0] > 0 and where[1] > 0
    inputs = [sum(figures("fuzz", "inputs")), len(figures("fuzz", "inputs"))]
    most = [max(figures("fuzz", "slowest_s")), max(figures("fuzz", "grown_MB"))]
    assert found["fuzz"] == [*inputs, *most, sum(figures("fuzz", "failed"))]
    assert inputs[0] >= 10_000 and found["fuzz"][-1] == 0
    keys = ("allocations", "pattern_changes", "kB_grown_in_the_second_half", "off_budget", "drifted")
    assert found["soak"] == [figures("soak", key)[0] for key in keys]
    assert found["soak"][0] >= 20_000 and found["soak"][3:] == [0, 0]
    (record,) = json.loads((RESULTS / "soak.json").read_text(encoding="utf-8"))["cells"].values()
    assert not soak.leaks(record)
