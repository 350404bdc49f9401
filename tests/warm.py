"""What every rank of a test needs, done once, in the server that they are forked from (processes.py): imports, and what
libraries cache."""

import gc
import importlib

for name in (
    "plrd_train.__main__",
    "plrd_train.engine.fsdp",
    "plrd_train.engine.zero3",
    "plrd_train.parents.models",
    "transformers.models.llama.modeling_llama",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # what takes DeepSpeed longest: it imports torch's compiler
    "setuptools",  # which it looks for libaio with
    "pytest",  # the modules that ranks find their functions in import it
):
    importlib.import_module(name)
# A thousand regular expressions.
importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
# Hydra looks for its plugins once in a process, and its parser learns the grammar as it reads.
importlib.import_module("plrd_train.config.sweep").points(
    [
        "experiment=tinystories",
        "parent.path=p",
        "data.train=t",
        "data.validation=v",
        "run_dir=r",
        "stages.ratios=[1.25,1.6]",
        "recover.lr=4e-3",
    ]
)
# All this stays: no collection needs to look at it again, nor copies its pages into each rank by that.
gc.collect()
gc.freeze()
