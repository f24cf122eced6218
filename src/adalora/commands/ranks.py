"""Final ranks to plan for: as they are written, and a recipe at one of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..recipe import Recipe


def read_ranks(given: list[str] | None) -> list[int]:
    """Positive integers, separated by commas or given one by one. Raises ConfigError."""
    parts = [part for text in given or [] for part in _parts(text) or [text]]
    bad = [part for part in parts if not part.isdecimal() or int(part) < 1]
    if bad:
        raise ConfigError(f"--target-r holds {bad[0]!r}; give ranks of at least 1, such as --target-r 1,2,4,8.")
    return list(dict.fromkeys(map(int, parts)))


def _parts(text: str) -> list[str]:
    return text.replace(",", " ").split()


def require_no_blanks(words: list[str], ranks: list[str] | None) -> None:
    """Raise ConfigError for arguments beside the first of `words`: most likely, there is a blank in a list of ranks."""
    if len(words) > 1:
        numbers = [part for word in words for part in _parts(word) if part.isdecimal()]
        wanted = ",".join([*(part for text in ranks or [] for part in _parts(text)), *numbers])
        raise ConfigError(
            f"plan takes one RECIPE or MODEL, and there are {' and '.join(map(repr, words))}; several ranks are "
            f"written with commas: --target-r {wanted}"
        )


def with_rank(recipe: Recipe, rank: int) -> Recipe:
    """The recipe at another final rank; the first rank keeps its ratio to it, 12 to 8 by default."""
    method = dict(recipe.method)
    name = method.get("name")
    if name in ("full", "bitfit", "houlsby", "pfeiffer", "static-lora"):
        raise ConfigError(f"--target-r is a rank, and method {name} has none to choose; leave it out.")
    if name in ("lora", "lora-regu", "svd-lora"):
        return recipe.model_copy(update={"method": method | {"r": rank, "parameters": None}})
    start, end = method.get("init_r", 12), method.get("target_r", 8)
    first = math.ceil(rank * start / end) if end else rank
    return recipe.model_copy(update={"method": method | {"init_r": first, "target_r": rank}})
