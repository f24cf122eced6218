"""Instruction tuning of causal language models: chats, prompts with completions, or plain texts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from datasets import Dataset, DatasetDict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer

from ..errors import ConfigError, DataError
from ..recipe import Recipe
from ..sections import InstructionsData
from .causal import Collator, final_answer, require_isolation, row_losses
from .chat import IGNORED, ChatFormat, blocks, packed
from .data import describe_rows, load_splits
from .pretrained import load_model, load_tokenizer, require_known_tokens
from .writing import Writer

PROBED = 4  # rows
SHOWN = 60  # characters on either side of the first boundary between prompt and answer


@dataclass
class InstructionsTask:
    """Tokenized splits, and what is needed to score losses and generated answers.

    Loss and perplexity are means over all learned tokens of a split, each counted once. `exact_match` is the
    share of prompts whose generated final answer equals the reference's; it needs data.evaluate_generation.
    """

    splits: DatasetDict
    format: ChatFormat
    data: InstructionsData
    name: str
    metric: str = "loss"
    asked: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # (prompt, reference) of each split
    notes: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    task_type: ClassVar[str | None] = "CAUSAL_LM"
    trainer_type: ClassVar[type[Trainer]] = Trainer
    # Small batches, because logits are as wide as the vocabulary.
    argument_options: ClassVar[Mapping[str, Any]] = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}

    @property
    def processor(self) -> Any:
        """The tokenizer, with the chat template that was used."""
        return self.format.tokenizer

    @property
    def collator(self) -> Collator:
        """Pads a batch to its own longest row."""
        return Collator(int(self.processor.pad_token_id))

    @property
    def writer(self) -> Writer:
        """Writes at most data.max_new_tokens."""
        return Writer(self.format, self.data.max_new_tokens, self.name)

    @property
    def trainer_options(self) -> Mapping[str, Any]:
        """Losses are kept by row: the logits of a split would not fit into memory."""
        return {"compute_metrics": self.compute_metrics, "preprocess_logits_for_metrics": row_losses}

    def describe(self) -> str:
        """In words, with the first boundary between prompt and answer."""
        learned = sum(sum(label != IGNORED for label in row) for row in self.splits["train"]["labels"])
        tokens = sum(self.splits["train"]["length"])
        what = f"{describe_rows(self.splits)}; {learned:,} of {tokens:,} training tokens are learned"
        return "; ".join([what, *self.notes])

    def build_model(self, path: str, recipe: Recipe) -> nn.Module:
        """The language model at `path`.

        Raises ConfigError for tokens that it does not have, prompts that leave no room for an answer, and packing
        where its attention would reach from one text into another.
        """
        model: Any = load_model(AutoModelForCausalLM, path, recipe, self.processor)
        size = model.get_input_embeddings().num_embeddings
        highest = max((max(row) for rows in self.splits.values() for row in rows["input_ids"]), default=0)
        if highest >= size:
            raise ConfigError(
                f"the tokenizer of {self.name!r} gives token {highest}, but the model has {size}: the tokenizer files "
                "are of another model."
            )
        for split, questions in self.asked.items():
            self.writer.require_room(model, [prompt for prompt, _ in questions], f"data.{split}")
        if self.data.packing:
            require_isolation(model, self.name)
        return model

    def compute_metrics(self, prediction: Any) -> dict[str, float]:
        """Loss and perplexity from an EvalPrediction of `row_losses`."""
        total, count = (float(x) for x in prediction.predictions.astype("float64").sum(0))
        loss = total / count
        return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}

    def evaluate(self, trainer: Trainer, split: str) -> dict[str, float]:
        """Loss and perplexity of a split and, if asked for, exact match of its generated answers."""
        scores = self.compute_metrics(trainer.predict(self.splits[split], metric_key_prefix=split))
        if self.data.evaluate_generation:
            prompts, references = zip(*self.asked[split], strict=True)
            answers = self.writer.write(trainer.model, prompts, f"data.{split}")
            pattern = self.data.answer_pattern
            # A reference always has a final answer, so that None is never right.
            pairs = zip(answers, references, strict=True)
            hits = [final_answer(answer, pattern) == final_answer(wanted, pattern) for answer, wanted in pairs]
            scores["exact_match"] = sum(hits) / len(hits)
        return scores

    def probe(self, model: nn.Module, split: str) -> tuple[dict[str, Tensor], str]:
        """A few rows."""
        rows = self.splits[split]
        batch = self.collator([rows[i] for i in range(min(PROBED, len(rows)))])
        device = next(model.parameters()).device
        return {key: value.to(device) for key, value in batch.items() if key != "labels"}, "logits"

    def predict(self, model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """`text` that the model writes and, with data.answer_pattern, the final `answer` in it or None."""
        prompts = [self.format.prompt(row, f"row {index}") for index, row in enumerate(rows)]
        texts = self.writer.write(model, prompts, "the input")
        if self.data.answer_pattern is None:
            return [{"text": text} for text in texts]
        return [{"text": text, "answer": final_answer(text, self.data.answer_pattern)} for text in texts]


def build_task(path: str, recipe: Recipe) -> InstructionsTask:
    """Load, render and tokenize the recipe's data for the model at `path`. Raises DataError or ConfigError."""
    data = _checked(recipe)
    task = without_data(path, recipe, [])
    keys = {"messages": ["messages"], "pairs": ["prompt", "input", "completion"], "text": ["text"]}[data.kind]
    raw = load_splits(data, recipe.seed, keys, task.format.check)
    for split, rows in raw.items():
        task.splits[split] = _encode_split(task, split, rows)
        if data.evaluate_generation and split != "train":
            task.asked[split] = _questions(task.format, split, rows)
    require_known_tokens(task.splits["train"], task.processor, recipe.model.name_or_path)
    if data.kind != "text":
        task.notes.append(_example(task.format, raw["train"][0]))
    return task


def without_data(path: str, recipe: Recipe, labels: list[str]) -> InstructionsTask:
    """The task for predicting. Raises ConfigError."""
    data, name = _checked(recipe), recipe.model.name_or_path
    chat = ChatFormat(data, load_tokenizer(path, recipe), name)
    return InstructionsTask(DatasetDict(), chat, data, name, recipe.metric or "loss", labels=labels)


def _checked(recipe: Recipe) -> InstructionsData:
    data = recipe.data
    assert isinstance(data, InstructionsData)
    if data.answer_pattern is not None:
        try:
            re.compile(data.answer_pattern)
        except re.error as error:
            raise ConfigError(
                f"data.answer_pattern is {data.answer_pattern!r}, which is no regular expression ({error})."
            ) from error
    if data.kind == "text":
        for key in ("packing", "evaluate_generation"):
            if getattr(data, key):
                why = "texts are joined into blocks anyway" if key == "packing" else "there are no answers"
                raise ConfigError(f"data.{key} is true, but data.kind is text: {why}. Set data.{key}=false.")
    if recipe.metric == "exact_match" and not data.evaluate_generation:
        raise ConfigError("metric is exact_match, which is scored only with data.evaluate_generation=true.")
    return data


def _encode_split(task: InstructionsTask, split: str, rows: Dataset) -> Dataset:
    """Tokenized rows; what was cut, left out or tokenized in parts is noted."""
    data, chat = task.data, task.format
    texts = [chat.encode(chat.parts(row, f"data.{split}, row {i}")) for i, row in enumerate(rows)]
    if data.kind == "text":
        texts = blocks(texts, data.max_length)
    kept = [text.cut(data.max_length) for text in texts]
    learnable = [text for text in kept if text.learned]
    counts = {
        f"cut to {data.max_length} tokens": sum(len(text.ids) > data.max_length for text in texts),
        "left out, because nothing to learn fits": len(kept) - len(learnable),
        "tokenized in parts, because a token would reach over their boundary": sum(text.merged for text in texts),
    }
    task.notes += [f"{count:,} of {len(texts):,} {split} rows {what}" for what, count in counts.items() if count]
    if not learnable:
        raise DataError(
            f"data.{split}: no row has anything to learn within data.max_length={data.max_length} tokens; the shortest "
            f"has {min(len(text.ids) for text in texts)}. Raise data.max_length."
        )
    if data.packing and split == "train":  # a loss is the same either way, and rows are easier to compare
        joined = Dataset.from_list(packed(learnable, data.max_length))
        task.notes.append(f"{len(learnable):,} training texts packed into {len(joined):,} rows")
        return joined
    return Dataset.from_list([{"input_ids": t.ids, "labels": t.labels, "length": len(t.ids)} for t in learnable])


def _questions(chat: ChatFormat, split: str, rows: Dataset) -> list[tuple[str, str]]:
    """(prompt, reference) of each row. Raises DataError for a reference without a final answer."""
    pairs = [(chat.prompt(row, f"data.{split}, row {i}"), chat.reference(row)) for i, row in enumerate(rows)]
    pattern = chat.data.answer_pattern
    bad = [i for i, (_, reference) in enumerate(pairs) if final_answer(reference, pattern) is None]
    if bad:
        raise DataError(
            f"data.{split}: data.answer_pattern {pattern!r} finds nothing in the reference of {len(bad)} of "
            f"{len(pairs)} rows, the first is row {bad[0]} ({pairs[bad[0]][1][-SHOWN:]!r}). Correct the pattern."
        )
    return pairs


def _example(chat: ChatFormat, row: Mapping[str, Any]) -> str:
    parts = chat.parts(row, "data.train, row 0")
    if len(parts) < 2:
        return f"first row {parts[0][0][:SHOWN]!r}"
    return f"first row {parts[0][0][-SHOWN:]!r} → {parts[1][0][:SHOWN]!r}"
