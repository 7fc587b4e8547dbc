"""Computing with active weights alone, on CPUs. Numba compiles the kernels when they are first needed."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

from torch import nn

from sparselearning.process.errors import UsageError
from sparselearning.sparse.masking import Masking

if TYPE_CHECKING:
    from sparselearning.execution.inference import SparseInference
    from sparselearning.execution.network import SparseNetwork

EXECUTIONS = ("auto", "masked", "sparse")
"""How a run computes: ``masked`` multiplies by zeros, ``sparse`` leaves them out, ``auto`` is what is faster."""


def is_available() -> bool:
    """Whether the package that compiles the kernels is installed."""
    return find_spec("numba") is not None


def sparse_execution(
    model: nn.Module, masking: Masking, layer_flops: Mapping[str, float] | None = None
) -> "SparseNetwork":
    """Return a network to call in place of ``model`` while training on a CPU: it computes with active weights alone.

    Results equal the model's own but for rounding. Parameters, gradients, optimizer and masks stay what they are.
    Gradients of inactive weights of two-dimensional convolutions and linear layers are zero, but in steps in which
    ``masking`` reads them; before a ``truncate_weights`` by gradient, which refuses zeros, set ``dense_gradients`` of
    the network for the backward pass that it reads. Blocks in ``torch.utils.checkpoint`` run as in the model itself.

    Args:
        model: on the CPU, in float32.
        masking: that this model was added to.
        layer_flops: dense forward FLOPs of each layer (``costs.layer_flops``); with them, a forward pass runs as in
            the model itself while so many weights are active that sparse computation would not be faster.

    Raises:
        UsageError: if Numba is not installed, there are no masks yet, a weight is elsewhere or of another type, or a
            module is scripted or compiled.
    """
    return sparse_network(model, masking.parameters, masking, layer_flops)


def sparse_network(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    masking: Masking | None = None,
    layer_flops: Mapping[str, float] | None = None,
) -> "SparseNetwork":
    """As :func:`sparse_execution`, for ``weights`` alone and, without ``masking``, for a network that is not trained.

    Raises:
        UsageError: if Numba is not installed, there are no weights, one is elsewhere or of another type, or a module is
            scripted or compiled.
    """
    check_available()
    from sparselearning.execution.network import SparseNetwork

    return SparseNetwork(model, weights, masking, layer_flops)


def sparse_inference(model: nn.Module) -> "SparseInference":
    """Return a network for prediction on a CPU that computes with the non-zero weights of ``model`` alone.

    It takes the model's inputs, in batches of one at least, and returns what ``model.eval()`` returns but for rounding,
    without gradients. The model is not changed, and later changes to it have no effect. The first batch of a size
    takes longer, for its lists of weights are made then. A network that ``torch.fx`` cannot trace runs as in training,
    its BatchNorms unfolded, and so does a call that gives arguments which have defaults: for a model that has such, a
    second copy with dense weights is kept.

    Args:
        model: on the CPU, in float32, neither scripted nor compiled.

    Raises:
        UsageError: if Numba is not installed, or a weight is elsewhere or of another type.
    """
    check_available()
    from sparselearning.execution.inference import SparseInference

    return SparseInference.of(model)


def check_available(what: str = "sparse execution") -> None:
    """Refuse ``what`` the user asked for if the package that compiles the kernels is not installed.

    Raises:
        UsageError: if it is not.
    """
    if not is_available():
        raise UsageError(f"{what} compiles its kernels with a package that is missing: pip install numba")
