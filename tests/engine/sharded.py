"""What the engines' tests do on each rank."""

import gc
import importlib
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from plrd_train.compress.factor_cache import FactorCache
from plrd_train.compress.methods.svd import Method
from plrd_train.compress.ranks import Shape
from plrd_train.compress.rounds import decompose
from plrd_train.compress.surgery import eligible_linears
from plrd_train.engine import Engine
from plrd_train.parents.models import HubArchitecture
from plrd_train.parents.parent import load_config, open_parent
from plrd_train.parents.weights import WeightReader
from plrd_train.recover import saved
from plrd_train.recover.optimizers.adamw import Optimizer as AdamW
from plrd_train.runtime.world import World

OPTIMIZER = AdamW(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
SETTINGS: dict[str, dict[str, Any]] = {
    "fsdp": {"dtype": "fp32", "replicas": 1, "activation_checkpointing": False, "compile": False},
    "zero3": {
        "dtype": "fp32",
        "activation_checkpointing": False,
        "offload_optimizer": "none",
        "offload_params": "none",
        "nvme_path": None,
        "reduce_bucket_size": 3000,  # less than the embedding, more than a bias
        "prefetch_bucket_size": 3000,
        "param_persistence_threshold": 0,  # by default nothing of these tiny models would be partitioned
    },
}


class Dying(FactorCache):
    """Its process ends, as by a kill, in place of one more file than `most`."""

    def __init__(self, most: int, folder: Path, device: torch.device):
        super().__init__(folder, device)
        self._most = most

    def put(self, name, key, tensors):
        if len(list(self._folder.glob("*.safetensors"))) >= self._most:
            os._exit(9)
        super().put(name, key, tensors)


def empty(world: World, name: str, **options) -> Engine:
    module = importlib.import_module(f"plrd_train.engine.{name}")
    return module.open_engine(module.Options(**SETTINGS[name] | options), world)


def opened(world: World, name: str, folder: Path, **options) -> Engine:
    """The engine `name` with the parent in `folder`."""
    engine = empty(world, name, **options)
    parent = open_parent(str(folder))
    engine.load(HubArchitecture(load_config(parent)), WeightReader(parent))
    return engine


def architecture(folder: Path, ranks: dict[str, int]) -> HubArchitecture:
    return HubArchitecture(load_config(open_parent(str(folder))), ranks)


def shapes_of(engine: Engine) -> dict[str, Shape]:
    return {name: Shape.of(linear) for name, linear in eligible_linears(engine.model)}


def factor(engine: Engine, folder: Path, ranks: dict[str, int]) -> None:
    made = decompose(engine, shapes_of(engine), ranks, Method())
    engine.rebuild(architecture(folder, ranks), {one.name: one for one in made})


@torch.no_grad()
def logits(engine: Engine, tokens: Tensor) -> Tensor:
    engine.model.eval()
    return engine.model(input_ids=tokens).logits.clone()


def save(engine: Engine, folder: Path) -> None:
    saved.write(engine.sharded(engine.snapshot()), folder, engine.world)


def load_saved(engine: Engine, model: HubArchitecture, folder: Path) -> None:
    engine.build(model)
    engine.restore(read_shards(engine, folder))


def read_shards(engine: Engine, folder: Path) -> dict[str, Tensor]:
    shards = engine.snapshot()
    saved.read(engine.sharded(shards), folder)
    return shards


def train(engine: Engine, batches: list[Tensor], micro: int = 1) -> list[float]:
    """Train on this rank's share of each batch, in `micro` micro-batches; the gradients' norms."""
    engine.start(OPTIMIZER)
    return go_on(engine, batches, micro)


def go_on(engine: Engine, batches: list[Tensor], micro: int = 1) -> list[float]:
    """The same with the optimizer as it stands."""
    engine.model.train()
    norms = []
    for batch in batches:
        for own in batch[engine.rank :: engine.world_size].chunk(micro):
            nll = F.cross_entropy(
                engine.model(input_ids=own).logits[:, :-1].float().flatten(0, 1), own[:, 1:].flatten(), reduction="sum"
            )
            engine.backward(nll * (engine.world_size / batch[:, 1:].numel()))
        norms.append(engine.step(1e-2, 0.5, torch.tensor(False)).item())
    return norms


def batches(count: int, sequences: int) -> list[Tensor]:
    return [torch.randint(3, 64, (sequences, 10), generator=torch.Generator().manual_seed(i)) for i in range(count)]


def live_bytes() -> int:
    """Memory of all tensors that this process can reach, each storage once: the least of one second, since gloo's
    threads let go of what they sent some time after its sender was told."""

    def now() -> int:
        gc.collect()
        # By the type: `isinstance` asks lazy modules, too, for a class of theirs, which loads them.
        tensors = [
            t
            for t in gc.get_objects()
            if issubclass(type(t), Tensor) and not issubclass(type(t), DTensor) and not t.is_meta
        ]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    readings = []
    for _ in range(5):
        readings.append(now())
        time.sleep(0.2)
    return min(readings)
