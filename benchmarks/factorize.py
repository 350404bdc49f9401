"""Factoring at 2.25x: ours against `torch.linalg.svd`, dense and of a product; and a whole model on one rank and on
two, of one core each."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.multiprocessing as mp
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import Row, device, seconds
from plrd_train.compress.algebra.gram import Factors
from plrd_train.compress.algebra.truncate import of_dense, of_product
from plrd_train.compress.allocations.uniform import Allocation
from plrd_train.compress.ranks import Shape

# The Linears of a block of Llama-7B and Mistral-7B (out, in), whole where a GPU is, and a quarter as wide on a CPU.
SHAPES = {
    "cuda": [(4096, 4096), (1024, 4096), (11008, 4096), (14336, 4096), (4096, 14336)],
    "cpu": [(1024, 1024), (2816, 1024), (1024, 2816)],
}
RATIO, BEFORE = 2.25, 1.85


def rows() -> Iterator[Row]:
    for shape in SHAPES[device().type]:
        yield from _one(shape)
    if device().type == "cuda":
        yield _all_of_7b()
    yield _whole_model()


def _weight(m: int, n: int) -> Tensor:
    """Singular values that fall by a factor of some five, as those of a trained Linear."""
    generator = torch.Generator(device()).manual_seed(0)
    weight = torch.randn(m, n, generator=generator, device=device()) * torch.exp(
        -1.5 * torch.arange(n, device=device()) / n
    )
    return weight.bfloat16() if device().type == "cuda" else weight


def _svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """What one does otherwise, in the orientation that is faster: the tall one."""
    wide = weight.shape[0] < weight.shape[1]
    u, s, vh = torch.linalg.svd((weight.T if wide else weight).float(), full_matrices=False)
    up, down = u[:, :rank] * s[:rank].sqrt(), s[:rank].sqrt()[:, None] * vh[:rank]
    return (down.T, up.T) if wide else (up, down)


def _one(shape: tuple[int, int]) -> Iterator[Row]:
    m, n = shape
    rank, before = (int(m * n / (m + n) / ratio) for ratio in (RATIO, BEFORE))
    weight, name = _weight(m, n), f"{m}x{n} to {rank}"
    ours, other = seconds([lambda: of_dense(weight).cut(rank), lambda: _svd(weight, rank)])
    yield Row("dense: seconds", ours, other, "s", name)
    yield Row(
        "dense: error over the optimum",
        *_excess(weight, rank, of_dense(weight).cut(rank), _svd(weight, rank)),
        "x",
        name,
    )

    start = of_dense(weight).cut(before)
    # As after some training.
    up, down = (side + 0.03 * side.std() * torch.randn_like(side) for side in (start.up, start.down))
    name = f"{m}x{before}x{n} to {rank}"
    ours, other = seconds([lambda: of_product(up, down).cut(rank), lambda: _svd(up @ down, rank)])
    yield Row("product: seconds", ours, other, "s", name)
    yield Row(
        "product: error over the optimum",
        *_excess(up @ down, rank, of_product(up, down).cut(rank), _svd(up @ down, rank)),
        "x",
        name,
    )


def _excess(weight: Tensor, rank: int, ours: Factors, other: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """The errors of both over that of the SVD in float64."""
    exact = weight.double()
    optimum = torch.linalg.svdvals(exact)[rank:].norm()
    return tuple(
        ((exact - up.double() @ down.double()).norm() / optimum).item() for up, down in ((ours.up, ours.down), other)
    )


def _all_of_7b() -> Row:
    """All 224 Linears of Mistral-7B one after the other, against as many SVDs, of which one of each shape is timed."""
    counts = {(4096, 4096): 64, (1024, 4096): 64, (14336, 4096): 64, (4096, 14336): 32}
    weights = {shape: _weight(*shape) for shape in counts}
    ranks = {(m, n): int(m * n / (m + n) / RATIO) for m, n in counts}

    def ours() -> None:
        for shape, count in counts.items():
            for _ in range(count):
                of_dense(weights[shape]).cut(ranks[shape])

    other = sum(
        count * seconds([lambda shape=shape: _svd(weights[shape], ranks[shape])], 1)[0]
        for shape, count in counts.items()
    )
    return Row("all Linears of Mistral-7B: seconds", seconds([ours], 1)[0], other, "s", "224 Linears")


# A whole model over ranks of one core

BLOCKS = 4


def _whole_model() -> Row:
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            hidden_size=1024, intermediate_size=2816, num_hidden_layers=BLOCKS, num_attention_heads=16, vocab_size=64
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        times = [min(_factor_on(size, Path(folder)) for _ in range(2)) for size in (1, 2)]
    return Row(
        "whole model on 2 ranks, against 1: seconds",
        times[1],
        times[0],
        "s",
        f"{7 * BLOCKS} Linears",
        device="cpu, 1 core a rank",
    )


def _factor_on(size: int, folder: Path) -> float:
    context = mp.get_context("spawn")
    with context.Manager() as manager:
        taken = manager.dict()
        mp.spawn(_rank, (size, folder, taken), nprocs=size)
        return max(taken.values())


def _rank(rank: int, size: int, folder: Path, taken: dict) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29577",
        CUDA_VISIBLE_DEVICES="",
    )
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    from plrd_train.compress.methods.svd import Method
    from plrd_train.compress.rounds import decompose
    from plrd_train.compress.surgery import eligible_linears
    from plrd_train.engine.fsdp import Options, open_engine
    from plrd_train.parents.models import HubArchitecture
    from plrd_train.parents.parent import Parent, load_config
    from plrd_train.parents.weights import WeightReader
    from plrd_train.runtime.place import Place
    from plrd_train.runtime.world import World

    world = World.open(Place.read())
    engine = open_engine(Options(dtype="fp32", replicas=1, activation_checkpointing=False, compile=False), world)
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        # It needs no tokenizer.
        parent = Parent(str(folder), None, str(folder), dict.fromkeys(weights.keys(), "model.safetensors"))
    engine.load(HubArchitecture(load_config(parent)), WeightReader(parent))
    shapes = {name: Shape.of(linear) for name, linear in eligible_linears(engine.model)}
    ranks = Allocation(1).ranks(shapes, RATIO)

    def work() -> None:
        world.share(None)
        list(decompose(engine, shapes, ranks, Method()))

    taken[rank] = seconds([work], 3)[0]
    world.close()
