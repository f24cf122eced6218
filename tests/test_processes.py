"""More than one process: the same decisions, the same adapter, and everything refused that cannot be so.

`processes.py` trains in four gloo processes; here one process does the same with the whole batch.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adalora
import processes
from adalora.injection import named_adapters
from adalora.runfolder import load_run
from processes import STEPS, WORLD, Branched, Run, adapted, penalty_alone

pytestmark = pytest.mark.slow

Reports = dict[str, list[Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the four processes, which all tests of this file share, wrote what they saw."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, processes.__file__, str(folder)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def reports(folder: Path) -> Reports:
    """By name of the check, what each process reports."""
    return {
        name: [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(WORLD)]
        for name in processes.CHECKS
    }


def alone(kind: type[processes.Net] = processes.Net, **settings: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    report: dict[str, Any] = json.loads(json.dumps(Run(adapted(kind, **settings)).train().report()))
    return report


def furthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of two adapters, relative to the largest entry of each matrix."""
    assert one["factors"].keys() == other["factors"].keys()
    worst = 0.0
    for name in one["factors"]:
        a, b = torch.tensor(one["factors"][name]), torch.tensor(other["factors"][name])
        worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1e-3)))
    return worst


TWINS: dict[str, dict[str, Any]] = {
    "ddp_4": {},
    "ddp_2_accumulating": {},
    "ddp_4_with_an_unused_branch": {"kind": Branched},
    "fsdp_4": {},
    "fsdp_2": {},
    "fsdp_2_fisher": {"importance": "fisher"},
    "fsdp_2_magnitude": {"importance": "magnitude"},
    "fsdp_with_replicas": {},
}


@pytest.mark.parametrize("name", TWINS)
def test_several_processes_decide_as_one_does(name: str, reports: Reports) -> None:
    """Every mask of every allocation, bit for bit; the adapter to what sums in another order round to."""
    expected = alone(**TWINS[name])
    assert len(expected["masks"]) == 9 and len({json.dumps(mask) for mask in expected["masks"]}) > 3
    for report in reports[name]:
        assert report["masks"] == expected["masks"]
        assert (report["live"], report["step"], report["skipped"]) == (expected["live"], STEPS, 0)
        assert furthest(report, expected) < 2e-4
        assert report["factors"] == reports[name][0]["factors"]  # no process drifts from another
