"""Quantized bases: gradients, resume, files and merges on layers of bitsandbytes and torchao, on the CPU."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

import adalora
from adalora import AdaLoraConfig, RankAllocator
from adalora.errors import InjectionError
from adalora.injection import Progress, base_size, model_budget, named_adapters, record_progress
from adalora.quantized import dequantized, is_quantized
from adalora.quantizedmodels import rounds_inputs
from tiny import peft_warnings, relative

for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # what they say of this CPU at import
    logging.getLogger(name).setLevel(logging.ERROR)
bnb = pytest.importorskip("bitsandbytes")
ao = pytest.importorskip("torchao.quantization")

KINDS = ("nf4", "nf4-nested", "fp4", "int8", "ao-int8", "ao-int4")
# bitsandbytes' int8 quantizes its inputs too, to 7 bits and a sign.
EXACT = {kind: 0.02 if kind == "int8" else 1e-5 for kind in KINDS}
CONFIG = AdaLoraConfig(target_modules=["first", "second"], modules_to_save=["head"], init_r=4, target_r=2)


class Net(nn.Module):
    """Two adapted layers around one that is not, so that gradients must pass all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 96)
        self.between = nn.Linear(96, 64, bias=False)
        self.second = nn.Linear(64, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.between(self.first(x).tanh()).tanh()).tanh())


def quantize(model: nn.Module, kind: str, names: tuple[str, ...] = ("first", "between", "second")) -> Any:
    if kind.startswith("ao"):
        config = (
            ao.Int8WeightOnlyConfig()
            if kind == "ao-int8"
            else ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32))
        )
        ao.quantize_(model, config, filter_fn=lambda _, name: name in names)
        return model
    for name in names:
        old = getattr(model, name)
        sizes = (old.in_features, old.out_features, old.bias is not None)
        if kind == "int8":
            new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(
                *sizes, compute_dtype=torch.float32, quant_type=kind[:3], compress_statistics="nested" in kind
            )
        new.load_state_dict(old.state_dict())
        setattr(model, name, new.to("cpu"))  # which quantizes
    return model.eval()


def net(kind: str) -> Any:
    torch.manual_seed(0)
    return quantize(Net(), kind)


def plain_twin(model: nn.Module) -> Net:
    """The same numbers in floating point."""
    twin = Net()
    for name, module in model.named_children():
        layer = getattr(twin, name)
        layer.weight.data = dequantized(module) if is_quantized(module) else module.weight.data.clone()
        if layer.bias is not None:
            layer.bias.data = module.bias.data.clone()
    return twin


def adapted(kind: str) -> Any:
    model = adalora.inject(net(kind), CONFIG)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, module in named_adapters(model):
            module.lora_E.normal_()
            module.lora_E[:2] = 0
            module.lora_keep[:2] = False
    record_progress(model, Progress(20, 20))
    return model.eval()


def held(model: nn.Module) -> dict[str, Any]:
    """torchao's tensors do not compare; that a weight is the same object is what is promised anyway."""
    return {name: (type(module), id(getattr(module, "weight", None))) for name, module in model.named_modules()}


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 64, generator=generator), torch.randint(3, (8,), generator=generator)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    x, labels = batch()
    model.zero_grad()
    functional.cross_entropy(model.train()(x), labels).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_injection_leaves_function_size_and_budget(kind: str) -> None:
    model, (x, _) = net(kind), batch()
    adalora.inject(model, CONFIG)  # before the first evaluation, which on some CPUs would round the scales
    wanted = plain_twin(model)(x)
    assert relative(model(x), wanted) < EXACT[kind]
    plain = adalora.inject(Net(), CONFIG)
    assert base_size(model) == base_size(plain)
    assert model_budget(model) == model_budget(plain)
    assert {module.lora_A.dtype for _, module in named_adapters(model)} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dequantized_model_also_after_an_evaluation(kind: str) -> None:
    """On a CPU with AVX512-BF16, bitsandbytes packs 4-bit weights in evaluation, and no gradient passes them then."""
    model = adapted(kind)
    twin = adalora.inject(plain_twin(model), CONFIG)
    twin.load_state_dict({key: value for key, value in model.state_dict().items() if "lora" in key}, strict=False)
    wanted, (x, _) = gradients(twin), batch()
    before = gradients(model)
    with torch.no_grad():
        model.eval()(x)
    after = gradients(model)
    assert before.keys() == after.keys() == wanted.keys() and len(wanted) == 8
    for name, value in wanted.items():
        assert torch.equal(before[name], after[name])
        assert relative(before[name], value) < 5 * EXACT[kind]


def trained(kind: str, steps: int, state: dict[str, Any] | None = None, start: int = 0) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = adalora.inject(net(kind), CONFIG)
    optimizer = torch.optim.AdamW(adalora.adapter_parameters(model), lr=1e-2)
    if state is not None:
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
    allocator = RankAllocator(model, total_step=20).attach(optimizer)
    for step in range(start, steps):
        x, labels = batch(step)
        functional.cross_entropy(model.train()(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.eval()(x)
    return model, (optimizer, allocator)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_bit_exact_and_meets_the_budget(kind: str) -> None:
    whole, (_, allocator) = trained(kind, 20)
    half, (optimizer, _) = trained(kind, 9)
    train = {name: p for name, p in half.state_dict().items() if "lora" in name or "head" in name}
    state = copy.deepcopy({"model": train, "optimizer": optimizer.state_dict()})
    resumed, _ = trained(kind, 20, state, 9)
    for (name, one), (_, other) in zip(named_adapters(whole), named_adapters(resumed), strict=True):
        for key in ("lora_A", "lora_E", "lora_B", "lora_keep"):
            assert torch.equal(getattr(one, key), getattr(other, key)), (name, key)
    assert sum(module.rank for _, module in named_adapters(whole)) == 4 == allocator.spent


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_needs_a_choice_and_states_its_error(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model, (x, _) = adapted(kind), batch()
    live, before = model(x), held(model)
    for merge in (adalora.merge, lambda model: model.first.merge()):
        with pytest.raises(InjectionError, match=r"quantized='dequantize' .* quantized='requantize'"):
            merge(model)
        assert held(model) == before

    error = adalora.merge(model, quantized="dequantize")
    assert error is not None and error.relative < EXACT[kind]
    assert not is_quantized(model.first) and is_quantized(model.between)
    assert relative(model(x), live) < 2 * EXACT[kind]
    adalora.unmerge(model)
    assert torch.equal(model(x), live)

    error = adalora.merge(model, quantized="requantize")
    assert error is not None and is_quantized(model.first)
    assert caplog.messages[-1].startswith("2 quantized layers merged (requantize): merged outputs differ by at most")
    probe = torch.randn(4, 64, generator=torch.Generator().manual_seed(64))
    adalora.unmerge(model)
    with torch.no_grad(), adalora.merged(model, quantized="requantize"):
        merged = {name: getattr(model, name)(probe) for name in ("first", "second")}
    with torch.no_grad():
        gaps = [merged[name] - getattr(model, name)(probe) for name in merged]
        norms = [getattr(model, name)(probe).norm() for name in merged]
    assert error.relative == pytest.approx(max(float(g.norm() / n) for g, n in zip(gaps, norms, strict=True)), rel=1e-5)
    assert error.largest == pytest.approx(max(float(gap.abs().max()) for gap in gaps), rel=1e-5)
    assert 1e-3 < error.relative < 0.5
    assert torch.equal(model(x), live)
    assert held(model) == before


def test_a_small_increment_is_lost_by_requantizing_and_the_error_says_so() -> None:
    """W lies on the grid of its bits: what is less than half a step away is rounded back."""
    model = adapted("nf4")
    with torch.no_grad():
        for _, module in named_adapters(model):
            module.lora_E *= 1e-3
    error = adalora.merge(model, quantized="requantize")
    assert error is not None and error.relative < 1e-3 and error.of_increment > 0.9
    assert str(error).endswith("% of what the adapter adds")


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without")
@pytest.mark.parametrize("kind", KINDS)
def test_files_of_an_adapter_fit_the_quantized_base_again(kind: str, tmp_path: Path) -> None:
    model, (x, _) = adapted(kind), batch()
    live = model(x)
    assert adalora.save_adapter(model, tmp_path / "own") == 0.0
    assert adalora.export_lora(model, tmp_path / "lora") < 1e-6
    loaded = adalora.load_adapter(net(kind), tmp_path / "own").eval()
    assert relative(loaded(x), live) < EXACT[kind]
    weights = load_file(tmp_path / "own" / "adapter_model.safetensors")
    assert {key.removeprefix("base_model.model.").split(".")[0] for key in weights} == {"first", "second", "head"}
    with peft_warnings():
        from peft import PeftModel

        served = PeftModel.from_pretrained(net(kind), str(tmp_path / "lora")).train()  # in which bitsandbytes is exact
        assert relative(served(x), live) < EXACT[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_dequantized_folder_is_the_plain_model_that_the_merge_is(kind: str, tmp_path: Path) -> None:
    model, (x, _) = adapted(kind), batch()
    live = model(x)
    assert adalora.export_merged(model, tmp_path, quantized="dequantize") < 1e-6
    whole = Net()
    whole.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert relative(whole(x), live) < 2 * EXACT[kind]
    assert torch.equal(model(x), live)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_int8_of_bitsandbytes_rounds_its_inputs(kind: str) -> None:
    """There a rounding of 1e-6 before a layer may be one of a percent behind it, and a reload is compared to that."""
    model, (x, _) = adapted(kind), batch()
    moved = relative(model(x * (1 + 1e-6)), model(x))
    assert rounds_inputs(model) == (kind == "int8")
    assert moved < EXACT[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_eject_gives_the_layers_back(kind: str) -> None:
    base = net(kind)
    before = held(base)
    flags = [getattr(module, "support_avx512bf16_for_cpu", None) for module in base.modules()]
    adalora.eject(adalora.inject(base, CONFIG))
    assert held(base) == before
    assert [getattr(module, "support_avx512bf16_for_cpu", None) for module in base.modules()] == flags


def dynamic(model: Any) -> Any:
    ao.quantize_(model, ao.Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda _, name: name == "between")
    return model


def packed(model: Any) -> Any:
    quantize(model, "nf4")
    model.first.weight.quant_state.packing_format_for_cpu = True
    return model


def half(model: Any) -> Any:
    model.first = bnb.nn.Linear8bitLt(64, 96, has_fp16_weights=True)
    return model


def early(model: Any) -> Any:
    model.first = bnb.nn.Linear4bit(64, 96)
    return model


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (dynamic, r"'between' \(Linear\): its kernel passes no right gradient"),
        (packed, r"'first' .* packed its weight for inference .* inject before the first forward"),
        (half, "has_fp16_weights=False"),
        (early, "not quantized yet. Move the model to its device first"),
        (lambda model: quantize(model, "nf4", ("head",)), r"modules_to_save names 'head'.*llm_int8_skip_modules"),
        (lambda model: quantize(model, "ao-int8", ("head",)), r"modules_to_save names 'head'.*modules_to_not_convert"),
    ],
    ids=["activations too", "packed", "16 bits", "not yet", "head", "head of torchao"],
)
def test_what_would_learn_wrongly_is_refused(spoil: Callable[[Any], Any], message: str) -> None:
    model = spoil(Net())
    before = held(model)
    with pytest.raises(InjectionError, match=message):
        adalora.inject(model, CONFIG)
    assert held(model) == before
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_layer_quantized_after_injection_is_known_as_quantized() -> None:
    torch.manual_seed(0)
    model, (x, _) = adalora.inject(Net(), CONFIG), batch()
    live = model(x)
    quantize(model, "ao-int8")
    assert relative(model(x), live) < 0.05
    with pytest.raises(InjectionError, match="a weight that torchao quantized without rounding"):
        adalora.merge(model)
    error = adalora.merge(model, quantized="dequantize")
    assert error is not None and error.relative < 1e-5
    adalora.unmerge(model)
    assert is_quantized(model.first)
