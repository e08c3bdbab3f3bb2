"""One thread: the tensors are tiny, and threads that wait for a busy core cost more than they give."""

import torch

torch.set_num_threads(1)
