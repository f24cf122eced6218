"""Token classification: alignment of words and tokens, entities, and the whole path on small real models."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value, disable_progress_bars
from rich.console import Console
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    DebertaV2Config,
    DebertaV2Model,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
)

from adalora.errors import AdaLoraError, ConfigError, DataError
from adalora.recipe import Recipe, load_recipe
from adalora.tasks import data as data_module
from adalora.tasks import tokens as tokens_module
from adalora.tasks.base import build_processor_task, build_task
from adalora.tasks.scores import entity_scores, tag_accuracy
from adalora.train import run
from folders import save_tokenizer, write

disable_progress_bars()

PEOPLE, PLACES, OTHERS = ("anna", "bert", "carla", "dora"), ("oslo", "rome", "lima"), ("sees", "in", "the", "and")
PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "##na", "##rt", "an", "be", *PEOPLE[2:], *PLACES, *OTHERS)


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`anna bert sees rome`: one or two names of a person, a verb, and perhaps a place."""
    generator = torch.Generator().manual_seed(seed)

    def pick(words: tuple[str, ...]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    made: list[dict[str, Any]] = []
    for index in range(count):
        words, tags = [pick(OTHERS), pick(PEOPLE)], ["O", "B-PER"]
        if index % 2:
            words, tags = [*words, pick(PEOPLE)], [*tags, "I-PER"]
        words, tags = [*words, pick(OTHERS)], [*tags, "O"]
        if index % 3:
            words, tags = [*words, pick(PLACES)], [*tags, "B-LOC"]
        made.append({"tokens": words, "tags": tags})
    return made


def save_bert(folder: Path) -> Path:
    """A BERT that cuts anna and bert in two pieces."""
    folder.mkdir(exist_ok=True)
    vocabulary = {piece: index for index, piece in enumerate(PIECES)}
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(PIECES), max_position_embeddings=64, initializer_range=0.15, **sizes)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    save_bert(folder / "bert")
    write(folder / "train.jsonl", rows(64))
    write(folder / "dev.jsonl", rows(16, seed=1))
    return folder


def recipe(world: Path, *settings: str, model: str = "bert") -> Recipe:
    file = world / "recipe.yaml"
    file.write_text(
        f"task: token-classification\nmodel: {{name_or_path: {world / model}}}\n"
        f"data: {{train: {world / 'train.jsonl'}, validation: {world / 'dev.jsonl'}, max_length: 32}}\n"
        "method: {name: adalora, init_r: 4, target_r: 2}\n"
    )
    return load_recipe(str(file), settings)


def build(world: Path, *settings: str) -> Any:
    return build_task(str(world / "bert"), recipe(world, *settings))


def test_limits_draw_every_tag_from_a_sorted_file(world: Path) -> None:
    plain: list[dict[str, Any]] = [{"tokens": ["the", "and"], "tags": ["O", "O"]}] * 60
    named: list[dict[str, Any]] = [{"tokens": ["the", "carla"], "tags": ["O", "B-PER"]}] * 20
    both: list[dict[str, Any]] = [{"tokens": ["carla", "lima"], "tags": ["B-PER", "B-LOC"]}] * 2
    file = write(world / "sorted.jsonl", plain + named + both)
    settings = [f"data.train={file}", f"data.validation={file}", "data.train_rows=10"]
    for seed in range(4):
        task = build_task(str(world / "bert"), recipe(world, *settings, f"seed={seed}"))
        assert task.labels == ["B-LOC", "B-PER", "O"] and len(task.splits["train"]) == 10


def test_only_the_first_piece_of_a_word_has_its_tag(world: Path) -> None:
    write(
        world / "two.jsonl",
        [{"tokens": ["the", "anna", "dora", "in", "rome"], "tags": ["O", "B-PER", "I-PER", "O", "B-LOC"]}],
    )
    task = build(world, f"data.validation={world / 'two.jsonl'}")
    assert task.labels == ["B-LOC", "B-PER", "I-PER", "O"] and task.metric == "f1"
    window = task.splits["validation"][0]
    pieces = task.processor.convert_ids_to_tokens(window["input_ids"])
    assert pieces == ["[CLS]", "the", "an", "##na", "dora", "in", "rome", "[SEP]"]
    assert window["labels"] == [-100, 3, 1, -100, 2, 3, 0, -100]
    assert window["heads"] == [1, 2, 4, 5, 6] and window["words"] == [0, 1, 2, 3, 4] and window["length"] == 8
    assert task.describe() == ("4 tags (B-LOC, B-PER, I-PER, O); 64 train, 1 validation rows (65 windows of 32 tokens)")


def test_a_long_row_becomes_windows_in_which_each_word_is_tagged_once(world: Path) -> None:
    words, tags = ["anna", "sees"] * 9, ["B-PER", "O"] * 9  # 27 pieces
    write(world / "long.jsonl", [{"tokens": words, "tags": tags}, *rows(2)])
    task = build(world, f"data.validation={world / 'long.jsonl'}", "data.max_length=8")
    windows = [window for window in task.splits["validation"] if window["row"] == 0]
    assert len(windows) == 5 and max(window["length"] for window in windows) == 8  # 6 of 8 are pieces of words
    assert [word for window in windows for word in window["words"]] == list(range(18))
    tagged = [label for window in windows for label in window["labels"] if label != -100]
    assert [task.labels[label] for label in tagged] == tags
    answer = task.predict(task.build_model(str(world / "bert"), recipe(world)).eval(), [{"tokens": words}])[0]
    assert len(answer["tags"]) == 18 and min(answer["scores"]) >= 0.25  # the best of four


def test_entities_are_counted_as_by_hand() -> None:
    truth = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-PER", "B-PER"], ["O", "O"]]
    guess = [["B-PER", "I-PER", "O", "B-PER"], ["O", "B-PER", "I-PER"], ["B-LOC", "O"]]
    # 4 true, 4 guessed (PER 0-1, PER 3, PER 1-2, LOC 0); only PER 0-1 is right.
    assert entity_scores(guess, truth) == {"f1": 0.25, "precision": 0.25, "recall": 0.25}
    assert tag_accuracy(guess, truth) == 6 / 9
    bioes = [["B-X", "I-X", "E-X", "S-Y", "O"]]
    assert entity_scores([["B-X", "I-X", "E-X", "O", "O"]], bioes) == {
        "f1": pytest.approx(2 / 3), "precision": 1.0, "recall": 0.5
    }  # fmt: skip
    # A missing end makes another entity of it, though all that is there is right.
    assert entity_scores([["B-X", "I-X", "O", "S-Y", "O"]], bioes)["recall"] == 0.5
    assert entity_scores([["O"]], [["O"]]) == {"f1": 0.0, "precision": 0.0, "recall": 0.0}
    # Two rows in a row: an entity does not go on over the border.
    assert entity_scores([["B-X"], ["I-X"]], [["B-X"], ["O"]])["precision"] == 0.5


def test_scores_of_predictions_over_windows_are_those_of_the_words(world: Path) -> None:
    task = build(world, "data.max_length=8")
    truth = task.tags["validation"]
    windows = task.splits["validation"]
    perfect = np.zeros((len(windows), 8), dtype=int)
    for number, window in enumerate(windows):
        for head, word in zip(window["heads"], window["words"], strict=True):
            perfect[number, head] = task.labels.index(truth[window["row"]][word])
    assert task._scores("validation", perfect) == {"f1": 1.0, "precision": 1.0, "recall": 1.0, "accuracy": 1.0}
    outside = np.full_like(perfect, task.labels.index("O"))
    words = [tag for row in truth for tag in row]
    assert task._scores("validation", outside) == {
        "f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": words.count("O") / len(words)
    }  # fmt: skip


def test_a_word_that_the_tokenizer_drops_counts_as_outside(world: Path) -> None:
    write(world / "odd.jsonl", [{"tokens": ["anna", "\u200d", "rome"], "tags": ["B-PER", "O", "B-LOC"]}])
    task = build(world, f"data.validation={world / 'odd.jsonl'}")
    window = task.splits["validation"][0]
    assert window["words"] == [0, 2]
    guess = np.zeros((1, window["length"]), dtype=int)
    guess[0, window["heads"][0]] = task.labels.index("B-PER")
    assert task._scores("validation", guess)["accuracy"] == 1.0


@pytest.mark.slow
def test_a_run_learns_entities_and_predicts_them_with_places(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = ["training={num_train_epochs: 12, learning_rate: 2e-2, per_device_train_batch_size: 8, save_strategy: 'no'}"]
    wanted = recipe(world, *fast)
    screen = io.StringIO()
    result = run(wanted, tmp_path / "run", Console(file=screen, soft_wrap=True))
    assert result.metric == "f1" and result.scores["f1"] >= 0.9
    assert result.scores.keys() == {"f1", "precision", "recall", "accuracy"}
    assert "eval_f1" in (result.folder / "metrics.jsonl").read_text()
    assert (result.folder / "adapter" / "tokenizer.json").exists()
    task = build_processor_task(str(world / "bert"), wanted, result.task.labels)
    text = "the anna dora in rome"
    by_text, by_words = task.predict(result.model.eval(), [{"text": text}, {"tokens": text.split()}])
    assert by_text["tags"] == by_words["tags"] == ["O", "B-PER", "I-PER", "O", "B-LOC"]
    person, place = by_text["entities"]
    assert (person["label"], person["text"], person["start"], person["end"]) == ("PER", "anna dora", 4, 13)
    assert person["words"] == [1, 3] and text[place["start"] : place["end"]] == "rome"
    assert person["score"] == pytest.approx(sum(by_text["scores"][1:3]) / 2)
    assert "start" not in by_words["entities"][0] and by_words["entities"][0]["text"] == "anna dora"
    assert task.predict(result.model, []) == []
    (program,) = re.findall(r"```python\n(.*?)```", (result.folder / "README.md").read_text(), re.S)
    monkeypatch.chdir(result.folder)
    exec(program.replace('"some", "words"', '"the", "anna", "sees"'), {})
    shown = capsys.readouterr().out
    assert "('an', 'B-PER')" in shown and "('sees', 'O')" in shown


def test_tags_without_entities_are_scored_by_accuracy(world: Path) -> None:
    plain = [row | {"tags": ["NAME" if tag != "O" else "VERB" for tag in row["tags"]]} for row in rows(12)]
    both = [f"data.{split}={write(world / 'plain.jsonl', plain)}" for split in ("train", "validation")]
    task = build(world, *both)
    assert task.metric == "accuracy" and task.labels == ["NAME", "VERB"]
    answer = task.predict(task.build_model(str(world / "bert"), recipe(world)).eval(), [{"text": "anna sees rome."}])[0]
    assert "entities" not in answer and answer["tokens"] == ["anna", "sees", "rome", "."]
    with pytest.raises(DataError, match="metric is 'f1', which counts entities, but tag 'NAME' is none of BIO"):
        build(world, *both, "metric=f1")


def test_tags_of_a_hub_data_set_have_their_names(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ClassLabel(names=["O", "B-PER"])
    features = Features({"tokens": Sequence(Value("string")), "ner_tags": Sequence(names)})
    served = Dataset.from_dict({"tokens": [["anna", "sees"]], "ner_tags": [[1, 0]]}, features=features)
    monkeypatch.setattr(data_module, "load_dataset", lambda *_: DatasetDict(train=served, validation=served))
    hub = ["data.name=owner/set", "data.train=train", "data.validation=validation", "data.tags=ner_tags"]
    task = build(world, *hub)
    assert task.labels == ["B-PER", "O"] and task.tags["train"] == [["B-PER", "O"]]


@pytest.mark.parametrize(
    "row,message",
    [
        ({"tokens": "anna sees", "tags": ["O"]}, "column 'tokens' must hold lists, .* row 0 holds 'anna sees'"),
        ({"tokens": ["anna"], "tags": "O"}, "column 'tags' must hold lists"),
        (
            {"tokens": ["anna", "sees"], "tags": ["O"]},
            "row 0 has 2 words in column 'tokens', but 1 tags in column 'tags'",
        ),
        (
            {"tokens": ["anna", " "], "tags": ["O", "O"]},
            r"column 'tokens' must hold words; row 0 holds \['anna', ' '\]",
        ),
        ({"tokens": [], "tags": []}, "must hold words; row 0"),
        ({"tokens": ["anna"], "tags": [None]}, "a tag is missing in row 0 of column 'tags'"),
        ({"tokens": ["anna"], "tags": ["B-ORG"]}, r"tag 'B-ORG' in column 'tags' \(row 0\) does not occur"),
        ({"words": ["anna"], "tags": ["O"]}, "no column 'tokens', which data.tokens names"),
    ],
)
def test_rows_that_cannot_be_used_are_named(world: Path, row: dict[str, Any], message: str) -> None:
    file = write(world / "bad.jsonl", [row])
    with pytest.raises(DataError, match=message):
        build(world, f"data.validation={file}")


def test_tags_that_teach_nothing_or_are_of_another_scheme_are_refused(world: Path) -> None:
    for tags, message in (
        (["O", "O"], "holds only the tag 'O'"),
        (["U-PER", "O"], "BILOU tag 'U-PER'; write E- for L-"),
    ):
        file = write(world / "bad.jsonl", [{"tokens": ["anna", "sees"], "tags": tags}])
        with pytest.raises(DataError, match=message):
            build(world, f"data.train={file}", f"data.validation={file}")


@pytest.mark.parametrize("row", [{}, {"text": " "}, {"tokens": []}, {"tokens": "anna"}, {"tokens": [1]}, {"text": 3}])
def test_input_without_words_is_refused(world: Path, row: dict[str, Any]) -> None:
    task = build_processor_task(str(world / "bert"), recipe(world), ["B-PER", "O"])
    model = task.build_model(str(world / "bert"), recipe(world)).eval()
    with pytest.raises(DataError, match="row 1 holds neither a list of words in 'tokens' nor a text"):
        task.predict(model, [{"text": "anna"}, row])


def test_a_tokenizer_without_word_numbers_is_refused(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        is_fast = False

    monkeypatch.setattr(tokens_module, "load_tokenizer", lambda *_: Slow())
    with pytest.raises(ConfigError, match=r"\(Slow\) cannot tell which word a token belongs to"):
        build(world)


def _roberta(folder: Path) -> PreTrainedTokenizerBase:
    letters = sorted({*"".join((*PEOPLE, *PLACES, *OTHERS)), "Ġ"})
    vocabulary = {piece: index for index, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters])}
    tokenizer = RobertaTokenizer(vocab=vocabulary, merges=[])
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.slow
def test_roberta_gets_words_as_they_stand_in_a_text(world: Path, tmp_path: Path) -> None:
    tokenizer = _roberta(tmp_path / "roberta")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=66, pad_token_id=1, **sizes)
    RobertaModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "roberta")
    wanted = recipe(world, f"model.name_or_path={tmp_path / 'roberta'}", "training={max_steps: 3, save_strategy: 'no'}")
    task = build_task(str(tmp_path / "roberta"), wanted)
    pieces = task.processor.convert_ids_to_tokens(task.splits["train"][0]["input_ids"])
    words = rows(1)[0]["tokens"]
    assert "".join(pieces[1:-1]) == "".join(f"Ġ{word}" for word in words)
    assert len(task.splits["train"][0]["heads"]) == len(words)
    result = run(wanted, tmp_path / "run", Console(quiet=True))
    assert 0 <= result.scores["f1"] <= 1 and result.steps == 3


@pytest.mark.slow
def test_deberta_trains_and_reloads(world: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "deberta", ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *PEOPLE, *PLACES, *OTHERS))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = DebertaV2Config(
        vocab_size=15,
        max_position_embeddings=64,
        relative_attention=True,
        position_buckets=16,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        **sizes,
    )
    torch.manual_seed(0)
    DebertaV2Model(config).save_pretrained(tmp_path / "deberta")
    wanted = recipe(world, f"model.name_or_path={tmp_path / 'deberta'}", "training={max_steps: 3, save_strategy: 'no'}")
    result = run(wanted, tmp_path / "run", Console(quiet=True))
    assert result.report is not None and result.report.total_rank == 2 * len(result.report.rows)


def test_windows_longer_than_the_model_takes_are_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(AdaLoraError, match=r"data.max_length is 65, but .* takes at most 64 tokens"):
        run(recipe(world, "data.max_length=65"), tmp_path / "run", Console(quiet=True))
