"""The ranks of this run: process groups, and errors that all of them share."""

import dataclasses
import datetime
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist

from plrd_train.errors import UserError
from plrd_train.runtime.heartbeat import Heartbeat
from plrd_train.runtime.heartbeat.hub import Hub
from plrd_train.runtime.heartbeat.spoke import Spoke
from plrd_train.runtime.network import choose_interface, wait_for_name
from plrd_train.runtime.orphans import die_with_launcher
from plrd_train.runtime.place import Place

T = TypeVar("T")
# Loading, factoring and compiling a 7B parent keep ranks apart for long before the first step.
TIMEOUT = datetime.timedelta(minutes=30)


class SharedError(UserError):
    """A UserError that every rank raises with the same message; rank 0 prints it."""


@dataclass(frozen=True)
class World:
    """This rank, the number of ranks, and this rank's device. One process without a launcher is a world of one."""

    rank: int
    size: int
    device: torch.device
    local_rank: int = 0  # among the ranks of this node
    group: dist.ProcessGroup | None = None  # of all ranks; None: the default one
    heartbeat: Heartbeat = field(default_factory=Heartbeat)

    @classmethod
    def open(cls, place: Place) -> "World":
        """Join the process group of the other ranks, or make one of a single rank where `place` is the only one.

        From here on this process dies with its launcher, and with the other ranks. Raises UserError where ranks do not
        reach each other, and where this node has no device for `place`.
        """
        if place.launched:
            die_with_launcher()
        rank, size = place.rank, place.size
        device = choose_device(place, torch.cuda.device_count() if torch.cuda.is_available() else 0)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        _join(place, "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        world = cls(rank, size, device, place.local_rank)
        if size == 1:
            return world
        assert place.master is not None
        hub = Hub(size, place.master) if rank == 0 else None
        address = world.on_main(lambda: hub.address if hub else None)
        assert address is not None
        return dataclasses.replace(world, heartbeat=world.on_all(lambda: hub.start() if hub else Spoke(rank, address)))

    def beside(self) -> "World":
        """The same ranks over a further gloo group, for the collectives of another thread. A collective."""
        return dataclasses.replace(self, group=dist.new_group(backend="gloo", timeout=TIMEOUT))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def on_main(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 alone and give its (picklable) result to all; a UserError there is raised on every
        rank."""
        box: list = [None, None]
        if self.is_main:
            try:
                box[0] = work()
            except UserError as error:
                box[1] = str(error)
        dist.broadcast_object_list(box, src=0, group=self.group, device=torch.device("cpu"))
        if box[1] is not None:
            raise SharedError(box[1])
        return box[0]

    def on_all(self, work: Callable[[], T]) -> T:
        """Run `work`, which is no collective, on every rank and return its own result; a UserError on any of them is
        raised on every rank."""
        result, failure = None, None
        try:
            result = work()
        except UserError as error:
            failure = str(error)
        for message in self.share(failure):
            if message is not None:
                raise SharedError(message)
        return result  # type: ignore[return-value]

    def node_by_node(self, work: Callable[[], T]) -> T:
        """As `on_all`, but on the first rank of each node before the others: `work` fills a cache of the node."""
        first = self.local_rank == 0
        done = self.on_all(lambda: work() if first else None)
        return self.on_all(lambda: done if first else work())  # type: ignore[return-value]

    def share(self, value: T) -> list[T]:
        """The (small, picklable) `value` of every rank, in rank order, on every rank."""
        values: list = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' `tensor`, on its device, bitwise the same on every rank. Does not synchronize the
        device."""
        total = tensor.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def close(self) -> None:
        """Leave in order, rank 0 last."""
        dist.destroy_process_group()
        self.heartbeat.close()


def choose_device(place: Place, gpus: int) -> torch.device:
    """One of this node's `gpus` GPUs for each of its ranks, or the CPU where there are none. Raises UserError where
    they are too few."""
    if gpus == 0:
        return torch.device("cpu")
    if place.local_rank >= gpus:
        raise UserError(
            f"LOCAL_RANK={place.local_rank}: each rank takes a GPU of its own, and this one sees {gpus}; "
            f"start at most {gpus} on this machine, or let CUDA_VISIBLE_DEVICES show more"
        )
    return torch.device("cuda", place.local_rank)


def _join(place: Place, backend: str) -> None:
    """Make the default process group. Raises UserError where the ranks do not meet."""
    if place.master is not None:
        wait_for_name(place.master)
        if place.size > 1:
            choose_interface(place.master)
    try:
        store = None if place.launched else dist.HashStore()
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=TIMEOUT)
    except dist.DistError as error:
        why = " ".join(str(error).partition("Exception raised")[0].split())  # behind it comes torch's stack
        raise UserError(
            f"rank {place.rank} of {place.size} does not meet the others at MASTER_ADDR={place.master} "
            f"MASTER_PORT={place.port} ({why}); start each rank once, on a free port that all reach, as torchrun does"
        ) from None
