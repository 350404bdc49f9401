"""What only FSDP2 does: hybrid sharding and compiled blocks. What every engine does is in test_engines.py."""

import pytest
import torch
from processes import run_ranks
from sharded import batches, factor, logits, opened, shapes_of, train


def load_and_logits(world, folder, tokens, options):
    return logits(opened(world, "fsdp", folder, **options), tokens)


@pytest.mark.parametrize("options", [{"replicas": 2}, {"replicas": 4}], ids=["hsdp2x2", "replicated"])
def test_hybrid_sharding_loads_alike(save_parent, tokens, options):
    folder, model = save_parent("llama")
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    for found in run_ranks(4, load_and_logits, folder, tokens, options):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def factored_and_trained(world, folder, data, options):
    engine = opened(world, "fsdp", folder, **options)
    factor(engine, folder, dict.fromkeys(shapes_of(engine), 12))
    return train(engine, data), dict(engine.tensors())


def test_hybrid_sharding_factors_and_trains_alike(save_parent):
    folder, _ = save_parent("llama")
    data = batches(3, 8)
    norms, expected = run_ranks(1, factored_and_trained, folder, data, {})[0]
    results = run_ranks(4, factored_and_trained, folder, data, {"replicas": 2})
    for found, _ in results:
        assert found == pytest.approx(norms, rel=1e-4)
    for name, whole in expected.items():
        torch.testing.assert_close(results[0][1][name], whole, rtol=0, atol=2e-4)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(save_parent, tokens):
    folder, model = save_parent("llama")
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    for found in run_ranks(2, load_and_logits, folder, tokens, {"compile": True}):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
