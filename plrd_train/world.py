"""The ranks of this run: process groups, and errors that all of them share."""

import dataclasses
import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist

from plrd_train.errors import UserError
from plrd_train.heartbeat import Heartbeat
from plrd_train.heartbeat.hub import Hub
from plrd_train.heartbeat.spoke import Spoke
from plrd_train.network import choose_interface
from plrd_train.orphans import die_with_launcher

T = TypeVar("T")
# Loading, factoring and compiling a 7B parent keep ranks apart for long before the first step.
TIMEOUT = datetime.timedelta(minutes=30)


class SharedError(UserError):
    """A UserError that every rank raises alike, so that rank 0 alone needs to print it."""


@dataclass(frozen=True)
class World:
    """Who I am among the ranks, and where I compute. One process without a launcher is a world of one."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None  # of all ranks; None: the default one
    heartbeat: Heartbeat = field(default_factory=Heartbeat)

    @classmethod
    def open(cls) -> "World":
        """Join the process group that the launcher's environment describes (RANK, WORLD_SIZE, MASTER_ADDR, …), or make one of a single rank.

        From here on this process dies with its launcher, and with the other ranks. Raises UserError where ranks do not reach each other.
        """
        die_with_launcher()
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        if size > 1:
            choose_interface()
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore() if "MASTER_ADDR" not in os.environ else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        world = cls(rank, size, device)
        if size == 1:
            return world
        hub = Hub(size) if rank == 0 else None
        address = world.on_main(lambda: hub.address if hub else None)
        assert address is not None
        return dataclasses.replace(world, heartbeat=world.on_all(lambda: hub.start() if hub else Spoke(rank, address)))

    def beside(self) -> "World":
        """The same ranks over a group of their own on the CPU, for what another thread exchanges. A collective."""
        return dataclasses.replace(self, group=dist.new_group(backend="gloo", timeout=TIMEOUT))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def on_main(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 alone and give its (picklable) result to all; a UserError there is raised on every rank."""
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
        """Run `work`, which is no collective, on every rank and return its own result; a UserError on any of them is raised on every rank."""
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
        """Run `work`, which fills a cache of its node, on the first rank of each node, and then on the others; as `on_all` otherwise."""
        first = int(os.environ.get("LOCAL_RANK", 0)) == 0
        done = self.on_all(lambda: work() if first else None)
        return self.on_all(lambda: done if first else work())  # type: ignore[return-value]

    def share(self, value: T) -> list[T]:
        """The (small, picklable) `value` of every rank, in rank order, on every rank."""
        values: list = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' `tensor`, on its device, the same to the bit on every rank; nothing waits for it."""
        total = tensor.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def close(self) -> None:
        """Leave in order, rank 0 last."""
        dist.destroy_process_group()
        self.heartbeat.close()
