"""Completions are those of transformers' own generate."""

import pytest
import torch
from tiny_parents import CONFIGS
from transformers import AutoModelForCausalLM, AutoTokenizer

from plrd_train.errors import UserError
from plrd_train.evaluation.generate import generate
from plrd_train.evaluation.published import find_published, open_published

CONTEXT = CONFIGS["llama"].max_position_embeddings


@pytest.fixture
def published(save_parent):
    folder, _ = save_parent("llama")
    return open_published(find_published(str(folder)))


def reference(folder: str, prompt: str, max_tokens: int) -> tuple[str, int]:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=max_tokens, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(written, skip_special_tokens=True), len(written)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt_neox"])
def test_greedy_text_is_that_of_transformers(architecture, save_parent):
    folder, _ = save_parent(architecture)
    completion = generate(open_published(find_published(str(folder))), "w7 w9 w11", 20)
    assert (completion.text, completion.tokens) == reference(str(folder), "w7 w9 w11", 20)
    assert completion.tokens == 20 and completion.seconds > 0


def test_greedy_text_of_a_real_parent(assets):
    folder = str(assets / "parents" / "stories260k")
    completion = generate(open_published(find_published(folder)), "Once upon a time", 40)
    assert (completion.text, completion.tokens) == reference(folder, "Once upon a time", 40)


def test_the_text_ends_with_the_end_of_text_token(published):
    plain = generate(published, "w7 w9", 20)
    published.model.generation_config.eos_token_id = published.tokenizer.convert_tokens_to_ids(plain.text.split()[3])
    ended = generate(published, "w7 w9", 20)
    assert 0 < ended.tokens <= 4 and plain.text.startswith(ended.text)


def test_samples_follow_seed_and_temperature(published):
    greedy = generate(published, "w7 w9", 12).text
    assert generate(published, "w7 w9", 12, temperature=1e-4, seed=3).text == greedy
    published.model.generation_config.update(top_k=1, top_p=0.01)  # a folder's own habits of sampling do not count
    hot = [generate(published, "w7 w9", 12, temperature=2.0, seed=seed).text for seed in (0, 0, 1)]
    assert hot[0] == hot[1] != hot[2] and hot[0] != greedy
    before = torch.get_rng_state()
    generate(published, "w7 w9", 2, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_first_tokens_are_drawn_from_the_softmax(published):
    ids = torch.tensor([published.tokenizer("w7 w9").input_ids])
    expected = (published.model(ids).logits[0, -1].double() / 3.0).softmax(0)
    n = 400
    drawn = [generate(published, "w7 w9", 1, temperature=3.0, seed=seed).text for seed in range(n)]
    likely = expected.topk(12).indices.tolist()
    counts = torch.tensor([drawn.count(published.tokenizer.decode([i], skip_special_tokens=True)) for i in likely])
    probabilities = expected[likely]
    assert ((counts - n * probabilities).abs() < 5 * (n * probabilities * (1 - probabilities)).sqrt()).all()


def test_a_prompt_may_fill_the_context_but_not_exceed_it(published):
    assert generate(published, "w5 " * CONTEXT, 9).tokens == 1
    assert generate(published, "w5 " * (CONTEXT - 4), 9).tokens == 5
    with pytest.raises(UserError, match=f"{CONTEXT + 1} tokens, but .* reads at most {CONTEXT}; shorten it"):
        generate(published, "w5 " * (CONTEXT + 1), 9)


def test_a_prompt_without_tokens_is_refused(published):
    with pytest.raises(UserError, match="no token"):
        generate(published, "", 9)
