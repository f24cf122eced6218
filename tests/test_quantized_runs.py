"""Quantized pre-trained models end to end: transformers' configurations, Trainer, recipes, and folders to load."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)
from typer.testing import CliRunner

import adalora
from adalora import AdaLoraConfig
from adalora.errors import ConfigError
from adalora.injection import named_adapters
from adalora.integrations.transformers import AdaLoraCallback
from adalora.methods import build_method
from adalora.quantized import library_of
from adalora.recipe import load_recipe
from adalora.tasks.encoder import packaged_encoder
from adalora.tasks.pretrained import load_model
from adalora.tasks.quantization import METHODS
from adalora.train import run
from folders import rows, save_bert, write
from tiny import relative

for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # what they say of this CPU at import
    logging.getLogger(name).setLevel(logging.ERROR)
pytest.importorskip("bitsandbytes")
ao = pytest.importorskip("torchao.quantization")

HEAD = ["classifier"]
CONFIGS = {
    "nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=HEAD
    ),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=HEAD),
    "ao-int8": lambda: TorchAoConfig(ao.Int8WeightOnlyConfig(), modules_to_not_convert=HEAD),
    "ao-int4": lambda: TorchAoConfig(
        ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32)), modules_to_not_convert=HEAD
    ),
}
# Of all logits. bitsandbytes' int8 rounds inputs: two computations of one function differ by that.
EXACT = {"nf4": 1e-5, "int8": 0.05, "ao-int8": 1e-5, "ao-int4": 1e-5}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(before)


def encoder(folder: Path, kind: str | None) -> Any:
    """The packaged encoder, two layers of it, with a new head."""
    transformers.set_seed(0)
    options = {} if kind is None else {"quantization_config": CONFIGS[kind]()}
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, num_hidden_layers=2, **options)


def data(count: int = 16) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 2000, (count, 12), generator=generator)
    return [{"input_ids": row, "labels": index % 3} for index, row in enumerate(ids)]


def logits(model: Any) -> Tensor:
    model.eval()
    for module in model.modules():
        if hasattr(module, "quant_state"):
            module.train()  # else some CPUs round its scales for inference, where no adapter forbids it
    ids = torch.stack([row["input_ids"] for row in data(6)])
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def trainer(folder: Path, out: Path, kind: str) -> Trainer:
    model = encoder(folder, kind)
    adalora.inject(model, AdaLoraConfig(init_r=6, target_r=3, exclude_modules=["pooler.dense"], modules_to_save=HEAD))
    arguments = TrainingArguments(
        str(out),
        max_steps=6,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        save_steps=3,
        eval_strategy="steps",
        eval_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(model, arguments, train_dataset=data(), eval_dataset=data(4), callbacks=[AdaLoraCallback()])


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_pretrained_encoder_trains_resumes_and_leaves_in_every_form(kind: str, tmp_path: Path) -> None:
    folder = packaged_encoder()
    whole = trainer(folder, tmp_path / "whole", kind)
    whole.train()
    model: Any = whole.model
    stored = load_file(tmp_path / "whole" / "checkpoint-3" / "model.safetensors")
    assert {key.rpartition(".")[2] for key in stored} == {"lora_A", "lora_E", "lora_B", "weight", "bias"}
    assert not any(key.endswith(".weight") and "classifier" not in key for key in stored)  # nothing of the base

    resumed = trainer(folder, tmp_path / "resumed", kind)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    state, other = (
        {k: v for k, v in m.state_dict().items() if "lora" in k or "classifier" in k} for m in (model, resumed.model)
    )
    assert [key for key, value in state.items() if not torch.equal(value, other[key])] == []
    assert sum(module.rank for _, module in named_adapters(model)) == 3 * 12

    live = logits(model)
    adalora.save_adapter(model, tmp_path / "own")
    loaded = adalora.load_adapter(encoder(folder, kind), tmp_path / "own")
    assert relative(logits(loaded), live) < EXACT[kind]

    size: dict[str, int] = {}
    for into in ("dequantize", "requantize"):
        adalora.export_merged(model, tmp_path / into, quantized=into)
        with adalora.merged(model, quantized=into):
            merged = logits(model)
        read = AutoModelForSequenceClassification.from_pretrained(tmp_path / into)
        assert hasattr(read.config, "quantization_config") == (into == "requantize")
        assert relative(logits(read), merged) < EXACT[kind]
        size[into] = (tmp_path / into / "model.safetensors").stat().st_size
    assert size["requantize"] < 0.95 * size["dequantize"]
    assert torch.equal(logits(model), live)


def save_llama(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_bf16_llama_in_nf4_learns_with_32_bit_adapters_and_generates_as_before_when_merged(tmp_path: Path) -> None:
    """QLoRA as it is used: bf16 computation on NF4, all linear layers, activations recomputed."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    folder = save_llama(tmp_path / "llama")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.bfloat16)
    adalora.inject(model, AdaLoraConfig(init_r=6, target_r=3))
    assert len(dict(named_adapters(model))) == 14 and model.lm_head.weight.dtype == torch.bfloat16
    assert {p.dtype for p in adalora.adapter_parameters(model)} == {torch.float32}
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    optimizer = torch.optim.AdamW(adalora.adapter_parameters(model), lr=1e-2)
    adalora.RankAllocator(model, total_step=40).attach(optimizer)
    ids, losses = torch.arange(1, 33).view(2, 16), []
    for _ in range(40):
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.35 * losses[0]

    model.eval()
    live = model.generate(ids[:, :4], max_new_tokens=8, do_sample=False, pad_token_id=0)
    adalora.export_merged(model, tmp_path / "merged", quantized="dequantize")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert read.dtype == torch.bfloat16 and type(read.model.layers[0].mlp.up_proj) is nn.Linear
    assert torch.equal(read.generate(ids[:, :4], max_new_tokens=8, do_sample=False, pad_token_id=0), live)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_every_method_on_nf4_are_the_same_after_an_evaluation_bit_for_bit(
    method: str, tmp_path: Path
) -> None:
    """Of width 64, which bitsandbytes can pack for inference; to pack narrower layers it fails."""
    folder, few_bits = save_llama(tmp_path / "llama"), BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=few_bits)
    model: Any = build_method({"name": method}).prepare(base)
    adapter = {name: p for name, p in model.named_parameters() if p.requires_grad and "lora_" in name}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # else some gradients are zero
        for parameter in adapter.values():
            parameter.normal_(0, 0.05, generator=generator)
    ids = torch.arange(1, 33).view(2, 16)

    def gradients() -> dict[str, Tensor]:
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in adapter.items()}

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    after = gradients()
    assert len(before) >= 28 and all(value.any() for value in before.values())
    assert [name for name, value in before.items() if not torch.equal(value, after[name])] == []


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_bert(folder / "bert")
    write(folder / "train.jsonl", rows(48))
    write(folder / "dev.jsonl", rows(16, seed=1))
    return folder


def settings(world: Path, **model: Any) -> list[str]:
    training = {"per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2}
    return [
        f"model={json.dumps({'name_or_path': str(world / 'bert'), **model})}",
        f"data={json.dumps({'train': str(world / 'train.jsonl'), 'validation': str(world / 'dev.jsonl')})}",
        f"training={json.dumps(training | {'learning_rate': 1e-2, 'save_total_limit': 9})}",
    ]


def train(world: Path, out: Path, more: tuple[str, ...] = (), resume: bool = False, **model: Any) -> Any:
    with (out.parent / "screen.txt").open("w") as screen:
        recipe = load_recipe("text-classification", [*settings(world, **model), *more])
        return run(recipe, out, Console(file=screen, soft_wrap=True), resume)


SECTIONS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True},
    "int8": {"load_in_8bit": True},
    "ao-int8": {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"},
}
NF4_IN_FULL = {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SECTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_on_a_quantized_model_trains_resumes_and_merges(
    method: str, kind: str, world: Path, tmp_path: Path
) -> None:
    """With an evaluation after each epoch, in which some CPUs would pack NF4 for inference."""
    from adalora.cli import app

    given, more = SECTIONS[kind], (f"method={{name: {method}}}",)
    result = train(world, tmp_path / "run", more, quantization_config=given)
    assert len([module for module in result.model.modules() if library_of(module)]) >= 13
    head = [module for name, module in result.model.named_modules() if "classifier" in name]
    assert head and not any(library_of(module) for module in head)
    if kind == "nf4":
        assert load_recipe(str(tmp_path / "run" / "recipe.yaml")).model.quantization_config == NF4_IN_FULL | given

    torn = tmp_path / "torn"
    (tmp_path / "run").rename(torn)  # as a kill after the last checkpoint but one leaves it
    adapter = load_file(torn / "adapter" / "adapter_model.safetensors")
    (torn / "result.json").unlink()
    for file in torn.glob("checkpoints/checkpoint-*"):
        if int(file.name.rpartition("-")[2]) > 6:
            shutil.rmtree(file)
    train(world, torn, more, resume=True, quantization_config=given)
    again = load_file(torn / "adapter" / "adapter_model.safetensors")
    assert adapter.keys() == again.keys() and all(torch.equal(value, again[key]) for key, value in adapter.items())

    merge = ["merge", str(torn), "--out", str(tmp_path / "merged")]
    if method == "lora":
        said = CliRunner().invoke(app, [*merge, "--quantized", "dequantize"])
        assert "without a word on the rounding" in str(said.exception)
        said = CliRunner().invoke(app, [*merge, "--set", "model.quantization_config=null"])
        assert said.exit_code == 0
    else:
        assert "quantized='dequantize'" in str(CliRunner().invoke(app, merge).exception)
        said = CliRunner().invoke(app, [*merge, "--quantized", "dequantize"])
        assert said.exit_code == 0 and "dequantize: merged outputs differ by at most" in " ".join(said.output.split())
    read = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert type(read.bert.encoder.layer[0].attention.self.query) is nn.Linear
    assert not hasattr(read.config, "quantization_config")


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"load_in_8bit": True}, "Int8Params"),
        ({"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig", "group_size": 16}, "Int8Tensor"),
        (
            {"quant_method": "torchao", "quant_type": "IntxWeightOnlyConfig", "weight_dtype": "int4", "group_size": 16},
            "IntxUnpackedToInt8Tensor",
        ),
    ],
    ids=["int8", "ao-int8", "ao-int4"],
)
def test_a_recipe_names_the_quantization_and_its_head_stays_as_it_is(
    given: dict[str, Any], kind: str, world: Path
) -> None:
    recipe = load_recipe("text-classification", settings(world, quantization_config=given, dtype="bfloat16"))
    model: Any = load_model(AutoModelForSequenceClassification, str(world / "bert"), recipe, num_labels=3)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert type(layers.pop("classifier").weight) is nn.Parameter
    assert {type(layer.weight).__name__ for layer in layers.values()} == {kind} and len(layers) == 13
    assert model.classifier.weight.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=["nf4", "int8"])
def test_a_plan_knows_the_memory_of_a_quantized_base(given: dict[str, Any], world: Path) -> None:
    from adalora.commands.planning import plan_facts

    recipe = load_recipe("text-classification", settings(world, quantization_config=given))
    planned = plan_facts(recipe, 2, 10, False)["memory"]["base weights"]
    model: Any = load_model(AutoModelForSequenceClassification, str(world / "bert"), recipe, num_labels=2)
    head = sum(p.nbytes for p in model.classifier.parameters())
    scales = [m.SCB.nbytes for m in (layer.weight for layer in model.modules() if hasattr(layer, "state"))]
    states = [layer.weight.quant_state for layer in model.modules() if hasattr(layer, "quant_state")]
    scales += [state.absmax.nbytes + state.state2.absmax.nbytes for state in states]
    assert planned == pytest.approx(sum(p.nbytes for p in model.parameters()) - head + sum(scales), rel=0.01)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"load_in_4bits": True}, "it must say load_in_4bit: true or load_in_8bit: true"),
        (
            {"load_in_4bit": True, "bnb_4bit_type": "nf4"},
            "no key 'model.quantization_config.bnb_4bit_type'.*did you mean",
        ),
        ({"load_in_4bit": True, "load_in_8bit": True}, "only one can be used"),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "quantizes anew in each forward"),
        ({"quant_method": "torchao", "quant_type": "Int8WeightOnly"}, "did you mean 'Int8WeightOnlyConfig'"),
        ({"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig", "bits": 3}, "no key .*bits"),
        ({"quant_method": "gptq", "bits": 4}, "quant_method: torchao with quant_type"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_a_mistake_in_the_section_is_told_before_anything_is_read(
    given: dict[str, Any], message: str, world: Path
) -> None:
    from adalora.train import check

    recipe = load_recipe("text-classification", settings(world, quantization_config=given))
    with pytest.raises(ConfigError, match=message):
        check(recipe, world / "run")


def test_a_method_that_trains_the_base_is_refused_on_a_quantized_one(world: Path) -> None:
    from adalora.train import check

    recipe = load_recipe(
        "text-classification", [*settings(world, quantization_config={"load_in_4bit": True}), "method={name: full}"]
    )
    with pytest.raises(ConfigError, match="'full', which is not for a quantized base"):
        check(recipe, world / "run")


def test_a_missing_library_is_named_with_its_extra(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adalora.tasks import quantization

    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    recipe = load_recipe("text-classification", settings(world, quantization_config={"load_in_4bit": True}))
    with pytest.raises(ConfigError, match=r"needs bitsandbytes, .* pip install 'adalora\[quantized\]'"):
        quantization.check_quantization(recipe)
