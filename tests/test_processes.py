"""More than one process: the same decisions, the same adapter, and everything refused that cannot be so.

`processes.py` trains in four gloo processes; here one process does the same with the whole batch.
"""

import copy
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks import devices
from benchmarks.scale import plan
from safetensors.torch import save_file

import adalora
import processes
from adalora.errors import AdapterFileError
from adalora.injection import named_adapters
from adalora.runfolder import MANIFEST, load_run, save_run
from processes import STEPS, WORLD, Branched, Net, Run, adapted, bytes_held, penalty_alone, said

pytestmark = pytest.mark.slow

Reports = dict[str, list[Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the four processes, which all tests of this file share, wrote what they saw."""
    folder = tmp_path_factory.mktemp("processes")
    processes.run_script(processes.__file__, folder)
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
    assert len(expected["masks"]) == 5 and len({json.dumps(mask) for mask in expected["masks"]}) > 2
    for report in reports[name]:
        assert report["masks"] == expected["masks"]
        assert (report["live"], report["step"], report["skipped"]) == (expected["live"], STEPS, 0)
        assert furthest(report, expected) < 2e-4
        assert report["factors"] == reports[name][0]["factors"]  # no process drifts from another


@pytest.mark.parametrize("how", ["ddp 4", "fsdp 4", "fsdp 2", "fsdp 4 squared"])
def test_the_regularizer_is_as_strong_in_any_number_of_processes(how: str, reports: Reports) -> None:
    form = "squared" if how.endswith("squared") else "norm"
    expected = penalty_alone(Run(adapted(orth_reg_form=form)))
    assert min(expected) > 1e-4
    for report in reports["penalty"]:
        assert report[how] == pytest.approx(expected, rel=1e-5)


def test_a_sharded_adapter_is_one_folder(folder: Path, reports: Reports) -> None:
    expected = Run(adapted()).train()
    model = adalora.load_adapter(Net(), folder / "adapter")
    for (name, module), (_, other) in zip(named_adapters(model), named_adapters(expected.model), strict=True):
        assert module.rank == other.rank == sum(reports["fsdp_4"][0]["masks"][-1][name])
        torch.testing.assert_close(module.delta_weight(), other.delta_weight(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(model.head.weight, expected.model.head.weight, rtol=1e-4, atol=1e-5)
    for report in reports["fsdp_4"]:
        assert report["difference"] == 0.0
        assert report["penalty"] == pytest.approx(
            float(adalora.orthogonality_penalty(expected.model).detach()), rel=1e-4
        )
    assert (folder / "lora" / "adapter_model.safetensors").is_file()
    adalora.load_adapter(Net(), folder / "replicated")


def test_each_process_holds_its_part_of_parameters_and_state(reports: Reports) -> None:
    run = Run(adapted()).train(range(8))
    held, parts = bytes_held(run.model, run.optimizer), [report["bytes"] for report in reports["fsdp_4"]]
    for kind in ("frozen", "trained", "state"):
        assert sum(part[kind] for part in parts) == held[kind]
        assert max(part[kind] for part in parts) < 0.4 * held[kind]  # rank 3 over four is uneven


def test_a_fault_in_one_part_stops_importance_in_all(reports: Reports) -> None:
    for report in reports["fsdp_4_with_a_fault_in_one_shard"]:
        assert report["averages"] == 30 and report["kept"] and report["skipped"] == 1
        assert "are not finite: the run has diverged" in report["next allocation"]


def test_a_sharded_run_resumes_bit_for_bit_and_in_another_number_of_processes(folder: Path, reports: Reports) -> None:
    expected = alone()
    one = Run(adapted())
    assert load_run(one.model, one.optimizer, folder / "run") == {"step": 9}
    report = one.train(range(9, STEPS)).report()
    assert report["masks"] == expected["masks"][-len(report["masks"]) :]
    assert furthest(report, expected) < 2e-4
    for report in reports["resuming"]:
        assert report["same masks"] and report["same bits"]
        assert furthest(report["two"], expected) < 2e-4
        assert "holds a run already" in report["twice"]
        assert "'s embed" not in report["other"] and "holds the run of another model" in report["other"]


def test_a_run_resumes_by_torchs_own_functions(reports: Reports) -> None:
    for report in reports["resuming_with_torchs_own_functions"]:
        assert report["steps counted by a look"] == 0
        assert report["steps counted of a warm-up"] == 1
        assert report["9"] == report["13"] == [True, True, True]


def test_accelerates_fsdp_is_the_same_run_and_resumes_by_save_state(folder: Path, reports: Reports) -> None:
    expected = alone()
    for first, again in reports["accelerated"]:
        assert all(first["sharded"]) and all(again["sharded"])
        assert first["masks"] == expected["masks"]
        assert furthest(first, expected) < 2e-4
        assert again["factors"] == first["factors"] and again["live"] == first["live"]
    model = adalora.load_adapter(Net(), folder / "from accelerate")
    assert {name: module.rank for name, module in named_adapters(model)} == {
        name: sum(keep) for name, keep in expected["masks"][-1].items()
    }


REFUSALS = {
    "merge": "InjectionError: 'FSDPNet' is sharded over processes, so its weights cannot take the increments",
    "eject": "InjectionError: 'FSDPNet' is sharded over processes, so FSDP drives its layers",
    "export_merged": "InjectionError: 'FSDPNet' is sharded over processes, so no process holds its weights",
    "inject": "InjectionError: 'blocks.0' is sharded over processes, so new parameters would not be; inject",
    "first version": "InjectionError: FullyShardedDataParallel, FSDP's first version, keeps parameters in flat pieces",
    "flattened": "TrainingError: embed.lora_A has shape (",
    "refactor": "TrainingError: refactor=True needs the whole factors of 'embed'",
    "compact": "TrainingError: compaction in a group of 4 processes",
    "stale": "TrainingError: embed.lora_A is not in the optimizer",
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_a_sharded_model_cannot_do_is_refused_by_name(what: str, reports: Reports) -> None:
    for report in reports["refusals"]:
        assert report[what].startswith(REFUSALS[what])
        assert report["untouched"]


def test_a_failed_write_is_an_error_in_every_process(reports: Reports) -> None:
    first, *others = (report["unwritable"] for report in reports["refusals"])
    assert first.startswith("AdapterFileError: cannot write to '/proc/nowhere'")
    assert set(others) == {"AdapterFileError: the first process could not write the adapter; its own message says why."}


# --- By a launcher ------------------------------------------------------------------------------------------

DOCUMENTED = Path(__file__).parents[1] / "docs" / "scale.md"
LAUNCHED = """
import json, os, sys
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
import adalora
from adalora.injection import named_adapters

distributed.init_process_group("gloo")  # rank, size and address are the launcher's
rank, world = distributed.get_rank(), distributed.get_world_size()
mesh = DeviceMesh("cpu", range(world))
config = adalora.AdaLoraConfig(
    init_r=16, target_r=3, target_modules="all-linear", tinit=2, tfinal=2992, deltaT=2  # 8 steps of 3000 decide
)
sent, real = [], distributed.all_reduce

def counted(tensor, *arguments, **options):
    sent.append(tensor.nbytes)
    return real(tensor, *arguments, **options)

distributed.all_reduce = counted

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 20)) for _ in "ab")

    def forward(self, x):
        for layer in self.model.layers:
            x = x + layer(x)
        return x

def new():
    torch.manual_seed(0)
    return Tiny()

def fit(model, optimizer):
    seen = []
    for step in range(8):
        x = torch.randn(6, 20, generator=torch.Generator().manual_seed(2 * step + rank))
        (model(x) - x.flip(1)).square().mean().backward()
        sent.clear()
        optimizer.step()
        optimizer.zero_grad()
        seen.append({"bytes": sum(sent), "masks": {
            n.removeprefix("module."): m.lora_keep.tolist() for n, m in named_adapters(model)}})
    return seen

before, after = sys.argv[1].split("...\\n")
model = new()
exec(before)
fsdp = fit(model, optimizer)
exec(after)
model = adalora.inject(new(), config)
model = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(adalora.parameter_groups(model), lr=1e-3)
adalora.RankAllocator(model, total_step=3000).attach(optimizer)
ddp = fit(model, optimizer)
with open(f"{rank}.json", "w") as file:
    json.dump({"world": world, "fsdp": fsdp, "ddp": ddp}, file)
distributed.destroy_process_group()
"""


def test_the_documented_loop_under_torchrun_decides_alike_and_sends_what_the_table_says(tmp_path: Path) -> None:
    example = DOCUMENTED.read_text().split("```\nadalora.inject(model, config)")[1].split("```")[0]
    (tmp_path / "train.py").write_text(LAUNCHED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29781"]
    done = subprocess.run(
        [*launcher, "train.py", f"adalora.inject(model, config){example}"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == other and first["world"] == 2
    assert [step["masks"] for step in first["fsdp"]] == [step["masks"] for step in first["ddp"]]
    live = [sum(map(sum, step["masks"].values())) for step in first["fsdp"]]
    assert live[0] == 64 > live[4] > live[6] >= 12
    counts: Any = SimpleNamespace(matrices=lambda: [(24, 20), (20, 24)] * 2, billions=0)
    planned = plan(counts, 2)
    each, allocation = planned["all-reduced in a step, sharded"], planned["all-reduced in an allocation"]
    allocates = [step in (4, 6) for step in range(8)]
    assert [step["bytes"] for step in first["fsdp"]] == [each + allocation * now for now in allocates]
    assert [step["bytes"] for step in first["ddp"]] == [0] * 8
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


# --- One process is enough ----------------------------------------------------------------------------------


def test_a_damaged_run_is_not_continued(tmp_path: Path) -> None:
    run = Run(adapted()).train(range(3))
    save_run(run.model, run.optimizer, tmp_path / "run", {"epoch": 1})
    [shard] = (tmp_path / "run").glob("shard-*.safetensors")
    good, text = shard.read_bytes(), (tmp_path / "run" / MANIFEST).read_text()

    def load() -> str:
        other = Run(adapted())
        return said(lambda: load_run(other.model, other.optimizer, tmp_path / "run"))

    assert load() == "nothing was raised"
    shard.write_bytes(good[:200] + bytes([good[200] ^ 1]) + good[201:])
    assert "is damaged; take an earlier run" in load()
    shard.unlink()
    assert "is missing; take an earlier run" in load()
    shard.write_bytes(good)
    for broken in ("", "{", "[]", "{}", text.replace("0.03", "0.3"), text[:-9], "[" * 100_000):
        (tmp_path / "run" / MANIFEST).write_text(broken)
        assert "is damaged" in load()
    (tmp_path / "run" / MANIFEST).unlink()
    assert "holds no complete run" in load()
    save_run(run.model, run.optimizer, tmp_path / "run")  # over the torn one
    assert load() == "nothing was raised"


MOMENT = "optimizer.head.weight.exp_avg"
HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "'load'": lambda text: text["tensors"][MOMENT].__setitem__(0, "load"),
    "'nope'": lambda text: text["tensors"][MOMENT].__setitem__(0, "nope"),
    "no list": lambda text: text["tensors"].update({MOMENT: "float32"}),
    "no name": lambda text: text["tensors"].update({MOMENT: []}),
    "2^50": lambda text: text["tensors"].update({MOMENT: ["float32", 2**40, 2**10]}),
    "2 GB": lambda text: text["tensors"].update({MOMENT: ["float32", 2**14, 2**15]}),
    "10^400": lambda text: text["tensors"].update({MOMENT: ["float32", 10**400]}),
    "a scalar": lambda text: text["tensors"].update({MOMENT: ["float32"]}),
    "less than nothing": lambda text: text["tensors"].update({MOMENT: ["float32", -1, -30]}),
    "another type": lambda text: text["tensors"][MOMENT].__setitem__(0, "float64"),
    "a tensor more": lambda text: text["tensors"].update({"optimizer.head.weight.more": ["float32", 2**14, 2**15]}),
    "a tensor less": lambda text: text["tensors"].pop(MOMENT),
    "no such parameter": lambda text: text["numbers"].update({"optimizer.nothing.step": 3}),
    "no such kind": lambda text: text["numbers"].update({"else": 3}),
    "a model's number": lambda text: text["numbers"].update({"model.head.weight": 3}),
    "no such group": lambda text: text["numbers"].update({"group.9.lr": 3}),
    "group x": lambda text: text["numbers"].update({"group.x.lr": 3}),
    "group -1": lambda text: text["numbers"].update({"group.-1.lr": 3}),
    "other parameters": lambda text: text["numbers"].update({"group.0.params": [0]}),
    "a text for a rate": lambda text: text["numbers"].update({"group.0.lr": "x"}),
    "a list for a rate": lambda text: text["numbers"].update({"group.0.lr": [0.1]}),
    "one beta": lambda text: text["numbers"].update({"group.0.betas": [0.9]}),
    "texts for betas": lambda text: text["numbers"].update({"group.0.betas": ["x", "y"]}),
    "a number for a switch": lambda text: text["numbers"].update({"group.0.amsgrad": 3}),
    "a number for a moment": lambda text: text["numbers"].update({MOMENT: 3}),
    "no files": lambda text: text.update(files={}),
    "a folder for a file": lambda text: text["files"].update({"..": "x"}),
    "a file elsewhere": lambda text: text["files"].update({"../x.safetensors": "x"}),
    "a group that is none": lambda text: text.update(groups=[3]),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_run_that_lies_with_a_digest_that_fits_changes_nothing(what: str, tmp_path: Path) -> None:
    run = Run(adapted()).train(range(3))
    save_run(run.model, run.optimizer, tmp_path, {"epoch": 1})
    text = json.loads((tmp_path / MANIFEST).read_text())
    del text["digest"]
    HOSTILE[what](text)
    sums = hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()
    (tmp_path / MANIFEST).write_text(json.dumps(text | {"digest": sums}))
    other = Run(adapted()).train(range(2))
    before, held = copy.deepcopy(other.model.state_dict()), copy.deepcopy(other.optimizer.state_dict())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AdapterFileError, match=re.escape(str(tmp_path))):
        load_run(other.model, other.optimizer, tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100_000  # kilobytes
    torch.testing.assert_close(other.model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(other.optimizer.state_dict(), held, rtol=0, atol=0)


def test_a_file_that_the_run_does_not_list_is_not_read(tmp_path: Path) -> None:
    run = Run(adapted()).train(range(3))
    save_run(run.model, run.optimizer, tmp_path)
    save_file({"model.head.weight": torch.zeros(3, 10)}, tmp_path / "more.safetensors")
    with pytest.raises(AdapterFileError, match=r"more\.safetensors' is not among the files"):
        load_run(run.model, run.optimizer, tmp_path)


def test_an_optimizer_of_deepspeed_is_refused_by_name() -> None:
    kind = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})
    model = adapted()
    with pytest.raises(adalora.AdaLoraError, match="DeepSpeedZeroOptimizer of DeepSpeed trains flat pieces"):
        adalora.RankAllocator(model).attach(kind())


def test_extra_must_be_json(tmp_path: Path) -> None:
    run = Run(adapted())
    with pytest.raises(AdapterFileError, match="must be of JSON's types"):
        save_run(run.model, run.optimizer, tmp_path, {"rows": {1, 2}})


def test_a_stage_of_a_pipeline_is_refused_by_name() -> None:
    stage: Any = type("PipelineStage", (), {})()
    with pytest.raises(adalora.AdaLoraError, match=r"PipelineStage is no module.*could not move between them"):
        adalora.RankAllocator(stage)


@pytest.mark.slow
def test_sharding_divides_the_peak_memory_of_a_process() -> None:
    """Base and adapter state of 64 + 14 MB; what is gathered for a layer, 4 MB, comes on top."""
    (whole,) = devices.measure("one process", 1, width=1024, layers=16)["peak MB of each"]
    parts = devices.measure("FSDP2", 2, width=1024, layers=16)["peak MB of each"]
    assert whole >= 70
    assert all(35 <= part <= 0.8 * whole for part in parts)
