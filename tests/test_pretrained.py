"""Model folders that would train on random weights or unknown tokens are refused; all common kinds train."""

import logging
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from adalora.errors import ConfigError
from adalora.recipe import Recipe, load_recipe
from adalora.tasks.classification import build_task
from adalora.tasks.foreign import silenced
from adalora.train import run
from folders import VOCABULARY, rows, save_bert, save_other, write

SIZE = len(VOCABULARY)
BERT = {
    "vocab_size": SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
T5 = T5Config(vocab_size=SIZE, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, eos_token_id=3)
T5.decoder_start_token_id = 0  # published checkpoints say so
DEBERTA = {"intermediate_size": 64, "max_position_embeddings": 128, "pad_token_id": 0}
GPT2 = GPT2Config(vocab_size=SIZE, n_embd=32, n_layer=2, n_head=2, n_positions=128)
BART = BartConfig(
    vocab_size=SIZE,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    max_position_embeddings=128,
    pad_token_id=0,
    eos_token_id=3,
)
NO_PAD = {"unk_token": "[UNK]", "eos_token": "[SEP]"}
ENDED = {"pad_token": "[PAD]", **NO_PAD}


def recipe(folder: Path, *settings: str) -> Recipe:
    if not (folder / "a.jsonl").exists():
        write(folder / "a.jsonl", rows(16))
    files = [f"data.{split}={folder / 'a.jsonl'}" for split in ("train", "validation")]
    return load_recipe("text-classification", [f"model.name_or_path={folder}", *files, *settings])


def build(folder: Path, *settings: str) -> None:
    wanted = recipe(folder, *settings)
    build_task(str(folder), wanted).build_model(str(folder), wanted)


def drop(folder: Path, ending: str) -> int:
    """Take tensors out of the checkpoint; returns how many."""
    tensors = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in tensors.items() if ending not in key}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return len(tensors) - len(kept)


def test_a_folder_without_tokenizer_files_is_refused(tmp_path: Path) -> None:
    save_bert(tmp_path)
    build(tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match=rf"has 5 tokens, the model {SIZE}: the folder lacks its tokenizer files"):
        build(tmp_path)


def test_texts_that_the_tokenizer_does_not_know_are_refused(tmp_path: Path) -> None:
    save_bert(tmp_path)
    known = [{"text": "the cat", "label": "a"}, {"text": "old zzz", "label": "b"}]
    file = write(tmp_path / "half.jsonl", [*known, {"text": "yyy xxx", "label": "a"}])
    build(tmp_path, f"data.train={write(tmp_path / 'known.jsonl', known)}", f"data.validation={file}")
    unknown = write(tmp_path / "unknown.jsonl", [*known, {"text": "yyy xxx www", "label": "a"}])
    with pytest.raises(ConfigError, match=r"57% of the tokens of data.train are '\[UNK\]'"):  # 4 of 7
        build(tmp_path, f"data.train={unknown}", f"data.validation={file}")


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    save_bert(tmp_path)
    assert drop(tmp_path, "layer.1.attention.self.query") == 2
    with pytest.raises(ConfigError, match=r"no weights for 2 .* e.g. bert.encoder.layer.1.attention.self.query.bias"):
        build(tmp_path)


def test_a_new_pooler_must_train_whole(tmp_path: Path) -> None:
    save_other(tmp_path, BertForMaskedLM, BertConfig(**BERT))
    with pytest.raises(ConfigError, match=r"method.modules_to_save=\[classifier, bert.pooler.dense\]"):
        build(tmp_path)
    build(tmp_path, "method.modules_to_save=[classifier, bert.pooler.dense]")
    build(tmp_path, "method.modules_to_save=[classifier, pooler]")


def test_a_head_for_other_labels_is_refused_with_both_shapes(tmp_path: Path) -> None:
    save_other(tmp_path, BertForSequenceClassification, BertConfig(**BERT, num_labels=3))
    with pytest.raises(ConfigError, match=r"classifier.bias of shape \(3,\), but the model needs \(2,\)"):
        build(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("part", [0, 0.5])
def test_a_broken_file_is_one_line(tmp_path: Path, name: str, part: float) -> None:
    save_bert(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ConfigError, match="cannot load") as caught:
        build(tmp_path)
    assert "\n" not in str(caught.value)


def test_entries_of_the_models_configuration_can_be_set(tmp_path: Path) -> None:
    save_bert(tmp_path)
    wanted = recipe(tmp_path, "model.config={hidden_dropout_prob: 0.3, classifier_dropout: 0.2}")
    model = build_task(str(tmp_path), wanted).build_model(str(tmp_path), wanted)
    assert (model.config.hidden_dropout_prob, model.dropout.p, model.config.num_labels) == (0.3, 0.2, 2)
    with pytest.raises(ConfigError, match=r"no key 'model.config.hiden_dropout_prob' .*; did you mean 'hidden_dropout"):
        build(tmp_path, "model.config={hiden_dropout_prob: 0.3}")


def test_entries_that_only_the_models_code_knows_can_be_set(tmp_path: Path) -> None:
    config = DebertaV2Config(vocab_size=SIZE, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, **DEBERTA)
    save_other(tmp_path, DebertaV2Model, config, **ENDED)
    wanted = recipe(tmp_path, "model.config={cls_dropout: 0.15}", "method.modules_to_save=[classifier, pooler]")
    model = build_task(str(tmp_path), wanted).build_model(str(tmp_path), wanted)
    assert model.dropout.p == 0.15 and model.config.num_labels == 2


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "../model"])
def test_a_path_that_does_not_exist_is_no_hub_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="there is no such folder"):
        build_task(name, recipe(tmp_path, f"model.name_or_path={name}"))


def test_texts_longer_than_the_model_takes_are_refused_before_training(tmp_path: Path) -> None:
    save_bert(tmp_path / "bert")
    build(tmp_path / "bert", "data.max_length=128")
    with pytest.raises(ConfigError, match=r"data.max_length is 129, but .* takes at most 128 tokens"):
        build(tmp_path / "bert", "data.max_length=129")
    save_other(tmp_path / "roberta", RobertaModel, RobertaConfig(**BERT | {"pad_token_id": 1}))
    build(tmp_path / "roberta", "data.max_length=126")  # 128 positions, of which 0 and 1 are for padding
    with pytest.raises(ConfigError, match=r"data.max_length is 127, but .* takes at most 126 tokens"):
        build(tmp_path / "roberta", "data.max_length=127")
    save_other(tmp_path / "t5", T5ForConditionalGeneration, T5, **ENDED | {"model_max_length": 32})
    with pytest.raises(ConfigError, match=r"takes at most 32 tokens"):
        build(tmp_path / "t5")


@pytest.mark.slow
@pytest.mark.parametrize(
    "model,config,special",
    [
        (GPT2LMHeadModel, GPT2, NO_PAD),
        (LlamaForCausalLM, LlamaConfig(**BERT | {"pad_token_id": None}), NO_PAD),
        (DistilBertModel, DistilBertConfig(vocab_size=SIZE, dim=32, n_layers=2, n_heads=2, hidden_dim=64), {}),
        (T5ForConditionalGeneration, T5, ENDED),
        (BartModel, BART, ENDED),
    ],
)
def test_other_architectures_train_evaluate_and_reload(
    tmp_path: Path,
    model: type[PreTrainedModel],
    config: PreTrainedConfig,
    special: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = save_other(tmp_path / "base", model, config, **special)
    items: list[dict[str, object]] = [row | {"text": f"{row['text']} [SEP]"} for row in rows(16)]
    write(base / "a.jsonl", items)
    fast = ["training.max_steps=4", "training.per_device_train_batch_size=8", "training.save_strategy=no"]
    result = run(recipe(base, *fast), tmp_path / "out", Console(quiet=True))
    assert result.steps == 4 and 0 <= result.scores["accuracy"] <= 1
    assert result.report is not None and result.report.total_rank == 4 * len(result.report.rows)
    answers = result.task.predict(result.model.eval(), [{"text": "the cat [SEP]"}, {"text": "oak [SEP]"}])
    assert {answer["label"] for answer in answers} <= {"animal", "plant"}


def test_loggers_are_silent_only_meanwhile(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("huggingface_hub.utils")
    before = logging.getLogger("huggingface_hub").level
    with pytest.raises(OSError), silenced("huggingface_hub"):
        logger.error("retrying")
        raise OSError
    assert caplog.records == []
    assert logging.getLogger("huggingface_hub").level == before
