"""The whole path on a small model from files: what a user gets, and what a user's mistakes get."""

import io
import json
import os
import re
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, Trainer

import adalora
from adalora import AdaLoraConfig
from adalora.claiming import claimed, require_one_process
from adalora.errors import AdaLoraError, AdapterFileError, ConfigError, TrainingError
from adalora.injection import named_adapters
from adalora.integrations.stopping import StopGracefully
from adalora.recipe import load_recipe
from adalora.records import RunRecorder
from adalora.reloading import reload_tolerance
from adalora.result import RunResult
from adalora.resuming import no_checkpoint
from adalora.screen import ProgressLine
from adalora.train import run
from folders import save_world, world_settings

# The fixture `finished` draws, and its pictures are looked at.
pytestmark = pytest.mark.usefixtures("undrawn")

LORA = "method={name: lora, r: 2, exclude_modules: [pooler.dense]}"
FAST = ["training.per_device_train_batch_size=8", "training.logging_steps=2", "training.save_strategy='no'"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("world"))


def settings(world: Path, *more: str) -> list[str]:
    return [*world_settings(world), *FAST, *more]


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


def test_a_logger_that_fails_is_named(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").touch()
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "taken"))
    with pytest.raises(TrainingError, match=r"TensorBoardCallback failed: .*File exists.* leave it out of"):
        train(world, tmp_path / "run", "training.report_to=tensorboard", "training.max_steps=1")


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
    assert "task       2 classes (animal, plant); 64 train, 16 validation rows" in plan
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
    files.add("report.html")
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
    record = json.loads((result.folder / "result.json").read_text())
    assert record["scores"] == result.scores and record["split"] == "validation"
    assert record["labels"] == ["animal", "plant"] and record["rows"] == {"train": 64, "validation": 16}


def test_a_reload_may_differ_by_what_the_dtype_rounds_and_no_more() -> None:
    logits = torch.tensor([[4.0, -3.0]])
    apart = 2**-6  # between neighbours of 3 in bf16: seen in a run whose pruned triplets a reload leaves out
    assert apart < reload_tolerance(logits, torch.bfloat16) < 0.2
    assert apart > reload_tolerance(logits, torch.float32) == 4e-3
    assert reload_tolerance(logits * 0.01, torch.float32) == 1e-3


@pytest.mark.parametrize("method", ["adalora", "lora"])
def test_the_program_in_the_card_runs_in_the_folder_and_names_a_label(
    method: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(world, tmp_path / "run", *([LORA] if method == "lora" else []), "training.max_steps=3")
    config = AutoConfig.from_pretrained(result.folder / "adapter")
    assert config.id2label == {0: "animal", 1: "plant"} and config.label2id == {"animal": 0, "plant": 1}
    card = (result.folder / "README.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", card, re.S)
    monkeypatch.chdir(result.folder)
    names: dict[str, Any] = {}
    exec(program, names)
    assert capsys.readouterr().out.strip() in ("animal", "plant")
    assert type(names["model"]).__name__.startswith("Peft" if method == "lora" else "Bert")


def test_the_card_says_classes_rows_split_steps_and_whether_the_run_was_cut(
    finished: tuple[RunResult, list[str]], world: Path, tmp_path: Path
) -> None:
    card = (finished[0].folder / "README.md").read_text()
    assert "2 classes: animal, plant." in card and "Rows: 64 train, 16 validation. 96 steps, the whole run." in card
    assert "| validation set, 16 rows | value |" in card
    assert "base_model" not in yaml.safe_load(card.split("---")[1])  # a folder of this machine is none on the hub
    cut = train(world, tmp_path / "cut", "max_minutes=1e-9", "model.hub_id=me/bert").folder / "README.md"
    assert "1 steps, stopped early: max_minutes=1e-09 are over." in cut.read_text()
    assert yaml.safe_load(cut.read_text().split("---")[1])["base_model"] == "me/bert"


def test_parameters_reported_are_those_in_the_file(finished: tuple[RunResult, list[str]]) -> None:
    result, _ = finished
    tensors = load_file(result.folder / "adapter" / "adapter_model.safetensors")
    adapter = sum(value.numel() for key, value in tensors.items() if ".lora_" in key)
    assert result.count.final == adapter
    assert result.count.head == sum(value.numel() for key, value in tensors.items()) - adapter == 32 * 2 + 2


def test_the_recipe_in_the_folder_leaves_nothing_open(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    files = ["model.name_or_path=bert", "data.train=train.jsonl", "data.validation=dev.jsonl"]
    result = train(world, tmp_path / "run", *files, "training.max_steps=2")
    recipe = yaml.safe_load((result.folder / "recipe.yaml").read_text())
    assert recipe["model"]["name_or_path"] == str(world / "bert")
    assert recipe["data"]["train"] == str(world / "train.jsonl")
    assert recipe["data"]["validation"] == str(world / "dev.jsonl")
    assert recipe["training"]["per_device_eval_batch_size"] == 128 and recipe["training"]["max_steps"] == 2
    assert recipe["method"]["name"] == "adalora" and recipe["method"]["beta1"] == 0.85
    assert set(recipe["method"]) == {"name", *AdaLoraConfig().to_dict()}


def test_a_run_shorter_than_the_logging_interval_logs_its_loss(world: Path, tmp_path: Path) -> None:
    result = train(world, tmp_path / "run", "training.max_steps=3", "training.logging_steps=10")
    metrics = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in metrics if "loss" in record] == [3]


@pytest.mark.slow
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
    answers = result.task.predict(model, [{"text": "hen"}, {"text": "the oak"}])
    assert [answer["label"] for answer in answers] == ["animal", "plant"]


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


@pytest.mark.parametrize("number,reason", [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_ends_the_run_with_everything_saved(
    number: signal.Signals, reason: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    original = ProgressLine.on_step_end

    def interrupt(self: object, args: object, state: object, control: object, **kwargs: object) -> None:
        original(self, args, state, control, **kwargs)  # type: ignore[arg-type]
        if state.global_step == 11:  # type: ignore[attr-defined]
            signal.raise_signal(number)

    monkeypatch.setattr(ProgressLine, "on_step_end", interrupt)
    result = train(world, tmp_path / "cut")
    assert result.steps == 11 and result.stopped == reason
    stored = load_file(result.folder / "adapter" / "adapter_model.safetensors")
    assert sum(value.shape[0] for key, value in stored.items() if key.endswith("lora_E")) == 48
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    metrics = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in metrics if "loss" in record] == [2, 4, 6, 8, 10, 11]


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
        ("training.max_steps=abc", "'training.max_steps' is 'abc'; it must be a whole number"),
        ("training.max_steps=1e3", "'training.max_steps' is 1000.0; it must be a whole number"),
        ("training.learning_rate=-1", "'training.learning_rate' is -1; it must be a number, finite and at least 0"),
        ("training.learning_rate=.nan", "it must be a number, finite"),
        ("training.learning_rate=null", "it must be a number"),
        ("training.per_device_train_batch_size=0", "it must be a whole number, finite and at least 1"),
        ("training.fp16=maybe", "it must be true or false"),
        ("training.adam_beta1=2", "in section training: Invalid beta parameter"),
        (
            "training.report_to=wandb",
            "'training.report_to' names 'wandb', which is not installed here: pip install wandb",
        ),
        ("training.report_to=[trackio]", "pip install trackio"),
        ("training.early_stopping_patience=0", "must be a whole number of evaluations, at least 1, not 0"),
        ("training={early_stopping_patience: 2, eval_strategy: 'no'}", "nothing is evaluated while training"),
        ("training={load_best_model_at_end: true, save_strategy: 'no'}", "in section training"),
        ("training.push_to_hub=true", "a run stays on this machine"),
        ("training.resume_from_checkpoint=x", "use --resume"),
        ("training.deepspeed=x.json", "would shard the adapter, and a recipe trains in one process"),
        ("training.fsdp=full_shard", "would shard the adapter, and a recipe trains in one process"),
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
    with pytest.raises(AdaLoraError, match="is a file, or within one"):
        train(world, tmp_path / "out" / "mine.txt")
    with pytest.raises(AdaLoraError, match="is a file, or within one"):
        run(load_recipe("text-classification", settings(world)), tmp_path / "out" / "mine.txt" / "in", Console())
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_several_processes_are_refused_before_the_folder_is_claimed(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 2.*in one process"):
        run(load_recipe("text-classification", settings(world)), tmp_path / "ddp", Console())
    assert list(tmp_path.iterdir()) == []
    for one in ("1", "", "auto"):
        monkeypatch.setenv("WORLD_SIZE", one)
        require_one_process()


def test_one_of_two_runs_gets_a_folder_whether_it_existed_or_not(tmp_path: Path) -> None:
    for out in (tmp_path / "new" / "deep", tmp_path):
        with claimed(out):
            with pytest.raises(ConfigError, match="is not empty"), claimed(out):
                raise AssertionError
            assert [path.name for path in out.iterdir()][:1] == ["checkpoints"]
        for path in (out / "checkpoints", *((tmp_path / "new" / "deep", tmp_path / "new") if out != tmp_path else ())):
            path.rmdir()
    results = []

    def compete() -> None:
        try:
            with claimed(tmp_path / "wanted"):
                barrier.wait()
                results.append("got it")
        except ConfigError:
            barrier.wait()
            results.append("refused")

    barrier = threading.Barrier(8)
    threads = [threading.Thread(target=compete) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["got it", *["refused"] * 7]


def test_a_run_killed_before_it_began_to_train_leaves_a_folder_that_the_same_command_takes(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:  # pragma: no cover
        with claimed(tmp_path / "out"):
            (tmp_path / "out" / ".adalora-1234").mkdir()  # in the middle of writing its recipe
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".adalora-1234", "checkpoints"]
    with claimed(tmp_path / "out"):
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoints"]
        with pytest.raises(ConfigError, match="is not empty"), claimed(tmp_path / "out"):
            raise AssertionError
        assert (tmp_path / "out" / "checkpoints").is_dir()
    (tmp_path / "out" / "checkpoints" / "checkpoint-3").mkdir()  # somebody's work
    with pytest.raises(ConfigError, match="is not empty"), claimed(tmp_path / "out"):
        raise AssertionError


def test_a_run_that_fails_before_it_begins_takes_away_what_it_made_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for out in (tmp_path / "mine", tmp_path / "new" / "deep"):
        with pytest.raises(ZeroDivisionError), claimed(out):
            (out / "checkpoints" / "file").write_text("")
            raise ZeroDivisionError
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


FAILURES = {
    "diverged": (TrainingError("the loss is not finite"), TrainingError, "the loss is not finite"),
    "disk full": (OSError(28, "No space left on device"), AdapterFileError, "Free space there"),
    "disk full in safetensors": (SafetensorError("I/O error: (os error 28)"), AdapterFileError, "Free space there"),
    "disk full in torch.save": (
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
        AdapterFileError,
        "Free space there",
    ),
    "out of memory": (torch.OutOfMemoryError("CUDA out of memory."), TrainingError, "per_device_train_batch_size"),
    "a bug": (RuntimeError("shapes differ"), RuntimeError, "shapes differ"),
    "a second Ctrl-C": (KeyboardInterrupt("again"), KeyboardInterrupt, "again"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_run_that_fails_later_says_why_in_its_folder_and_can_be_tried_again(
    case: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cause, kind, message = FAILURES[case]

    def fail(*_: object, **__: object) -> None:
        raise cause

    with monkeypatch.context() as patch, pytest.raises(kind, match=message):
        patch.setattr(Trainer, "_save_checkpoint", fail)
        train(world, tmp_path / "out", "training.max_steps=2", "training.save_strategy=epoch")
    reason = (tmp_path / "out" / "FAILED.txt").read_text()
    assert reason.startswith(f"{kind.__name__}: ") and message in reason
    assert (tmp_path / "out" / "metrics.jsonl").exists()
    if case == "disk full":
        result = train(world, tmp_path / "out", "training.max_steps=2")
        assert not (result.folder / "FAILED.txt").exists()
        steps = [json.loads(line)["step"] for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
        assert steps.count(2) == len(steps)  # nothing of the failed run


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
    original = RunRecorder.on_train_begin

    def onto_a_full_device(self: RunRecorder, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)
        (self.folder / "metrics.jsonl").symlink_to("/dev/full")

    monkeypatch.setattr(RunRecorder, "on_train_begin", onto_a_full_device)
    with pytest.raises(AdaLoraError, match=r"No space left on device.*Free space there"):
        train(world, tmp_path / "full")
    assert not (tmp_path / "full" / "adapter").exists()
    assert "No space left on device" in (tmp_path / "full" / "FAILED.txt").read_text()


@pytest.mark.parametrize("width,bar", [(120, True), (80, False)])
def test_the_live_line_has_the_time_left_before_the_text_and_a_bar_where_there_is_room(width: int, bar: bool) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=width, force_terminal=True, color_system=None)
    line = ProgressLine(console, None, "adalora")
    state = SimpleNamespace(global_step=5, max_steps=10, epoch=1.0)
    line.on_train_begin(None, state, None)
    line.on_log(None, state, None, {"loss": 0.5, "learning_rate": 1e-3})
    line.on_step_end(None, state, None)
    line.bar.refresh()
    line.close()
    last = [text for text in screen.getvalue().splitlines() if "loss" in text][-1]
    assert re.search(r"5/10 +[-\d:]+ left +loss 0\.500  lr 1\.0e-03", last)
    assert ("━" in last) is bar


def test_a_trainer_of_ones_own_stops_by_the_same_callback(world: Path) -> None:
    stop = StopGracefully()
    stop.on_train_begin(None, None, None)
    control = SimpleNamespace(should_training_stop=False)
    stop.on_step_end(None, SimpleNamespace(global_step=1, max_steps=2), control)
    assert stop.reason is None and not control.should_training_stop
    signal.raise_signal(signal.SIGTERM)
    stop.on_step_end(None, SimpleNamespace(global_step=1, max_steps=2), control)
    assert stop.reason == "terminated" and control.should_training_stop


@pytest.mark.parametrize("method", ["adalora", "lora"])
def test_a_run_in_bf16_reloads_to_the_outputs_that_it_had(world: Path, tmp_path: Path, method: str) -> None:
    """The Trainer leaves autocast around the trained model; the reloaded one must run in it as well."""
    more = [LORA] if method == "lora" else []
    lines: list[str] = []
    result = train(
        world,
        tmp_path / "out",
        "training.bf16=true",
        "training.use_cpu=true",
        "training.max_steps=4",
        *more,
        lines=lines,
    )
    assert (result.folder / "result.json").exists()
    assert any("outputs differ by at most 0.0e+00" in line for line in lines)


def test_a_method_without_checkpoints_starts_over_also_before_it_wrote_one(tmp_path: Path) -> None:
    said: list[str] = []
    no_checkpoint(tmp_path, said.append)
    (tmp_path / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    no_checkpoint(tmp_path, said.append)
    assert not (tmp_path / "checkpoints").exists() and len(said) == 2
