"""A recipe for what has none: a bare model, an adapter alone."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..recipe import Recipe, load_recipe


def recipe_of(values: Mapping[str, Any], settings: Sequence[str]) -> Recipe:
    """The recipe of these sections, with `settings` on top. Raises ConfigError."""
    with tempfile.TemporaryDirectory() as folder:  # settings go on top of a file
        file = Path(folder, "defaults.yaml")
        file.write_text(yaml.safe_dump(dict(values)), encoding="utf-8")
        return load_recipe(str(file), settings)
