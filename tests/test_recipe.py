from pathlib import Path

import pytest

from adalora.errors import ConfigError
from adalora.recipe import load_recipe, recipe_names

MINIMAL = "model: {name_or_path: some/model}\ndata: {train: a.jsonl}\nmethod: {name: adalora, init_r: 4, target_r: 2}\n"


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL)
    return str(path)


def test_every_built_in_recipe_is_valid_and_dumps_to_an_equal_recipe(tmp_path: Path) -> None:
    assert recipe_names() == ["docstrings", "docstrings-lora", "text-classification"]
    for name in recipe_names():
        recipe = load_recipe(name)
        again = tmp_path / f"{name}.yaml"
        again.write_text(recipe.dump())
        assert load_recipe(str(again)) == recipe


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
    ],
)
def test_a_wrong_setting_is_refused_by_its_path(file: str, setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(file, ["seed=1", setting])
    assert message in str(caught.value)


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
