"""What only ZeRO-3 does: offloading, parameters that stay whole, ending one DeepSpeed engine for the next. The rest is
in test_engines.py."""

import gc
import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
from launching import LAUNCH, launched
from processes import run_ranks
from safetensors.torch import load_file
from sharded import SETTINGS, batches, empty, factor, go_on, logits, opened, shapes_of, train
from tiny_parents import save_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from plrd_train.engine.zero3 import Options
from plrd_train.errors import UserError
from plrd_train.parents.models import HubArchitecture
from plrd_train.parents.parent import load_config, open_parent
from plrd_train.parents.weights import WeightReader


def two_stages(world, folder, data, options):
    engine = opened(world, "zero3", folder, **options)
    norms = train(engine, data, 2)
    factor(engine, folder, dict.fromkeys(shapes_of(engine), 12))
    kept = engine.snapshot()
    norms += train(engine, data, 2)
    engine.restore(kept)
    return norms + train(engine, data, 2), logits(engine, data[0])


def test_where_things_are_kept_changes_nothing(save_parent):
    folder, _ = save_parent("llama_tied_scaled_rope")
    data = batches(2, 8)
    norms, expected = run_ranks(2, two_stages, folder, data, {})[0]
    some_parameters_whole = {"param_persistence_threshold": 1000}
    both = {"offload_optimizer": "cpu", "offload_params": "cpu", "activation_checkpointing": True}
    for options in ({"offload_optimizer": "cpu"}, both, some_parameters_whole):
        found, computed = run_ranks(2, two_stages, folder, data, options)[0]
        assert found == pytest.approx(norms, rel=1e-4)
        torch.testing.assert_close(computed, expected, rtol=0, atol=5e-3)


def held_after(world, folder):
    engine = opened(world, "zero3", folder)
    logits(engine, torch.ones(1, 4, dtype=torch.long))
    train(engine, batches(1, 4))
    before = [weakref.ref(kept) for kept in (engine.model, engine._deepspeed, engine._deepspeed.optimizer)]
    factor(engine, folder, dict.fromkeys(shapes_of(engine), 8))
    train(engine, batches(1, 4))
    after = weakref.ref(engine.model)
    restructured = [kept() is None for kept in before]
    del engine
    gc.collect()
    return [*restructured, after() is None]


def test_what_was_before_is_freed_by_a_restructuring_and_with_the_engine(save_parent):
    folder, _ = save_parent("qwen2")
    assert run_ranks(2, held_after, folder) == [[True] * 4] * 2


class Counted:
    """A parent's weights that count what is read of them."""

    def __init__(self, reader):
        self.reader, self.read_elements, self.shape = reader, 0, reader.shape

    def read(self, name, rows):
        part = self.reader.read(name, rows)
        self.read_elements += part.numel()
        return part


def read_on_loading(world, folder):
    parent = open_parent(str(folder))
    weights = Counted(WeightReader(parent))
    engine = empty(world, "zero3")
    engine.load(HubArchitecture(load_config(parent)), weights)
    rows = sum(p.ds_numel // p.ds_shape[0] for p in engine.model.parameters())
    return weights.read_elements, engine.params(), rows, sum(p.numel() for p in engine.model.parameters())


def test_each_rank_reads_the_rows_of_its_slices_only(save_parent):
    folder, _ = save_parent("gpt_neox")
    for read, params, rows, whole in run_ranks(3, read_on_loading, folder):
        assert read <= params / 3 + 2 * rows  # a slice begins and ends inside of rows
        assert whole == 0


def refused(world, folder, keys):
    try:
        opened(world, "zero3", folder, **dict.fromkeys(keys, "nvme"), nvme_path=str(folder))
    except UserError as error:
        return str(error)


def test_nvme_without_libaio_is_refused_in_one_line(save_parent):
    if run_ranks(1, nvme_is_there)[0]:
        pytest.skip("libaio is installed here")
    folder, _ = save_parent("llama")
    for message in run_ranks(2, refused, folder, ["offload_optimizer"]):
        assert message.startswith("engine.offload_optimizer: nvme needs") and "\n" not in message
    for message in run_ranks(2, refused, folder, ["offload_optimizer", "offload_params"]):
        assert (
            message.startswith("engine.offload_optimizer and engine.offload_params: nvme needs") and "\n" not in message
        )


def nvme_is_there(world):
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible(verbose=False)


COMPILE = (
    "from deepspeed.accelerator import get_accelerator as a; "
    "a().create_op_builder('AsyncIOBuilder').load(verbose=False)"
)


@pytest.fixture(scope="module")
def swapped_parent(tmp_path_factory):
    """A parent whose matrices are large enough to be in files on two ranks, and what reads and writes files, compiled:
    which takes minutes."""
    if not run_ranks(1, nvme_is_there)[0]:
        pytest.skip("libaio is not installed here")
    subprocess.run(
        [sys.executable, "-c", COMPILE],
        check=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.DEVNULL,
    )
    folder = tmp_path_factory.mktemp("swapped") / "parent"
    sizes = {
        "vocab_size": 2048,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes, tie_word_embeddings=True)).save_pretrained(folder)
    save_tokenizer(folder, 2048)
    return folder


def wrong_in_files(engine, swap):
    """How many files of slices of parameters there are, and how many of them hold other values than the masters, or are
    in memory, too."""
    wrong, files = 0, sorted(swap.glob(f"zero_stage_3/float32params/rank{engine.rank}/*.swp"))
    values = (
        {parameter.nvme_swapper.get_path(parameter): name for name, parameter in engine.model.named_parameters()}
        if files
        else {}
    )
    masters = engine.snapshot()
    for file in files:
        master, slices = masters[values[str(file)]], engine.model.get_parameter(values[str(file)]).ds_tensor
        read = torch.from_file(str(file), size=len(master))
        wrong += not torch.equal(read, master) or slices.untyped_storage().nbytes() > 4
    return len(files), wrong


def step_with_all_read_ahead(engine, batch):
    """A step that finds slices in memory which were read ahead and never used, as those of experts that no token went
    to."""
    engine.backward(engine.model(input_ids=batch[engine.rank :: engine.world_size]).logits.logsumexp(-1).mean())
    for parameter in engine.model.parameters():
        if parameter.ds_tensor.final_location == "nvme" and parameter.ds_status.name == "NOT_AVAILABLE":
            parameter.nvme_swapper.swap_in([parameter])
    return engine.step(1e-2, 0.5, torch.tensor(False)).item()


def two_stages_with_all(world, folder, data, swap, options):
    """Two stages with all that a run does to parameters, and the files that are there meanwhile."""
    sizes = {"reduce_bucket_size": 10**6, "prefetch_bucket_size": 10**6, "param_persistence_threshold": 1000}
    engine = opened(world, "zero3", folder, nvme_path=str(swap), **sizes, **options)
    files = [wrong_in_files(engine, swap)]
    found = [logits(engine, data[0]), *train(engine, data, 2), logits(engine, data[0]), *go_on(engine, data, 2)]
    found.append(step_with_all_read_ahead(engine, data[0]))
    files.append(wrong_in_files(engine, swap))
    found.append(engine.gather("model.layers.1.mlp.up_proj.weight", world.size - 1)())
    factor(engine, folder, dict.fromkeys(shapes_of(engine), 384))
    files.append(wrong_in_files(engine, swap))
    kept = engine.snapshot()
    found += train(engine, data, 2)
    engine.restore(kept)
    files.append(wrong_in_files(engine, swap))
    found += [*train(engine, data, 2), logits(engine, data[0])]
    optimizer_files = len(list(swap.glob(f"zero_stage_3/optimizer/rank{world.rank}/*.swp")))
    engine._end()
    world.share(None)
    return (
        [figure for figure in found if figure is not None],
        files,
        optimizer_files,
        [path for path in swap.rglob("*") if path.is_file()],
    )


@pytest.mark.slow  # compiles DeepSpeed's async_io
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_on_nvme_changes_nothing_and_leaves_nothing(swapped_parent, tmp_path, ranks):
    def found_with(optimizer, params):
        arguments = (
            swapped_parent,
            batches(3, 4),
            tmp_path / f"{optimizer}_{params}",
            {"offload_optimizer": optimizer, "offload_params": params},
        )
        return run_ranks(ranks, two_stages_with_all, *arguments)

    # Gradients' norms are summed in another order where the optimizer is on the host.
    for optimizer, host in (("none", "none"), ("nvme", "cpu")):
        expected = found_with(host, "none")
        for (found, files, of_optimizer, left), (same, *_) in zip(found_with(optimizer, "nvme"), expected, strict=True):
            torch.testing.assert_close(found, same, rtol=0, atol=0)
            assert all(count >= 4 and not wrong for count, wrong in files)
            assert bool(of_optimizer) == (optimizer == "nvme")
            assert not left


@pytest.mark.slow  # see above
def test_a_family_from_nvme_is_the_same(swapped_parent, command, tmp_path):
    def member(name, *overrides):
        run_dir, sizes = tmp_path / name, ("engine.reduce_bucket_size=1000000", "engine.prefetch_bucket_size=1000000")
        chosen = (
            f"parent.path={swapped_parent}",
            "stages.ratios=[1.6]",
            "stages.tokens=512",
            "evaluation.tokens=500",
            "engine=zero3",
            "engine.dtype=fp32",
        )
        with launched([LAUNCH / "local.sh", *command(run_dir, *chosen, *sizes, *overrides)], NPROC=2) as run:
            assert run.status() == 0, run.err
        (entry,) = json.loads((run_dir / "family.json").read_text())["members"]
        (weights,) = run_dir.glob("members/*/*.safetensors")
        return entry["eval"], load_file(weights)

    places = [f"engine.nvme_path={tmp_path / 'swap'}", "engine.offload_optimizer=nvme", "engine.offload_params=nvme"]
    swapped, kept = member("swapped", *places), member("kept", "engine.offload_optimizer=cpu")
    torch.testing.assert_close(swapped, kept, rtol=0, atol=0)
    swap = tmp_path / "swap" / "zero_stage_3"
    assert all((swap / kind).is_dir() and not any((swap / kind).iterdir()) for kind in ("optimizer", "float32params"))


def test_settings_that_make_no_sense_are_refused():
    sound = {**SETTINGS["zero3"], "reduce_bucket_size": 1, "prefetch_bucket_size": 0}
    for key in ("offload_optimizer", "offload_params"):
        with pytest.raises(ValueError, match=f"{key}=nvme needs nvme_path"):
            Options(**sound | {key: "nvme"})
    with pytest.raises(ValueError, match="param_persistence_threshold is -1"):
        Options(**sound | {"param_persistence_threshold": -1})
