"""What pytest finds in every test file."""

import gc
import os
import signal

import pytest
import torch

# The tensors are small: threads would only wait for each other, here and in all that is started from here.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # modules stay: no later collection looks through them


@pytest.fixture
def in_time():
    """Ends a test that waits for ever."""
    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
