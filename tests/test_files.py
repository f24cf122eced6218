"""Writing: complete or not at all, whatever happens to the disk or to the process."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from adalora import export_lora, export_merged, load_adapter, save_adapter
from adalora.errors import AdapterFileError
from adalora.files import staged, write_files
from tiny import adapted, assert_unchanged, pair, snapshot


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def entries(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def writer(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


def test_a_new_folder_appears_with_all_files_and_nothing_else(tmp_path: Path) -> None:
    write_files(tmp_path / "deep" / "new", {"b": writer("1"), "a": writer("2")})
    assert contents(tmp_path) == {"deep/new/a": b"2", "deep/new/b": b"1"}
    assert entries(tmp_path) == ["deep", "deep/new", "deep/new/a", "deep/new/b"]


def test_in_an_existing_folder_only_the_named_files_change(tmp_path: Path) -> None:
    for name in ("a", "keep"):
        (tmp_path / name).write_text("old")
    write_files(tmp_path, {"a": writer("new"), "b": writer("new")})
    assert contents(tmp_path) == {"a": b"new", "b": b"new", "keep": b"old"}


def test_files_appear_weights_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights hold the digest of the JSON, so new weights beside an old JSON are noticed."""
    order: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: (order.append(self.name), replace(self, to))[1])
    save_adapter(adapted(pair()), tmp_path)
    assert order == ["adapter_model.safetensors", "adapter_config.json"]


def test_everything_reaches_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("sync"), fsync(handle))[1])
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append("rename"), rename(self, to))[1])
    write_files(tmp_path / "new", {"a": writer("1"), "b": writer("2")})
    assert events == ["sync", "sync", "rename", "sync"]


def test_relative_and_linked_folders_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real")
    for folder in (".", "sub", str(tmp_path / "link")):
        write_files(folder, {"a": writer(folder)})
    assert contents(tmp_path / "real") == {"a": str(tmp_path / "link").encode(), "sub/a": b"sub"}


FULL = OSError(errno.ENOSPC, "No space left on device")
WRITERS = {"save_adapter": save_adapter, "export_lora": export_lora, "export_merged": export_merged}


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize(
    "error",
    [FULL, PermissionError(errno.EACCES, "Permission denied"), SafetensorError("I/O")],
)
def test_a_writer_that_fails_half_way_leaves_no_trace(tmp_path: Path, error: Exception, exists: bool) -> None:
    folder = tmp_path / "folder"
    if exists:
        write_files(folder, {"a": writer("old"), "b": writer("old")})
    before = entries(tmp_path), contents(tmp_path)

    def fails(path: Path) -> None:
        path.write_text("half")
        raise error

    with pytest.raises(AdapterFileError, match="Free space there or choose another folder") as caught:
        write_files(folder, {"a": writer("new"), "b": fails})
    assert str(folder) in str(caught.value)
    assert (entries(tmp_path), contents(tmp_path)) == before


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt()])
def test_an_interrupted_writer_leaves_no_trace_and_the_interrupt_passes(tmp_path: Path, error: BaseException) -> None:
    write_files(tmp_path / "folder", {"a": writer("old")})
    before = entries(tmp_path), contents(tmp_path)
    with pytest.raises(type(error)), staged(tmp_path / "folder") as staging:
        (staging / "a").write_text("half")
        raise error
    assert (entries(tmp_path), contents(tmp_path)) == before


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize(
    ("name", "call"),
    [("save_adapter", 1), ("save_adapter", 2), ("export_lora", 1), ("export_lora", 2), ("export_merged", 1)],
)
def test_a_disk_that_fails_to_sync_leaves_folder_and_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, exists: bool, call: int
) -> None:
    model = adapted(pair())
    if exists:
        WRITERS[name](model, tmp_path / "folder")
    before, state = (entries(tmp_path), contents(tmp_path)), snapshot(model)
    calls: list[int] = []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) >= call:
            raise FULL

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AdapterFileError, match="No space left on device"):
        WRITERS[name](model, tmp_path / "folder")
    assert (entries(tmp_path), contents(tmp_path)) == before
    assert_unchanged(model, state)


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("in the way")
    model = adapted(pair())
    state = snapshot(model)
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere/adapter")):
        with pytest.raises(AdapterFileError) as caught:
            WRITERS[name](model, folder)
        assert str(folder) in str(caught.value)
    assert contents(tmp_path) == {"file": b"in the way"}
    assert_unchanged(model, state)


@pytest.mark.parametrize("name", WRITERS)
def test_a_write_that_the_system_stops_half_way_leaves_the_old_files(tmp_path: Path, name: str) -> None:
    """No file may grow beyond 4 kB here: the system call itself fails, as on a full disk."""
    write_files(tmp_path / "old", {"adapter_config.json": writer("old"), "notes": writer("old")})
    before, model = contents(tmp_path), adapted(pair(width=600))
    state, (soft, hard) = snapshot(model), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        for folder in ("old", "new"):
            with pytest.raises(AdapterFileError, match="File too large"):
                WRITERS[name](model, tmp_path / folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == before
    assert entries(tmp_path) == ["old", "old/adapter_config.json", "old/notes"]
    assert_unchanged(model, state)


def test_a_failure_between_two_renames_is_noticed_by_the_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(adapted(pair(), [1]), tmp_path)
    replace = Path.replace

    def once(self: Path, to: Path) -> Path:
        monkeypatch.setattr(Path, "replace", lambda self, to: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", once)
    with pytest.raises(AdapterFileError, match="I/O error"):
        save_adapter(adapted(pair(), [2]), tmp_path)
    with pytest.raises(AdapterFileError, match="do not belong together"):
        load_adapter(pair(), tmp_path)


KILLED = """
import json, os, random, signal, sys, time
import torch
from tiny import adapted, pair
from adalora import save_adapter
from adalora.errors import AdapterFileError
from adalora.reading import read_adapter

torch.set_num_threads(1)
folder, kills = sys.argv[1], int(sys.argv[2])
models = [adapted(pair(), [rank]) for rank in (1, 2)]
chance, outcome = random.Random(3), {"1": 0, "2": 0, "torn": 0}
save_adapter(models[0], folder)
for _ in range(kills):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        while True:
            for model in models:
                save_adapter(model, folder)
                os.write(writer, b".")
    for _ in range(chance.randint(1, 4)):  # so that every kill meets a child at work, however busy the machine
        os.read(reader, 1)
    time.sleep(0.02 * chance.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader), os.close(writer)
    try:
        ranks = {factors[1].shape[0] for factors in read_adapter(folder).factors.values()}
    except AdapterFileError as error:
        assert "do not belong together" in str(error), error
        outcome["torn"] += 1
    else:
        (rank,) = ranks
        outcome[str(rank)] += 1
save_adapter(models[0], folder)
read_adapter(folder)
print(json.dumps(outcome))
"""


@pytest.mark.slow
def test_a_process_killed_while_saving_leaves_a_whole_adapter_or_one_known_to_be_torn(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "folder"), "30"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    outcome = json.loads(run.stdout)
    assert sum(outcome.values()) == 30
    assert outcome["1"] > 0
    assert outcome["2"] > 0
