"""Which recipes are shown, and what is shortened in them so that all fit into an evening on two cores."""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ENCODER_LORA = "r: 4, lora_alpha: 16, exclude_modules: .*pooler.dense"
PLAIN_LORA = "r: 4, lora_alpha: 16"
SCRATCH_LORA = "r: 8, lora_alpha: 16"
NO_SCORES_ON_THE_WAY = "training.eval_strategy=no"


@dataclass(frozen=True)
class Show:
    """One recipe, `changes` to it (`section.key=value`), and the file of which the first `asked` rows are predicted.

    `lora` are options of plain LoRA, `lora_rate` its learning rate where that is not the recipe's: with AdaLoRA's 3e-3
    it learned nothing on CoLA and STS-B.
    `firsts` are keys of the recipe whose file is cut to its first rows: {"data.validation": (file, rows)}. `scratch`
    is the model of benchmarks.scratch that takes the recipe's place. `scores` are shown, the recipe's own metric first.
    """

    recipe: str
    predicts: str
    scores: tuple[str, ...]
    lora: str = ENCODER_LORA
    changes: tuple[str, ...] = ()
    firsts: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    scratch: str | None = None
    asked: int = 500
    lora_rate: str | None = "1e-3"


SHOWS = (
    Show("trec", "trec/test.jsonl.gz", ("accuracy",)),
    Show("cola", "cola/validation.jsonl.gz", ("matthews", "accuracy")),
    Show("stsb", "stsb/test.jsonl.gz", ("pearson", "spearman"), changes=("training.num_train_epochs=2",)),
    Show("banking77", "banking77/test.jsonl.gz", ("accuracy",), changes=("training.num_train_epochs=3",)),
    Show("sst2", "sst2/test.jsonl.gz", ("accuracy",), changes=("training.max_steps=500", NO_SCORES_ON_THE_WAY)),
    Show(
        "squad-v1",
        "squad_v1/validation.jsonl.gz",
        ("f1", "exact_match"),
        PLAIN_LORA,
        (
            "training.num_train_epochs=1",
            "training.bf16=true",
            "training.use_cpu=true",
            "training.save_strategy=steps",  # the longest of the shows: a session may end before it does
            "training.save_steps=100",
            NO_SCORES_ON_THE_WAY,
        ),
        asked=100,
    ),
    Show(
        "squad-v2",
        "squad_v2/validation.jsonl.gz",
        ("f1", "exact_match"),
        PLAIN_LORA,
        ("training.max_steps=160", NO_SCORES_ON_THE_WAY),
        firsts={"data.validation": ("squad_v2/validation.jsonl.gz", 1500)},
        asked=100,
    ),
    Show(
        "alpaca",
        "alpaca/validation.jsonl.gz",
        ("loss", "perplexity"),
        SCRATCH_LORA,
        (
            "data.name=null",
            "data.train=alpaca/train.jsonl.gz",
            "data.validation=alpaca/validation.jsonl.gz",
            "data.max_length=256",
            "data.max_new_tokens=64",
            "training.max_steps=60",
            NO_SCORES_ON_THE_WAY,
        ),
        scratch="llama",
        asked=100,
        lora_rate=None,
    ),
    Show(
        "gsm8k",
        "gsm8k/test.jsonl.gz",
        ("exact_match", "loss", "perplexity"),
        SCRATCH_LORA,
        (
            "data.name=null",
            "data.config=null",
            "data.train=gsm8k/train.jsonl.gz",
            "data.max_new_tokens=128",
            "training.max_steps=120",
            NO_SCORES_ON_THE_WAY,
        ),
        firsts={"data.test": ("gsm8k/test.jsonl.gz", 300)},
        scratch="llama",
        asked=100,
        lora_rate=None,
    ),
    Show(
        "scitldr",
        "scitldr/test.jsonl.gz",
        ("rougeL", "rouge1", "rouge2"),
        SCRATCH_LORA,
        ("data.max_source_length=256", "training.max_steps=80", NO_SCORES_ON_THE_WAY),
        firsts={"data.test": ("scitldr/test.jsonl.gz", 200)},
        scratch="bart",
        asked=100,
        lora_rate=None,
    ),
)


def first_rows(file: Path, rows: int, out: Path) -> Path:
    """The file `out` with the first rows of a jsonl.gz file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        out.write_text("".join(itertools.islice(lines, rows)), encoding="utf-8")
    return out
