"""The model card of a run: what it is, how it was made, what it scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from .methods.base import ParameterCount
from .recipe import Recipe
from .report import RankReport
from .sections import ClassificationData, InstructionsData, PairsData, QuestionsData, TokensData

# Methods by who reads their folders; all others are LoRA by PEFT.
_ADALORA = ("adalora", "svd-lora", "peft-adalora")
_OWN = ("full", "bitfit", "houlsby", "pfeiffer")

# Of each task: the hub's name for it, and the classes that load model and processor.
_KINDS = {
    "classification": ("text-classification", "AutoModelForSequenceClassification", "AutoTokenizer"),
    "token-classification": ("token-classification", "AutoModelForTokenClassification", "AutoTokenizer"),
    "question-answering": ("question-answering", "AutoModelForQuestionAnswering", "AutoTokenizer"),
    "seq2seq": ("summarization", "AutoModelForSeq2SeqLM", "AutoTokenizer"),
    "causal-lm": ("text-generation", "AutoModelForCausalLM", "AutoTokenizer"),
    "image-classification": ("image-classification", "AutoModelForImageClassification", "AutoImageProcessor"),
}


@dataclass(frozen=True)
class CardFacts:
    """What a run found out: `base` is the base model's hub name or folder, `rows` the size of each split."""

    base: str
    labels: list[str]
    rows: Mapping[str, int]
    split: str
    scores: Mapping[str, float]
    count: ParameterCount
    steps: int
    stopped: str | None


def model_card(recipe: Recipe, facts: CardFacts, report: RankReport | None) -> str:
    """Markdown with the hub's metadata in front."""
    method = str(recipe.method["name"])
    title = Path(facts.base).name if _is_local(facts.base) else facts.base
    parts = [
        _front_matter(method, facts.base, recipe.task),
        [f"# {title} adapted with {method}", ""],
        _what_it_is(recipe, facts),
        _scores(facts),
        [] if report is None else ["## Where the ranks went", "", *_fenced("", report.heatmap(color=False))],
        ["## Load it", "", "In this folder:", "", *_fenced("python", loading_code(recipe, facts))],
        ["## Run it again", "", "`adalora train recipe.yaml`, with the recipe in this folder:", ""],
        _fenced("yaml", recipe.dump().strip()),
    ]
    return "\n".join(line for part in parts for line in part).rstrip() + "\n"


def loading_code(recipe: Recipe, facts: CardFacts) -> str:
    """A complete program that loads the adapter in ./adapter and uses it on one input."""
    name = recipe.method["name"]
    _, auto, processor = _KINDS[recipe.task]
    classes = sorted({auto, processor, *(["AutoConfig"] if recipe.model.config else [])})
    first, load = "import peft", 'peft.PeftModel.from_pretrained(base, "adapter")'
    if name in _ADALORA:
        first, load = "import adalora", 'adalora.load_adapter(base, "adapter")'
    elif name in _OWN:
        first, load = "from pathlib import Path\n", f'build_method({{"name": "{name}"}}).load(base, Path("adapter"))'
    return "\n".join(
        [
            first,
            "import torch",
            *(["from PIL import Image"] if recipe.task == "image-classification" else []),
            f"from transformers import {', '.join(classes)}",
            *(["", "from adalora.methods import build_method"] if name in _OWN else []),
            "",
            *_base_code(recipe, facts, auto),
            f"model = {load}.eval()",
            f'{processor.removeprefix("Auto").lower()} = {processor}.from_pretrained("adapter")',
            *_usage(recipe, facts),
        ]
    )


def _base_code(recipe: Recipe, facts: CardFacts, auto: str) -> list[str]:
    """Lines that load the base model as `base`."""
    options = []
    if "classification" in recipe.task:
        names = facts.labels or ["score"]
        options += [f"num_labels={len(names)}", f"id2label={dict(enumerate(names))!r}"]
        options += [] if facts.labels else ['problem_type="regression"']
    if not _is_local(facts.base) and recipe.model.revision:
        options.append(f"revision={recipe.model.revision!r}")
    if recipe.model.trust_remote_code:
        options.append("trust_remote_code=True")
    call = [f"    {', '.join([repr(facts.base), *options])}", ")"]
    if not recipe.model.config:
        return [f"base = {auto}.from_pretrained(", *call]
    changed = f"vars(config).update({recipe.model.config!r})"
    return [
        "config = AutoConfig.from_pretrained(",
        *call,
        changed,
        f"base = {auto}.from_pretrained({facts.base!r}, config=config)",
    ]


def _usage(recipe: Recipe, facts: CardFacts) -> list[str]:
    """Lines that put one input in and print what comes out."""
    data = recipe.data
    if isinstance(data, QuestionsData):
        return [
            'batch = tokenizer("a question", "the context with its answer", return_tensors="pt")',
            "with torch.no_grad():",
            "    output = model(**batch)",
            "start, end = int(output.start_logits.argmax()), int(output.end_logits.argmax())",
            'print(tokenizer.decode(batch["input_ids"][0, start : end + 1]))',
        ]
    if isinstance(data, PairsData | InstructionsData):
        text = data.prefix + "one text" if isinstance(data, PairsData) else "one prompt, as the recipe renders it"
        limit = data.max_target_length if isinstance(data, PairsData) else data.max_new_tokens
        beams = f"num_beams={data.num_beams}, " if isinstance(data, PairsData) else ""
        return [
            f'batch = tokenizer({text!r}, return_tensors="pt")',
            "with torch.no_grad():",
            f"    ids = model.generate(**batch, {beams}max_new_tokens={limit})",
            "print(tokenizer.decode(ids[0], skip_special_tokens=True))",
        ]
    if isinstance(data, TokensData):
        return [
            'batch = tokenizer(["some", "words"], is_split_into_words=True, return_tensors="pt")',
            "with torch.no_grad():",
            "    best = model(**batch).logits[0].argmax(-1)",
            "print([(token, model.config.id2label[int(i)]) for token, i in zip(batch.tokens(), best)])",
        ]
    source = 'imageprocessor(Image.open("image.png"), return_tensors="pt")'
    if isinstance(data, ClassificationData):
        texts = '"one text", "another"' if data.text_pair else '"one text"'
        source = f'tokenizer({texts}, return_tensors="pt")'
    answer = "model.config.id2label[int(logits.argmax())]" if facts.labels else "float(logits)"
    return ["with torch.no_grad():", f"    logits = model(**{source}).logits", f"print({answer})"]


def _front_matter(method: str, base: str, task: str) -> list[str]:
    pipeline = _KINDS[task][0]
    library = "transformers" if method == "full" else "adalora" if method in _OWN else "peft"
    tags = [method, "parameter-efficient-fine-tuning", pipeline]
    front = {"library_name": library, "tags": tags, "pipeline_tag": pipeline}
    if not _is_local(base):  # the hub refuses a card whose base_model is no hub name
        front = {"base_model": base, **front}
    return ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", ""]


def _what_it_is(recipe: Recipe, facts: CardFacts) -> list[str]:
    count = facts.count
    size = f"{count.final:,} adapter parameters (at most {count.peak:,} while training) and {count.head:,} in the head."
    kind = f"Task: {recipe.task}."
    if facts.labels:
        kind = f"{len(facts.labels)} classes: {', '.join(facts.labels)}."
    elif recipe.task == "classification":
        kind = "It predicts one number."
    rows = ", ".join(f"{number:,} {split}" for split, number in facts.rows.items())
    end = f"stopped early: {facts.stopped}" if facts.stopped else "the whole run"
    return [size, "", kind, "", f"Rows: {rows}. {facts.steps:,} steps, {end}.", ""]


def _scores(facts: CardFacts) -> list[str]:
    rows = [f"| {name} | {value:.4f} |" for name, value in facts.scores.items()]
    return [f"| {facts.split} set, {facts.rows[facts.split]:,} rows | value |", "|---|---|", *rows, ""]


def _fenced(language: str, text: str) -> list[str]:
    return [f"```{language}", text, "```", ""]


def _is_local(base: str) -> bool:
    return Path(base).exists()
