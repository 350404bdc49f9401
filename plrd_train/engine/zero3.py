"""`engine=zero3`: DeepSpeed ZeRO-3. Every parameter is flattened and cut into equal slices, one a rank, the last ones
padded with zeros."""

import gc
import math
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from plrd_train.compress.contracts import Architecture, Decomposed
from plrd_train.engine import (
    Group,
    Optimizer,
    State,
    Weights,
    _deepspeed,
    check_shape,
    grouped,
    put_factors,
)
from plrd_train.runtime.world import SharedError, World
from plrd_train.structure import parameters_of

WHOLE_MATRICES = False  # a slice begins and ends anywhere in a row


@dataclass(frozen=True)
class Options:
    """`dtype` is that of parameters and matrix products: bf16 (gradients reduced in float32, float32 masters) or fp32.
    `offload_optimizer` is where the float32 masters and optimizer states stay; `offload_params` is where the slices of
    the parameters stay while they are not needed; nvme: in files below `nvme_path`, what is smaller than 1 MiB in host
    memory. The sizes are DeepSpeed's settings of these names, in elements."""

    dtype: Literal["bf16", "fp32"]
    activation_checkpointing: bool
    offload_optimizer: Literal["none", "cpu", "nvme"]
    offload_params: Literal["none", "cpu", "nvme"]
    nvme_path: str | None
    reduce_bucket_size: int
    prefetch_bucket_size: int
    param_persistence_threshold: int

    def __post_init__(self) -> None:
        if self.on_nvme and self.nvme_path is None:
            raise ValueError(f"{self.on_nvme[0]}=nvme needs nvme_path, a folder on a fast disk of each node")
        for name, least in (("reduce_bucket_size", 1), ("prefetch_bucket_size", 0), ("param_persistence_threshold", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {least}")

    @property
    def on_nvme(self) -> list[str]:
        """The settings that put something on NVMe."""
        return [name for name in ("offload_optimizer", "offload_params") if getattr(self, name) == "nvme"]


def open_engine(options: Options, world: World) -> "Zero3":
    _deepspeed.prepare(world)
    if options.on_nvme:
        world.on_all(lambda: _deepspeed.check_nvme(options.on_nvme))
    return Zero3(options, world)


class Zero3:
    """The protocol `plrd_train.engine.Engine` over DeepSpeed ZeRO-3. A shard is a rank's flat float32 slice of a
    parameter, padding included."""

    model: Any  # a Hugging Face model

    def __init__(self, options: Options, world: World):
        self.options, self.world = options, world
        self.rank, self.world_size, self.device = world.rank, world.size, world.device
        self._dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
        self._mesh = init_device_mesh("cpu", (world.size,))
        self._deepspeed: Any = None  # the DeepSpeedEngine; there is one from the first load on
        self._free: Callable[[], object] = lambda: None
        self._groups: dict[str, Group] = {}  # of each parameter
        kinds = {
            "offload_optimizer": "optimizer",
            "offload_params": {"bf16": "bfloat16params", "fp32": "float32params"}[options.dtype],
        }
        # Where DeepSpeed puts the files.
        self._swapped = [
            Path(options.nvme_path or "") / "zero_stage_3" / kinds[key] / f"rank{world.rank}" for key in options.on_nvme
        ]
        for folder in self._swapped:
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    def _config(self) -> dict[str, Any]:
        options, pinned = self.options, self.device.type == "cuda"
        return {
            "train_micro_batch_size_per_gpu": 1,  # asked for, but of no effect: the caller decides when to step
            "managed_gradient_accumulation": False,
            "bf16": {"enabled": options.dtype == "bf16"},
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,  # `_deepspeed.Started` is none that DeepSpeed knows
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {
                    "device": options.offload_optimizer,
                    "nvme_path": options.nvme_path,
                    "pin_memory": pinned,
                },
                "offload_param": {
                    "device": options.offload_params,
                    "nvme_path": options.nvme_path,
                    # by default the slices of a billion elements stay in memory and none of them is in a file
                    "max_in_cpu": 0,
                    "pin_memory": pinned,
                },
                "reduce_bucket_size": options.reduce_bucket_size,
                "stage3_prefetch_bucket_size": options.prefetch_bucket_size,
                "stage3_param_persistence_threshold": options.param_persistence_threshold,
            },
        }

    # The structure

    def load(self, architecture: Architecture, weights: Weights) -> None:
        self.build(architecture)
        self.world.on_all(lambda: self._fill(weights))

    def _fill(self, weights: Weights) -> None:
        for name, parameter in self._parameters():
            shape = parameter.ds_shape
            check_shape(weights, name, shape)
            # The rows that cover this rank's slice, which may begin and end inside one.
            row, (start, stop) = math.prod(shape[1:]), self._slice(shape)
            rows = slice(start // row, -(-stop // row))
            flat = weights.read(name, rows).flatten()[start - rows.start * row : stop - rows.start * row]
            self._write(parameter, self._padded(flat.float(), shape))
        self._publish()

    def rebuild(self, architecture: Architecture, factors: Mapping[str, Decomposed]) -> None:
        old = self.snapshot()
        put_factors(old, factors)
        self.build(architecture)
        self.restore(old)

    def build(self, architecture: Architecture) -> None:
        import deepspeed

        self._end()
        config = self._config()
        self.model = _deepspeed.build(architecture, self._dtype, config, self.device)
        if self.options.activation_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        parameters = [parameter for _, parameter in self._parameters()]
        groups = [
            {"params": [p for p in parameters if len(p.ds_shape) > 1]},
            {"params": [p for p in parameters if len(p.ds_shape) <= 1]},
        ]
        self._deepspeed, *_ = deepspeed.initialize(
            model=self.model, optimizer=_deepspeed.Started(groups), config=config
        )
        # Another engine may follow this one in the same process.
        self._free = free = weakref.finalize(self, _deepspeed.end, self._deepspeed)
        free.atexit = False  # the process group has ended then

    def _end(self) -> None:
        """Free the model with its optimizer."""
        self._free()
        self._deepspeed = self.model = None
        gc.collect()  # they hold one another
        for folder in self._swapped:
            shutil.rmtree(folder, ignore_errors=True)

    def _parameters(self) -> Iterator[tuple[str, Any]]:
        """The partitioned parameters, tied ones once: DeepSpeed gives each its `ds_shape`, `ds_numel` and
        `ds_tensor`."""
        return self.model.named_parameters()

    # One weight to one rank, and back

    def _chunk(self, shape: tuple[int, ...]) -> int:
        """Elements of a shard, padding included."""
        return math.ceil(math.prod(shape) / self.world_size)

    def _slice(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Where this rank's slice of a flattened parameter begins and ends; the last ranks may have none."""
        size, chunk = math.prod(shape), self._chunk(shape)
        return min(chunk * self.rank, size), min(chunk * (self.rank + 1), size)

    def _padded(self, flat: Tensor, shape: tuple[int, ...]) -> Tensor:
        return torch.cat([flat, flat.new_zeros(self._chunk(shape) - len(flat))])

    def gather(self, name: str, owner: int) -> Callable[[], Tensor | None]:
        return self._gather(self.model.get_parameter(name), owner)

    def _gather(self, parameter: Any, owner: int) -> Callable[[], Tensor | None]:
        shard = self._read(parameter).contiguous()
        parts = [torch.empty_like(shard) for _ in range(self.world_size)] if owner == self.rank else None
        work = dist.gather(shard, parts, dst=owner, async_op=True)

        def end() -> Tensor | None:
            work.wait()
            return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape) if parts is not None else None

        return end

    def scatter(self, tensor: Tensor | None, shape: tuple[int, ...], owner: int) -> Tensor:
        chunk = self._chunk(shape)
        shard = torch.empty(chunk, device=self.device)
        parts = None
        if tensor is not None:
            flat = tensor.flatten()
            parts = list(torch.cat([flat, flat.new_zeros(chunk * self.world_size - len(flat))]).split(chunk))
        dist.scatter(shard, parts, src=owner)
        return shard

    def share(self, value: object) -> list:
        return self.world.share(value)

    # Training

    def start(self, optimizer: Optimizer, steps: int = 0, state: State | None = None) -> None:
        self._groups = {
            parameter.name: optimizer.group(parameter)
            for parameter in parameters_of(self.model, lambda parameter: cast(Any, parameter).ds_shape)
        }
        # Slices of matrices lie in one buffer, all others in another (see `build`): each must be one group.
        is_matrix = {name: len(parameter.ds_shape) > 1 for name, parameter in self._parameters()}
        kinds = [grouped({n: g for n, g in self._groups.items() if is_matrix[n] == kind}) for kind in (True, False)]
        if any(len(kind) > 1 for kind in kinds):
            raise SharedError(
                "optimizer: engine=zero3 treats all matrices alike, and all vectors; this one does not: choose "
                "engine=fsdp or optimizer=adamw"
            )
        parts = [kind[0][0] for kind in kinds if kind]
        self._deepspeed.basic_optimizer.start(optimizer, [group.options for group in parts])
        if state is None:
            return
        _deepspeed.make_states(self._deepspeed.optimizer, steps, [group.state for group in parts])
        for name, parameter in self._parameters():
            for part in self._groups[name].state:
                self._deepspeed.optimizer.set_local_hp_param(state[part][name], parameter, part)

    def backward(self, loss: Tensor) -> None:
        # What DeepSpeedEngine.forward does around the model, which callers call itself.
        self._deepspeed.optimizer.clear_backward_seen_flag()
        self._deepspeed._backward_prologue()
        self._deepspeed.backward(loss)

    def step(self, lr: float, clip: float, refuse: Tensor) -> Tensor:
        optimizer = self._deepspeed.optimizer
        optimizer.set_lr(lr)
        optimizer.clip_grad = clip
        self._deepspeed.basic_optimizer.found_inf = refuse.float()
        if self.options.offload_params == "nvme":
            self._publish()  # a step updates a slice that was read ahead in memory alone
        self._deepspeed.step()  # which leaves one whose norm is not finite out by itself
        return torch.as_tensor(self._deepspeed.get_global_grad_norm(), device=self.device)

    # The weights as they are

    def params(self) -> int:
        return sum(parameter.ds_numel for _, parameter in self._parameters())

    def _read(self, parameter: Any) -> Tensor:
        """This rank's shard, on the device."""
        return self._deepspeed.optimizer.get_local_fp32_param(parameter)

    def _write(self, parameter: Any, shard: Tensor) -> None:
        """Set this rank's shard; it is computed with after `_publish`."""
        self._deepspeed.optimizer.set_local_hp_param(shard, parameter)
        if _deepspeed.in_file(parameter):
            parameter.nvme_swapper.swap_out_partitioned_params([parameter], [shard])
        else:
            parameter.ds_tensor.data.copy_(shard)

    def _publish(self) -> None:
        """Drop parameters that are whole at the moment, and slices that were read ahead: they are gathered anew from
        the shards."""
        self._deepspeed.empty_partition_cache()
        _deepspeed.forget(parameter for _, parameter in self._parameters())

    def snapshot(self) -> dict[str, Tensor]:
        return {name: self._read(parameter).detach().to("cpu", copy=True) for name, parameter in self._parameters()}

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters():
                self._write(parameter, snapshot[name].float())
        self._publish()

    def tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        for name, parameter in self._parameters():
            whole = self._gather(parameter, owner=0)()
            yield name, whole.cpu() if whole is not None else None

    # Checkpoints

    def state(self) -> dict[str, dict[str, Tensor]]:
        made = bool(self._deepspeed.basic_optimizer.state)
        found: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self._parameters():
            for part in self._groups[name].state:
                found.setdefault(part, {})[name] = (
                    self._deepspeed.optimizer.get_local_fp32_param(parameter, part).to("cpu", copy=True)
                    if made
                    else torch.zeros(self._chunk(parameter.ds_shape))
                )
        return found

    def sharded(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._parameters():
            if name not in shards:
                continue
            start, stop = self._slice(parameter.ds_shape)
            size = torch.Size([parameter.ds_numel])
            tensors[name] = DTensor.from_local(
                shards[name][: stop - start], self._mesh, [Shard(0)], run_check=False, shape=size, stride=(1,)
            )
        return tensors
