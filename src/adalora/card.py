"""The model card of a run: what it is, how it was made, what it scored."""

from __future__ import annotations

import yaml

from .methods.base import ParameterCount
from .recipe import Recipe
from .report import RankReport


def model_card(
    recipe: Recipe, base: str, scores: dict[str, float], count: ParameterCount, report: RankReport | None
) -> str:
    """Markdown with the hub's metadata in front; `base` is the name of the base model on the hub."""
    method = str(recipe.method["name"])
    tags = [method, "parameter-efficient-fine-tuning", "text-classification"]
    front = {"base_model": base, "library_name": "peft", "tags": tags, "pipeline_tag": "text-classification"}
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {base} adapted with {method}",
        "",
        f"{count.final:,} adapter parameters (at most {count.peak:,} while training) and {count.head:,} in the head.",
        "",
        "| metric | value |",
        "|---|---|",
        *(f"| {name} | {value:.4f} |" for name, value in scores.items()),
        "",
    ]
    if report is not None:
        lines += ["## Where the ranks went", "", "```", report.heatmap(color=False), "```", ""]
    lines += [
        "## Run it again",
        "",
        "`adalora train recipe.yaml`, with the recipe in this folder:",
        "",
        "```yaml",
        recipe.dump().strip(),
        "```",
        "",
        "## Load it",
        "",
        "```python",
        "import adalora",
        'adalora.load_adapter(base_model, "adapter")   # or peft.PeftModel.from_pretrained'
        if method == "adalora"
        else 'peft.PeftModel.from_pretrained(base_model, "adapter")',
        "```",
    ]
    return "\n".join(lines) + "\n"
