"""What victims on a Trainer find ready: a tiny BERT with its tokenizer, sentences with labels, and slow imports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.board import MICRO, STEPS


def make_world(folder: Path) -> None:
    """A BERT of two layers with a tokenizer of forty words, and 64 sentences with labels."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertModel, PreTrainedTokenizerFast

    from adalora.screen import quiet

    preload()
    quiet()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{index}" for index in range(4, 40))]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "bert")
    torch.manual_seed(0)
    BertModel(bert_config(len(words), positions=128)).save_pretrained(folder / "bert")
    rows = [{"text": " ".join(words[i] for i in row), "label": "ab"[int(row.sum() % 2)]} for row in draw_tokens(64)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


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


def preload() -> None:
    """Import what takes seconds, so that forked runs have it."""
    import accelerate
    import transformers

    import adalora.train

    assert accelerate.Accelerator and adalora.train
    assert transformers.BertForSequenceClassification and transformers.Trainer


def draw_tokens(count: int) -> torch.Tensor:
    """(count, 8) words, always the same."""
    return torch.randint(4, 40, (count, 8), generator=torch.Generator().manual_seed(3))


def bert_config(words: int, positions: int = 16) -> Any:
    """Of the tiny BERT, for three classes."""
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
