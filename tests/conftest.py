"""What every test shares: one thread, one seed."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread_and_seed() -> None:
    """Two cores and other people's jobs: more threads only add noise."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
