"""A sample of `python -m benchmarks.fuzz`, and by name what it found: only AdaLoraError comes out of a reader."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
from benchmarks import fuzz, fuzzed
from benchmarks.damage import damage

from adalora.errors import AdaLoraError, AdapterFileError, ConfigError, DataError
from adalora.jsonfiles import believed, read_object, read_records
from adalora.recipe import load_recipe
from adalora.study.design import load_study


def readers(folder: Path) -> dict[str, fuzzed.Reader]:
    (folder / "made").mkdir()
    return fuzzed.adapter_readers(folder / "made") | fuzzed.text_readers()


def test_a_sample_of_damaged_adapters_recipes_studies_and_rows(tmp_path: Path) -> None:
    for name, reader in readers(tmp_path).items():
        record, errors = fuzz.feed(reader, 30, tmp_path / "fed", first=100_000)
        assert errors == [], name
        assert record["inputs"] == 30 and record["slowest_s"] < fuzz.SECONDS


@pytest.mark.filterwarnings("ignore")  # PEFT's, of options that it does not know or does not like
def test_a_sample_of_damaged_loras_and_of_what_other_methods_store(tmp_path: Path) -> None:
    for name, reader in fuzzed.lora_readers(tmp_path / "made").items():
        record, errors = fuzz.feed(reader, 20, tmp_path / "fed", first=100_000)
        assert errors == [], name
        assert record["accepted"] < 20


@pytest.mark.slow
def test_a_sample_of_damaged_runs_and_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    for name, reader in fuzzed.run_readers(tmp_path / "made").items():
        record, errors = fuzz.feed(reader, 60, tmp_path / "fed", first=100_000)
        assert errors == [], name
        assert record["accepted"] < 60


def test_the_same_number_makes_the_same_input(tmp_path: Path) -> None:
    import random

    content = b'{"a": [1, 2, {"b": null}]}'
    for number in range(30):
        made = [damage(content, "x.json", random.Random(number)) for _ in range(2)]
        assert made[0] == made[1]


def test_a_reader_that_lets_something_else_through_is_told(tmp_path: Path) -> None:
    def careless(folder: Path, name: str) -> Any:
        return json.loads((folder / name).read_bytes())

    record, errors = fuzz.feed(fuzzed.Reader({"x.json": b'{"a": 1}'}, ("x.json",), careless, 1), 50, tmp_path / "fed")
    assert record["failed"] == len(errors) > 10
    assert all("JSONDecodeError" in text or "Error" in text for _, text in errors)


BOMBS = {
    "aliases of aliases": "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9) if i else 'x'}]\n" for i in range(12)),
    "merges of merges": "m0: &m0 {k: 1}\n"
    + "".join(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}\n" for i in range(1, 12)),
    "an alias of itself": "model: &a {name_or_path: *a}\n",
    "too deep": "model: " + "[" * 5000,
    "lists in lists": "- " * 3000,
    "a date that is none": "model: {name_or_path: 2020-99-99}\n",
    "a number of a wrong form": "model: !!int x\n",
    "an empty number": "model: !!int ''\n",
    "a time of a wrong form": "model: !!timestamp x\n",
    "a number of many digits": f"model: {'1' * 5000}\n",
    "an object of Python": "model: !!python/object/apply:os.mkdir [here]\n",
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_hostile_yaml_is_one_error_soon_and_in_little_memory(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    for load in (load_recipe, load_study):
        with pytest.raises(ConfigError, match=r"x\.yaml"):
            load(str(file))
    assert time.monotonic() - begun < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes
    assert not Path("here").exists()


def test_aliases_that_people_write_are_fine(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        "model: {name_or_path: &name some/model}\ndata: {train: a, validation: &v b, test: *v}\n"
        "method: &m {name: adalora, init_r: 4}\ntraining: {<<: {seed: 1}, run_name: *name}\n"
    )
    recipe = load_recipe(str(file))
    assert recipe.data.test == "b" and recipe.training == {"seed": 1, "run_name": "some/model"}


def test_json_is_read_as_an_object_or_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    for text in ("", "[", "[" * 100_000, "[]", "3", "\ud800".encode("utf-8", "surrogatepass").decode("latin1"), "{"):
        file.write_text(text, encoding="latin1")
        with pytest.raises(AdapterFileError, match=r"x\.json"):
            read_object(file)
    with pytest.raises(AdapterFileError, match="No such file"):
        read_object(tmp_path / "nothing.json")
    file.write_text('{"a": 1}')
    assert read_object(file) == {"a": 1}


def test_records_end_at_the_first_line_that_is_torn(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    assert read_records(file) == []
    for torn in (b'{"step": 2, "lo', b"\xff\xfe", b"3", b"[" * 100_000, b"null"):
        file.write_bytes(b'{"step": 1}\n' + torn + b'\n{"step": 3}\n')
        assert read_records(file) == [{"step": 1}]


class KeyboardError(Exception):
    """What another library calls its own."""


def test_records_that_are_not_as_written_are_one_error(tmp_path: Path) -> None:
    for fails in (lambda: {}["a"], lambda: 1 + "a", lambda: int("x"), lambda: None.a, lambda: 1 // 0):  # type: ignore
        with pytest.raises(AdapterFileError, match="not as they were written"), believed(tmp_path):
            fails()
    with pytest.raises(DataError, match="mine"), believed(tmp_path):
        raise DataError("mine")
    with pytest.raises(AssertionError), believed(tmp_path):
        raise AssertionError
    with pytest.raises(AdapterFileError, match="KeyboardError: no"), believed(tmp_path, KeyboardError):
        raise KeyboardError("no")
    with pytest.raises(KeyboardError), believed(tmp_path):
        raise KeyboardError("no")
    assert issubclass(AdapterFileError, AdaLoraError)


def test_a_name_too_long_for_any_file_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is neither a recipe file"):
        load_recipe("a" * 10_000)
    with pytest.raises(ConfigError, match="is neither a study file"):
        load_study("a" * 10_000)
    study = {"seeds": [0], "budgets": [1], "reference": "a", "tasks": {"t": {"recipe": "x" * 10_000}}}
    study["arms"] = {"a": {"method": {"name": "lora"}, "learning_rates": [1e-3]}}
    (tmp_path / "x.yaml").write_text(json.dumps(study))
    assert load_study(str(tmp_path / "x.yaml")).tasks["t"].recipe == "x" * 10_000  # refused when it is loaded


def test_a_method_that_is_no_name_is_refused_by_its_key() -> None:
    from adalora.methods import build_method

    for name in (["adalora"], {"adalora": 1}, None, 3):
        with pytest.raises(ConfigError, match=r"method\.name is"):
            build_method({"name": name})
