"""What every test shares: one thread, one seed, and imports that no garbage collection looks through."""

import gc

import pytest
import torch


def pytest_collection_finish() -> None:
    """A Trainer collects garbage several times, and would look through all that every test file imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread_and_seed() -> None:
    """Two cores and other people's jobs: more threads only add noise."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
