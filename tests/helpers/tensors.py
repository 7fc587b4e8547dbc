"""Tensors that are drawn, positions in them, and counts of masks and weights."""

import torch


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def positions(chosen):
    return [flat.nonzero().squeeze(1).tolist() for flat in chosen]


VALUES = torch.tensor([0.0, 0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5, -7.25, 1e-38, 1e30])


def active(masks):
    return sum(int(mask.sum()) for mask in masks.values())


def prune_by_sorting(state, names, budget):
    """The state with the budget's largest weights over all the named entries, by one plain sort."""
    flat = torch.cat([state[name].flatten() for name in names])
    kept = torch.zeros_like(flat)
    best = flat.abs().argsort(descending=True)[:budget]
    kept[best] = flat[best]
    parts = kept.split([state[name].numel() for name in names])
    return state | {name: part.view_as(state[name]) for name, part in zip(names, parts, strict=True)}
