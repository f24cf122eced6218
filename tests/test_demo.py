"""The demo as `make demo` runs it, on the real encoder and the real texts, with fewer steps."""

import json
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from adalora.demo import SENTENCES, run_demo
from adalora.result import RunResult
from adalora.tasks.baselines import BaselineResult

pytestmark = pytest.mark.slow


def test_a_stopped_demo_ends_with_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adalora import demo

    fixed = BaselineResult(0.5, 0.5, 1.0, 0.0)
    monkeypatch.setattr(demo, "linear_probe", lambda *_: fixed)
    monkeypatch.setattr(demo, "bag_of_words", lambda *_: fixed)
    results = run_demo(tmp_path / "demo", 0, Console(quiet=True), ["max_minutes=1e-9"])
    assert set(results) == {"linear probe", "bag of words", "AdaLoRA"}
    assert results["AdaLoRA"].steps == 1 and results["AdaLoRA"].report.total_rank == 144


def test_the_demo_trains_both_arms_at_one_size_and_shows_all_it_promises(tmp_path: Path) -> None:
    with (tmp_path / "screen.txt").open("w", encoding="utf-8") as screen:
        console = Console(file=screen, soft_wrap=True, highlight=False, width=100)
        results = run_demo(tmp_path / "demo", 0, console, ["training.max_steps=24"])
    text = (tmp_path / "screen.txt").read_text(encoding="utf-8")
    probe, words, lora, adalora = (results[name] for name in ("linear probe", "bag of words", "LoRA", "AdaLoRA"))
    assert isinstance(probe, BaselineResult) and isinstance(words, BaselineResult)
    assert isinstance(lora, RunResult) and isinstance(adalora, RunResult)

    assert 0.65 < probe.accuracy < 0.82 and 0.7 < words.accuracy < 0.86
    assert text.index("linear probe") < text.index("bag of words") < text.index("matrices   36")
    assert adalora.report is not None and adalora.report.total_rank == 144
    kinds, layers, ranks = adalora.report.grid()
    assert (len(kinds), len(layers), sum(map(sum, ranks))) == (6, 6, 144)  # type: ignore[arg-type]
    stored = load_file(adalora.folder / "adapter" / "adapter_model.safetensors")
    assert adalora.count.final == sum(value.numel() for key, value in stored.items() if ".lora_" in key)
    assert 0 <= adalora.count.final - lora.count.final < 768  # one rank of the smallest matrix
    assert adalora.steps == lora.steps == 24
    assert all(sentence in text for sentence in SENTENCES)
    assert str(tmp_path / "demo") in text
    record = json.loads((tmp_path / "demo" / "adalora" / "result.json").read_text())
    assert f"{record['scores']['accuracy']:.3f}" in text
