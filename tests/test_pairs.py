import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import disable_progress_bars
from rich.console import Console
from rouge_score.rouge_scorer import RougeScorer
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import Seq2SeqTrainingArguments

from adalora import AdaLoraConfig, disabled
from adalora.errors import ConfigError, DataError
from adalora.integrations.transformers import AdaLoraCallback
from adalora.methods import build_method
from adalora.recipe import Recipe
from adalora.tasks.ordered import OrderedSeq2SeqTrainer
from adalora.tasks.pairs import PairsTask, build_task, without_data
from adalora.tasks.rouge import rouge
from adalora.train import run
from folders import Row, assert_check_agrees, save_tokenizer, train_and_validation, write

disable_progress_bars()

NOUNS = ("cat", "dog", "cow", "hen", "oak", "elm", "fir", "ash")
WORDS = ("[PAD]", "[UNK]", "<s>", "</s>", "copy", ":", *NOUNS)
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>"}


def toy(count: int, seed: int, length: int = 6) -> list[Row]:
    """The summary of some words is the first two of them."""
    pick = random.Random(seed)
    rows = []
    for _ in range(count):
        words = pick.choices(NOUNS, k=pick.randint(3, length))
        rows.append({"source": " ".join(words), "target": " ".join(words[:2])})
    return rows


def save(folder: Path, kind: str = "bart") -> Path:
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    save_tokenizer(folder, WORDS, **SPECIAL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>" if kind == "bart" else "$A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    tokenizer.save_pretrained(folder)
    special = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 3}
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 40, "d_model": 32}
    if kind == "t5":
        config: Any = transformers.T5Config(
            d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, **special | {"decoder_start_token_id": 0}
        )
        model: Any = transformers.T5ForConditionalGeneration(config)
        with torch.no_grad():  # as they are drawn, positions are all but alike, and only pre-training would part them
            for name, parameter in model.named_parameters():
                parameter.mul_(20.0 if "relative_attention_bias" in name else 1.0)
    else:
        start = {"bos_token_id": 2, "init_std": 0.2, "forced_eos_token_id": None}
        kinds = {"bart": transformers.BartConfig, "mbart": transformers.MBartConfig}
        config = kinds[kind](**special, **sizes, **start)
        model = {
            "bart": transformers.BartForConditionalGeneration,
            "mbart": transformers.MBartForConditionalGeneration,
        }[kind](config)
    model.save_pretrained(folder)
    return folder


def recipe(folder: Path, train: list[Row], validation: list[Row] | None = None, **data: Any) -> Recipe:
    section = (
        train_and_validation(folder, train, validation)
        | {"max_source_length": 12, "max_target_length": 6, "num_beams": 2}
        | data
    )
    return Recipe(task="seq2seq", model={"name_or_path": str(folder)}, data=section, method={"name": "adalora"})


def build(folder: Path, train: list[Row], validation: list[Row] | None = None, **data: Any) -> PairsTask:
    return build_task(str(folder), recipe(folder, train, validation, **data))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("bart"))


def trainer_of(task: PairsTask, model: nn.Module, out: Path, steps: int, **more: Any) -> Any:
    options = dict(task.argument_options) | {"learning_rate": 1e-2} | more
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=32, per_device_eval_batch_size=16,
        report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no",
        train_sampling_strategy="group_by_length", use_cpu=True, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    config = AdaLoraConfig(init_r=12, target_r=8, lora_alpha=24.0)
    trainer = OrderedSeq2SeqTrainer(
        model=model, args=arguments, train_dataset=task.splits["train"], eval_dataset=task.splits["validation"],
        data_collator=task.collator, processing_class=task.processor, callbacks=[AdaLoraCallback(config)],
        **task.trainer_options,
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def by_predicting(task: PairsTask, model: nn.Module, rows: list[Row]) -> dict[str, float]:
    """The scores, by the other road: from the rows of the file."""
    written = task.predict(model, [{"source": row["source"]} for row in rows])
    return rouge([item["text"] for item in written], [[row["target"]] for row in rows])


@pytest.mark.parametrize(
    "kind,steps,rate",
    [
        ("bart", 150, 2e-2),
        pytest.param("t5", 300, 2e-2, marks=pytest.mark.slow),
        pytest.param("mbart", 200, 2e-2, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_a_tiny_model_learns_to_copy_the_first_words(tmp_path: Path, kind: str, steps: int, rate: float) -> None:
    save(tmp_path, kind)
    rows, held = toy(600, 0), toy(40, 1)
    test = str(write(tmp_path / "test.jsonl", toy(10, 2)))
    task = build(tmp_path, rows, held, test=test, prefix="copy : " if kind == "t5" else "")
    model = task.build_model(str(tmp_path), recipe(tmp_path, rows, held))
    trainer = trainer_of(task, model, tmp_path / "out", steps, learning_rate=rate)
    before = task.evaluate(trainer, "validation")
    trainer.train()
    after = task.evaluate(trainer, "validation")
    assert before["rouge2"] < 20 and after["rouge2"] > 90
    # The longest sources come first in the split, and the Trainer groups by length: references must go along.
    assert by_predicting(task, model, held) == pytest.approx(after, abs=1e-9)
    logged = trainer.evaluate()
    assert logged["eval_rouge2"] == pytest.approx(after["rouge2"], abs=1e-9)
    assert task.evaluate(trainer, "test")["rouge2"] > 90  # another split than the one of compute_metrics
    # What is written comes from the adapter.
    with disabled(model):
        assert by_predicting(task, model, held)["rouge2"] < 20


@pytest.mark.parametrize("method", [{"name": "adalora", "init_r": 6, "target_r": 4}, {"name": "lora", "r": 4}])
@pytest.mark.slow
def test_a_run_can_be_used_from_its_folder(tmp_path: Path, method: dict[str, Any]) -> None:
    save(tmp_path)
    rows, held = toy(200, 0), toy(20, 1)
    training = {"num_train_epochs": 8, "learning_rate": 2e-2, "use_cpu": True}
    wanted = recipe(tmp_path, rows, held).model_copy(update={"method": method, "training": training})
    result = run(wanted, tmp_path / "out", Console(quiet=True))
    bare = without_data(str(tmp_path), wanted, [])
    fresh = bare.build_model(str(tmp_path), wanted)
    model = build_method(wanted.method).load(fresh, tmp_path / "out" / "adapter")
    assert by_predicting(bare, model, held) == pytest.approx(result.scores, abs=1e-9)
    assert result.metric == "rouge2" and result.scores["rouge1"] > 15  # untrained, 4


def test_greedy_writing_is_the_best_token_at_each_step_under_the_adapter(folder: Path, tmp_path: Path) -> None:
    rows = toy(200, 0)
    task = build(folder, rows, num_beams=1, max_target_length=5)
    model = task.build_model(str(folder), recipe(folder, rows))
    trainer_of(task, model, tmp_path, 20).train()
    model.eval()
    for row in rows[:8]:
        batch = task.processor([row["source"]], return_tensors="pt")
        tokens = [model.config.decoder_start_token_id]
        while len(tokens) <= 5 and (len(tokens) == 1 or tokens[-1] != task.processor.eos_token_id):
            logits = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                decoder_input_ids=torch.tensor([tokens]),
            ).logits
            tokens.append(int(logits[0, -1].argmax()))
        wanted = task.processor.decode(tokens, skip_special_tokens=True).strip()
        assert task.predict(model, [row]) == [{"text": wanted}]


@pytest.mark.parametrize("beams", [1, 4])
def test_the_recipe_bounds_what_is_written(folder: Path, beams: int) -> None:
    rows = toy(30, 0)
    task = build(folder, rows, num_beams=beams, max_target_length=6, no_repeat_ngram_size=1)
    model = task.build_model(str(folder), recipe(folder, rows))
    for item in task.predict(model, rows):
        words = item["text"].split()
        assert len(words) <= 6 and len(set(words)) == len(words)
    free = build(folder, rows, num_beams=beams, max_target_length=20)
    lengths = [len(item["text"].split()) for item in free.predict(model, rows)]
    assert 6 < max(lengths) <= 20
    options = build(folder, rows, num_beams=beams, length_penalty=0.5).generation
    assert ("length_penalty" in options) == (beams > 1)


def test_a_checkpoints_own_limits_do_not_win(folder: Path) -> None:
    rows = toy(5, 0)
    task = build(folder, rows)
    saved = transformers.GenerationConfig.from_pretrained(folder)
    saved.max_new_tokens, saved.min_length = 3, 5
    try:
        saved.save_pretrained(folder)
        settings = task.build_model(str(folder), recipe(folder, rows)).generation_config
    finally:
        save(folder)
    found = (settings.max_length, settings.max_new_tokens, settings.min_length, settings.num_beams)
    assert found == (7, None, 0, 2)


def test_rows_become_what_the_model_reads(folder: Path) -> None:
    rows = [{"source": "cat dog", "target": "cat"}, {"source": "hen " * 20, "target": "oak " * 20}]
    task = build(folder, rows, prefix="copy : ", max_source_length=8, max_target_length=5)
    first, second = task.splits["train"]
    decode = task.processor.decode
    assert decode(first["input_ids"]) == "<s> copy : cat dog </s>" and decode(first["labels"]) == "<s> cat </s>"
    assert decode(second["input_ids"]) == "<s> copy : hen hen hen hen </s>"
    assert decode(second["labels"]) == "<s> oak oak oak </s>"  # cut, and still with its end
    assert second["references"] == ["oak " * 20]  # scored whole
    assert task.splits["validation"]["length"][:] == [8, 6]
    model = task.build_model(str(folder), recipe(folder, rows))
    batch = task.collator([{k: row[k] for k in ("input_ids", "attention_mask", "labels")} for row in (first, second)])
    assert batch["labels"].tolist()[0] == [*first["labels"], -100, -100]
    # With label smoothing the Trainer takes the labels away, and the decoder would see the source.
    assert batch["decoder_input_ids"].tolist()[0] == [3, *first["labels"], 0]
    probe, name = task.probe(model, "validation")
    assert getattr(model(**probe), name).shape == (2, 5, len(WORDS))


@pytest.mark.slow
def test_label_smoothing_trains(folder: Path, tmp_path: Path) -> None:
    rows = toy(200, 0)
    task = build(folder, rows, toy(20, 1))
    model = task.build_model(str(folder), recipe(folder, rows))
    trainer = trainer_of(task, model, tmp_path, 120, label_smoothing_factor=0.1)
    trainer.train()
    assert task.evaluate(trainer, "validation")["rouge1"] > 50  # untrained, 4


def test_the_task_says_what_a_run_asks(folder: Path) -> None:
    task = build(folder, toy(8, 0), toy(4, 1))
    assert (task.labels, task.task_type, task.metric) == ([], "SEQ_2_SEQ_LM", "rouge2")
    assert task.describe() == "texts from texts, 2 beams; 8 train, 4 validation rows"
    assert task.argument_options == {"predict_with_generate": True}
    bare = without_data(str(folder), recipe(folder, toy(8, 0)), [])
    model = task.build_model(str(folder), recipe(folder, toy(8, 0)))
    assert bare.predict(model, toy(3, 2)) == task.predict(model, toy(3, 2))
    assert bare.predict(model, []) == []


def test_a_tokenizer_for_many_languages_says_which_one_is_written(folder: Path) -> None:
    rows = recipe(folder, toy(4, 0))
    target = folder / "mbart"
    transformers.MBartConfig(vocab_size=40).save_pretrained(target)
    transformers.MBartTokenizer(src_lang="en_XX").save_pretrained(target)
    with pytest.raises(ConfigError, match="Set src_lang and tgt_lang"):
        without_data(str(target), rows, [])
    tokenizer = transformers.MBartTokenizer(src_lang="en_XX", tgt_lang="ro_RO")
    tokenizer.save_pretrained(target)
    task = without_data(str(target), rows, [])
    assert task.generation["decoder_start_token_id"] == tokenizer.convert_tokens_to_ids("ro_RO")


# ROUGE


def test_rouge_equals_numbers_worked_out_by_hand() -> None:
    scores = rouge(
        ["The quick brown dog jumps on the log."],
        [["The quick brown fox jumps over the lazy dog"]],
    )
    # 8 and 9 words: six are shared (the, quick, brown, dog, jumps, the), two of 7 and 8 pairs, and in one order five.
    wanted = {"rouge1": 2 * 6 / 17, "rouge2": 2 * 2 / 15, "rougeL": 2 * 5 / 17, "rougeLsum": 2 * 5 / 17}
    wanted["mean_rouge"] = (wanted["rouge1"] + wanted["rouge2"] + wanted["rougeL"]) / 3
    assert scores == pytest.approx({key: 100 * value for key, value in wanted.items()}, abs=1e-9)


@pytest.mark.parametrize("text", ["w1 w3 w8 w9 w5.\nw1 w2 w6 w7 w8.", "w1 w3 w8 w9 w5. W1 w2 w6 w7 w8."])
def test_rouge_lsum_unites_what_the_sentences_share(text: str) -> None:
    """The example of Lin (2004), section 3.2, sentences swapped: w1 w2 w3 w5 is recall 4/5 and, of 10 words, 4/10."""
    scores = rouge([text], [["w1 w2 w3 w4 w5"]])
    assert scores["rougeLsum"] == pytest.approx(100 * 2 * 0.8 * 0.4 / 1.2, abs=1e-9)
    # In one piece, the longest common order is w1 w3 w5.
    assert scores["rougeL"] == pytest.approx(100 * 2 * 3 / 15, abs=1e-9)


GUESS = "The cats sat on a mat. It rained all day! Was anyone there?"
TRUTH = "A cat sat on the mat, and it rained. Nobody was there all day. The dog slept."


def test_rouge_is_that_of_the_official_scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rouge_score as it is called for papers; what counts as a sentence is all that this package adds to it."""
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)

    def official(guess: str, truth: str) -> dict[str, float]:
        return {name: 100 * score.fmeasure for name, score in scorer.score(truth, guess).items()}

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nltk's data differ from machine to machine")

    monkeypatch.setattr("nltk.data.find", refuse)
    monkeypatch.setattr("nltk.data.load", refuse)
    lines = [re.sub(r"(?<=[.!?]) ", "\n", text) for text in (GUESS, TRUTH)]
    for pair in ((GUESS, TRUTH), (lines[0], lines[1]), (GUESS, lines[1])):
        scores = rouge([pair[0]], [[pair[1]]])
        assert {name: scores[name] for name in official(*lines)} == pytest.approx(official(*lines), abs=1e-9)
    for name, score in official(GUESS, TRUTH).items():  # one line each: only sentences make a difference
        assert (scores[name] == pytest.approx(score, abs=1e-9)) == (name != "rougeLsum")
    # By hand, of 13 and 17 words: cat sat on mat, it rained; all day, was there; the.
    assert scores["rougeLsum"] == pytest.approx(100 * 2 * 11 / (13 + 17), abs=1e-9)


def test_rouge_stems_words_and_takes_the_best_reference_of_each_text() -> None:
    assert rouge(["dogs jumping"], [["dog jumps"]])["rouge2"] == pytest.approx(100.0)
    two = rouge(["cat dog", "elm"], [["oak", "cat dog"], ["ash"]])
    assert (two["rouge1"], two["rougeL"]) == (50.0, 50.0)
    assert rouge([""], [["cat"]])["rouge1"] == 0.0


def test_a_list_of_targets_is_learnt_by_its_first_and_scored_by_its_best(folder: Path) -> None:
    rows = [{"source": "cat dog", "target": ["cat", "oak"]}, {"source": "hen cow elm", "target": ["hen"]}]
    task = build(folder, rows)
    assert [task.processor.decode(ids, skip_special_tokens=True) for ids in task.splits["train"]["labels"]] == [
        "cat",
        "hen",
    ]
    assert task.splits["validation"]["references"][:] == [["hen"], ["cat", "oak"]]  # the longest source first


# Mistakes


@pytest.mark.parametrize(
    "rows,message",
    [
        ([{"source": "cat", "summary": "cat"}], "no column 'target', which data.target names"),
        ([{"source": " ", "target": "cat"}], "'source' is empty in 1 of 1 rows, the first is row 0"),
        ([{"source": "cat", "target": "cat"}, {"source": "cat", "target": None}], "row 1: column 'target' is None"),
        ([{"source": "cat", "target": ""}], "row 0: column 'target' is ''"),
        ([{"source": "cat", "target": []}], r"row 0: column 'target' is \[\]"),
        ([{"source": "cat", "target": 3}], "row 0: column 'target' is 3; it must hold a text, or a list"),
    ],
)
def test_bad_rows_are_named(folder: Path, rows: list[Row], message: str) -> None:
    with pytest.raises(DataError, match=message):
        build(folder, rows)


def test_bad_rows_to_predict_are_named(folder: Path) -> None:
    task = without_data(str(folder), recipe(folder, toy(2, 0)), [])
    for row in ({"text": "cat"}, {"source": 3}, {"source": " "}):
        with pytest.raises(DataError, match="row 1: 'source' is"):
            task.predict(nn.Linear(1, 1), [{"source": "cat"}, row])


def test_models_that_cannot_write_are_refused(folder: Path, tmp_path: Path) -> None:
    rows = toy(4, 0)
    task = build(folder, rows)
    with pytest.raises(ConfigError, match=r"data.max_source_length is 50, but .* takes at most 40 tokens"):
        task.build_model(str(folder), recipe(folder, rows, max_source_length=50))
    with pytest.raises(ConfigError, match=r"data.max_target_length is 41"):
        task.build_model(str(folder), recipe(folder, rows, max_target_length=41))
    save_tokenizer(folder / "endless", WORDS, **SPECIAL)
    transformers.BertConfig(vocab_size=len(WORDS)).save_pretrained(folder / "endless")
    with pytest.raises(ConfigError, match="ends no target with a special token"):
        build(folder / "endless", rows)
    save(tmp_path)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / name).read_text())
        kept = {k: v for k, v in values.items() if k not in ("decoder_start_token_id", "bos_token_id")}
        (tmp_path / name).write_text(json.dumps(kept | ({"bos_token_id": None} if name == "config.json" else {})))
    with pytest.raises(ConfigError, match="no decoder_start_token_id"):
        build(tmp_path, rows).build_model(str(tmp_path), recipe(tmp_path, rows))


def test_a_check_prints_the_recipe_of_the_run(folder: Path, tmp_path: Path) -> None:
    training = {"max_steps": 1, "load_best_model_at_end": True}
    wanted = recipe(folder, toy(4, 0)).model_copy(update={"training": training})
    assert_check_agrees(wanted, tmp_path)


def test_scores_need_written_texts(folder: Path, tmp_path: Path) -> None:
    rows = toy(4, 0)
    task = build(folder, rows)
    model = task.build_model(str(folder), recipe(folder, rows))
    trainer = trainer_of(task, model, tmp_path, 1, predict_with_generate=False)
    with pytest.raises(ConfigError, match=r"Leave training.predict_with_generate at true"):
        trainer.evaluate()
