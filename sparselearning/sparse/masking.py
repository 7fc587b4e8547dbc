"""The owner of the masks: keeps weights and optimizer state sparse, and updates the topology when that is due."""

import math
from collections.abc import Mapping, Sequence
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from sparselearning.process import distributed
from sparselearning.process.errors import FaultError, UsageError
from sparselearning.process.schema import Count, Density, Mismatch, Ordinal, Share, check_option
from sparselearning.process.seeding import derive_seed
from sparselearning.process.tensor_schema import Check, all_of, conform, inside, like, mapping, optional, record
from sparselearning.sparse.active_gradients import ActiveGradients
from sparselearning.sparse.distributions import active_count, check_leaves_weights, nonzero_counts
from sparselearning.sparse.held_weights import HeldWeights, check_values
from sparselearning.sparse.layers import classifier, fixed_densities, maskable_parameters
from sparselearning.sparse.optimizer_hooks import follow
from sparselearning.sparse.optimizer_state import DenseMomentum, has_momentum, keeps_zeros, per_weight_state, take_step
from sparselearning.sparse.schedules import DECAYS, UpdateSchedule, check_densities, check_window, gradual_density
from sparselearning.sparse.sparse_init import SPARSE_INITS, InitSettings, check_shares_density
from sparselearning.sparse.topology import (
    GROWTH,
    METHODS,
    PRUNE,
    REDISTRIBUTION,
    Layer,
    Stateful,
    check_momentum,
    chosen_modes,
    prune_and_grow,
)
from sparselearning.sparse.zeroing import Zeroing


class Masking:
    """Sparse training around any optimizer of ``torch.optim`` whose per-weight state, if any, has the weight's shape.

    Call :meth:`step` in place of ``optimizer.step()``. After every step, inactive weights and their optimizer state are
    exactly zero. All ranks of a data-parallel run hold the same masks.

    What follows the optimizer's step is a hook of the optimizer, so that ``optimizer.step()`` in a loop that knows
    nothing of masks does the same, as long as the Masking is kept and no later one takes the optimizer over.

    Args:
        optimizer: holds the parameters of the model that :meth:`add_module` gets.
        method: name in :data:`METHODS`. ``DST`` prunes and grows at constant density (with gradient growth RigL,
            with random growth SET); ``GraNet`` also prunes gradually to the final density; ``GMP`` only prunes.
        prune: name in ``PRUNE``, how weights to remove are chosen.
        growth: name in ``GROWTH``, how weights to grow are chosen.
        redistribution: name in ``REDISTRIBUTION``, how removed weights are shared out over layers.
        prune_rate: share of each layer's active weights that an update removes, in [0, 1].
        decay_schedule: name in ``DECAYS``, how ``prune_rate`` falls over ``total_steps``.
        update_frequency: optimizer steps from one topology update to the next.
        init_density: share of active weights at the start, in (0, 1].
        final_density: share that gradual methods end at, in (0, ``init_density``].
        prune_start_step: step before which gradual methods change nothing.
        prune_end_step: step from which gradual methods hold ``final_density``, which the first update at or after it
            brings; they need it.
        final_update_step: last step that may prune and grow; None: all may. Gradual pruning continues after it.
        total_steps: steps of the whole run; needed by every decay but ``constant``. A warning tells if gradual pruning
            does not get to ``final_density`` in them.
        seed: of the first masks and of random growth. Rank 0's counts.
        steps: optimizer steps that the model has taken before.

    Attributes:
        masks: parameter name to boolean tensor, true where the weight is active.
        classifier: name of the model's classifier (:func:`layers.classifier`); None: it has no mask.
        steps: optimizer steps taken.
        updates_enabled: set to False to freeze the topology.

    Raises:
        UsageError: a ``ValueError``, if an option is unknown, out of range, or contradicts another.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        method: str = "DST",
        prune: str = "magnitude",
        growth: str = "gradient",
        redistribution: str = "none",
        prune_rate: float = 0.5,
        decay_schedule: str = "constant",
        update_frequency: int = 100,
        init_density: float = 0.05,
        final_density: float = 0.05,
        prune_start_step: int = 0,
        prune_end_step: int | None = None,
        final_update_step: int | None = None,
        total_steps: int | None = None,
        seed: int = 0,
        steps: int = 0,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise UsageError(
                f"Masking takes the model's optimizer, and add_module the model; this is a {type(optimizer)}"
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise UsageError(
                "LBFGS moves all weights along one direction that it keeps as a whole: it cannot be masked"
            )
        _check_choice("method", method, METHODS)
        _check_choice("prune", prune, PRUNE)
        _check_choice("growth", growth, GROWTH)
        _check_choice("redistribution", redistribution, REDISTRIBUTION)
        _check_choice("decay_schedule", decay_schedule, DECAYS)
        check_option("init_density", init_density, Density)
        check_option("final_density", final_density, Density)
        check_option("prune_rate", prune_rate, Share)
        update_frequency = _whole("update_frequency", update_frequency, Ordinal)
        prune_start_step = _whole("prune_start_step", prune_start_step)
        prune_end_step = None if prune_end_step is None else _whole("prune_end_step", prune_end_step)
        final_update_step = None if final_update_step is None else _whole("final_update_step", final_update_step)
        total_steps = None if total_steps is None else _whole("total_steps", total_steps, Ordinal)
        if decay_schedule != "constant" and not total_steps:
            raise UsageError(f"decay_schedule {decay_schedule!r} needs total_steps")
        modes = chosen_modes(prune, growth, redistribution)
        check_momentum(modes, has_momentum(optimizer))
        if METHODS[method].shrink:
            check_densities(method, init_density, final_density)
            if prune_end_step is None:
                raise UsageError(f"{method} needs prune_end_step, the step at which final_density is reached")
            check_window(prune_start_step, prune_end_step)
        self.optimizer = optimizer
        self.method = method
        self.prune = prune
        self.growth = growth
        self.redistribution = redistribution
        self.prune_rate = prune_rate
        self.decay_schedule = decay_schedule
        self.update_frequency = update_frequency
        self.init_density = init_density
        self.final_density = final_density
        self.prune_start_step = prune_start_step
        self.prune_end_step = prune_end_step
        self.final_update_step = final_update_step
        self.total_steps = total_steps
        self.seed = int(seed)

        self.masks: dict[str, Tensor] = {}
        self.classifier: str | None = None
        self.steps = _whole("steps", steps)
        self.updates_enabled = True
        self._parameters: dict[str, nn.Parameter] = {}
        self._held = HeldWeights(nn.Module(), {})
        self._explorations = 0  # prune-and-grow rounds so far; each has its own random stream
        self._gradients_masked = False  # before the optimizer step under way
        self._active_gradients = ActiveGradients()
        self._overdue = False  # an update that met overflowed gradients waits for the next step
        self._method = METHODS[method]
        self._prune = PRUNE[prune].begin()
        self._reads_gradient = any(mode.reads_gradient for mode in modes)
        self._reads_momentum = any(mode.reads_momentum for mode in modes)
        self._tracks_momentum = GROWTH[growth].reads_momentum
        self._dense_momentum = DenseMomentum(optimizer)
        self._ever_active: dict[str, Tensor] = {}
        self._zero = Zeroing()

    # ------------------------------------------------------------------------------------------ public API

    def add_module(
        self,
        model: nn.Module,
        sparse_init: str | None = "ERK",
        *,
        pruning_rate: float = 0.5,
        keep_first_dense: bool = False,
        dense_layers: Sequence[str] = (),
        layer_densities: Mapping[str, float] | None = None,
        mask_embeddings: bool = False,
    ) -> None:
        """Draw the first masks for the weights of ``model`` and apply them.

        Masked are all weights that :func:`maskable_parameters` finds, but for those that are frozen or not in the
        optimizer, of which a warning tells. Patterns match names as :func:`layers.matching` says.

        Args:
            model: wrapped for data-parallel training, compiled, or plain.
            sparse_init: name in ``SPARSE_INITS``. ``snip`` and the ``prune_and_grow_*`` modes read the gradients of
                one batch: run a backward pass first. None: draw none; all weights are active until
                :meth:`load_state_dict` brings their masks.
            pruning_rate: share of the trained weights that the ``prune_*`` modes drop, in [0, 1].
            keep_first_dense: leave the first layer without a mask.
            dense_layers: patterns of layers to leave without masks, such as ``"fc"``.
            layer_densities: pattern, such as ``"layer4.*"``, to the density of each such layer at the start, in (0, 1];
                the others share what is left of ``init_density``. For ``ERK`` and ``uniform``.
            mask_embeddings: mask embeddings as well.

        Raises:
            UsageError: if nothing is maskable, the optimizer is not this model's, gradients are missing, a model was
                added before, patterns match nothing or contradict each other, or the budget is impossible.
        """
        if sparse_init is not None:
            _check_choice("sparse_init", sparse_init, SPARSE_INITS)
        check_option("pruning_rate", pruning_rate, Share)
        if self.masks:
            raise UsageError("this Masking already has a model: make one Masking per model")
        init = None if sparse_init is None else SPARSE_INITS[sparse_init]
        if layer_densities:
            check_shares_density(sparse_init)
        parameters = maskable_parameters(model, keep_first_dense, dense_layers, mask_embeddings)
        check_values(distributed.unwrap(model), parameters)
        parameters = self._trained(parameters)
        fixed = fixed_densities(layer_densities or {}, parameters, model, dense_layers)
        total = sum(weight.numel() for weight in parameters.values())
        if self._method.shrink:
            check_leaves_weights(total, self.final_density)
        self._parameters = parameters
        last = classifier(model)
        self.classifier = next((name for name, weight in parameters.items() if weight is last), None)
        self._held = HeldWeights(distributed.unwrap(model), parameters)
        self.seed = distributed.broadcast_object(self.seed)
        # A mask is laid out in memory as its weight is, so that both can be read as flat views.
        masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in parameters.items()}
        if init:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "first masks"))
            with torch.no_grad():
                settings = InitSettings(self.init_density, pruning_rate, generator, fixed, self.classifier)
                drawn = init.draw(parameters, settings)
            for name, mask in masks.items():
                mask.copy_(drawn[name])
        if not any(nonzero_counts(masks.values())):
            raise UsageError(
                f"sparse_init {sparse_init!r} leaves none of {total:,} weights active (init_density "
                f"{self.init_density}, pruning_rate {pruning_rate})"
            )
        self.masks = masks
        for mask in self.masks.values():
            mask.copy_(distributed.broadcast(mask.contiguous()))
        self._ever_active = {name: mask.to("cpu", copy=True) for name, mask in self.masks.items()}
        self.apply_masks()
        self._held.forget()
        self._follow_optimizer()
        if init and self.total_steps and (unfinished := self.unfinished_pruning(self.total_steps)):
            warn(unfinished, stacklevel=2)

    def _trained(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Those of the parameters that the optimizer trains; a warning names the others."""
        if not parameters:
            raise UsageError("the model has no weight to mask")
        optimized = {parameter for group in self.optimizer.param_groups for parameter in group["params"]}
        held = {name: parameter for name, parameter in parameters.items() if parameter in optimized}
        if not held:
            raise UsageError("the optimizer holds no weight of this model: make it from this very model's parameters")
        trained = {name: parameter for name, parameter in held.items() if parameter.requires_grad}
        if not trained:
            raise UsageError("all weights of this model are frozen (requires_grad is False): there is nothing to mask")
        if left_alone := [name for name in parameters if name not in trained]:
            warn(
                f"left alone, without masks, because they are frozen or not in the optimizer: {', '.join(left_alone)}",
                stacklevel=3,
            )
        return trained

    def _follow_optimizer(self) -> None:
        follow(self.optimizer, self, self._after_optimizer_step, self._held.forget)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Follow the optimizer of a copy, which is a copy without hooks."""
        self.__dict__.update(state)
        if self.masks:
            self._follow_optimizer()

    def step(self, scaler: torch.amp.GradScaler | None = None, *, keep_gradients: bool = True) -> None:
        """Optimizer step, masks, and the topology update when it is due.

        Args:
            scaler: scales the gradients in float16 training; steps and updates itself here. A topology update that
                meets overflowed gradients waits for the next step.
            keep_gradients: leave the dense gradients in place, for a :meth:`truncate_weights` that may follow. If not,
                a step without a topology update masks the gradients before the optimizer step, instead of weights and
                optimizer state after it, which saves a pass or two over memory. What is zero then stays zero: only of
                optimizers that :func:`keeps_zeros` knows, and not after something else has written weights or loaded
                optimizer state, is this done. In float16 training, gradients that overflow at inactive weights alone
                then skip no step.

        Raises:
            UsageError: if the optimizer runs no hooks, or a masked weight of the model was replaced.
        """
        self._check_has_model()
        steps = self.steps
        zeros_stay = keeps_zeros(self.optimizer) and self._held.are_masked
        self._gradients_masked = zeros_stay and not (keep_gradients or self.update_due or self._tracks_momentum)
        if self._gradients_masked:
            self._held.check()
            self.mask_gradients()
        try:
            take_step(self.optimizer, scaler)
        finally:
            self._gradients_masked = False
        if self.steps > steps:
            return
        if scaler is None:
            raise UsageError(
                "the optimizer's step did not reach its masks: a later Masking has taken the optimizer over, or it is "
                "a wrapper that runs no step hooks, so that Masking needs the optimizer inside"
            )
        self._count_step(skipped=True)

    def _after_optimizer_step(self) -> None:
        """Mask what the optimizer has just changed, and update the topology when it is due."""
        if not self._gradients_masked:
            self._held.check()
        # A fused optimizer runs, without effect, in a step that its loss scaler skips; others are not run at all.
        found_inf: Tensor | None = getattr(self.optimizer, "found_inf", None)
        if self._tracks_momentum:
            self._dense_momentum.age(self._parameters, found_inf)
        if self._gradients_masked:
            self._held.remember()
        else:
            self.apply_masks()
        self._count_step(skipped=self.update_due and found_inf is not None and bool(found_inf))

    def _count_step(self, skipped: bool) -> None:
        due = self.update_due
        self.steps += 1
        self._active_gradients.identify(self._parameters)
        self._overdue = due and skipped
        if due and not skipped:
            self._update_topology()

    @property
    def update_due(self) -> bool:
        """Whether the next :meth:`step` ends with a topology update."""
        return self.updates_enabled and self.schedule.is_due(self.steps + 1, self._overdue)

    @property
    def schedule(self) -> UpdateSchedule:
        """Which steps end with a topology update as long as updates are enabled."""
        return UpdateSchedule(
            self.update_frequency,
            shrinks=self._method.shrink is not None,
            grows=self._method.grows,
            start=self.prune_start_step,
            last_growth=self.final_update_step,
        )

    @property
    def needs_dense_gradients(self) -> bool:
        """Whether the next :meth:`step` reads gradients of inactive weights, which the backward pass then computes."""
        explores = self.update_due and self.schedule.grows_at(self.steps + 1)
        return self._tracks_momentum or (self._reads_gradient and explores)

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The weights that have masks, by the names that the masks go by."""
        return self._parameters

    @torch.no_grad()
    def truncate_weights(self, prune_rate: float | None = None) -> None:
        """Explore connections (``--re_explore``): prune and grow once, now, on the gradients at hand, at equal density.

        Args:
            prune_rate: share of each layer's active weights to remove, in [0, 1]; by default the scheduled one.

        Raises:
            UsageError: if the rate is out of range, or gradients or momentum that the modes read are not there, or the
                gradients are those of active weights alone (see :meth:`note_active_gradient`).
        """
        if prune_rate is not None:
            check_option("prune_rate", prune_rate, Share)
        self._check_has_model()
        self._held.check()
        self._check_gradients()
        layers = self._layers()
        self._explore(layers, prune_rate)
        self._settle(layers)

    def check_can_explore(self) -> None:
        """Refuse a :meth:`truncate_weights` that comes before the first optimizer step, if it reads momentum.

        Raises:
            UsageError: if it would.
        """
        if self._reads_momentum and not self.optimizer.state:
            raise UsageError(
                "the first cycle explores by momentum, and there is none yet: pre-train first, start from a "
                "checkpoint.pth with its optimizer, or choose modes that do not read momentum"
            )

    @torch.no_grad()
    def density(self) -> float:
        """Active over maskable weights, exactly.

        Raises:
            UsageError: if weights that the masks say are zero are not, because something else has written them.
        """
        self._check_has_model()
        self._held.check()
        inactive = (weight.masked_fill(self.masks[name], 0) for name, weight in self._parameters.items())
        for name, written in zip(self.masks, nonzero_counts(inactive), strict=True):
            if written:
                raise UsageError(
                    f"{name} has {written:,} weights where its mask has none: something other than this optimizer's "
                    "steps has written them, and the next step or apply_masks() makes them zero again"
                )
        return sum(self.active_counts().values()) / sum(mask.numel() for mask in self.masks.values())

    def active_counts(self) -> dict[str, int]:
        """Active weights of each masked parameter."""
        self._check_has_model()
        return dict(zip(self.masks, nonzero_counts(self.masks.values()), strict=True))

    def explored(self) -> float:
        """Share of maskable weights that were ever active, R_s of In-Time Over-Parameterization (Liu et al. 2021)."""
        self._check_has_model()
        active = sum(nonzero_counts(self._ever_active.values()))
        return active / sum(seen.numel() for seen in self._ever_active.values())

    def current_prune_rate(self) -> float:
        """Share of active weights, in [0, 1], that an update now removes."""
        progress = min(1.0, self.steps / self.total_steps) if self.total_steps else 0.0
        return DECAYS[self.decay_schedule](self.prune_rate, progress)

    @property
    def sparse_steps(self) -> int | None:
        """Steps on sparse gradients for each that needs dense ones, ΔT of ``costs.training_flops``; None: none does.

        It holds for the next step, and changes where growth begins, ends or is switched off.
        """
        if self._tracks_momentum:
            return 0
        updates = self.updates_enabled and self.schedule.grows_at(self.steps + 1)
        return self.update_frequency if updates and GROWTH[self.growth].reads_gradient else None

    def scheduled_density(self, step: int | None = None) -> float:
        """Density in (0, 1] that a gradual method prunes to at a step; without one, at the present step."""
        assert self.prune_end_step is not None
        at = self.steps if step is None else step
        return gradual_density(at, self.prune_start_step, self.prune_end_step, self.init_density, self.final_density)

    def unfinished_pruning(self, end: int) -> str | None:
        """What to tell a user whose gradual pruning does not get to ``final_density``; None: it does, or there is none.

        The density changes in topology updates alone, and the last one may come before ``prune_end_step``.

        Args:
            end: last step that may end with an update.
        """
        last = self.schedule.last_shrink(end)
        if not (self._method.shrink and self.updates_enabled) or self.prune_end_step is None:
            return None
        if (last > self.steps and last >= self.prune_end_step) or not self.is_denser_than(self.final_density):
            return None
        updates = f"the last topology update is at step {last}" if last > self.steps else "no topology update comes"
        return (
            f"gradual pruning does not get to density {self.final_density}: its window ends at step "
            f"{self.prune_end_step}, and {updates} (one in {self.update_frequency} steps, {end} in all)"
        )

    def is_denser_than(self, density: float) -> bool:
        """Whether more weights are active than a budget of that density allows."""
        counts = self.active_counts()
        return sum(counts.values()) > active_count(sum(mask.numel() for mask in self.masks.values()), density)

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Zero every inactive weight and its optimizer state, in place."""
        for name, weight in self._parameters.items():
            self._dense_momentum.keep(name, weight, self.masks[name])
        self._zero(((name, self._weight_and_state(weight)) for name, weight in self._parameters.items()), self.masks)
        self._held.remember()

    @property
    def weights_are_masked(self) -> bool:
        """Whether inactive weights are known to be zero: nothing has written weights since, but through ``.data``."""
        return self._held.are_masked

    def _weight_and_state(self, weight: nn.Parameter) -> list[Tensor]:
        return [weight, *(state for _, state in per_weight_state(self.optimizer, weight))]

    def mask_gradients(self) -> None:
        """Zero the gradient of every inactive weight, in place; growth then refuses to read these gradients."""
        gradients = {name: weight.grad for name, weight in self._parameters.items() if weight.grad is not None}
        self._active_gradients.note(gradients)
        self._zero(((name, [gradient]) for name, gradient in gradients.items()), self.masks)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip gradients as ``torch.nn.utils.clip_grad_norm_`` does, but by the norm of those that move weights.

        Those of inactive weights are scaled along, for growth to read, and do not count: sparse execution computes them
        in few steps alone, and with them the norm would depend on the execution. A loss scaler unscales before.

        Args:
            max_norm: above this norm, gradients are scaled down to it.
            norm_type: the p of the norm; ``math.inf``: the largest magnitude.

        Returns:
            Norm, before, over active weights and all of the optimizer's parameters without a mask; one number.
        """
        self._check_has_model()
        masks = {weight: self.masks[name] for name, weight in self._parameters.items()}
        gradients = self._gradients()
        norms = [  # one by one: masked copies of all at once would take as much memory as the gradients
            torch.linalg.vector_norm(torch.where(masks[p], gradient, 0) if p in masks else gradient, norm_type)
            for p, gradient in gradients.items()
        ]
        if not norms:
            return torch.tensor(0.0)
        norm = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]), norm_type)
        clip_grads_with_norm_(list(gradients), max_norm, norm)
        return norm

    def note_active_gradient(self, name: str) -> None:
        """Take note that the coming backward pass computes one parameter's gradient for active weights alone.

        Growth refuses to read such gradients, as it would choose none but the weights just removed.
        """
        self._active_gradients.note_coming(name)

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything that changes during training: masks, counters, record of exploration, modes."""
        return {
            "masks": {name: mask.clone() for name, mask in self.masks.items()},
            "steps": self.steps,
            "explorations": self._explorations,
            "overdue": self._overdue,
            "prune_state": self._prune.state_dict() if isinstance(self._prune, Stateful) else None,
            "ever_active": {name: seen.clone() for name, seen in self._ever_active.items()},
            "off_mask_momentum": self._dense_momentum.state_dict(),
            "seed": self.seed,
        }

    def schema(self) -> Check:
        """What a :meth:`state_dict` for this model has to hold."""
        masks = record({name: like(mask) for name, mask in self.masks.items()}, exact=True)

        def check_ever_active(state: Mapping[str, Any], where: str) -> None:
            for name, mask in state["masks"].items():
                if (mask.cpu() & ~state["ever_active"][name].cpu()).any():
                    raise Mismatch(f"{inside(where, 'ever_active')}.{name} leaves out weights that are active")

        fields = {
            "masks": masks,
            "steps": Count,
            "explorations": Count,
            "overdue": bool,
            # None: the state at the start, or that of a run whose mode keeps none. Another mode's is not read.
            "prune_state": optional(self._prune.schema() if isinstance(self._prune, Stateful) else mapping(Any)),
            "ever_active": masks,
            "off_mask_momentum": DenseMomentum.schema(self._parameters),
            "seed": int,
        }
        whole = all_of(record(fields), check_ever_active)
        return lambda state, where: whole(_of_this_version(state), where)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a :meth:`state_dict`; call it after :meth:`add_module`.

        Load the model's weights after :meth:`add_module`, too: the first masks that it draws zero what they leave out.

        Raises:
            UsageError: if it is damaged, or that of another model; nothing is changed then.
        """
        self._check_has_model()
        try:
            conform(state, self.schema())
        except Mismatch as mismatch:
            raise UsageError(f"this state is damaged, or of another model: {mismatch}") from mismatch
        state = _of_this_version(state)
        for name, mask in self.masks.items():
            mask.copy_(state["masks"][name])
            self._ever_active[name].copy_(state["ever_active"][name])
        self.steps = state["steps"]
        self._explorations = state["explorations"]
        self._overdue = state["overdue"]
        self._prune = PRUNE[self.prune].begin()
        if isinstance(self._prune, Stateful) and state["prune_state"] is not None:
            self._prune.load_state_dict(state["prune_state"])
        self.seed = state["seed"]
        if self._tracks_momentum:
            self._dense_momentum.load_state_dict(state["off_mask_momentum"], self._parameters)
        self._held.forget()

    # ----------------------------------------------------------------------------------- topology updates

    @torch.no_grad()
    def _update_topology(self) -> None:
        explores = self.schedule.grows_at(self.steps)
        if explores:
            self._check_gradients()
        masks_more = self._reads_gradient and not explores and self._gradients_are_active()
        layers = self._layers()
        if self._method.shrink:
            self._method.shrink(layers, self.scheduled_density())
        if explores:
            self._explore(layers)
        self._settle(layers)
        if masks_more:
            self.mask_gradients()  # those of weights that are now inactive, too, or they would pass for dense ones

    def _explore(self, layers: list[Layer], prune_rate: float | None = None) -> None:
        """Prune and grow ``layers``; with a ``prune_rate`` of its own, apart from the state of periodic updates."""
        if prune_rate is None:
            prune, rate = self._prune, self.current_prune_rate()
        else:
            prune, rate = PRUNE[self.prune].begin(), prune_rate
        generator = torch.Generator(layers[0].mask.device)
        generator.manual_seed(derive_seed(self.seed, "growth", self._explorations))
        prune_and_grow(layers, prune, self.growth, self.redistribution, rate, generator)
        if GROWTH[self.growth].draws:
            for layer in layers:  # GPUs of different kinds draw differently from one seed
                distributed.broadcast(layer.mask)
        self._explorations += 1

    def _settle(self, layers: list[Layer]) -> None:
        """Apply masks that just changed, record them, and check that all ranks made the same change."""
        for mask, layer in zip(self.masks.values(), layers, strict=True):
            if layer.mask.data_ptr() != mask.data_ptr():  # a memory format that has no flat view
                mask.copy_(layer.mask.view(mask.shape))
        self.apply_masks()
        masks = _on_host(list(self.masks.values()))
        for seen, mask in zip(self._ever_active.values(), masks, strict=True):
            seen.logical_or_(mask)
        if distributed.world_size() > 1:
            prints = torch.stack([_fingerprint(_flat(mask, mask)) for mask in masks])
            if not distributed.all_equal(prints):
                raise FaultError(f"the ranks' masks differ after the topology update at step {self.steps}")

    def _layers(self) -> list[Layer]:
        """Flat views of every masked weight with what the chosen modes read.

        A mask whose weight has changed its memory format since is converted to it.
        """
        if frozen := [name for name, weight in self._parameters.items() if not weight.requires_grad]:
            raise UsageError(
                f"{frozen[0]} was frozen after add_module, and an update would prune it: freeze layers before, or stop "
                "updates by updates_enabled = False"
            )
        layers = []
        for name, weight in self._parameters.items():
            if self.masks[name].stride() != weight.stride():
                self.masks[name] = torch.empty_like(weight, dtype=torch.bool).copy_(self.masks[name])
            layer = Layer(
                weight=_flat(weight.detach(), weight),
                mask=_flat(self.masks[name], weight),
                neurons=weight.shape[0],
                is_classifier=name == self.classifier,
            )
            if self._reads_gradient:
                gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
                layer.gradient = _flat(gradient.detach(), weight)
            if self._reads_momentum:
                layer.momentum = _flat(self._dense_momentum.of(name, weight), weight)
            layers.append(layer)
        return layers

    def _check_gradients(self) -> None:
        """Refuse to explore by gradients that are not there, or not those of inactive weights."""
        if not self._reads_gradient:
            return
        if all(weight.grad is None for weight in self._parameters.values()):
            raise UsageError("the chosen modes read gradients: run a backward pass before")
        if self._gradients_are_active():
            raise UsageError(
                "the gradients at hand are those of active weights alone, and growth would find no others: before the "
                "backward pass that it reads, set dense_gradients of the network that sparse_execution returned; and "
                "neither call mask_gradients nor step with keep_gradients=False after it"
            )

    def _gradients_are_active(self) -> bool:
        return self._active_gradients.are_active(self._parameters, self.masks)

    def _check_has_model(self) -> None:
        if not self.masks:
            raise UsageError("there are no masks yet: call add_module first")

    def gradients_are_finite(self) -> bool:
        """Whether all gradients of the optimizer's parameters are finite; a loss scaler skips steps where not."""
        return math.isfinite(get_total_norm(self._gradients().values(), math.inf))

    def _gradients(self) -> dict[nn.Parameter, Tensor]:
        """Gradient of each of the optimizer's parameters that has one."""
        parameters = (parameter for group in self.optimizer.param_groups for parameter in group["params"])
        return {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}


def _flat(tensor: Tensor, reference: Tensor) -> Tensor:
    """Lay ``tensor`` out as one dimension, neuron by neuron: a view, if it has ``reference``'s memory format and that
    is contiguous or channels-last; else a copy."""
    if reference.dim() == 4 and reference.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(-1)


def _on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in main memory; those of a GPU come by one transfer, since each makes it wait."""
    if tensors[0].device.type == "cpu":
        return list(tensors)
    parts = torch.cat([tensor.flatten() for tensor in tensors]).cpu().split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _fingerprint(mask: Tensor) -> Tensor:
    """One integer that tells apart flat masks which differ anywhere, with overwhelming probability."""
    mixed = mask.nonzero().squeeze(1) + 1
    for factor in (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9):  # each position becomes an unrelated 64-bit number
        mixed = mixed * factor
        mixed = mixed.bitwise_xor(mixed >> 29)
    return mixed.sum()


def _of_this_version(state: Any) -> Any:
    """A :meth:`Masking.state_dict`, also of earlier versions, where every mode had a threshold."""
    if isinstance(state, Mapping) and "threshold" in state and "prune_state" not in state:
        return {**state, "prune_state": {"threshold": state["threshold"]}}
    return state


def _check_choice(name: str, value: str, table: Mapping[str, Any]) -> None:
    if value not in table:
        raise UsageError(f"{name} is one of {', '.join(table)}, not {value!r}")


def _whole(name: str, value: Any, kind: Any = Count) -> int:
    check_option(name, value, kind)
    return int(value)
