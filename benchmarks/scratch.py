"""A small language model and a small encoder-decoder, trained from nothing on the texts of the tasks themselves.

    python -m benchmarks.scratch llama --data ../shared/data --out runs/tasks/models/llama

For machines without a pre-trained one: minutes of training on one core give weights that are no longer random, so that
the causal-LM and summarization recipes have something to adapt. What they score says nothing about the methods.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

Row = dict[str, list[int]]

START, PAD, END = "<s>", "<pad>", "</s>"
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
POSITIONS = 1024


@dataclass(frozen=True)
class Plan:
    """Sizes of a model and of its training."""

    steps: int
    vocabulary: int = 6000
    width: int = 256
    layers: int = 4  # for an encoder-decoder, on either side
    heads: int = 4
    batch: int = 8
    length: int = 256  # tokens of a row, or of a source
    learning_rate: float = 1.5e-3
    seed: int = 0


PLANS = {"llama": Plan(steps=300), "bart": Plan(steps=150, batch=16)}


def build(kind: str, data: Path, out: Path, plan: Plan) -> Path:
    """The folder `out` with model and tokenizer. One that is there already is left as it is.

    A build that was cut short goes on from its last checkpoint, beside `out`.
    """
    if (out / "config.json").is_file():
        return out
    set_seed(plan.seed)
    texts = instructions(data) if kind == "llama" else documents(data)
    tokenizer = train_tokenizer(texts, plan.vocabulary, surrounded=kind == "bart")
    model: Any = (llama if kind == "llama" else bart)(plan, tokenizer)
    rows = blocks(texts, tokenizer, plan.length) if kind == "llama" else gaps(texts, tokenizer, plan)
    part = out.with_name(out.name + ".part")
    losses = fit(model, tokenizer, rows, plan, part / "checkpoints")
    shutil.rmtree(part / "whole", ignore_errors=True)
    model.save_pretrained(part / "whole")
    tokenizer.save_pretrained(part / "whole")
    (part / "whole" / "losses.json").write_text(json.dumps(losses) + "\n")
    (part / "whole").replace(out)  # there, if at all, as a whole
    shutil.rmtree(part)
    return out


def instructions(data: Path) -> list[str]:
    """Alpaca's and GSM8K's training rows, as the causal-LM task writes pairs where there is no chat template."""
    alpaca = [
        [row["instruction"], *([row["input"]] if row["input"] else []), row["output"]]
        for row in read(data / "alpaca" / "train.jsonl.gz")
    ]
    gsm8k = [[row["question"], row["answer"]] for row in read(data / "gsm8k" / "train.jsonl.gz")]
    return ["\n\n".join(parts) for parts in (*alpaca, *gsm8k)]


def documents(data: Path) -> list[str]:
    """SciTLDR's training abstracts; their summaries stay unseen."""
    return [str(row["document"]) for row in read(data / "scitldr" / "train.jsonl.gz")]


def read(file: Path) -> list[dict[str, Any]]:
    """Rows of a jsonl.gz file."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def train_tokenizer(texts: Iterable[str], size: int, surrounded: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `size` tokens; `surrounded` puts start and end around each text, as BART's does."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = [START, PAD, END]  # ids 0, 1, 2, which are BART's
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if surrounded:
        made.post_processor = processors.TemplateProcessing(
            single=f"{START} $A {END}", special_tokens=[(START, 0), (END, 2)]
        )
    begin = {"bos_token": START} if surrounded else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=PAD, eos_token=END, model_max_length=POSITIONS, **begin
    )


def llama(plan: Plan, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Random weights, tied embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=plan.width,
            intermediate_size=plan.width * 8 // 3,
            num_hidden_layers=plan.layers,
            num_attention_heads=plan.heads,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def bart(plan: Plan, tokenizer: PreTrainedTokenizerFast) -> BartForConditionalGeneration:
    """Random weights."""
    sides = {
        f"{side}_{what}": value
        for side in ("encoder", "decoder")
        for what, value in (("layers", plan.layers), ("attention_heads", plan.heads), ("ffn_dim", 4 * plan.width))
    }
    return BartForConditionalGeneration(
        BartConfig(vocab_size=len(tokenizer), d_model=plan.width, max_position_embeddings=POSITIONS, **sides)
    )


def blocks(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, length: int) -> list[Row]:
    """All texts in a random order, an end token behind each, cut every `length` tokens."""
    order = list(texts)
    random.Random(0).shuffle(order)
    stream = [token for ids in tokenizer(order).input_ids for token in (*ids, tokenizer.eos_token_id)]
    pieces = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    return [{"input_ids": ids, "attention_mask": [1] * length, "labels": ids} for ids in pieces]


def gaps(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, plan: Plan) -> list[Row]:
    """Self-supervised pairs: a document without one of its sentences → that sentence (as PEGASUS, arXiv 1912.08777,
    but for any sentence, not the most telling ones). As many as the training takes, no pair twice."""
    found: list[tuple[str, str]] = []
    for text in texts:
        sentences = SENTENCE_END.split(text)
        if len(sentences) > 1:
            found += [(" ".join(sentences[:i] + sentences[i + 1 :]), gap) for i, gap in enumerate(sentences)]
    random.Random(0).shuffle(found)
    sources, targets = zip(*found[: plan.steps * plan.batch], strict=True)
    rows = tokenizer(list(sources), truncation=True, max_length=plan.length)
    labels = tokenizer(text_target=list(targets), truncation=True, max_length=64).input_ids
    return [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": wanted}
        for ids, wanted in zip(rows.input_ids, labels, strict=True)
    ]


def fit(
    model: Any, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], plan: Plan, folder: Path
) -> list[tuple[int, float]]:
    """Train all weights; returns (step, loss) of a tenth of the steps each."""
    tenth = max(1, plan.steps // 10)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.batch,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.01,
        logging_steps=tenth,
        save_steps=2 * tenth,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        seed=plan.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,  # type: ignore[arg-type]  # a list is a dataset
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def main(arguments: Sequence[str] | None = None) -> None:
    """Build one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=PLANS)
    parser.add_argument("--data", type=Path, required=True, help="folder with alpaca, gsm8k and scitldr")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    print(build(options.kind, options.data, options.out, PLANS[options.kind]))


if __name__ == "__main__":
    main()
