"""AdaLoraCallback in real Trainers, on models of a few thousand parameters."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import adalora
from adalora.averages import SENSITIVITY, UNCERTAINTY
from adalora.errors import AdaLoraWarning, AdapterFileError, ConfigError, TrainingError
from adalora.injection import named_adapters, training_progress
from adalora.integrations.models import task_head
from adalora.integrations.transformers import AdaLoraCallback
from adalora.targets import saved_modules
from tiny import labelled_rows as rows
from tiny import trainer_arguments

CONFIG = adalora.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=8, tinit=4, tfinal=10, deltaT=3)
STEPS = 30
TARGET = 2 * 13  # target_r times the linear layers that are not the task head


def bert(dropout: float = 0.1, seed: int = 0, **choices: Any) -> Any:
    """Two layers of six matrices, a pooler and a classifier."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.2,
        **choices,
    )
    return transformers.BertForSequenceClassification(config)


def arguments(folder: Path, **choices: Any) -> dict[str, Any]:
    given = {"max_steps": STEPS, "per_device_train_batch_size": 8, "logging_steps": 10}
    return trainer_arguments(folder, **given | choices)


def trainer(
    folder: Path,
    model: Any,
    *callbacks: Any,
    optimizers: Any = (None, None),
    loss: Callable[..., Tensor] | None = None,
    **choices: Any,
) -> Trainer:
    return Trainer(
        model,
        TrainingArguments(**arguments(folder, **choices)),
        train_dataset=rows(),
        eval_dataset=rows(16),
        callbacks=[AdaLoraCallback(CONFIG), *callbacks],
        optimizers=optimizers,
        compute_loss_func=loss,
    )


def allocator_of(run: Trainer) -> adalora.RankAllocator:
    [callback] = [c for c in run.callback_handler.callbacks if isinstance(c, AdaLoraCallback)]
    assert callback.allocator is not None
    return callback.allocator


def nonzero(model: nn.Module) -> int:
    return sum(int((module.lora_E != 0).sum()) for _, module in named_adapters(model))


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The adapter, its masks, and everything that trained with it."""
    state = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return state | {f"{name}.keep": module.lora_keep.clone() for name, module in named_adapters(model)}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def logits(model: Any) -> Tensor:
    ids = torch.tensor([row["input_ids"] for row in rows(16)])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


class Once(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step: int, action: Callable[..., None]) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action(control=control, **kwargs)


def stop(control: Any, **_: Any) -> None:
    control.should_training_stop = True


def worse_and_worse(run: Trainer) -> Callable[..., dict[str, float]]:
    """An evaluation by which the first checkpoint is the best."""
    seen: list[float] = []

    def evaluate(*_: Any, **__: Any) -> dict[str, float]:
        seen.append(float(len(seen)))
        metrics = {"eval_loss": seen[-1]}
        run.control = run.callback_handler.on_evaluate(run.args, run.state, run.control, metrics)
        return metrics

    return evaluate


# --- The method runs ----------------------------------------------------------------------------------------


def test_one_callback_runs_the_whole_method(tmp_path: Path) -> None:
    run = trainer(tmp_path, bert())
    assert [c.allocator for c in run.callback_handler.callbacks if isinstance(c, AdaLoraCallback)] == [None]
    run.train()
    allocator = allocator_of(run)
    ranks = adalora.rank_report(run.model).ranks
    assert (allocator.step, allocator.frozen, allocator.live, nonzero(run.model)) == (STEPS, True, TARGET, TARGET)
    assert len(ranks) == 13
    assert len(set(ranks.values())) > 1  # the budget went where it is needed
    assert training_progress(run.model) == (STEPS, STEPS)
    assert not any({SENSITIVITY, UNCERTAINTY} & set(state) for state in run.optimizer.state.values())  # freed


def test_the_task_head_trains_and_the_base_model_does_not(tmp_path: Path) -> None:
    model, base = bert(), bert().state_dict()
    trainer(tmp_path, model).train()
    trains = {name.rsplit(".lora_", 1)[0] for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trains if "encoder" not in name} == {
        *("bert.pooler.dense", "classifier.weight", "classifier.bias")
    }
    state = model.state_dict()
    changed = {name for name in base if not torch.equal(base[name], state[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_the_reported_loss_is_the_models_own(tmp_path: Path) -> None:
    """Peers D1, D2: no penalty in the training loss, and none in the evaluation loss."""
    model = bert(dropout=0.0)
    batch = rows()[:8]
    inputs = {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}
    with torch.no_grad():
        wanted = float(model(**inputs).loss)
    run = trainer(tmp_path, model, logging_steps=1, train_sampling_strategy="sequential")
    run.train()
    first = run.state.log_history[0]
    assert first["loss"] == pytest.approx(wanted, abs=1e-6)
    assert first["adalora/orthogonality"] > 1.0  # it would show
    with torch.no_grad():
        inputs = {key: torch.tensor([row[key] for row in rows(16)]) for key in batch[0]}
        wanted = float(model.eval()(**inputs).loss)
    assert run.evaluate()["eval_loss"] == pytest.approx(wanted, abs=1e-6)


def test_the_logs_tell_budget_phase_and_orthogonality(tmp_path: Path) -> None:
    run = trainer(tmp_path, bert(), logging_steps=1)
    run.train()
    schedule = allocator_of(run).schedule
    lines = [line for line in run.state.log_history if "loss" in line]
    assert len(lines) == STEPS
    for step, line in enumerate(lines):
        assert line["adalora/budget"] == schedule.budget(step)
    assert [lines[step]["adalora/phase"] for step in (0, 3, 4, 18, 19, 29)] == [
        *("warmup", "warmup", "reduction", "reduction", "final", "final")
    ]
    assert all(0 < line["adalora/orthogonality"] < 4 for line in lines)
    assert "adalora/budget" not in run.state.log_history[-1]  # the summary of the run


# --- Equality with a loop written by hand -------------------------------------------------------------------


def sum_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def by_hand(model: Any, clip: float, accumulation: int, scheduler: str) -> dict[str, Tensor]:
    """AdaLoRA as one would write it without a Trainer, whose grouping and order it copies."""
    config = adalora.AdaLoraConfig(**CONFIG.to_dict() | {"modules_to_save": ["classifier"]})
    torch.manual_seed(5)
    adalora.inject(model, config)
    model.train()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for name, p in named if (".bias" in name) is bias]} for bias in (False, True)]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0, fused=True)
    schedule = transformers.get_scheduler(scheduler, optimizer, 0, STEPS)
    adalora.RankAllocator(model, STEPS).attach(optimizer)
    data, size, position = rows(), 8, 0
    for _ in range(STEPS):
        for _ in range(accumulation):
            if position == len(data):
                position = 0
            batch = data[position : position + size]
            position += size
            inputs = {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}
            labels = inputs.pop("labels")
            sum_loss(model(**inputs), labels, torch.tensor(size * accumulation)).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return trained(model)


@pytest.mark.parametrize(
    ("clip", "accumulation", "scheduler"),
    [
        (0.0, 1, "linear"),
        (1.0, 2, "cosine"),
        pytest.param(1.0, 1, "linear", marks=pytest.mark.slow),
        pytest.param(1e-3, 1, "constant", marks=pytest.mark.slow),
        pytest.param(0.0, 4, "linear", marks=pytest.mark.slow),
    ],
)
def test_a_trainer_computes_what_a_plain_loop_computes(
    tmp_path: Path, clip: float, accumulation: int, scheduler: str
) -> None:
    """Also bit for bit with clipping, accumulation and schedulers: the method is in the optimizer's step."""
    wanted = by_hand(bert(dropout=0.0), clip, accumulation, scheduler)
    model = bert(dropout=0.0)
    torch.manual_seed(5)
    run = trainer(
        tmp_path,
        model,
        loss=sum_loss,
        max_grad_norm=clip,
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type=scheduler,
        train_sampling_strategy="sequential",
    )
    run.train()
    assert differing(trained(model), wanted) == []
    assert (allocator_of(run).step, allocator_of(run).live) == (STEPS, TARGET)


# --- Resuming -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Trainer, Path]]:
    """A run with a checkpoint in every phase, on and between allocations."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(folder, bert(), save_strategy="steps", save_steps=1)
    run.train()
    yield run, folder


@pytest.mark.parametrize(
    "step", [2, 8, 20, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 6, 7, 19, 21, 27))]
)
def test_resume_is_bit_exact_in_every_phase(whole_run: tuple[Trainer, Path], tmp_path: Path, step: int) -> None:
    """Peers E1, E2, E10: adapter, masks and optimizer continue as if nothing had happened; with dropout."""
    whole, folder = whole_run
    run = trainer(tmp_path, bert())
    run.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert (run.state.global_step, allocator_of(run).step, allocator_of(run).live) == (STEPS, STEPS, TARGET)
    assert differing(trained(run.model), trained(whole.model)) == []
    mine, other = run.optimizer.state_dict(), whole.optimizer.state_dict()
    assert mine["param_groups"][0]["adalora_step"] == STEPS
    assert torch.equal(mine["param_groups"][0]["adalora_keep"], other["param_groups"][0]["adalora_keep"])
    for index, state in other["state"].items():
        assert differing(mine["state"][index], state) == []


def test_resume_says_nothing_of_missing_keys(
    whole_run: tuple[Trainer, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(tmp_path, bert(), max_steps=STEPS)
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        run.train(resume_from_checkpoint=str(whole_run[1] / "checkpoint-29"))
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert [r.getMessage() for r in caplog.records if "keys" in r.getMessage()] == []


def test_a_checkpoint_holds_adapter_and_head_only(whole_run: tuple[Trainer, Path]) -> None:
    whole, folder = whole_run
    with safe_open(folder / "checkpoint-8" / "model.safetensors", framework="pt") as file:
        keys = set(file.keys())
    names = [name for name, _ in named_adapters(whole.model)]
    wanted = {f"{name}.{part}" for name in names for part in ("lora_A", "lora_E", "lora_B")}
    assert keys == wanted | {"classifier.weight", "classifier.bias"}
    size = sum(p.numel() for p in whole.model.parameters() if p.requires_grad) * 4
    stored = (folder / "checkpoint-8" / "model.safetensors").stat().st_size
    assert size <= stored <= size + 200 * len(keys)
    assert not list(folder.glob("checkpoint-8/.adalora-*"))


def test_checkpoints_and_final_model_load_as_adapters(whole_run: tuple[Trainer, Path], tmp_path: Path) -> None:
    """In ours and in PEFT, with the outputs of the model that was saved."""
    whole, folder = whole_run
    whole.save_model(str(tmp_path / "final"))
    assert sorted(p.name for p in (tmp_path / "final").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "training_args.bin",
    ]
    wanted = logits(whole.model)
    for place in (tmp_path / "final", folder / f"checkpoint-{STEPS}"):
        ours = adalora.load_adapter(bert(), place)
        assert float((logits(ours) - wanted).abs().max()) <= 1e-6
        assert adalora.rank_report(ours).total_rank == TARGET
        theirs = in_peft(place)
        assert float((logits(theirs) - wanted).abs().max()) <= 1e-6


def test_a_checkpoint_between_allocations_holds_what_the_model_computed(
    whole_run: tuple[Trainer, Path],
) -> None:
    """Peers E3: triplets that grow again are stored too, though the last pattern had cut them."""
    place = whole_run[1] / "checkpoint-18"
    resumable = bert()
    adalora.inject(resumable, adalora.AdaLoraConfig(**CONFIG.to_dict() | {"modules_to_save": ["classifier"]}))
    resumable.load_state_dict(_stored(place / "model.safetensors"), strict=False)
    ours = adalora.load_adapter(bert(), place)
    assert adalora.rank_report(ours).total_rank > allocator_of(whole_run[0]).schedule.budget(17)
    for model in (ours, in_peft(place)):
        assert float((logits(model) - logits(resumable)).abs().max()) <= 1e-6


def _stored(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def in_peft(folder: Path) -> Any:
    with warnings.catch_warnings():
        # PEFT's own: its check of rank_pattern does not know AdaLoRA's keys (peers E7), an empty tensor has
        # nothing to initialize, and it asks transformers for an old name.
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
        warnings.filterwarnings("ignore", "Adapter 'default': .* invalid shape")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return peft.PeftModel.from_pretrained(bert(), str(folder))


# --- Runs that do not go to plan ----------------------------------------------------------------------------


@pytest.mark.slow
def test_load_best_model_from_before_the_budget_still_ends_on_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(
        tmp_path,
        bert(),
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=6,
        eval_steps=6,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    run.evaluate = worse_and_worse(run)
    with caplog.at_level(logging.INFO, logger="adalora"):
        run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-6")
    assert (allocator_of(run).live, nonzero(run.model)) == (TARGET, TARGET)
    lines = [r.getMessage() for r in caplog.records if "from before the budget was met" in r.getMessage()]
    assert len(lines) == 1
    assert f"{TARGET} triplets outside the final pattern were cut" in lines[0]  # all 52 were alive there
    assert f"budget {TARGET} / {TARGET} triplets reached" in caplog.text
    run.save_model(str(tmp_path / "final"))  # and saving it warns of nothing
    assert adalora.rank_report(adalora.load_adapter(bert(), tmp_path / "final")).total_rank == TARGET


@pytest.mark.parametrize("step", [1, 9, 22])
def test_a_run_stopped_early_ends_on_the_budget(tmp_path: Path, step: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="adalora"):
        run = trainer(tmp_path, bert(), Once(step, stop))
        run.train()
    assert run.state.global_step == step
    assert (allocator_of(run).live, nonzero(run.model), allocator_of(run).frozen) == (TARGET, TARGET, True)
    early = [r.getMessage() for r in caplog.records if r.getMessage().startswith("training stopped after step")]
    assert len(early) == (step < 20)
    assert all(f"after step {step} of {STEPS}" in line for line in early)
    run.save_model(str(tmp_path / "final"))


def test_early_stopping_ends_on_the_budget(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        bert(),
        EarlyStoppingCallback(early_stopping_patience=1),
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=4,
        eval_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    run.evaluate = worse_and_worse(run)
    run.train()
    assert run.state.global_step == 8
    assert (allocator_of(run).live, nonzero(run.model)) == (TARGET, TARGET)


def test_a_total_that_contradicts_the_trainer_is_an_error(tmp_path: Path) -> None:
    config = adalora.AdaLoraConfig(**CONFIG.to_dict() | {"total_step": 300})
    run = Trainer(
        bert(),
        TrainingArguments(**arguments(tmp_path)),
        train_dataset=rows(),
        callbacks=[AdaLoraCallback(config)],
    )
    with pytest.raises(ConfigError, match=r"says total_step=300, but the loop runs 30 steps"):
        run.train()


def test_a_run_too_short_for_its_phases_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    run = trainer(tmp_path, bert(), max_steps=14)
    with pytest.raises(ConfigError, match=r"tinit \(4\) and tfinal \(10\) .* the run has 14 in all"):
        run.train()
    assert run.state.global_step == 0


@pytest.mark.slow
def test_epochs_tell_the_length_of_the_run(tmp_path: Path) -> None:
    run = trainer(tmp_path, bert(), max_steps=-1, num_train_epochs=3, gradient_accumulation_steps=1)
    run.train()
    assert allocator_of(run).schedule.total_step == 24 == run.state.global_step
    assert allocator_of(run).live == TARGET


@pytest.mark.slow
def test_training_twice_goes_on_with_the_pattern_of_the_first_run(tmp_path: Path) -> None:
    """The Trainer keeps its optimizer, and with it what the first run decided: more tuning, no new ranks."""
    run = trainer(tmp_path, bert())
    run.train()
    ranks, first = adalora.rank_report(run.model).ranks, trained(run.model)
    run.train()
    assert (adalora.rank_report(run.model).ranks, nonzero(run.model)) == (ranks, TARGET)
    assert allocator_of(run).frozen
    changed = differing(first, trained(run.model))
    assert [name for name in changed if name.endswith("lora_A")]
    assert [name for name in changed if name.endswith(".keep")] == []


@pytest.mark.slow
@pytest.mark.parametrize("again", ["by hand", "by auto_find_batch_size"])
def test_a_run_begun_again_follows_the_whole_schedule(tmp_path: Path, again: str) -> None:
    attempts: list[int] = []

    def fail_once(**_: Any) -> None:
        attempts.append(allocator_of(run).step)
        if len(attempts) == 1:
            raise RuntimeError("CUDA out of memory.")

    finds = again == "by auto_find_batch_size"
    run = trainer(tmp_path, bert(), Once(9, fail_once), logging_steps=1, auto_find_batch_size=finds)
    if not finds:
        with pytest.raises(RuntimeError, match="out of memory"):
            run.train()
    run.train()
    assert attempts == [9, 9]
    assert (allocator_of(run).step, allocator_of(run).live, nonzero(run.model)) == (STEPS, TARGET, TARGET)
    budgets = [line["adalora/budget"] for line in run.state.log_history if "loss" in line]
    assert budgets == [allocator_of(run).schedule.budget(step) for step in range(STEPS)]


@pytest.mark.slow
@pytest.mark.parametrize("config", [None, CONFIG], ids=["no configuration", "the same"])
def test_a_new_trainer_on_a_trained_model_starts_the_method_again(tmp_path: Path, config: Any) -> None:
    model = bert()
    trainer(tmp_path, model).train()
    run = Trainer(
        model,
        TrainingArguments(**arguments(tmp_path, logging_steps=1)),
        train_dataset=rows(),
        callbacks=[AdaLoraCallback(config)],
    )
    run.train()
    assert run.state.log_history[0]["adalora/budget"] == 52
    assert (allocator_of(run).step, allocator_of(run).live, nonzero(model)) == (STEPS, TARGET, TARGET)


# --- Refusals -----------------------------------------------------------------------------------------------


def test_a_callback_added_after_construction_is_refused(tmp_path: Path) -> None:
    run = Trainer(bert(), TrainingArguments(**arguments(tmp_path)), train_dataset=rows())
    run.add_callback(AdaLoraCallback(CONFIG))
    with pytest.raises(TrainingError, match=r"no adapter: AdaLoraCallback was added after .*callbacks=\["):
        run.train()


@pytest.mark.slow
def test_model_init_is_refused_unless_it_injects(tmp_path: Path) -> None:
    """train() builds the model anew, past the place where a callback could adapt it."""

    def make(model_init: Callable[[], Any]) -> Trainer:
        return Trainer(
            model_init=model_init,
            args=TrainingArguments(**arguments(tmp_path, save_strategy="steps", save_steps=20)),
            train_dataset=rows(),
            callbacks=[AdaLoraCallback()],
        )

    with pytest.raises(TrainingError, match=r"model_init.*adalora\.inject"):
        make(lambda: bert()).train()
    config = adalora.AdaLoraConfig(**CONFIG.to_dict() | {"modules_to_save": ["classifier"]})
    run = make(lambda: adalora.inject(bert(), config))
    run.train()
    assert (allocator_of(run).live, nonzero(run.model)) == (TARGET, TARGET)
    keys = _stored(tmp_path / "checkpoint-20" / "model.safetensors")
    assert {key for key in keys if ".lora_" not in key} == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("field", ["deepspeed", "fsdp"])
def test_sharding_is_refused(field: str) -> None:
    args = SimpleNamespace(**{"deepspeed": None, "fsdp": None, field: "full_shard"})
    with pytest.raises(TrainingError, match="Unset `deepspeed` and `fsdp`"):
        AdaLoraCallback(CONFIG).on_init_end(args, None, None, model=bert())


def test_an_optimizer_made_before_the_adapter_is_refused(tmp_path: Path) -> None:
    model = bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run = trainer(tmp_path, model, optimizers=(optimizer, None))
    with pytest.raises(TrainingError, match=r"lora_A is not in the optimizer; build it from adalora"):
        run.train()


@pytest.mark.slow
def test_an_optimizer_of_ones_own_over_an_injected_model_works(tmp_path: Path) -> None:
    model = adalora.inject(bert(), CONFIG)
    optimizer = torch.optim.SGD(adalora.adapter_parameters(model), lr=0.5, momentum=0.9)
    run = trainer(tmp_path, model, optimizers=(optimizer, None))
    run.train()
    assert (allocator_of(run).live, nonzero(model)) == (TARGET + 2, TARGET + 2)  # the classifier is adapted too


def test_another_configuration_than_the_models_is_refused(tmp_path: Path) -> None:
    model = adalora.inject(bert(), adalora.AdaLoraConfig(init_r=3, target_r=1))
    with pytest.raises(ConfigError, match=r"adapted already, with another configuration"):
        trainer(tmp_path, model)


def test_pushing_while_saving_is_refused(tmp_path: Path) -> None:
    model = bert()
    trainer(tmp_path, model)
    with pytest.raises(AdapterFileError, match=r"call model\.push_to_hub\(name\)"):
        model.save_pretrained(tmp_path / "final", push_to_hub=True)
    assert not (tmp_path / "final").exists()


# --- What trains and what is saved --------------------------------------------------------------------------

SMALL: dict[str, Any] = {"vocab_size": 40, "num_labels": 3}
ENCODER = SMALL | {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
}
HEADS: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    "BERT": ("BertConfig", "BertForSequenceClassification", ENCODER, ("classifier",)),
    "BERT tagging": ("BertConfig", "BertForTokenClassification", ENCODER, ("classifier",)),
    "BERT answers": ("BertConfig", "BertForQuestionAnswering", ENCODER, ("qa_outputs",)),
    "BERT without a head": ("BertConfig", "BertModel", ENCODER, ()),
    "BERT masked": ("BertConfig", "BertForMaskedLM", ENCODER, ()),
    "RoBERTa": ("RobertaConfig", "RobertaForSequenceClassification", ENCODER, ("classifier",)),
    "DeBERTa": ("DebertaV2Config", "DebertaV2ForSequenceClassification", ENCODER, ("pooler", "classifier")),
    "BART": (
        "BartConfig",
        "BartForSequenceClassification",
        SMALL
        | {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
        | {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 16},
        ("classification_head",),
    ),
    "GPT-2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2}, ()),
    "GPT-2 classification": (
        "GPT2Config",
        "GPT2ForSequenceClassification",
        SMALL | {"n_embd": 16, "n_layer": 1, "n_head": 2},
        ("score",),
    ),
    "T5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
        (),
    ),
}


@pytest.mark.parametrize(("config", "kind", "choices", "head"), HEADS.values(), ids=HEADS)
def test_the_task_head_is_found(config: str, kind: str, choices: dict[str, Any], head: tuple[str, ...]) -> None:
    model = getattr(transformers, kind)(getattr(transformers, config)(**choices))
    assert task_head(model) == head
    args = SimpleNamespace(deepspeed=None, fsdp=None, load_best_model_at_end=False)
    AdaLoraCallback(CONFIG).on_init_end(args, None, None, model=model)
    others = [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]
    assert {name.split(".")[0] for name in others} == set(head)


def test_modules_to_save_that_are_named_are_respected(tmp_path: Path) -> None:
    config = adalora.AdaLoraConfig(**CONFIG.to_dict() | {"modules_to_save": ["bert.pooler"]})
    model = bert()
    Trainer(model, TrainingArguments(**arguments(tmp_path)), train_dataset=rows(), callbacks=[AdaLoraCallback(config)])
    assert [name for name, _ in saved_modules(model, config)] == ["bert.pooler"]
    others = {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert others == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert "bert.pooler.dense" not in dict(named_adapters(model))
    assert "classifier" in dict(named_adapters(model))


@pytest.mark.slow
def test_trained_biases_are_in_the_checkpoint(tmp_path: Path) -> None:
    config = adalora.AdaLoraConfig(**CONFIG.to_dict() | {"bias": "lora_only", "modules_to_save": ["classifier"]})

    def make(folder: Path, **choices: Any) -> Trainer:
        args = TrainingArguments(**arguments(folder, **choices))
        return Trainer(bert(), args, train_dataset=rows(), callbacks=[AdaLoraCallback(config)])

    whole = make(tmp_path / "a", save_strategy="steps", save_steps=10)
    whole.train()
    stored = _stored(tmp_path / "a" / "checkpoint-10" / "model.safetensors")
    assert sum(key.endswith(".bias") for key in stored) == 13 + 1
    run = make(tmp_path / "b")
    run.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-10"))
    assert differing(trained(run.model), trained(whole.model)) == []
    whole.save_model(str(tmp_path / "final"))
    loaded = adalora.load_adapter(bert(), tmp_path / "final")
    assert float((logits(loaded) - logits(whole.model)).abs().max()) <= 1e-6


def test_an_ejected_model_saves_all_of_itself_again(tmp_path: Path) -> None:
    run = trainer(tmp_path, bert())
    run.train()
    adalora.eject(run.model)
    run.model.save_pretrained(tmp_path / "plain")
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "plain")
    state, base = loaded.state_dict(), bert().state_dict()
    assert state.keys() == base.keys()
    encoder = [name for name in base if not name.startswith("classifier")]
    assert [name for name in encoder if not torch.equal(state[name], base[name])] == []
    assert not torch.equal(state["classifier.weight"], base["classifier.weight"])  # the head was trained


def test_export_merged_writes_a_whole_model_after_training(tmp_path: Path) -> None:
    run = trainer(tmp_path, bert())
    run.train()
    wanted = logits(run.model)
    assert adalora.export_merged(run.model, tmp_path / "merged") <= 1e-5
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert float((logits(loaded) - wanted).abs().max()) <= 1e-5
    run.save_model(str(tmp_path / "final"))  # and the model still saves as an adapter
    assert not (tmp_path / "final" / "model.safetensors").exists()


@pytest.mark.slow
def test_copies_and_pickles_of_a_trained_model_save_themselves(tmp_path: Path) -> None:
    run = trainer(tmp_path, bert())
    run.train()
    wanted = logits(run.model)
    torch.save(run.model, tmp_path / "model.pt")
    for number, other in enumerate([copy.deepcopy(run.model), torch.load(tmp_path / "model.pt", weights_only=False)]):
        with torch.no_grad():
            other.classifier.bias += 1
        other.save_pretrained(tmp_path / f"{number}")
        loaded = adalora.load_adapter(bert(), tmp_path / f"{number}")
        assert float((logits(loaded) - wanted - 1).abs().max()) <= 1e-5
    assert torch.equal(logits(run.model), wanted)


def test_saving_before_training_warns(tmp_path: Path) -> None:
    run = trainer(tmp_path, bert())
    with pytest.warns(AdaLoraWarning, match="has never run"):
        run.save_model(str(tmp_path / "final"))


WAYS: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": True},
    "fp16 with a GradScaler": {"fp16": True},
    "recomputed activations": {"activation_checkpointing": True},
    "a loss outside the model": {"label_smoothing_factor": 0.1},
    "Adafactor": {"optim": "adafactor"},
    "SGD": {"optim": "sgd", "learning_rate": 0.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("choices", WAYS.values(), ids=WAYS)
def test_the_budget_is_met_however_the_trainer_trains(tmp_path: Path, choices: dict[str, Any]) -> None:
    run = trainer(tmp_path, bert(), **choices)
    run.train()
    assert (allocator_of(run).step, allocator_of(run).live, nonzero(run.model)) == (STEPS, TARGET, TARGET)
    assert {p.dtype for p in adalora.adapter_parameters(run.model)} == {torch.float32}
    assert len(set(adalora.rank_report(run.model).ranks.values())) > 1


@pytest.mark.slow
def test_a_bf16_base_model_trains_with_a_32_bit_adapter(tmp_path: Path) -> None:
    run = trainer(tmp_path, bert().bfloat16())
    run.train()
    assert (allocator_of(run).live, nonzero(run.model)) == (TARGET, TARGET)
    assert {module.lora_A.dtype for _, module in named_adapters(run.model)} == {torch.float32}


# --- Other trainers -----------------------------------------------------------------------------------------


class Plain(nn.Module):
    """A model of one's own, which transformers knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 16)
        self.body = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        scores = self.head(self.body(self.embed(input_ids).mean(1)))
        return {"logits": scores} | ({} if labels is None else {"loss": F.cross_entropy(scores, labels)})


@pytest.mark.slow
def test_a_module_of_ones_own_trains_and_resumes(tmp_path: Path) -> None:
    config = adalora.AdaLoraConfig(**CONFIG.to_dict() | {"modules_to_save": ["head"]})

    def make(folder: Path, **choices: Any) -> Trainer:
        args = TrainingArguments(**arguments(folder, **choices))
        return Trainer(Plain(), args, train_dataset=rows(), callbacks=[AdaLoraCallback(config)])

    whole = make(tmp_path / "a", save_strategy="steps", save_steps=10)
    whole.train()
    assert (allocator_of(whole).live, nonzero(whole.model)) == (4, 4)
    run = make(tmp_path / "b")
    run.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-10"))
    assert differing(trained(run.model), trained(whole.model)) == []


def seq2seq(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "T5":
        config = transformers.T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        return transformers.T5ForConditionalGeneration(config)
    config = transformers.BartConfig(
        vocab_size=40,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
        forced_eos_token_id=None,
    )
    return transformers.BartForConditionalGeneration(config)


@pytest.mark.parametrize(("kind", "modules"), [("T5", 16), pytest.param("BART", 16, marks=pytest.mark.slow)])
def test_seq2seq_trainer(tmp_path: Path, kind: str, modules: int) -> None:
    model = seq2seq(kind)
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"][::-1]} for row in rows()]
    run = transformers.Seq2SeqTrainer(
        model,
        transformers.Seq2SeqTrainingArguments(**arguments(tmp_path), predict_with_generate=True),
        train_dataset=data,
        eval_dataset=data[:8],
        callbacks=[AdaLoraCallback(CONFIG)],
    )
    run.train()
    assert len(list(named_adapters(model))) == modules
    assert (allocator_of(run).live, nonzero(model)) == (2 * modules, 2 * modules)
    assert [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name] == []
    run.save_model(str(tmp_path / "final"))
    loaded = adalora.load_adapter(seq2seq(kind), tmp_path / "final").eval()
    batch = {key: torch.tensor([row[key] for row in data[:8]]) for key in data[0]}
    with torch.no_grad():
        assert float((loaded(**batch).logits - model.eval()(**batch).logits).abs().max()) <= 1e-6


WORDS = [f"w{number}" for number in range(30)]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
        model_max_length=16,
    )


def sentences(count: int = 32) -> list[str]:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(len(WORDS), (count, 6), generator=generator).tolist()
    return [" ".join(WORDS[index] for index in row) for row in ids]


def causal(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "GPT-2":
        config = transformers.GPT2Config(
            vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=2, eos_token_id=3
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=2,
        eos_token_id=3,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.slow
# TRL still sets the old name, in its own configuration.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(("kind", "modules"), [("GPT-2", 8), ("Llama", 14)])
def test_trl_sft_trainer(tmp_path: Path, kind: str, modules: int) -> None:
    import datasets
    from trl import SFTConfig, SFTTrainer

    def make(folder: Path, **choices: Any) -> Any:
        return SFTTrainer(
            causal(kind),
            args=SFTConfig(**arguments(folder, max_length=16, bf16=False, **choices)),
            train_dataset=datasets.Dataset.from_dict({"text": sentences()}),
            processing_class=tokenizer(),
            callbacks=[AdaLoraCallback(CONFIG)],
        )

    whole = make(tmp_path / "a", save_strategy="steps", save_steps=8)
    whole.train()
    assert len(list(named_adapters(whole.model))) == modules
    assert (allocator_of(whole).live, nonzero(whole.model)) == (2 * modules, 2 * modules)
    run = make(tmp_path / "b")
    run.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-8"))
    assert differing(trained(run.model), trained(whole.model)) == []
    whole.save_model(str(tmp_path / "final"))
    loaded = adalora.load_adapter(causal(kind), tmp_path / "final").eval()
    ids = torch.arange(4, 12).view(1, 8)
    with torch.no_grad():
        assert float((loaded(ids).logits - whole.model.eval()(ids).logits).abs().max()) <= 1e-6


def sentence_model(folder: Path) -> Any:
    """Built once and stored, since a SentenceTransformer starts from a folder."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    if not (folder / "bert").exists():
        bert().bert.save_pretrained(folder / "bert")
        tokenizer().save_pretrained(folder / "bert")
    encoder = modules.Transformer(str(folder / "bert"), max_seq_length=16)
    return SentenceTransformer(modules=[encoder, modules.Pooling(16)], device="cpu")


def embeddings(model: Any) -> Tensor:
    return model.eval().encode(sentences(6), convert_to_tensor=True, show_progress_bar=False)


@pytest.mark.slow
def test_the_head_of_a_cross_encoder_trains(tmp_path: Path) -> None:
    """The transformers model is within another; its head is new all the same."""
    from sentence_transformers import CrossEncoder

    bert().save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    model = CrossEncoder(str(tmp_path / "bert"), num_labels=3, device="cpu")
    args = SimpleNamespace(deepspeed=None, fsdp=None, load_best_model_at_end=False)
    AdaLoraCallback(CONFIG).on_init_end(args, None, None, model=model)
    others = {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert {name.split(".")[-2] for name in others} == {"classifier"}
    assert len(list(named_adapters(model))) == 13


def sentence_trainer(model: Any, folder: Path, **choices: Any) -> Any:
    import datasets
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

    texts = sentences(32)
    scores = [len(set(a.split()) & set(b.split())) / 3 for a, b in zip(texts, texts[::-1], strict=True)]
    pairs = {"sentence1": texts, "sentence2": texts[::-1], "score": scores}
    return SentenceTransformerTrainer(
        model,
        args=SentenceTransformerTrainingArguments(**arguments(folder, **choices)),
        train_dataset=datasets.Dataset.from_dict(pairs),
        loss=CosineSimilarityLoss(model),
        callbacks=[AdaLoraCallback(CONFIG)],
    )


@pytest.mark.slow
def test_sentence_transformers_trainer_writes_folders_that_need_no_adapter(tmp_path: Path) -> None:
    """SentenceTransformer(folder) drops tensors that it does not know; so its folders hold merged weights."""
    from sentence_transformers import SentenceTransformer

    base = embeddings(sentence_model(tmp_path))
    model = sentence_model(tmp_path)
    run = sentence_trainer(model, tmp_path / "run", save_strategy="steps", save_steps=15)
    run.train()
    assert (allocator_of(run).live, nonzero(model)) == (TARGET, TARGET)
    wanted = embeddings(model)
    assert float((wanted - base).abs().max()) > 0.01
    run.save_model(str(tmp_path / "final"))
    model.save_pretrained(str(tmp_path / "other"))
    for folder in (tmp_path / "final", tmp_path / "other", tmp_path / "run" / f"checkpoint-{STEPS}"):
        assert [key for key in _stored(folder / "model.safetensors") if "lora" in key] == []
        loaded = SentenceTransformer(str(folder), device="cpu")
        assert float((embeddings(loaded) - wanted).abs().max()) <= 1e-5
        ours = adalora.load_adapter(sentence_model(tmp_path), folder / "adapter")
        assert float((embeddings(ours) - wanted).abs().max()) <= 1e-6
        assert adalora.rank_report(ours).total_rank == TARGET
    assert torch.equal(embeddings(model), wanted)  # saving left the model adapted, and as it was
    assert len(list(named_adapters(model))) == 13


@pytest.mark.slow
def test_a_sentence_transformers_checkpoint_is_not_resumed_from_in_silence(tmp_path: Path) -> None:
    run = sentence_trainer(sentence_model(tmp_path), tmp_path / "a", save_strategy="steps", save_steps=15)
    run.train()
    again = sentence_trainer(sentence_model(tmp_path), tmp_path / "b")
    with pytest.raises(TrainingError, match=r"hold merged weights, .* adalora\.load_adapter\(model, folder"):
        again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-15"))
    with pytest.raises(TrainingError, match="Unset `load_best_model_at_end`"):
        sentence_trainer(sentence_model(tmp_path), tmp_path / "c", load_best_model_at_end=True)


@pytest.mark.slow
def test_an_ejected_sentence_transformer_saves_and_loads_as_before(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    base = embeddings(sentence_model(tmp_path))
    model = sentence_model(tmp_path)
    sentence_trainer(model, tmp_path / "run").train()
    adalora.export_merged(model, tmp_path / "merged")
    assert set(_stored(tmp_path / "merged" / "model.safetensors")) == set(sentence_model(tmp_path).state_dict())
    adalora.eject(model)
    model.save_pretrained(str(tmp_path / "plain"))
    assert not (tmp_path / "plain" / "adapter").exists()
    assert torch.equal(embeddings(SentenceTransformer(str(tmp_path / "plain"), device="cpu")), base)
    model.load_state_dict(sentence_model(tmp_path).state_dict())
