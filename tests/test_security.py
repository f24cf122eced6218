"""The statements of docs/security.md: what a file that somebody else made can do, and what it cannot."""

from __future__ import annotations

import ast
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import adalora
from adalora import yamlfiles
from adalora.claiming import claimed, locked
from adalora.commands.runs import read_trained
from adalora.errors import AdapterFileError, ConfigError
from adalora.files import write_files
from adalora.methods import build_method
from adalora.recipe import load_recipe
from adalora.study.design import load_study
from tiny import adapted, bert, pair, peft_warnings

SOURCE = Path(adalora.__file__).parent


@cache
def files() -> list[tuple[str, ast.Module]]:
    return [(file.name, ast.parse(file.read_text(encoding="utf-8"))) for file in sorted(SOURCE.rglob("*.py"))]


@cache
def calls() -> list[tuple[str, str, ast.Call]]:
    """(file, dotted name, call) of every call in the package."""
    nodes = [(file, node) for file, tree in files() for node in ast.walk(tree)]
    return [(file, ast.unparse(node.func), node) for file, node in nodes if isinstance(node, ast.Call)]


def test_nothing_in_the_package_unpickles_or_runs_what_it_reads() -> None:
    forbidden = ("pickle.load", "pickle.loads", "joblib.load", "dill.load", "eval", "exec", "compile", "os.system")
    assert [(file, name) for file, name, _ in calls() if name in forbidden] == []
    names = {
        (alias.name, file)
        for file, tree in files()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert [file for name, file in names if name in ("pickle", "marshal", "shelve")] == ["checkpoints.py"]  # its error


def test_every_torch_load_takes_tensors_and_plain_values_only() -> None:
    loads = [(file, node) for file, name, node in calls() if name == "torch.load"]
    assert len(loads) == 1  # the check of a Trainer's checkpoint, which reads no tensor
    for file, node in loads:
        assert [ast.unparse(k.value) for k in node.keywords if k.arg == "weights_only"] == ["True"], file


def test_no_archive_is_unpacked() -> None:
    """The one zip file that is opened is a checkpoint's, to have its sums checked."""
    names = {name.rpartition(".")[2] for _, name, _ in calls()}
    assert not {"extractall", "extract", "unpack_archive"} & names
    assert [file for file, name, _ in calls() if name.endswith(("ZipFile", "TarFile", "tarfile.open"))] == [
        "checkpoints.py"
    ]


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    for tag in ("python/object/apply:os.mkdir", "python/object/new:os.mkdir", "python/name:os.mkdir"):
        file.write_text(f"model: !!{tag} [{tmp_path / 'made'}]\n")
        for load in (load_recipe, load_study):
            with pytest.raises(ConfigError):
                load(str(file))
    assert not (tmp_path / "made").exists()
    unsafe = [(file, name) for file, name, _ in calls() if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load")]
    assert unsafe == [("yamlfiles.py", "yaml.load")]  # with a SafeLoader
    assert issubclass(yamlfiles._Loader, yaml.SafeLoader)


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.made),)


@pytest.mark.parametrize("name", ["lora", "lora-regu", "prune-lora", "squeeze-lora", "bitfit", "houlsby", "full"])
def test_a_folder_of_pickles_is_read_by_no_method_and_the_hub_is_not_asked(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: Any, **__: Any) -> Any:
        raise AssertionError("the hub was asked")

    for function in ("hf_hub_download", "file_exists"):
        monkeypatch.setattr(f"peft.utils.save_and_load.{function}", asked)
    if name == "full":
        bert().config.save_pretrained(tmp_path)
    else:
        kind = name.upper() if name in ("bitfit", "houlsby") else "LORA"
        config = {"peft_type": kind, "r": 4, "target_modules": ["query"]}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    method = build_method({"name": name})
    for content in ({"x": Bomb(tmp_path / "ran")}, {"x": torch.zeros(3)}, None):
        for file in ("adapter_model.bin", "pytorch_model.bin"):
            torch.save(content, tmp_path / file) if content else (tmp_path / file).unlink()
        base = bert()
        with pytest.raises(AdapterFileError) as caught:
            method.load(base, tmp_path)
        assert isinstance(base, type(bert())) and not (tmp_path / "ran").exists()
        if method.options().get("r") and content:
            assert "(.bin) are never read" in str(caught.value)


def test_a_lora_cannot_name_code_to_import_or_memory_that_its_file_does_not_hold(tmp_path: Path) -> None:
    method = build_method({"name": "lora", "target_modules": ["query"]})
    with peft_warnings():
        method.save(method.prepare(bert()), tmp_path, "bert", None)
    good = json.loads((tmp_path / "adapter_config.json").read_text())
    changes: dict[str, dict[str, Any]] = {
        "names code to import": {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
        "rank 1000000000": {"r": 10**9},
        "rank 2000": {"rank_pattern": {"query": 2000}},
    }
    for message, change in changes.items():
        (tmp_path / "adapter_config.json").write_text(json.dumps(good | change))
        with pytest.raises(AdapterFileError, match=message):
            method.load(bert(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(good))
    with peft_warnings():
        method.load(bert(), tmp_path)


def test_an_adapter_of_pickles_is_not_read(tmp_path: Path) -> None:
    adalora.save_adapter(adapted(pair()), tmp_path)
    torch.save({}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterFileError, match=r"\(\.bin\) are never read"):
        adalora.load_adapter(pair(), tmp_path)


@pytest.mark.parametrize("name", ["../first", "/first", "..", "first/../second", "first\x00"])
def test_names_in_an_adapter_name_modules_and_no_files(tmp_path: Path, name: str) -> None:
    adalora.save_adapter(adapted(pair()), tmp_path / "in")
    tensors = load_file(tmp_path / "in" / "adapter_model.safetensors")
    moved = {key.replace("model.first", f"model.{name}"): value for key, value in tensors.items()}
    save_file(moved, tmp_path / "in" / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "in" / "adapter_config.json").read_text())
    config["rank_pattern"] = {k.replace("first", name): v for k, v in config["rank_pattern"].items()}
    (tmp_path / "in" / "adapter_config.json").write_text(json.dumps(config))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(AdapterFileError, match="no such module"):
        adalora.load_adapter(pair(), tmp_path / "in")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_study_names_folders_within_its_own(tmp_path: Path) -> None:
    for name in ("../out", "/tmp/out", "a/b", "..", ".hidden", ""):
        study = {
            "seeds": [0],
            "budgets": [1],
            "reference": name,
            "tasks": {"t": {"recipe": "trec"}},
            "arms": {name: {"method": {"name": "lora"}, "learning_rates": [1e-3]}},
        }
        (tmp_path / "x.yaml").write_text(yaml.safe_dump(study))
        with pytest.raises(ConfigError, match="cannot be part of a folder's name"):
            load_study(str(tmp_path / "x.yaml"))


def test_writing_replaces_a_link_and_not_what_it_points_at(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    (tmp_path / "out").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "out" / name).symlink_to(tmp_path / "mine")
    adalora.save_adapter(adapted(pair()), tmp_path / "out")
    write_files(tmp_path / "out", {"adapter_config.json": lambda path: path.write_text("{}")})
    assert (tmp_path / "mine").read_text() == "keep"
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_clearing_up_removes_links_and_nothing_behind_them(tmp_path: Path) -> None:
    out, mine = tmp_path / "out", tmp_path / "mine"
    (mine / ".adalora-1").mkdir(parents=True)
    (mine / "file").write_text("keep")
    (out / "checkpoints").mkdir(parents=True)
    (out / ".adalora-2").symlink_to(mine)
    (out / "linked").symlink_to(mine)
    (out / ".adalora-3").write_text("a file")
    with locked(out):
        assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "linked"]
    assert (mine / "file").read_text() == "keep" and (mine / ".adalora-1").is_dir()


def test_only_the_folder_of_a_run_of_ours_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "FAILED.txt").write_text("of another program")
    (tmp_path / "work").write_text("keep")
    with pytest.raises(ConfigError, match="is not empty"), claimed(tmp_path):
        raise AssertionError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FAILED.txt", "work"]
    (tmp_path / "recipe.yaml").write_text("")
    with claimed(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def run_folder(folder: Path, **model: Any) -> Path:
    """As a run leaves it, as far as reading it needs."""
    adalora.save_adapter(adapted(pair()), folder / "adapter", task_type="SEQ_CLS")
    recipe = {
        "model": {"name_or_path": "package:nothing", **model},
        "data": {"train": "a"},
        "method": {"name": "adalora"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "result.json").write_text('{"labels": []}')
    return folder


def test_a_folder_cannot_allow_the_code_that_comes_with_its_model(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", trust_remote_code=True, name_or_path="some/model")
    with pytest.raises(
        ConfigError, match=r"would run code that comes with 'some/model'.*--set model\.trust_remote_code"
    ):
        read_trained(folder)
    assert read_trained(folder, settings=["model.trust_remote_code=true"]).recipe.model.trust_remote_code
    assert not read_trained(folder, settings=["model.trust_remote_code=false"]).recipe.model.trust_remote_code
    assert not read_trained(run_folder(tmp_path / "other", name_or_path="some/model")).recipe.model.trust_remote_code


def test_code_that_comes_with_a_model_does_not_run_unless_asked_for(tmp_path: Path) -> None:
    from transformers import AutoConfig

    from adalora.tasks.pretrained import from_pretrained

    (tmp_path / "model").mkdir()
    auto_map = {"AutoConfig": "code.Own"}
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    (tmp_path / "model" / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    recipe = load_recipe("text-classification", [f"model.name_or_path={tmp_path / 'model'}", "data.train=a"])
    assert recipe.model.trust_remote_code is False
    with pytest.raises(ConfigError, match="cannot load"):
        from_pretrained(AutoConfig, str(tmp_path / "model"), recipe)
    assert not (tmp_path / "ran").exists()


def test_a_base_model_of_pickles_with_code_in_it_is_refused_without_running_it(tmp_path: Path) -> None:
    from transformers import AutoModel, BertConfig

    from adalora.tasks.pretrained import from_pretrained

    config = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    config.save_pretrained(tmp_path / "model")
    torch.save({"x": Bomb(tmp_path / "ran")}, tmp_path / "model" / "pytorch_model.bin")
    recipe = load_recipe("text-classification", [f"model.name_or_path={tmp_path / 'model'}", "data.train=a"])
    with pytest.raises(ConfigError, match="cannot load"):
        from_pretrained(AutoModel, str(tmp_path / "model"), recipe)
    assert not (tmp_path / "ran").exists()


def test_the_allocated_memory_is_bounded_by_what_the_file_holds(tmp_path: Path) -> None:
    """A configuration that promises a million triplets is held against the tensors."""
    adalora.save_adapter(adapted(pair()), tmp_path)
    save_file(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change in ({"init_r": 10**9}, {"init_r": 10**9, "rank_pattern": None}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(AdapterFileError, match="1000000000"):
            adalora.load_adapter(pair(), tmp_path)
