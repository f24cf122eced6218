"""Runs of a second or less that are made to be killed: a plain loop, a Trainer, and `adalora train`.

Each goes on from what an earlier process left in its folder, tells on a `Board` where it is, and leaves everything that
training made in `final.pt`: adapter, masks, averages, optimizer and metrics.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers import it at their first step: once here, not in every forked run
from torch import nn

import adalora
from adalora.files import write_files
from adalora.injection import named_adapters

STEPS, MICRO = 32, 2  # optimizer steps, and micro-batches in each
SCHEDULE: dict[str, Any] = {"init_r": 4, "target_r": 2, "lora_alpha": 8, "tinit": 6, "tfinal": 12, "deltaT": 3}
CHECKPOINT_EVERY = 7  # micro-batches: every second checkpoint lies between two of one step
FINAL = "final.pt"


class Board:
    """What a run tells the process that will kill it, in memory that both see: how far it is, and whether it writes."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    def tell(self, place: int, writing: bool = False) -> None:
        """`place` micro-batches are behind the run."""
        self._memory[:8] = struct.pack("ii", place, writing)

    def look(self) -> tuple[int, bool]:
        """What was told last."""
        place, writing = struct.unpack("ii", self._memory[:8])
        return place, bool(writing)


Victim = Callable[[Path, Board], None]


# --- A plain loop -----------------------------------------------------------------------------------------------


def plain(out: Path, board: Board) -> None:
    """Gradients are checkpointed too, so that a run goes on between two micro-batches of a step."""
    _loop(out, board, compact=False)


def compacting(out: Path, board: Board) -> None:
    """The same, with pruned triplets freed when the pattern is final."""
    _loop(out, board, compact=True)


def _loop(out: Path, board: Board, compact: bool) -> None:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(
        nn.Linear(8, 16), nn.Dropout(0.1), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)
    )
    adalora.inject(model, adalora.AdaLoraConfig(target_modules=["0", "3"], modules_to_save=["5"], **SCHEDULE))
    file = out / "state.pt"
    held: dict[str, Any] = torch.load(file, weights_only=True) if file.exists() else {}
    if held:
        model.load_state_dict(held["model"])
    parameters = adalora.adapter_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=2e-2)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    if held:
        optimizer.load_state_dict(held["optimizer"])
        rate.load_state_dict(held["rate"])
        for parameter, gradient in zip(parameters, held["gradients"], strict=True):
            parameter.grad = gradient
        torch.set_rng_state(held["generator"])
    allocator = adalora.RankAllocator(model, STEPS, compact=compact).attach(optimizer)
    begin = held.get("place", 0)
    lines = _cut(out / "metrics.jsonl", begin)
    with lines.open("a", encoding="utf-8") as metrics:
        for place in range(begin, STEPS * MICRO):
            board.tell(place)
            loss = nn.functional.cross_entropy(model(_inputs(place)), _inputs(place)[:, :3].argmax(1))
            (loss / MICRO).backward()
            if place % MICRO == MICRO - 1:
                optimizer.step()
                optimizer.zero_grad()
                rate.step()
            ranks = {name: module.rank for name, module in allocator.modules.items()}
            record = {"place": place, "loss": loss.item(), "ranks": ranks, "importance": _digest(optimizer)}
            metrics.write(json.dumps(record) + "\n")
            metrics.flush()
            if place % CHECKPOINT_EVERY == CHECKPOINT_EVERY - 1:
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "rate": rate.state_dict(),
                    # Compaction has put new parameters in the place of the old ones.
                    "gradients": [parameter.grad for parameter in adalora.adapter_parameters(model)],
                    "generator": torch.get_rng_state(),
                    "place": place + 1,
                }
                board.tell(place, writing=True)
                write_files(out, {"state.pt": _saver(state)})
    board.tell(STEPS * MICRO, writing=True)
    adalora.save_adapter(model, out / "adapter")
    state = end(model, optimizer) | {"metrics": lines.read_text(encoding="utf-8")}
    write_files(out, {FINAL: _saver(state)})


def _inputs(place: int) -> torch.Tensor:
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(place))


def _cut(file: Path, count: int) -> Path:
    """The file with its first `count` lines: those behind the checkpoint will be written again."""
    held = file.read_text(encoding="utf-8").splitlines(keepends=True)[:count] if file.exists() else []
    write_files(file.parent, {file.name: lambda path: path.write_text("".join(held), encoding="utf-8")})
    return file


def _saver(state: dict[str, Any]) -> Callable[[Path], object]:
    return lambda path: torch.save(state, path)


def _digest(optimizer: torch.optim.Optimizer) -> str:
    """Of everything that the optimizer holds for each parameter, the averages of importance among it."""
    total = hashlib.sha256()
    for state in optimizer.state_dict()["state"].values():
        for key in sorted(state):
            total.update(key.encode() + torch.as_tensor(state[key]).numpy().tobytes())
    return total.hexdigest()[:16]


# --- A Trainer and the command line -----------------------------------------------------------------------------


def trainer(out: Path, board: Board) -> None:
    """A Trainer as a user builds it, with our callback and our choice of the checkpoint."""
    from transformers import BertForSequenceClassification, PrinterCallback, Trainer, TrainingArguments

    from adalora.integrations.checkpoints import last_complete_checkpoint
    from adalora.integrations.transformers import AdaLoraCallback

    quiet()
    watch(board)
    torch.manual_seed(0)
    labels = [int(row.sum() % 3) for row in _tokens(64)]
    run = Trainer(
        BertForSequenceClassification(_bert(40)),
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
            {"input_ids": row.tolist(), "labels": label} for row, label in zip(_tokens(64), labels, strict=True)
        ],
        callbacks=[AdaLoraCallback(adalora.AdaLoraConfig(**SCHEDULE), compact=True)],
    )
    run.remove_callback(PrinterCallback)
    begin = last_complete_checkpoint(out)
    run.train(resume_from_checkpoint=str(begin) if begin else None)
    board.tell(STEPS * MICRO, writing=True)
    timed = ("runtime", "per_second", "train_loss")
    history = [{k: v for k, v in line.items() if not k.endswith(timed)} for line in run.state.log_history]
    write_files(out, {FINAL: _saver(end(run.model, run.optimizer) | {"metrics": json.dumps(history, sort_keys=True)})})


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
        "adapter": _tensors(out / "adapter" / "adapter_model.safetensors"),
        "config": (out / "adapter" / "adapter_config.json").read_text(encoding="utf-8"),
        "optimizer": torch.load(last / "optimizer.pt", weights_only=True),
        "ranks": (out / "ranks.jsonl").read_text(encoding="utf-8"),
        "scores": json.loads((out / "result.json").read_text(encoding="utf-8"))["scores"],
        "metrics": json.dumps(kept, sort_keys=True),
    }
    write_files(out, {FINAL: _saver(state)})


def settings(world: Path) -> list[str]:
    """For the recipe text-classification: the model and the rows that `make_world` put into `world`."""
    training = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": MICRO,
        "max_steps": STEPS,
        "logging_steps": 2,
        "save_strategy": "steps",
        "save_steps": 4,
        "save_total_limit": 2,
    }
    files = [f"data.{name}={world / 'rows.jsonl'}" for name in ("train", "validation")]
    return [f"model.name_or_path={world / 'bert'}", *files, f"training={json.dumps(training)}"]


def make_world(folder: Path) -> None:
    """A BERT of two layers with a tokenizer of forty words, and 64 sentences with labels."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertModel, PreTrainedTokenizerFast

    preload()
    quiet()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{index}" for index in range(4, 40))]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "bert")
    torch.manual_seed(0)
    BertModel(_bert(len(words), positions=128)).save_pretrained(folder / "bert")
    rows = [{"text": " ".join(words[i] for i in row), "label": "ab"[int(row.sum() % 2)]} for row in _tokens(64)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def preload() -> None:
    """Import what takes seconds, so that forked runs have it."""
    import transformers

    import adalora.train

    assert adalora.train and transformers.BertForSequenceClassification and transformers.Trainer


def quiet() -> None:
    """No bars and no reports: a series has dozens of runs."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


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


def end(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """What trained, its masks, and the optimizer with its averages, step and pattern."""
    trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    masks = {name: module.lora_keep for name, module in named_adapters(model)}
    return {"trained": trained, "masks": masks, "optimizer": optimizer.state_dict()}


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def _tokens(count: int) -> torch.Tensor:
    return torch.randint(4, 40, (count, 8), generator=torch.Generator().manual_seed(3))


def _bert(words: int, positions: int = 16) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=words,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=positions,
        num_labels=3,
        initializer_range=0.2,
    )
