"""The offline demo's data: tell a parameter's type from its description.

The texts are harvested at run time from the numpydoc docstrings of the installed numpy, scipy and
scikit-learn, so nothing of theirs is shipped and no network is needed. The sources are parsed, never
imported. Train and test share no source file: the parameters of one file are often described in the same
words, and a random split would reward memory.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import AdaLoraWarning, DataError
from ..files import write_files
from .numpydoc import described_parameters

LABELS = ("int", "float", "bool", "str", "array", "callable", "dict")
DISTRIBUTIONS = {"numpy": "numpy", "scipy": "scipy", "sklearn": "scikit-learn"}
CAPS = {"train": 515, "test": 178}  # examples per class
# Part of the cache's name: raise it whenever the same sources would give other examples.
FORMAT_VERSION = 2

_INSTALL = 'pip install "adalora[demo]"'


@dataclass(frozen=True)
class Example:
    """One description with its class and the package-relative path it was read from."""

    text: str
    label: str
    source: str


@dataclass(frozen=True)
class DocstringData:
    """The two splits (no source file in both), the class names, and the versions they were harvested from."""

    train: list[Example]
    test: list[Example]
    labels: tuple[str, ...]
    versions: dict[str, str]


def load(cache_dir: str | Path | None = None) -> DocstringData:
    """Both splits, from the cache if it is whole, else harvested and cached.

    The cache lies in `cache_dir`, or `$ADALORA_CACHE`, or `~/.cache/adalora`; its name holds the versions of
    the three packages and of the harvester. A damaged cache is rebuilt under an `AdaLoraWarning`.

    Raises:
        DataError: one of the three packages is not installed.
    """
    versions = {package: _version(package) for package in DISTRIBUTIONS}
    path = _cache_path(cache_dir, versions)
    if path.exists():
        try:
            splits = _read_cache(path, versions)
            return DocstringData(splits["train"], splits["test"], LABELS, versions)
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{path}: the cached demo data is damaged ({error}); rebuilding it", AdaLoraWarning, 2)
    splits = split(harvest())
    try:
        write_files(path.parent, {path.name: _line_writer(_cache_lines(splits, versions))})
    except OSError as error:
        remedy = "set ADALORA_CACHE to a folder that can be written"
        warnings.warn(f"could not cache the demo data: {error}; or {remedy}", AdaLoraWarning, 2)
    return DocstringData(splits["train"], splits["test"], LABELS, versions)


def write_jsonl(folder: str | Path, data: DocstringData | None = None) -> tuple[Path, Path]:
    """Write `train.jsonl` and `test.jsonl` (columns `text`, `label`) into `folder`; returns the two paths.

    Raises:
        AdapterFileError: the folder cannot be written.
        DataError: without `data`, if a package is not installed.
    """
    data = load() if data is None else data
    splits = {"train.jsonl": data.train, "test.jsonl": data.test}
    lines = {name: [json.dumps({"text": e.text, "label": e.label}) for e in splits[name]] for name in splits}
    write_files(folder, {name: _line_writer(lines[name]) for name in lines})
    return Path(folder) / "train.jsonl", Path(folder) / "test.jsonl"


def harvest(packages: Sequence[str] = tuple(DISTRIBUTIONS)) -> list[Example]:
    """Every parameter with a description and one clear type in the packages' docstrings, by source path.

    Texts that differ only in case or punctuation count as duplicates: the first is kept. If they disagree on
    the type, none is kept.

    Raises:
        DataError: a package is not installed.
    """
    first: dict[str, Example] = {}
    labels: dict[str, set[str]] = {}
    for package in packages:
        root = _package_root(package)
        for path in sorted(root.rglob("*.py")):
            source = path.relative_to(root.parent).as_posix()
            if "tests" in path.parts:
                continue
            for text, label in described_parameters(path):
                key = " ".join(re.findall(r"\w+", text.lower()))
                first.setdefault(key, Example(text, label, source))
                labels.setdefault(key, set()).add(label)
    return [example for key, example in first.items() if len(labels[key]) == 1]


def split(examples: Iterable[Example]) -> dict[str, list[Example]]:
    """Divide by source file, about 3 : 1, and cap each class; the order of the examples does not matter."""
    splits: dict[str, list[Example]] = {"train": [], "test": []}
    taken: Counter[tuple[str, str]] = Counter()
    # By hash of the text, so that a cap does not favour the packages and files that come first.
    for example in sorted(examples, key=lambda example: _digest(example.text)):
        name = "test" if int(_digest(example.source)[:8], 16) % 4 == 0 else "train"
        if taken[name, example.label] < CAPS[name]:
            taken[name, example.label] += 1
            splits[name].append(example)
    return splits


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(DISTRIBUTIONS.get(package, package))
    except importlib.metadata.PackageNotFoundError as error:
        raise _missing(package) from error


def _package_root(package: str) -> Path:
    spec = importlib.util.find_spec(package)  # finds a top-level package without running it
    if spec is None or spec.origin is None:
        raise _missing(package)
    return Path(spec.origin).parent


def _missing(package: str) -> DataError:
    return DataError(f"{DISTRIBUTIONS.get(package, package)} is not installed; the demo reads its sources; {_INSTALL}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _cache_path(cache_dir: str | Path | None, versions: Mapping[str, str]) -> Path:
    folder = cache_dir or os.environ.get("ADALORA_CACHE") or Path.home() / ".cache" / "adalora"
    names = "-".join(f"{package}{version}" for package, version in versions.items())
    return Path(folder).expanduser() / f"docstrings-v{FORMAT_VERSION}-{names}.jsonl"


def _cache_lines(splits: Mapping[str, Sequence[Example]], versions: Mapping[str, str]) -> list[str]:
    """A header line (format, versions, digest of the rest), then one line per example."""
    rows = [json.dumps({"split": name, **asdict(e)}) for name, examples in splits.items() for e in examples]
    header = {"format": FORMAT_VERSION, "versions": dict(versions), "sha256": _digest("\n".join(rows))}
    return [json.dumps(header), *rows]


def _read_cache(path: Path, versions: Mapping[str, str]) -> dict[str, list[Example]]:
    header_line, _, body = path.read_text(encoding="utf-8").rstrip("\n").partition("\n")
    header = json.loads(header_line)
    if header != {"format": FORMAT_VERSION, "versions": dict(versions), "sha256": _digest(body)}:
        raise ValueError("its header does not fit its contents")
    splits: dict[str, list[Example]] = {"train": [], "test": []}
    for line in body.split("\n"):
        row = json.loads(line)
        splits[row.pop("split")].append(Example(**row))
    return splits


def _line_writer(lines: Sequence[str]) -> Callable[[Path], object]:
    return lambda path: path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
