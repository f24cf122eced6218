"""Summarization and other writing of a text from a text, by encoder-decoders and beam search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq, PreTrainedTokenizerBase, Trainer

from ..errors import ConfigError, DataError
from ..recipe import Recipe
from ..sections import METRICS, PairsData
from .data import describe_rows, load_splits, require_texts
from .ordered import OrderedSeq2SeqTrainer, without_metrics
from .pretrained import load_model, load_tokenizer, require_known_tokens
from .rouge import rouge

BATCH = 16  # texts at once, in `predict`
PROBED = 8  # rows in a probe

_INPUTS = ("input_ids", "attention_mask")


@dataclass
class PairsTask:
    """Tokenized pairs with the references that their texts are scored against."""

    splits: DatasetDict
    processor: PreTrainedTokenizerBase
    metric: str
    data: PairsData
    labels: list[str] = field(default_factory=list)
    model: nn.Module | None = None  # of which the collator asks how a target becomes the decoder's input
    task_type: ClassVar[str | None] = "SEQ_2_SEQ_LM"
    trainer_type: ClassVar[type[Trainer]] = OrderedSeq2SeqTrainer
    argument_options: ClassVar[Mapping[str, Any]] = {"predict_with_generate": True}

    @property
    def collator(self) -> DataCollatorForSeq2Seq:
        """Pads each batch to its own longest source and target, targets with -100."""
        return DataCollatorForSeq2Seq(self.processor, model=self.model)

    @property
    def trainer_options(self) -> Mapping[str, Any]:
        """Scores of the validation set at each evaluation."""
        return {"compute_metrics": lambda prediction: self._scores("validation", prediction.predictions)}

    @property
    def generation(self) -> dict[str, Any]:
        """How texts are written, as arguments of `generate`."""
        data = self.data
        options: dict[str, Any] = {
            "max_length": data.max_target_length + 1,  # with the token that every text starts from
            "min_length": 0,  # a checkpoint made for longer texts asks for more
            "num_beams": data.num_beams,
            "no_repeat_ngram_size": data.no_repeat_ngram_size,
        }
        options |= {"length_penalty": data.length_penalty} if data.num_beams > 1 else {}
        return options | _language(self.processor)

    def describe(self) -> str:
        """In words, e.g. `texts from texts, 8 beams; 64 train, 16 validation rows`."""
        beams = f"{self.data.num_beams} beams" if self.data.num_beams > 1 else "greedy"
        return f"texts from texts, {beams}; {describe_rows(self.splits)}"

    def build_model(self, path: str, recipe: Recipe) -> nn.Module:
        """The pre-trained model, which writes as the recipe says.

        Raises ConfigError for a checkpoint that lacks weights, that does not say what a text begins with, and for
        texts longer than it can take.
        """
        lengths = ("max_source_length", "max_target_length")
        model: Any = load_model(AutoModelForSeq2SeqLM, path, recipe, self.processor, lengths)
        settings = model.generation_config
        if settings.decoder_start_token_id is None and settings.bos_token_id is None:
            raise ConfigError(
                f"{recipe.model.name_or_path!r} has no decoder_start_token_id, so that no text can begin. Give it with "
                "model.config.decoder_start_token_id, or set it in the model's config.json."
            )
        settings.max_new_tokens = None  # a checkpoint's own would win
        for name, value in self.generation.items():
            setattr(settings, name, value)
        self.model = self.model or model  # a second one is for a comparison, and need not stay in memory
        return model

    def evaluate(self, trainer: Trainer, split: str) -> dict[str, float]:
        """ROUGE of the texts that the model writes, in percent; see `rouge`."""
        with without_metrics(trainer):
            prediction = trainer.predict(self.splits[split], metric_key_prefix=split)
        return self._scores(split, prediction.predictions)

    def probe(self, model: nn.Module, split: str) -> tuple[dict[str, Tensor], str]:
        """The first rows of a split with their targets, from which the decoder's inputs are made."""
        rows = self.splits[split].select(range(min(PROBED, len(self.splits[split]))))
        batch = self.collator([{name: row[name] for name in (*_INPUTS, "labels")} for row in rows])
        return dict(batch.to(next(model.parameters()).device)), "logits"

    def predict(self, model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """{"text": what the model writes} for each row's source. Raises DataError."""
        for i, row in enumerate(rows):
            source = row.get(self.data.source)
            if not isinstance(source, str) or not source.strip():
                raise DataError(f"row {i}: {self.data.source!r} is {source!r:.60}; it must hold a text.")
        model.eval()
        generator: Any = model
        device, texts = next(model.parameters()).device, []
        with torch.no_grad():
            for begin in range(0, len(rows), BATCH):
                sources = [row[self.data.source] for row in rows[begin : begin + BATCH]]
                encoded = _encode_sources(sources, self.data, self.processor)
                batch = self.processor.pad({name: encoded[name] for name in _INPUTS}, return_tensors="pt").to(device)
                texts += self._decode(generator.generate(**batch, **self.generation).cpu().numpy())
        return [{"text": text} for text in texts]

    def _decode(self, tokens: Any) -> list[str]:
        known = np.where(tokens < 0, self.processor.pad_token_id, tokens)  # batches of unequal length meet at -100
        return [text.strip() for text in self.processor.batch_decode(known, skip_special_tokens=True)]

    def _scores(self, split: str, predictions: Any) -> dict[str, float]:
        if not isinstance(predictions, np.ndarray) or predictions.ndim != 2:
            raise ConfigError(
                "the Trainer gave no written texts to score. Leave training.predict_with_generate at true and "
                "training.prediction_loss_only at false; to save time while training, set training.eval_strategy=no."
            )
        return rouge(self._decode(predictions), self.splits[split]["references"][:])


def build_task(path: str, recipe: Recipe) -> PairsTask:
    """Load and tokenize the recipe's data. Raises DataError, or ConfigError for model and tokenizer."""
    task = without_data(path, recipe, [])
    data, tokenizer = task.data, task.processor

    def check(split: str, rows: Dataset) -> None:
        require_texts(rows, [data.source], f"data.{split}")
        _require_targets(split, rows, data)

    raw = load_splits(data, recipe.seed, ("source", "target"), check)
    splits = DatasetDict({split: _tokenize(rows, data, tokenizer) for split, rows in raw.items()})
    require_known_tokens(splits["train"], tokenizer, recipe.model.name_or_path)
    task.splits = DatasetDict({s: rows if s == "train" else _longest_first(rows) for s, rows in splits.items()})
    return task


def without_data(path: str, recipe: Recipe, labels: list[str]) -> PairsTask:
    """The task for predicting only; there are no labels."""
    data = recipe.data
    assert isinstance(data, PairsData)
    tokenizer = load_tokenizer(path, recipe)
    _require_usable(tokenizer, recipe.model.name_or_path)
    return PairsTask(DatasetDict(), tokenizer, recipe.metric or METRICS[recipe.task][0], data, labels)


def _require_usable(tokenizer: Any, name: str) -> None:
    if getattr(tokenizer, "tgt_lang", "one language") is None:
        raise ConfigError(
            f"the tokenizer of {name!r} is for many languages and does not say which to write. Set src_lang and "
            "tgt_lang in its tokenizer_config.json."
        )
    ends = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    if tokenizer(text_target="a")["input_ids"][-1] not in ends:
        raise ConfigError(
            f"the tokenizer of {name!r} ends no target with a special token, so that the model would not learn where "
            "to stop. Use the tokenizer that came with an encoder-decoder such as BART or T5."
        )


def _language(tokenizer: Any) -> dict[str, int]:
    """How a tokenizer for many languages has a text begin with the code of its own: mBART by the token that starts
    the decoder, because its targets end with the code; mBART-50 and NLLB, whose targets begin with it, by force."""
    if getattr(tokenizer, "tgt_lang", None) is None:
        return {}
    code = tokenizer.convert_tokens_to_ids(tokenizer.tgt_lang)
    last = tokenizer(text_target="a")["input_ids"][-1]
    return {"decoder_start_token_id" if last == code else "forced_bos_token_id": code}


def _require_targets(split: str, rows: Dataset, data: PairsData) -> None:
    for i, target in enumerate(rows[data.target]):
        texts = _references(target)
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(
                f"data.{split}, row {i}: column {data.target!r} is {target!r:.60}; it must hold a text, or a list of "
                "texts of which the first is learnt and the best is scored against. Correct or remove such rows."
            )


def _longest_first(rows: Dataset) -> Dataset:
    # A search takes as long as the longest text of its batch, so texts of like length go together.
    lengths = rows["length"][:]
    return rows.select(sorted(range(len(rows)), key=lambda i: -lengths[i]))


def _references(target: Any) -> list[Any]:
    return target if isinstance(target, list) else [target]


def _encode_sources(texts: Sequence[str], data: PairsData, tokenizer: Any) -> dict[str, Any]:
    return dict(tokenizer([data.prefix + text for text in texts], truncation=True, max_length=data.max_source_length))


def _tokenize(rows: Dataset, data: PairsData, tokenizer: Any) -> Dataset:
    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = _encode_sources(batch[data.source], data, tokenizer)
        references = [_references(target) for target in batch[data.target]]
        targets = [texts[0] for texts in references]
        labels = tokenizer(text_target=targets, truncation=True, max_length=data.max_target_length)["input_ids"]
        columns = {name: encoded[name] for name in _INPUTS} | {"labels": labels, "references": references}
        return columns | {"length": [len(ids) for ids in encoded["input_ids"]]}

    return rows.map(encode, batched=True, remove_columns=rows.column_names, desc=None)
