import json
from pathlib import Path

import pytest

from adalora.errors import ConfigError
from adalora.methods import build_method
from adalora.recipe import load_recipe, recipe_names
from adalora.sections import DATA, METRICS

MINIMAL = "model: {name_or_path: some/model}\ndata: {train: a.jsonl}\nmethod: {name: adalora, init_r: 4, target_r: 2}\n"


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL)
    return str(path)


def test_every_built_in_recipe_is_valid_and_dumps_to_an_equal_recipe(tmp_path: Path) -> None:
    assert {"docstrings", "docstrings-lora", "text-classification"} <= set(recipe_names())
    again = tmp_path / "again.yaml"
    for name in recipe_names():
        recipe = load_recipe(name)
        again.write_text(recipe.dump())
        assert load_recipe(str(again)) == recipe


@pytest.mark.parametrize(
    "task,own",
    [
        ("classification", {"text_pair": "b", "kind": "numbers"}),
        ("token-classification", {"tokens": "words", "tags": "ner_tags"}),
        ("question-answering", {"no_answer": True, "stride": 64}),
        ("seq2seq", {"source": "document", "length_penalty": 0.5}),
        ("causal-lm", {"kind": "messages", "answer_pattern": r"#### (.+)", "completion_only": False}),
        ("image-classification", {"image": "img"}),
    ],
)
def test_each_task_has_its_own_data_and_metrics_and_dumps_to_an_equal_recipe(
    file: str, tmp_path: Path, task: str, own: dict[str, object]
) -> None:
    section = f"data={json.dumps(own | {'train': 'a.jsonl', 'train_rows': 7})}"
    for metric in METRICS[task]:
        recipe = load_recipe(file, [f"task={task}", section, f"metric={metric}"])
        assert type(recipe.data) is DATA[task] and recipe.data.train_rows == 7
        assert {key: getattr(recipe.data, key) for key in own} == own
        (tmp_path / "again.yaml").write_text(recipe.dump())
        assert load_recipe(str(tmp_path / "again.yaml")) == recipe


def test_what_belongs_to_another_task_is_refused(file: str) -> None:
    with pytest.raises(ConfigError, match=r"there is no key 'data.text'; did you mean 'test'\?"):
        load_recipe(file, ["task=question-answering", "data.text=a"])
    with pytest.raises(ConfigError, match=r"metric is 'f1': seq2seq has no such metric; known are: rouge2, rouge1"):
        load_recipe(file, ["task=seq2seq", "metric=f1"])
    with pytest.raises(ConfigError, match=r"metric is 'acuracy': classification .* did you mean 'accuracy'\?"):
        load_recipe(file, ["metric=acuracy"])
    with pytest.raises(ConfigError) as caught:  # and the unknown task alone is the mistake
        load_recipe(file, ["task=summarization", "metric=rouge2", "data.source=a"])
    assert str(caught.value).count(";") == 0 and "task is 'summarization'" in str(caught.value)


def test_settings_go_on_top_of_the_file_and_the_seed_on_top_of_both(file: str) -> None:
    recipe = load_recipe(file, ["training.learning_rate=1e-3", "data.text=sentence", "seed=3", "method.init_r=6"], 7)
    assert recipe.training["learning_rate"] == 0.001  # PyYAML alone reads this as a string
    assert (recipe.data.text, recipe.method["init_r"], recipe.seed) == ("sentence", 6, 7)


@pytest.mark.parametrize("text,value", [("1e-3", 0.001), ("-2E+4", -20000.0), (".5e1", 5.0), ("12", 12), ("1e", "1e")])
def test_numbers_are_numbers(file: str, text: str, value: object) -> None:
    assert load_recipe(file, [f"training.x={text}"]).training["x"] == value


@pytest.mark.parametrize(
    "setting,message",
    [
        ("data.txt=a", "no key 'data.txt'; did you mean 'text'"),
        ("modle.x=1", "no key 'modle'; did you mean 'model'"),
        ("data.max_length=many", "data.max_length is 'many'"),
        ("data.max_length=2", "data.max_length is 2"),
        ("task=painting", "task is 'painting'"),
        ("seed", "section.key=value"),
        ("seed.x=1", "section"),
        ("data.text=[", "not valid YAML"),
        ("seed=-1", "seed is -1: input should be greater than or equal to 0"),
        ("seed=4294967296", "seed is 4294967296: input should be less than 4294967296"),
        ("data.kind=numeric", "data.kind is 'numeric'"),
        ("model=bert", "model is 'bert'; it must be a section, e.g. model.name_or_path=bert"),
        ("data=[1]", "data is [1]; it must be a section, e.g. data.train=…"),
        ("method=lora", "method is 'lora'; it must be a section, e.g. method.name=lora"),
        ("method.target_modules=query,value", "for a list write [query, value]"),
        ("method.exclude_modules='pooler.dense, key'", "for a list write [pooler.dense, key]"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_path(file: str, setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(file, ["seed=1", setting])
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["yes", "no", "on", "off", "Yes", "NO"])
def test_only_true_and_false_are_booleans(file: str, text: str) -> None:
    recipe = load_recipe(file, [f"training.eval_strategy={text}", "training.fp16=true", "training.bf16=False"])
    assert recipe.training == {"eval_strategy": text, "fp16": True, "bf16": False}


@pytest.mark.parametrize("text", ["1e5", "1234e56", "no", "true", "12"])
def test_a_text_that_looks_like_something_else_stays_a_text_in_the_dump(file: str, tmp_path: Path, text: str) -> None:
    recipe = load_recipe(file, [f"model.revision='{text}'"])
    again = tmp_path / "again.yaml"
    again.write_text(recipe.dump())
    assert load_recipe(str(again)).model.revision == text


@pytest.mark.parametrize("twice", ["seed: 1\nseed: 2\n", "training: {fp16: true, fp16: false}\n"])
def test_a_key_that_occurs_twice_is_refused(file: str, twice: str) -> None:
    Path(file).write_text(MINIMAL + twice)
    with pytest.raises(ConfigError, match=r"key '(seed|fp16)' occurs twice"):
        load_recipe(file)


def test_what_is_missing_is_named(file: str) -> None:
    Path(file).write_text("data: {train: a.jsonl}\nmethod: {name: lora}\n")
    with pytest.raises(ConfigError, match=r"section model is missing$"):
        load_recipe(file)
    with pytest.raises(ConfigError, match=r"model\.name_or_path is missing$"):
        load_recipe(file, ["model.revision=main"])


def test_a_section_left_empty_can_be_set(file: str) -> None:
    Path(file).write_text(MINIMAL + "training:\n")
    assert load_recipe(file, ["training.max_steps=3"]).training == {"max_steps": 3}


@pytest.mark.parametrize("text", ["(query|value)", "layer.{1,3}query", "all-linear"])
def test_a_regular_expression_is_no_unbracketed_list(file: str, text: str) -> None:
    assert load_recipe(file, [f"method.target_modules='{text}'"]).method["target_modules"] == text


@pytest.mark.parametrize(
    "options,message",
    [
        ({"r": 0}, "r is 0"),
        ({"r": 2.0}, "r is 2.0"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout is -0.1"),
        ({"parameters": 0}, "parameters is 0"),
        ({"parameters": "many"}, "parameters is 'many'"),
    ],
)
def test_options_of_lora_that_cannot_be_meant_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_method({"name": "lora", **options})
    assert str(caught.value).startswith(f"in section method: {message}; give a ")


def test_what_is_neither_recipe_nor_file_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'docstrings'"):
        load_recipe("docstring")
    broken = tmp_path / "b.yaml"
    broken.write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(str(broken))
    broken.write_text("- 1")
    with pytest.raises(ConfigError, match="must hold sections"):
        load_recipe(str(broken))
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read"):
        load_recipe(str(broken))
