"""Damaged copies of valid files: bytes and values changed, or something hostile by construction in their place."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

import yaml

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
