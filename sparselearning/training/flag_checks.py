"""Contradictory flags, refused before anything is trained or written; warnings about suspicious ones."""

import argparse
from collections.abc import Sequence

from sparselearning import execution
from sparselearning.process.arguments import Parser, marked
from sparselearning.process.errors import UsageError
from sparselearning.sparse.schedules import check_densities, check_window
from sparselearning.sparse.sparse_init import SPARSE_INITS, check_shares_density
from sparselearning.sparse.superpose import chooses
from sparselearning.sparse.topology import METHODS, check_momentum, chosen_modes
from sparselearning.training.flags import ABOUT_MASKS
from sparselearning.training.from_flags import layer_densities
from sparselearning.training.plan import EpochBudget


def check(args: argparse.Namespace, momentum_is_zero: bool, has_weights: bool) -> list[str]:
    """Refuse contradictory flags before anything is trained or written; return warnings about suspicious ones.

    Args:
        args: the command line.
        momentum_is_zero: whether the optimizer that it asks for keeps no momentum.
        has_weights: whether it names weights to start from.

    Raises:
        UsageError: one sentence about the first contradiction.
    """
    warnings: list[str] = []
    if args.execution == "sparse":
        if not args.sparse:
            raise UsageError("--execution sparse is about masks: give --sparse as well")
        if args.compile or args.fp16 or args.amp not in (None, "auto", "off"):
            raise UsageError(
                "--execution sparse computes in float32 and is not compiled: leave out --compile and --amp"
            )
        execution.check_available("--execution sparse")
    if chooses(args.superposing_method) and not getattr(args, "valid_split", 0):
        has_flag = hasattr(args, "valid_split")
        how = "give --valid_split SHARE" if has_flag else "this script evaluates on its validation set alone"
        raise UsageError(
            f"--superposing_method {args.superposing_method} chooses by accuracy on held-out training images: {how}"
        )
    if args.fp16 and args.amp not in (None, "fp16"):
        raise UsageError(f"--fp16 means --amp fp16, which contradicts --amp {args.amp}")
    if not (args.pre_train or args.cyclic_train):
        raise UsageError("nothing to do: give --pre_train, --cyclic_train, or both")
    if args.cyclic_train and not args.pre_train and not has_weights:
        raise UsageError("--cyclic_train alone needs trained weights to start from: give --resume PATH or --pre_train")
    if not args.sparse:
        for flag in ("re_explore", "no_maskupdates"):
            if getattr(args, flag):
                raise UsageError(f"--{flag} is about masks: give --sparse as well")
        return warnings
    if args.execution == "auto" and not execution.is_available():
        warnings.append("masks save no time on a CPU without the package that compiles kernels: pip install numba")
    if args.fix and args.re_explore:
        raise UsageError("--fix freezes the topology and --re_explore changes it: give one of them")
    if SPARSE_INITS[args.sparse_init].needs_trained_weights and not has_weights:
        raise UsageError(f"--sparse-init {args.sparse_init} starts from trained weights: give --resume PATH")
    if layer_densities(args):
        if not args.pre_train:
            raise UsageError("--layer-density is about the masks that pre-training starts with: give --pre_train too")
        check_shares_density(args.sparse_init, ("--layer-density", "--sparse-init"))
    if args.final_update_epoch is not None and (args.fix or not METHODS[args.method].grows):
        never = "--fix freezes the topology" if args.fix else f"{args.method} only prunes"
        warnings.append(f"{never}: --final-update-epoch has no effect")
    modes = chosen_modes(args.prune, args.growth, args.redistribution)
    check_momentum(modes, not momentum_is_zero, needed="a --momentum above 0")
    check_window(args.init_prune_epoch, args.final_prune_epoch, unit="epoch")
    if METHODS[args.method].shrink:
        check_densities(args.method, args.init_density, args.final_density, ("--init-density", "--final-density"))
        if args.init_density == args.final_density and METHODS[args.method].grows:
            warnings.append(
                f"{args.method} has nothing to prune at --init-density = --final-density = {args.final_density}: "
                "it trains as DST does; GraNet usually starts at 0.5"
            )
        if args.fix and args.init_density != args.final_density:
            warnings.append(f"--fix stops {args.method}'s gradual pruning: the density stays at --init-density")
        if args.sparse_init == "GMP" and args.init_density != 1:
            warnings.append(
                f"--sparse-init GMP starts dense, but the pruning schedule at --init-density {args.init_density}: "
                "give --init-density 1 for a schedule from dense"
            )
    elif args.pre_train and not SPARSE_INITS[args.sparse_init].needs_trained_weights:  # else the weights decide
        if args.sparse_init == "GMP":
            warnings.append(
                "--sparse-init GMP starts dense and DST stays so; only the superposition is cut to the budget"
            )
        elif args.init_density != args.final_density:
            warnings.append(
                f"DST keeps --init-density {args.init_density}; only the superposition is cut to --final-density "
                f"{args.final_density}. For gradual pruning give --method GraNet"
            )
    return warnings


def check_budget(args: argparse.Namespace, budget: EpochBudget) -> list[str]:
    """Warn if the cyclic part is shorter than one cycle.

    Raises:
        UsageError: if nothing is left to do.
    """
    cycle = f"{budget.cycle_epochs} epoch{'s' * (budget.cycle_epochs > 1)}"
    if not budget.total_epochs:
        raise UsageError("nothing to do: pre-training and cycles have no epochs at all")
    if not args.pre_train and not budget.tickets:
        raise UsageError(f"nothing to do: the cyclic part is shorter than one cycle ({cycle})")
    if not args.cyclic_train and not budget.pretrain_epochs:
        raise UsageError(
            "nothing to do: no epochs are left for pre-training beside the cycles, and they are not asked for"
        )
    if not args.cyclic_train or budget.tickets:
        return []
    return [f"the cyclic part is shorter than one cycle ({cycle}): all epochs pre-train, no tickets"]


def pruning_window_warning(args: argparse.Namespace, pretrain_epochs: int) -> list[str]:
    """Warn about gradual pruning that ends after pre-training."""
    end = args.final_prune_epoch * args.multiplier
    if not (args.sparse and METHODS[args.method].shrink and end > pretrain_epochs):
        return []
    return [f"gradual pruning ends at epoch {end}, after pre-training, which ends at epoch {pretrain_epochs}"]


def without_masks_note(args: argparse.Namespace, parser: Parser, argv: Sequence[str] | None) -> list[str]:
    """Tell the user which of the given flags have no effect on dense training."""
    if args.sparse:
        return []
    about_masks = marked(parser, ABOUT_MASKS)
    if without_effect := [flag for name, flag in parser.given(argv).items() if name in about_masks]:
        return [f"training is dense without --sparse, so that these have no effect: {', '.join(without_effect)}"]
    return []
