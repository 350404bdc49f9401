"""`engine=fsdp`: PyTorch FSDP2. Every parameter is a DTensor sharded by rows over the ranks; with `replicas` > 1,
HSDP."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from plrd_train.compress.blocks import blocks_of
from plrd_train.compress.contracts import Architecture, Decomposed
from plrd_train.engine import Group, Optimizer, State, Weights, check_shape, grouped, put_factors
from plrd_train.runtime.world import SharedError, World
from plrd_train.structure import parameters_of

WHOLE_MATRICES = True


@dataclass(frozen=True)
class Options:
    """`dtype` is that of the matrix products: bf16 (gradients reduced in float32, float32 masters) or fp32. `replicas`
    groups of ranks each hold the whole sharded model (HSDP: shard inside a node, replicate across). `compile` compiles
    each block."""

    dtype: Literal["bf16", "fp32"]
    replicas: int
    activation_checkpointing: bool
    compile: bool

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ValueError(f"replicas is {self.replicas}: it must be at least 1")


def open_engine(options: Options, world: World) -> "FSDP":
    return FSDP(options, world)


class FSDP:
    """The protocol `plrd_train.engine.Engine` over FSDP2. Parameters and optimizer states are float32 shards; the
    matrix products run in `dtype`."""

    model: nn.Module

    def __init__(self, options: Options, world: World):
        if world.size % options.replicas:
            raise SharedError(
                f"engine.replicas={options.replicas} does not divide the {world.size} ranks: choose a divisor"
            )
        self.options, self.world = options, world
        self.rank, self.world_size, self.device = world.rank, world.size, world.device
        shape = (options.replicas, world.size // options.replicas)
        mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))
        self._mesh = mesh if options.replicas > 1 else mesh["shard"]
        self._host_mesh = mesh if world.device.type == "cpu" else init_device_mesh("cpu", shape)
        self._shard, self._replicate = mesh["shard"], mesh["replicate"]
        self._optimizer: torch.optim.Optimizer | None = None
        self._groups: dict[str, Group] = {}  # of each parameter

    # The structure

    def load(self, architecture: Architecture, weights: Weights) -> None:
        self.build(architecture)
        self.world.on_all(lambda: self._fill(weights))

    def build(self, architecture: Architecture) -> None:
        self._optimizer = None  # its states belong to parameters that end here
        self.model = self._new(architecture)

    def _fill(self, weights: Weights) -> None:
        for name, parameter in self._parameters():
            check_shape(weights, name, parameter.shape)
            local = parameter.to_local()
            start = min(self._chunk(parameter.shape[0]) * self._shard.get_local_rank(), parameter.shape[0])
            with torch.no_grad():
                local.copy_(weights.read(name, slice(start, start + local.shape[0])))

    def rebuild(self, architecture: Architecture, factors: Mapping[str, Decomposed]) -> None:
        self._reshard()
        old = {name: parameter.to_local().detach() for name, parameter in self._parameters()}
        put_factors(old, factors)
        self.build(architecture)
        with torch.no_grad():
            for name, parameter in self._parameters():
                parameter.to_local().copy_(old.pop(name))

    def _parameters(self) -> Iterator[tuple[str, DTensor]]:
        """The parameters by name, tied ones once, as `fully_shard` has left them."""
        return ((name, cast(DTensor, parameter)) for name, parameter in self.model.named_parameters())

    def _new(self, architecture: Architecture) -> nn.Module:
        with torch.device("meta"):
            model = architecture.build()
        mixed = (
            MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            if self.options.dtype == "bf16"
            else MixedPrecisionPolicy()
        )
        for block in blocks_of(model).values():  # the units that are sharded, checkpointed and compiled
            if self.options.compile:
                block.compile()
            fully_shard(block, mesh=self._mesh, mp_policy=mixed)
        fully_shard(model, mesh=self._mesh, mp_policy=mixed)
        model.to_empty(device=self.device)
        architecture.refill(model)
        if self.options.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]  # a method of transformers' models
        return model.requires_grad_(True)

    def _reshard(self) -> None:
        """Free the gathered parameters that a forward without a backward leaves behind, so that `to_local` is the shard
        again."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    # One weight to one rank, and back

    def _chunk(self, rows: int) -> int:
        """Rows of a shard, but for the last ones, which may have fewer or none."""
        return math.ceil(rows / self._shard.size())

    def _padded(self, local: Tensor, rows: int) -> Tensor:
        missing = self._chunk(rows) - local.shape[0]
        return torch.cat([local, local.new_zeros(missing, *local.shape[1:])]) if missing else local.contiguous()

    def _row_of(self, owner: int) -> bool:
        """Whether this rank belongs to the group that shards the copy of the model which `owner` is part of."""
        return owner // self._shard.size() == self.rank // self._shard.size()

    def gather(self, name: str, owner: int) -> Callable[[], Tensor | None]:
        self._reshard()
        parameter = cast(DTensor, self.model.get_parameter(name))
        return self._gather(parameter.to_local().detach(), parameter.shape[0], owner)

    def _gather(self, local: Tensor, rows: int, owner: int) -> Callable[[], Tensor | None]:
        """Begin to send the shard `local` of a tensor of so many rows; the function that ends it returns the whole
        tensor on `owner`."""
        if not self._row_of(owner):
            return lambda: None
        local = self._padded(local, rows)
        parts = [torch.empty_like(local) for _ in range(self._shard.size())] if owner == self.rank else None
        work = dist.gather(local, parts, dst=owner, group=self._shard.get_group(), async_op=True)

        def end() -> Tensor | None:
            work.wait()
            return torch.cat(parts)[:rows] if parts is not None else None

        return end

    def scatter(self, tensor: Tensor | None, shape: tuple[int, ...], owner: int) -> Tensor:
        chunk, size = self._chunk(shape[0]), self._shard.size()
        local = torch.empty(chunk, *shape[1:], device=self.device)
        if self._row_of(owner):
            parts = None
            if tensor is not None:
                padded = torch.cat([tensor, tensor.new_zeros(chunk * size - shape[0], *shape[1:])])
                parts = list(padded.split(chunk))
            dist.scatter(local, parts, src=owner, group=self._shard.get_group())
        if self.options.replicas > 1:
            source = owner // size * size + self._shard.get_local_rank()  # the rank of my column in the owner's row
            dist.broadcast(local, src=source, group=self._replicate.get_group())
        start = min(chunk * self._shard.get_local_rank(), shape[0])
        return local[: min(chunk, shape[0] - start)]

    def share(self, value: object) -> list:
        return self.world.share(value)

    # Training

    def _on_whole(
        self,
        parameters: Sequence[Tensor],
        shard_of: Callable[[Tensor], Tensor],
        compute: Callable[[Tensor], Tensor],
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See `plrd_train.engine.OnWhole`. The largest come first, and are dealt one a rank a round: the ranks compute
        at the same time, on tensors of about the same size."""
        order = sorted(parameters, key=lambda parameter: -parameter.numel())
        for start in range(0, len(order), self.world_size):
            dealt = list(enumerate(order[start : start + self.world_size]))
            ends = [self._gather(shard_of(parameter), parameter.shape[0], owner) for owner, parameter in dealt]
            wholes = [end() for end in ends]
            results = [compute(whole) if whole is not None else None for whole in wholes]
            for (owner, parameter), result in zip(dealt, results, strict=True):
                yield parameter, self.scatter(result, tuple(parameter.shape), owner)

    def start(self, optimizer: Optimizer, steps: int = 0, state: State | None = None) -> None:
        self._reshard()  # else the optimizer would get, and step, the gathered copies that an evaluation left behind
        parameters = dict(self._parameters())
        self._groups = {parameter.name: optimizer.group(parameter) for parameter in parameters_of(self.model)}
        groups = [
            {"params": [parameters[name] for name in names], **group.options} for group, names in grouped(self._groups)
        ]
        self._optimizer = optimizer.open(groups, self._on_whole)
        if state is None:
            return
        for name, parameter in parameters.items():
            kept = self._optimizer.state[parameter] = {"step": torch.tensor(float(steps), device=self.device)}
            for part in self._groups[name].state:
                kept[part] = torch.zeros_like(parameter)
                cast(DTensor, kept[part]).to_local().copy_(state[part][name])

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float, clip: float, refuse: Tensor) -> Tensor:
        assert self._optimizer is not None, "step() before start()"
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        # The optimizer leaves a refused step out on the device: nothing waits for the verdict here.
        self._optimizer.found_inf = (refuse | ~norm.isfinite()).float()  # type: ignore[attr-defined]
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    # The weights as they are

    def params(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def snapshot(self) -> dict[str, Tensor]:
        self._reshard()
        return {name: parameter.to_local().detach().to("cpu", copy=True) for name, parameter in self._parameters()}

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        self._reshard()
        with torch.no_grad():
            for name, parameter in self._parameters():
                parameter.to_local().copy_(snapshot[name])

    def tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        self._reshard()
        for name, parameter in self._parameters():
            whole = self._gather(parameter.to_local().detach(), parameter.shape[0], owner=0)()
            yield name, whole.cpu() if whole is not None else None

    # Checkpoints

    def state(self) -> dict[str, dict[str, Tensor]]:
        assert self._optimizer is not None, "state() before start()"
        self._reshard()
        found: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self._parameters():
            kept = self._optimizer.state.get(parameter)
            for part in self._groups[name].state:
                found.setdefault(part, {})[name] = (
                    kept[part].to_local().to("cpu", copy=True)
                    if kept
                    else torch.zeros_like(parameter.to_local(), device="cpu")
                )
        return found

    def sharded(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        placements = [Replicate(), Shard(0)]
        return {
            name: DTensor.from_local(
                shards[name],
                self._host_mesh,
                placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
            for name, parameter in self._parameters()
            if name in shards
        }
