"""Settings of all tests."""

import torch

# The tests are many and small: more threads than that fight over the cores.
torch.set_num_threads(1)
