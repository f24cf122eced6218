"""One page for one run: curves, budget, ranks over time, tables. A single file that asks nothing of a network.

Everything comes from the run's own records, so that the page can be made again at any time. Colours follow the
reader's choice of light or dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .drawings import Points, heat_map, line_chart, table
from .errors import AdapterFileError
from .files import write_files
from .jsonfiles import believed, read_object, read_records
from .report import ModuleRank, RankReport, split_name

REPORT_FILE = "report.html"
SNAPSHOTS = 6  # heat maps over time


_STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --ink: #1d1d1b; --soft: #6a6963; --line: #d9d8d2; --panel: #f3f2ee;
  --s0: #1b6ac9; --s1: #b5440b; --s2: #1a7f4b; --s3: #8a3ab0; }
@media (prefers-color-scheme: dark) { :root { --page: #191918; --ink: #ececea; --soft: #a3a29b; --line: #3b3a37;
  --panel: #242422; --s0: #6ba8f5; --s1: #f08a55; --s2: #58c08a; --s3: #c68ae6; } }
body { background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
p.lead { color: var(--soft); margin-top: 0; }
dl.facts { display: flex; flex-wrap: wrap; gap: .8rem 2rem; margin: 1.2rem 0; }
dl.facts div { min-width: 7rem; } dl.facts dt { color: var(--soft); font-size: .85rem; }
dl.facts dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg .soft { fill: var(--soft); } svg .grid { stroke: var(--line); } svg .mark { stroke: var(--soft);
  stroke-dasharray: 4 3; } svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .dashed { stroke-dasharray: 6 4; }
svg circle.hit { fill: transparent; } svg circle.hit:hover { fill: var(--ink); fill-opacity: .25; }
.s0 { stroke: var(--s0); fill: var(--s0); } .s1 { stroke: var(--s1); fill: var(--s1); }
.s2 { stroke: var(--s2); fill: var(--s2); } .s3 { stroke: var(--s3); fill: var(--s3); }
svg polyline.s0, svg polyline.s1, svg polyline.s2, svg polyline.s3 { fill: none; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .85rem; margin: .3rem 0 0; padding: 0;
  list-style: none; } .key svg { display: inline-block; width: 1.4rem; height: .6rem; margin-right: .3rem; }
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem; }
figure { margin: 0; overflow-x: auto; } figcaption { font-size: .85rem; color: var(--soft); }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .15rem .8rem .15rem 0; border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; } details { margin: .4rem 0; } summary { cursor: pointer; color: var(--soft);
  font-size: .85rem; } pre { background: var(--panel); padding: .8rem; overflow-x: auto; font-size: .85rem; }
"""


def write_report(folder: Path) -> Path:
    """Write report.html into a run's folder from the records there; returns its path. Raises AdapterFileError."""
    if not (folder / "recipe.yaml").is_file():
        raise AdapterFileError(f"{str(folder)!r} holds no recipe.yaml; give the folder of a run that began to train.")
    with believed(folder):
        text = page(
            (folder / "recipe.yaml").read_text(encoding="utf-8"),
            read_object(folder / "result.json") if (folder / "result.json").is_file() else {},
            read_records(folder / "metrics.jsonl"),
            read_records(folder / "ranks.jsonl"),
            _costs(folder / "adapter" / "adapter_model.safetensors"),
            folder.name,
        )
    write_files(folder, {REPORT_FILE: lambda path: path.write_text(text, encoding="utf-8")})
    return folder / REPORT_FILE


def page(
    recipe: str,
    result: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    ranks: Sequence[Mapping[str, Any]],
    costs: Mapping[str, int],
    name: str,
) -> str:
    """The whole page. `metrics` and `ranks` are lines of the run's records, `costs` parameters of one triplet."""
    parts = [
        _head(name, result),
        _curves(metrics),
        _budget(metrics, ranks),
        _maps(ranks),
        _rank_table(ranks, costs),
        f"<h2>Configuration</h2><pre>{html.escape(recipe.strip())}</pre>",
        _environment(result),
    ]
    title = html.escape(f"{name}: adalora run")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body>\n{chr(10).join(part for part in parts if part)}\n</body></html>\n"
    )


def _head(name: str, result: Mapping[str, Any]) -> str:
    lead = [str(result[key]) for key in ("method", "task", "base") if key in result]
    facts: dict[str, str] = {}
    if result:
        score = result["scores"].get(result["metric"])
        facts[f"{result['metric']}, {result['split']} set"] = "–" if score is None else f"{score:.4f}"
        count = result["parameters"]
        facts |= {"adapter parameters": f"{count['final']:,}", "at the start": f"{count['peak']:,}"}
        facts |= {"in the head": f"{count['head']:,}", "steps": f"{result['steps']:,}"}
        facts |= {"training": f"{result['train_seconds']:,.0f} s"}
        if result.get("stopped"):
            facts["ended early"] = str(result["stopped"])
    else:
        lead.append("this run has not finished")
    tiles = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items())
    scores = {key: f"{value:.4f}" for key, value in result.get("scores", {}).items()}
    below = f"<h2>Scores</h2>{table(('metric', 'value'), list(scores.items()))}" if len(scores) > 1 else ""
    sentence = html.escape(" · ".join(lead))
    return f'<h1>{html.escape(name)}</h1><p class="lead">{sentence}</p><dl class="facts">{tiles}</dl>{below}'


def _curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Loss of training and validation together, then every other validation metric, then the learning rate."""
    loss = {"training loss": _series(metrics, "loss"), "validation loss": _series(metrics, "eval_loss")}
    charts = (
        [line_chart("Loss", {name: points for name, points in loss.items() if points})] if any(loss.values()) else []
    )
    names = dict.fromkeys(key for line in metrics for key in line if key.startswith("eval_") and _is_score(key))
    scores = {name.removeprefix("eval_"): _series(metrics, name) for name in names}
    small = {name: points for name, points in scores.items() if all(-1 <= y <= 1 for _, y in points)}
    if small:
        charts.append(line_chart("Validation metrics", small))
    charts += [line_chart(f"Validation {name}", {name: points}) for name, points in scores.items() if name not in small]
    if rate := _series(metrics, "learning_rate"):
        charts.append(line_chart("Learning rate", {"learning rate": rate}, zero=True))
    return f"<h2>Curves</h2>{''.join(charts)}" if charts else ""


def _budget(metrics: Sequence[Mapping[str, Any]], ranks: Sequence[Mapping[str, Any]]) -> str:
    if not ranks:
        return ""
    logged = _series(metrics, "adalora/budget")
    live = [(float(line["step"]), float(line.get("spent", sum(line["ranks"].values())))) for line in ranks]
    counted = all(cost == sum(line["ranks"].values()) for line, (_, cost) in zip(ranks, live, strict=True))
    series = {"budget of the schedule": logged, "live after an allocation": live}
    drawn = {name: points for name, points in series.items() if points}
    marks: dict[str, float] = {}
    for line in metrics:
        phase = line.get("adalora/phase")
        if phase in ("reduction", "final"):
            marks.setdefault(f"{phase} phase", float(line["step"]))
    return f"<h2>Budget</h2>{line_chart('Triplets' if counted else 'Parameters', drawn, zero=True, marks=marks)}"


def _maps(ranks: Sequence[Mapping[str, Any]]) -> str:
    if not ranks:
        return ""
    top = max(max(line["ranks"].values()) for line in ranks) or 1
    count = min(SNAPSHOTS, len(ranks))
    chosen = sorted({round(index * (len(ranks) - 1) / max(count - 1, 1)) for index in range(count)})
    small = [heat_map(_report(ranks[i]["ranks"]), f"after step {ranks[i]['step']:,}", top, False) for i in chosen[:-1]]
    final = heat_map(_report(ranks[-1]["ranks"]), f"final ranks, after step {ranks[-1]['step']:,}", top, True)
    over_time = f'<h3>How they got there</h3><div class="maps">{"".join(small)}</div>' if small else ""
    return f"<h2>Ranks</h2>{final}{over_time}"


def _rank_table(ranks: Sequence[Mapping[str, Any]], costs: Mapping[str, int]) -> str:
    if not ranks:
        return ""
    first, last = ranks[0]["ranks"], ranks[-1]["ranks"]
    rows = [
        (name, f"{first[name]}", f"{rank}", f"{rank * costs[name]:,}" if name in costs else "–")
        for name, rank in last.items()
    ]
    known = all(name in costs for name in last)
    total = f"{sum(rank * costs[name] for name, rank in last.items()):,}" if known else "–"
    rows.append(("total", f"{sum(first.values()):,}", f"{sum(last.values()):,}", total))
    ranked = table(("matrix", "after the first allocation", "rank", "parameters"), rows)
    return f"<details><summary>Rank of each of {len(last)} matrices</summary>{ranked}</details>"


def _environment(result: Mapping[str, Any]) -> str:
    known = {"scores", "parameters", "rows", "labels", "environment"}
    rows = {key: value for key, value in result.items() if key not in known}
    rows |= {f"{split} rows": f"{count:,}" for split, count in result.get("rows", {}).items()}
    rows |= {"classes": ", ".join(result["labels"])} if result.get("labels") else {}
    rows |= result.get("environment", {})
    if not rows:
        return ""
    return f"<h2>Record and environment</h2>{table(('what', 'value'), [(k, str(v)) for k, v in rows.items()])}"


def _series(metrics: Sequence[Mapping[str, Any]], key: str) -> Points:
    """(step, value) of one metric; where a resumed run went over a step again, its later value."""
    found = {float(line["step"]): line[key] for line in metrics if isinstance(line.get(key), int | float)}
    return sorted((x, float(y)) for x, y in found.items() if math.isfinite(y))


def _is_score(key: str) -> bool:
    return not key.endswith(("_loss", "_runtime", "_per_second", "_preparation_time"))


def _report(ranks: Mapping[str, int]) -> RankReport:
    rows = []
    for name, rank in ranks.items():
        layer, kind = split_name(name)
        rows.append(ModuleRank(name, layer, kind, rank, rank, 0))
    return RankReport(tuple(rows), 0)


def _costs(file: Path) -> dict[str, int]:
    """Parameters of one triplet of each matrix, from the header of the adapter's tensor file."""
    if not file.is_file():
        return {}
    costs: dict[str, int] = {}
    try:
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                name, _, part = key.removeprefix("base_model.model.").rpartition(".")
                if part in ("lora_A", "lora_B"):
                    costs[name] = costs.get(name, 1) + tensors.get_slice(key).get_shape()[part == "lora_A"]
    except SafetensorError as error:
        raise AdapterFileError(f"cannot read {str(file)!r}: {error}. It is damaged.") from error
    return costs
