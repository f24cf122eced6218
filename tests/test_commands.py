"""The commands on a finished run, on files as users have them: what they print, and that it is true."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from rich.console import Console
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    T5Config,
    ViTConfig,
)

import adalora
from adalora import AdaLoraConfig, cli
from adalora.commands.planning import count_rows, run_steps
from adalora.commands.rows import rows_of_file, rows_of_lines
from adalora.commands.sizes import adapter_sizes, file_bytes
from adalora.errors import ConfigError, DataError
from adalora.injection import named_adapters
from adalora.recipe import Recipe, load_recipe
from adalora.train import run
from folders import assert_check_agrees, deberta_base, rows, save_bert, save_world, world_settings, write

FAST = [
    *("training.per_device_train_batch_size=8", "training.logging_steps=2", "training.save_strategy='no'"),
    *("training.learning_rate=1e-2", "training.num_train_epochs=2"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("world"))


def settings(world: Path, *more: str) -> list[str]:
    return [*world_settings(world), *FAST, *more]


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "one"
    run(load_recipe("text-classification", settings(world)), out, Console(file=io.StringIO()))
    return out


@pytest.fixture(scope="module")
def lora(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "lora"
    method = "method={name: lora, r: 2, exclude_modules: [pooler.dense]}"
    run(load_recipe("text-classification", settings(world, method)), out, Console(file=io.StringIO()))
    return out


class Shell:
    """The command line in this process, with what it printed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object, code: int = 0) -> str:
        self.monkeypatch.setattr(sys, "argv", ["adalora", *map(str, arguments)])
        self.capsys.readouterr()
        assert cli.run_app() == code
        screen = self.capsys.readouterr()
        return screen.out if code == 0 else " ".join(screen.err.split())


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def by_hand(world: Path, adapter: Path, texts: list[str]) -> torch.Tensor:
    base = AutoModelForSequenceClassification.from_pretrained(world / "bert", num_labels=2)
    model, tokenizer = adalora.load_adapter(base, adapter).eval(), AutoTokenizer.from_pretrained(world / "bert")
    with torch.no_grad():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts]).softmax(-1)


# evaluate


def test_evaluate_gives_the_scores_of_the_run(shell: Shell, finished: Path) -> None:
    expected = json.loads((finished / "result.json").read_text())
    for folder in (finished, finished / "adapter"):
        given = json.loads(shell("evaluate", folder, "--json"))
        assert given["split"] == "validation" and given["rows"] == 16
        assert given["scores"] == pytest.approx(expected["scores"])


def test_evaluate_on_another_file_scores_its_rows(shell: Shell, world: Path, finished: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "other.csv", rows(10, seed=5))
    given = json.loads(shell("evaluate", finished, "--data", file, "--json"))
    shares = by_hand(world, finished / "adapter", [str(row["text"]) for row in rows(10, seed=5)])
    truth = torch.tensor([0 if row["label"] == "animal" else 1 for row in rows(10, seed=5)])
    assert given["rows"] == 10
    assert given["scores"]["accuracy"] == pytest.approx(float((shares.argmax(-1) == truth).float().mean()))


def test_evaluate_knows_the_splits(shell: Shell, finished: Path) -> None:
    assert "train, 64 rows" in shell("evaluate", finished, "--split", "train")
    assert "--split is 'tset'; this run has train, validation" in shell("evaluate", finished, "--split", "tset", code=2)
    assert "there is no such file" in shell("evaluate", finished, "--data", "none.jsonl", code=2)


def test_evaluate_takes_a_lora_run(shell: Shell, lora: Path) -> None:
    expected = json.loads((lora / "result.json").read_text())["scores"]
    assert json.loads(shell("evaluate", lora, "--json"))["scores"] == pytest.approx(expected)


# predict


def test_predict_answers_like_the_model_by_hand(shell: Shell, world: Path, finished: Path) -> None:
    texts = ["old cat", "fir", "the oak"]
    shares = by_hand(world, finished / "adapter", texts)
    answers = lines_of(shell("predict", finished, *texts))
    for answer, share in zip(answers, shares, strict=True):
        assert answer["label"] == ("animal", "plant")[int(share.argmax())]
        assert answer["scores"]["plant"] == pytest.approx(float(share[1]), abs=1e-5)


def test_predict_reads_files_and_pipes_to_equal_answers(
    shell: Shell, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["old cat", "fir", "the, oak"]
    (tmp_path / "in.txt").write_text("\n".join(texts) + "\n")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "in.csv").write_text('text\nold cat\nfir\n"the, oak"\n')
    (tmp_path / "in.tsv").write_text("text\nold cat\nfir\nthe, oak\n")
    (tmp_path / "in.json").write_text(json.dumps([{"text": text} for text in texts]))
    expected = lines_of(shell("predict", finished, *texts))
    for suffix in ("txt", "jsonl", "csv", "tsv", "json"):
        assert lines_of(shell("predict", finished, "--file", tmp_path / f"in.{suffix}")) == expected, suffix
    monkeypatch.setattr(sys, "stdin", io.StringIO('old cat\n\n{"text": "fir"}\nthe, oak\n'))
    assert lines_of(shell("predict", finished)) == expected
    out = tmp_path / "new" / "out.jsonl"
    assert shell("predict", finished, *texts, "--out", out, "--batch-size", "2").startswith("3 answers in")
    for answer, other in zip(lines_of(out.read_text()), expected, strict=True):
        assert answer["score"] == pytest.approx(other["score"], abs=1e-6)
    assert "exists; choose another --out" in shell("predict", finished, *texts, "--out", out, code=2)


def test_predict_works_with_an_adapter_alone(shell: Shell, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    for file in (finished / "adapter").iterdir():
        (tmp_path / "moved" / file.name).write_bytes(file.read_bytes())
    assert shell("predict", tmp_path / "moved", "old cat") == shell("predict", finished, "old cat")
    (tmp_path / "moved" / "config.json").unlink()
    assert "which classes it knows" in shell("predict", tmp_path / "moved", "old cat", code=2)


def test_an_adapter_alone_takes_columns_and_lengths_by_set(shell: Shell, finished: Path, tmp_path: Path) -> None:
    shell("export", finished, "--out", tmp_path / "lora")
    settings = ("--set", "data.text=sentence", "--set", "data.max_length=16")
    assert shell("predict", tmp_path / "lora", '{"sentence": "cat"}', *settings).startswith('{"label"')
    assert "data.max_length is 999" in shell(
        "predict", tmp_path / "lora", "cat", "--set", "data.max_length=999", code=2
    )


def test_predict_takes_another_copy_of_the_base_model(
    shell: Shell, world: Path, finished: Path, tmp_path: Path
) -> None:
    copy = save_bert(tmp_path / "copy")
    assert shell("predict", finished, "cat", "--model", copy) == shell("predict", finished, "cat")
    assert "there is no such folder" in shell("predict", finished, "cat", "--model", tmp_path / "none", code=2)


@pytest.mark.slow
def test_predict_in_a_pipe_prints_nothing_but_answers(finished: Path) -> None:
    command = [sys.executable, "-m", "adalora", "predict", str(finished)]
    done = subprocess.run(command, input="cat\noak\n", capture_output=True, text=True, check=True)
    assert len(lines_of(done.stdout)) == 2
    assert done.stderr == ""


@pytest.mark.parametrize(
    "line,message",
    [('{"text": 1', "is not valid JSON"), ('{"txt": "cat"}', "text"), ('{"text": 3}', "must hold text")],
)
def test_a_wrong_row_is_told_with_its_place(line: str, message: str, shell: Shell, finished: Path) -> None:
    assert message in shell("predict", finished, line, code=2)


def recipe_for(task: str, **data: object) -> Recipe:
    return Recipe.model_validate({"task": task, "model": {"name_or_path": "m"}, "data": data, "method": {}})


@pytest.mark.parametrize(
    "task,data,row",
    [
        ("classification", {"text": "sentence"}, {"sentence": "a b"}),
        ("token-classification", {}, {"tokens": ["a", "b"]}),
        ("seq2seq", {"source": "document"}, {"document": "a b"}),
        ("image-classification", {}, {"image": "a b"}),
        ("causal-lm", {}, {"prompt": "a b"}),
        ("causal-lm", {"kind": "text"}, {"text": "a b"}),
        ("causal-lm", {"kind": "messages"}, {"messages": [{"role": "user", "content": "a b"}]}),
    ],
)
def test_a_plain_text_becomes_a_row_of_its_task(task: str, data: dict[str, object], row: dict[str, object]) -> None:
    assert list(rows_of_lines(["a b", " "], recipe_for(task, **data), "TEXT")) == [row]


@pytest.mark.parametrize(
    "task,data,columns",
    [
        ("question-answering", {}, "question and context"),
        ("classification", {"text": "premise", "text_pair": "hypothesis"}, "premise and hypothesis"),
    ],
)
def test_one_text_is_refused_where_a_row_has_two(task: str, data: dict[str, object], columns: str) -> None:
    with pytest.raises(DataError, match=f"a row here has {columns}; give"):
        list(rows_of_lines(["one"], recipe_for(task, **data), "TEXT"))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"readable are .jsonl"):
        list(rows_of_file(tmp_path / "in.xlsx", recipe_for("classification")))
    (tmp_path / "in.json").write_text('{"text": "x"}')
    with pytest.raises(DataError, match="must hold a list"):
        list(rows_of_file(tmp_path / "in.json", recipe_for("classification")))


# plan


def config_folder(config: Any, folder: Path) -> Path:
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "config,task,matrices,unit",
    [(deberta_base(), "classification", 72, 165_888), (BartConfig(), "seq2seq", 192, 540_672)],
    ids=["DeBERTaV3-base", "BART-large"],
)
@pytest.mark.slow
def test_the_sizes_of_the_papers_models_come_from_their_configurations_alone(
    config: Any, task: str, matrices: int, unit: int, shell: Shell, tmp_path: Path
) -> None:
    folder = config_folder(config, tmp_path / "model")
    batch = ("--set", "training.per_device_train_batch_size=1")
    plan = json.loads(shell("plan", folder, "--task", task, "--json", "--target-r", "2", *batch))
    assert plan["matrices"] == matrices
    assert plan["parameters"]["unit"] == unit
    assert plan["parameters"]["final"] == 2 * (unit + matrices)
    assert plan["triplets"] == {"initial": 3 * matrices, "target": 2 * matrices}
    assert plan["memory"]["activations"] > 0 and plan["flops_per_step"] > 0


@pytest.mark.slow
def test_the_planned_file_is_the_written_file_to_the_byte(shell: Shell, world: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(world / "bert", num_labels=2)
    config = AdaLoraConfig(init_r=4, target_r=4, exclude_modules=["pooler.dense"], modules_to_save=["classifier"])
    adalora.inject(model, config)
    adalora.save_adapter(model, tmp_path / "adapter", warn=False)
    shapes = {name: module.shape for name, module in named_adapters(model)}
    whole = {f"classifier.{key}": tuple(value.shape) for key, value in model.classifier.state_dict().items()}
    written = tmp_path / "adapter" / "adapter_model.safetensors"
    assert file_bytes(shapes, dict.fromkeys(shapes, 4), config, whole) == written.stat().st_size
    plan = json.loads(shell("plan", "text-classification", *sets(world), "--target-r", "4", "--json"))
    assert plan["file_bytes"] == pytest.approx(written.stat().st_size, rel=0.02)


def sets(world: Path, *more: str) -> list[str]:
    return [item for setting in settings(world, *more) for item in ("--set", setting)]


def test_the_plan_is_what_the_run_then_does(shell: Shell, world: Path, finished: Path) -> None:
    plan = json.loads(shell("plan", "text-classification", *sets(world), "--json"))
    result = json.loads((finished / "result.json").read_text())
    allocations = [json.loads(line) for line in (finished / "ranks.jsonl").read_text().splitlines()]
    assert plan["steps"] == result["steps"] == 16
    assert plan["parameters"]["peak"] == result["parameters"]["peak"]
    assert plan["parameters"]["head"] == result["parameters"]["head"]
    assert plan["parameters"]["least"] <= result["parameters"]["final"] <= plan["parameters"]["most"]
    assert plan["schedule"]["allocations"] == len(allocations)
    assert plan["triplets"]["target"] == sum(allocations[-1]["ranks"].values())
    budget = {line["step"]: line["budget"] for line in allocations}
    shared = {int(step): value for step, value in plan["schedule"]["budget"].items() if int(step) in budget}
    assert shared and all(budget[step] == value for step, value in shared.items())


def test_bounds_of_the_final_size_are_met_by_filling_cheap_or_dear_matrices() -> None:
    shapes = {"small": (3, 4), "large": (30, 40)}
    sizes = adapter_sizes(shapes, AdaLoraConfig(init_r=3, target_r=2), {"head.weight": (2, 5)})
    assert (sizes.initial, sizes.budget.target, sizes.head) == (6, 4, 10)
    assert sizes.peak == 3 * 8 + 3 * 71
    assert sizes.final == 2 * 8 + 2 * 71
    assert sizes.least == 3 * 8 + 1 * 71
    assert sizes.most == 1 * 8 + 3 * 71
    assert sizes.unit == 7 + 70


@pytest.mark.parametrize(
    "importance",
    [
        "sensitivity*uncertainty",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("sensitivity", "fisher", "magnitude")),
    ],
)
def test_the_planned_averages_are_those_that_the_allocator_keeps(importance: str, shell: Shell, world: Path) -> None:
    """To the byte, counted from the optimizer's state of a run in its reduction phase."""
    model = AutoModelForSequenceClassification.from_pretrained(world / "bert", num_labels=2)
    chosen: Any = {"importance": importance, "exclude_modules": ["pooler.dense"], "init_r": 4, "target_r": 2}
    adalora.inject(model, AdaLoraConfig(**chosen, modules_to_save=["classifier"]))
    optimizer = torch.optim.AdamW(adalora.adapter_parameters(model))
    adalora.RankAllocator(model, total_step=100).attach(optimizer)
    for _ in range(12):
        model(**{"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.tensor([0, 1])}).loss.backward()
        optimizer.step()
    held = [v for state in optimizer.state.values() for key, v in state.items() if key.startswith("adalora_")]
    kept = sum(value.numel() * value.element_size() for value in held)
    sections = [item for key, value in chosen.items() for item in ("--set", f"method.{key}={json.dumps(value)}")]
    plan = json.loads(shell("plan", "text-classification", *sets(world), *sections, "--json"))
    assert plan["memory"].get("importance averages", 0) == kept
    assert (kept == 0) == (importance == "magnitude")


def test_a_sweep_is_a_table_with_a_line_for_each_rank(shell: Shell, world: Path) -> None:
    by_commas = shell("plan", world / "bert", "--target-r", "1,2,4,8")
    assert by_commas == shell(
        "plan", world / "bert", *["--target-r", "1", "--target-r", "2", "--target-r", "4", "--target-r", "8"]
    )
    table = [line.split() for line in by_commas.splitlines()]
    assert [line[:2] for line in table[1:5]] == [["1", "2"], ["2", "3"], ["4", "6"], ["8", "12"]]
    finals = [int(line[3].replace(",", "")) for line in table[1:5]]
    assert finals == [finals[0] * rank for rank in (1, 2, 4, 8)]


def test_a_plan_of_lora_counts_its_parameters(shell: Shell, world: Path, lora: Path) -> None:
    method = "method={name: lora, r: 2, exclude_modules: [pooler.dense]}"
    plan = json.loads(shell("plan", "text-classification", *sets(world, method), "--json"))
    assert plan["parameters"] == json.loads((lora / "result.json").read_text())["parameters"]
    assert "schedule" not in plan and "importance averages" not in plan["memory"]


@pytest.mark.slow
def test_a_measured_plan_says_so(shell: Shell, world: Path) -> None:
    text = shell("plan", "text-classification", *sets(world), "--measure")
    assert "measured here with random weights" in text and "at least" not in text
    start = ("--set", "method.init_lora_weights=activation")
    text = shell("plan", "text-classification", *sets(world), *start, "--measure")
    assert "measured here with random weights" in text
    assert "start      directions from the activations of 64 rows, in 5 passes" in text


def test_a_plan_without_data_asks_for_steps(shell: Shell, world: Path) -> None:
    assert "give --steps for the rest" in shell("plan", world / "bert")
    assert "1,000 steps: 100 warm-up, 500 reduction, 400 final" in shell("plan", world / "bert", "--steps", "1000")


@pytest.mark.parametrize(
    "task",
    [
        "classification",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("token-classification", "question-answering", "causal-lm")),
    ],
)
def test_every_task_of_a_text_model_can_be_planned(task: str, shell: Shell, world: Path) -> None:
    plan = json.loads(shell("plan", world / "bert", "--task", task, "--steps", "10", "--json"))
    assert "unknown" not in plan and plan["memory"]["activations"] > 0
    assert plan["batch"]["longest"].startswith("128 tokens")


@pytest.mark.slow
def test_images_and_pairs_can_be_planned(shell: Shell, tmp_path: Path) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    vit = config_folder(ViTConfig(**small, image_size=32, patch_size=8), tmp_path / "vit")
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    t5 = config_folder(T5Config(**sizes, vocab_size=50, decoder_start_token_id=0), tmp_path / "t5")
    for folder, task, matrices in ((vit, "image-classification", 12), (t5, "seq2seq", 2 * 6 + 2 * 10)):
        plan = json.loads(shell("plan", folder, "--task", task, "--steps", "10", "--json"))
        assert "unknown" not in plan and plan["flops_per_step"] > 0
        assert plan["matrices"] == matrices


@pytest.mark.slow
def test_activations_are_what_autograd_keeps(shell: Shell, world: Path) -> None:
    small, large = (
        json.loads(
            shell("plan", "text-classification", *sets(world, f"training.per_device_train_batch_size={n}"), "--json")
        )["memory"]["activations"]
        for n in (4, 8)
    )
    assert large == pytest.approx(2 * small, rel=0.02)


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.csv", "d.parquet"])
def test_rows_are_counted_in_every_format(name: str, tmp_path: Path) -> None:
    assert count_rows(write(tmp_path / name, rows(11))) == 11


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.csv", "d.tsv", "d.parquet"])
def test_a_file_whose_rows_cannot_be_counted_is_told(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe\x00a\n" * 9)
    with pytest.raises(DataError, match=rf"cannot count the rows of .*{re.escape(name)}"):
        count_rows(tmp_path / name)


def test_steps_are_counted_as_the_trainer_does(tmp_path: Path) -> None:
    recipe = recipe_for("classification", train=str(write(tmp_path / "d.jsonl", rows(50))))
    training = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_train_epochs": 3}
    assert run_steps(recipe, training) == 9  # 45 rows are left, 6 batches, 3 steps an epoch
    assert run_steps(recipe, training | {"max_steps": 7}) == 7
    assert run_steps(recipe_for("classification", name="glue"), training) is None


# inspect


def test_inspect_tells_the_ranks_of_the_run(shell: Shell, finished: Path) -> None:
    facts = json.loads(shell("inspect", finished, "--json"))
    last = json.loads((finished / "ranks.jsonl").read_text().splitlines()[-1])["ranks"]
    result = json.loads((finished / "result.json").read_text())["parameters"]
    assert facts["ranks"] == last
    assert facts["parameters"] == result["final"] and facts["whole_parameters"] == result["head"]
    assert facts["triplets"] + facts["pruned"] == facts["capacity"] == 96
    assert facts["file_bytes"] == (finished / "adapter" / "adapter_model.safetensors").stat().st_size
    text = shell("inspect", finished)
    assert "query" in text and "48 of 96 triplets pruned (50%), 48 left" in text
    assert f"{result['final']:,} adapter parameters; 66 in classifier" in text


def test_inspect_reads_lora(shell: Shell, lora: Path) -> None:
    facts = json.loads(shell("inspect", lora, "--json"))
    assert set(facts["ranks"].values()) == {2} and facts["method"] == "LoRA"
    assert facts["parameters"] == json.loads((lora / "result.json").read_text())["parameters"]["final"]
    assert "nothing is pruned in LoRA" in shell("inspect", lora)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_inspect_reads_adalora_of_peft(shell: Shell, world: Path, tmp_path: Path) -> None:
    import peft

    base = AutoModelForSequenceClassification.from_pretrained(world / "bert")
    config = peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=["query", "value"])
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "peft")
    facts = json.loads(shell("inspect", tmp_path / "peft", "--json"))
    assert facts["method"] == "AdaLoRA" and set(facts["ranks"].values()) == {3} and facts["matrices"] == 4


# export, merge


def logits_of(model: Any, world: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(world / "bert")
    with torch.no_grad():
        return model.eval()(**tokenizer("the old cat", return_tensors="pt")).logits


def adapted(world: Path, finished: Path) -> torch.Tensor:
    base = AutoModelForSequenceClassification.from_pretrained(world / "bert", num_labels=2)
    return logits_of(adalora.load_adapter(base, finished / "adapter"), world)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("format", ["lora", "lora-padded", "peft-adalora"])
def test_exports_compute_in_peft_what_the_run_computed(
    format: str, shell: Shell, world: Path, finished: Path, tmp_path: Path
) -> None:
    import peft

    shell("export", finished, "--format", format, "--out", tmp_path / "out")
    base = AutoModelForSequenceClassification.from_pretrained(world / "bert", num_labels=2)
    read = peft.PeftModel.from_pretrained(base, str(tmp_path / "out"))
    assert torch.allclose(logits_of(read, world), adapted(world, finished), atol=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(world / "bert") and config["task_type"] == "SEQ_CLS"
    ranks = {
        value.shape[0]
        for key, value in load_file(tmp_path / "out" / "adapter_model.safetensors").items()
        if ".lora_A" in key
    }
    assert (len(ranks) == 1) == (format == "lora-padded")
    assert shell("predict", tmp_path / "out", "old cat").startswith('{"label"')


def test_merge_writes_a_model_like_any_other(shell: Shell, world: Path, finished: Path, tmp_path: Path) -> None:
    shell("merge", finished, "--out", tmp_path / "whole")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert torch.allclose(logits_of(model, world), adapted(world, finished), atol=1e-5)
    assert model.config.id2label == {0: "animal", 1: "plant"}
    assert len(AutoTokenizer.from_pretrained(tmp_path / "whole")) == len(AutoTokenizer.from_pretrained(world / "bert"))
    assert "is not empty" in shell("merge", finished, "--out", tmp_path / "whole", code=2)


def test_a_lora_can_be_merged_and_nothing_else(shell: Shell, world: Path, lora: Path, tmp_path: Path) -> None:
    import peft

    assert "is a LoRA already" in shell("export", lora, "--out", tmp_path / "no", code=2)
    shell("merge", lora, "--out", tmp_path / "whole")
    base = AutoModelForSequenceClassification.from_pretrained(world / "bert", num_labels=2)
    read = peft.PeftModel.from_pretrained(base, str(lora / "adapter"))
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert torch.allclose(logits_of(whole, world), logits_of(read, world), atol=1e-5)


# compare


def test_compare_puts_runs_side_by_side(shell: Shell, finished: Path, lora: Path, tmp_path: Path) -> None:
    rows = json.loads(shell("compare", finished, lora, "--json"))
    results = [json.loads((folder / "result.json").read_text()) for folder in (finished, lora)]
    assert [row["method"] for row in rows] == ["adalora", "lora"]
    assert [row["parameters"] for row in rows] == [result["parameters"] for result in results]
    assert [row["score"] for row in rows] == [result["scores"]["accuracy"] for result in results]
    (tmp_path / "runs.yaml").write_text(f"runs: [{finished}, {lora}]\n")
    text = shell("compare", tmp_path / "runs.yaml")
    assert text == shell("compare", finished, lora)
    assert len(text.splitlines()) == 3 and f"{results[0]['parameters']['final']:,}" in text
    result, broken = json.loads((finished / "result.json").read_text()), tmp_path / "broken"
    broken.mkdir()
    shutil.copyfile(finished / "recipe.yaml", broken / "recipe.yaml")
    for change in ({"split": "x"}, {"split": []}, {"parameters": 3}, {"scores": {"accuracy": None}}, {"steps": "4"}):
        (broken / "result.json").write_text(json.dumps(result | change))
        assert "not as they were written" in shell("compare", broken, code=2)
    (tmp_path / "bad.yaml").write_text("run: x\n")
    assert "must hold runs" in shell("compare", tmp_path / "bad.yaml", code=2)


# push


class Hub:
    """What HfApi would have sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.repos: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.error = error
        monkeypatch.setattr(HfApi, "create_repo", self.create_repo)
        monkeypatch.setattr(HfApi, "create_commit", self.create_commit)

    def create_repo(self, repo_id: str, **options: Any) -> None:
        if self.error:
            raise self.error
        self.repos.append({"repo_id": repo_id, **options})

    def create_commit(self, repo_id: str, operations: list[CommitOperationAdd], **options: Any) -> Any:
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}")


def test_push_puts_the_adapter_on_top_and_the_records_beside(
    shell: Shell, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch)
    text = shell("push", finished, "me/mine", "--private")
    assert "uploaded: https://hub/me/mine" in text
    assert hub.repos == [{"repo_id": "me/mine", "private": True, "exist_ok": True}]
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"):
        assert hub.files[name] == (finished / "adapter" / name).read_bytes()
    for name in ("recipe.yaml", "result.json", "ranks.jsonl", "metrics.jsonl", "ranks.png"):
        assert hub.files[name] == (finished / name).read_bytes()
    card = hub.files["README.md"].decode()
    assert card.startswith("---\n") and 'adalora.load_adapter(base, ".")' in card and "hf download me/mine" in card
    assert not any("checkpoint" in name for name in hub.files)


def test_a_dry_run_lists_and_sends_nothing(shell: Shell, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, AssertionError())
    text = shell("push", finished, "me/mine", "--dry-run")
    size = (finished / "adapter" / "adapter_model.safetensors").stat().st_size
    assert f"{size:,} bytes" in text and "nothing was uploaded to me/mine" in text
    assert hub.files == {}


@pytest.mark.parametrize(
    "error,message",
    [
        (LocalTokenNotFoundError("no token"), "log in with `hf auth login`"),
        (
            HfHubHTTPError("403 Forbidden", response=SimpleNamespace(headers={}, request=None)),  # type: ignore[arg-type]
            "the hub did not take 'me/mine': 403 Forbidden",
        ),
        (ConnectionError("no route"), "and at the network"),
    ],
)
def test_what_the_hub_refuses_is_one_message(
    error: Exception, message: str, shell: Shell, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hub(monkeypatch, error)
    assert message in shell("push", finished, "me/mine", code=2)


def test_a_hub_that_does_not_answer_is_one_message(
    shell: Shell, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "Connection refused" in shell("push", finished, "me/mine", code=2)


# recipes, config, train


def test_a_copied_recipe_is_equal_and_replaces_nothing(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "adalora train text-classification.yaml" in shell("recipes", "copy", "text-classification")
    assert load_recipe("text-classification.yaml") == load_recipe("text-classification")
    assert "exists; choose another file name" in shell("recipes", "copy", "text-classification", code=2)
    shell("recipes", "copy", "text-classification", "new/mine.yaml")
    assert Path("new/mine.yaml").read_text() == Path("text-classification.yaml").read_text()


def test_a_checked_recipe_is_printed_with_every_default(shell: Shell, world: Path, tmp_path: Path) -> None:
    text = shell("config", "check", "text-classification", *sets(world))
    (tmp_path / "full.yaml").write_text(text)
    full = load_recipe(str(tmp_path / "full.yaml"))
    assert full.method["tfinal"] == 0.4 and full.training["per_device_train_batch_size"] == 8
    assert full.training["lr_scheduler_type"] == "linear"


@pytest.mark.parametrize("given", [["1,2"], ["1, 2"], ["1", "--target-r", "2"], ["1,", "--target-r", "2,1"]])
def test_ranks_may_come_with_commas_or_one_by_one(given: list[str], shell: Shell, world: Path) -> None:
    rows = json.loads(shell("plan", world / "bert", "--json", "--target-r", *given))
    assert [row["target_r"] for row in rows] == [1, 2]


@pytest.mark.parametrize("blanks", [["MODEL", "--target-r", "1", "2", "4"], ["--target-r", "1,", "2", ",4", "MODEL"]])
def test_ranks_with_blanks_are_refused_with_what_to_write(blanks: list[str], shell: Shell, world: Path) -> None:
    told = shell("plan", *(str(world / "bert") if word == "MODEL" else word for word in blanks), code=2)
    assert "several ranks are written with commas: --target-r 1,2,4" in told


def test_plan_refuses_what_it_cannot_read(shell: Shell, world: Path) -> None:
    assert "--target-r holds ''" in shell("plan", world / "bert", "--target-r", "", code=2)
    assert "--target-r holds 'x'" in shell("plan", world / "bert", "--target-r", "1,x", code=2)
    assert "unexpected extra argument" in shell("plan", world / "bert", "other", code=2)


def test_a_check_prints_the_recipe_of_the_run(world: Path, tmp_path: Path) -> None:
    more = ["training.max_steps=1", "training.save_strategy=epoch", "training.early_stopping_patience=2"]
    recipe = load_recipe("text-classification", settings(world, "data.kind=classes", *more))
    assert_check_agrees(recipe, tmp_path)
    text = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "metric_for_best_model: accuracy" in text and "greater_is_better: true" in text


def test_a_check_refuses_what_the_tasks_own_trainer_would(shell: Shell, world: Path) -> None:
    told = shell("config", "check", "text-classification", "--set", "training.predict_with_generate=true", code=2)
    assert "there is no key 'training.predict_with_generate' in TrainingArguments" in told
    told = shell(
        "config",
        "check",
        "text-classification",
        "--set",
        "training.early_stopping_patience=2",
        "--set",
        "training.save_strategy='no'",
        code=2,
    )
    assert "in section training: --load_best_model_at_end requires the save and eval strategy to match" in told


@pytest.mark.parametrize(
    "setting,message",
    [
        ("data.trian=x", "no key 'data.trian'; did you mean 'train'"),
        ("training.learning_rat=1", "'training.learning_rat' in"),
        ("method.int_r=4", "init_r"),
        ("method.tinit=1.5", "a float is a fraction of the run"),
        ("seed=-1", "seed"),
    ],
)
def test_a_wrong_key_is_told_with_file_and_path(setting: str, message: str, shell: Shell) -> None:
    assert message in shell("config", "check", "text-classification", "--set", setting, code=2)


def test_log_to_is_report_to(shell: Shell, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Recipe] = []

    def stop(recipe: Recipe, *arguments: Any, **options: Any) -> None:
        seen.append(recipe)
        raise ConfigError("seen")

    monkeypatch.setattr("adalora.train.run", stop)
    shell("train", "text-classification", *sets(world), "--log-to", "tensorboard", "--log-to", "mlflow", code=2)
    assert seen[0].training["report_to"] == ["tensorboard", "mlflow"]


@pytest.mark.slow
def test_tensorboard_gets_loss_scores_budget_and_ranks(shell: Shell, world: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    shell("train", "text-classification", *sets(world), "--log-to", "tensorboard", "--out", out)
    (events,) = out.glob("checkpoints/runs/*/events.out.tfevents.*")
    board = EventAccumulator(str(events)).Reload()
    series = {tag: {event.step: event.value for event in board.Scalars(tag)} for tag in board.Tags()["scalars"]}
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for tag, key in (("train/loss", "loss"), ("train/adalora/budget", "adalora/budget"), ("eval/accuracy",) * 2):
        key = key.replace("eval/", "eval_")
        assert series[tag] == pytest.approx({r["step"]: r[key] for r in records if key in r})
    allocations = [json.loads(line) for line in (out / "ranks.jsonl").read_text().splitlines()]
    for name, last in allocations[-1]["ranks"].items():
        found = series[f"train/adalora/rank/{name}"]
        assert len(found) == 8 and found[16] == last  # 16 steps, every second one logged
    assert not any(key.startswith("adalora/rank/") for record in records for key in record)
    assert sum(values[2] for tag, values in series.items() if "/rank/" in tag) == series["train/adalora/budget"][2]


def test_resume_goes_on_in_the_runs_own_folder(
    shell: Shell, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cut").mkdir()  # without any checkpoint: the run was cut short before the first
    (tmp_path / "cut" / "recipe.yaml").write_text((finished / "recipe.yaml").read_text())
    seen: list[tuple[Path, bool]] = []

    def stop(recipe: Recipe, out: Path, console: Console, resume: bool = False) -> None:
        seen.append((out, resume))
        raise ConfigError("seen")

    monkeypatch.setattr("adalora.train.run", stop)
    shell("train", tmp_path / "cut", "--resume", code=2)
    shell("train", "text-classification", "--resume", "--out", tmp_path / "cut", code=2)
    assert seen == [(tmp_path / "cut", True)] * 2
