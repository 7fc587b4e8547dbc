"""What a network costs: floating-point operations (FLOPs) to use it and to train it, and parameters.

The conventions are those of RigL (Evci et al. 2020, arXiv 1911.11134, appendix H), so that figures can be compared:

- A multiply-add is two FLOPs. What counts is every product of activations with a weight, in convolutions and linear
  layers; biases, BatchNorm, activation functions, pooling, the loss, the optimizer and products of activations with
  each other (attention scores) do not. The index arithmetic of sparse kernels does not count either: these are the
  FLOPs that a sparse network needs, not those that today's dense kernels spend on its zeros.
- One forward pass of one sample costs f_D in the dense network. In a sparse one each layer costs its dense FLOPs times
  its density, together f_S.
- A training step costs three forward passes: one forward, one for the gradients of the activations, one for those of
  the weights. The last one costs f_D instead of f_S in a step that reads the gradients of inactive weights.
- Each pass of BatchNorm re-estimation costs f_S of the superposition per sample. Evaluation, the choice of the first
  masks and the one dense gradient per exploration at the start of a cycle are not charged.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sparselearning.process import distributed
from sparselearning.sparse.distributions import active_count, nonzero_counts


def layer_flops(
    model: nn.Module,
    sample_shape: Sequence[int],
    device: torch.device | str = "meta",
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Count the dense forward FLOPs per sample of every layer, by the name of the layer's weight.

    Args:
        model: plain, data-parallel or compiled; a copy of it is run, in eval mode.
        sample_shape: of one input, e.g. ``(3, 32, 32)`` for an image.
        device: where to run the copy. On ``meta`` nothing is computed; a forward pass that reads values of tensors
            needs a real device.
        dtype: of the input, e.g. ``torch.long`` for a model that reads tokens.

    Returns:
        Name in the user's own model to FLOPs, in the order of the forward pass. A weight that multiplies nothing (an
        embedding, a head that only training uses) is not in it; one that is used twice counts twice.
    """
    inner = distributed.unwrap(model)
    copy = deepcopy(inner).to(device).eval()
    names = {p: name.replace("_orig_mod.", "") for name, p in inner.named_parameters()}
    originals, copies = (module.named_parameters(remove_duplicate=False) for module in (inner, copy))
    owners = {  # moving to a device parts a weight that modules share into copies: all go by its first name
        StorageWeakRef(moved.untyped_storage()): names[p]
        for (_, p), (_, moved) in zip(originals, copies, strict=True)
        if p.dim() >= 2
    }
    with FlopCounterMode(display=False) as counter, _FlopsByWeight(owners, counter.get_total_flops) as by_weight:
        copy(torch.zeros(1, *sample_shape, dtype=dtype, device=device))
    return dict(by_weight.flops)


class _FlopsByWeight(TorchDispatchMode):
    """Credits what every operation adds to a running total to the weight that it multiplies with.

    A weight is recognised by its memory, because operations get views of it (a linear layer's transposed one).
    """

    def __init__(self, owners: Mapping[StorageWeakRef, str], total_flops: Callable[[], int]) -> None:
        super().__init__()
        self.owners = owners
        self.total_flops = total_flops
        self.flops: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.total_flops()
        result = func(*args, **(kwargs or {}))
        if spent := self.total_flops() - before:
            memories = (StorageWeakRef(arg.untyped_storage()) for arg in args if isinstance(arg, Tensor))
            owner = next((self.owners[memory] for memory in memories if memory in self.owners), None)
            if owner is not None:
                self.flops[owner] += spent
        return result


def layer_densities(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of non-zero entries of each weight, or of true entries of each mask, in [0, 1]."""
    counts = nonzero_counts(weights.values())
    return {name: count / weight.numel() for (name, weight), count in zip(weights.items(), counts, strict=True)}


def overall_density(weights: Iterable[Tensor]) -> float:
    """Non-zero over all entries of these weights together, exactly."""
    weights = list(weights)
    return sum(nonzero_counts(weights)) / sum(weight.numel() for weight in weights)


def inference_flops(layers: Mapping[str, float], densities: Mapping[str, float] | None = None) -> float:
    """Forward FLOPs per sample: f_S, or f_D without ``densities``.

    Args:
        layers: dense FLOPs of each layer, from :func:`layer_flops`.
        densities: layer name to density in [0, 1]; a layer without one is dense.
    """
    densities = densities or {}
    return sum(flops * densities.get(name, 1.0) for name, flops in layers.items())


def training_flops(sparse: float, dense: float, sparse_steps: int | None = None) -> float:
    """Training FLOPs per sample: forward and backward pass, the mean over sparse steps and steps with dense gradients.

    ======================================================  ====================  ===================================
    method                                                  ``sparse_steps``      FLOPs per sample
    ======================================================  ====================  ===================================
    dense (``sparse = dense``)                              None                  3 f_D
    static, SET, GMP, any method while its updates are off  None                  3 f_S
    RigL, GraNet (``--growth gradient``)                    ΔT, update frequency  (3 f_S ΔT + 2 f_S + f_D) / (ΔT + 1)
    momentum growth, which ranks every step's gradients     0                     2 f_S + f_D
    ======================================================  ====================  ===================================

    Where the density changes on the way (GraNet, GMP), the cost of a run is the sum of samples times this over the
    stretches in which it stays.

    RigL counts the step that updates the topology on top of ΔT others; here it is the ΔT-th one itself. The published
    formula is kept, so that figures can be compared.

    Args:
        sparse: f_S, from :func:`inference_flops`.
        dense: f_D, from the same.
        sparse_steps: steps that need gradients of active weights only, for each step that needs the gradients of all
            weights; None if no step does.
    """
    if sparse_steps is None:
        return 3 * sparse
    return (3 * sparse * sparse_steps + 2 * sparse + dense) / (sparse_steps + 1)


class CostMeter:
    """Adds up what training costs while the topology, and with it the cost of a sample, changes.

    Args:
        layers: dense forward FLOPs per sample of each layer, from :func:`layer_flops`.

    Attributes:
        flops: spent since it was last set to 0.
    """

    def __init__(self, layers: Mapping[str, float]) -> None:
        self.layers = layers
        self.flops = 0.0
        self._dense = inference_flops(layers)
        self._sparse = self._dense

    def forward(self, weights: Mapping[str, Tensor]) -> float:
        """Forward FLOPs per sample with these weights or masks, f_S; a layer that is not among them is dense."""
        return inference_flops(self.layers, layer_densities(weights))

    def train_with(self, masks: Mapping[str, Tensor]) -> None:
        """Set the masks that are trained with from now on."""
        self._sparse = self.forward(masks)

    def count(self, samples: int, sparse_steps: int | None) -> None:
        """Add the cost of training on ``samples`` samples; ``sparse_steps`` as in :func:`training_flops`."""
        self.flops += samples * training_flops(self._sparse, self._dense, sparse_steps)


def cost_summary(
    layers: Mapping[str, float],
    sizes: Mapping[str, int],
    densities: Mapping[str, float],
    total_training_flops: float,
    training_samples: int,
) -> dict[str, Any]:
    """Costs of a run and of the network that it made, under their names in ``records.Summary``.

    Args:
        layers: dense FLOPs of each layer, from :func:`layer_flops`.
        sizes: number of entries of every parameter, biases and BatchNorm's included.
        densities: of the final network's sparse parameters, in [0, 1]; a parameter without one is dense.
        total_training_flops: what the run spent, BatchNorm re-estimation included.
        training_samples: samples that it trained on, each counted once per epoch.

    Returns:
        ``parameters`` (active ones), ``inference_flops`` (per sample) and ``training_flops`` (of the whole run), each
        also with ``_of_dense`` behind its name: as a multiple of the dense network's. Dense training is training on
        the same samples without any BatchNorm re-estimation.
    """
    costs = {
        "parameters": sum(active_count(size, densities.get(name, 1.0)) for name, size in sizes.items()),
        "inference_flops": inference_flops(layers, densities),
        "training_flops": total_training_flops,
    }
    dense_flops = inference_flops(layers)
    dense = {
        "parameters": sum(sizes.values()),
        "inference_flops": dense_flops,
        "training_flops": training_samples * training_flops(dense_flops, dense_flops),
    }
    return costs | {f"{name}_of_dense": cost / dense[name] for name, cost in costs.items()}
