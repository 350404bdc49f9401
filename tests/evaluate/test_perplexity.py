"""Held-out perplexity by the engine, however it is batched and sharded, against plain transformers document by
document."""

import json
import math
from pathlib import Path

import plain
import pytest
import torch
from processes import run_ranks
from tiny_family import DOMAINS, document
from transformers import AutoModelForCausalLM, AutoTokenizer

from plrd_train.data.corpus import resolve_corpus
from plrd_train.data.documents import evaluation_documents
from plrd_train.engine.fsdp import Options, open_engine
from plrd_train.evaluate.perplexity import Perplexity, perplexity
from plrd_train.parents.models import HubArchitecture
from plrd_train.parents.parent import load_config, load_tokenizer, open_parent
from plrd_train.parents.weights import WeightReader


def write(folder: Path, count: int) -> Path:
    """`count` documents of 5 to 40 words and, among them, one without a text and one of a single word, on which nothing
    can be predicted."""
    texts = [document(i) for i in range(count)]
    texts[2:2] = ["", "w5"]
    rows = [json.dumps({"text": text, "meta": {"redpajama_set_name": DOMAINS[i % 3]}}) for i, text in enumerate(texts)]
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(rows))
    return folder


def measured(world, folder: Path, text: Path, context: int, tokens: int, batches: list[int]) -> list[Perplexity]:
    parent = open_parent(str(folder))
    engine = open_engine(Options(dtype="fp32", replicas=1, activation_checkpointing=False, compile=False), world)
    engine.load(HubArchitecture(load_config(parent)), WeightReader(parent))
    documents = evaluation_documents(resolve_corpus(str(text), "validation"), load_tokenizer(parent), context, tokens)
    return [perplexity(engine, documents, batch) for batch in batches]


@pytest.mark.parametrize(
    ("architecture", "ranks", "count", "context", "tokens"),
    [
        ("llama", 1, 23, 256, 10_000),
        ("mistral", 2, 23, 16, 10_000),
        ("gpt_neox", 3, 23, 256, 300),
        ("llama_tied_scaled_rope", 3, 2, 256, 10_000),
    ],
    ids=["one-rank", "sliding-window-cut-to-context", "stops-at-the-budget", "fewer-documents-than-ranks"],
)
def test_neither_batches_nor_ranks_change_it(save_parent, tmp_path, architecture, ranks, count, context, tokens):
    folder, _ = save_parent(architecture)
    text = write(tmp_path / "text", count)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ppl, predicted = plain.perplexity(model, tokenizer, text, context, tokens)
    for of_rank in run_ranks(ranks, measured, folder, text, context, tokens, [1, 3, 16]):
        for found in of_rank:
            assert found.ppl == pytest.approx(ppl, rel=1e-5) and found.tokens == predicted
            assert found.to_dict() == {"ppl": found.ppl, "nll_tokens": predicted, "domains": found.to_dict()["domains"]}


def test_domains_are_measured_apart(save_parent, tmp_path):
    folder, _ = save_parent("llama")
    text = write(tmp_path / "text", 12)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    (found,) = run_ranks(2, measured, folder, text, 256, 10_000, [4])[1]
    assert set(found.domains) == set(DOMAINS)
    assert sum(tokens for _, tokens in found.domains.values()) == found.tokens
    rows = [json.loads(line) for line in (text / "a.jsonl").read_text().splitlines()]
    for domain in DOMAINS:
        (tmp_path / domain).mkdir()
        own = [json.dumps(row) for row in rows if row["meta"]["redpajama_set_name"] == domain]
        (tmp_path / domain / "a.jsonl").write_text("\n".join(own))
        ppl, tokens = plain.perplexity(model, tokenizer, tmp_path / domain, 256, 10_000)
        assert found.domains[domain][1] == tokens and found.to_dict()["domains"][domain] == pytest.approx(ppl, rel=1e-5)


def test_what_overflows_is_infinite_and_not_an_error():
    assert Perplexity(5000.0, 2, {}).ppl == math.inf and Perplexity(2 * math.log(3.0), 2, {}).ppl == pytest.approx(3.0)
    assert math.isnan(Perplexity(math.nan, 2, {}).ppl)
    worst = Perplexity(math.nan, 2, {"C4": (5000.0, 1), "Book": (math.nan, 1)}).to_dict()
    assert worst == {"ppl": None, "nll_tokens": 2, "domains": {"Book": None, "C4": None}}  # what JSON cannot say


def test_the_model_is_left_without_gradients(save_parent, tmp_path):
    folder, _ = save_parent("llama")
    assert run_ranks(1, no_gradients, folder, write(tmp_path / "text", 3)) == [True]


def no_gradients(world, folder: Path, text: Path) -> bool:
    parent = open_parent(str(folder))
    engine = open_engine(Options(dtype="fp32", replicas=1, activation_checkpointing=False, compile=False), world)
    engine.load(HubArchitecture(load_config(parent)), WeightReader(parent))
    perplexity(
        engine, evaluation_documents(resolve_corpus(str(text), "validation"), load_tokenizer(parent), 256, 1000), 2
    )
    return torch.is_grad_enabled() and all(parameter.grad is None for parameter in engine.model.parameters())
