"""A pre-trained model and data as a user has them: folders and files, small and made on the spot."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

ANIMALS, PLANTS = ("cat", "dog", "cow", "hen"), ("oak", "elm", "fir", "ash")
FILLERS = ("the", "a", "old", "small", "green", "near", "with", "and")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


VOCABULARY = (*_SPECIAL, *ANIMALS, *PLANTS, *FILLERS)


def save_bert(folder: Path) -> Path:
    """A two-layer BERT with a tokenizer that knows every word of `rows`."""
    save_tokenizer(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.15,  # else attention is uniform, and no query matters
    )
    BertModel(config).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, words: tuple[str, ...] = VOCABULARY, **special: str) -> None:
    """One that splits at blanks. `special` are special tokens, by default BERT's."""
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    special = special or {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def save_other(folder: Path, model: type[PreTrainedModel], config: PreTrainedConfig, **special: str) -> Path:
    """Another architecture, with random weights and the words of `save_bert`."""
    save_tokenizer(folder, **special)
    torch.manual_seed(0)
    model(config).save_pretrained(folder)
    return folder


def rows(count: int, seed: int = 0) -> list[dict[str, object]]:
    """Sentences about animals or plants; `label` says which, `score` how many, `pair` is another sentence."""
    generator = torch.Generator().manual_seed(seed)

    def pick(words: tuple[str, ...]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    made: list[dict[str, object]] = []
    for index in range(count):
        kind, words = ("animal", ANIMALS) if index % 2 else ("plant", PLANTS)
        text = " ".join(pick(FILLERS) for _ in range(index % 3 // 2)) + " " + pick(words)
        made.append({"text": text.strip(), "label": kind, "pair": pick(FILLERS), "score": float(index % 2)})
    return made


def write(path: Path, items: list[dict[str, object]]) -> Path:
    """As jsonl, jsonl.gz, csv or parquet, by the name."""
    if path.name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    elif path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress("".join(json.dumps(item) + "\n" for item in items).encode()))
    else:
        import pandas

        frame = pandas.DataFrame(items)
        frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_parquet(path)
    return path
