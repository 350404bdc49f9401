"""Opening parents: what is wrong with one is said in one line before any work."""

import json
import shutil
import threading
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import sentencepiece
import torch
import transformers.dynamic_module_utils
from safetensors.torch import load_file
from tiny_parents import CONFIGS, save_tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from plrd_train.errors import UserError
from plrd_train.parents.parent import Parent, load_config, load_tokenizer, open_parent


def refused(path: Path | str, said: str, **arguments) -> None:
    with pytest.raises(UserError, match=said) as error:
        open_parent(str(path), **arguments)
    assert "\n" not in str(error.value)


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_parent_is_plain_json_and_lists_the_shards(save_parent):
    folder, model = save_parent("qwen2", max_shard_size=15_000)
    parent = open_parent(str(folder))
    assert Parent(**json.loads(json.dumps(asdict(parent)))) == parent
    assert parent.revision is None and parent.path == parent.folder == str(folder)
    assert set(parent.weights) == {name for name, _ in model.named_parameters()}
    assert all(name in load_file(folder / file) for name, file in parent.weights.items())


def test_real_parent_tokenizes_as_sentencepiece(assets):
    folder = assets / "parents" / "stories260k"
    parent = open_parent(str(folder))
    text = "Once upon a time, there was a little girl."
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert load_tokenizer(parent)(text).input_ids == [1, *reference.encode(text)]
    assert load_config(parent).hidden_size == 64


def test_path_that_is_nothing(tmp_path):
    refused(tmp_path / "nowhere", r"nowhere: no such folder, and not a valid hub id")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"has no config\.json")


def test_config_that_is_not_one_of_a_causal_lm(save_parent, tmp_path):
    folder, _ = save_parent("llama")
    size = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 64,
    }
    others = {
        "classifier": LlamaForSequenceClassification(CONFIGS["llama"]),
        "bert": BertForSequenceClassification(BertConfig(**size)),
        "t5": T5ForConditionalGeneration(
            T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
    }
    for name, model in others.items():
        model.save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name)
        refused(tmp_path / name, r"config\.json: .* is not a causal LM")
    edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    refused(folder, "quantized")
    edit(folder / "config.json", model_type="of_next_year", quantization_config=None)
    refused(folder, r"config\.json: .*of_next_year")
    edit(folder / "config.json", model_type="theirs", auto_map={"AutoConfig": "theirs.Config"})
    (folder / "theirs.py").write_text("raise SystemExit('remote code ran')")
    refused(folder, r"config\.json: .*custom code", trust_remote_code=True)
    (folder / "config.json").write_text('{"model_type": ')
    refused(folder, r"config\.json.* not a valid JSON")


def test_tokenizer_is_missing_damaged_or_of_another_model(save_parent):
    folder, _ = save_parent("llama")
    save_tokenizer(folder, size=65)
    with pytest.raises(UserError, match=r"has the id 64, but config\.json a vocab_size of 64"):
        load_tokenizer(open_parent(str(folder)))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="its tokenizer does not load") as error:
        load_tokenizer(open_parent(str(folder)))
    assert "\n" not in str(error.value)
    (folder / "tokenizer.json").unlink()
    refused(folder, "has no tokenizer")


def test_tokenizer_of_remote_code_runs_only_when_trusted(save_parent, monkeypatch, tmp_path):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder, _ = save_parent("llama")
    (folder / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast): pass\n"
    )
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="Own",
        auto_map={"AutoTokenizer": [None, "tokenization_own.Own"]},
    )
    parent = open_parent(str(folder))
    with pytest.raises(UserError, match=r"its tokenizer does not load .*custom code"):
        load_tokenizer(parent)
    assert not (tmp_path / "modules").exists()
    assert type(load_tokenizer(parent, trust_remote_code=True)).__name__ == "Own"


def test_weights_that_are_missing_or_damaged(save_parent):
    folder, model = save_parent("llama")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for cut in (len(whole) - 100, 100, 4, 0):
        file.write_bytes(whole[:cut])
        refused(folder, r"model\.safetensors: truncated")
    file.unlink()
    refused(folder, r"has no model\.safetensors")
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    refused(folder, r"only \.bin weights; convert")


def test_index_is_checked_against_its_files(save_parent, tmp_path):
    folder, _ = save_parent("llama", max_shard_size=12_000)
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    name, shard = next(iter(good.items()))
    shutil.copyfile(folder / shard, tmp_path / "outside.safetensors")
    for outside in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        edit(index, weight_map=good | {name: outside})
        refused(folder, "outside its folder")
    edit(index, weight_map=good | {name: "model-9.safetensors"})
    refused(folder, r"model-9\.safetensors, which is missing")
    edit(index, weight_map=good | {"model.more": shard})
    refused(folder, r"holds model\.more, which it does not")
    for damaged in ([], {name: 3}, None):
        edit(index, weight_map=damaged)
        refused(folder, r"index\.json: needs .weight_map.")
    index.write_text("{")
    refused(folder, r"index\.json: needs .weight_map.")


# The hub: the real client, against the answers of a real server on this machine.

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        errors = {
            "gated": (403, "GatedRepo"),
            "absent": (404, "RepoNotFound"),
            "unborn": (404, "RevisionNotFound"),
            "broken": (400, ""),
        }
        status, code = next(answer for name, answer in errors.items() if name in self.path)
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield tmp_path / "cache"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("someone/gated", "accept its terms .* HF_TOKEN"),
        ("someone/absent", "no such folder, and no such model on the hub"),
        ("someone/unborn", "no revision v9"),
        ("someone/broken", "neither a folder nor a hub id that can be reached"),
    ],
)
def test_hub_refusals_are_one_line(hub, path, said):
    refused(path, said, revision="v9")


def test_hub_out_of_reach_is_one_line_unless_the_parent_is_cached(hub, monkeypatch, save_parent):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("someone/tiny", "neither a folder nor a hub id that can be reached")
    folder, _ = save_parent("llama")
    cached = hub / "models--someone--tiny"
    shutil.copytree(folder, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    parent = open_parent("someone/tiny")
    assert parent.path == "someone/tiny" and parent.revision == COMMIT
    assert parent.weights == open_parent(str(folder)).weights
    assert open_parent("someone/tiny", revision=COMMIT) == parent
