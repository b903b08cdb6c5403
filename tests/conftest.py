"""Settings of the whole suite."""

import pytest
import torch

# The tensors of the tests are small: more threads only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
