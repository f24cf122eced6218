"""A pre-trained model and data as a user has them: folders and files, small and made on the spot."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertModel,
    DebertaV2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from adalora.recipe import Recipe

ANIMALS, PLANTS = ("cat", "dog", "cow", "hen"), ("oak", "elm", "fir", "ash")
FILLERS = ("the", "a", "old", "small", "green", "near", "with", "and")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")

Row = dict[str, Any]

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


def write(path: Path, items: Sequence[Mapping[str, object]]) -> Path:
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


def save_world(folder: Path) -> Path:
    """`save_bert`'s model in bert/, 64 rows of training data in train.jsonl, 16 others in dev.jsonl."""
    save_bert(folder / "bert")
    write(folder / "train.jsonl", rows(64))
    write(folder / "dev.jsonl", rows(16, seed=1))
    return folder


def world_settings(world: Path) -> list[str]:
    """The settings of a recipe that name what `save_world` made."""
    files = [f"data.{name}={world / file}" for name, file in (("train", "train.jsonl"), ("validation", "dev.jsonl"))]
    return [f"model.name_or_path={world / 'bert'}", *files]


def train_and_validation(folder: Path, train: list[Row], validation: list[Row] | None = None) -> dict[str, str]:
    """Both as files in `folder`, by the names of a recipe's data section; the same rows twice if none are given."""
    both = {"train": train, "validation": validation or train}
    return {name: str(write(folder / f"{name}.jsonl", items)) for name, items in both.items()}


def assert_check_agrees(recipe: Recipe, folder: Path) -> None:
    """`adalora config check` prints, to the last key, what a run of this recipe in `folder` writes down."""
    from adalora.commands.recipes import check
    from adalora.train import run

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "checked.yaml").write_text(recipe.dump(), encoding="utf-8")
    with redirect_stdout(io.StringIO()) as screen:
        check(str(folder / "checked.yaml"))
    run(recipe, folder / "run", Console(quiet=True))
    assert yaml.safe_load(screen.getvalue()) == yaml.safe_load((folder / "run" / "recipe.yaml").read_text())


def deberta_base() -> DebertaV2Config:
    """microsoft/deberta-v3-base by its published configuration."""
    return DebertaV2Config(
        vocab_size=128100,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        max_position_embeddings=512,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        pooler_hidden_size=768,
        type_vocab_size=0,
        max_relative_positions=-1,
    )
