"""Folders that are damaged, incomplete, foreign or made for another model: one clear error, and no harm."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adalora import AdaLoraError, eject, load_adapter, save_adapter
from adalora.errors import AdapterFileError
from adalora.injection import named_adapters
from adalora.reading import read_adapter
from tiny import adapted, assert_unchanged, bert, pair, snapshot

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FIRST = "base_model.model.first"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of ours: ranks 3 and 1 of 4 in a `Pair`, with the second one's bias."""
    save_adapter(adapted(pair(), [3, 1], bias="lora_only"), tmp_path / "adapter", base_model_name_or_path="some/pair")
    return tmp_path / "adapter"


@pytest.fixture
def foreign(folder: Path) -> Path:
    """The same without what only we write, as PEFT would have stored it."""
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"format": "pt"})
    load_adapter(pair(), folder)
    return folder


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def refused(folder: Path, *parts: str, model: nn.Module | None = None) -> str:
    """Load, expect AdapterFileError with all of `parts` in its message and a model left alone."""
    model = model or pair()
    before = snapshot(model)
    with pytest.raises(AdapterFileError) as caught:
        load_adapter(model, folder)
    assert_unchanged(model, before)
    message = str(caught.value)
    assert str(folder) in message
    assert [part for part in parts if part not in message] == []
    return message


# --- files ----------------------------------------------------------------------------------------------


def test_a_folder_that_does_not_exist_is_named_with_what_belongs_in_it(tmp_path: Path) -> None:
    message = refused(tmp_path / "nothing", CONFIG, "No such file", "An adapter folder holds", WEIGHTS)
    assert "Traceback" not in message


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, name, "No such file")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_folder_in_place_of_a_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, name)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_an_empty_file_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    refused(folder, name)


def test_pickle_files_are_never_read(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    refused(folder, WEIGHTS, "(.bin) are never read")


@pytest.mark.parametrize("text", ["{", "nonsense", '{"peft_type": "ADALORA",}', "[" * 100_000, "\udcff"])
def test_text_that_is_no_json_is_named(folder: Path, text: str) -> None:
    (folder / CONFIG).write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(folder, CONFIG)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"ADALORA"', "{}"])
def test_json_that_is_no_adapter_configuration_is_named(folder: Path, text: str) -> None:
    (folder / CONFIG).write_text(text)
    refused(folder, CONFIG, "peft_type=None", "only ADALORA")


def test_another_kind_of_adapter_is_named_with_its_reader(folder: Path) -> None:
    edit_config(folder, peft_type="LORA")
    refused(folder, "peft_type='LORA'", "peft.PeftModel.from_pretrained")


def test_tensors_cut_off_anywhere_are_noticed(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    header = int.from_bytes(whole[:8], "little")
    cuts = {0, 1, 7, 8, 9, header, header + 8, len(whole) - 4, len(whole) - 1}
    for length in sorted(cuts | set(range(0, len(whole), 61))):
        (folder / WEIGHTS).write_bytes(whole[:length])
        with pytest.raises(AdapterFileError, match=WEIGHTS):
            read_adapter(folder)
    (folder / WEIGHTS).write_bytes(whole)
    read_adapter(folder)


def test_a_flipped_bit_anywhere_in_the_tensors_is_noticed(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in range(start, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        (folder / WEIGHTS).write_bytes(damaged)
        with pytest.raises(AdapterFileError, match=f"{WEIGHTS}.*checksum"):
            read_adapter(folder)


def test_a_flipped_bit_in_the_header_changes_no_number_unnoticed(folder: Path) -> None:
    whole, wanted = (folder / WEIGHTS).read_bytes(), read_adapter(folder)
    noticed, places = 0, range(0, 8 + int.from_bytes(whole[:8], "little"), 3)
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 7
        (folder / WEIGHTS).write_bytes(damaged)
        try:
            stored = read_adapter(folder)
        except AdapterFileError:
            noticed += 1
        else:
            assert_same_increments(stored, wanted)
    assert noticed >= 0.97 * len(places)  # the rest is in "format" and in the name of our own entry


def assert_same_increments(stored: Any, wanted: Any) -> None:
    assert stored.factors.keys() == wanted.factors.keys()
    assert stored.whole.keys() == wanted.whole.keys()
    assert stored.config.scaling == wanted.config.scaling
    for name, factors in wanted.factors.items():
        assert all(torch.equal(a, b) for a, b in zip(stored.factors[name], factors, strict=True))
    assert all(torch.equal(stored.whole[name], value) for name, value in wanted.whole.items())


# --- our own digests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": 9.0},
        {"init_r": 5},
        {"rank_pattern": None},
        {"rank_pattern": {"first.lora_E": [True, True, True, False], "second.lora_E": [False, False, False, True]}},
        {"bias": "none"},
        {"modules_to_save": ["head"]},
    ],
)
def test_a_hand_edited_meaning_is_refused(folder: Path, change: dict[str, Any]) -> None:
    edit_config(folder, **change)
    refused(folder, "do not belong together", "Restore both from one save")


def test_hand_edited_names_are_fine(folder: Path) -> None:
    edit_config(folder, base_model_name_or_path="moved/elsewhere", task_type="SEQ_CLS", revision="main", anything=[1])
    stored = read_adapter(folder)
    assert stored.base_model_name_or_path == "moved/elsewhere"
    assert {name: factors[1].shape[0] for name, factors in stored.factors.items()} == {"first": 3, "second": 1}


def test_files_of_two_saves_are_noticed(folder: Path, tmp_path: Path) -> None:
    save_adapter(adapted(pair(), [1, 2]), tmp_path / "other")
    (folder / CONFIG).write_bytes((tmp_path / "other" / CONFIG).read_bytes())
    refused(folder, "do not belong together")


@pytest.mark.parametrize("text", ["{", "[]", "null", "{}", '{"config": {}}', "[" * 50_000])
def test_damaged_metadata_is_named(folder: Path, text: str) -> None:
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"adalora": text})
    refused(folder, "metadata", WEIGHTS)


def test_our_configuration_in_the_metadata_cannot_be_exchanged(folder: Path) -> None:
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        own = json.loads(file.metadata()["adalora"])
    own["config"]["init_r"] = 40
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"adalora": json.dumps(own)})
    refused(folder, "do not belong together")


# --- contents -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["lora_A", "lora_E", "lora_B"])
def test_a_missing_tensor_is_named(foreign: Path, part: str) -> None:
    edit_tensors(foreign, lambda tensors: tensors.pop(f"{FIRST}.{part}"))
    refused(foreign, f"key '{FIRST}.{part}' is missing", "Restore")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named(foreign: Path, value: float) -> None:
    edit_tensors(foreign, lambda tensors: tensors[f"{FIRST}.lora_E"].fill_(value))
    refused(foreign, f"key '{FIRST}.lora_E'", "not finite")


@pytest.mark.parametrize(
    ("part", "shape"),
    [
        ("lora_A", (2, 6)),
        ("lora_A", (3,)),
        ("lora_A", ()),
        ("lora_E", (3,)),
        ("lora_E", ()),
        ("lora_E", (1, 3)),
        ("lora_E", (3, 2)),
        ("lora_B", (5, 2)),
        ("lora_B", (5, 3, 1)),
        ("lora_B", (3, 5)),
    ],
)
def test_factors_that_do_not_fit_each_other_are_named_with_shapes(foreign: Path, part: str, shape: tuple) -> None:
    edit_tensors(foreign, lambda tensors: tensors.update({f"{FIRST}.{part}": torch.ones(shape)}))
    refused(foreign, "'first'", f"'{part}': {shape}", "(k, in), (k, 1), (out, k)")


def test_integers_in_place_of_factors_are_named(foreign: Path) -> None:
    edit_tensors(foreign, lambda tensors: tensors.update({f"{FIRST}.lora_E": torch.ones(3, 1, dtype=torch.int64)}))
    refused(foreign, f"key '{FIRST}.lora_E' is torch.int64")


@pytest.mark.parametrize("key", ["first.lora_E", "model.first.lora_A", "lora_A"])
def test_a_key_without_the_prefix_is_named(foreign: Path, key: str) -> None:
    edit_tensors(foreign, lambda tensors: tensors.update({key: torch.ones(3, 1)}))
    refused(foreign, f"key {key!r} does not start with 'base_model.model.'")


def test_a_file_without_any_factor_is_refused(foreign: Path) -> None:
    edit_tensors(foreign, lambda tensors: [tensors.pop(key) for key in list(tensors) if "lora_" in key])
    refused(foreign, "no key that ends in lora_A")


def test_plain_lora_tensors_under_an_adalora_configuration_are_refused(foreign: Path) -> None:
    edit_tensors(foreign, lambda tensors: tensors.update({f"{FIRST}.lora_A.weight": torch.ones(3, 6)}))
    refused(foreign, "'first.lora_A.weight'", "no such tensor")


@pytest.mark.parametrize(
    ("pattern", "parts"),
    [
        ([True], ("rank_pattern is a list",)),
        ("x", ("rank_pattern is a str",)),
        ({"first.lora_E": 3}, ("'first.lora_E'", "4 booleans")),
        ({"first.lora_E": [True, True, True]}, ("'first.lora_E'", "4 booleans")),
        ({"first.lora_E": [1, 1, 1, 0]}, ("'first.lora_E'", "4 booleans")),
        ({"first.lora_E": [True, True, False, False]}, ("'first' has 3 triplets", "says 2")),
        ({"first.lora_E": [True, True, True, False]}, ("'second' has 1 triplets", "says 4")),
        (
            {
                "first.lora_E": [True, True, True, False],
                "second.lora_E": [True, False, False, False],
                "third.lora_E": [True, False, False, False],
            },
            ("rank_pattern names 'third.lora_E'",),
        ),
        (None, ("'first' has 3 triplets", "says 4")),
    ],
)
def test_a_wrong_rank_pattern_is_named(foreign: Path, pattern: Any, parts: tuple[str, ...]) -> None:
    edit_config(foreign, rank_pattern=pattern)
    refused(foreign, *parts)


@pytest.mark.parametrize(
    "change",
    [
        {"init_r": 0},
        {"init_r": "4"},
        {"init_r": 4.0},
        {"init_r": [4]},
        {"lora_alpha": "8"},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": {}},
        {"target_r": "2"},
        {"bias": "some"},
        {"bias": ["none"]},
        {"modules_to_save": "first"},
        {"modules_to_save": [1]},
        {"target_modules": 7},
        {"lora_dropout": 1.5},
    ],
)
def test_a_setting_of_the_wrong_kind_is_named(foreign: Path, change: dict[str, Any]) -> None:
    edit_config(foreign, **change)
    refused(foreign, next(iter(change)))


# --- another model --------------------------------------------------------------------------------------


def test_a_module_that_the_model_does_not_have_is_named_with_the_right_model(folder: Path) -> None:
    message = refused(folder, "'first'", "Sequential", model=nn.Sequential(nn.Linear(6, 5)))
    assert "made for 'some/pair'" in message


def test_another_hidden_size_is_named_with_both_shapes(folder: Path) -> None:
    refused(folder, "'first'", "(5, 6)", "(5, 9)", "made for 'some/pair'", model=pair(width=9))


def test_another_kind_of_module_is_named(folder: Path) -> None:
    model = pair()
    model.second = nn.Bilinear(5, 5, 4)
    refused(folder, "'second' (Bilinear)", model=model)


def test_another_number_of_labels_is_named_with_both_shapes(tmp_path: Path) -> None:
    save_adapter(adapted(bert(), target_modules=["query"], modules_to_save=["classifier"]), tmp_path)
    refused(tmp_path, "'classifier.", "has shape (2,", "shape (3,", "made for another model", model=bert(labels=3))


def test_another_type_of_number_is_named(foreign: Path) -> None:
    edit_tensors(foreign, lambda tensors: tensors.update({f"{FIRST}.bias": torch.ones(5, dtype=torch.int64)}))
    refused(foreign, "'first.bias' is torch.int64", "torch.float32")


# --- anything at all ------------------------------------------------------------------------------------


def mutate(content: bytes, chance: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8])):
        place = chance.randrange(len(data))
        length = chance.choice([1, 2, 5, 20])
        match chance.randrange(5):
            case 0:
                data[place] ^= 1 << chance.randrange(8)
            case 1:
                del data[place : place + length]
            case 2:
                data[place:place] = chance.randbytes(length)
            case 3:
                data[place:place] = data[chance.randrange(len(data)) :][:length]
            case 4:
                data[place : place + length] = chance.choice(
                    [b"0", b"-1", b"null", b"[]", b'"', b"1e999", b"{", b"\xff"]
                )
        if not data:
            return b""
    return bytes(data)


def survives(folder: Path, model: nn.Module, before: dict[str, Any]) -> bool:
    """Whether the folder loads; if not, only AdaLoraError came and the model is the same."""
    try:
        load_adapter(model, folder)
    except AdaLoraError:
        assert_unchanged(model, before)
        return False
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    return True


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_nothing_but_our_errors_comes_from_any_damage_to_our_files(folder: Path, name: str) -> None:
    content, chance, loaded = (folder / name).read_bytes(), random.Random(7), 0
    wanted, model = read_adapter(folder), pair()
    before = snapshot(model)
    for _ in range(400):
        (folder / name).write_bytes(mutate(content, chance))
        if survives(folder, model, before):
            loaded += 1
            assert_same_increments(read_adapter(folder), wanted)
            eject(model)
            load_state(model, before)
    assert loaded < 200


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_nothing_but_our_errors_comes_from_any_damage_to_foreign_files(foreign: Path, name: str) -> None:
    content, chance, loaded = (foreign / name).read_bytes(), random.Random(11), 0
    model = pair()
    before = snapshot(model)
    for _ in range(400):
        (foreign / name).write_bytes(mutate(content, chance))
        if survives(foreign, model, before):
            loaded += 1
            assert all(module.capacity <= 4 for _, module in named_adapters(model))
            eject(model)
            load_state(model, before)
    assert 0 < loaded < 400


def load_state(model: nn.Module, before: dict[str, Any]) -> None:
    model.load_state_dict(before["state"])
    model.requires_grad_(True)
    assert_unchanged(model, before)
