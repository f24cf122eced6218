"""The offline demo's data and baselines, on the packages that are really installed."""

import hashlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from adalora.errors import AdaLoraWarning, AdapterFileError, DataError
from adalora.tasks import docstrings, encoder
from adalora.tasks.baselines import bag_of_words, embed, linear_probe
from adalora.tasks.docstrings import CAPS, LABELS, DocstringData, Example
from adalora.tasks.numpydoc import type_label

harvested = pytest.mark.slow  # parsing every source of three packages takes seconds


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(cache: Path) -> DocstringData:
    return docstrings.load(cache)


@pytest.fixture
def one_example(monkeypatch: pytest.MonkeyPatch) -> list[Example]:
    """Harvesting takes seconds; tests of the cache's file handling need only something to cache."""
    examples = [Example("The number of things.", "int", "numpy/a.py")]
    monkeypatch.setattr(docstrings, "harvest", lambda: examples)
    return examples


@harvested
def test_the_splits_have_the_advertised_size(data: DocstringData) -> None:
    assert 2700 <= len(data.train) <= 3300
    assert 900 <= len(data.test) <= 1100


@harvested
def test_every_class_is_in_both_splits_and_none_is_above_its_cap(data: DocstringData) -> None:
    assert data.labels == LABELS
    for name, examples in (("train", data.train), ("test", data.test)):
        counts = Counter(example.label for example in examples)
        assert set(counts) == set(LABELS)
        assert max(counts.values()) == CAPS[name]
        assert min(counts.values()) >= 40


@harvested
def test_no_text_appears_twice(data: DocstringData) -> None:
    texts = [example.text.lower() for example in (*data.train, *data.test)]
    assert len(set(texts)) == len(texts)


@harvested
def test_no_source_file_is_in_both_splits(data: DocstringData) -> None:
    train, test = ({example.source for example in examples} for examples in (data.train, data.test))
    assert len(train & test) == 0
    assert {source.split("/")[0] for source in train} == {"numpy", "scipy", "sklearn"}


@harvested
def test_texts_are_short_and_free_of_markup(data: DocstringData) -> None:
    for example in (*data.train, *data.test):
        assert 2 <= len(example.text.split()) <= 32
        assert example.text == " ".join(example.text.split())
        assert "`" not in example.text


@pytest.mark.parametrize(
    ("type_text", "label"),
    [
        ("int", "int"),
        ("int, optional", "int"),
        ("int, default=100", "int"),
        ("int (default: 3)", "int"),
        ("non-negative int", "int"),
        ("{0, 1, 2}", "int"),
        ("float or None", "float"),
        ("float | None", "float"),
        ("None or float, optional", "float"),
        ("float in range [0, 1)", "float"),
        ("``float``, default=1e-3", "float"),
        ("bool, default=False", "bool"),
        ("{True, False}, optional", "bool"),
        ("str", "str"),
        ("{'a', 'b'}", "str"),
        ("{'a', 'b', None}, default='a'", "str"),
        ('str {"a", "b"}', "str"),
        ("array_like", "array"),
        ("ndarray of shape (n_samples, n_features)", "array"),
        ("ndarray, shape (n,) or (n, k)", "array"),
        ("(M, N) array_like", "array"),
        ("2-D array", "array"),
        ("array-like of floats", "array"),
        ("callable", "callable"),
        ("callable ``f(x, *args)``, optional", "callable"),
        ("dict", "dict"),
        ("dict of str -> object", "dict"),
        ("int or float", None),
        ("int | str", None),
        ("str or callable, default='auto'", None),
        ("{'auto'} or callable", None),
        ("{array-like, sparse matrix} of shape (n_samples, n_features)", None),
        ("array-like of shape (n,) or str", None),
        ("int, RandomState instance or None", None),
        ("tuple of ints", None),
        ("object", None),
        ("optional", None),
        ("", None),
    ],
)
def test_a_type_maps_to_a_class_only_when_it_names_one(type_text: str, label: str | None) -> None:
    assert type_label(type_text) == label


def test_texts_that_disagree_on_their_type_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "somepackage"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('the harvest must not import this')\n")
    entries = "n : int\n    The size.\nm : {}\n    The extent of it.\nf : callable\n    Called as :func:`~a.b`.\n"
    for name, kind in (("one", "int"), ("two", "float")):
        (package / f"{name}.py").write_text(f'"""{name}\n\nParameters\n----------\n{entries.format(kind)}"""\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert docstrings.harvest(["somepackage"]) == [
        Example("The size.", "int", "somepackage/one.py"),
        Example("Called as a.b.", "callable", "somepackage/one.py"),
    ]


@harvested
def test_the_split_does_not_depend_on_the_order_of_the_examples(data: DocstringData) -> None:
    examples = [*data.train, *data.test]
    expected = {"train": data.train, "test": data.test}
    assert docstrings.split(examples) == expected
    assert docstrings.split(reversed(examples)) == expected


@harvested
def test_the_cache_gives_back_the_harvest(data: DocstringData, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "harvest", lambda: pytest.fail("the cache was not used"))
    assert docstrings.load(cache) == data
    [path] = cache.iterdir()
    assert path.name == "docstrings-v2-" + "-".join(f"{k}{v}" for k, v in data.versions.items()) + ".jsonl"


def test_the_cache_lies_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_example: list[Example]
) -> None:
    monkeypatch.setenv("ADALORA_CACHE", str(tmp_path / "there"))
    assert docstrings.load().train + docstrings.load().test == one_example
    assert len(list((tmp_path / "there").iterdir())) == 1


@pytest.mark.parametrize("damage", ["truncated", "edited", "empty", "binary", "no header"])
def test_a_damaged_cache_is_rebuilt_and_says_so(damage: str, tmp_path: Path, one_example: list[Example]) -> None:
    good = docstrings.load(tmp_path)
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    bad = {
        "truncated": whole[:-10],
        "edited": whole.replace(b"number", b"amount"),
        "empty": b"",
        "binary": b"\xff\xfe\x00",
        "no header": whole.split(b"\n", 1)[1],
    }[damage]
    path.write_bytes(bad)
    with pytest.warns(AdaLoraWarning, match=r"docstrings-v2.*damaged.*rebuilding"):
        assert docstrings.load(tmp_path) == good
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_a_warning_only(tmp_path: Path, one_example: list[Example]) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(AdaLoraWarning, match=r"(?s)could not cache.*ADALORA_CACHE"):
        data = docstrings.load(tmp_path / "file" / "folder")
    assert data.train + data.test == one_example


def test_a_failed_write_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_example: list[Example]
) -> None:
    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    data = docstrings.load(tmp_path / "cache")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(AdapterFileError, match=r"No space left on device.*another folder"):
        docstrings.write_jsonl(tmp_path / "out", data)
    assert not (tmp_path / "out").exists() and data.train + data.test == one_example


def test_the_written_files_hold_text_and_label_of_every_example(tmp_path: Path, one_example: list[Example]) -> None:
    data = docstrings.load(tmp_path / "cache")
    paths = docstrings.write_jsonl(tmp_path / "new" / "folder", data)
    for path, examples in zip(paths, (data.train, data.test), strict=True):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert rows == [{"text": example.text, "label": example.label} for example in examples]
    assert data.train + data.test == one_example


def test_a_missing_package_is_named_with_the_remedy() -> None:
    with pytest.raises(DataError, match=r"nosuchpackage is not installed.*pip install \"adalora\[demo\]\""):
        docstrings.harvest(["nosuchpackage"])


def test_a_missing_distribution_is_named_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(docstrings.DISTRIBUTIONS, "sklearn", "scikit-none")
    with pytest.raises(DataError, match=r"scikit-none is not installed.*pip install \"adalora\[demo\]\""):
        docstrings.load(tmp_path)


def test_a_source_that_cannot_be_parsed_is_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "oldpackage"
    package.mkdir()
    (package / "__init__.py").write_text('"""\nParameters\n----------\nn : int\n    The size.\n"""\n')
    (package / "old.py").write_text('"""\nParameters\n----------\n"""\nprint "hello"\n')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(AdaLoraWarning, match=r"old\.py: left out"):
        assert [example.text for example in docstrings.harvest(["oldpackage"])] == ["The size."]


def test_a_missing_encoder_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "ENCODER_PACKAGE", "no-such-encoder")
    with pytest.raises(DataError, match=r"no-such-encoder is not installed; pip install \"adalora\[demo\]\""):
        encoder.packaged_encoder()


def test_the_packaged_encoder_has_the_published_digest() -> None:
    folder = encoder.packaged_encoder()
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def test_a_tampered_encoder_is_refused_with_both_digests(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    shutil.copy(encoder.packaged_encoder() / path.name, path)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(DataError, match=rf"{digest}.*{encoder.ENCODER_SHA256}.*pip install"):
        encoder.verify_encoder(tmp_path)


def test_an_encoder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model\.safetensors: cannot read"):
        encoder.verify_encoder(tmp_path)


def test_another_version_of_the_encoder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "ENCODER_VERSION", "0.0.9")
    with pytest.raises(DataError, match=r"0\.1\.0 is installed, the demo trusts 0\.0\.9 only.*pip install"):
        encoder.packaged_encoder()


@harvested
def test_the_bag_of_words_learns_far_more_than_the_majority(data: DocstringData) -> None:
    result = bag_of_words(data.train[:600], data.test[:300])
    assert 0.5 < result.accuracy < 0.95
    assert 0.3 < result.macro_f1 < 0.95
    assert result.seconds > 0.0


@harvested
def test_the_baselines_choose_c_without_the_test_labels(data: DocstringData) -> None:
    train, test = data.train[:200], data.test[:100]
    relabelled = [Example(e.text, LABELS[i % 7], e.source) for i, e in enumerate(test)]
    assert bag_of_words(train, test).c == bag_of_words(train, relabelled).c


@harvested
def test_the_linear_probe_pools_over_real_tokens_only(data: DocstringData) -> None:
    folder = encoder.packaged_encoder()
    short, long = "Number of jobs.", data.train[0].text
    alone, together = embed(folder, [short]), embed(folder, [long, short])
    assert together.shape == (2, 384)
    np.testing.assert_allclose(together[1], alone[0], atol=1e-5)


@harvested
def test_the_linear_probe_learns_far_more_than_the_majority(data: DocstringData) -> None:
    result = linear_probe(encoder.packaged_encoder(), data.train[:200], data.test[:100])
    assert 0.45 < result.accuracy < 0.95
    assert 0.35 < result.macro_f1 < 0.95
