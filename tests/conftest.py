"""What every test shares: one thread, one seed, imports that no garbage collection looks through, long files first."""

import gc

gc.disable()  # while everything is imported, which takes a quarter less time so

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

# The longest first, so that no process is left alone with one in the end; the others as they come.
LONG = (
    *("kill", "kills", "study_runs", "task_runs", "processes", "demo", "readme", "cli", "resume", "transformers"),
    *("train", "methods", "allocator", "commands"),
)


def pytest_sessionstart(session: pytest.Session) -> None:
    if getattr(session.config.option, "numprocesses", None):  # it hands out tests and imports none
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


def pytest_collection_finish() -> None:
    """A Trainer collects garbage several times, and would look through all that every test file imported."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def one_thread_and_seed() -> None:
    """Two cores and other people's jobs: more threads only add noise."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that are no more than files: drawing takes half of a small run. For tests that look at none."""
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda self, path, **_: Path(path).write_bytes(b"\x89PNG\r\n")
    )
