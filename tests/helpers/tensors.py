"""Tensors that are drawn, and positions in them."""

import torch


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def positions(chosen):
    return [flat.nonzero().squeeze(1).tolist() for flat in chosen]


VALUES = torch.tensor([0.0, 0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5, -7.25, 1e-38, 1e30])
