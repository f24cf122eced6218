"""Calls into libraries that log a mistake in their own way before they raise it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silenced(*loggers: str) -> Iterator[None]:
    """Let these libraries log nothing meanwhile: what they raise is told once, by us."""
    before = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def one_line(error: BaseException) -> str:
    """The message of an error as one line that ends with a full stop."""
    return " ".join(str(error).split()).rstrip(".") + "."
