"""Settings of the whole suite."""

import os

import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before triton is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Many small tests: threads that wait for each other cost more than they bring, and one thread sums in one order.
torch.set_num_threads(1)
