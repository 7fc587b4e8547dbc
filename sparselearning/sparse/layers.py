"""Which weights of a model have masks, and how a user names single layers."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import Tensor, nn

from sparselearning.process import distributed
from sparselearning.process.errors import UsageError
from sparselearning.process.schema import Density, check_option

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
NORMS = (nn.LayerNorm, nn.RMSNorm)
OTHER_CONVOLUTIONS = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose3d)
"""Those whose weights have neither two nor four dimensions."""


def maskable_parameters(
    model: nn.Module,
    keep_first_dense: bool = False,
    dense_layers: Sequence[str] = (),
    mask_embeddings: bool = False,
) -> dict[str, nn.Parameter]:
    """Return the weights that masks are for, by their names in the user's own model, in model order.

    They are the weights of linear layers, convolutions of one to three dimensions, attention and recurrent layers, and
    all other 2-D and 4-D parameters, but for those of normalisation layers and embeddings. A weight that several
    modules share goes by its first name; one that is an embedding's is an embedding wherever else it is used.

    Args:
        model: plain, data-parallel or compiled: names are the same.
        keep_first_dense: leave out the first.
        dense_layers: leave out those that one of these patterns matches; see :func:`matching`.
        mask_embeddings: take embeddings as well.

    Raises:
        UsageError: if a pattern matches no parameter, a lazy module has no shape yet, or a weight is
            computed from other parameters at every forward pass (weight normalisation and the like), so that masks of
            those would not keep it sparse.
    """
    inner = distributed.unwrap(model)
    names = parameter_names(inner)
    left_out = {name for pattern in dense_layers for name in matching(pattern, names.values())}
    embeddings = {
        weight
        for module in inner.modules()
        if isinstance(module, EMBEDDINGS) and not mask_embeddings
        for weight in module.parameters()
    }
    found: dict[str, nn.Parameter] = {}
    makers = set()
    for path, parameter in inner.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise UsageError(f"{names[path]} has no shape yet: run a first batch through the lazy modules")
        owner_path, _, entry = path.rpartition(".")
        owner = inner.get_submodule(owner_path)
        makes_a_weight = _is_reparametrised(owner_path, owner, entry) and parameter.requires_grad
        if parameter not in embeddings and (_is_weight(owner, parameter) or (makes_a_weight and parameter.dim() > 1)):
            found[names[path]] = parameter
            if makes_a_weight:
                makers.add(names[path])
    if keep_first_dense:
        left_out.update(list(found)[:1])
    if refused := [name for name in makers if name not in left_out]:
        raise UsageError(
            f"{min(refused)} is not a weight but what one is computed from (weight_norm, spectral_norm, …): "
            "masks cannot keep that weight sparse; remove the normalisation, or name the layer in dense_layers"
        )
    return {name: parameter for name, parameter in found.items() if name not in left_out}


def classifier(model: nn.Module) -> nn.Parameter | None:
    """The weight that is taken for the classifier's, whether it is maskable or not: the model's last matrix.

    Embeddings do not count, but a layer does that shares an embedding's weight.
    """
    inner = distributed.unwrap(model)
    last = None
    for path, parameter in inner.named_parameters(remove_duplicate=False):
        owner = inner.get_submodule(path.rpartition(".")[0])
        if parameter.dim() == 2 and not isinstance(owner, NORMS + EMBEDDINGS):
            last = parameter
    return last


def _is_weight(owner: nn.Module, parameter: Tensor) -> bool:
    if isinstance(owner, NORMS):
        return False
    dimensions = (2, 3, 4, 5) if isinstance(owner, OTHER_CONVOLUTIONS) else (2, 4)
    return parameter.dim() in dimensions


def _is_reparametrised(owner_path: str, owner: nn.Module, entry: str) -> bool:
    """Whether some weight is computed from a parameter.

    The parameter is then in the ``parametrizations`` of the weight's module or, with older functions of PyTorch, beside
    a plain tensor: ``weight_g`` and ``weight_v``, or ``weight_orig``, beside ``weight``.
    """
    stem, _, suffix = entry.rpartition("_")
    has_plain_tensor = suffix in ("g", "v", "orig") and isinstance(vars(owner).get(stem), Tensor)
    return has_plain_tensor or "parametrizations" in owner_path.split(".")


def parameter_names(model: nn.Module) -> dict[str, str]:
    """Path of every parameter in a model that may have compiled parts to its name in the user's own."""
    return {path: path.replace("_orig_mod.", "") for path, _ in model.named_parameters()}


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Names that a pattern matches, as a whole or up to a dot.

    ``*`` stands for anything, dots included: ``fc`` matches ``fc.weight``, and ``layer4`` and ``layer4.*`` all of that
    layer.

    Raises:
        UsageError: if there are none.
    """
    names = list(names)
    found = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
    if not found:
        modules = {name[:i] for name in names for i, character in enumerate(name) if character == "."}
        near = get_close_matches(pattern, sorted({*names, *modules}), cutoff=0.0)
        raise UsageError(f"no layer matches {pattern!r}; the nearest names are {', '.join(near)}")
    return found


def fixed_densities(
    layer_densities: Mapping[str, float], masked: Iterable[str], model: nn.Module, dense_layers: Sequence[str] = ()
) -> dict[str, float]:
    """Density of each masked weight that a pattern gives one, by name.

    Args:
        layer_densities: pattern, as in :func:`matching`, to density in (0, 1].
        masked: names of the masked weights of ``model``.
        model: the model that has them.
        dense_layers: patterns that no weight with a density may match.

    Raises:
        UsageError: if a density is out of range, a pattern matches no masked weight, or patterns contradict each other.
    """
    names = list(parameter_names(distributed.unwrap(model)).values())
    dense = {name: pattern for pattern in dense_layers for name in matching(pattern, names)}
    masked = set(masked)
    fixed: dict[str, tuple[float, str]] = {}
    for pattern, density in layer_densities.items():
        check_option(f"the density of {pattern!r}", density, Density)
        found = matching(pattern, names)
        if contradicted := [name for name in found if name in dense]:
            name = contradicted[0]
            raise UsageError(f"{pattern!r} gives {name} density {density}, and {dense[name]!r} keeps it dense")
        if masked.isdisjoint(found):
            raise UsageError(
                f"{pattern!r} gives a density to {found[0]}, which has no mask (an embedding has one only with "
                "mask_embeddings=True)"
            )
        for name in masked.intersection(found):
            other, by = fixed.setdefault(name, (density, pattern))
            if other != density:
                raise UsageError(f"{name} gets density {other} from {by!r} and {density} from {pattern!r}")
    return {name: density for name, (density, _) in fixed.items()}
