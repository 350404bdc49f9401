"""What only ZeRO-3 does: offloading, parameters that stay whole, ending one DeepSpeed engine for the next. The rest is in test_engines.py."""

import gc
import weakref

import pytest
import torch
from processes import run_ranks
from sharded import batches, empty, factor, logits, opened, shapes_of, train
from tiny_parents import save_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from plrd_train.engine.zero3 import Options
from plrd_train.errors import UserError
from plrd_train.hub.models import HubArchitecture
from plrd_train.hub.parents import load_config, open_parent
from plrd_train.hub.weights import WeightReader


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


def refused(world, folder):
    try:
        opened(world, "zero3", folder, offload_optimizer="nvme", nvme_path=str(folder))
    except UserError as error:
        return str(error)


def test_nvme_without_libaio_is_refused_in_one_line(save_parent):
    if run_ranks(1, nvme_is_there)[0]:
        pytest.skip("libaio is installed here")
    folder, _ = save_parent("llama")
    for message in run_ranks(2, refused, folder):
        assert message.startswith("engine.offload_optimizer: nvme needs") and "\n" not in message


def nvme_is_there(world):
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible(verbose=False)


def in_memory(world, folder, data):
    engine = opened(world, "zero3", folder, reduce_bucket_size=10**6)
    norms = train(engine, data)
    factor(engine, folder, dict.fromkeys(shapes_of(engine), 384))
    return norms + train(engine, data)


def on_nvme(world, folder, data, swap):
    engine = opened(world, "zero3", folder, offload_optimizer="nvme", nvme_path=str(swap), reduce_bucket_size=10**6)
    norms = train(engine, data)
    files = len(list(swap.rglob("*.swp")))
    factor(engine, folder, dict.fromkeys(shapes_of(engine), 384))
    norms += train(engine, data)
    engine._end()
    return norms, files, len(list(swap.rglob("*.swp")))


@pytest.mark.slow  # compiles DeepSpeed's async_io
def test_an_optimizer_on_nvme_changes_nothing_and_leaves_nothing(tmp_path):
    if not run_ranks(1, nvme_is_there)[0]:
        pytest.skip("libaio is not installed here")
    sizes = {"vocab_size": 64, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 4}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(tmp_path / "parent")  # what is small stays in memory
    save_tokenizer(tmp_path / "parent")
    data = batches(2, 4)
    norms = run_ranks(1, in_memory, tmp_path / "parent", data)[0]
    found, during, after = run_ranks(1, on_nvme, tmp_path / "parent", data, tmp_path / "swap")[0]
    assert found == pytest.approx(norms, rel=1e-3)
    assert during and not after


def test_settings_that_make_no_sense_are_refused():
    sound = {"dtype": "bf16", "activation_checkpointing": True, "offload_params": "none", "reduce_bucket_size": 1, "prefetch_bucket_size": 0}
    with pytest.raises(ValueError, match="needs nvme_path"):
        Options(**sound, offload_optimizer="nvme", nvme_path=None, param_persistence_threshold=0)
    with pytest.raises(ValueError, match="param_persistence_threshold is -1"):
        Options(**sound, offload_optimizer="none", nvme_path=None, param_persistence_threshold=-1)
