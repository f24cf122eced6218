"""A start from data that the configuration asks for: in a Trainer of itself, in other loops by one call, once."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import adalora
import tiny
from adalora.errors import TrainingError
from adalora.injection import named_adapters
from adalora.integrations.starting import START_STEPS, describe_start, start_from_rows_
from adalora.integrations.transformers import AdaLoraCallback
from adalora.pending import pending_start
from adalora.start import activation_start_, gradient_start_
from tiny import labelled_rows as rows

STEPS = 12


def config(start: str, **settings: Any) -> adalora.AdaLoraConfig:
    given = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 4, "deltaT": 2, "lora_alpha": 8} | settings
    return adalora.AdaLoraConfig(init_lora_weights=start, **given)


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}


def adapted(start: str, **settings: Any) -> nn.Module:
    return adalora.inject(tiny.pair(), config(start, target_modules=["first", "second"], **settings))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :4].sin()).square().mean()


@pytest.mark.parametrize("start", ["gradient", "activation"])
def test_until_it_is_made_the_adapter_is_orthonormal_and_the_first_step_is_refused(start: str) -> None:
    model, x = adapted(start), torch.randn(8, 6)
    assert torch.equal(model(x), tiny.pair()(x))
    for _, module in named_adapters(model):
        torch.testing.assert_close(module.lora_A @ module.lora_A.T, torch.eye(4), atol=1e-6, rtol=0)
    optimizer = torch.optim.AdamW(adalora.adapter_parameters(model), lr=0.1)
    adalora.RankAllocator(model, total_step=10).attach(optimizer)
    loss_of(model, x).backward()
    before = factors(model)
    with pytest.raises(TrainingError, match=rf"{start}' asks for .* Call adalora\.start\.{start}_start_\(model, batch"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in factors(model).items())
    other, own = (gradient_start_, activation_start_)[:: 1 if start == "activation" else -1]
    other(model, [x], loss_of)  # not the one that was asked for
    with pytest.raises(TrainingError, match=f"init_lora_weights='{start}'"):
        optimizer.step()
    own(model, [x], loss_of)
    assert torch.equal(model(x), tiny.pair()(x))  # Λ = 0 still, so ΔW = 0
    optimizer.step()
    assert any(module.lora_E.any() for _, module in named_adapters(model))


def test_an_adapter_that_was_loaded_needs_no_start_and_ejection_forgets_it(tmp_path: Path) -> None:
    model, x = adapted("gradient"), torch.randn(8, 6)
    gradient_start_(model, [x], loss_of)
    state = model.state_dict()  # with Λ = 0, as right before the first step
    again = adapted("gradient")
    assert pending_start(again) == "gradient"
    again.load_state_dict(state)
    assert pending_start(again) is None
    trained = tiny.adapted(tiny.pair(), target_modules=["first", "second"], init_lora_weights="gradient")
    adalora.save_adapter(trained, tmp_path / "adapter")
    loaded = adalora.load_adapter(tiny.pair(), tmp_path / "adapter", trainable=True)
    assert pending_start(loaded) is None
    assert (
        adalora.inject(adalora.eject(adapted("gradient")), config("orthogonal", target_modules=["first"])) is not None
    )
    assert pending_start(adalora.eject(adapted("gradient"))) is None


def test_a_scale_chosen_for_orthonormal_factors_is_the_same_for_directions_from_data() -> None:
    alphas = {start: adapted(start, lora_alpha=None).adalora_config.lora_alpha for start in ("orthogonal", "gradient")}
    assert alphas["orthogonal"] == alphas["gradient"]


# --- In a Trainer -------------------------------------------------------------------------------------------


class Batches(TrainerCallback):
    """Notes the first token of each row that a step saw."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[list[int]] = []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if model.training:
            self.seen.append(kwargs["input_ids"][:, :3].flatten().tolist())


def trainer(folder: Path, start: str, model: Any = None, dataset: Any = None, **choices: Any) -> Trainer:
    model = model or tiny.bert(labels=3).train()
    given = {"max_steps": STEPS, "per_device_train_batch_size": 4} | choices
    arguments = TrainingArguments(**tiny.trainer_arguments(folder, **given))
    return Trainer(model, arguments, train_dataset=dataset or rows(), callbacks=[AdaLoraCallback(config(start))])


def state(run: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["gradient", "activation"])
def test_a_trainer_starts_once_and_its_rows_and_draws_are_those_of_any_other_run(start: str, tmp_path: Path) -> None:
    """Dropout is on, so that a disturbed generator would show."""
    run, plain = trainer(tmp_path, start), trainer(tmp_path, "orthogonal")
    assert same(state(run), state(plain))
    seen = [Batches(each.model) for each in (run, plain)]
    run.train()
    plain.train()
    assert seen[0].seen == seen[1].seen and len(seen[0].seen) == STEPS
    # The same by hand, on the same rows.
    hand = trainer(tmp_path, start)
    draw = torch.randperm(64, generator=torch.Generator().manual_seed(5))[: START_STEPS * 4].tolist()
    chosen = [[rows()[i] for i in draw[at : at + 4]] for at in range(0, len(draw), 4)]
    batches = [{key: torch.tensor([row[key] for row in batch]) for key in batch[0]} for batch in chosen]
    if start == "gradient":
        gradient_start_(hand.model, batches, lambda model, batch: model(**batch).loss, seed=5)
    else:
        activation_start_(hand.model, batches, lambda model, batch: model(**batch), seed=5)
    hand.train()
    assert same(state(hand), state(run)) and not same(state(plain), state(run))
    start_from_rows_(run.model, None, run.args, 4)  # again: no rows are asked for


@pytest.mark.slow
def test_a_run_resumes_bit_by_bit_and_starts_no_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trainer(tmp_path / "whole", "gradient", save_strategy="steps", save_steps=4)
    whole.train()
    calls = []
    monkeypatch.setattr("adalora.integrations.starting.gradient_start_", lambda *_, **__: calls.append(1))
    for step in (4, 8):
        run = trainer(tmp_path / "again", "gradient")
        run.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert same(state(run), state(whole))
    assert calls == []


def test_the_first_gradient_of_the_singular_values_is_far_larger_than_after_a_random_start(tmp_path: Path) -> None:
    slopes = {}
    for start in ("orthogonal", "gradient"):
        run = trainer(tmp_path, start)
        start_from_rows_(run.model, run.get_train_dataloader(), run.args, 4)
        batch = {key: torch.tensor([row[key] for row in rows()]) for key in ("input_ids", "labels")}
        run.model.eval()(**batch).loss.backward()
        norms = [module.lora_E.grad.norm() for _, module in named_adapters(run.model)]
        slopes[start] = float(torch.stack(norms).norm())
    assert slopes["gradient"] > 3 * slopes["orthogonal"]


def test_generators_are_left_alone_whatever_the_rows_draw(tmp_path: Path) -> None:
    class Drawing(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            random.random(), np.random.rand(), torch.rand(1)
            return super().__getitem__(index)

    run = trainer(tmp_path, "gradient", dataset=Drawing(rows()))
    loader = run.get_train_dataloader()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    start_from_rows_(run.model, loader, run.args, 4)
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.slow
def test_the_start_is_that_of_the_rows_of_a_step_however_they_are_cut(tmp_path: Path) -> None:
    """As many rows for accumulated steps, and where auto_find_batch_size has cut the batches."""
    found = []
    for size, given in ((8, {"per_device_train_batch_size": 8}), (2, {"per_device_train_batch_size": 8})):
        run = trainer(tmp_path, "gradient", dataset=rows(128), **given)
        start_from_rows_(run.model, run.get_train_dataloader(), run.args, size)
        found.append(factors(run.model))
    accumulated = trainer(tmp_path, "gradient", dataset=rows(128), gradient_accumulation_steps=2)
    start_from_rows_(accumulated.model, accumulated.get_train_dataloader(), accumulated.args, 4)
    found.append(factors(accumulated.model))
    for other in found[1:]:
        for name, value in found[0].items():
            if "lora_B" in name:  # the spans, but for rounding and sign
                cosines = torch.linalg.svdvals(value.T @ other[name])
                assert float(cosines[0]) > 0.999


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return itertools.cycle(rows())


class Lossless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.line(input_ids.float())}


@pytest.mark.parametrize(
    "start,model,dataset,message",
    [
        ("gradient", None, Stream(), "Stream gives each of its rows only in turn. Call adalora.start.gradient_start_"),
        ("gradient", Lossless(), None, "Lossless returned none"),
    ],
)
def test_a_trainer_that_gives_no_rows_or_no_loss_says_what_to_do(
    start: str, model: Any, dataset: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=message):
        trainer(tmp_path, start, model=model, dataset=dataset).train()


def test_a_plan_says_what_is_read_and_how_often() -> None:
    assert describe_start(config("orthogonal"), 32) is None
    said = "directions from the gradients of 256 rows, in 4 passes before the first step"
    assert describe_start(config("gradient"), 32) == said
    assert "activations of 8 rows, in 5 passes" in (describe_start(config("activation"), 1) or "")
