"""Every reader of files, fed with damaged and hostile ones: only AdaLoraError may come out, soon, in little memory.

    python -m benchmarks.fuzz --inputs 10000

Inputs are valid files with bytes or values changed; some are hostile by construction (deep nesting, aliases that
multiply, huge numbers, lengths that lie). The number of an input is its seed, so that one that fails can be made
again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import adalora
from adalora.config import AdaLoraConfig
from adalora.errors import AdaLoraError
from benchmarks import records

SECONDS = 10.0  # for one input, on a busy machine
MEGABYTES = 256  # by which the memory of the process may grow over all inputs
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

TOKENS = (
    *("null", "true", "-1", "0", "1e999", "-1e999", "nan", ".nan", ".inf", "1" * 5000, "0x" + "f" * 300, "1_0", "0o8"),
    *("[]", "{}", "[[", "{{", '"', "'", "\\", "\\u0000", "\\ud800", "\x00", "\ufeff", "\u2028", "é", "💥"),
    *("&a ", "*a", "<<: *a", "!!python/object/apply:os.system [x]", "!!int x", "!!float x", "!!binary x", "!!set {a}"),
    *("!!timestamp x", "2020-99-99", "2020-01-01T25:61:61Z", "!!omap [a]", "!x y", "? ", "- ", ": ", "#", "|", ">"),
    *("---\n", "...\n", "\t", "\r", "\n\n", "../../etc/passwd", "/dev/zero", "~/x", "package:x", "$r", "${r}", "="),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 10**400, 0.0, 0.5, -0.5, 1.5, 1e-320, 1e308, float("inf")),
    *(float("nan"), "", "x", "4", "1e-3", "../x", "/", "\x00", "(", ".*", "a" * 10_000, "\ud800", [], [1], [None]),
    *([[]], [True] * 4, {}, {"x": 1}, {"x": {}}, {"": None}, {"lora_E": [True]}, ["lora_A", 3], "orthogonal"),
)


@dataclass(frozen=True)
class Reader:
    """`files` are valid ones by name; `read` is given the folder that holds them, and which of them is damaged."""

    files: dict[str, bytes]
    damaged: tuple[str, ...]
    read: Callable[[Path, str], Any]
    share: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Feed, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--only", help="one reader")
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each reader")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "fuzz.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        readers = make_readers(Path(folder) / "made")
        whole = sum(reader.share for reader in readers.values())
        for name, reader in readers.items():
            if options.only in (None, name):
                count = round(options.inputs * (1.0 if options.only else reader.share / whole))
                record, errors = feed(reader, count, Path(folder) / "fed", options.first)
                failed += len(errors)
                print(f"{name}: {record}", *_kinds(errors), sep="\n  ", flush=True)
                records.store(options.out, name, record | {"environment": records.environment()})
    if failed:
        sys.exit(f"{failed} inputs gave what they must not")


def feed(reader: Reader, count: int, folder: Path, first: int = 0) -> tuple[records.Record, list[tuple[int, str]]]:
    """Read `count` damaged inputs in `folder`; the record, and (number, what it was) of what should not have come."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in reader.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for name in reader.damaged:  # which are fine yet; and what is imported at first use is no growth
        reader.read(folder, name)
    accepted, slowest, errors = 0, 0.0, []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(first, first + count):
        chance = random.Random(number)
        name = chance.choice(reader.damaged)
        (folder / name).write_bytes(damage(reader.files[name], name, chance))
        begun = time.monotonic()
        try:
            with limited():
                reader.read(folder, name)
            accepted += 1
        except AdaLoraError as error:
            if not str(error):
                errors.append((number, "an error without a message"))
        except Exception as error:
            errors.append((number, _told(error)))
        slowest = max(slowest, time.monotonic() - begun)
        (folder / name).write_bytes(reader.files[name])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    if grown > MEGABYTES:
        errors.append((first, f"memory grew by {grown} MB"))
    record = {"inputs": count, "accepted": accepted, "failed": len(errors), "slowest_s": round(slowest, 2)}
    return record | {"grown_MB": grown}, errors


def _told(error: BaseException) -> str:
    """What came, and the last line of ours that it came through."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "adalora" in frame.filename]
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "outside"
    return f"{type(error).__name__} in {where}: {str(error)[:160]!r}"


def _kinds(errors: list[tuple[int, str]]) -> list[str]:
    """One line for each kind of error, with the first input that gave it."""
    kinds: dict[str, list[tuple[int, str]]] = {}
    for number, text in errors:
        kinds.setdefault(text.partition(": ")[0], []).append((number, text))
    return [f"{len(found)} like input {found[0][0]}: {found[0][1]}" for found in kinds.values()]


@contextmanager
def limited() -> Iterator[None]:
    """At most `SECONDS`; no more memory than two gigabytes beyond what is mapped."""

    def late(*_: Any) -> None:
        raise TimeoutError

    before, limits = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + 2**31, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


# --- Damage -----------------------------------------------------------------------------------------------------


def damage(content: bytes, name: str, chance: random.Random) -> bytes:
    """A changed copy: bytes, tokens, values, or something hostile in its place."""
    kind = chance.random()
    if kind < 0.04:
        return hostile(name, chance)
    if kind < 0.4 and name.endswith((".json", ".jsonl")):
        return _changed_lines(content, chance)
    if kind < 0.4 and name.endswith((".yaml", ".yml")):
        return _changed_yaml(content, chance)
    if kind < 0.4 and name.endswith(".safetensors"):
        return _changed_header(content, chance)
    data = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8])):
        place, length = chance.randrange(len(data) + 1), chance.choice([1, 2, 5, 20, 200])
        match chance.randrange(6):
            case 0 if place < len(data):
                data[place] ^= 1 << chance.randrange(8)
            case 1:
                del data[place : place + length]
            case 2:
                data[place:place] = chance.randbytes(length)
            case 3 if data:
                data[place:place] = data[chance.randrange(len(data)) :][:length]
            case 4:
                data[place : place + length] = chance.choice(TOKENS).encode()
            case 5:
                data[place:place] = chance.choice(TOKENS).encode()
    return bytes(data)


def hostile(name: str, chance: random.Random) -> bytes:
    """What a reader without limits would hang or burst on."""
    if name.endswith((".yaml", ".yml")):
        laughs = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9) if i else 'x'}]\n" for i in range(12))
        merges = "m0: &m0 {k: 1}\n"
        for i in range(1, 9):
            merges += f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}\n"
        deep = "a: " + "[" * 5000
        looped = "a: &a [*a]\nmodel: *a\ntasks: *a\nseeds: *a\n"
        return chance.choice([laughs, merges, deep, looped, "{" * 3000, "? " * 3000, "- " * 3000]).encode()
    if name.endswith(".safetensors"):
        lies = [2**63, 2**40, 100_000_001, 8, 0]
        header = json.dumps({"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}).encode()
        return struct.pack("<Q", chance.choice([*lies, len(header)])) + header + b"0000"
    texts = ["[" * 100_000, '{"a":' * 100_000, "1" * 100_000, '"' + "a" * 1_000_000, "", "\x00" * 1000, "[1e999999999]"]
    return chance.choice(texts).encode()


def _changed_lines(content: bytes, chance: random.Random) -> bytes:
    """JSON, or one line of JSONL, with values exchanged."""
    try:
        whole = json.loads(content)
    except ValueError:
        lines = content.decode().splitlines()
        place = chance.randrange(len(lines))
        lines[place] = json.dumps(_exchange(json.loads(lines[place]), chance))
        return ("\n".join(lines) + "\n").encode()
    return json.dumps(_exchange(whole, chance)).encode()


def _changed_yaml(content: bytes, chance: random.Random) -> bytes:
    import yaml

    return json.dumps(_exchange(yaml.safe_load(content), chance), default=str).encode()


def _changed_header(content: bytes, chance: random.Random) -> bytes:
    length = struct.unpack("<Q", content[:8])[0]
    header = json.dumps(_exchange(json.loads(content[8 : 8 + length]), chance)).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def _exchange(value: Any, chance: random.Random) -> Any:
    """Another value in the place of one somewhere inside, a key more or a key less."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        if chance.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if chance.random() < 0.1:
            another = chance.choice(["x", "", "adalora", f"{key}.lora_A", "__metadata__"])
            return {**value, another: chance.choice(VALUES)}
        return {**value, key: _exchange(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.7:
        place = chance.randrange(len(value))
        return [*value[:place], _exchange(value[place], chance), *value[place + 1 :]]
    return chance.choice(VALUES)


# --- Readers ----------------------------------------------------------------------------------------------------


def make_readers(folder: Path) -> dict[str, Reader]:
    """All of them, with the files that they read whole."""
    from benchmarks.fuzzed import run_readers, text_readers

    folder.mkdir(parents=True, exist_ok=True)
    return adapter_readers(folder) | text_readers() | run_readers(folder)


def adapter_readers(folder: Path) -> dict[str, Reader]:
    """An adapter of ours, and one as PEFT writes it, without our digests; and a configuration alone."""
    model = trained()
    adalora.save_adapter(model, folder / "ours", warn=False)
    ours = {name: (folder / "ours" / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    save_file(load_file(folder / "ours" / WEIGHTS), folder / "ours" / WEIGHTS, {"format": "pt"})
    foreign = ours | {WEIGHTS: (folder / "ours" / WEIGHTS).read_bytes()}
    config = json.dumps(AdaLoraConfig(max_rank={"a": 3}, target_parameters=0.1, budget="params").to_dict()).encode()
    return {
        "adapter of ours": Reader(ours, (CONFIG, WEIGHTS), load, 3),
        "adapter of PEFT": Reader(foreign, (CONFIG, WEIGHTS), load, 3),
        "configuration": Reader({"config.json": config}, ("config.json",), _configuration, 1),
    }


def small() -> nn.Module:
    """The model of the adapters."""
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def trained() -> nn.Module:
    """One that looks as if training were over, with ranks 3 and 1."""
    torch.manual_seed(0)
    model = adalora.inject(small(), AdaLoraConfig(target_modules=["0", "2"], init_r=4, target_r=2, bias="lora_only"))
    for index, rank in ((0, 3), (2, 1)):
        module: Any = model[index]
        with torch.no_grad():
            module.lora_E.normal_()
            module.lora_E[rank:] = 0.0
        module.lora_keep[rank:] = False
    return model


def load(folder: Path, _: str) -> None:
    """Read an adapter into a model, which an error leaves alone, and which afterwards computes numbers."""
    torch.manual_seed(1)
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        adalora.load_adapter(model, folder)
    except AdaLoraError:
        after = model.state_dict()
        if after.keys() != before.keys() or any(not torch.equal(after[name], before[name]) for name in before):
            raise RuntimeError("an adapter that was refused has changed the model") from None
        raise
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise RuntimeError("numbers that are not finite were read")
    if not sum(p.numel() for p in model.parameters()) < 10_000:
        raise RuntimeError("the adapter is larger than its file")


def _configuration(folder: Path, _: str) -> None:
    """As a reader of JSON would: what is no object is none of AdaLoraConfig's business."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return
    if isinstance(values, dict):
        config = AdaLoraConfig.from_dict(values)
        if json.loads(json.dumps(config.to_dict())) != json.loads(
            json.dumps(AdaLoraConfig.from_dict(config.to_dict()).to_dict())
        ):
            raise RuntimeError("a configuration that does not come back")


if __name__ == "__main__":
    main()
