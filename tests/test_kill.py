"""A run in a process of its own, killed at bad moments and resumed each time, ends as one that nobody disturbed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adalora.reading import CONFIG_FILE, WEIGHTS_FILE
from folders import rows, save_bert, write

# 24 steps of 3 epochs, a checkpoint every 5.
TRAINING = "training={per_device_train_batch_size: 8, logging_steps: 2, save_strategy: steps, save_steps: 5}"
ENOUGH = 300  # seconds for anything
TIMING = ("runtime", "per_second", "total_flos", "train_loss", "preparation_time")


def kill_when(moment: Callable[[], bool], command: list[str], out: Path, screen: Path) -> str:
    """Run `command` freely until it trains in `out`, then a fraction of a millisecond at a time, until `moment` holds
    while it stands still, and send it SIGKILL. Returns what it printed."""
    begun, before = out / "recipe.yaml", modified(out / "recipe.yaml")
    deadline = time.monotonic() + ENOUGH
    with screen.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    def require_alive() -> None:
        assert process.poll() is None and time.monotonic() < deadline, screen.read_text()

    try:
        while modified(begun) == before:
            require_alive()
            time.sleep(0.002)
        while True:
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            require_alive()
            if moment():
                break
            process.send_signal(signal.SIGCONT)
            time.sleep(0.0002)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    return screen.read_text()


def modified(file: Path) -> int:
    return file.stat().st_mtime_ns if file.exists() else 0


def contents(out: Path) -> tuple[Any, bytes]:
    """Header and body of the adapter's file. safetensors writes its metadata in an order that changes by chance."""
    file = (out / "adapter" / WEIGHTS_FILE).read_bytes()
    end = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:end]), file[end:]


def metrics(out: Path) -> list[dict[str, Any]]:
    """What does not depend on the clock."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if not k.endswith(TIMING)} for record in records]


def logged(out: Path, step: int) -> Callable[[], bool]:
    file = out / "metrics.jsonl"
    return lambda: file.exists() and f'{{"step": {step},' in file.read_text()


@pytest.mark.slow
def test_a_run_killed_three_times_ends_as_one_that_was_left_alone(tmp_path: Path) -> None:
    save_bert(tmp_path / "bert")
    items = [row | {"text": f"{row['text']} {'old ' * (index % 7)}".strip()} for index, row in enumerate(rows(64))]
    write(tmp_path / "train.jsonl", items)
    write(tmp_path / "dev.jsonl", rows(16, seed=1))
    files = [f"data.train={tmp_path / 'train.jsonl'}", f"data.validation={tmp_path / 'dev.jsonl'}"]
    settings = [f"--set={text}" for text in (f"model.name_or_path={tmp_path / 'bert'}", *files, TRAINING)]
    out, whole = tmp_path / "run", tmp_path / "whole"

    start = [sys.executable, "-m", "adalora", "train", "text-classification", *settings, "--out"]
    again = [sys.executable, "-m", "adalora", "train", str(out), "--resume"]

    def has(step: int, name: str) -> bool:
        return (out / "checkpoints" / f"checkpoint-{step}" / name).exists()

    def torn() -> bool:
        return any(has(step, "optimizer.pt") and not has(step, "trainer_state.json") for step in (10, 15, 20))

    with subprocess.Popen([*start, str(whole)], stdout=subprocess.DEVNULL) as undisturbed:
        kill_when(logged(out, 2), [*start, str(out)], out, tmp_path / "first.txt")
        assert not has(5, "trainer_state.json")
        screen = kill_when(torn, again, out, tmp_path / "second.txt")
        assert "there is no complete checkpoint: the run starts again at its first step" in screen
        # While the adapter is written, behind the last step.
        screen = kill_when(lambda: any(out.glob(".adalora-*/*.safetensors")), again, out, tmp_path / "third.txt")
        assert " is incomplete (" in screen and "resuming from checkpoint-" in screen
        assert not (out / "adapter").exists() and not (out / "result.json").exists()
        done = subprocess.run(again, capture_output=True, text=True, timeout=ENOUGH)
        assert done.returncode == 0, done.stderr
        assert undisturbed.wait(ENOUGH) == 0

    assert contents(out) == contents(whole)
    assert (out / "adapter" / CONFIG_FILE).read_bytes() == (whole / "adapter" / CONFIG_FILE).read_bytes()
    assert (out / "ranks.jsonl").read_bytes() == (whole / "ranks.jsonl").read_bytes()
    assert metrics(out) == metrics(whole) and metrics(out)[-1]["step"] == 24
    results = [json.loads((folder / "result.json").read_text()) for folder in (out, whole)]
    assert results[0]["scores"] == results[1]["scores"] and results[0]["complete"]
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
