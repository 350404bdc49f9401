"""Published members: loaded by transformers they are the model that was published, or they raise."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_parents import CONFIGS
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from plrd_train.compress import forms
from plrd_train.compress.linear import LowRankLinear
from plrd_train.errors import UserError
from plrd_train.parents.modeling_plrd import model_ranks, with_ranks
from plrd_train.parents.models import build_model
from plrd_train.parents.parent import Parent, load_config, load_tokenizer, open_parent
from plrd_train.parents.weights import WeightReader
from plrd_train.publish.members import write_member


def factored(dense: PreTrainedModel, less: int = 0) -> PreTrainedModel:
    """`dense` with every Linear of its blocks as two factors of full rank, or of `less`, by float64 SVD."""
    linears = {
        name: module for name, module in dense.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
    }
    model = build_model(
        dense.config, {name: min(module.weight.shape) - less for name, module in linears.items()}
    ).eval()
    state = dense.state_dict()
    for name in linears:
        whole = torch.linalg.svd(state.pop(f"{name}.weight").double(), full_matrices=False)
        rank = len(whole.S) - less
        u, s, vh = whole.U[:, :rank], whole.S[:rank], whole.Vh[:rank]
        state |= {f"{name}.up.weight": (u * s.sqrt()).float(), f"{name}.down.weight": (s.sqrt()[:, None] * vh).float()}
        if f"{name}.bias" in state:
            state[f"{name}.up.bias"] = state.pop(f"{name}.bias")
    model.load_state_dict(state)
    return model


def publish(folder: Path, parent_folder: Path, model: PreTrainedModel, **arguments) -> None:
    given = {
        "config": model.config,
        "ranks": model_ranks(model.config),
        "tensors": model.named_parameters(),
        "dtype": torch.float32,
    }
    write_member(
        folder,
        **(given | {"parent": Parent("parent", None, str(parent_folder), {}), "card": "# a member\n"} | arguments),
    )


@pytest.fixture
def member(save_parent, tmp_path):
    """member(architecture, **write_member's arguments) -> (folder, the model in memory, the dense parent)."""

    def make(architecture: str, **arguments) -> tuple[Path, PreTrainedModel, PreTrainedModel]:
        parent_folder, dense = save_parent(architecture)
        publish(tmp_path / "members" / "m", parent_folder, model := factored(dense), **arguments)
        return tmp_path / "members" / "m", model, dense

    return make


@pytest.mark.parametrize("max_shard_bytes", [5 * 2**30, 12_000])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_member_loads_as_the_model_that_was_published(architecture, max_shard_bytes, member, tokens, tmp_path):
    folder, model, dense = member(architecture, max_shard_bytes=max_shard_bytes)
    assert len(list(folder.glob("*.safetensors"))) == 1 or max_shard_bytes == 12_000
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is type(model) and model_ranks(loaded.config) == model_ranks(model.config)
    logits = model(tokens).logits
    assert torch.equal(loaded(tokens).logits, logits)
    torch.testing.assert_close(logits, dense(tokens).logits, atol=1e-4, rtol=1e-4)  # full rank is no approximation
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == dense.config.tie_word_embeddings
    assert loaded.num_parameters() == sum(p.numel() for p in model.parameters())
    loaded.save_pretrained(tmp_path / "again", max_shard_size=max_shard_bytes)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(tokens).logits, logits)


def test_member_behaves_as_any_model_of_transformers(member, tokens):
    folder, model, dense = member("mistral")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for cast in (loaded.half(), loaded.to(torch.bfloat16), loaded.float()):
        assert cast(tokens).logits.isfinite().all()
    assert torch.equal(copy.deepcopy(model)(tokens).logits, model(tokens).logits)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(loaded(tokens).logits.float(), model(tokens).logits, atol=0.2, rtol=0.1)
    output = model(tokens, labels=tokens)
    torch.testing.assert_close(output.loss, dense(tokens, labels=tokens).loss, atol=1e-4, rtol=0)
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(folder).generate(tokens, **settings), dense.generate(tokens, **settings)
    )


def test_folder_holds_dtype_tokenizer_card_and_ranks(member):
    folder, model, _ = member("mistral", dtype=torch.bfloat16)
    stored = load_file(folder / "model.plrd.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    for name, parameter in model.named_parameters():
        assert torch.equal(stored[name], parameter.bfloat16())
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype is torch.bfloat16
    assert AutoTokenizer.from_pretrained(folder)("w7 w9").input_ids == [7, 9]
    assert (folder / "README.md").read_text() == "# a member\n"
    assert (folder / "generation_config.json").is_file()
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "plrd" and config["parent_model_type"] == "mistral" and config["dtype"] == "bfloat16"
    assert config["plrd"]["ranks"] == {
        name: module.rank for name, module in model.named_modules() if isinstance(module, LowRankLinear)
    }


def test_member_is_a_parent(member, tokens):
    folder, model, _ = member("gpt_neox", max_shard_bytes=12_000)
    parent = open_parent(str(folder))
    assert len(load_tokenizer(parent)) == 64
    rebuilt, reader = build_model(load_config(parent)).eval(), WeightReader(parent)
    rebuilt.load_state_dict({name: reader.read(name) for name in rebuilt.state_dict()})
    assert torch.equal(rebuilt(tokens).logits, model(tokens).logits)


def test_without_ranks_the_folder_is_a_plain_one(save_parent, tokens, tmp_path):
    parent_folder, dense = save_parent("llama_tied_scaled_rope")
    publish(tmp_path / "m", parent_folder, dense, max_shard_bytes=9000)
    assert not list((tmp_path / "m").glob("*.py")) and "plrd" not in (tmp_path / "m" / "config.json").read_text()
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "m")(tokens).logits, dense(tokens).logits)
    low_rank = with_ranks(dense.config, {"model.layers.0.mlp.up_proj": 3})
    assert with_ranks(low_rank, {}).to_dict() == with_ranks(dense.config, {}).to_dict()


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ({"model.layers.9.mlp.up_proj": 3}, r"model\.layers\.9\.mlp\.up_proj is no module"),
        ({"model.norm": 3}, r"model\.norm is a LlamaRMSNorm"),
        ({"model.layers.0.mlp.up_proj": "3"}, "positive rank"),
        ({"model.layers.0.mlp.up_proj": 0}, "positive rank"),
        (None, "positive rank"),
    ],
)
def test_ranks_in_config_are_checked(member, ranks, said):
    folder, *_ = member("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"plrd": {"ranks": ranks}}))
    with pytest.raises(ValueError, match=said):
        AutoModelForCausalLM.from_pretrained(folder)


def test_no_weight_comes_up_at_random(member):
    folder, *_ = member("llama", max_shard_bytes=12_000)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        LlamaForCausalLM.from_pretrained(folder)
    index = folder / "model.safetensors.index.plrd.json"
    weights = json.loads(index.read_text())
    del weights["weight_map"]["model.layers.0.mlp.up_proj.down.weight"]
    last = sorted(set(weights["weight_map"].values()))[-1]
    weights["weight_map"] = {name: file for name, file in weights["weight_map"].items() if file != last}
    index.write_text(json.dumps(weights))
    with pytest.raises(ValueError, match="weights lack"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_publishing_is_all_or_nothing(save_parent, tmp_path):
    parent_folder, dense = save_parent("llama")
    folder, model = tmp_path / "members" / "m", factored(dense)
    leftover = folder.with_name(".m.part")
    leftover.mkdir(parents=True)
    (leftover / "of_a_killed_run.safetensors").write_bytes(b"x")

    def broken_off():
        yield from list(model.named_parameters())[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(folder, parent_folder, model, tensors=broken_off(), max_shard_bytes=5000)
    with pytest.raises(ValueError, match="were not given"):
        publish(folder, parent_folder, model, tensors=list(model.named_parameters())[:-1])
    with pytest.raises(ValueError, match="expects"):
        publish(folder, parent_folder, model, tensors=((name, tensor[1:]) for name, tensor in model.named_parameters()))
    with pytest.raises(UserError, match=r"is not finite in torch\.float16"):
        publish(
            folder,
            parent_folder,
            model,
            tensors=((name, tensor * 1e6) for name, tensor in model.named_parameters()),
            dtype=torch.float16,
        )
    assert not list(folder.parent.iterdir())
    publish(folder, parent_folder, model)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert "of_a_killed_run.safetensors" not in before and list(folder.parent.iterdir()) == [folder]
    with pytest.raises(UserError, match="never overwritten"):
        publish(folder, parent_folder, model)
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}


ALONE = """
import sys, torch
sys.modules["plrd_train"] = None  # importing it raises, wherever it is installed
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
folder, again, tokens = sys.argv[1], sys.argv[2], torch.load(sys.argv[3], weights_only=True)
for load, kind in [(AutoModelForCausalLM, ValueError), (AutoModel, ValueError), (LlamaForCausalLM, OSError)]:
    try:
        load.from_pretrained(folder)
    except kind:
        print("\\nRAISED", load.__name__)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(again)
reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
assert AutoTokenizer.from_pretrained(folder)("w7").input_ids == [7]
torch.save([model(tokens).logits.detach(), reloaded(tokens).logits.detach()], sys.argv[4])
"""


@pytest.fixture
def packed_member(save_parent, tmp_path):
    """packed_member(architecture, form, **write_member's arguments) -> (folder, the model of the pairs that `form` has
    packed)."""

    def make(architecture: str, form: str = "pifa", **arguments) -> tuple[Path, PreTrainedModel]:
        parent_folder, dense = save_parent(architecture)
        model = factored(dense, less=8)
        pairs = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
        for pair in pairs.values():
            pair.set_factors(*forms.get(form).pack(pair.up.weight.detach(), pair.down.weight.detach()))
        tensors = dict(model.named_parameters()).items()
        publish(tmp_path / "members" / "m", parent_folder, model, tensors=tensors, form=form, **arguments)
        return tmp_path / "members" / "m", model

    return make


@pytest.mark.parametrize("form", ["pifa", "int8"])
@pytest.mark.parametrize("architecture", ["llama_tied_scaled_rope", "qwen2", "gpt_neox"])
def test_a_member_of_a_form_is_the_model_of_its_pairs(packed_member, architecture, form, tokens, tmp_path):
    folder, model = packed_member(architecture, form, max_shard_bytes=12_000)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, atol=1e-4, rtol=0)
    assert loaded.num_parameters() < model.num_parameters()
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(tokens).logits, loaded(tokens).logits)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(tokens, **settings), model.generate(tokens, **settings))
    loaded(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in loaded.parameters())
    parent = open_parent(str(folder))
    rebuilt, reader = build_model(load_config(parent)).eval(), WeightReader(parent)
    rebuilt.load_state_dict({name: reader.read(name) for name in rebuilt.state_dict()})
    torch.testing.assert_close(rebuilt(tokens).logits, model(tokens).logits, atol=1e-4, rtol=0)


def test_a_form_that_is_not_known_is_named(packed_member):
    folder, _ = packed_member("llama")
    config = json.loads((folder / "config.json").read_text())
    for form, said in (("of_next_year", "no form 'of_next_year' is known here"), (3, "needs .*form")):
        (folder / "config.json").write_text(json.dumps(config | {"plrd": config["plrd"] | {"form": form}}))
        with pytest.raises(ValueError, match=said):
            AutoModelForCausalLM.from_pretrained(folder)


def alone(folder: Path, tokens: torch.Tensor, tmp_path: Path) -> list[torch.Tensor]:
    """The logits of a member that a process without plrd_train loads by the code in its folder, saves and loads
    again."""
    torch.save(tokens, tmp_path / "tokens.pt")
    command = [
        sys.executable,
        "-I",
        "-c",
        ALONE,
        folder,
        tmp_path / "again",
        tmp_path / "tokens.pt",
        tmp_path / "logits.pt",
    ]
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_MODULES_CACHE": str(tmp_path / "hf" / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    raised = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("RAISED")]
    assert raised == ["AutoModelForCausalLM", "AutoModel", "LlamaForCausalLM"]
    return torch.load(tmp_path / "logits.pt", weights_only=True)


def test_without_plrd_train_a_member_loads_itself_or_raises(member, tokens, tmp_path):
    folder, model, _ = member("llama")
    assert all(torch.equal(logits, model(tokens).logits) for logits in alone(folder, tokens, tmp_path))


@pytest.mark.parametrize("form", ["pifa", "int8"])
def test_without_plrd_train_a_member_of_a_form_does_too(packed_member, form, tokens, tmp_path):
    folder, _ = packed_member("llama", form)
    expected = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    assert all(torch.equal(logits, expected) for logits in alone(folder, tokens, tmp_path))


def test_config_alone_says_what_the_model_is(member):
    folder, model, _ = member("gemma2")
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is type(model.config) and config.hidden_size == 32 and config.model_type == "gemma2"
    assert isinstance(config, type(CONFIGS["gemma2"]))
