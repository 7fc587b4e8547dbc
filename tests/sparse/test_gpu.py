"""What runs on a GPU: the same networks as on a CPU, nothing that CUDA refuses, no waits in a step, few kernels.

The GPU is a pretended one (see ``helpers/pretended_gpu.py``); ``pytest --gpu`` takes the machine's own.
"""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from cifar_models import build_model

from sparselearning import Masking, prune_to_density, superpose, update_bn
from sparselearning.sparse.selection import SelectionError
from sparselearning.sparse.topology import GROWTH, PRUNE

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


# ------------------------------------------------------------------------------------------- the pretended GPU


def on(device):
    return torch.arange(6.0, device=device)


REFUSED = {
    "operands on two devices": lambda: on(CUDA) + on(CPU),
    "a list on two devices": lambda: torch.cat([on(CUDA), on(CPU)]),
    "a mask on the other device": lambda: on(CPU)[on(CUDA) > 2],
    "NumPy": lambda: on(CUDA).numpy(),
    "a generator on the CPU": lambda: torch.rand(3, device=CUDA, generator=torch.Generator()),
    "a generator on the GPU": lambda: torch.rand(3, generator=torch.Generator(CUDA)),
    "a backward pass on two devices": lambda: (on(CUDA).requires_grad_() * on(CUDA)).backward(on(CPU)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cuda_refuses_is_refused(gpu, name):
    with pytest.raises((RuntimeError, TypeError), match=r"same device|cpu|cuda"):
        REFUSED[name]()


WAITS = {
    "item": lambda t: t[0].item(),
    "bool": lambda t: bool(t[0]),
    "tolist": lambda t: t.tolist(),
    "to the CPU": lambda t: t.cpu(),
    "from the CPU": lambda t: torch.ones(6).to(t.device),
    "from a list": lambda t: torch.tensor([1.0], device=t.device),
    "copying over": lambda t: torch.ones(6).copy_(t),
    "nonzero": lambda t: t.nonzero(),
    "taking by mask": lambda t: t[t > 2],
    "putting by mask": lambda t: t.index_put_((t > 2,), torch.ones(3, device=t.device)),
    "equal": lambda t: torch.equal(t, t),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_counted(gpu, name):
    tensor = on(CUDA)
    with gpu.counting() as counts:
        WAITS[name](tensor)
    assert counts.waits.total() == 1, counts


KERNELS = {
    "views and allocations": (0, lambda t: torch.empty_like(t.view(2, 3).t()[0].detach())),
    "arithmetic": (3, lambda t: torch.zeros_like(t).add_(1).mul_(t)),
    "a fill by mask": (2, lambda t: t.masked_fill_(t > 2, 0)),
    "a copy that nothing waits for": (1, lambda t: torch.ones(6).to(t.device, non_blocking=True)),
    "a list of 200 tensors": (2, lambda t: torch._foreach_mul_([t] * 200, 2)),
    "two lists of 200 tensors": (4, lambda t: torch._foreach_mul_([t] * 200, [t] * 200)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_counted(gpu, name):
    launches, operation = KERNELS[name]
    tensor = on(CUDA)
    with gpu.counting() as counts:
        operation(tensor)
    assert (counts.launches.total(), counts.waits.total()) == (launches, 0), counts


def test_views_parameters_and_copies_lie_where_their_memory_does(gpu):
    model = build_model("cifar_resnet_8_8", 10, 3, 8).to(CUDA)
    assert {tensor.device for tensor in [*model.parameters(), *model.buffers()]} == {CUDA}
    assert {tensor.device for tensor in copy.deepcopy(model).state_dict().values()} == {CUDA}
    assert {tensor.cpu().device for tensor in model.parameters()} == {CPU}
    model(torch.ones(2, 3, 8, 8, device=CUDA)).sum().backward()
    assert {parameter.grad.device for parameter in model.parameters()} == {CUDA}
    assert next(model.parameters()).detach().view(-1)[:3].device == CUDA


# ------------------------------------------------------------------------------------------------- training

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, fused=True),
}


def make(device, optimizer="sgd", seed=1, **options):
    """A network of ten layers, its first gradients taken and its masks drawn, and its Masking."""
    torch.manual_seed(seed)
    model = build_model("cifar_resnet_8_8", 10, 3, 8).to(device, memory_format=torch.channels_last)
    masking = Masking(
        OPTIMIZERS[optimizer](model.parameters()), **({"init_density": 0.3, "final_density": 0.3} | options)
    )
    masking.add_module(model)
    return model, masking


def backward(model, number=0, scaler=None):
    generator = torch.Generator().manual_seed(number)
    device = next(model.parameters()).device
    images = torch.randn(4, 3, 8, 8, generator=generator).to(device, non_blocking=True)
    labels = torch.randint(10, (4,), generator=generator).to(device, non_blocking=True)
    loss = F.cross_entropy(model(images), labels)
    model.zero_grad()
    (scaler.scale(loss) if scaler else loss).backward()


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("growth", ["gradient", "momentum"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("keep_gradients", [True, False])
def test_a_plain_step_has_no_wait(gpu, optimizer, growth, fp16, keep_gradients):
    model, masking = make(CUDA, optimizer, growth=growth)
    scaler = torch.amp.GradScaler() if fp16 else None
    for number in range(2):
        with gpu.counting() as counts:
            backward(model, number, scaler)
            masking.step(scaler, keep_gradients=keep_gradients)
    assert not counts.waits, counts.waits


@pytest.mark.parametrize("keep_gradients", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masks_of_many_layers_take_one_kernel_of_a_plain_step(gpu, optimizer, keep_gradients):
    model, masking = make(CUDA, optimizer)
    for number in range(2):
        backward(model, number)
        with gpu.counting() as counts:
            masking.step(keep_gradients=keep_gradients)
    assert len(masking.masks) == 10
    of_the_optimizer = {"_fused_sgd_", "_fused_adam_", "_foreach_add_"}
    assert sum(launches for name, launches in counts.launches.items() if name not in of_the_optimizer) == 1


@pytest.mark.parametrize("change", ["an update", "by hand", "another tensor"])
def test_steps_after_a_change_of_masks_follow_the_new_ones(gpu, change):
    model, masking = make(CUDA, update_frequency=2)
    backward(model)
    masking.step(keep_gradients=False)
    before = {name: mask.clone() for name, mask in masking.masks.items()}
    for name, mask in before.items():
        if change == "by hand":
            masking.masks[name].copy_(~mask)
        elif change == "another tensor":
            masking.masks[name] = ~mask
    masking.apply_masks()
    for _ in range(3):
        backward(model)
        masking.step(keep_gradients=False)
    assert any(not torch.equal(mask, before[name]) for name, mask in masking.masks.items())
    for name, weight in masking.parameters.items():
        assert not weight.detach().masked_fill(masking.masks[name], 0).any(), name


def test_a_copy_follows_the_masks_that_it_loads(gpu):
    model, masking = make(CUDA)
    for _ in range(2):
        backward(model)
        masking.step(keep_gradients=False)
    copied = copy.deepcopy((model, masking))[1]
    _, other = make(CUDA, seed=2)
    state = other.state_dict()
    state["masks"] = {name: ~mask for name, mask in state["masks"].items()}
    state["ever_active"] = {name: torch.ones_like(seen) for name, seen in state["ever_active"].items()}
    copied.load_state_dict(state)
    copied.apply_masks()
    for name, weight in copied.parameters.items():
        assert not weight.detach().masked_fill(state["masks"][name], 0).any(), name


def same_gradients(*models):
    """Give networks on different devices the very same gradients."""
    backward(models[0])
    for model in models[1:]:
        for theirs, ours in zip(model.parameters(), models[0].parameters(), strict=True):
            theirs.grad = torch.empty_like(theirs).copy_(ours.grad)


@pytest.mark.parametrize(("prune", "growth"), [*itertools.product(PRUNE, GROWTH)])
def test_every_update_chooses_what_a_cpu_chooses(gpu, prune, growth):
    (here, masking), (there, other) = (
        make(device, prune=prune, growth=growth, redistribution="magnitude", update_frequency=1)
        for device in (CPU, CUDA)
    )
    for _ in range(2):
        same_gradients(here, there)
        masking.step()
        other.step()
    for name, mask in masking.masks.items():
        assert other.masks[name].device == CUDA
        assert torch.equal(other.masks[name].cpu(), mask), name


MODES = [
    *({"prune": prune} for prune in PRUNE if prune != "SET"),  # that looks at the signs of each layer
    *(
        {"growth": growth} for growth in GROWTH if growth != "momentum_neuron"
    ),  # that shares out over each one's neurons
    {"method": "GraNet", "init_density": 0.5, "prune_end_step": 4},
    {"method": "GraNet_uniform", "init_density": 0.5, "prune_end_step": 4},
]


@pytest.mark.parametrize("options", MODES, ids=lambda options: "-".join(map(str, options.values())))
def test_an_update_waits_as_often_for_ten_layers_as_for_one(gpu, options):
    model, masking = make(CUDA, update_frequency=2, **options)
    backward(model)
    masking.step()
    backward(model)
    with gpu.counting() as counts:
        masking.step()
    assert masking.density() == pytest.approx(masking.scheduled_density() if masking.prune_end_step else 0.3, abs=1e-3)
    assert counts.waits.total() <= 9, counts.waits
    assert counts.launches.total() <= 56 * len(masking.masks), counts.launches


def test_an_update_that_has_too_little_to_choose_from_is_an_error(gpu):
    model, masking = make(CUDA, update_frequency=1)
    backward(model)
    for parameter in model.parameters():
        parameter.grad.fill_(torch.nan)
    with pytest.raises(SelectionError, match=r"cannot choose \d+ weights where only 0 have a score"):
        masking.truncate_weights(0.5)


# ---------------------------------------------------------------------------------------------- superposing


def test_a_superposition_is_what_a_cpu_makes_and_seldom_waits(gpu):
    results = []
    for device in (CPU, CUDA):
        (model, masking), (other, _) = (make(device, seed=seed) for seed in (1, 2))
        batches = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(n)).to(device) for n in range(4)]
        with gpu.counting() as counts:
            averaged = superpose(model.state_dict(), other.state_dict(), 0.5)
            pruned, masks = prune_to_density(averaged, masking.masks, 0.2)
            model.load_state_dict(pruned)
            update_bn(batches, model)
        results.append([tensor.cpu() for tensor in [*model.state_dict().values(), *masks.values()]])
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(there, here)
    assert counts.waits.total() <= 1, counts.waits
    assert counts.launches.total() < 600, counts.launches
