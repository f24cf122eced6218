"""What a training step costs, against PEFT's LoRA and AdaLoRA: `python -m benchmarks.step`.

A step is forward, backward, optimizer and allocation (deltaT = 1, so that every measured step allocates). The
arms are paired and interleaved in one process; what is reported is the median over rounds of the ratio to
the frozen floor (the same model training only its biases) in the same round, with the quartiles. Both sides
have the same rank, modules, data, threads and allocator settings of the C library (its defaults).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import AdaLoraConfig as PeftAdaLoraConfig
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import adalora

RANK = 12
KINDS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
EXCLUDED = r".*pooler.*"
RESULTS = Path(__file__).parent / "results"

Step = Callable[[dict[str, torch.Tensor]], None]


def minilm() -> BertForSequenceClassification:
    """MiniLM-L6's shape with random weights: cost does not depend on them."""
    torch.manual_seed(0)
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return BertForSequenceClassification(
        BertConfig(**shape, num_labels=7, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )


def frozen_floor() -> Step:
    """Only biases train: backward must still pass through every layer."""
    model = minilm()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return _loop(model, [p for p in model.parameters() if p.requires_grad])


def peft_lora() -> Step:
    """PEFT's LoRA."""
    model = get_peft_model(minilm(), LoraConfig(r=RANK, target_modules=list(KINDS), exclude_modules=EXCLUDED))
    return _loop(model, [p for p in model.parameters() if p.requires_grad])


def peft_adalora(total: int) -> Step:
    """PEFT's AdaLoRA, with the call that it needs."""
    schedule = {"init_r": RANK, "target_r": 8, "tinit": 0, "tfinal": 1, "deltaT": 1, "total_step": total}
    model = get_peft_model(
        minilm(),
        PeftAdaLoraConfig(target_modules=list(KINDS), exclude_modules=EXCLUDED, orth_reg_weight=0.1, **schedule),
    )
    steps = iter(range(1, total))
    return _loop(
        model,
        [p for p in model.parameters() if p.requires_grad],
        after_step=lambda: model.base_model.update_and_allocate(next(steps)),
    )


def ours(total: int) -> Step:
    """This package."""
    config = adalora.AdaLoraConfig(
        target_modules=KINDS, exclude_modules=EXCLUDED, init_r=RANK, target_r=8, tinit=0, tfinal=1, deltaT=1
    )
    model = adalora.inject(minilm(), config)
    parameters = adalora.adapter_parameters(model)
    return _loop(
        model, parameters, attach=lambda optimizer: adalora.RankAllocator(model, total_step=total).attach(optimizer)
    )


def measure(tokens: int, length: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median ratio to the floor, quartiles and seconds of each arm, for batches of `tokens` tokens."""
    total = rounds + 10
    arms = {
        "frozen floor": frozen_floor(),
        "PEFT LoRA": peft_lora(),
        "PEFT AdaLoRA": peft_adalora(total),
        "adalora": ours(total),
    }
    torch.manual_seed(1)
    ids = torch.randint(1000, 20000, (tokens // length, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(0, 7, (len(ids),))}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 3):
        for name, step in arms.items():
            begin = time.perf_counter()
            step(batch)
            if turn >= 3:
                seconds[name].append(time.perf_counter() - begin)
    report = {}
    for name, times in seconds.items():
        ratios = [own / floor for own, floor in zip(times, seconds["frozen floor"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        report[name] = {"ratio": median, "low": low, "high": high, "seconds": statistics.median(times)}
    return report


def main() -> None:
    """Measure, print the table, write results/step.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", module="(peft|transformers).*")
    results = {str(tokens): measure(tokens, 64, options.rounds) for tokens in options.tokens}
    print(
        f"MiniLM-L6 shape, r = {RANK}, {options.threads} thread(s), {options.rounds} rounds; ratio to the frozen floor"
    )
    for tokens, report in results.items():
        for name, row in report.items():
            print(
                f"{tokens:>5} tokens  {name:<13} {row['ratio']:.3f}  [{row['low']:.3f}, {row['high']:.3f}]"
                f"  {row['seconds'] * 1000:.0f} ms"
            )
    RESULTS.mkdir(exist_ok=True)
    record = {
        "machine": platform.processor(),
        "torch": torch.__version__,
        "threads": options.threads,
        "results": results,
    }
    (RESULTS / "step.json").write_text(json.dumps(record, indent=2) + "\n")


def _loop(
    model: nn.Module,
    parameters: list[nn.Parameter],
    attach: Callable[[torch.optim.Optimizer], object] = lambda optimizer: None,
    after_step: Callable[[], object] = lambda: None,
) -> Step:
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    attach(optimizer)

    def step(batch: dict[str, torch.Tensor]) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        after_step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
