"""What a run would do, before it does: the table of its layers, and its plan. Nothing is trained or written."""

from sparselearning.process import distributed
from sparselearning.sparse.costs import inference_flops, layer_densities, layer_flops, overall_density
from sparselearning.sparse.layers import maskable_parameters
from sparselearning.sparse.topology import METHODS, REDISTRIBUTION, Layer, shrink_globally
from sparselearning.training.engine import Trainer
from sparselearning.training.experiment import Output, Setup, SparseTraining, prepare, start_of
from sparselearning.training.opening import check_folder
from sparselearning.training.plan import Plan
from sparselearning.training.profiling import endless, timed
from sparselearning.training.progress import layer_table
from sparselearning.training.runtime import Runtime

TIMED_STEPS = 3
UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def show_layers(setup: Setup, plan: Plan, sparse: SparseTraining | None, runtime: Runtime, output: Output) -> None:
    """Print a table of the layers of a run, as it would start or resume; nothing is trained or written.

    Raises:
        UsageError: if what ``resume`` names does not fit.
        FaultError: if it cannot be read.
    """
    trainer = prepare(setup, plan, sparse, runtime, output)
    if not distributed.is_main():
        return
    shapes = {name: tuple(weight.shape) for name, weight in maskable_parameters(setup.model).items()}
    print(layer_table(shapes, layer_flops(setup.model, setup.sample_shape), *_densities(trainer)))
    if trainer.masking and plan.cyclic_train and plan.budget.tickets:
        print(f"superpositions are pruned to density {plan.final_density} over all masked layers, by magnitude")


def dry_run(setup: Setup, plan: Plan, sparse: SparseTraining | None, runtime: Runtime, output: Output) -> None:
    """Check all that a run checks before its first step, and print what it would do and about how long that takes.

    The time is estimated from three steps, on weights that are thrown away.

    Raises:
        UsageError: if what ``resume`` names does not fit.
        FaultError: if it cannot be read, the run's folder cannot be written into, or another run is using it.
    """
    start = start_of(plan, sparse, output)
    trainer = prepare(setup, plan, sparse, runtime, output, start=start)
    distributed.on_main(lambda: check_folder(output.folder, start))
    rows = {
        "epochs": _epochs(trainer),
        "updates": _updates(trainer),
        "density": _density(trainer),
        "FLOPs": _flops(setup, trainer),
        "time": _time(trainer),  # last: it changes weights and masks
        "files": str(output.folder.path),
    }
    if distributed.is_main():
        print("\n".join(f"{name:<9}{text}" for name, text in rows.items()))


def _epochs(trainer: Trainer) -> str:
    plan, budget, batches = trainer.plan, trainer.plan.budget, len(trainer.sources.train)
    parts = []
    if plan.pre_train:
        parts.append(f"{_count(budget.pretrain_epochs, 'epoch')} of pre-training")
    if plan.cyclic_train and budget.tickets:
        cycles = _count(budget.tickets, "cycle")
        parts.append(f"{cycles} of {_count(budget.cycle_epochs, 'epoch')}: {_count(budget.tickets, 'ticket')}")
    steps = (plan.end_epoch - plan.first_epoch) * batches
    text = f"{', then '.join(parts)}; {_count(steps, 'step')}, {batches:,} an epoch"
    if (trainer.at.epoch, trainer.at.batch) != (plan.first_epoch, 0):
        text += f"; resumes at epoch {trainer.at.epoch}, step {trainer.at.batch}"
    return text


def _updates(trainer: Trainer) -> str:
    masking, plan, batches = trainer.masking, trainer.plan, len(trainer.sources.train)
    if masking is None:
        return "none: training is dense"
    steps = range(masking.steps + 1, plan.updates_end_epoch * batches + 1)
    due = sum(map(masking.schedule.is_due, steps)) if masking.updates_enabled else 0
    text = _count(due, "topology update") + f", one in {_count(masking.update_frequency, 'step')}" * bool(due)
    to_come = range(trainer.at.epoch + plan.is_superposed(trainer.at), plan.end_epoch)  # the epoch's own is done
    if explorations := sum(map(plan.explores_before, to_come)):
        text += f"; {_count(explorations, 'exploration')}"
    return text


def _density(trainer: Trainer) -> str:
    if trainer.masking is None:
        return "dense"
    now, at_end = _densities(trainer)
    weights = sum(mask.numel() for mask in trainer.masking.masks.values())
    return f"{now['all']:.4f} of {_count(weights, 'weight')} now, {at_end['all']:.4f} after the last update"


def _flops(setup: Setup, trainer: Trainer) -> str:
    layers = layer_flops(setup.model, setup.sample_shape)
    dense = inference_flops(layers)
    text = f"{dense / 1e6:,.1f} million an image in the dense network"
    if trainer.masking is None:
        return text
    now, at_end = _densities(trainer)
    text += f"; {inference_flops(layers, now) / dense:.3f} of that now"
    known = {name: density for name, density in at_end.items() if density is not None}
    if len(known) < len(at_end):
        return f"{text}; the layers' magnitudes decide what at the end"
    return f"{text}, {inference_flops(layers, known) / dense:.3f} after the last update"


def _time(trainer: Trainer) -> str:
    """About how long the rest of the run takes, estimated from a few steps of training and of evaluation."""
    plan, at, sources = trainer.plan, trainer.at, trainer.sources
    steps = (plan.end_epoch - at.epoch) * len(sources.train) - at.batch
    if steps <= 0:
        return "nothing is left to train"
    trainer.passes.network.train()
    training, _ = timed(trainer, endless(sources.train), trainer.train_batch, TIMED_STEPS)
    trainer.passes.network.eval()
    evaluating, _ = timed(trainer, endless(sources.evaluation), trainer.passes.predict, TIMED_STEPS)
    tickets = [plan.ticket(epoch) for epoch in range(at.epoch, plan.end_epoch) if plan.ends_cycle(epoch)]
    superposed = sum(len(plan.averaging(number)) for number in tickets if number)
    passes = (plan.end_epoch - at.epoch + superposed) * len(sources.evaluation)
    passes += superposed * plan.update_bn * len(sources.train_once)
    seconds = (steps * training + passes * evaluating) / TIMED_STEPS
    return f"about {duration(seconds)}, at {training / TIMED_STEPS:.3g} s a step (mean of {TIMED_STEPS})"


def duration(seconds: float) -> str:
    """A time in its two largest units, such as ``3 h 20 min``."""
    whole = max(1, round(seconds))
    parts: list[str] = []
    for name, size in UNITS:
        if whole >= size or parts:
            parts.append(f"{whole // size} {name}")
            whole %= size
    return " ".join(parts[:2])


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _densities(trainer: Trainer) -> tuple[dict[str, float], dict[str, float | None]]:
    """Density of every masked layer, and of ``all``: now, and after the last update; None where magnitudes decide."""
    masking = trainer.masking
    if masking is None:
        return {}, {}
    method = METHODS[masking.method]
    layers = {
        name: Layer(mask.flatten().float(), mask.flatten().clone(), is_classifier=name == masking.classifier)
        for name, mask in masking.masks.items()
    }
    last_shrink = masking.schedule.last_shrink(trainer.plan.updates_end_epoch * len(trainer.sources.train))
    shrinks = masking.updates_enabled and last_shrink > masking.steps
    if shrinks and method.shrink:
        method.shrink(list(layers.values()), masking.scheduled_density(last_shrink))
    at_end: dict[str, float | None] = dict(layer_densities({name: layer.mask for name, layer in layers.items()}))
    total = overall_density(layer.mask for layer in layers.values())
    prunes_anywhere = shrinks and method.shrink is shrink_globally and total < masking.density()
    redistributes = method.grows and REDISTRIBUTION[masking.redistribution] is not None
    if masking.updates_enabled and (prunes_anywhere or redistributes):
        at_end = dict.fromkeys(at_end)
    return layer_densities(masking.masks) | {"all": masking.density()}, at_end | {"all": total}
