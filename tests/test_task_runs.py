"""The shows of benchmarks.tasks on a tiny scale: real commands, equal sizes, nothing done twice, a table that stays."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import records, scratch, table, tasks
from benchmarks.shows import SHOWS, Show, first_rows
from benchmarks.tasktable import tasks_table
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from adalora.recipe import load_recipe, recipe_names
from folders import rows, save_bert, write

EMPTY = "# Results\n\n<!-- bench:tasks -->\n<!-- /bench:tasks -->\n\nThe end.\n"
SIDES = 4 * (32 + 32) + 2 * (32 + 64)  # in + out of the six matrices of one of the two layers


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_bert(folder / "bert")
    write(folder / "train.jsonl", rows(64))
    write(folder / "dev.jsonl", rows(16, seed=1))
    write(folder / "dev.jsonl.gz", rows(16, seed=1))
    return folder


def show(world: Path, *more: str) -> Show:
    changes = (
        f"model.name_or_path={world / 'bert'}",
        "data.train=train.jsonl",
        "training.learning_rate=1e-2",
        "training.num_train_epochs=2",
        "training.per_device_train_batch_size=8",
        *more,
    )
    cut = {"data.validation": ("dev.jsonl.gz", 12)}
    return Show("text-classification", "dev.jsonl.gz", ("accuracy", "macro_f1"), changes=changes, firsts=cut, asked=5)


def play(world: Path, out: Path, *more: str) -> dict[str, records.Record]:
    stored: dict[str, records.Record] = {}
    tasks.play(show(world, *more), world, out, stored.__setitem__)
    return stored


@pytest.mark.slow
def test_both_methods_train_evaluate_predict_and_nothing_is_done_twice(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = play(world, tmp_path)
    ours, lora = (stored[f"text-classification/{method}"] for method in ("adalora", "lora"))
    budget, size = ours["parameters"]["final"], lora["parameters"]["final"]
    assert size <= budget < ours["parameters"]["peak"] and budget - size < 32 + 64
    for cell in (ours, lora):
        assert cell["rows"] == {"train": 64, "validation": 12} and cell["answers"] == 5
        assert cell["scores"] == pytest.approx(cell["evaluated"], abs=1e-4)
        assert cell["commands"][0].startswith("adalora train text-classification --out runs/tasks/text-classification/")
    assert f"parameters: {budget}" in lora["commands"][0] and str(tmp_path) not in " ".join(lora["commands"])

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError(f"runs again: {arguments}")

    monkeypatch.setattr(subprocess, "run", refuse)
    assert play(world, tmp_path) == stored


@pytest.mark.slow
def test_a_run_that_was_stopped_is_gone_on_with(world: Path, tmp_path: Path) -> None:
    arm = tasks.Arm(show(world, "training.num_train_epochs=40"), "adalora", None)
    first_rows(world / "dev.jsonl.gz", 12, arm.rows(tmp_path, "data.validation"))
    folder = arm.folder(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "adalora", *arm.train(tmp_path)], cwd=world, stdout=subprocess.DEVNULL
    )
    while not any(folder.glob("checkpoints/checkpoint-*/trainer_state.json")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143 and not tasks.complete(folder)
    result = tasks.trained(arm, world, tmp_path)
    assert tasks.complete(folder) and result["steps"] == 320 and 0 < result["resumed_from"] < 320


@pytest.mark.slow
def test_a_show_that_fails_is_named_and_leaves_no_record(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "results.md"
    document.write_text(EMPTY)
    files = ["--results", str(tmp_path / "tasks.json"), "--document", str(document)]
    with pytest.raises(SystemExit) as stopped:
        tasks.main(
            ["--data", str(world), "--out", str(tmp_path / "runs"), *files], [show(world, "training.epochs_of=2")]
        )
    assert stopped.value.code == 1 and "text-classification: Command" in capsys.readouterr().err
    assert "training.epochs_of" in (tmp_path / "runs/text-classification/adalora.log").read_text()
    assert document.read_text() == EMPTY and not (tmp_path / "tasks.json").exists()


def cell(recipe: str, method: str, score: float, resumed: int = 0) -> records.Record:
    versions = {"python": "3.11", "torch": "2", "peft": "0", "transformers": "5"}
    settings: Any = {"cpu": "a CPU", "cores": 2, "gpu": None, **versions, "allocator": {}}
    return {
        **{"recipe": recipe, "method": method, "split": "test", "rows": {"train": 4000, "validation": 7, "test": 50}},
        **{"scores": {"accuracy": score}, "evaluated": {"accuracy": score + 1e-6}, "answers": 5, "metric": "accuracy"},
        **{"parameters": {"peak": 3000, "final": 2000, "head": 12}, "train_seconds": 61.6, "resumed_from": resumed},
        **{"steps": 77, "shown": ["accuracy"], "commands": [f"adalora train {recipe}"], "environment": settings},
    }


def test_the_table_has_a_row_for_each_task_and_stays_when_written_again(tmp_path: Path) -> None:
    results, document = tmp_path / "tasks.json", tmp_path / "results.md"
    document.write_text(EMPTY)
    tasks.write_document(document, results)
    assert "Not measured yet." in document.read_text()
    records.store(results, "sst2/adalora", cell("sst2", "adalora", 0.875))
    records.store(results, "trec/lora", cell("trec", "lora", 0.75, resumed=10))
    records.store(results, "trec/adalora", cell("trec", "adalora", 0.96875))
    tasks.write_document(document, results)
    text = document.read_text()
    both = " 4,000, 50 (test) | 77 | accuracy | 0.9688 | 0.75 | 3,000 | 2,000 | 2,000 | 12 | 62 | 62 from step 10 on |"
    alone = " 4,000, 50 (test) | 77 | accuracy | 0.875 | not run | 3,000 | 2,000 | – | 12 | 62 | – |"
    assert text.index(f"| trec |{both}") < text.index(f"| sst2 |{alone}")
    assert "all 3 of them (largest difference 1.0e-06); `adalora predict` answered 15 rows" in text
    assert "a CPU, 2 cores" in text and text.endswith("-->\n\nThe end.\n")
    tasks.write_document(document, results)
    assert document.read_text() == text


def test_scores_that_evaluate_does_not_find_again_are_refused(tmp_path: Path) -> None:
    tasks.require_equal({"f1": 50.0}, {"f1": 50.001}, tmp_path)
    for other in ({"f1": 50.1}, {}, {"f1": 50.0, "exact_match": 1.0}):
        with pytest.raises(ValueError, match="differs from the run"):
            tasks.require_equal({"f1": 50.0}, other, tmp_path)


@pytest.mark.parametrize("shown", SHOWS, ids=lambda shown: shown.recipe)
def test_every_show_is_a_recipe_that_can_be_read(shown: Show) -> None:
    assert shown.recipe in recipe_names()
    for method, final in (("adalora", None), ("lora", 100_000)):
        arguments = tasks.Arm(shown, method, final).train(Path("out"))
        settings = [argument.removeprefix("--set=") for argument in arguments if argument.startswith("--set=")]
        recipe = load_recipe(shown.recipe, settings)
        assert recipe.method["name"] == method and recipe.method.get("parameters") == final


def test_the_results_that_are_kept_are_those_in_the_document() -> None:
    cells = list(records.load(tasks.RESULTS).values())
    text = tasks.DOCUMENT.read_text()
    assert table.filled(text, "tasks", "x") != text
    for recipe in {found["recipe"] for found in cells}:
        arms = [found for found in cells if found["recipe"] == recipe]
        assert tasks_table(sorted(arms, key=lambda arm: str(arm["method"]))).splitlines()[2] in text


# models from scratch

NAMES = ("Ada", "Grace", "Alan", "Edsger")
TINY = scratch.Plan(steps=30, vocabulary=300, width=32, layers=1, heads=2, batch=8, length=32, learning_rate=1e-2)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    people = [(NAMES[i % 4], NAMES[i // 4 % 4]) for i in range(64)]
    files: dict[str, list[dict[str, object]]] = {
        "alpaca": [
            {"instruction": f"Greet {a}.", "input": b if a < b else "", "output": f"Hello {a}"} for a, b in people
        ],
        "gsm8k": [{"question": f"{a} has 2.", "answer": f"{b} has 3.\n#### 5"} for a, b in people],
        "scitldr": [{"document": f"Here is {a}. She met {b}. All is well."} for a, b in people],
    }
    for name, made in files.items():
        (folder / name).mkdir()
        write(folder / name / "train.jsonl.gz", made)
    return folder


@pytest.mark.parametrize(("kind", "auto"), [("llama", AutoModelForCausalLM), ("bart", AutoModelForSeq2SeqLM)])
def test_a_model_from_scratch_loads_learns_and_is_built_once(kind: str, auto: Any, texts: Path, tmp_path: Path) -> None:
    folder = scratch.build(kind, texts, tmp_path / kind, TINY)
    losses = [loss for _, loss in json.loads((folder / "losses.json").read_text())]
    assert len(losses) == 10 and losses[-1] < 0.6 * losses[0]
    model, tokenizer = auto.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    sentence = "She met Grace." if kind == "bart" else "Grace has 2."
    ids = tokenizer(sentence, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == sentence
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (1, 2)
    assert (int(ids[0, -1]) == 2) == (kind == "bart")
    with torch.no_grad():
        assert float(model(input_ids=ids, labels=ids).loss) < 5.0  # ln 300 = 5.7 for one that knows nothing
    assert not folder.with_name(kind + ".part").exists()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    scratch.build(kind, texts, tmp_path / kind, TINY)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_a_gap_is_a_sentence_that_its_document_lacks(texts: Path) -> None:
    documents = scratch.documents(texts)
    tokenizer = scratch.train_tokenizer(documents, 300, surrounded=True)
    made = scratch.gaps(documents, tokenizer, TINY)
    assert len(made) == 64 * 3
    for row in made:
        source, gap = (tokenizer.decode(row[key], skip_special_tokens=True) for key in ("input_ids", "labels"))
        assert gap not in source and len(gap) > 5
