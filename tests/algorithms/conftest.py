"""Tests of algorithms run on one thread: they are tiny, and the machine is shared."""

import torch

torch.set_num_threads(1)
