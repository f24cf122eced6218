"""Every method through the one training path: what trains, what is counted, what is stored and read back."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from adalora.errors import AdaLoraError, AdapterFileError, ConfigError, InjectionError
from adalora.methods import build_method
from adalora.reading import read_adapter
from adalora.recipe import Recipe, load_recipe
from adalora.result import RunResult
from adalora.train import _prepare, run
from adalora.trainer import give_head_its_rate
from folders import rows, save_bert, write
from tiny import TOKENS, bert, gpt2, peft_warnings

# The fixture `finished` draws a run of each method.
pytestmark = pytest.mark.usefixtures("undrawn")

STEPS = 12
# The small BERT of `folders`: 2 layers of width 32, 64 inside; q, k, v, o, up, down, and a head for 2 classes.
COSTS = {
    "query": 64,
    "key": 64,
    "value": 64,
    "attention.output.dense": 64,
    "intermediate.dense": 96,
    "output.dense": 96,
}
WHOLE = 2 * sum(COSTS.values())  # of one rank everywhere
MATRICES, HEAD = 12, 32 * 2 + 2
ONLY = "exclude_modules: [pooler.dense]"
PHASES = "tinit: 2, tfinal: 4, deltaT: 2"

METHODS = {
    "full": "{name: full}",
    "bitfit": "{name: bitfit}",
    "houlsby": "{name: houlsby, bottleneck: 3}",
    "pfeiffer": "{name: pfeiffer, bottleneck: 3}",
    "lora": f"{{name: lora, r: 2, {ONLY}}}",
    "lora-regu": f"{{name: lora-regu, r: 2, {ONLY}}}",
    "svd-lora": f"{{name: svd-lora, r: 2, {ONLY}}}",
    "prune-lora": f"{{name: prune-lora, init_r: 3, target_r: 2, {PHASES}, {ONLY}}}",
    "squeeze-lora": f"{{name: squeeze-lora, init_r: 4, target_r: 2, {ONLY}}}",
    "peft-adalora": f"{{name: peft-adalora, init_r: 3, target_r: 2, {PHASES}, {ONLY}}}",
}
# Three kinds of parameters in `make check`: of the base, of PEFT's wrapper, of ours in place. The rest waits.
FEW = [
    name if name in ("full", "lora", "adalora") else pytest.param(name, marks=pytest.mark.slow)
    for name in (*METHODS, "adalora")
]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    save_bert(folder / "bert")
    write(folder / "train.jsonl", rows(48))
    write(folder / "dev.jsonl", rows(8, seed=1))
    return folder


def recipe_of(world: Path, method: str, *more: str) -> Recipe:
    settings = [
        f"model.name_or_path={world / 'bert'}",
        f"data.train={world / 'train.jsonl'}",
        f"data.validation={world / 'dev.jsonl'}",
        "training={per_device_train_batch_size: 8, learning_rate: 1e-2, save_strategy: 'no', eval_strategy: 'no'}",
        f"training.max_steps={STEPS}",
        f"method={method}",
        *more,
    ]
    return load_recipe("text-classification", settings)


def train(world: Path, out: Path, method: str, *more: str, resume: bool = False) -> RunResult:
    with peft_warnings():
        return run(recipe_of(world, method, *more), out, Console(quiet=True), resume)


@pytest.fixture(scope="session")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunResult]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    # Saving ends with the check that the folder, loaded into a fresh base, gives equal outputs.
    return {name: train(world, folder / name, method) for name, method in METHODS.items()}


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_every_method_runs_and_its_result_says_so(finished: dict[str, RunResult]) -> None:
    for name, result in finished.items():
        record = json.loads((result.folder / "result.json").read_text())
        assert record["method"] == name and record["steps"] == STEPS and record["complete"]
        assert record["parameters"]["head"] == HEAD


SIZES = {
    "full": None,
    "bitfit": None,
    "houlsby": (4 * (2 * 32 * 3 + 3 + 32),) * 2,
    "pfeiffer": (2 * (2 * 32 * 3 + 3 + 32),) * 2,
    "lora": (2 * WHOLE,) * 2,
    "lora-regu": (2 * WHOLE,) * 2,
    "svd-lora": (2 * (WHOLE + MATRICES),) * 2,
    "prune-lora": (3 * WHOLE, None),
    "squeeze-lora": (4 * WHOLE, None),
    "peft-adalora": (3 * (WHOLE + MATRICES), None),
}


def cost_of(name: str) -> int:
    return COSTS[max((ending for ending in COSTS if name.endswith(ending)), key=len)]


@pytest.mark.parametrize("name", METHODS)
def test_counts_equal_the_formulas(name: str, finished: dict[str, RunResult]) -> None:
    count, model = finished[name].count, finished[name].model
    if name == "full":
        whole = sum(parameter.numel() for parameter in model.parameters())
        assert (count.peak, count.final) == (whole - HEAD, whole - HEAD)
    elif name == "bitfit":
        # A layer: q, k, v, o, down and two norms of 32, up of 64; then the norm of the embeddings and the pooler.
        assert (count.peak, count.final) == (2 * (7 * 32 + 64) + 32 + 32,) * 2
    else:
        peak, final = SIZES[name]  # type: ignore[misc]
        assert count.peak == peak
        if final is not None:
            assert count.final == final


@pytest.mark.parametrize("name", ["prune-lora", "squeeze-lora", "peft-adalora"])
def test_what_is_counted_in_the_end_is_what_lies_in_the_file(name: str, finished: dict[str, RunResult]) -> None:
    result = finished[name]
    tensors = load_file(result.folder / "adapter" / "adapter_model.safetensors")
    ranks = {key: value.shape[0] for key, value in tensors.items() if "lora_A" in key}
    assert sum(value.numel() for key, value in tensors.items() if ".lora_" in key) == result.count.final
    if name == "squeeze-lora":
        assert 2 * WHOLE - 64 < result.count.final <= 2 * WHOLE
    else:
        assert sum(ranks.values()) == 2 * MATRICES
    assert result.count.final < result.count.peak


@pytest.mark.parametrize(
    "name,trained",
    [
        ("bitfit", ("bias",)),
        ("houlsby", (".adapter.down.weight", ".adapter.down.bias", ".adapter.up.weight", ".adapter.up.bias")),
        ("pfeiffer", (".adapter.down.weight", ".adapter.down.bias", ".adapter.up.weight", ".adapter.up.bias")),
        ("lora", (".lora_A.default.weight", ".lora_B.default.weight")),
        ("lora-regu", (".lora_A.default.weight", ".lora_B.default.weight")),
        ("svd-lora", (".lora_A", ".lora_B", ".lora_E")),
        ("prune-lora", (".lora_A.default.weight", ".lora_B.default.weight")),
        ("squeeze-lora", (".lora_A.default.weight", ".lora_B.default.weight")),
        ("peft-adalora", (".lora_A.default", ".lora_B.default", ".lora_E.default")),
    ],
)
def test_only_what_a_method_names_trains_and_changes(
    name: str, trained: tuple[str, ...], finished: dict[str, RunResult], world: Path
) -> None:
    result = finished[name]
    names = trained_names(result.model)
    assert {n for n in names if not n.endswith(trained) and "classifier" not in n} == set()
    assert {ending for ending in trained if any(n.endswith(ending) for n in names)} == set(trained)
    recipe = load_recipe(str(result.folder / "recipe.yaml"))
    base = dict(result.task.build_model(str(world / "bert"), recipe).named_parameters())
    for key, value in result.model.named_parameters():
        plain = key.removeprefix("base_model.model.").replace(".base_layer", "")
        if key not in names and plain in base and "classifier" not in key:
            assert torch.equal(value.cpu(), base[plain]), key


def test_full_fine_tuning_trains_and_changes_everything(finished: dict[str, RunResult], world: Path) -> None:
    result = finished["full"]
    assert trained_names(result.model) == {name for name, _ in result.model.named_parameters()}
    recipe = load_recipe(str(result.folder / "recipe.yaml"))
    base = dict(result.task.build_model(str(world / "bert"), recipe).named_parameters())
    same = [name for name, value in result.model.named_parameters() if torch.equal(value.cpu(), base[name])]
    assert [name for name in same if not name.endswith("key.bias")] == []  # softmax does not see those of the keys


@pytest.mark.parametrize("name", METHODS)
def test_the_resolved_recipe_builds_an_equal_method_that_loads_the_folder(
    name: str, finished: dict[str, RunResult], world: Path
) -> None:
    result = finished[name]
    recipe = load_recipe(str(result.folder / "recipe.yaml"))
    method = build_method(recipe.method)
    assert {"name": name, **method.options()} == recipe.method
    with torch.no_grad(), peft_warnings():
        model = method.load(result.task.build_model(str(world / "bert"), recipe), result.folder / "adapter")
        batch, key = result.task.probe(model, "validation")
        found, wanted = (getattr(m.eval()(**batch), key) for m in (model, result.model))
    assert float((found - wanted).abs().max()) < 1e-4
    assert trained_names(model) == set()


@pytest.mark.parametrize("name", FEW)
def test_weight_decay_is_for_the_head_and_the_base_and_not_for_what_a_method_adds(
    name: str, world: Path, tmp_path: Path
) -> None:
    """In all methods alike, unless the recipe says otherwise."""
    method = METHODS.get(name, f"{{name: adalora, init_r: 3, target_r: 2, {ONLY}}}")
    for decay in (False, True):
        more = ["training.weight_decay=0.1", *(["training.decay_adapter=true"] if decay else [])]
        with peft_warnings():
            job = _prepare(recipe_of(world, method, *more), tmp_path / str(decay), Console(quiet=True), False)
        trained = {name: p for name, p in job.model.named_parameters() if p.requires_grad}
        rates = {id(p): g["weight_decay"] for g in job.trainer.optimizer.param_groups for p in g["params"]}
        assert rates.keys() == {id(p) for p in trained.values()}
        added, count = {id(p) for p in job.method.added(job.model)}, job.method.count(job.model)
        size = sum(p.numel() for p in trained.values() if id(p) in added)
        assert size == (0 if name in ("full", "bitfit") else count.peak)
        for key, parameter in trained.items():
            usual = 0.0 if parameter.dim() < 2 else 0.1
            assert rates[id(parameter)] == (usual if decay or id(parameter) not in added else 0.0), key


@pytest.mark.parametrize("name", FEW)
def test_a_head_has_the_rate_that_is_asked_for_and_nothing_else_has(name: str, world: Path, tmp_path: Path) -> None:
    method = METHODS.get(name, f"{{name: adalora, init_r: 3, target_r: 2, {ONLY}}}")
    more = ["training.learning_rate=0.5", "training.head_learning_rate=0.25", "training.weight_decay=0.1"]
    with peft_warnings():
        job = _prepare(recipe_of(world, method, *more), tmp_path / "run", Console(quiet=True), False)
    trained = {name: p for name, p in job.model.named_parameters() if p.requires_grad}
    groups = {id(p): group for group in job.trainer.optimizer.param_groups for p in group["params"]}
    assert groups.keys() == {id(p) for p in trained.values()}
    heads = {key for key in trained if groups[id(trained[key])]["lr"] == 0.25}
    assert {groups[id(p)]["lr"] for key, p in trained.items() if key not in heads} == {0.5}
    assert sum(trained[key].numel() for key in heads) == HEAD and all("classifier" in key for key in heads)
    assert {key: groups[id(trained[key])]["weight_decay"] for key in heads} == {
        key: 0.1 if trained[key].dim() > 1 else 0.0 for key in heads
    }


def test_the_heads_rate_follows_the_same_schedule(world: Path, tmp_path: Path) -> None:
    more = ["training.learning_rate=0.01", "training.head_learning_rate=0.02", "training.max_steps=1"]
    with peft_warnings():
        job = _prepare(recipe_of(world, METHODS["lora"], *more), tmp_path / "run", Console(quiet=True), False)
    job.trainer.train()
    groups = job.trainer.optimizer.param_groups
    assert {group["initial_lr"] for group in groups} == {0.01, 0.02}
    assert {group["lr"] for group in groups} == {0.0}  # the end of a linear schedule
    with pytest.raises(ConfigError, match="no head trains"):
        give_head_its_rate(job.trainer, [], 0.1)


def test_a_rate_for_a_head_that_is_none_is_refused(world: Path, tmp_path: Path) -> None:
    for wrong in ("-1", "fast", ".inf", "true"):
        with pytest.raises(ConfigError, match=r"'training\.head_learning_rate' is .*; it must be a number"):
            recipe = recipe_of(world, METHODS["lora"], f"training.head_learning_rate={wrong}")
            _prepare(recipe, tmp_path / "run", Console(quiet=True), False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prune-lora", "squeeze-lora", "peft-adalora"])
def test_a_size_in_parameters_is_nearly_met_by_what_shrinks_and_never_exceeded(
    name: str, world: Path, tmp_path: Path
) -> None:
    goal, phases = 2 * WHOLE + 100, "" if name == "squeeze-lora" else f"{PHASES}, "
    result = train(world, tmp_path / "run", f"{{name: {name}, parameters: {goal}, init_r: 5, {phases}{ONLY}}}")
    assert goal - 65 < result.count.final <= goal  # the cheapest thing to add is 64 or 65


@pytest.mark.parametrize("name", ["lora", "lora-regu", "svd-lora", "houlsby", "pfeiffer"])
@pytest.mark.parametrize("ranks", [1, 2.3])
def test_a_size_in_parameters_is_nearly_met_by_what_stays(name: str, ranks: float) -> None:
    goal = int(ranks * 2 * (4 * 32 + 2 * 40))  # of the small BERT of `tiny`, 16 wide and 24 inside
    only = {} if name in ("houlsby", "pfeiffer") else {"exclude_modules": ["pooler.dense"]}
    method = build_method({"name": name, "parameters": goal, **only})
    with peft_warnings():
        assert goal - 41 < method.count(method.prepare(bert())).final <= goal


@pytest.mark.parametrize("name", ["prune-lora", "squeeze-lora", "peft-adalora"])
def test_a_run_that_is_cut_short_meets_its_budget(name: str, world: Path, tmp_path: Path) -> None:
    result = train(world, tmp_path / "run", METHODS[name], "max_minutes=1e-9")
    assert result.steps == 1
    tensors = load_file(result.folder / "adapter" / "adapter_model.safetensors")
    ranks = sum(value.shape[0] for key, value in tensors.items() if "lora_A" in key)
    assert result.count.final <= 2 * WHOLE if name == "squeeze-lora" else 0 < ranks <= 2 * MATRICES
    assert sum(value.numel() for key, value in tensors.items() if ".lora_" in key) == result.count.final


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prune-lora", "squeeze-lora", "peft-adalora"])
def test_a_method_that_cannot_go_on_from_a_checkpoint_starts_again(name: str, world: Path, tmp_path: Path) -> None:
    out, more = tmp_path / "run", ["training.save_strategy=steps", "training.save_steps=4"]
    cut = train(world, out, METHODS[name], "max_minutes=1e-9", *more)
    assert cut.steps == 1 and list((out / "checkpoints").iterdir())
    again = train(world, out, METHODS[name], *more, resume=True)
    assert again.steps == STEPS and again.stopped is None
    assert json.loads((out / "result.json").read_text())["resumed_from"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["houlsby", "svd-lora", "full"])
def test_a_resumed_run_ends_as_one_that_was_never_cut(
    name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adalora.integrations.stopping import StopGracefully

    more = ["training.save_strategy=steps", "training.save_steps=4"]
    original = StopGracefully.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            self.reason = "cut"
        original(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StopGracefully, "on_step_end", stop)
        assert train(world, tmp_path / "run", METHODS[name], *more).steps == 5
    again = train(world, tmp_path / "run", METHODS[name], *more, resume=True)
    assert again.steps == STEPS
    whole = dict(train(world, tmp_path / "whole", METHODS[name], *more).model.named_parameters())
    assert [key for key, value in again.model.named_parameters() if not torch.equal(value, whole[key])] == []


@pytest.mark.parametrize("name", ["bitfit", "houlsby"])
def test_checkpoints_hold_what_trains_and_nothing_else(name: str, world: Path, tmp_path: Path) -> None:
    result = train(world, tmp_path / "run", METHODS[name], "training.save_strategy=steps", "training.save_steps=6")
    first = min((result.folder / "checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    assert load_file(first / "model.safetensors").keys() == trained_names(result.model)


@pytest.mark.parametrize("name", ["prune-lora", "squeeze-lora", "peft-adalora"])
def test_going_back_to_a_best_checkpoint_is_refused(name: str, world: Path, tmp_path: Path) -> None:
    more = "training={max_steps: 2, eval_strategy: epoch, save_strategy: epoch, load_best_model_at_end: true}"
    with pytest.raises(ConfigError, match=f"method {name} meets its budget on the way"):
        train(world, tmp_path / "out", METHODS[name], more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options,message",
    [
        ({"name": "houlsbi"}, "did you mean 'houlsby'"),
        ({"name": "full", "r": 1}, "method full has no option 'r'"),
        ({"name": "bitfit", "modules": ["x"]}, "method bitfit has no option 'modules'; did you mean 'modules_to_save'"),
        ({"name": "bitfit", "modules_to_save": "head"}, "modules_to_save is 'head'"),
        ({"name": "houlsby", "botleneck": 4}, "did you mean 'bottleneck'"),
        ({"name": "houlsby", "bottleneck": 0}, "bottleneck is 0; give a whole number"),
        (
            {"name": "pfeiffer", "parameters": -1},
            "parameters is -1; give a whole number of at least 1, or leave it out",
        ),
        ({"name": "lora-regu", "orth_reg_wieght": 1}, "did you mean 'orth_reg_weight'"),
        ({"name": "lora-regu", "orth_reg_weight": -1}, "orth_reg_weight is -1"),
        ({"name": "lora-regu", "orth_reg_form": "cosine"}, "orth_reg_form is 'cosine'; choose norm or squared"),
        ({"name": "lora-regu", "r": 0}, "r is 0"),
        ({"name": "svd-lora", "rank": 2}, "method svd-lora has no option 'rank'"),
        ({"name": "svd-lora", "lora_dropout": 1}, "lora_dropout is 1"),
        ({"name": "prune-lora", "target_r": 13}, "target_r (13) is above init_r (12)"),
        ({"name": "prune-lora", "target_r": 0}, "target_r is 0"),
        ({"name": "prune-lora", "tinit": 1.5}, "a float is a fraction of the run"),
        ({"name": "prune-lora", "beta3": 0.1}, "method prune-lora has no option 'beta3'"),
        ({"name": "peft-adalora", "target_r": 12}, "needs 1 ≤ target_r < init_r"),
        ({"name": "peft-adalora", "init_r": 4, "target_r": 6}, "target_r (6) is above init_r (4)"),
        ({"name": "peft-adalora", "delta_t": 6}, "did you mean 'deltaT'"),
        ({"name": "squeeze-lora", "at": 1.0}, "at is 1.0; give a fraction"),
        ({"name": "squeeze-lora", "by": "size"}, "by is 'size'; choose density or plain"),
        ({"name": "squeeze-lora", "init_r": 4}, "target_r (8) is above init_r (4)"),
        ({"name": "static-lora"}, "pattern is None; give the folder"),
        ({"name": "static-lora", "pattern": {"a": -1}}, "pattern['a'] is -1"),
        ({"name": "static-lora", "pattern": "x", "permute": True}, "permute is True"),
        ({"name": "static-lora", "pattern": "x", "target_modules": ["a"]}, "has no option 'target_modules'"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_method(options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"name": "houlsby", "parameters": 10}, "below what adapters of size 1 everywhere need"),
        ({"name": "svd-lora", "parameters": 10}, "parameters=10 is below one triplet"),
        ({"name": "lora-regu", "parameters": 10}, "below what rank 1 everywhere needs"),
        ({"name": "prune-lora", "parameters": 10}, "parameters=10 does not lie between one doublet"),
        ({"name": "prune-lora", "parameters": 10**9}, "change it, or init_r"),
        ({"name": "squeeze-lora", "parameters": 10}, "does not lie between one rank of one matrix"),
        ({"name": "peft-adalora", "parameters": 10**9}, "does not lie between one triplet"),
        ({"name": "static-lora", "pattern": {"bert.nope": 2}}, "has no such module"),
        ({"name": "static-lora", "pattern": {"bert.encoder": 2}}, "the pattern names 'bert.encoder'"),
        ({"name": "static-lora", "pattern": {"bert.pooler.dense": 0}}, "no matrix would get a rank"),
        ({"name": "static-lora", "pattern": {"bert.pooler.dense": 2}, "parameters": 63}, "the pattern costs 64"),
        ({"name": "prune-lora", "target_modules": ["word_embeddings"]}, "is no linear layer"),
        ({"name": "bitfit", "modules_to_save": ["clasifier"]}, "modules_to_save names 'clasifier'"),
        ({"name": "houlsby", "modules_to_save": ["clasifier"]}, "modules_to_save names 'clasifier'"),
        ({"name": "lora", "modules_to_save": ["clasifier"]}, "modules_to_save names 'clasifier'"),
        ({"name": "squeeze-lora", "target_modules": ["word_embeddings"]}, "is no linear layer"),
    ],
)
def test_a_size_or_a_module_that_does_not_exist_is_refused(options: dict[str, Any], message: str) -> None:
    with peft_warnings(), pytest.raises(AdaLoraError) as caught:
        build_method(options).prepare(bert())
    assert message in str(caught.value)


def llama() -> Any:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    return transformers.LlamaForCausalLM(config).eval()


def deberta() -> Any:
    import transformers

    config = transformers.DebertaV2Config(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    return transformers.DebertaV2ForSequenceClassification(config).eval()


def bart() -> Any:
    import transformers

    config = transformers.BartConfig(
        vocab_size=40,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=16,
    )
    return transformers.BartForConditionalGeneration(config).eval()


BERT_ENDS = ["attention.output.dense", "output.dense"]
LLAMA_ENDS = ["self_attn.o_proj", "mlp.down_proj"]


@pytest.mark.parametrize(
    "build,ends,pairs",
    [
        (bert, BERT_ENDS, 2),
        (lambda: bert(kind="BertForTokenClassification"), BERT_ENDS, 2),
        (deberta, BERT_ENDS, 2),
        (llama, LLAMA_ENDS, 2),
        (gpt2, ["attn.c_proj", "mlp.c_proj"], 2),
    ],
)
def test_adapters_stand_behind_the_projections_and_start_near_the_identity(
    build: Any, ends: list[str], pairs: int
) -> None:
    with torch.no_grad():
        before = build()(TOKENS).logits
        for name, own in (("houlsby", ends), ("pfeiffer", ends[1:])):
            torch.manual_seed(0)
            model = build_method({"name": name, "bottleneck": 3}).prepare(build())
            adapted = [key.removesuffix(".adapter") for key, _ in model.named_modules() if key.endswith(".adapter")]
            assert len(adapted) == pairs * len(own)
            assert all(key.endswith(tuple(own)) for key in adapted)
            if name == "pfeiffer":
                assert not any("attention" in key or "attn" in key for key in adapted)
            torch.manual_seed(0)
            base = build()
            difference = (model(TOKENS).logits - base(TOKENS).logits).abs().max()
            assert 0 < difference < 0.05 * before.abs().max()


def test_cross_attention_gets_adapters_too() -> None:
    model = build_method({"name": "houlsby", "bottleneck": 3}).prepare(bart())
    adapted = [name for name, _ in model.named_modules() if name.endswith(".adapter")]
    assert len(adapted) == 2 * 2 + 2 * 3
    assert sum("encoder_attn" in name for name in adapted) == 2


def test_an_adapter_computes_its_formula_in_front_of_the_residual() -> None:
    model = build_method({"name": "houlsby", "bottleneck": 3}).prepare(bert())
    dense = model.bert.encoder.layer[0].output.dense
    x = torch.randn(2, 5, 24)
    h = x @ dense.weight.T + dense.bias
    down, up = dense.adapter.down, dense.adapter.up
    wanted = h + torch.nn.functional.silu(h @ down.weight.T + down.bias) @ up.weight.T + up.bias
    assert torch.allclose(dense(x), wanted, atol=1e-6)
    assert down.weight.abs().max() <= 0.02 and not down.bias.any() and not up.bias.any()


def test_adapters_refuse_a_model_whose_places_they_do_not_know() -> None:
    import transformers

    config = transformers.ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=2)
    for name in ("houlsby", "pfeiffer"):
        with pytest.raises(InjectionError, match=r"cannot tell where the layers .* \(0 places\)"):
            build_method({"name": name}).prepare(transformers.ResNetForImageClassification(config))


def test_bitfit_refuses_a_model_without_biases() -> None:
    with pytest.raises(InjectionError, match="has no biases outside its head"):
        build_method({"name": "bitfit"}).prepare(llama())


def test_a_folder_of_another_method_or_model_is_refused(finished: dict[str, RunResult], tmp_path: Path) -> None:
    houlsby, bitfit = (finished[name].folder / "adapter" for name in ("houlsby", "bitfit"))
    with pytest.raises(AdapterFileError, match="says peft_type='HOULSBY', not 'BITFIT'"):
        build_method({"name": "bitfit"}).load(bert(), houlsby)
    with pytest.raises(AdapterFileError, match="It was made for another model"):
        build_method({"name": "bitfit"}).load(bert(), bitfit)
    with pytest.raises(AdapterFileError, match=r"cannot read .*adapter_config\.json"):
        build_method({"name": "houlsby"}).load(bert(), tmp_path)
    with pytest.raises(AdapterFileError, match="cannot read the model"):
        build_method({"name": "full"}).load(bert(), tmp_path)


@pytest.mark.parametrize("name", ["lora", "houlsby", "bitfit"])
def test_a_damaged_folder_is_refused_with_the_base_model_as_it_was(
    name: str, finished: dict[str, RunResult], tmp_path: Path
) -> None:
    method, source = build_method({"name": name}), finished[name].folder / "adapter"
    tensors = load_file(source / "adapter_model.safetensors")
    config = (source / "adapter_config.json").read_text()
    first, last = min(tensors), max(tensors)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("{", tensors),
        ("[" * 100_000, tensors),
        (config, tensors | {last: torch.full_like(tensors[last], torch.inf)}),
        (config, tensors | {last: torch.zeros(3, 3, 3)}),
        (config, tensors | {f"{first}.x.lora_A.weight": torch.zeros(1, 1)}),
    ]
    if name == "lora":
        wrong += [(config, {key: tensors[key] for key in tensors if key != gone}) for gone in (first, last)]
    for text, values in wrong:
        (tmp_path / "adapter_config.json").write_text(text)
        save_file(values, tmp_path / "adapter_model.safetensors")
        base = bert()
        before = {key: (value, value.requires_grad) for key, value in base.state_dict(keep_vars=True).items()}
        with peft_warnings(), pytest.raises(AdapterFileError, match=re.escape(str(tmp_path))):
            method.load(base, tmp_path)
        after = base.state_dict(keep_vars=True)
        assert after.keys() == before.keys() and base.training is bert().training
        assert all(after[key] is value and value.requires_grad is trains for key, (value, trains) in before.items())
        assert not any(module._forward_hooks for module in base.modules())


def test_pefts_adalora_is_stored_in_the_format_that_this_package_reads(finished: dict[str, RunResult]) -> None:
    stored = read_adapter(finished["peft-adalora"].folder / "adapter")
    assert sum(len(E) for _, E, _ in stored.factors.values()) == 2 * MATRICES
    assert stored.config.init_r == 3
