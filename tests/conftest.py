"""Settings of the whole suite."""

import torch

# Many small tests: threads that wait for each other cost more than they bring, and one thread sums in one order.
torch.set_num_threads(1)
