"""What the fields of a configuration are checked for; each raises ConfigError with field, value and remedy."""

from __future__ import annotations

import math
import re

from .errors import ConfigError


def check_pattern(name: str, value: str | tuple[str, ...] | None) -> None:
    """Regular expressions compile."""
    # Entries of a list are plain endings, but for layers_pattern.
    for pattern in (value,) if isinstance(value, str) else value if value and name == "layers_pattern" else ():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"{name} is {value!r}, which is no regular expression ({error}). Mend it, or list plain names."
            ) from error


def check_int(name: str, value: object, *, least: int, most: int | None = None) -> None:
    """An int, and no bool, within the bounds; the upper one is init_r."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} is {value!r} ({type(value).__name__}); it must be an int.")
    if value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"between {least} and init_r ({most})"
        raise ConfigError(f"{name} is {value}; it must be {bounds}.")


def check_real(
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float = math.inf,
) -> None:
    """A number, and no bool, within the bounds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} is {value!r} ({type(value).__name__}); it must be a number.")
    too_low = (least is not None and value < least) or (above is not None and value <= above)
    if too_low or not value < below:
        low = f"at least {least}" if least is not None else f"above {above}"
        raise ConfigError(
            f"{name} is {value}; it must be {low} and " + (f"below {below}." if below < math.inf else "finite.")
        )
