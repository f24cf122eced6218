"""The whole path on a small model from files: what a user gets, and what a user's mistakes get."""

import json
import signal
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

import adalora
from adalora.errors import AdaLoraError
from adalora.injection import named_adapters
from adalora.recipe import load_recipe
from adalora.train import RunResult, run
from folders import rows, save_bert, write

LORA = "method={name: lora, r: 2, exclude_modules: [pooler.dense]}"
FAST = ["training.per_device_train_batch_size=8", "training.logging_steps=2", "training.save_strategy='no'"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_bert(folder / "bert")
    write(folder / "train.jsonl", rows(64))
    write(folder / "dev.jsonl", rows(16, seed=1))
    return folder


def settings(world: Path, *more: str) -> list[str]:
    files = [f"data.{name}={world / file}" for name, file in (("train", "train.jsonl"), ("validation", "dev.jsonl"))]
    return [f"model.name_or_path={world / 'bert'}", *files, *FAST, *more]


def train(world: Path, out: Path, *more: str, lines: list[str] | None = None) -> RunResult:
    with (out.parent / "screen.txt").open("w") as screen:
        console = Console(file=screen, soft_wrap=True, highlight=False)
        result = run(load_recipe("text-classification", settings(world, *more)), out, console)
    if lines is not None:
        lines += (out.parent / "screen.txt").read_text().splitlines()
    return result


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, list[str]]:
    lines: list[str] = []
    out = tmp_path_factory.mktemp("runs") / "one"
    return train(world, out, "training.num_train_epochs=12", "training.learning_rate=2e-2", lines=lines), lines


def test_the_run_learns_and_meets_its_budget(finished: tuple[RunResult, list[str]]) -> None:
    result, _ = finished
    assert result.report is not None
    assert result.report.total_rank == 4 * 12  # target_r × matrices
    assert result.scores["accuracy"] >= 0.9
    assert result.steps == 96 and result.stopped is None


def test_the_plan_is_printed_before_the_first_step_and_its_numbers_are_true(
    finished: tuple[RunResult, list[str]],
) -> None:
    result, lines = finished
    first = next(index for index, line in enumerate(lines) if "/96" in line and "loss" in line)
    plan = "\n".join(lines[:first])
    assert "matrices   12" in plan and "triplets   96 at the start, 48 in the end" in plan
    assert f"parameters {result.count.peak:,} at the start" in plan
    assert "schedule   96 steps: 10 warm-up, 48 reduction with an allocation every 1, 38 final" in plan


def test_progress_lines_show_loss_rate_phase_budget_and_time(finished: tuple[RunResult, list[str]]) -> None:
    _, lines = finished
    progress = [line for line in lines if " s left" in line]
    assert 10 <= len(progress) <= 13
    assert all(word in progress[0] for word in ("loss", "lr", "warmup", "budget 96 → 48"))
    assert "final  budget 48 → 48" in progress[-1]


def test_the_folder_holds_what_was_promised(finished: tuple[RunResult, list[str]]) -> None:
    result, _ = finished
    names = {path.name for path in result.folder.iterdir()}
    files = {"recipe.yaml", "metrics.jsonl", "ranks.jsonl", "result.json", "README.md", "ranks.png", "budget.png"}
    assert names == files | {"adapter", "checkpoints"}
    metrics = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in metrics if "loss" in record] == list(range(2, 97, 2))
    ranks = [json.loads(line) for line in (result.folder / "ranks.jsonl").read_text().splitlines()]
    assert all(sum(record["ranks"].values()) == record["budget"] for record in ranks)
    assert ranks[-1]["budget"] == 48 and result.report is not None and ranks[-1]["ranks"] == result.report.ranks
    for picture in ("ranks.png", "budget.png"):
        assert (result.folder / picture).read_bytes().startswith(b"\x89PNG")
    card = (result.folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    assert f"| accuracy | {result.scores['accuracy']:.4f} |" in card
    assert json.loads((result.folder / "result.json").read_text())["scores"] == result.scores


def test_parameters_reported_are_those_in_the_file(finished: tuple[RunResult, list[str]]) -> None:
    result, _ = finished
    tensors = load_file(result.folder / "adapter" / "adapter_model.safetensors")
    adapter = sum(value.numel() for key, value in tensors.items() if ".lora_" in key)
    assert result.count.final == adapter
    assert result.count.head == sum(value.numel() for key, value in tensors.items()) - adapter == 32 * 2 + 2


def test_the_resolved_recipe_reruns_to_the_same_adapter(finished: tuple[RunResult, list[str]], tmp_path: Path) -> None:
    result, _ = finished
    console = Console(quiet=True)
    again = run(load_recipe(str(result.folder / "recipe.yaml")), tmp_path / "again", console)
    first, second = (load_file(r.folder / "adapter" / "adapter_model.safetensors") for r in (result, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_adapter_loads_into_a_fresh_base_and_classifies(finished: tuple[RunResult, list[str]], world: Path) -> None:
    result, _ = finished
    base = result.task.build_model(str(world / "bert"), load_recipe("text-classification", settings(world)))
    model = adalora.load_adapter(base, result.folder / "adapter").eval()
    assert result.task.predict(model, ["hen", "a fir"]) == ["animal", "plant"]


def test_lora_of_a_given_size_comes_as_near_as_one_rank_of_one_module(world: Path, tmp_path: Path) -> None:
    goal = 6000
    result = train(world, tmp_path / "lora", LORA, f"method.parameters={goal}", "training.max_steps=2")
    tensors = load_file(result.folder / "adapter" / "adapter_model.safetensors")
    assert result.count.final == sum(value.numel() for key, value in tensors.items() if ".lora_" in key)
    assert goal - 64 < result.count.final <= goal  # the smallest matrices cost 32 + 32 a rank
    assert result.report is None and not (result.folder / "ranks.jsonl").exists()


def test_a_time_limit_ends_the_run_with_its_budget_met(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = train(world, tmp_path / "short", "max_minutes=1e-9")
    assert result.steps == 1 and result.stopped == "max_minutes=1e-09 are over"
    assert result.report is not None and result.report.total_rank == 48
    assert "stopped after step 1 of 24, in the warmup phase: the budget was enforced at once (48 of 96" in caplog.text


def test_ctrl_c_ends_the_run_with_everything_saved(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adalora import records

    before = signal.getsignal(signal.SIGINT)
    original = records.ProgressLine.on_step_end

    def interrupt(self: object, args: object, state: object, control: object, **kwargs: object) -> None:
        original(self, args, state, control, **kwargs)  # type: ignore[arg-type]
        if state.global_step == 11:  # type: ignore[attr-defined]
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(records.ProgressLine, "on_step_end", interrupt)
    result = train(world, tmp_path / "cut")
    assert result.steps == 11 and result.stopped == "interrupted"
    stored = load_file(result.folder / "adapter" / "adapter_model.safetensors")
    assert sum(value.shape[0] for key, value in stored.items() if key.endswith("lora_E")) == 48
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    "setting,message",
    [
        ("method.init_r=2", "in section method: target_r (4) is above init_r (2)"),
        ("method.inti_r=2", "Did you mean 'init_r'"),
        ("method={name: adlora}", "method.name is 'adlora'; did you mean 'adalora'"),
        ("method={name: lora, rank: 2}", "no option 'rank'"),
        ("method={name: lora, parameters: 10}", "below what rank 1 everywhere needs"),
        ("method.target_modules=[nope]", "no module of BertForSequenceClassification fits"),
        ("method.tinit=40", "must leave steps for reducing"),
        ("method.total_step=7", "total_step=7, but the loop runs 24"),
        ("training.learning_rat=1", "'training.learning_rat'"),
        ("training.seed=3", "'training.seed' is set by the run itself"),
        ("training.eval_strategy=sometimes", "in section training"),
        ("model.name_or_path=/no/such/model", "/no/such/model"),
        ("model.name_or_path=package:other", "the only packaged model"),
        ("model.name_or_path=WORLD/bare", "cannot load"),
        ("data.train=/no/such/file.jsonl", "no such file"),
    ],
)
def test_a_mistake_is_one_error_and_leaves_no_folder(world: Path, tmp_path: Path, setting: str, message: str) -> None:
    out = tmp_path / "out"
    (world / "bare").mkdir(exist_ok=True)
    with pytest.raises(AdaLoraError) as caught:
        train(world, out, setting.replace("WORLD", str(world)))
    assert message in str(caught.value)
    assert not out.exists()


def test_an_output_folder_in_use_is_left_alone(world: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(AdaLoraError, match="is not empty"):
        train(world, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_checkpoints_on_the_way_hold_adapter_and_head_only(world: Path, tmp_path: Path) -> None:
    result = train(world, tmp_path / "kept", "training.save_strategy=epoch", "training.num_train_epochs=1")
    (checkpoint,) = (result.folder / "checkpoints").iterdir()
    keys = load_file(checkpoint / "model.safetensors").keys()
    adapters = [name for name, _ in named_adapters(result.model)]
    assert keys == {f"{n}.{p}" for n in adapters for p in ("lora_A", "lora_E", "lora_B")} | {
        "classifier.weight",
        "classifier.bias",
    }


def test_a_full_disk_is_one_error_with_the_remedy(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adalora import records

    original = records.RunRecorder.on_train_begin

    def onto_a_full_device(self: records.RunRecorder, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)
        (self.folder / "metrics.jsonl").symlink_to("/dev/full")

    monkeypatch.setattr(records.RunRecorder, "on_train_begin", onto_a_full_device)
    with pytest.raises(AdaLoraError, match=r"No space left on device.*Free space there"):
        train(world, tmp_path / "full")
    assert not (tmp_path / "full" / "adapter").exists()
