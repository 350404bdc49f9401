"""DeepSpeed's ZeRO-3 as `zero3.py` needs it: started without a compiler, models partitioned as they are built, and
ended without a trace."""

import importlib
import inspect
import logging
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from plrd_train.compress.contracts import Architecture
from plrd_train.engine import Optimizer
from plrd_train.errors import UserError
from plrd_train.runtime.world import World


def prepare(world: World) -> None:
    """Join DeepSpeed to the process group that is there, without the collectives of its own, which would be compiled.

    Raises SharedError where DeepSpeed is not installed.
    """
    os.environ["DS_ACCELERATOR"] = world.device.type
    os.environ.setdefault("LOCAL_RANK", "0")  # without a launcher
    world.on_all(_import)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # One for each collective that DeepSpeed calls.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled, or fails where no compiler is
    deepspeed.init_distributed(dist_backend=deepspeed.get_accelerator().communication_backend_name(), verbose=False)


def _import() -> None:
    try:
        importlib.import_module("deepspeed")
    except ImportError:
        raise UserError(
            "engine=zero3: DeepSpeed is not installed here; pip install 'plrd-train[zero3]', or choose engine=fsdp"
        ) from None


def check_nvme(keys: Sequence[str]) -> None:
    """Raise UserError, which names these `keys` of the engine, where this node cannot compile what DeepSpeed reads and
    writes NVMe with. Not a collective."""
    from deepspeed.accelerator import get_accelerator

    if not get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible(verbose=False):
        raise UserError(
            f"engine.{' and engine.'.join(keys)}: nvme needs DeepSpeed's async_io, which is compiled on each node "
            "with the headers of libaio "
            "(Debian's libaio-dev); without them choose cpu"
        )


def build(architecture: Architecture, dtype: torch.dtype, config: Mapping[str, Any], device: torch.device) -> nn.Module:
    """The model of `architecture` with partitioned parameters of `dtype`, whose values are undefined; never more than
    one of them is whole."""
    from deepspeed.runtime.zero import Init

    with torch.device("meta"):
        model = architecture.build()
    for module in model.modules():
        module._buffers.update(
            {name: b if b is None else torch.empty_like(b, device=device) for name, b in module._buffers.items()}
        )
    architecture.refill(model)
    partitioned: dict[nn.Parameter, nn.Parameter] = {}  # a tied parameter stays one
    convert = Init(module=nn.Module(), config_dict_or_path=dict(config), param_swapper=_swapper(model, dtype, config))
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in partitioned:
                partitioned[parameter] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device))
                convert._convert_to_zero_parameters([partitioned[parameter]])
            if parameter is not None:
                module._parameters[name] = partitioned[parameter]
    return model


def _swapper(model: nn.Module, dtype: torch.dtype, config: Mapping[str, Any]) -> Any:
    """What keeps slices in files, or None where they stay in memory."""
    if config["zero_optimization"]["offload_param"]["device"] != "nvme":
        return None
    from plrd_train.engine._nvme import Swapper  # imports DeepSpeed

    return Swapper(
        config,
        dtype,
        largest=max(math.ceil(parameter.numel() / dist.get_world_size()) for parameter in model.parameters()),
    )


def in_file(parameter: Any) -> bool:
    """Whether the slice of this partitioned parameter stays in a file."""
    return parameter.ds_tensor.final_location == "nvme"


def forget(parameters: Iterable[Any]) -> None:
    """Let go of what was read ahead and not used: DeepSpeed's step updates a slice that is in memory there alone, and
    not in its file.

    No parameter may be whole.
    """
    for parameter in parameters:
        if in_file(parameter):
            parameter.nvme_swapper.synchronize_reads()
            parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])


class Started(torch.optim.Optimizer):
    """The optimizer that DeepSpeed holds from the building of a model on: it steps as the one does that was started
    last. DeepSpeed puts the slices into the groups, one buffer at a time, and looks for states in `state`."""

    def __init__(self, groups: list[dict[str, Any]]):
        super().__init__(groups, {"lr": 0.0})
        self._inner: torch.optim.Optimizer | None = None
        self.found_inf: torch.Tensor | None = None

    def start(self, optimizer: Optimizer, options: Sequence[Mapping[str, Any]]) -> None:
        """Begin anew with `optimizer`; `options` are those of each group."""
        placeholder = [nn.Parameter(torch.zeros(1, device=self.device())) for _ in options]
        self._inner = inner = optimizer.open(
            [{"params": [p], **o} for p, o in zip(placeholder, options, strict=True)], None
        )
        for group in inner.param_groups:
            group["params"] = []
        inner.state.clear()
        self.param_groups, self.state = inner.param_groups, inner.state

    @staticmethod
    def device() -> str:
        from deepspeed.accelerator import get_accelerator

        return get_accelerator().current_device_name()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert self._inner is not None, "step() before start()"
        self._inner.found_inf = self.found_inf  # type: ignore[attr-defined]
        self._inner.step()


def make_states(optimizer: Any, steps: int, states: Sequence[tuple[str, ...]]) -> None:
    """Give the optimizer below the ZeRO-3 `optimizer` the states of zero that it has after `steps` steps, by their
    names in each group."""
    inner = optimizer.optimizer
    for i, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        swapped = optimizer._swappable_optimizer_subgroup(i)  # on NVMe
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_in(i)
        inner.state[flat] = {
            "step": torch.tensor(float(steps), device=flat.device),
            **{part: torch.zeros_like(flat) for part in states[optimizer.sub_group_to_group_id[i]]},
        }
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_out(i)


def end(engine: Any) -> None:
    """Undo what keeps `engine`, a DeepSpeedEngine, and its model alive once the caller has let go of them: it must then
    collect the garbage.

    `destroy` alone leaves both in a list of root modules and in a cache. Nothing, where the process group has ended:
    then the process is about to.
    """
    if not dist.is_initialized():
        return
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    swapper = next(engine.module.parameters()).nvme_swapper
    if swapper is not None:
        swapper.end()
    engine.destroy()
    parameter_offload.FWD_MODULE_STACK.clear()
    cached = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release  # type: ignore[attr-defined]
    inspect.getclosurevars(cached).nonlocals["func"].cache_clear()  # an lru_cache below another decorator
