"""Models of a few hundred parameters, adapters in them that look as if training had ended, and what a Trainer takes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adalora import AdaLoraConfig, inject
from adalora.injection import Progress, named_adapters, record_progress

TOKENS = torch.arange(8).view(1, 8)


class Net(nn.Module):
    """One of each kind of layer that torch itself brings, all of which reach the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8, padding_idx=0)
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, (3, 2), stride=2, groups=4)
        self.line = nn.Conv1d(12, 8, 3)
        self.linear = nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).unsqueeze(1)  # (n, 1, length, 8)
        x = self.grouped(self.conv(x).tanh()).mean(3)  # (n, 12, length')
        return self.head(self.linear(self.line(x).mean(2)).tanh())


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


class Pair(nn.Module):
    """The smallest model with two adapted matrices, for tests that build hundreds."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(width, 5)
        self.second = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def pair(width: int = 6, seed: int = 0) -> Pair:
    torch.manual_seed(seed)
    return Pair(width).eval()


def bert(hidden: int = 16, labels: int = 2, seed: int = 0, kind: str = "BertForSequenceClassification") -> Any:
    import transformers

    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=labels,
        initializer_range=0.3,  # else attention is uniform, and no query matters
    )
    return getattr(transformers, kind)(config).eval()


def gpt2(seed: int = 0) -> Any:
    import transformers

    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=40,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    return transformers.GPT2LMHeadModel(config).eval()


def labelled_rows(count: int = 64) -> list[dict[str, Any]]:
    """Texts of 8 tokens whose label, one of three, is told by how often some occur."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 40, (count, 8), generator=generator)
    return [{"input_ids": row.tolist(), "labels": int((row < 14).sum()) % 3} for row in ids]


def trainer_arguments(folder: Path, **choices: Any) -> dict[str, Any]:
    """What every Trainer's own class of arguments takes: quiet, on the CPU, no checkpoints."""
    return {
        "output_dir": str(folder),
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 5,
    } | choices


def adapted(model: Any, ranks: list[int] | None = None, **choices: Any) -> Any:
    """`model` with an adapter of nonzero values, cut to `ranks` in turn, whose training is said to be over."""
    model = inject(model, AdaLoraConfig(**({"init_r": 4, "target_r": 2, "lora_alpha": 8.0} | choices))).eval()
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        for index, (_, module) in enumerate(named_adapters(model)):
            rank = ranks[index % len(ranks)] if ranks else 2
            # Not the first ones: which rows survive must matter.
            module.lora_keep[: module.capacity - rank] = False
            module.lora_E.masked_fill_(~module.lora_keep.view(-1, 1), 0.0)
    record_progress(model, Progress(20, 20))
    return model


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a failed operation must leave alone."""
    return {
        "types": {name: type(module) for name, module in model.named_modules()},
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "trains": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "ids": {name: id(parameter) for name, parameter in model.named_parameters()},
        "attributes": set(vars(model)),
    }


def assert_unchanged(model: nn.Module, before: Mapping[str, Any]) -> None:
    after = snapshot(model)
    for part in ("types", "trains", "ids", "attributes"):
        assert after[part] == before[part]
    assert after["state"].keys() == before["state"].keys()
    assert [key for key, value in after["state"].items() if not torch.equal(value, before["state"][key])] == []


@contextmanager
def peft_warnings() -> Iterator[None]:
    """Around PEFT's own calls: what it says wrongly about AdaLoRA (row E7), and what transformers says of PEFT."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Adapter 'default': .* invalid shape")  # of rank 0
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # a model with Linear and Conv1D
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True` and a tied layer is part")
        warnings.filterwarnings("ignore", "LoRA adapter added to ConvNd layer with groups > 1")
        yield


def relative(found: Tensor, wanted: Tensor) -> float:
    with torch.no_grad():
        return float((found - wanted).abs().max() / wanted.abs().max())
