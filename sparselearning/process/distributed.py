"""The one file through which processes communicate. In a single process, every call is that of a run of one rank."""

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparselearning.process.errors import FaultError, UsageError, first_line
from sparselearning.process.signals import stop_with_parent

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def world_size() -> int:
    """Number of processes in the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0 to world size - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def start(use_cuda: bool) -> torch.device:
    """Join the process group that torchrun describes in the environment, if any, and choose this rank's device.

    NCCL carries GPU tensors and gloo CPU ones.

    Raises:
        UsageError: if this machine runs more processes than it has GPUs, or the environment describes none of them.
        FaultError: if the ranks cannot find each other.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun, killed outright, would leave its ranks behind
        stop_with_parent()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if use_cuda:
        check_gpus(local_world)
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        try:
            _join(backend, device, one_machine=local_world == world)
        except ValueError as error:
            raise UsageError(f"the environment does not say which of {world} processes this one is: {error}") from error
        except RuntimeError as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise FaultError(f"the {world} processes cannot find each other at {where}: {first_line(error)}") from error
    return device


def _join(backend: str, device: torch.device, one_machine: bool) -> None:
    store, number, world = next(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    if one_machine:
        # A restarted attempt finds a store that still holds the addresses of the attempt before: a prefix keeps them
        # apart. Each machine counts its own restarts, so several machines, which may differ, do without.
        store = dist.PrefixStore(f"attempt {restarts()}", store)
    dist.init_process_group(
        backend,
        store=store,
        rank=number,
        world_size=world,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )


def restarts() -> int:
    """How often the launcher has restarted the processes of this run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def remember(fact: str) -> None:
    """Let attempts of this job that torchrun starts later know something; called by one rank."""
    if (store := _launcher_store()) is not None:
        store.set(fact, "")


def remembers(fact: str) -> bool:
    """Whether this attempt or an earlier one of the same job has called :func:`remember` with it."""
    store = _launcher_store()
    return store is not None and store.check([fact])


def _launcher_store() -> dist.Store | None:
    """The store of torchrun itself, which ends with the job, not with an attempt; None without one."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=COLLECTIVE_TIMEOUT)


def check_gpus(processes: int) -> None:
    """Refuse more processes on this machine than it has GPUs.

    Raises:
        UsageError: if there are more.
    """
    if processes > torch.cuda.device_count():
        raise UsageError(
            f"{processes} processes were asked for on a machine with {torch.cuda.device_count()} GPU(s): "
            "start at most one process per GPU (--nproc_per_node), or train on the CPU with --no-cuda"
        )


@contextmanager
def main_first() -> Iterator[None]:
    """Let one process per machine run the block before the others, to download what they then read."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        barrier()
    yield
    if first:
        barrier()


def is_lost_contact(error: RuntimeError) -> bool:
    """Whether an error says that another rank has gone away or cannot be reached."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """Make backward passes average gradients over all ranks; one process's model comes back as it is."""
    if world_size() == 1:
        return model
    # BatchNorm statistics stay each rank's own while training (torch's buffers broadcast would overwrite all
    # ranks' with rank 0's at every forward pass) and are averaged after an epoch: see `average_buffers`.
    known = inspect.signature(DistributedDataParallel).parameters
    without_sync: Any = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    parallel = DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **without_sync,
    )
    if device.type == "cpu" and world_size() > 2:
        parallel.register_comm_hook(None, _average_in_rank_order)
    return parallel


def _average_in_rank_order(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket of gradients over the ranks, added up in rank order.

    Gloo adds up three or more numbers in an order that depends on their place in the bucket, and the buckets of the
    first backward pass are others than those of all later ones: a resumed run would differ in its first step.
    """
    own = bucket.buffer().div_(world_size())
    shares = [torch.empty_like(own) for _ in range(world_size())]

    def add_up(_: torch.futures.Future[Any]) -> Tensor:
        total = own.zero_()
        for share in shares:
            total.add_(share)
        return total

    return dist.all_gather(shares, own, async_op=True).get_future().then(add_up)


def without_data_parallel(model: nn.Module) -> nn.Module:
    """Return what a data-parallel wrapper wraps."""
    while isinstance(model, DistributedDataParallel | nn.DataParallel):
        model = model.module
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's own module inside data-parallel and compiled wrappers."""
    inner = without_data_parallel(model)
    compiled = getattr(inner, "_orig_mod", None)
    return unwrap(compiled) if isinstance(compiled, nn.Module) else inner


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add up ``tensor`` over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def min_over_ranks(number: int) -> int:
    """Return the smallest of the ranks' numbers."""
    return min(gather_objects(number))


def max_over_ranks(number: int) -> int:
    """Return the largest of the ranks' numbers."""
    return max(gather_objects(number))


def average_buffers(model: nn.Module) -> None:
    """Replace every floating-point buffer (BatchNorm statistics) by its mean over the ranks."""
    if world_size() == 1:
        return
    for buffer in unwrap(model).buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer.div_(world_size())


def broadcast(tensor: Tensor) -> Tensor:
    """Overwrite a contiguous ``tensor`` by rank 0's, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)
    return tensor


def broadcast_object(value: Any) -> Any:
    """Return rank 0's ``value`` on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(action: Callable[[], None]) -> None:
    """Let rank 0 do something while the others wait for it.

    Raises:
        UsageError, FaultError: on rank 0, if ``action`` does.
        SystemExit: on the other ranks then, with the same exit code: one rank tells the user.
    """
    error: UsageError | FaultError | None = None
    if is_main():
        try:
            action()
        except (UsageError, FaultError) as raised:
            error = raised
    exit_code = broadcast_object(error.exit_code if error else 0)
    if error:
        raise error
    if exit_code:
        sys.exit(exit_code)


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's ``value``, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_equal(value: Tensor) -> bool:
    """Whether all ranks hold the same integer tensor ``value``."""
    if world_size() == 1:
        return True
    bounds = torch.stack([value, -value])
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    return bool((bounds[0] == -bounds[1]).all())


def barrier() -> None:
    """Wait until all ranks are here."""
    if world_size() > 1:
        dist.barrier()


class AgreedFlag:
    """A number that any rank may raise and that all ranks see raised at the same step.

    Each :meth:`exchange` starts the exchange of the present value and returns what the previous one found, so that
    no step waits for the network. Ranks must call it in lockstep.
    """

    def __init__(self) -> None:
        self._group: Any = dist.new_group(backend="gloo") if world_size() > 1 else None
        self._pending: tuple[Any, Tensor] | None = None

    def exchange(self, value: int) -> int:
        """Offer ``value``; return the largest value that any rank offered at the previous call (0 at first)."""
        if self._group is None:
            return value
        seen = self.collect()
        tensor = torch.tensor(max(value, seen))
        self._pending = (dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group, async_op=True), tensor)
        return seen

    def collect(self) -> int:
        """Wait for the exchange under way, if any, and return its result."""
        if self._pending is None:
            return 0
        work, tensor = self._pending
        self._pending = None
        work.wait()
        return int(tensor)
