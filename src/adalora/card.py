"""The model card of a run: what it is, how it was made, what it scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from .methods.base import ParameterCount
from .recipe import Recipe
from .report import RankReport


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
        _front_matter(method, facts.base),
        [f"# {title} adapted with {method}", ""],
        _what_it_is(facts),
        _scores(facts),
        [] if report is None else ["## Where the ranks went", "", *_fenced("", report.heatmap(color=False))],
        ["## Load it", "", "In this folder:", "", *_fenced("python", loading_code(recipe, facts))],
        ["## Run it again", "", "`adalora train recipe.yaml`, with the recipe in this folder:", ""],
        _fenced("yaml", recipe.dump().strip()),
    ]
    return "\n".join(line for part in parts for line in part).rstrip() + "\n"


def loading_code(recipe: Recipe, facts: CardFacts) -> str:
    """A complete program that loads the adapter in ./adapter and classifies one text."""
    ours = recipe.method["name"] == "adalora"
    names = facts.labels or ["score"]
    options = [f"num_labels={len(names)}", f"id2label={dict(enumerate(names))!r}"]
    options += [] if facts.labels else ['problem_type="regression"']
    if not _is_local(facts.base) and recipe.model.revision:
        options.append(f"revision={recipe.model.revision!r}")
    if recipe.model.trust_remote_code:
        options.append("trust_remote_code=True")
    load = "adalora.load_adapter" if ours else "peft.PeftModel.from_pretrained"
    texts = '"one text", "another"' if recipe.data.text_pair else '"one text"'
    answer = "model.config.id2label[int(logits.argmax())]" if facts.labels else "float(logits)"
    return "\n".join(
        [
            *(["import adalora"] if ours else ["import peft"]),
            "import torch",
            "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
            "",
            "base = AutoModelForSequenceClassification.from_pretrained(",
            f"    {facts.base!r}, {', '.join(options)}",
            ")",
            f'model = {load}(base, "adapter").eval()',
            'tokenizer = AutoTokenizer.from_pretrained("adapter")',
            "with torch.no_grad():",
            f'    logits = model(**tokenizer({texts}, return_tensors="pt")).logits',
            f"print({answer})",
        ]
    )


def _front_matter(method: str, base: str) -> list[str]:
    tags = [method, "parameter-efficient-fine-tuning", "text-classification"]
    front = {"library_name": "peft", "tags": tags, "pipeline_tag": "text-classification"}
    if not _is_local(base):  # the hub refuses a card whose base_model is no hub name
        front = {"base_model": base, **front}
    return ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", ""]


def _what_it_is(facts: CardFacts) -> list[str]:
    count = facts.count
    size = f"{count.final:,} adapter parameters (at most {count.peak:,} while training) and {count.head:,} in the head."
    kind = f"{len(facts.labels)} classes: {', '.join(facts.labels)}." if facts.labels else "It predicts one number."
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
