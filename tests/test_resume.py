"""A run that was stopped or killed goes on to the very result of one that was not; the best checkpoint is in budget."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

from adalora.claiming import locked
from adalora.errors import AdaLoraError, ConfigError
from adalora.integrations.best import BestWithinBudget
from adalora.recipe import load_recipe
from adalora.records import RunRecorder
from adalora.result import RunResult
from adalora.train import run
from folders import rows, save_bert, write

# The fixture `whole` draws; that the pictures of other runs can be drawn is no matter of resuming.
pytestmark = pytest.mark.usefixtures("undrawn")

LORA = "method={name: lora, r: 2, exclude_modules: [pooler.dense]}"
# 24 steps of 3 epochs: warm-up of 2, final phase of 10; a checkpoint every 5, so within epochs of 8 steps.
TRAINING = {
    "per_device_train_batch_size": 8,
    "logging_steps": 2,
    "save_strategy": "steps",
    "save_steps": 5,
    "save_total_limit": 2,
    "learning_rate": 1e-2,
}
ADAPTER = Path("adapter") / "adapter_model.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_bert(folder / "bert")
    items = [row | {"text": f"{row['text']} {'old ' * (index % 7)}".strip()} for index, row in enumerate(rows(64))]
    write(folder / "train.jsonl", items)  # of many lengths, so that grouping by length has an order of its own
    write(folder / "dev.jsonl", rows(16, seed=1))
    return folder


def train(
    world: Path, out: Path, *more: str, resume: bool = False, lines: list[str] | None = None, **own: Any
) -> RunResult:
    files = [f"data.{name}={world / file}" for name, file in (("train", "train.jsonl"), ("validation", "dev.jsonl"))]
    settings = [f"model.name_or_path={world / 'bert'}", *files, f"training={json.dumps(TRAINING | own)}", *more]
    with (out.parent / "screen.txt").open("w") as screen:
        try:
            return run(load_recipe("text-classification", settings), out, Console(file=screen, soft_wrap=True), resume)
        finally:
            screen.flush()
            if lines is not None:
                lines += (out.parent / "screen.txt").read_text().splitlines()


def at_step(step: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """`act` when `step` is over and logged."""
    original = RunRecorder.on_step_begin

    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        if state.global_step == step:
            act()

    monkeypatch.setattr(RunRecorder, "on_step_begin", on_step_begin)


class Killed(BaseException):
    pass


def kill() -> None:
    raise Killed


def killed(world: Path, out: Path, step: int, monkeypatch: pytest.MonkeyPatch, *more: str, **own: Any) -> None:
    """Leave `out` as a run leaves it that loses its machine behind `step`."""
    with monkeypatch.context() as patch:
        at_step(step, kill, patch)
        with pytest.raises(Killed):
            train(world, out, *more, **own)
    (out / "FAILED.txt").unlink()  # there was no time for it


def read(file: Path) -> list[dict[str, Any]]:
    timing = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")
    timing += ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in timing} for record in found]


def assert_same_run(one: Path, other: Path, forced_log: int | None = None) -> None:
    first, second = load_file(one / ADAPTER), load_file(other / ADAPTER)
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    metrics, again = read(one / "metrics.jsonl"), read(other / "metrics.jsonl")
    assert [r["step"] for r in again if r["step"] != forced_log] == [
        r["step"] for r in metrics if r["step"] != forced_log
    ]
    if forced_log is None:
        assert metrics == again
    if (one / "ranks.jsonl").exists():
        assert read(one / "ranks.jsonl") == read(other / "ranks.jsonl")
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    assert results[0]["scores"] == results[1]["scores"] and results[0]["complete"] and results[1]["complete"]


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(world, tmp_path_factory.mktemp("runs") / "whole").folder


@pytest.mark.parametrize(
    "step,last", [(13, 10), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((8, 5), (22, 20)))]
)
def test_a_killed_run_goes_on_bit_by_bit(
    step: int, last: int, world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(world, tmp_path / "run", step, monkeypatch)
    assert not (tmp_path / "run" / "adapter").exists()
    lines: list[str] = []
    train(world, tmp_path / "run", resume=True, lines=lines)
    assert f"  resuming from checkpoint-{last}" in lines
    assert_same_run(whole, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["resumed_from"] == last


@pytest.mark.slow
def test_lora_accumulated_steps_and_a_rate_of_the_head_go_on_bit_by_bit(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices: dict[str, Any] = {"gradient_accumulation_steps": 2, "save_steps": 3, "head_learning_rate": 2e-2}
    train(world, tmp_path / "whole", LORA, **choices)
    killed(world, tmp_path / "run", 8, monkeypatch, LORA, **choices)
    train(world, tmp_path / "run", LORA, resume=True, **choices)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["", LORA])
def test_a_flipped_bit_in_the_weights_sends_a_run_back_to_the_checkpoint_before(
    method: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [method] if method else []
    choices: dict[str, Any] = {"save_steps": 3, "save_total_limit": 3}
    train(world, tmp_path / "whole", *more, **choices)
    killed(world, tmp_path / "run", 8, monkeypatch, *more, **choices)
    (weights,) = (tmp_path / "run" / "checkpoints" / "checkpoint-6").glob(
        "*adapter_model.safetensors" if method else "model.safetensors"
    )
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1  # a number among others: nothing but a checksum would tell
    weights.write_bytes(content)
    lines: list[str] = []
    train(world, tmp_path / "run", *more, resume=True, lines=lines, **choices)
    assert f"  checkpoint-6 is incomplete ({weights.name} is damaged: its checksum differs); it is removed" in lines
    assert "  resuming from checkpoint-3" in lines
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_run_killed_between_a_checkpoint_and_its_epochs_evaluation_has_the_evaluation(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_epoch_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 16:
            kill()
        original(self, args, state, control, **kwargs)

    original = RunRecorder.on_epoch_end
    with monkeypatch.context() as patch:
        patch.setattr(RunRecorder, "on_epoch_end", on_epoch_end)
        with pytest.raises(Killed):
            train(world, tmp_path / "run", save_steps=8)
    (tmp_path / "run" / "FAILED.txt").unlink()
    lines: list[str] = []
    train(world, tmp_path / "run", resume=True, lines=lines, save_steps=8)
    assert "  resuming from checkpoint-16" in lines
    evaluations = [line["step"] for line in read(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in line]
    assert evaluations == [8, 16, 24]
    train(world, tmp_path / "whole", save_steps=8)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_a_run_that_started_from_data_goes_on_bit_by_bit_without_starting_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    train(world, tmp_path / "whole", "method.init_lora_weights=gradient", lines=lines)
    assert "  start      directions from the gradients of 64 rows, in 4 passes before the first step" in lines
    killed(world, tmp_path / "run", 13, monkeypatch, "method.init_lora_weights=gradient")
    train(world, tmp_path / "run", "method.init_lora_weights=gradient", resume=True, lines=(again := []))
    assert not [line for line in again if "start  " in line]
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_a_run_from_before_adapters_were_left_undecayed_says_how_to_go_on(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(world, tmp_path / "run", 8, monkeypatch, weight_decay=0.1, decay_adapter=True)
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("  decay_adapter: true\n", ""))
    with pytest.raises(ConfigError, match=r"training\.decay_adapter is False, .* began with True"):
        train(world, tmp_path / "run", resume=True, weight_decay=0.1)
    assert train(world, tmp_path / "run", resume=True, weight_decay=0.1, decay_adapter=True).steps == 24


@pytest.mark.slow
def test_a_checkpoint_at_the_end_of_an_epoch_is_as_good(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(world, tmp_path / "whole", save_strategy="epoch")
    killed(world, tmp_path / "run", 12, monkeypatch, save_strategy="epoch")
    train(world, tmp_path / "run", resume=True, save_strategy="epoch")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_a_run_can_lose_its_machine_twice(
    world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(world, tmp_path / "run", 7, monkeypatch)
    with monkeypatch.context() as patch:
        at_step(14, kill, patch)
        with pytest.raises(Killed):
            train(world, tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / "FAILED.txt").exists()  # with which another run would replace the folder
    train(world, tmp_path / "run", resume=True)
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_a_run_that_a_signal_stopped_goes_on_from_that_very_step(
    number: signal.Signals, world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        at_step(10, lambda: signal.raise_signal(number), patch)
        stopped = train(world, tmp_path / "run")
    assert stopped.steps == 11 and stopped.report is not None and stopped.report.total_rank == 48
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert not record["complete"] and record["stopped"] in ("interrupted", "terminated")
    assert read(tmp_path / "run" / "ranks.jsonl")[-1]["forced"]
    lines: list[str] = []
    train(world, tmp_path / "run", resume=True, lines=lines)
    assert "  resuming from checkpoint-11" in lines
    assert_same_run(whole, tmp_path / "run", forced_log=11)


@pytest.mark.slow
def test_a_time_limit_that_is_over_can_be_raised(world: Path, tmp_path: Path) -> None:
    whole = train(world, tmp_path / "whole", save_strategy="no")
    train(world, tmp_path / "run", "max_minutes=1e-9", save_strategy="no")
    again = train(world, tmp_path / "run", resume=True, save_strategy="no")
    assert again.steps == whole.steps == 24
    assert_same_run(tmp_path / "whole", tmp_path / "run", forced_log=1)


@pytest.mark.parametrize(
    "name,part",
    [("optimizer.pt", 0.7), ("model.safetensors", 0.5), ("trainer_state.json", 0.5), ("rng_state.pth", None)],
)
@pytest.mark.slow
def test_a_torn_checkpoint_is_passed_over_with_a_line(
    name: str, part: float | None, world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(world, tmp_path / "run", 13, monkeypatch)
    file = tmp_path / "run" / "checkpoints" / "checkpoint-10" / name
    content = file.read_bytes()
    file.unlink() if part is None else file.write_bytes(content[: int(len(content) * part)])
    lines: list[str] = []
    train(world, tmp_path / "run", resume=True, lines=lines)
    told = [line for line in lines if "checkpoint-10 is incomplete (" in line]
    assert len(told) == 1 and "  resuming from checkpoint-5" in lines
    assert part is not None or "rng_state.pth is missing" in told[0]
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_says_that_it_starts_again(
    world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(world, tmp_path / "run", 4, monkeypatch)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # torn, too
    lines: list[str] = []
    train(world, tmp_path / "run", resume=True, lines=lines)
    assert "  there is no complete checkpoint: the run starts again at its first step" in lines
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.slow
def test_a_run_that_failed_goes_on_once_the_reason_is_gone(
    world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        at_step(13, lambda: (_ for _ in ()).throw(OSError("no space left")), patch)
        with pytest.raises(AdaLoraError, match="no space left"):
            train(world, tmp_path / "run")
    assert (tmp_path / "run" / "FAILED.txt").exists()
    train(world, tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / "FAILED.txt").exists()
    assert_same_run(whole, tmp_path / "run")


def test_what_cannot_be_resumed_is_refused_and_left_alone(
    world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"there is no run in .* to resume; leave --resume out"):
        train(world, tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigError, match="is complete; there is nothing to resume"):
        train(world, whole, resume=True)
    killed(world, tmp_path / "run", 7, monkeypatch)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"training.learning_rate is 0.5, but the run in .* began with 0.01"):
        train(world, tmp_path / "run", resume=True, learning_rate=0.5)
    with pytest.raises(ConfigError, match=r"data.max_length is 64, but .* began with 128"):
        train(world, tmp_path / "run", "data.max_length=64", resume=True)
    with pytest.raises(ConfigError, match="is not empty"):
        train(world, tmp_path / "run")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_run_that_still_goes_on_cannot_be_resumed(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def look() -> None:
        with pytest.raises(ConfigError, match="still going on, in another process") as caught:
            train(world, tmp_path / "run", resume=True)
        seen.append(str(caught.value))

    at_step(3, look, monkeypatch)
    train(world, tmp_path / "run")
    assert len(seen) == 1


# --- the best checkpoint ---

BEST = {"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_total_limit": None}


def score_by_step(values: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have the evaluation of each step score what `values` says, else 0; returns the steps that were evaluated."""
    from adalora.tasks.classification import ClassificationTask

    steps: list[int] = []
    original = ClassificationTask.compute_metrics

    def compute(self: Any, prediction: Any) -> dict[str, float]:
        steps.append(2 * len(steps) + 2)
        return original(self, prediction) | {"accuracy": values.get(steps[-1], 0.0)}

    monkeypatch.setattr(ClassificationTask, "compute_metrics", compute)
    return steps


@pytest.mark.slow
def test_the_best_model_is_of_the_final_phase_however_good_an_earlier_one_was(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_by_step({4: 1.0, 12: 0.9, 18: 0.6, 22: 0.5}, monkeypatch)  # the final phase begins behind step 14
    result = train(world, tmp_path / "run", load_best_model_at_end=True, **BEST)
    state = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-24" / "trainer_state.json").read_text())
    assert (state["best_global_step"], state["best_metric"]) == (18, 0.6)
    assert result.report is not None and result.report.total_rank == 48
    best = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-18" / "adapter_model.safetensors")
    final = load_file(tmp_path / "run" / ADAPTER)
    assert all(torch.equal(best[key], final[key]) for key in final)
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["training"]
    assert (recipe["metric_for_best_model"], recipe["greater_is_better"]) == ("accuracy", True)


@pytest.mark.slow
def test_patience_counts_from_the_final_phase_on(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = score_by_step({2: 1.0, 16: 0.5}, monkeypatch)
    result = train(world, tmp_path / "run", early_stopping_patience=2, **BEST)
    assert steps == list(range(2, 24, 2)) and result.steps == 20  # the last is of the best model, at the end
    assert result.stopped == "accuracy was no better in 2 evaluations"
    assert result.report is not None and result.report.total_rank == 48
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["complete"] and record["stopped"] == result.stopped
    best = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-16" / "adapter_model.safetensors")
    final = load_file(tmp_path / "run" / ADAPTER)
    assert all(torch.equal(best[key], final[key]) for key in final)


@pytest.mark.slow
def test_a_resumed_run_takes_up_its_patience(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        score_by_step({16: 0.5}, patch)
        killed(world, tmp_path / "run", 19, patch, early_stopping_patience=2, **BEST)
    scores = {16: 0.5}
    with monkeypatch.context() as patch:
        steps = score_by_step(scores, patch)
        result = train(world, tmp_path / "run", resume=True, early_stopping_patience=2, **BEST)
    assert result.steps == 20 and len(steps) == 2  # one evaluation, the second without a gain, and the last one


@pytest.mark.slow
def test_a_stop_before_the_final_phase_returns_no_earlier_checkpoint(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_by_step({2: 1.0, 4: 0.9}, monkeypatch)
    at_step(5, lambda: signal.raise_signal(signal.SIGINT), monkeypatch)
    result = train(world, tmp_path / "run", load_best_model_at_end=True, **BEST)
    assert result.steps == 6 and result.report is not None and result.report.total_rank == 48
    state = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] is None or state["best_model_checkpoint"].endswith("-6")


@pytest.mark.slow
def test_lora_chooses_among_all_checkpoints(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score_by_step({4: 1.0, 18: 0.6}, monkeypatch)
    train(world, tmp_path / "run", LORA, load_best_model_at_end=True, **BEST)
    state = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-24" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 4


def test_a_metric_that_is_not_computed_is_refused_by_name(world: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'training.metric_for_best_model' is 'bleu', which .* loss, accuracy, macro"
    ):
        train(world, tmp_path / "run", load_best_model_at_end=True, metric_for_best_model="bleu", **BEST)


def test_the_callback_is_one_for_any_trainer() -> None:
    assert issubclass(BestWithinBudget, TrainerCallback)
    assert BestWithinBudget(None).source is None


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    child = os.fork()
    if child == 0:  # pragma: no cover
        with locked(tmp_path):
            os._exit(0)
    os.waitpid(child, 0)
    with locked(tmp_path):
        pass
    shutil.rmtree(tmp_path / "checkpoints")
