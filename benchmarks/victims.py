"""Victims on a Trainer: one as a user builds it, and the one of `adalora train`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers import it at their first step: once here, not in every forked run
from safetensors.torch import load_file

import adalora
from benchmarks.board import FINAL, MICRO, SCHEDULE, STEPS, Board, end, write_state
from benchmarks.world import bert_config, draw_tokens, settings


def trainer(out: Path, board: Board) -> None:
    """A Trainer as a user builds it, with our callback and our choice of the checkpoint."""
    from transformers import BertForSequenceClassification, PrinterCallback, Trainer, TrainingArguments

    from adalora.integrations.checkpoints import last_complete_checkpoint
    from adalora.integrations.transformers import AdaLoraCallback
    from adalora.screen import quiet

    quiet()
    watch(board)
    torch.manual_seed(0)
    labels = [int(row.sum() % 3) for row in draw_tokens(64)]
    run = Trainer(
        BertForSequenceClassification(bert_config(40)),
        TrainingArguments(
            str(out),
            max_steps=STEPS,
            gradient_accumulation_steps=MICRO,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            save_steps=4,
            save_total_limit=2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=[
            {"input_ids": row.tolist(), "labels": label} for row, label in zip(draw_tokens(64), labels, strict=True)
        ],
        callbacks=[AdaLoraCallback(adalora.AdaLoraConfig(**SCHEDULE), compact=True)],
    )
    run.remove_callback(PrinterCallback)
    begin = last_complete_checkpoint(out)
    run.train(resume_from_checkpoint=str(begin) if begin else None)
    board.tell(STEPS * MICRO, writing=True)
    timed = ("runtime", "per_second", "train_loss")
    history = [{k: v for k, v in line.items() if not k.endswith(timed)} for line in run.state.log_history]
    write_state(out / FINAL, end(run.model, run.optimizer) | {"metrics": json.dumps(history, sort_keys=True)})


def command(out: Path, board: Board) -> None:
    """What `adalora train` does, with --resume where there is a run; the model and its data lie beside `out`."""
    from rich.console import Console

    from adalora.recipe import load_recipe
    from adalora.train import run

    watch(board)
    with io.StringIO() as screen:
        resume = (out / "recipe.yaml").exists()
        run(load_recipe("text-classification", settings(out.parent)), out, Console(file=screen), resume)
    gather(out)


def gather(out: Path) -> None:
    """final.pt of a run of `adalora train`, from what it left."""
    timed = ("runtime", "per_second", "train_loss", "total_flos", "preparation_time")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [{k: v for k, v in line.items() if not k.endswith(timed)} for line in lines]
    last = max((out / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    state = {
        "adapter": load_file(out / "adapter" / "adapter_model.safetensors"),
        "config": (out / "adapter" / "adapter_config.json").read_text(encoding="utf-8"),
        "optimizer": torch.load(last / "optimizer.pt", weights_only=True),
        "ranks": (out / "ranks.jsonl").read_text(encoding="utf-8"),
        "scores": json.loads((out / "result.json").read_text(encoding="utf-8"))["scores"],
        "metrics": json.dumps(kept, sort_keys=True),
    }
    write_state(out / FINAL, state)


def watch(board: Board) -> None:
    """Have every Trainer of this process tell how far it is."""
    from transformers import Trainer

    train, write = Trainer.training_step, Trainer._save_checkpoint

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        place = self.state.global_step * MICRO
        seen = board.look()[0]
        board.tell(seen + 1 if place <= seen < place + MICRO - 1 else place)
        return train(self, *args, **kwargs)

    def save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        board.tell(self.state.global_step * MICRO, writing=True)
        return write(self, *args, **kwargs)

    Trainer.training_step, Trainer._save_checkpoint = training_step, save_checkpoint
