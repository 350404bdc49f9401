"""A trace on the meta device against what PyTorch's allocator really gave for the same model and the same text on a
CPU."""

import copy

import pytest
import torch
from tiny_parents import CONFIGS, VOCABULARY
from torch.profiler import ProfilerActivity, profile

from plrd_train.parents.models import build_model
from plrd_train.plan.trace import computing_in, trace_evaluation, trace_step
from plrd_train.recover.objectives.ce import cross_entropy

SHAPE = (4, 48)
# The attention kernel of a CPU lays its output out head by head, which costs a copy that no GPU makes; it shows in
# models as small as these.
WITHIN = 0.1


def allocated(model, run) -> int:
    """The most bytes that lived at once while `run()` ran, beside what lived before; gradients of parameters are
    dropped once complete."""
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    run()  # what is made once and kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    live = peak = 0
    for event in sorted(
        (e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def models(architecture):
    """On a CPU and on meta."""
    config = copy.deepcopy(CONFIGS[architecture])
    with torch.device("meta"):
        meta = build_model(config)
    return build_model(config), meta


@pytest.mark.parametrize("checkpointed", [False, True], ids=["whole", "checkpointed"])
@pytest.mark.parametrize(
    "architecture", ["llama", "llama_tied_scaled_rope", "mistral", "qwen2", "gemma", "gemma2", "gpt_neox"]
)
def test_a_training_step_holds_as_much_as_its_trace(architecture, checkpointed):
    real, meta = models(architecture)
    for model in (real, meta):
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, VOCABULARY, SHAPE)
    found = allocated(real, lambda: cross_entropy(real, ids).backward())
    events = trace_step(meta, lambda model: cross_entropy(model, ids.to("meta")))
    assert max(event.peak for event in events) == pytest.approx(found, rel=WITHIN)
    assert events[-1].live < found / 50
    assert {event.name for event in events if event.kind == "gradient"} == {name for name, _ in real.named_parameters()}


def test_an_evaluation_in_bf16_holds_as_much_as_its_trace():
    real, meta = models("llama")
    real = real.to(torch.bfloat16).eval()
    ids = torch.randint(3, VOCABULARY, SHAPE)

    def compute(model):
        return model(input_ids=ids.to(model.device), use_cache=False).logits.float().logsumexp(-1)

    with torch.no_grad():
        found = allocated(real, lambda: compute(real))
    with computing_in(meta.eval(), torch.bfloat16):
        events = trace_evaluation(meta, compute)
    assert max(event.peak for event in events) == pytest.approx(found, rel=WITHIN)
    assert all(parameter.dtype == torch.float32 for parameter in meta.parameters())
