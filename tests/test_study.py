"""A study's file, grid, choice of learning rates and results, without training."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from adalora.errors import AdaLoraError, AdapterFileError, ConfigError
from adalora.study.choice import choose, extension
from adalora.study.design import Study, load_study, study_names
from adalora.study.grid import Cell, Grid, Run, check_arms, digest_of
from adalora.study.ledger import Ledger, parse_only
from adalora.study.outcome import final_ranks, tidy
from adalora.study.rankmaps import rank_grid, save_ranks, uneven
from adalora.study.results import RESULTS, append, keep_only, read_results, sole_runner
from adalora.study.statistics import smallest_sufficient
from adalora.study.summary import summarize
from adalora.study.tables import table
from adalora.train import check
from adalora.yamlfiles import load_yaml

UNIT = 1000  # sum of (in + out) of the made-up model
GRID = [1e-3, 3e-3, 1e-2]
LORA = {"method": {"name": "lora", "r": "$r"}, "learning_rates": GRID}
ADALORA = {"method": {"name": "adalora", "init_r": "$1.5r", "target_r": "$r"}, "learning_rates": GRID}
DESIGN: dict[str, Any] = {
    "seeds": [0, 1, 2],
    "budgets": [1, 2],
    "reference": "lora",
    "tasks": {"trec": {"recipe": "trec", "set": {"training.num_train_epochs": 3}}, "stsb": {"recipe": "stsb"}},
    "arms": {"lora": LORA, "adalora": ADALORA},
}


def changed(**sections: Any) -> dict[str, Any]:
    return DESIGN | sections


def grid_of(values: dict[str, Any], out: Path = Path("out")) -> Grid:
    return Grid(Study.model_validate(values), out, Path("data"), lambda recipe: UNIT, "study.yaml")


def record(
    run: Run, validation: float | None, test: float = 0.5, grid: Grid | None = None, **more: Any
) -> dict[str, Any]:
    """A line as the runner writes it; failed without a validation score."""
    cell, ledger = run.cell, Ledger(grid or grid_of(DESIGN), [])
    sources = ledger.sources(run) or {}
    return {
        "id": run.id,
        "digest": ledger.grid.digest(run, sources),
        "task": cell.task,
        "arm": cell.arm,
        "budget": cell.budget,
        "learning_rate": run.rate,
        "seed": run.seed,
        "status": "failed" if validation is None else "finished",
        "error": "it broke",
        "metric": "accuracy",
        "validation": validation,
        "test": test,
        "parameters": {"peak": 3, "final": 2, "head": 1},
        "steps": 10,
        "seconds": 1.0,
        "wall_seconds": 2.0,
        "ranks": None,
        **more,
    }


# the file


@pytest.mark.parametrize(
    "values,message",
    [
        (changed(seed=[0]), "there is no key 'seed'; did you mean 'seeds'?"),
        (changed(tasks={"trec": {"recipe": "trec", "sets": {}}}), "'tasks.trec.sets'; did you mean 'set'?"),
        (
            changed(arms={"lora": {**LORA, "learning_rate": 1}}),
            "arms.lora.learning_rate'; did you mean 'learning_rates'?",
        ),
        ({key: value for key, value in DESIGN.items() if key != "arms"}, "arms is missing, e.g. arms: {lora:"),
        (changed(reference="loar"), "reference is 'loar', which is no arm; did you mean 'lora'?"),
        (changed(seeds=[0, 0]), "seeds holds a value twice: [0, 0]"),
        (changed(seeds=[]), "seeds is []"),
        (changed(budgets=[0]), "budgets.0 is 0: input should be greater than 0"),
        (changed(arms={"lora": LORA, "two": {**ADALORA, "learning_rates": [1e-3, 1e-2]}}), "they have lora 3, two 2"),
        (changed(arms={"lora": {**LORA, "learning_rates": [-1.0]}}), "arms.lora.learning_rates.0 is -1.0"),
        (changed(rate_seeds=[0, 7]), "rate_seeds holds [7], which seeds does not"),
        (changed(tasks={"a/b": {"recipe": "trec"}}), "tasks.a/b cannot be part of a folder's name"),
    ],
)
def test_a_mistake_in_the_file_is_told_with_file_and_key_path(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(ConfigError) as caught:
        load_study(str(file))
    assert message in str(caught.value) and str(file) in str(caught.value)


@pytest.mark.parametrize(
    "arm,message",
    [
        ({"name": "lora", "r": "$R"}, "arms.lora.method.r is '$R'; what begins with $ must be $r (the budget)"),
        ({"name": "lora", "rank": "$r"}, "method lora has no option 'rank'"),
        ({"name": "loar"}, "method.name is 'loar'; did you mean 'lora'?"),
    ],
)
def test_a_mistake_in_an_arm_is_told_with_its_name(arm: dict[str, Any], message: str) -> None:
    grid = grid_of(changed(arms={"lora": {**LORA, "method": arm}}))
    with pytest.raises(ConfigError) as caught:
        grid.placed(grid.first(grid.cells[0]), {})
    assert message in str(caught.value) and "study.yaml: tasks.trec, arms.lora" in str(caught.value)


def test_a_setting_that_does_not_exist_and_a_metric_without_points_are_refused() -> None:
    for task, message in (
        ({"recipe": "trec", "set": {"data.trian": "x"}}, "did you mean 'train'"),
        ({"recipe": "alpaca"}, "the metric is 'loss'"),
    ):
        grid = grid_of(changed(tasks={"trec": task}))
        with pytest.raises(ConfigError, match=message):
            grid.placed(grid.first(grid.cells[0]), {})


@pytest.mark.parametrize("name", study_names())
def test_built_in_studies_have_recipes_and_arms_that_hold(name: str) -> None:
    study = load_study(name)
    check_arms(study, name)
    grid = Grid(study, Path("out"), Path("data"), lambda recipe: UNIT, name)
    assert {"docstrings", "trec", "sst2", "banking77", "stsb"} == set(study.tasks)
    for cell in grid.cells:
        recipe = grid.placed(grid.first(cell), {})
        assert recipe.training["save_strategy"] == recipe.training["eval_strategy"] == "no"
        assert recipe.data.validation is None or recipe.data.validation != recipe.data.test


# the grid


def test_dollar_r_and_its_kind_are_the_budget_its_multiples_and_its_size() -> None:
    method = {"name": "lora", "r": "$r", "lora_alpha": "$1.5r", "parameters": "$B"}
    grid = grid_of(changed(budgets=[1, 2, 3], arms={"lora": {**LORA, "method": method}}))
    found = [grid.placed(grid.first(Cell("trec", "lora", budget)), {}).method for budget in (1, 2, 3)]
    assert [m["r"] for m in found] == [1, 2, 3]
    assert [m["lora_alpha"] for m in found] == [2, 3, 5]  # 1.5, 3 and 4.5, rounded up
    assert [m["parameters"] for m in found] == [UNIT, 2 * UNIT, 3 * UNIT]


def test_all_arms_adapt_the_matrices_that_the_task_names() -> None:
    grid = grid_of(changed(arms={**DESIGN["arms"], "bias": {"method": {"name": "bitfit"}, "learning_rates": GRID}}))
    methods = {cell.arm: grid.placed(grid.first(cell), {}).method for cell in grid.cells}
    assert methods["lora"]["exclude_modules"] == methods["adalora"]["exclude_modules"] == r".*pooler\.dense"
    assert methods["bias"] == {"name": "bitfit"}


def test_a_run_has_the_same_digest_wherever_its_files_are_and_another_one_for_other_settings() -> None:
    run = Run(Cell("trec", "lora", 1), 1e-3, 0)
    one = grid_of(DESIGN)
    other = Grid(one.study, Path("elsewhere"), Path("/mnt"), lambda recipe: UNIT, "other.yaml")
    longer = grid_of(changed(tasks={"trec": {"recipe": "trec", "set": {"training.num_train_epochs": 4}}}))
    assert one.digest(run, {}) == other.digest(run, {}) != longer.digest(run, {})
    assert other.placed(run, {}).data.train == "/mnt/trec/train.jsonl.gz"


# the choice


def finished(means: dict[float, float], seeds: tuple[int, ...] = (0, 1, 2)) -> dict[float, dict[int, float | None]]:
    return {rate: {seed: value + 0.1 * (seed - 1) for seed in seeds} for rate, value in means.items()}


def test_a_digest_outlives_new_keys_that_are_left_open() -> None:
    old = {"task": "classification", "model": {"name": "m"}, "method": {"name": "adalora", "lora_alpha": None}}
    new = {**old, "model": {"name": "m", "dtype": None}, "metric": None}
    assert digest_of(old) == digest_of(new)
    assert digest_of(old) != digest_of({**old, "model": {"name": "m", "dtype": "bf16"}})
    assert digest_of(old) != digest_of({**old, "method": {"name": "adalora"}})  # its default may be another


def test_an_interior_best_is_taken_at_once() -> None:
    choice = choose(GRID, finished({1e-3: 80, 3e-3: 90, 1e-2: 85}), [0, 1, 2], 2)
    assert (choice.rate, choice.settled, choice.edge) == (3e-3, True, None)
    assert choice.wanted == (1e-3, 3e-3, 1e-2) and choice.means[3e-3] == pytest.approx(90)


def test_a_best_at_the_edge_extends_the_grid_until_it_is_interior() -> None:
    scores = finished({1e-3: 80, 3e-3: 85, 1e-2: 90})
    assert choose(GRID, scores, [0, 1, 2], 2).wanted == (1e-3, 3e-3, 1e-2, 3e-2)
    assert not choose(GRID, scores, [0, 1, 2], 2).settled
    scores |= finished({3e-2: 70})
    done = choose(GRID, scores, [0, 1, 2], 2)
    assert (done.rate, done.settled, done.edge) == (1e-2, True, None)


def test_extension_ends_at_its_bound_and_flags_the_edge() -> None:
    scores = finished({1e-3: 90, 3e-3: 85, 1e-2: 80, 3e-4: 91, 1e-4: 92})
    choice = choose(GRID, scores, [0, 1, 2], 2)
    assert (choice.rate, choice.settled, choice.edge) == (1e-4, True, "low")
    assert choose(GRID, finished({1e-3: 90, 3e-3: 85, 1e-2: 80}), [0, 1, 2], 0).edge == "low"


def test_extended_rates_continue_the_grid_by_its_ratio() -> None:
    assert [extension(GRID, steps) for steps in (1, 2, -1, -2)] == [3e-2, 1e-1, 3e-4, 1e-4]
    assert extension([1e-3, 1.5e-3], 1) == 2.2e-3 or extension([1e-3, 1.5e-3], 1) == 2.3e-3


def test_a_rate_with_a_failed_run_is_never_chosen() -> None:
    scores = finished({1e-3: 80, 3e-3: 90, 1e-2: 85})
    scores[3e-3][1] = None
    assert choose(GRID, scores, [0, 1, 2], 0).rate == 1e-2
    every = {rate: {0: None, 1: 1.0, 2: 1.0} for rate in GRID}
    assert choose(GRID, every, [0, 1, 2], 2).rate is None


def test_while_seeds_are_missing_the_rate_is_chosen_by_those_that_all_rates_have() -> None:
    scores = finished({1e-3: 80, 3e-3: 90, 1e-2: 85}, seeds=(0,))
    scores[1e-3][1] = 99.0  # no other rate has this seed yet
    choice = choose(GRID, scores, [0, 1, 2], 2)
    assert (choice.rate, choice.settled) == (3e-3, False)
    assert choose(GRID, {}, [0, 1, 2], 2).rate is None


@pytest.mark.slow
def test_shuffled_test_scores_change_no_choice() -> None:
    grid, shuffle = grid_of(DESIGN), random.Random(0)
    runs = [Run(cell, rate, seed) for cell in grid.cells for rate in GRID for seed in (0, 1, 2)]
    records = [record(run, shuffle.random(), shuffle.random(), grid) for run in runs]
    tests = [r["test"] for r in records]
    shuffle.shuffle(tests)
    others = [r | {"test": test} for r, test in zip(records, tests, strict=True)]
    before, after = Ledger(grid, records), Ledger(grid, others)
    assert [before.choice(cell) for cell in grid.cells] == [after.choice(cell) for cell in grid.cells]
    assert [run.id for run in before.missing()] == [run.id for run in after.missing()]
    assert summarize(before)["differences"] != summarize(after)["differences"]


def documented() -> list[dict[str, Any]]:
    """The studies in docs/compare.md."""
    text = (Path(__file__).parent.parent / "docs" / "compare.md").read_text()
    return [load_yaml(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]


@pytest.mark.parametrize("values", documented(), ids=lambda values: "-".join(values["arms"]))
def test_the_documented_studies_hold(values: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    study = load_study(str(file))
    check_arms(study, "study.yaml")
    grid = Grid(study, tmp_path / "out", tmp_path, lambda recipe: 100_000, "study.yaml")
    for cell in grid.cells:
        check(grid.placed(grid.first(cell), {}), tmp_path / "out")


def test_three_studies_are_two_passes_squeezing_and_a_budget_of_itself() -> None:
    arms = [set(values["arms"]) for values in documented()]
    assert arms[1:] == [{"lora", "adalora", "two-pass"}, {"lora", "squeezed"}, {"adalora"}]
    assert len(documented()[-1]["budgets"]) > 1


# the automatic budget


def test_the_smallest_budget_within_one_standard_error_of_the_best_is_chosen() -> None:
    best = [80.0, 82.0, 84.0]  # 82 ± 1.155
    assert smallest_sufficient({1: [80.8, 80.8, 80.9], 2: [80.9, 80.9, 80.9], 4: best}) == 2  # 80.83 is too little
    assert smallest_sufficient({1: [79.0, 81.0, 82.0], 2: [81.0, 82.0, 80.5], 4: best}) == 2
    assert smallest_sufficient({1: best, 2: [79.0, 79.0, 79.0], 4: best}) == 1  # of equal ones, too
    assert smallest_sufficient({4: [70.0, 70.0], 1: [70.0, 70.0], 2: [69.0, 69.9]}) == 1  # no error at all
    assert smallest_sufficient({2: [70.0, 71.0]}) == 2
    assert smallest_sufficient({1: [90.0], 2: best}) is None and smallest_sufficient({}) is None


@pytest.mark.slow
def test_the_automatic_budget_is_by_validation_scores_and_needs_all_tasks_of_a_seed() -> None:
    grid = grid_of(DESIGN)

    def records(arm: str, low: list[float], high: list[float]) -> list[dict[str, Any]]:
        return [
            record(Run(Cell(task, arm, budget), rate, seed), scores[seed] - 0.1 * (rate != 3e-3), 0.9 / budget, grid)
            for budget, scores in ((1.0, low), (2.0, high))
            for task in DESIGN["tasks"]
            for rate in GRID
            for seed in range(len(scores))
        ]

    done = records("lora", [0.70, 0.71, 0.72], [0.70, 0.72, 0.74]) + records("adalora", [0.60] * 3, [0.70, 0.71, 0.72])
    lora, adalora = summarize(Ledger(grid, done))["sufficient"]
    # Test scores would choose 1 both times.
    assert (lora["budget"], adalora["budget"]) == (1, 2)
    assert lora["test"] == pytest.approx(90.0) and adalora["test"] == pytest.approx(45.0)
    assert lora["budgets"][1]["mean"] == pytest.approx(72.0)
    assert lora["budgets"][1]["error"] == pytest.approx(2 / 3**0.5)
    text = table(summarize(Ledger(grid, done)))
    assert "## Automatic budget" in text and "| lora | 71.00 ± 0.58 | 72.00 ± 1.15 | 1 | 90.00 |" in text
    half = [r for r in done if not (r["arm"] == "lora" and r["task"] == "stsb" and r["seed"] > 0)]
    lora, _ = summarize(Ledger(grid, half))["sufficient"]
    assert lora["budget"] is None and lora["budgets"][0]["seeds"] == 1
    one = grid_of(DESIGN | {"budgets": [1]})
    assert "Automatic budget" not in table(summarize(Ledger(one, [])))


# what is to be done


def test_pending_runs_go_through_all_arms_before_the_second_seed() -> None:
    grid = grid_of(DESIGN)
    runs = Ledger(grid, []).pending()
    assert len(runs) == 2 * 2 * 2 * 3 * 3
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert [run.cell.arm for run in runs[:2]] == ["lora", "adalora"]
    assert len(Ledger(grid, [record(runs[0], 0.9, grid=grid)]).pending()) == len(runs) - 1


def test_seeds_that_do_not_choose_the_rate_run_with_the_chosen_one_alone() -> None:
    grid = grid_of(changed(rate_seeds=[0]))
    cell = grid.cells[0]
    scores = {rate: {0: score} for rate, score in zip(GRID, (0.8, 0.9, 0.7), strict=True)}
    records = [record(Run(cell, rate, 0), found[0], grid=grid) for rate, found in scores.items()]
    assert {run.seed for run in Ledger(grid, []).wanted(cell)} == {0}
    assert {run.seed for run in Ledger(grid, records[:2]).wanted(cell)} == {0}
    ledger = Ledger(grid, records)
    assert ledger.choice(cell).settled
    left = [run for run in ledger.missing() if run.cell == cell]
    assert [(run.rate, run.seed) for run in left] == [(GRID[1], 1), (GRID[1], 2)]
    better = Ledger(grid, [*records, record(Run(cell, GRID[0], 1), 0.99, grid=grid)])  # which counts for nothing
    assert better.choice(cell).rate == GRID[1]


def test_only_limits_the_runs_and_says_what_there_is() -> None:
    grid = grid_of(DESIGN)
    runs = Ledger(grid, []).pending(parse_only("task=trec, arm=lora,budget=1,seed=0,seed=2", grid))
    assert len(runs) == 3 * 2
    assert {(r.cell.task, r.cell.arm, r.cell.budget) for r in runs} == {("trec", "lora", 1)}
    with pytest.raises(ConfigError, match=r"'task=cola'; study.yaml has task=trec\|stsb"):
        parse_only("task=cola", grid)


def test_an_arm_that_starts_from_another_waits_for_its_choice_and_takes_the_run_of_its_seed() -> None:
    found = {"method": {"name": "static-lora", "pattern": "$run:adalora", "permute": "$seed"}, "learning_rates": GRID}
    grid = grid_of(changed(tasks={"trec": {"recipe": "trec"}}, budgets=[1], arms={**DESIGN["arms"], "found": found}))
    assert {run.cell.arm for run in Ledger(grid, []).pending()} == {"lora", "adalora"}
    source, cell = Cell("trec", "adalora", 1), Cell("trec", "found", 1)
    scores = {1e-3: 0.8, 3e-3: 0.9, 1e-2: 0.7}
    records = [
        record(Run(source, rate, seed), value, grid=grid) for rate, value in scores.items() for seed in (0, 1, 2)
    ]
    ledger = Ledger(grid, records)
    run = next(run for run in ledger.pending() if run.cell == cell and run.seed == 2)
    method = grid.placed(run, ledger.sources(run) or {}).method
    assert method["pattern"] == str(Path("out/runs/trec-adalora-b1-lr0.003-s2").absolute()) and method["permute"] == 2
    with pytest.raises(ConfigError, match="must stand in front"):
        check_arms(Study.model_validate(changed(arms={"found": found, **DESIGN["arms"]})), "study.yaml")


def test_a_result_of_other_settings_is_refused() -> None:
    grid = grid_of(DESIGN)
    stale = record(grid.first(grid.cells[0]), 0.9, grid=grid) | {"digest": "0"}
    with pytest.raises(ConfigError, match=r"trec-lora-b1-lr0.001-s0 in 'out' was trained with other settings"):
        Ledger(grid, [stale])


# results.jsonl


def test_a_torn_last_line_is_left_out_and_a_broken_one_is_told(tmp_path: Path) -> None:
    for name in ("a", "b"):
        append(tmp_path, {"id": name, "status": "finished"})
    with (tmp_path / RESULTS).open("a") as file:
        file.write('{"id": "c", "sta')
    assert [r["id"] for r in read_results(tmp_path)] == ["a", "b"]
    keep_only(tmp_path, read_results(tmp_path))
    append(tmp_path, {"id": "c", "status": "finished"})
    assert [json.loads(line)["id"] for line in (tmp_path / RESULTS).read_text().splitlines()] == ["a", "b", "c"]
    (tmp_path / RESULTS).write_text('{"id": "a"}\n')
    with pytest.raises(AdapterFileError, match="line 1, is no result of a run"):
        read_results(tmp_path)


def test_a_second_runner_is_refused_and_the_lock_is_free_afterwards(tmp_path: Path) -> None:
    import os

    with (
        sole_runner(tmp_path / "study"),
        pytest.raises(ConfigError, match=f"is being run by process {os.getpid()}"),
        sole_runner(tmp_path / "study"),
    ):
        pass
    with sole_runner(tmp_path / "study"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(AdaLoraError, match="cannot be a study's folder"), sole_runner(tmp_path / "file"):
        pass


# ranks of a finished run


def test_ranks_come_from_the_last_allocation_from_masks_or_from_shapes(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    assert final_ranks(tmp_path) is None
    front = "base_model.model.encoder"
    (adapter / "adapter_config.json").write_text('{"rank_pattern": {}}')
    for rank, found in ((2, None), (1, {"encoder.q": 2, "encoder.k": 1})):  # None: all are one
        tensors = {f"{front}.{name}.lora_A.weight": torch.zeros(r, 3) for name, r in (("q", 2), ("k", rank))}
        save_file(tensors, adapter / "adapter_model.safetensors")
        assert final_ranks(tmp_path) == found
    masks = {f"{front}.q.lora_E": [True, False, True], f"{front}.k.lora_E": [False, False, False]}
    (adapter / "adapter_config.json").write_text(json.dumps({"rank_pattern": masks}))
    assert final_ranks(tmp_path) == {"encoder.q": 2, "encoder.k": 0}
    lines = [{"step": step, "ranks": {"encoder.q": rank}} for step, rank in ((1, 3), (2, 1))]
    (tmp_path / "ranks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert final_ranks(tmp_path) == {"encoder.q": 1}


def test_a_folder_is_left_with_records_and_a_small_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    for name in ("result.json", "report.html", "recipe.yaml", "adapter/tokenizer.json", "adapter/adapter_config.json"):
        (tmp_path / name).write_text("{}")
    with (tmp_path / "adapter" / "model.safetensors").open("wb") as file:
        file.truncate(4_000_001)
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"small")
    tidy(tmp_path)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"result.json", "recipe.yaml", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"}


def test_rank_maps_have_a_cell_for_each_matrix_and_only_uneven_ones_are_drawn(tmp_path: Path) -> None:
    ranks = {"bert.layer.0.q": 1.0, "bert.layer.0.k": 0.0, "bert.layer.1.q": 2.5, "pooler": 0.5}
    kinds, layers, grid = rank_grid(ranks)
    assert kinds == ["bert.layer.*.q", "bert.layer.*.k", "pooler"] and layers == [0, 1, None]
    assert grid == [[1.0, 2.5, None], [0.0, None, None], [None, None, 0.5]]
    cells = [
        {"budget": 1, "arm": arm, "task": "trec", "ranks": found}
        for arm, found in (("adalora", ranks), ("lora", dict.fromkeys(ranks, 1.0)), ("full", None))
    ]
    summary = {"cells": cells, "budgets": [1], "arms": ["lora", "adalora", "full"], "tasks": ["trec", "stsb"]}
    assert [cell["arm"] for cell in uneven(summary)] == ["adalora"]
    save_ranks(summary, tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


def test_ranks_of_a_cell_are_the_mean_over_its_seeds() -> None:
    grid = grid_of(DESIGN)
    run = Run(Cell("trec", "adalora", 1), GRID[0], 0)
    records = [
        record(Run(run.cell, rate, seed), 0.9 - rate, grid=grid) | {"ranks": {"q": seed, "k": 2}}
        for rate in GRID
        for seed in (0, 1, 2)
    ]
    cell = next(c for c in summarize(Ledger(grid, records))["cells"] if (c["task"], c["arm"]) == ("trec", "adalora"))
    assert cell["ranks"] == {"q": 1.0, "k": 2.0}
