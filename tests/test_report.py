"""The report: where the budget went, counted anew from the tensors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from torch import nn

from adalora import inject, rank_report
from adalora.errors import InjectionError
from adalora.injection import named_adapters
from adalora.integrations.plots import save_budget_curve, save_heatmap
from adalora.report import ModuleRank, RankReport, short_labels, split_name
from adalora.schedule import Schedule
from tiny import adapted, bert, gpt2, net, pair


def bart() -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 16, "max_position_embeddings": 16}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 24}
    return transformers.BartModel(transformers.BartConfig(**sizes))


@pytest.mark.parametrize("build", [bert, gpt2, net, bart])
def test_parameters_are_those_of_the_live_rows_counted_one_by_one(build: Any) -> None:
    choices = {"target_modules": "embed|conv|grouped|line|linear"} if build is net else {}
    model = adapted(build(), [2, 0, 4, 1], **choices)
    report, parameters, capacity = rank_report(model), 0, 0
    for name, module in named_adapters(model):
        rank = sum(bool(value != 0) for value in module.lora_E.flatten())
        assert report.ranks[name] == rank
        for index, alive in enumerate(module.lora_keep):
            row = module.lora_A[index].numel() + module.lora_E[index].numel() + module.lora_B[:, index].numel()
            parameters += row if alive else 0
        capacity += sum(getattr(module, part).numel() for part in ("lora_A", "lora_E", "lora_B"))
    assert (report.parameters, report.capacity_parameters) == (parameters, capacity)
    assert report.total_rank == sum(report.ranks.values()) == sum(row.rank for row in report.rows)
    assert {0, 1, 2, 4} == set(report.ranks.values())


def test_rows_say_name_layer_kind_rank_capacity_and_parameters() -> None:
    report = rank_report(adapted(bert(), [3], target_modules=["query"]))
    kind = "bert.encoder.layer.*.attention.self.query"
    assert report.rows == tuple(
        ModuleRank(kind.replace("*", str(layer)), layer, kind, 3, 4, 3 * (16 + 16 + 1)) for layer in (0, 1)
    )


def test_the_table_has_a_line_for_each_matrix_and_the_totals() -> None:
    lines = rank_report(adapted(bert(), [3, 0], target_modules=["query", "value"])).table().splitlines()
    assert len(lines) == 1 + 4 + 1
    assert lines[0].split() == ["module", "rank", "capacity", "parameters"]
    assert lines[1].split() == ["bert.encoder.layer.0.attention.self.query", "3", "4", "99"]
    assert lines[2].split() == ["bert.encoder.layer.0.attention.self.value", "0", "4", "0"]
    assert lines[-1].split() == ["total", "6", "16", "198"]
    assert len({len(line) for line in lines}) == 1


def test_the_grid_has_kinds_down_and_layers_across() -> None:
    report = rank_report(adapted(bert(), [1, 2, 3], target_modules=["query", "value", "pooler.dense"]))
    kinds, layers, ranks = report.grid()
    stem = "bert.encoder.layer.*.attention.self"
    assert kinds == [f"{stem}.query", f"{stem}.value", "bert.pooler.dense"]
    assert layers == [0, 1, None]
    assert ranks == [[1, 3, None], [2, 1, None], [None, None, 2]]


LABELS = {
    "bert": (bert, ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]),
    "gpt2": (gpt2, ["attn.c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_are_short_and_unique(case: str) -> None:
    build, wanted = LABELS[case]
    kinds = rank_report(adapted(build())).grid()[0]
    labels = short_labels(kinds)
    assert len(set(labels)) == len(labels)
    assert all(kind.endswith(label) for kind, label in zip(kinds, labels, strict=True))
    assert {label.rpartition(".")[2] for label in wanted} <= {label.rpartition(".")[2] for label in labels}
    assert max(map(len, labels)) <= 22


def test_labels_of_an_encoder_and_a_decoder_differ() -> None:
    kinds, layers, ranks = rank_report(adapted(bart())).grid()
    labels = short_labels(kinds)
    assert len(kinds) == len(set(labels)) == 6 + 10
    assert layers == [0, 1]
    assert all(None not in row for row in ranks)
    assert sum(kind.startswith("encoder.") for kind in kinds) == 6


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("encoder.layer.11.query", 11, "encoder.layer.*.query"),
        ("h.0.mlp.experts.3.up", 0, "h.*.mlp.experts.3.up"),
        ("3", None, "3"),
        ("3.up", 3, "*.up"),
        ("layer1.conv2", None, "layer1.conv2"),
        ("head", None, "head"),
        ("blocks.2", 2, "blocks.*"),
    ],
)
def test_the_layer_is_the_first_number_that_stands_alone(name: str, layer: int | None, kind: str) -> None:
    assert split_name(name) == (layer, kind)


def test_labels_of_kinds_that_end_alike_are_as_long_as_needed_and_no_longer() -> None:
    assert short_labels(["a.q", "b.q", "a.k"]) == ["a.q", "b.q", "k"]
    assert short_labels(["q", "b.q"]) == ["q", "b.q"]
    assert short_labels(["x.*.fc", "y.*.fc"]) == ["x.*.fc", "y.*.fc"]
    assert short_labels(["*.fc", "layer.*.up"]) == ["fc", "up"]
    assert short_labels(["blocks.*", "head"]) == ["blocks.*", "head"]
    assert short_labels(["layer.*.attention.output.dense", "layer.*.output.dense"]) == [
        "attention.output.dense",
        "output.dense",
    ]
    assert short_labels([]) == []


def test_the_heat_map_without_colour_is_plain_aligned_text() -> None:
    text = rank_report(adapted(bert(), [1, 2, 3], target_modules=["query", "value", "pooler.dense"])).heatmap(
        color=False
    )
    assert "\x1b" not in text
    lines = text.splitlines()
    assert [line.split() for line in lines] == [
        ["layer", "0", "1", "–"],
        ["query", "1", "3"],
        ["value", "2", "1"],
        ["dense", "2"],
    ]
    assert {len(line) for line in lines} == {len(lines[0])}


@pytest.mark.parametrize("build", [bert, gpt2, bart])
def test_the_heat_map_in_colour_has_one_coloured_cell_for_each_matrix(build: Any) -> None:
    report = rank_report(adapted(build(), [0, 1, 2, 4]))
    text = report.heatmap()
    cells = re.findall(r"\x1b\[48;5;(\d+)m\x1b\[38;5;(\d+)m +(\d+)\x1b\[0m", text)
    assert len(cells) == len(report.rows) == text.count("\x1b[0m")
    assert sorted(int(rank) for _, _, rank in cells) == sorted(report.ranks.values())
    shades = {int(rank): background for background, _, rank in cells}
    assert len(set(shades.values())) == 4  # ranks 0, 1, 2 and 4 can be told apart
    assert re.sub(r"\x1b\[[\d;]+m", "", text) == report.heatmap(color=False)


def test_names_without_numbers_and_wide_numbers_are_shown() -> None:
    report = rank_report(adapted(pair(), [1, 4]))
    assert report.grid() == (["first", "second"], [None], [[1], [4]])
    assert [line.split() for line in report.heatmap(color=False).splitlines()] == [
        ["layer", "–"],
        ["first", "1"],
        ["second", "4"],
    ]


def test_many_layers_and_wide_ranks_stay_apart() -> None:
    rows = tuple(ModuleRank(f"l.{i}.q", i, "l.*.q", 1000 + i, 1200, 1) for i in (2, 10, 120))
    lines = RankReport(rows, 3).heatmap(color=False).splitlines()
    assert [line.split() for line in lines] == [["layer", "2", "10", "120"], ["q", "1002", "1010", "1120"]]
    assert RankReport(rows, 3).grid()[1] == [2, 10, 120]


@given(layers=st.integers(1, 130), rank=st.sampled_from([1, 12, 1500]), label=st.integers(1, 40))
def test_every_layer_is_in_one_block_and_no_line_exceeds_100_columns(layers: int, rank: int, label: int) -> None:
    rows = tuple(ModuleRank(f"l.{i}.{'q' * label}", i, f"l.*.{'q' * label}", rank, rank, 1) for i in range(layers))
    blocks = RankReport(rows, 3).heatmap(color=False).split("\n\n")
    assert max(len(line) for block in blocks for line in block.splitlines()) <= 100
    heads, values = zip(*(block.splitlines() for block in blocks), strict=True)
    assert [int(word) for head in heads for word in head.split()[1:]] == list(range(layers))
    assert [word for line in values for word in line.split()[1:]] == [str(rank)] * layers
    assert layers > 10 or len(blocks) == 1


def test_modules_that_are_named_by_a_number_alone_keep_their_own_rows() -> None:
    model = inject(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    assert rank_report(model).grid()[:2] == (["0", "2"], [None])


@pytest.mark.parametrize("count", [1, 30])
def test_the_picture_is_wide_enough_for_its_title(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[tuple[float, float]] = []
    save = Figure.savefig

    def measured(self: Figure, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        box = self.axes[0].title.get_window_extent()
        titles.append((box.x0, self.bbox.width - box.x1))

    monkeypatch.setattr(Figure, "savefig", measured)
    rows = tuple(ModuleRank(f"l.{i}.q", i, "l.*.q", 4, 4, 1) for i in range(count))
    save_heatmap(RankReport(rows, 3), tmp_path / "ranks.png")
    assert min(titles[0]) >= 0


def test_the_budget_curve_ends_at_the_last_step_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    save_budget_curve(Schedule(96, 48, 10, 38, 1, 96), [(11, 95), (20, 70)], 21, tmp_path / "budget.png")
    budget, live, *phases = figures[0].axes[0].lines
    assert list(budget.get_xdata()) == list(range(21)) and list(live.get_xdata()) == [11, 20]
    assert [line.get_xdata()[0] for line in phases] == [10]


def test_a_wrapped_model_gives_the_same_report() -> None:
    model = adapted(pair(), [1, 3])
    assert rank_report(nn.ModuleDict({"module": model})) == rank_report(model)


def test_a_model_without_adapter_is_refused() -> None:
    with pytest.raises(InjectionError, match=r"adalora\.inject"):
        rank_report(pair())


def test_before_training_every_rank_is_the_capacity() -> None:
    report = rank_report(inject(pair()))
    assert report.ranks == {"first": 12, "second": 12}
    assert report.parameters == report.capacity_parameters == 12 * (6 + 5 + 1) + 12 * (5 + 4 + 1)
