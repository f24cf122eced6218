"""The benchmarks run, count what they say, and write tables that do not change when written twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import __main__, counts, records, soak, start, step, study, table, tracer
from benchmarks.arms import COMPACT, EVEN, FISHER, FLOOR, INIT, LORA, OURS, PEFT_ADALORA, STAGES, Setting, trained
from benchmarks.models import SHAPES, Shape
from torch import Tensor, nn

from tiny import peft_warnings

TINY = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
MATRICES = {"minilm": 12, "bert-base": 12, "deberta-base": 12, "llama": 14}
SIDES = 4 * (16 + 16) + 2 * (16 + 24)  # out + in of the six matrices of one layer of TINY


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with peft_warnings():
        yield


def tiny(name: str = "minilm") -> Shape:
    extra = {"position_buckets": 8, "max_position_embeddings": 64} if name == "deberta-base" else {}
    return SHAPES[name].smaller(**TINY, **extra)


def environment() -> dict[str, Any]:
    versions = {"python": "3.11", "torch": "2", "peft": "0", "transformers": "5"}
    return {"cpu": "a CPU", "cores": 2, "gpu": None, **versions, "allocator": {"transparent huge pages": "madvise"}}


def cell(tokens: int = 2048, stage: str = "budget") -> dict[str, Any]:
    arms = {
        name: {"ms": 10.0, "floor": [1.0, 1.125, 1.25], "lora": [0.75, 0.875, 1.0], "trained": 4, "empty": 3}
        for name in STAGES[stage]
    }
    usual = {"device": "cpu", "dtype": "float32", "update": "fused", "environment": environment()}
    return {"shape": "minilm", "stage": stage, "tokens": tokens, "threads": 1, "dropout": 0.1, "arms": arms, **usual}


def test_the_tracer_counts_a_known_function_exactly() -> None:
    x, mask = torch.randn(4, 4), torch.eye(4, dtype=torch.bool)
    with tracer.tracing() as counted:
        x + x  # by nobody: no phase yet
        counted.enter("one")
        y = (x @ x.T).exp()  # a product, a power; the transpose is a view
        torch._foreach_mul_([y, y, y], 2.0)  # one call
        torch.empty(3)  # only memory
        counted.enter("two")
        float(y.sum())  # a sum; the read is an operator
        y.tolist(), y.numpy()  # two reads without one
        y[mask]  # the host must know how many
        y[mask] = 0.0  # a fill: it need not
        torch.tensor([1.0, 2.0])
        counted.enter(None)
        y + y
    assert counted.calls == {"one": 3, "two": 4}
    assert counted.syncs["one"] == 0
    assert counted.syncs["two"] == 4
    assert counted.lists["two"] == 2, "the 0.0 of the fill is made by the host too"
    assert torch.ones(2).tolist() == [1.0, 1.0]
    assert "tolist" not in vars(Tensor)


def test_the_optimizers_own_update_is_counted_apart_from_what_hooks_do() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=1.0, foreach=False)
    optimizer.register_step_pre_hook(lambda *_: [weight.detach().add(1) for _ in range(2)] and None)
    optimizer.register_step_post_hook(lambda *_: [weight.detach().add(1) for _ in range(3)] and None)
    weight.grad = torch.ones(3)
    with tracer.tracing() as counted, tracer.own_update_apart(optimizer, counted):
        counted.enter("bookkeeping")
        optimizer.step()
        counted.enter(None)
    assert counted.calls == {"bookkeeping": 5, "update": 1}


def test_bytes_saved_and_peak_bytes_of_a_known_function() -> None:
    weight, x = nn.Parameter(torch.randn(256, 256)), torch.randn(256, 256)
    size = weight.untyped_storage().nbytes()

    def forward() -> Tensor:
        return (x @ weight).exp().sigmoid().sum()

    # exp and sigmoid keep their results; x and the weight are there anyway.
    assert tracer.saved_bytes(forward, [weight, x]) == 2 * size
    assert tracer.saved_bytes(forward, [weight]) == 3 * size
    # exp's input and result; then exp's and sigmoid's results.
    assert 2 * size <= tracer.peak_bytes(forward, "cpu") < 2.1 * size


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_builds_with_equal_adapters_on_all_sides(name: str) -> None:
    setting = Setting(tiny(name), dropout=0.1)
    arms = {kind: build(setting) for kind, build in STAGES["budget"].items()}
    sizes = {kind: sum(p.numel() for p in trained(arm.model)) for kind, arm in arms.items()}
    assert sizes[OURS] == sizes[FISHER] == sizes[PEFT_ADALORA] == sizes[LORA] + INIT * MATRICES[name]
    assert sizes[FLOOR] > 0
    batch = setting.shape.batch(128 if name != "llama" else 256)
    losses = {kind: arm.loss(batch).item() for kind, arm in arms.items()}
    assert losses.pop(PEFT_ADALORA) > losses[FLOOR], "PEFT's AdaLoRA adds its regularizer to the loss"
    assert losses == pytest.approx(dict.fromkeys(losses, losses[FLOOR]), rel=1e-4), "adapters begin as the base model"


def test_a_batch_is_made_of_whole_sequences() -> None:
    assert SHAPES["minilm"].batch(2048)["input_ids"].shape == (32, 64)
    assert SHAPES["minilm"].batch(8192)["input_ids"].shape == (64, 128)
    assert SHAPES["llama"].batch(2048)["labels"].shape == (8, 256)
    with pytest.raises(ValueError, match="no whole number of sequences of 64"):
        SHAPES["minilm"].batch(100)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.slow
def test_a_round_of_every_arm_gives_paired_ratios(stage: str) -> None:
    record = step.measure(Setting(tiny()), 64, stage, rounds=3, threads=1)
    assert list(record["arms"]) == list(STAGES[stage])
    for row in record["arms"].values():
        assert 0 < row["floor"][0] <= row["floor"][1] <= row["floor"][2]
        assert 0 < row["lora"][0] <= row["lora"][1] <= row["lora"][2]
    assert record["arms"][FLOOR]["floor"] == record["arms"][LORA]["lora"] == [1.0, 1.0, 1.0]
    assert record["environment"] == records.environment()
    if stage == "compacted":
        lora, even = record["arms"][LORA]["trained"], record["arms"][EVEN]["trained"]
        assert lora == COMPACT * 2 * SIDES
        assert even == lora + COMPACT * MATRICES["minilm"]
        assert record["arms"][EVEN]["empty"] == 0


def test_every_arm_is_first_equally_often_and_has_changing_predecessors() -> None:
    orders = [step.order("abcd", turn) for turn in range(8)]
    assert all(sorted(names) == list("abcd") for names in orders)
    assert [names.index("a") for names in orders] == [0, 0, 2, 2, 0, 0, 2, 2]
    before = {names[names.index("c") - 1] for names in orders if names[0] != "c"}
    assert before == {"b", "d"}


@pytest.mark.slow
def test_a_cell_is_kept_only_if_it_answers_the_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step.json"
    setting = Setting(tiny())
    step.run(setting, 64, "budget", 1, rounds=2, again=False, out=out)
    first = out.read_text()
    step.run(setting, 64, "budget", 1, rounds=2, again=False, out=out)
    assert "known, kept" in capsys.readouterr().out
    assert out.read_text() == first
    step.run(setting, 128, "budget", 1, rounds=2, again=False, out=out)
    cells = records.load(out)
    assert sorted(c["tokens"] for c in cells.values()) == [64, 128]
    known = next(iter(cells.values()))
    assert step.is_known(known, "budget", "cpu", rounds=2)
    assert not step.is_known(known, "budget", "cpu", rounds=3)
    assert not step.is_known(known | {"environment": environment()}, "budget", "cpu", rounds=2)
    fewer = {arm: row for arm, row in known["arms"].items() if arm != FISHER}
    assert not step.is_known(known | {"arms": fewer}, "budget", "cpu", rounds=2)


@pytest.mark.slow
def test_counts_of_an_arm_add_up() -> None:
    setting = Setting(tiny())
    batch = setting.shape.batch(128)
    rows = {name: counts.examine(build, setting, batch) for name, build in STAGES["budget"].items()}
    for row in rows.values():
        assert row["total"] == sum(row["calls"][phase] for phase in counts.PHASES)
        assert row["peak"] == row["resident"] + row["temporary"]
        assert row["resident"] > 0 < row["temporary"]
    assert rows[FLOOR]["calls"]["bookkeeping"] == rows[LORA]["calls"]["bookkeeping"] == 0
    assert rows[LORA]["importance state"] == 0
    # One read of the threshold and one of the mask for each matrix; three averages of four bytes.
    assert rows[PEFT_ADALORA]["syncs"] == 1 + MATRICES["minilm"]
    assert rows[PEFT_ADALORA]["importance state"] >= 12 * rows[PEFT_ADALORA]["trained"]
    # Two moments of four bytes, and a step of four for each parameter tensor.
    assert rows[LORA]["optimizer state"] == 8 * rows[LORA]["trained"] + 4 * 2 * MATRICES["minilm"]


@pytest.mark.slow
def test_counts_do_not_wobble() -> None:
    setting = Setting(tiny())
    batch = setting.shape.batch(128)
    build = STAGES["budget"][OURS]
    assert counts.examine(build, setting, batch) == counts.examine(build, setting, batch)


def test_compaction_gives_back_memory() -> None:
    setting = Setting(tiny())
    arm, even = (STAGES["compacted"][name](setting) for name in (OURS, EVEN))
    full = STAGES["budget"][OURS](setting)
    before, after = (sum(p.numel() for p in trained(x.model)) for x in (full, even))
    assert after * INIT == before * COMPACT
    losses = [model.loss(setting.shape.batch(64)).item() for model in (arm, full)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_writing_the_tables_twice_changes_nothing() -> None:
    document = "# A\n<!-- bench:step -->\nold\n<!-- /bench:step -->\nend\n"
    cells = [cell(2048), cell(64, "compacted")]
    once = table.regenerate(document, "step", cells)
    assert table.regenerate(once, "step", cells) == once
    assert once.startswith("# A\n<!-- bench:step -->\n") and once.endswith("<!-- /bench:step -->\nend\n")
    assert "old" not in once
    assert "| minilm | 2,048 | 1 | 0.1 | 10 | 1.12 [1.00, 1.25] |" in once
    assert "| minilm | 64 | 1 | 0.1 | 3 | 10 | 1.12 [1.00, 1.25] |" in once
    assert once.count("Measured on a CPU, 2 cores; torch 2, peft 0, transformers 5, Python 3.11; allocator: ") == 1
    with pytest.raises(ValueError, match="no <!-- bench:counts -->"):
        table.regenerate(document, "counts", cells)
    assert "Not measured yet." in table.regenerate(document, "step", [])


def test_rows_are_sorted_by_number() -> None:
    found = sorted([cell(8192), cell(256), cell(2048), cell(256, "compacted")], key=table._place)
    assert [c["tokens"] for c in found] == [256, 2048, 8192, 256]


def test_the_document_has_every_table() -> None:
    document = table.DOCUMENT.read_text()
    for name in table.TABLES:
        document = table.regenerate(document, name, [])
    assert document.count("Not measured yet.") == 3


@pytest.mark.slow
def test_what_is_on_the_command_line_is_what_runs(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setitem(SHAPES, "minilm", tiny())
    monkeypatch.setattr(records, "store", lambda *_: pytest.fail("--quick stores nothing"))
    step.main(["--quick", "--tokens", "64", "--stage", "budget", "--dropout", "0.1"])
    assert "minilm/budget/64 tokens/1 threads/dropout 0.1/cpu float32 fused, 2 rounds" in capsys.readouterr().out


def test_what_make_bench_asks_for_can_be_asked() -> None:
    for choices in __main__.STEPS:
        asked = step._parser().parse_args([*choices.split(), "--again"])
        assert [asked.shape[0] in SHAPES, asked.again] == [True, True]
    assert all(counts._parser().parse_args(choices.split()).tokens for choices in __main__.COUNTS)


def test_allocator_settings_are_recorded() -> None:
    found = records.allocator_settings({"MALLOC_TOP_PAD_": "1", "LD_PRELOAD": "x.so", "HOME": "/"})
    assert found.items() >= {"MALLOC_TOP_PAD_": "1", "LD_PRELOAD": "x.so"}.items()
    assert "HOME" not in found


@pytest.mark.slow
def test_help_does_not_import_torch_and_the_record_is_json() -> None:
    assert start.help_imports_torch() is False
    assert 0 < start.import_seconds("import adalora") < 10
    row = {"import adalora": [1, 2, 3], "every public name": [1, 2, 3], "adalora --help": [1, 2, 3]}
    assert "| 2.0 [1.0, 3.0] | 2.0 [1.0, 3.0] | 2 [1, 3] | no |" in table.start_table(
        [row | {"help imports torch": False}]
    )
    assert json.loads(json.dumps(records.environment())) == records.environment()


def test_the_tables_of_a_study_follow_from_its_results_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "results.md"
    shutil.copyfile(study.DOCUMENT, copy)
    monkeypatch.setattr(study, "DOCUMENT", copy)
    study.main(["first-cut"])
    assert copy.read_text() == (records.RESULTS.parent.parent / "docs" / "results.md").read_text()


@pytest.mark.slow
def test_a_short_soak_is_on_budget_with_masks_as_stored() -> None:
    record = soak.soak(60, looks_wanted=3)
    assert record["allocations"] >= 58
    assert (record["off_budget"], record["drifted"], record["live_at_the_end"]) == (0, 0, 12)
    assert record["pattern_changes"] > 5
    assert not soak.leaks(record)


def test_a_soak_sees_an_object_kept_by_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Tensor] = []
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, **own: kept.append(value := randn(*size, **own)) or value)
    assert soak.leaks(soak.soak(240, looks_wanted=4))
