"""Memory of `engine=fsdp`, after the source of torch.distributed.fsdp (2.13) and of plrd_train/engine/fsdp.py.

A rank keeps float32 shards of parameters, gradients and the optimizer's state: with AdamW 16 bytes a parameter over the
ranks. Blocks are gathered one by one in the dtype of the products, and a gather needs its output twice for a moment: as
received, and as parameters. The embeddings, the last norm and lm_head are one more unit, the root, which stays gathered
from the beginning of a forward to the end of its backward. In a forward the received copy of a block lives until the
next block is gathered; in a backward the next block is received while one is computed. Gradients of a block are whole,
in the dtype of the products, until its backward ends; then they are copied to a float32 buffer, which is reduced and
lives until the next block is reduced.
"""

from collections.abc import Iterator, Sequence

from plrd_train.engine import Optimizer
from plrd_train.engine.fsdp import Options
from plrd_train.plan.trace import Event
from plrd_train.structure import Parameter, Parts, Structure, add, largest

ROOT = ""
# Float32 copies of a matrix on its owner, where an update needs it whole: as received, whole, and four that compute it.
COPIES = 6


class Memory:
    """`device` is "cpu" or "cuda". The largest share, that of the first rank, is what counts."""

    def __init__(self, options: Options, optimizer: Optimizer, world_size: int, device: str):
        self._optimizer = optimizer
        self.width = {"bf16": 2, "fp32": 4}[options.dtype]
        self.shards = world_size // options.replicas
        self.on_cpu = device == "cpu"

    def shard(self, shape: tuple[int, ...]) -> int:
        """Elements of the first rank's shard: rows are dealt in chunks."""
        numel = Parameter("", shape, "", "").numel
        return -(-shape[0] // self.shards) * (numel // shape[0])

    def _kept(self, model: Structure) -> float:
        return sum(self.shard(parameter.shape) for parameter in model.parameters)

    def resident(self, model: Structure, *, optimizer: bool) -> Parts:
        """What stays between steps; `optimizer`: a step has been made since the structure changed."""
        return {"parameters": 4 * self._kept(model), "optimizer": 4 * self.state(model) if optimizer else 0.0}

    def state(self, model: Structure) -> int:
        """Elements of the first rank's shards of what the optimizer keeps."""
        return sum(
            len(self._optimizer.group(parameter).state) * self.shard(parameter.shape) for parameter in model.parameters
        )

    def host(self, model: Structure) -> Parts:
        return {}

    def holder(
        self, model: Structure, events: Sequence[Event], *, accumulated: bool = False, resumed: bool = False
    ) -> "Holder":
        """`accumulated`: a micro-batch before has left its gradients."""
        return Holder(self, model, 4 * self._kept(model) if accumulated else 0.0)

    def update(self, model: Structure) -> Parts:
        """What the optimizer's step holds beside `resident`: the gradients, and the roots of the second moments, of all
        matrices at once on a GPU (foreach) and one after the other on a CPU."""
        matrices = [self.shard(parameter.shape) for parameter in model.parameters if len(parameter.shape) > 1]
        owned = max((p.numel for p in model.parameters if p.block and len(p.shape) > 1), default=0)
        return {
            "gradients": 4 * self._kept(model),
            "optimizer": 4 * (2 * max(matrices) if self.on_cpu else sum(matrices))
            + (4 * COPIES * owned if self._optimizer.whole_matrices else 0),
        }

    def rebuilt(self, old: Structure, new: Structure, factors: float, *, optimizer: bool) -> tuple[Parts, Parts]:
        """(device, host) while the structure changes: the shards of the new factors, of `factors` bytes, and the old
        model with its optimizer, whose states go before the new model comes; or with that."""
        both = {"parameters": 4 * (self._kept(old) + self._kept(new))}
        return largest(self.resident(old, optimizer=optimizer), both) | {"factorization": factors}, {}


class Holder:
    """See `plrd_train.plan.replay.Holder`."""

    def __init__(self, memory: Memory, model: Structure, gradients: float):
        shards, self._width, self._on_cpu = memory.shards, memory.width, memory.on_cpu
        self._elements: dict[str, int] = {}  # of each unit, padded to equal shards
        for parameter in model.parameters:
            self._elements[parameter.block] = (
                self._elements.get(parameter.block, 0) + memory.shard(parameter.shape) * shards
            )
        self._numel = {parameter.name: parameter.numel for parameter in model.parameters}
        self._unit = {parameter.name: parameter.block for parameter in model.parameters}
        self._order = [unit for unit in self._elements if unit != ROOT] + [ROOT]
        self._shards = shards
        self._accumulated = gradients > 0
        self._whole: dict[str, float] = {}
        self._received: dict[str, float] = {}
        self._whole_gradients = dict.fromkeys(self._elements, 0.0)
        self._reduced, self._buffer = gradients, 0.0

    def held(self) -> Parts:
        return {
            "gathered": sum(self._whole.values()) + sum(self._received.values()),
            "gradients": self._reduced + sum(self._whole_gradients.values()) + self._buffer,
        }

    def on(self, event: Event) -> Iterator[Parts]:
        if event.kind == "gradient":
            self._whole_gradients[self._unit[event.name]] += self._numel[event.name] * self._width
        if event.name not in self._elements:
            return
        if event.kind == "forward":
            before = list(self._received)
            self._receive(event.name)
            yield add(self.held(), {"gathered": self._staged(event.name)})
            for unit in before:
                del self._received[unit]
            self._whole[event.name] = self._size(event.name)
            yield self.held()
        elif event.kind == "forwarded":
            if event.name == ROOT:
                self._received.clear()
            else:
                del self._whole[event.name]
        elif event.kind == "backward":
            if event.name not in self._whole:
                self._receive(event.name)
                self._whole[event.name] = self._size(event.name)
                yield self.held()
                self._received.pop(event.name, None)
            if (place := self._order.index(event.name)) > 0:
                self._receive(self._order[place - 1])
        elif event.kind == "backwarded":
            yield from self._reduce(event.name)

    def _size(self, unit: str) -> float:
        return self._elements[unit] * self._width

    def _staged(self, unit: str) -> float:
        """gloo, which CPUs communicate by, receives into a tensor of its own and copies that."""
        return self._size(unit) if self._on_cpu and self._shards > 1 else 0.0

    def _receive(self, unit: str) -> None:
        if self._shards > 1:  # with one there is nothing to receive: the shard is copied
            self._received[unit] = self._size(unit)

    def _reduce(self, unit: str) -> Iterator[Parts]:
        self._whole.pop(unit, None)
        if not self._whole_gradients[unit]:  # where none is asked for, as in calibration
            return
        self._buffer = 4.0 * self._elements[unit]
        yield self.held()
        self._whole_gradients[unit] = 0.0
        output = 4 * self._elements[unit] / self._shards
        self._reduced += output
        yield self.held()
        if self._accumulated:  # added to what is there
            self._reduced -= output
        if unit == ROOT:
            self._buffer = 0.0
