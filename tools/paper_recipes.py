"""Write the recipes of the paper's tables 1 to 3: `python tools/paper_recipes.py`.

One file for each method, task and budget that the package can train, because a file can be read, copied and run
by itself; written by a script, because 72 files by hand would not stay equal. Each value's comment says where it
is from: a table of the paper (arXiv 2303.10512), or a script of the authors, which wins where the two differ, for
it made the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "src" / "adalora" / "recipes" / "paper"

Value = tuple[object, str]  # what stands in the file, and its source

DEBERTA = "[query_proj, key_proj, value_proj, attention.output.dense, intermediate.dense, output.dense]"
BART = "[q_proj, k_proj, v_proj, out_proj, fc1, fc2]"
INIT_R = {1: 2, 2: 4, 4: 6, 8: 12, 16: 24}
PERCENT_GLUE = {1: "0.08 %", 2: "0.3M", 8: "1.3M"}
PERCENT_DEBERTA = {1: "0.08 %", 2: "0.16 %", 4: "0.32 %", 8: "0.65 %"}
PERCENT_BART = {1: "0.13 %", 2: "0.26 %", 8: "1.10 %", 16: "2.20 %"}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the recipes of one task share."""

    name: str
    table: str
    task: str
    model: str
    modules: str
    data: tuple[tuple[str, Value], ...]
    metric: str
    steps: str
    init_r: dict[int, Value]  # by target_r; keys are the budgets of AdaLoRA
    lora_r: tuple[int, ...]
    budgets: dict[int, str]
    alpha: Value
    gamma: Value
    tinit: Value
    delta: Value
    tfinal: Value
    rate: Value
    epochs: Value
    batch: tuple[tuple[str, Value], ...]
    warmup: Value
    decay: Value
    clip: Value
    seed: Value
    dropout: Value | None = None
    lora_rate: Value = (None, "")
    lora_epochs: Value = (None, "")


def _glue(
    name: str,
    *,
    text: tuple[str, str | None],
    metric: str,
    length: int,
    steps: int,
    epochs: int,
    rate: Value,
    gamma: Value,
    phases: tuple[int, int, int],
    first: Value,
    alpha: int,
    dropout: float,
    warmup: Value,
    decay: float,
    splits: tuple[Value, Value | None] = (("validation", ""), None),
) -> Task:
    script = f"run_debertav3_{name}.sh"
    pair: tuple[tuple[str, Value], ...] = (("text_pair", (text[1], "")),) if text[1] else ()
    test: tuple[tuple[str, Value], ...] = (("test", splits[1]),) if splits[1] else ()
    data = (
        ("name", ("nyu-mll/glue", "")),
        ("config", (name, "")),
        ("train", ("train", "")),
        ("validation", splits[0]),
        *test,
        ("text", (text[0], "")),
        *pair,
        ("label", ("label", "")),
        ("max_length", (length, script)),
    )
    tinit, delta, tfinal = phases
    both = f"table 8, {script}"
    return Task(
        name=name,
        table="table 1",
        task="classification",
        model="microsoft/deberta-v3-base",
        modules=DEBERTA,
        data=data,
        metric=metric,
        steps=f"{steps:,} steps",
        init_r={8: (12, "table 7"), 2: (4, "table 7"), 1: first},
        lora_r=(8, 2),
        budgets=PERCENT_GLUE,
        alpha=(alpha, script),
        gamma=gamma if gamma[1] else (gamma[0], both),
        tinit=(tinit, both),
        delta=(delta, both),
        tfinal=(tfinal, both),
        rate=rate if rate[1] else (rate[0], both),
        epochs=(epochs, both),
        batch=(("per_device_train_batch_size", (32, both)),),
        warmup=warmup if warmup[1] else (warmup[0], script),
        decay=(decay, script),
        clip=(1.0, "the authors' Trainer"),
        seed=(6, script),
        dropout=(dropout, script),
        lora_rate=(rate[0], "not published; AdaLoRA's. The paper chose from 3e-5 to 1e-3 (appendix C.2)"),
        lora_epochs=(epochs, "not published; AdaLoRA's"),
    )


def _squad(version: str, name: str, steps: str, epochs: int, tfinal: int) -> Task:
    readme = "run_debertav3_squadv2.sh"
    other = readme if version == "v2" else f"{readme}; there is none for v1.1"
    flag: tuple[tuple[str, Value], ...] = (("no_answer", ("true", "")),) if version == "v2" else ()
    data = (
        ("name", (name, "")),
        ("train", ("train", "")),
        ("validation", ("validation", "")),
        *flag,
        ("max_length", (384, other)),
        ("stride", (128, other)),
        ("n_best", (20, "run_qa.py")),
        ("max_answer_length", (30, "run_qa.py")),
    )
    return Task(
        name=f"squad-{version}",
        table="table 2",
        task="question-answering",
        model="microsoft/deberta-v3-base",
        modules=DEBERTA,
        data=data,
        metric="f1",
        steps=steps,
        init_r={r: (INIT_R[r], "table 9") for r in (1, 2, 4, 8)},
        lora_r=(1, 2, 4, 8),
        budgets=PERCENT_DEBERTA,
        alpha=(16, other),
        gamma=(0.1, "table 10"),
        tinit=(5000, "table 10"),
        delta=(100, "table 10"),
        tfinal=(tfinal, "table 10"),
        rate=("1e-3", "table 10"),
        epochs=(epochs, "table 10"),
        batch=(("per_device_train_batch_size", (16, "table 10")),),
        warmup=(1000, other),
        decay=(0.0, other),
        clip=(1.0, "the authors' Trainer"),
        seed=(9, other),
        lora_rate=("8e-5", "README of NLG_QA/examples/question-answering, v2.0"),
        lora_epochs=(8, "the same") if version == "v2" else (10, "not published; AdaLoRA's"),
    )


def _summary(name: str, *, data: tuple[tuple[str, Value], ...], device: int, **rest: Any) -> Task:
    script = "run_bart_xsum.sh" if name == "xsum" else "run_bart_cnndailymail.sh"
    decoding = "the script sets only beams and length; this is facebook/bart-large's own"
    total = device * 8
    return Task(
        name=name,
        table="table 3",
        task="seq2seq",
        model="facebook/bart-large",
        modules=BART,
        data=(*data, ("no_repeat_ngram_size", (3, decoding))),
        metric="rouge2",
        init_r={
            r: (INIT_R[r], "1.5 × target_r, section 3.3" if r > 2 else "2 × target_r, as in table 9")
            for r in PERCENT_BART
        },
        lora_r=tuple(PERCENT_BART),
        budgets=PERCENT_BART,
        alpha=(32, script),
        gamma=(1.0, "table 13 and the script say 0.1, but run_summarization_no_trainer.py adds the penalty without it"),
        delta=(100, f"table 13, {script}"),
        rate=("5e-4", f"table 13, {script}"),
        batch=(
            ("per_device_train_batch_size", (device, script)),
            ("gradient_accumulation_steps", (8, f"for the 8 GPUs of the script: {total} in all, table 13")),
        ),
        warmup=(3000, script),
        decay=(0.0, script),
        clip=(0.0, "run_summarization_no_trainer.py does not clip"),
        seed=(9, script),
        lora_rate=("5e-4", "not published; AdaLoRA's"),
        lora_epochs=rest["epochs"],
        **rest,
    )


def tasks() -> list[Task]:
    """All tasks of tables 1 to 3."""
    differs = "{script}; table 8 says {paper}"

    def script_wins(name: str, paper: object) -> str:
        return differs.format(script=f"run_debertav3_{name}.sh", paper=paper)

    two: Value = (2, "the script, which is for this budget")
    three: Value = (3, "the script, which is for this budget")
    glue = [
        _glue(
            "mnli",
            text=("premise", "hypothesis"),
            metric="accuracy",
            length=256,
            steps=85904,
            epochs=7,
            rate=("5e-4", ""),
            gamma=(0.1, ""),
            phases=(8000, 100, 50000),
            first=three,
            alpha=16,
            dropout=0.15,
            warmup=(1000, ""),
            decay=0.0,
            splits=(("validation_matched", "the table's m"), ("validation_mismatched", "the table's mm")),
        ),
        _glue(
            "sst2",
            text=("sentence", None),
            metric="accuracy",
            length=128,
            steps=50520,
            epochs=24,
            rate=("8e-4", ""),
            gamma=(0.1, ""),
            phases=(6000, 100, 22000),
            first=two,
            alpha=16,
            dropout=0.0,
            warmup=(1000, ""),
            decay=0.01,
        ),
        _glue(
            "cola",
            text=("sentence", None),
            metric="matthews",
            length=64,
            steps=6700,
            epochs=25,
            rate=("8e-4", script_wins("cola", "5e-4")),
            gamma=(0.1, script_wins("cola", 0.5)),
            phases=(800, 10, 3500),
            first=three,
            alpha=32,
            dropout=0.1,
            warmup=(100, ""),
            decay=0.0,
        ),
        _glue(
            "qqp",
            text=("question1", "question2"),
            metric="mean_accuracy_f1",
            length=320,
            steps=56855,
            epochs=5,
            rate=("8e-4", script_wins("qqp", "5e-4")),
            gamma=(0.1, ""),
            phases=(8000, 100, 25000),
            first=two,
            alpha=16,
            dropout=0.15,
            warmup=(2000, ""),
            decay=0.01,
        ),
        _glue(
            "qnli",
            text=("question", "sentence"),
            metric="accuracy",
            length=512,
            steps=16370,
            epochs=5,
            rate=("5e-4", script_wins("qnli", "1.2e-3")),
            gamma=(0.1, ""),
            phases=(2000, 100, 8000),
            first=two,
            alpha=32,
            dropout=0.1,
            warmup=(500, ""),
            decay=0.01,
        ),
        _glue(
            "rte",
            text=("sentence1", "sentence2"),
            metric="accuracy",
            length=320,
            steps=3900,
            epochs=50,
            rate=("1.2e-3", ""),
            gamma=(0.3, ""),
            phases=(600, 1, 1800),
            first=two,
            alpha=32,
            dropout=0.2,
            warmup=(200, ""),
            decay=0.01,
        ),
        _glue(
            "mrpc",
            text=("sentence1", "sentence2"),
            metric="accuracy",
            length=320,
            steps=3450,
            epochs=30,
            rate=("1e-3", ""),
            gamma=(0.1, ""),
            phases=(600, 1, 1800),
            first=two,
            alpha=32,
            dropout=0.0,
            warmup=(0.1, "run_debertav3_mrpc.sh, as a share of the run"),
            decay=0.01,
        ),
        _glue(
            "stsb",
            text=("sentence1", "sentence2"),
            metric="mean_pearson_spearman",
            length=128,
            steps=4500,
            epochs=25,
            rate=("2.2e-3", ""),
            gamma=(0.3, script_wins("stsb", 0.1)),
            phases=(800, 10, 2000),
            first=two,
            alpha=32,
            dropout=0.2,
            warmup=(100, ""),
            decay=0.1,
        ),
    ]
    split: tuple[tuple[str, Value], ...] = (
        ("train", ("train", "")),
        ("validation", ("validation", "the split that the script scores; for the other, test: test")),
    )
    xsum = _summary(
        "xsum",
        data=(
            ("name", ("EdinburghNLP/xsum", "")),
            *split,
            ("source", ("document", "")),
            ("target", ("summary", "")),
            ("max_source_length", (768, "run_bart_xsum.sh")),
            ("max_target_length", (64, "run_bart_xsum.sh")),
            ("num_beams", (8, "table 13")),
        ),
        device=8,
        steps="about 79,725 steps",
        tinit=(6000, "table 13, run_bart_xsum.sh"),
        tfinal=(25000, "run_bart_xsum.sh; table 13 says 50000"),
        epochs=(25, "table 13, run_bart_xsum.sh; section 4.3 says 15"),
    )
    cnn = _summary(
        "cnn-dailymail",
        data=(
            ("name", ("abisee/cnn_dailymail", "")),
            ("config", ("3.0.0", "")),
            *split,
            ("source", ("article", "")),
            ("target", ("highlights", "")),
            ("max_source_length", (1024, "run_bart_cnndailymail.sh")),
            ("max_target_length", (160, "run_bart_cnndailymail.sh")),
            ("num_beams", (4, "table 13")),
        ),
        device=4,
        steps="about 134,595 steps",
        tinit=(5000, "table 13, run_bart_cnndailymail.sh"),
        tfinal=(85000, "table 13, run_bart_cnndailymail.sh"),
        epochs=(15, "table 13, run_bart_cnndailymail.sh"),
    )
    squads = [
        _squad("v1", "rajpurkar/squad", "about 55,000 steps", 10, 25000),
        _squad("v2", "rajpurkar/squad_v2", "about 99,000 steps", 12, 50000),
    ]
    return [*glue, *squads, xsum, cnn]


def recipe(task: Task, method: str, r: int) -> str:
    """The text of one recipe."""
    unit = 540_672 if task.modules == BART else 165_888
    # Table 1 has no such budget, but it is the one of the scripts, and of tables 4 and 5.
    table = "the authors' script" if r == 1 and task.table == "table 1" else f"the paper's {task.table}"
    label = "AdaLoRA" if method == "adalora" else "LoRA"
    lines = [
        f"# {label} on {task.name}, {task.budgets[r]} in {table}: {r * unit:,} parameters in the end.",
        "# Written by tools/paper_recipes.py. A run script of the authors' repository wins over the paper.",
        f"task: {task.task}",
        "model:",
        f"  name_or_path: {task.model}",
    ]
    if task.dropout is not None:
        lines += ["  config:", *_lines([("cls_dropout", task.dropout)], 4)]
    lines += ["data:", *_lines(task.data), f"metric: {task.metric}", "method:", f"  name: {method}"]
    lines += ["  preset: paper"] if method == "adalora" else []
    modules = (task.modules, "all scripts")
    if method == "adalora":
        values = [
            ("target_modules", modules),
            ("init_r", task.init_r[r]),
            ("target_r", (r, "the budget")),
            ("lora_alpha", task.alpha),
            ("tinit", task.tinit),
            ("tfinal", task.tfinal),
            ("deltaT", task.delta),
            ("beta1", (0.85, "section 4.1, all scripts")),
            ("beta2", (0.85, "section 4.1, all scripts")),
            ("orth_reg_weight", task.gamma),
        ]
        rate, epochs = task.rate, task.epochs
    else:
        values = [("target_modules", modules), ("r", (r, "the budget")), ("lora_alpha", task.alpha)]
        rate, epochs = task.lora_rate, task.lora_epochs
    steps = f"; {task.steps}" if epochs[0] == task.epochs[0] else ""
    lines += [*_lines(values), "training:"]
    lines += _lines(
        [
            ("learning_rate", rate),
            ("num_train_epochs", (epochs[0], epochs[1] + steps)),
            *task.batch,
            ("lr_scheduler_type", ("linear", "all scripts")),
            ("warmup_steps", task.warmup),
            ("weight_decay", task.decay),
            *([("decay_adapter", ("true", "the authors' Trainer decays all matrices"))] if task.decay[0] else []),
            ("max_grad_norm", task.clip),
        ]
    )
    return "\n".join([*lines, *_lines([("seed", task.seed)], 0)]) + "\n"


def recipes() -> dict[str, str]:
    """Name → text of all recipes."""
    made = {}
    for task in tasks():
        made |= {f"{task.name}-adalora-r{r}": recipe(task, "adalora", r) for r in task.init_r}
        made |= {f"{task.name}-lora-r{r}": recipe(task, "lora", r) for r in task.lora_r}
    return made


def _lines(values: list[tuple[str, Value]] | tuple[tuple[str, Value], ...], indent: int = 2) -> list[str]:
    return [f"{' ' * indent}{key}: {value}" + (f"  # {source}" if source else "") for key, (value, source) in values]


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for file in FOLDER.glob("*.yaml"):
        file.unlink()
    for name, text in recipes().items():
        (FOLDER / f"{name}.yaml").write_text(text, encoding="utf-8")
