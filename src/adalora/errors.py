"""Everything that this package raises or warns with.

Each error is also the builtin that a caller would expect, and its message says what is wrong, where,
with which value, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class AdaLoraError(Exception):
    """Base of every error that a user of this package can cause."""


class ConfigError(AdaLoraError, ValueError):
    """A setting that cannot be meant: wrong type, impossible range, contradiction."""


class InjectionError(AdaLoraError, ValueError):
    """A module that cannot be adapted, or none that could."""


class TrainingError(AdaLoraError, RuntimeError):
    """A training loop in which the method could not do its work."""


class AdapterFileError(AdaLoraError, OSError):
    """An adapter folder that cannot be read or written."""


class DataError(AdaLoraError, ValueError):
    """Training data that is missing, or not what the recipe says it is."""


class AdaLoraWarning(UserWarning):
    """Something that works but is probably not what was meant."""


def did_you_mean(key: str, known: Sequence[str]) -> str:
    """The nearest known key as a question, or the list of them."""
    near = difflib.get_close_matches(key, known, n=1)
    some = ", ".join(known[:24]) + (", …" if len(known) > 24 else "")
    return f"did you mean {near[0]!r}?" if near else f"known are: {some}."
