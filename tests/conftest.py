"""What pytest finds in every test file."""

import signal

import pytest
import torch

torch.set_num_threads(1)  # the tensors are small: threads would only wait for each other


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
