"""The page of a run: one whole file, every number drawn where it belongs, the same in a real browser."""

import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from adalora.drawings import heat_map, line_chart, ticks
from adalora.errors import AdapterFileError
from adalora.htmlreport import SNAPSHOTS, page, write_report
from adalora.recipe import load_recipe
from adalora.report import ModuleRank, RankReport
from adalora.train import run
from folders import rows, save_bert, write

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Elements in order as (tag, attributes, text inside); fails on one that is closed wrongly."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, _, inside in self.open:
            inside.append(data)

    def all(self, tag: str, **attributes: str) -> list[tuple[dict[str, str | None], str]]:
        return [
            (found, "".join(inside))
            for name, found, inside in self.elements
            if name == tag and all(found.get(key) == value for key, value in attributes.items())
        ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("world")
    save_bert(world / "bert")
    train, test = write(world / "train.jsonl", rows(64)), write(world / "dev.jsonl", rows(16, seed=1))
    settings = [
        *(f"model.name_or_path={world / 'bert'}", f"data.train={train}", f"data.validation={test}"),
        *("training.per_device_train_batch_size=8", "training.logging_steps=2", "training.save_strategy='no'"),
    ]
    run(load_recipe("text-classification", settings), world / "out", Console(file=io.StringIO()))
    return world / "out"


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_leaves_its_page_and_the_page_can_be_made_anew(finished: Path) -> None:
    text = (finished / "report.html").read_text()
    (finished / "report.html").unlink()
    assert write_report(finished) == finished / "report.html"
    assert (finished / "report.html").read_text() == text


def test_the_page_is_well_formed_and_asks_for_nothing(finished: Path) -> None:
    text = (finished / "report.html").read_text()
    elements = Page(text).elements
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _, _ in elements}
    for _, attributes, _ in elements:
        assert not {"src", "href", "xlink:href", "srcset"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in text and "url(" not in text
    assert "http" not in re.sub(r"<pre>.*?</pre>", "", text, flags=re.S)
    assert 'lang="en"' in text and "<title>out: adalora run</title>" in text


def test_every_drawing_has_a_name_and_says_what_it_shows(finished: Path) -> None:
    drawn = Page((finished / "report.html").read_text()).all("svg", role="img")
    labels = [str(attributes["aria-label"]) for attributes, _ in drawn]
    assert [label.split(".")[0] for label in labels][:4] == ["Loss", "Validation metrics", "Learning rate", "Triplets"]
    assert sum("triplets in 12 matrices" in label for label in labels) == SNAPSHOTS
    assert len(set(labels)) == len(labels)


def test_every_logged_loss_is_a_point_of_the_curve(finished: Path) -> None:
    metrics = records(finished / "metrics.jsonl")
    losses = [line["loss"] for line in metrics if "loss" in line]
    found = Page((finished / "report.html").read_text())
    tips = [text for _, text in found.all("title") if text.startswith("training loss, step")]
    assert len(tips) == len(losses) > 10
    assert [float(tip.rpartition(" ")[2]) for tip in tips] == pytest.approx(losses, rel=1e-3)
    points = [str(attributes["points"]).split() for attributes, _ in found.all("polyline")]
    assert len(points[0]) == len(losses)


def test_budget_and_heat_maps_show_the_allocations(finished: Path) -> None:
    ranks = records(finished / "ranks.jsonl")
    found = Page((finished / "report.html").read_text())
    tips = [text for _, text in found.all("title")]
    live = [int(tip.rpartition(" ")[2]) for tip in tips if tip.startswith("live after an allocation")]
    assert live == [sum(line["ranks"].values()) for line in ranks]
    cells = [int(tip.rpartition(" ")[2]) for tip in tips if ": rank " in tip]
    assert len(cells) == 12 * SNAPSHOTS
    assert sum(cells[:12]) == live[-1]  # the final map comes first
    assert sum(cells[12:24]) == live[0]
    last = found.all("tr")[-1]
    total = next(text for _, text in found.all("tr") if text.startswith("total"))
    result = json.loads((finished / "result.json").read_text())
    assert f"{result['parameters']['final']:,}" in total and last


def test_scores_configuration_and_environment_are_there(finished: Path) -> None:
    found = Page((finished / "report.html").read_text())
    result = json.loads((finished / "result.json").read_text())
    assert found.all("pre")[0][1] == (finished / "recipe.yaml").read_text().strip()
    cells = [text for _, text in found.all("td")]
    for value in result["scores"].values():
        assert f"{value:.4f}" in cells
    assert {"torch", "python", str(result["environment"]["torch"])} <= set(cells)


def test_a_run_without_ranks_or_result_has_a_page_too(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"no recipe\.yaml"):
        write_report(tmp_path)
    (tmp_path / "recipe.yaml").write_text("method: {name: lora}\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 0.5}\n{"step": 20, "lo')  # killed while writing
    text = write_report(tmp_path).read_text()
    Page(text)
    assert "this run has not finished" in text and "Ranks" not in text and "training loss, step 10: 0.5" in text


def test_names_are_escaped() -> None:
    result = {
        **{"split": "test", "rows": {"test": 1}, "labels": ["<b>", "&"], "metric": "f1", "scores": {"f1": 1.0}},
        **{"parameters": {"peak": 1, "final": 1, "head": 0}, "steps": 1, "train_seconds": 1.0, "stopped": None},
    }
    ranks = [{"step": 1, "budget": 2, "ranks": {'a"<i>.0.b': 2}}]
    text = page("a: <script>", result, [{"step": 1, "loss": float("nan")}], ranks, {}, "<run>")
    found = Page(text)
    assert not {"script", "b", "i", "run"} & {tag for tag, _, _ in found.elements}


@pytest.mark.parametrize(
    "low,high,expected",
    [
        (0, 1, [0, 0.5, 1]),
        (0, 10, [0, 5, 10]),
        (0.31, 0.69, [0.3, 0.4, 0.5, 0.6, 0.7]),
        (3, 3, [0, 5]),
        (0, 0, [0, 1]),
        (-0.2, 0.2, [-0.2, -0.1, 0, 0.1, 0.2]),
    ],
)
def test_ticks_are_round_and_cover_the_range(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_points_lie_where_their_values_are() -> None:
    drawn = Page(line_chart("Loss", {"loss": [(0, 0.0), (50, 1.0), (100, 2.0)]}))
    points = [tuple(map(float, pair.split(","))) for pair in str(drawn.all("polyline")[0][0]["points"]).split()]
    assert points == [(64.0, 200.0), (344.0, 106.0), (624.0, 12.0)]


def test_a_fifth_curve_is_told_from_the_first_by_dashes() -> None:
    drawn = Page(line_chart("Scores", {f"m{i}": [(0, 0.1 * i), (1, 0.2 * i)] for i in range(6)}))
    styles = [str(attributes["class"]) for attributes, _ in drawn.all("polyline")]
    assert len(set(styles)) == 6 and styles[4] == "s0 dashed"
    assert [str(attributes["class"]) for attributes, _ in drawn.all("path")] == styles


def test_a_darker_cell_is_a_higher_rank() -> None:
    ranks = {"h.0.q": 0, "h.0.k": 4, "h.1.q": 8}
    report = RankReport(tuple(ModuleRank(n, int(n[2]), f"h.*.{n[-1]}", r, 8, 0) for n, r in ranks.items()), 0)
    cells = Page(heat_map(report, "ranks", 8, True)).all("rect")
    shades = [sum(bytes.fromhex(str(attributes["fill"])[1:])) for attributes, _ in cells]
    assert [text for _, text in cells] == ["q of layer 0: rank 0", "q of layer 1: rank 8", "k of layer 0: rank 4"]
    assert shades[0] > shades[2] > shades[1]


_PROBE = """<script>addEventListener("load", () => { document.title = JSON.stringify({
  drawings: [...document.querySelectorAll("svg[role=img]")].map(s => s.getBoundingClientRect())
    .map(b => [b.width, b.height]),
  outside: [...document.querySelectorAll("svg[role=img]")].filter(s => [...s.querySelectorAll("polyline, rect, text")]
    .some(e => { const b = e.getBBox(), v = s.viewBox.baseVal;
                 return b.x < -1 || b.y < -1 || b.x + b.width > v.width + 1 || b.y + b.height > v.height + 1 })).length,
  wider: document.documentElement.scrollWidth > innerWidth,
  fetched: performance.getEntriesByType("resource").length,
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  page: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color }) })</script>"""


def in_chromium(file: Path, *options: str) -> dict[str, Any]:
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        *options,
        "--dump-dom",
    ]
    done = subprocess.run([*command, file.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(found.group(1).replace("&amp;", "&"))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [400, 1200])
def test_a_real_browser_draws_it_light_and_dark(width: int, finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "probe.html"
    file.write_text((finished / "report.html").read_text().replace("</body>", _PROBE + "</body>"))
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    light = in_chromium(file, profile, f"--window-size={width},900")
    dark = in_chromium(file, profile, f"--window-size={width},900", "--force-dark-mode")
    assert (light["dark"], dark["dark"]) == (False, True)
    for seen in (light, dark):
        assert len(seen["drawings"]) == 4 + SNAPSHOTS
        assert all(w > 100 and h > 50 for w, h in seen["drawings"])
        assert seen["outside"] == 0 and not seen["wider"] and seen["fetched"] == 0
    assert brightness(light["page"]) > 200 > 60 > brightness(light["ink"])
    assert brightness(dark["page"]) < 60 < 200 < brightness(dark["ink"])


def brightness(color: str) -> float:
    return sum(map(int, re.findall(r"\d+", color)[:3])) / 3
