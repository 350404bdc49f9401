"""Memory of `engine=zero3`, after the source of DeepSpeed (0.19) and of plrd_train/engine/zero3.py.

A rank keeps its slices of the parameters in the dtype of the products, of float32 masters, of float32 gradients (one
flat buffer, always there), and of the optimizer's state: with AdamW 18 bytes a parameter over the ranks in bf16, 20 in
fp32, and the bucket in which gradients wait to be reduced. In its step the optimizer works on a copy of the gradients,
and on the roots of the second moments, for at most a sub-group of 1e9 elements at a time.

Parameters are gathered module by module, and with each module `prefetch_bucket_size` elements ahead of their use, up to
1e9 that are whole at once. A module gives them back unless they are needed again within 1e9 elements (DeepSpeed's
max_reuse_distance). Those of the last blocks would so stay from their forward to their backward; but where an
evaluation came before, DeepSpeed goes on giving back in a forward what an evaluation does not need again (it never
clears that cache). A stage is evaluated before it is trained, unless it is resumed in its middle: only then they stay.
"""

from collections.abc import Iterator, Sequence

from plrd_train.engine import Optimizer
from plrd_train.engine.zero3 import Options
from plrd_train.plan.trace import Event
from plrd_train.structure import Parameter, Parts, Structure, add, largest

REUSE_DISTANCE = 1_000_000_000  # DeepSpeed's max_reuse_distance, in elements
LIVE = 1_000_000_000  # DeepSpeed's max_live_parameters: beyond so many elements nothing is gathered ahead
SUB_GROUP = 1_000_000_000  # DeepSpeed's sub_group_size, in elements of a rank
NVME_BUFFERS = 4  # DeepSpeed's buffer_count: what of an optimizer on NVMe is in memory, in sub-groups of float32
NVME_SLICES = (
    6  # what parameters on NVMe are read into (DeepSpeed's buffer_count of these) and written from, in largest slices
)
NVME_LEAST = 2**20  # bytes of the smallest slice that is in a file


class Memory:
    """`device` is "cpu" or "cuda". The largest share, that of the first rank, is what counts."""

    def __init__(self, options: Options, optimizer: Optimizer, world_size: int, device: str):
        self.options, self.shards, self._optimizer = options, world_size, optimizer
        self.width = {"bf16": 2, "fp32": 4}[options.dtype]
        self._on_cpu = device == "cpu"
        self._offloaded = options.offload_optimizer != "none"

    def shard(self, shape: tuple[int, ...]) -> int:
        """Elements of a rank's slice."""
        return -(-Parameter("", shape, "", "").numel // self.shards)

    def _kept(self, model: Structure) -> float:
        return sum(self.shard(parameter.shape) for parameter in model.parameters)

    def state(self, model: Structure) -> int:
        """Elements of the first rank's slices of what the optimizer keeps."""
        return sum(
            len(self._optimizer.group(parameter).state) * self.shard(parameter.shape) for parameter in model.parameters
        )

    def _sub_group(self, model: Structure) -> float:
        return min(self._kept(model), SUB_GROUP)

    def persistent(self, parameter: Parameter) -> bool:
        """Whether DeepSpeed keeps it whole on each rank."""
        return parameter.numel < self.options.param_persistence_threshold

    def resident(self, model: Structure, *, optimizer: bool) -> Parts:
        """What stays between steps; `optimizer`: a step has been made since the structure changed."""
        kept = self._kept(model)
        parts = {"parameters": 0.0, "gradients": 4.0 * self.options.reduce_bucket_size, "optimizer": 0.0}
        if self.options.offload_params == "none":
            parts["parameters"] += self.width * kept
        if self.shards > 1:
            parts["parameters"] += self.width * sum(
                parameter.numel for parameter in model.parameters if self.persistent(parameter)
            )
        if not self._offloaded:
            parts["parameters"] += 4 * kept
            parts["gradients"] += 4 * kept
            parts["optimizer"] += 4 * self.state(model) if optimizer else 0
        return parts

    def host(self, model: Structure) -> Parts:
        """What offloading moves to host memory, the optimizer's step included."""
        kept, sub_group, parts = self._kept(model), self._sub_group(model), Parts()
        if self.options.offload_params == "cpu":
            parts["parameters"] = self.width * kept
        elif self.options.offload_params == "nvme":
            slices = [self.width * self.shard(parameter.shape) for parameter in model.parameters]
            small = sum(size for size in slices if size < NVME_LEAST)
            # Those of parameters that are whole at the moment.
            whole = min(sum(slices) - small, self.width * LIVE / self.shards)
            parts["parameters"] = small + whole + NVME_SLICES * max(slices)
        if self._offloaded:
            parts["gradients"] = 8 * kept  # the flat buffer, and those that the optimizer reads
            parts["optimizer"] = 8 * sub_group  # what a step computes in
        if self.options.offload_optimizer == "cpu":
            parts["optimizer"] += 4 * (kept + self.state(model))
        elif self.options.offload_optimizer == "nvme":
            parts["optimizer"] += NVME_BUFFERS * 4 * sub_group
        return parts

    def holder(
        self, model: Structure, events: Sequence[Event], *, accumulated: bool = False, resumed: bool = False
    ) -> "Holder":
        """For these events. Gradients that a micro-batch before has left are in `resident`."""
        return Holder(self, model, events, resumed)

    def update(self, model: Structure) -> Parts:
        """What the optimizer's step holds beside `resident`."""
        if self._offloaded:
            return {}
        return {
            "gradients": 4 * self._sub_group(model),
            "optimizer": (8 if self._on_cpu else 4) * self._sub_group(model),
        }

    def rebuilt(self, old: Structure, new: Structure, factors: float, *, optimizer: bool) -> tuple[Parts, Parts]:
        """(device, host) while the structure changes: a copy of the old model on the host, the shards of the new
        factors, of `factors` bytes, and the old engine or the new one, whichever is larger."""
        engine = largest(self.resident(old, optimizer=optimizer), self.resident(new, optimizer=False))
        snapshot = {"snapshot": 4 * self._kept(old)}
        return engine | {"factorization": factors}, add(self.host(old), snapshot)


class Holder:
    """See `plrd_train.plan.replay.Holder`."""

    def __init__(self, memory: Memory, model: Structure, events: Sequence[Event], resumed: bool):
        self._memory, self._model, self._resumed = memory, model, resumed
        self._by_name = {parameter.name: parameter for parameter in model.parameters}
        used = [event for event in events if self._uses(event)]
        self._order = [model.modules[event.name] for event in used]
        self._forwards = next((i for i, event in enumerate(used) if event.kind == "backward"), len(used))
        self._step = 0
        self._next = 0  # of the order, the first module that is not prefetched
        self._whole: set[str] = set()
        self._bucket = 0  # elements that wait to be reduced
        self._outside = 0  # of these, elements of gradients that do not fit the bucket

    def held(self) -> Parts:
        return {
            "gathered": self._memory.width * sum(self._by_name[name].numel for name in self._whole),
            "gradients": self._memory.width * self._outside,
        }

    def _uses(self, event: Event) -> bool:
        return event.kind in ("forward", "backward") and event.name in self._model.modules

    def on(self, event: Event) -> Iterator[Parts]:
        if event.kind == "gradient":
            yield from self._accumulate(self._by_name[event.name])
        elif event.kind == "backwarded" and event.name == "":
            yield from self._reduce()
        elif self._uses(event) and self._memory.shards > 1:
            yield from self._gather(self._model.modules[event.name])
            self._step += 1
            yield from self._gather(self._ahead())
        elif event.kind in ("forwarded", "backwarded") and event.name in self._model.modules:
            self._release(self._model.modules[event.name])

    def _gather(self, parameters: Sequence[Parameter]) -> Iterator[Parts]:
        missing = [p for p in dict.fromkeys(parameters) if p.name not in self._whole and not self._memory.persistent(p)]
        self._whole.update(parameter.name for parameter in missing)
        if len(missing) > 1:  # received together, and then copied out one by one
            yield self.held() | {
                "gathered": self.held()["gathered"] + self._memory.width * sum(parameter.numel for parameter in missing)
            }

    def _ahead(self) -> list[Parameter]:
        """What is gathered ahead of its use."""
        chosen: list[Parameter] = []
        self._next = max(self._next, self._step)
        elements, room = (
            0,
            min(
                self._memory.options.prefetch_bucket_size, LIVE - sum(self._by_name[name].numel for name in self._whole)
            ),
        )
        while self._next < len(self._order) and elements < room:
            new = [
                p
                for p in self._order[self._next]
                if p.name not in self._whole and not self._memory.persistent(p) and p not in chosen
            ]
            chosen += new
            elements += sum(parameter.numel for parameter in new)
            self._next += 1
        return chosen

    def _release(self, parameters: Sequence[Parameter]) -> None:
        if not parameters:
            return
        kept, distance = set[str](), 0
        ends = len(self._order) if self._resumed or self._step > self._forwards else self._forwards
        for module in self._order[self._step : ends]:
            if distance >= REUSE_DISTANCE:
                break
            kept.update(parameter.name for parameter in module)
            distance += sum(parameter.numel for parameter in module)
        self._whole.difference_update(parameter.name for parameter in parameters if parameter.name not in kept)

    def _accumulate(self, parameter: Parameter) -> Iterator[Parts]:
        size = self._memory.options.reduce_bucket_size
        if self._bucket and self._bucket + parameter.numel > size:
            self._outside += parameter.numel  # it is there while the bucket is reduced
            yield from self._reduce(keep=parameter.numel)
            self._outside -= parameter.numel
        if self._bucket + parameter.numel > size:
            self._outside += parameter.numel
        self._bucket += parameter.numel

    def _reduce(self, keep: int = 0) -> Iterator[Parts]:
        """Gradients that are not float32 are copied, and all of them are copied into the order of the ranks."""
        copies = 4 * self._bucket * (1 if self._memory.width == 4 else 2)
        held = self.held()
        yield held | {"gradients": held["gradients"] + copies}
        self._bucket, self._outside = 0, keep
