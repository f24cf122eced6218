"""Running a study: each run once, however often the runner is killed; the same rows and head for every arm."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from adalora import cli
from adalora.errors import ConfigError
from adalora.recipe import load_recipe, load_yaml
from adalora.study import runner
from adalora.study.design import load_study
from adalora.study.grid import Grid
from adalora.study.ledger import Ledger, parse_only
from adalora.study.outcome import finished_record
from adalora.study.results import RESULTS, read_results
from adalora.study.runner import Runner, environment
from adalora.train import run
from folders import rows, save_bert, write

MODULES = {"exclude_modules": ["pooler.dense"]}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data and a recipe whose files are relative."""
    folder = tmp_path_factory.mktemp("world")
    save_bert(folder / "bert")
    write(folder / "train.jsonl", rows(48))
    write(folder / "test.jsonl", rows(16, seed=1))
    recipe = {
        "task": "classification",
        "model": {"name_or_path": str(folder / "bert"), "config": {"hidden_dropout_prob": 0.1}},
        "data": {"train": "train.jsonl", "test": "test.jsonl"},
        "method": {"name": "adalora", **MODULES},
        "training": {"per_device_train_batch_size": 8, "num_train_epochs": 2, "logging_steps": 2},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def study_file(world: Path, folder: Path, **sections: Any) -> Path:
    values = {
        "seeds": [0, 1],
        "budgets": [1],
        "reference": "lora",
        "tasks": {"animals": {"recipe": str(world / "tiny.yaml")}},
        "arms": {
            "lora": {"method": {"name": "lora", "r": "$r"}, "learning_rates": [1e-3, 3e-3, 1e-2]},
            "adalora": {
                "method": {"name": "adalora", "init_r": "$2r", "target_r": "$r"},
                "learning_rates": [1e-3, 3e-3, 1e-2],
            },
        },
    }
    folder.mkdir(exist_ok=True)
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(values | sections, sort_keys=False))
    return file


def make_grid(world: Path, file: Path) -> Grid:
    return Grid(load_study(str(file)), file.parent / "out", world, lambda recipe: 100, str(file))


# Stands for the training: a score that is best at 3e-3 for adalora, and grows up to 1e-1 for lora.
STAND_IN = """
    import json, math, os, pathlib, sys, yaml
    recipe, folder = yaml.safe_load(open(sys.argv[1])), pathlib.Path(sys.argv[2])
    rate, seed, name = float(recipe["training"]["learning_rate"]), recipe["seed"], recipe["method"]["name"]
    if (pathlib.Path(sys.argv[1]).parent.parent / f"break-{seed}").exists():
        print("adalora: no luck today", file=sys.stderr)
        sys.exit(2)
    best = 3e-3 if name == "adalora" else 1.0
    score = 0.9 - 0.05 * abs(math.log10(rate / best)) - 0.001 * seed
    folder.mkdir(parents=True)
    (folder / "report.html").write_text("x")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "tokenizer.json").write_text("{}")
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    ranks = {"step": 1, "ranks": {"q": 2 + seed, "v": 1}}
    (folder / "ranks.jsonl").write_text(json.dumps(ranks) + "\\n") if name == "adalora" else None
    result = {"metric": "accuracy", "validation": {"accuracy": score}, "scores": {"accuracy": score - 0.01},
              "split": "test", "parameters": {"peak": 2, "final": 1, "head": 1}, "steps": 4, "train_seconds": 0.1,
              "complete": True, "stopped": None,
              "environment": {"device": "cpu", "threads": os.environ["OMP_NUM_THREADS"]}}
    (folder / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "stand_in.py"
    script.write_text(textwrap.dedent(STAND_IN))
    monkeypatch.setattr(
        runner, "train_command", lambda recipe, out: [sys.executable, str(script), str(recipe), str(out)]
    )


def do(
    grid: Grid, workers: int = 2, only: str | None = None, threads: int | None = None, **options: Any
) -> tuple[Ledger, list[str]]:
    lines: list[str] = []
    return Runner(grid, workers, lines.append, parse_only(only, grid), threads).run(**options), lines


def ids(grid: Grid) -> list[str]:
    return [record["id"] for record in read_results(grid.out)]


def test_every_run_is_done_once_and_grids_grow_until_the_best_is_interior(
    world: Path, tmp_path: Path, stand_in: None
) -> None:
    grid = make_grid(world, study_file(world, tmp_path / "s"))
    ledger, lines = do(grid)
    rates = {
        arm: {r["learning_rate"] for r in read_results(grid.out) if r["arm"] == arm} for arm in ("lora", "adalora")
    }
    assert rates == {"lora": {1e-3, 3e-3, 1e-2, 3e-2, 1e-1}, "adalora": {1e-3, 3e-3, 1e-2}}
    assert len(ids(grid)) == len(set(ids(grid))) == 16 == len(lines)
    lora, adalora = (ledger.choice(cell) for cell in grid.cells)
    assert (lora.rate, lora.edge, adalora.rate, adalora.edge) == (1e-1, "high", 3e-3, None)
    assert do(grid)[1] == []  # nothing is left
    folder = grid.out / "runs" / "animals-adalora-b1-lr0.003-s0"
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {
        "result.json",
        "ranks.jsonl",
        "adapter_config.json",
    }
    assert not any((grid.out / "logs").iterdir())


def test_a_record_has_scores_sizes_times_and_ranks(world: Path, tmp_path: Path, stand_in: None) -> None:
    grid = make_grid(world, study_file(world, tmp_path / "s"))
    do(grid, only="arm=adalora,seed=1")
    assert len(ids(grid)) == 3
    found = read_results(grid.out)[1]
    assert found["learning_rate"] == 3e-3 and found["validation"] == pytest.approx(0.899)
    assert found["test"] == pytest.approx(0.889) and found["parameters"] == {"peak": 2, "final": 1, "head": 1}
    assert found["ranks"] == {"q": 3, "v": 1} and found["steps"] == 4 and found["status"] == "finished"


def test_failed_runs_are_recorded_with_their_reason_and_retried_only_when_asked(
    world: Path, tmp_path: Path, stand_in: None
) -> None:
    grid = make_grid(world, study_file(world, tmp_path / "s"))
    grid.out.mkdir()
    (grid.out / "break-1").touch()
    ledger, lines = do(grid)
    failed = [record for record in read_results(grid.out) if record["status"] == "failed"]
    assert len(failed) == 6 and {record["seed"] for record in failed} == {1}
    assert {record["error"] for record in failed} == {"adalora: no luck today"}
    assert any("failed: adalora: no luck today" in line for line in lines)
    assert ledger.choice(grid.cells[0]).rate is None  # each rate has a run that failed
    assert "no luck" in (grid.out / "logs" / f"{failed[0]['id']}.txt").read_text()
    (grid.out / "break-1").unlink()
    assert do(grid)[1] == []
    ledger, _ = do(grid, retry_failed=True)
    assert len(ids(grid)) == len(set(ids(grid))) == 16
    assert ledger.choice(grid.cells[1]).rate == 3e-3


def test_a_run_that_was_cut_is_done_again_from_nothing(world: Path, tmp_path: Path, stand_in: None) -> None:
    grid = make_grid(world, study_file(world, tmp_path / "s"))
    cut = grid.out / "runs" / "animals-lora-b1-lr0.001-s0"
    cut.mkdir(parents=True)  # the stand-in would fail in a folder that exists
    (cut / "checkpoints").mkdir()
    do(grid, only="arm=lora,seed=0")
    assert [r["status"] for r in read_results(grid.out)] == ["finished"] * 3


def test_a_mistake_in_any_arm_shows_before_the_first_run(world: Path, tmp_path: Path, stand_in: None) -> None:
    arms = {
        "lora": {"method": {"name": "lora", "r": "$r"}, "learning_rates": [1e-3]},
        "bad": {"method": {"name": "adalora", "init_r": "$r", "target_r": "$2r"}, "learning_rates": [1e-3]},
    }
    grid = make_grid(world, study_file(world, tmp_path / "s", arms=arms))
    with pytest.raises(ConfigError, match=r"arms.bad: in section method: target_r \(2\) is above init_r \(1\)"):
        do(grid)
    grid = make_grid(tmp_path, study_file(world, tmp_path / "s"))
    with pytest.raises(ConfigError, match=r"tasks.animals: there is no file '.*train.jsonl'; say where with --data"):
        do(grid)
    assert not grid.out.exists()


def test_cores_are_shared_out_and_gpus_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_cores", lambda: set(range(6)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert environment(0, 2)["OMP_NUM_THREADS"] == "3" and environment(0, 9)["OMP_NUM_THREADS"] == "1"
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    assert {environment(0, 1, 2)[name] for name in names} == {"2"}
    assert "CUDA_VISIBLE_DEVICES" not in environment(0, 2) or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [environment(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert [environment(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["4", "7", "4"]


def test_a_run_has_the_threads_that_it_was_given(
    world: Path, tmp_path: Path, stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = make_grid(world, study_file(world, tmp_path / "s"))
    monkeypatch.setattr(runner, "_cores", lambda: set(range(6)))
    do(grid, 1, "arm=adalora,seed=0")
    do(grid, 2, "arm=adalora,seed=1", threads=1)
    results = [
        (r["seed"], json.loads((grid.out / "runs" / r["id"] / "result.json").read_text()))
        for r in read_results(grid.out)
    ]
    assert {(seed, result["environment"]["threads"]) for seed, result in results} == {(0, "6"), (1, "1")}


def test_two_passes_are_a_study_of_runs_that_start_from_runs(world: Path, tmp_path: Path) -> None:
    """As docs/compare.md has it, on a tiny model: the second pass is a LoRA with the ranks that the first one found."""
    text = (Path(__file__).parent.parent / "docs" / "compare.md").read_text()
    [values] = [load_yaml(t) for t in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "two-pass" in t]
    arms = {name: arm | {"learning_rates": [1e-2]} for name, arm in values["arms"].items() if name != "lora"}
    file = study_file(world, tmp_path / "s", arms=arms, seeds=[0], reference="adalora", budgets=[2])
    grid = Grid(load_study(str(file)), file.parent / "out", world, lambda recipe: 13 * 32, str(file))
    ledger = Ledger(grid, [])
    for _ in range(2):
        [one] = ledger.pending()
        sources = ledger.sources(one)
        assert sources is not None
        folder = grid.out / "runs" / one.id
        run(grid.placed(one, sources), folder, Console(quiet=True))
        ledger.add(finished_record(one, grid.digest(one, sources), folder, 1.0))
    first, second = ledger.records.values()
    found = json.loads((grid.out / "runs" / second["id"] / "adapter" / "adapter_config.json").read_text())
    ranks = {name: rank for name, rank in first["ranks"].items() if rank}
    assert {name: found["rank_pattern"].get(f"^{name}", found["r"]) for name in ranks} == ranks
    assert len(found["target_modules"]) == len(ranks)


# the command


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def call(*arguments: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["adalora", "compare", *map(str, arguments)])
        capsys.readouterr()
        assert cli.run_app() == code
        screen = capsys.readouterr()
        return " ".join(screen.err.split()) if code else screen.out

    return call


def test_the_command_leaves_table_summary_and_plots(
    world: Path, tmp_path: Path, stand_in: None, shell: Callable[..., str]
) -> None:
    file, out = study_file(world, tmp_path / "s"), tmp_path / "study"
    dry = shell(file, "--out", out, "--data", world, "--dry-run")
    assert "1 tasks × 1 budgets × 2 arms × 3 learning rates × 2 seeds" in dry
    assert "0 runs done, 12 to do" in dry and "about 144 steps" in dry and not out.exists()
    text = shell(file, "--out", out, "--data", world, "--workers", 2)
    assert (out / "table.md").read_text().strip() in text
    summary = json.loads((out / "summary.json").read_text())
    (difference,) = summary["differences"]
    assert difference["mean"] == pytest.approx(5.0)  # .9 at its best rate, against a twentieth less at 1e-1
    assert difference["interval"] == pytest.approx([5.0, 5.0]) and difference["verdict"] == "better"
    assert "| lora | 83.95 ± 0.07 | 83.95 |" in text and "| adalora | +5.00 (p < .001) |" in text
    assert "| 1 | lora | 0.1 ↑ |" in text and "| 1 | adalora | 0.003 |" in text
    (agreement,) = summary["agreement"]
    assert agreement["overlap"] == pytest.approx(3 / 4) and agreement["arm"] == "adalora"
    for plot in ("differences.png", "scores.png", "ranks.png"):
        assert (out / plot).read_bytes().startswith(b"\x89PNG")
        (out / plot).unlink()
    assert shell(file, "--out", out, "--table") == text[text.index("# ") :]
    assert (out / "differences.png").exists()
    assert "about 0 s" in shell(file, "--out", out, "--data", world, "--dry-run")


def test_a_table_of_half_a_study_says_how_much_it_has(
    world: Path, tmp_path: Path, stand_in: None, shell: Callable[..., str]
) -> None:
    file, out = study_file(world, tmp_path / "s"), tmp_path / "study"
    text = shell(file, "--out", out, "--data", world, "--only", "seed=0")
    assert "6 of 12 runs done" in text
    assert "| lora | 78.00 (1) * |" not in text and "(1) *" in text and "one seed: none" in text
    assert "–" in shell(file, "--out", tmp_path / "nothing", "--data", world, "--table")


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["first-cut"], "'first-cut' is a study; say with --out"),
        (["first-cutt", "--out", "x"], "--out, --only and the like are for a study"),
        (["first-cutt"], "or a study; did you mean 'first-cut'?"),
        (["FILE", "FILE"], "is a study; give it alone"),
        (["FILE", "--out", "OUT", "--only", "arm=x", "--dry-run"], "--only holds 'arm=x'"),
    ],
)
def test_a_mistake_on_the_command_line_is_told(
    arguments: list[str], message: str, world: Path, tmp_path: Path, shell: Callable[..., str]
) -> None:
    places = {"FILE": str(study_file(world, tmp_path / "s")), "OUT": str(tmp_path / "out")}
    assert message in shell(*(places.get(a, a) for a in arguments), "--data", world, code=2)


# the same start and the same rows for all arms


def start_and_order(
    world: Path, out: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, torch.Tensor], list[list[list[int]]]]:
    """The head before the first step, and the token ids of each batch."""
    from transformers import Trainer

    head: dict[str, torch.Tensor] = {}
    batches: list[list[list[int]]] = []
    original = Trainer.training_step

    def watch(self: Any, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        if not head:
            for name, value in model.named_parameters():
                if "classifier" in name and "original" not in name:
                    head[name.split("classifier")[-1].rpartition(".")[2]] = value.detach().clone()
        batches.append(inputs["input_ids"].tolist())
        return original(self, model, inputs, *rest, **more)

    monkeypatch.setattr(Trainer, "training_step", watch)
    monkeypatch.chdir(world)
    settings = ["training.save_strategy='no'", "training.eval_strategy='no'", f"method={method}"]
    run(load_recipe("tiny.yaml", settings, seed=3), out, Console(quiet=True))
    monkeypatch.setattr(Trainer, "training_step", original)
    return head, batches


def test_arms_share_head_and_order_of_rows_also_where_a_method_draws_random_numbers(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = (
        "{name: lora, r: 2, exclude_modules: [pooler.dense]}",
        "{name: adalora, init_r: 4, target_r: 2, exclude_modules: [pooler.dense]}",
        "{name: lora, r: 2, lora_dropout: 0.2, exclude_modules: [pooler.dense]}",  # draws in every step
    )
    found = [start_and_order(world, tmp_path / str(i), text, monkeypatch) for i, text in enumerate(methods)]
    for head, batches in found[1:]:
        assert head.keys() == found[0][0].keys() == {"weight", "bias"}
        assert all(torch.equal(head[key], found[0][0][key]) for key in head)
        assert batches == found[0][1] and len(batches) == 2 * 6
    assert found[0][1][:6] != found[0][1][6:]  # each epoch has an order of its own


# killed


def test_a_killed_study_goes_on_and_ends_as_one_that_was_not(world: Path, tmp_path: Path) -> None:
    arms = {"lora": {"method": {"name": "lora", "r": "$r"}, "learning_rates": [1e-2]}}
    file = study_file(world, tmp_path / "killed", arms=arms, seeds=[0, 1, 2])
    killed, whole = (
        make_grid(world, file),
        make_grid(world, study_file(world, tmp_path / "whole", arms=arms, seeds=[0, 1, 2])),
    )
    command = [sys.executable, "-m", "adalora", "compare", str(file), "--out", str(killed.out), "--data", str(world)]
    with subprocess.Popen([*command, "--workers", "2"], stdout=subprocess.DEVNULL) as process:
        limit = time.monotonic() + 300
        while not (killed.out / RESULTS).exists() or not ids(killed):
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    done = ids(killed)
    assert 1 <= len(done) < 3
    limit = time.monotonic() + 30
    while any(_reads(file, str(killed.out)) for file in Path("/proc").glob("[0-9]*/cmdline")):
        assert time.monotonic() < limit, "its runs did not die with it"
        time.sleep(0.05)
    do(killed)
    do(whole)
    assert ids(killed)[: len(done)] == done and sorted(ids(killed)) == sorted(ids(whole)) and len(ids(killed)) == 3
    times = {"seconds", "wall_seconds"}
    records = [
        sorted(({k: v for k, v in r.items() if k not in times} for r in read_results(g.out)), key=str)
        for g in (killed, whole)
    ]
    assert records[0] == records[1]
    assert all(0.0 <= record["validation"] <= 1.0 for record in records[0])


def _reads(file: Path, text: str) -> bool:
    try:
        return text in file.read_text(errors="replace")
    except OSError:
        return False


def test_the_runner_passes_the_environment_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    assert environment(0, 1)["PYTHONPATH"] == "somewhere" and os.environ["PATH"] == environment(0, 1)["PATH"]
