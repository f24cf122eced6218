"""The `data` section of a recipe, one class for each task: where the rows are and what their columns are called."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Base of all sections: no unknown key passes."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class DataSection(Section):
    """Where the rows are: a hub data set by `name`, or local jsonl, csv, tsv or parquet files.

    With `name`, `train`, `validation` and `test` are split names; without, they are files. If there is no
    validation set, a tenth of the training set is held out. `*_rows` draw that many rows of a split by the recipe's
    seed, each class in its share.
    """

    name: str | None = None
    config: str | None = None
    train: str = "train"
    validation: str | None = None
    test: str | None = None
    train_rows: int | None = Field(None, ge=1)
    validation_rows: int | None = Field(None, ge=1)
    test_rows: int | None = Field(None, ge=1)


class ClassificationData(DataSection):
    """A text or a pair of texts with a class or a number."""

    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    kind: Literal["classes", "numbers"] | None = Field(
        None, description="what labels are; not given, numbers with a point are numbers, all else classes"
    )
    max_length: int = Field(128, ge=4)


class TokensData(DataSection):
    """Words with a tag each, such as B-PER, I-PER, O."""

    tokens: str = "tokens"
    tags: str = "tags"
    max_length: int = Field(256, ge=4)


class QuestionsData(DataSection):
    """Questions whose answer is a span of a context, as in SQuAD: answers = {text: [...], answer_start: [...]}."""

    id: str = "id"
    question: str = "question"
    context: str = "context"
    answers: str = "answers"
    no_answer: bool = Field(
        False, description="SQuAD v2.0: a question may have no answer, which gives answers.text = []"
    )
    max_length: int = Field(384, ge=16)
    stride: int = Field(128, ge=0, description="tokens that two windows of one context share")
    n_best: int = Field(20, ge=1)
    max_answer_length: int = Field(30, ge=1)


class PairsData(DataSection):
    """A source text and the text to write from it."""

    source: str = "source"
    target: str = "target"
    prefix: str = ""
    max_source_length: int = Field(768, ge=4)
    max_target_length: int = Field(64, ge=4)
    num_beams: int = Field(8, ge=1)
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = Field(0, ge=0)


class InstructionsData(DataSection):
    """Chat `messages`, or a prompt (with an optional `input`) and its completion; for `kind: text` plain texts."""

    kind: Literal["messages", "pairs", "text"] = "pairs"
    messages: str = "messages"
    prompt: str = "prompt"
    input: str | None = None
    completion: str = "completion"
    text: str = "text"
    chat_template: str | None = Field(None, description="Jinja template, or a file of one; not given, the tokenizer's")
    completion_only: bool = Field(True, description="no loss on the prompt")
    packing: bool = False
    answer_pattern: str | None = Field(None, description=r"regular expression of the final answer, e.g. '#### (.+)'")
    max_length: int = Field(1024, ge=8)
    max_new_tokens: int = Field(256, ge=1)
    evaluate_generation: bool = Field(False, description="also score exact match of the final answers")


class ImagesData(DataSection):
    """Images (files, bytes, or arrays of `datasets`) with a class. With `name: imagefolder`, `config` is the folder."""

    image: str = "image"
    label: str = "label"


# Metrics each task knows; the first is the one that counts where a recipe names none.
METRICS: dict[str, tuple[str, ...]] = {
    "classification": (
        "accuracy",
        "macro_f1",
        "f1",
        "matthews",
        "mean_accuracy_f1",
        "pearson",
        "spearman",
        "mean_pearson_spearman",
    ),
    "token-classification": ("f1", "precision", "recall", "accuracy"),
    "question-answering": ("f1", "exact_match"),
    "seq2seq": ("rouge2", "rouge1", "rougeL", "rougeLsum", "mean_rouge"),
    "causal-lm": ("loss", "perplexity", "exact_match"),
    "image-classification": ("accuracy", "macro_f1"),
}

DATA: dict[str, type[DataSection]] = {
    "classification": ClassificationData,
    "token-classification": TokensData,
    "question-answering": QuestionsData,
    "seq2seq": PairsData,
    "causal-lm": InstructionsData,
    "image-classification": ImagesData,
}
