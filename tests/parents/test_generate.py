"""Completions are those of transformers' own generate, and greedy ones those of a loop over the logits, whatever
generation_config.json says."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_parents import CONFIGS
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import plrd_train  # noqa: F401, members load after it
from plrd_train.errors import UserError
from plrd_train.parents.generate import generate
from plrd_train.parents.published import find_published, open_published

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


@pytest.fixture
def lively(save_parent):
    """lively(architecture) -> (folder, model): a parent with weights so large that its greedy text has many words."""

    def save(architecture: str) -> tuple[Path, PreTrainedModel]:
        folder, model = save_parent(architecture)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        model.save_pretrained(folder)
        return folder, model

    return save


def greedy(model: PreTrainedModel, ids: list[int], max_tokens: int, ends: tuple[int, ...] = ()) -> list[int]:
    """What follows `ids`: the likeliest token, again and again, up to one of `ends`, which is written, too."""
    written: list[int] = []
    while len(written) < max_tokens and not (written and written[-1] in ends):
        written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
    return written


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


# Each would change or end the text of the test, or be refused by transformers, were it passed on.
SETTINGS = {
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "stop_strings": ["w"],
    "return_dict_in_generate": True,
    "num_return_sequences": 3,
    "num_beams": 3,
    "max_new_tokens": 2,
    "min_new_tokens": 19,
    "max_time": 0.0,
    "suppress_tokens": [34],
    "begin_suppress_tokens": [34],
    "bad_words_ids": [[34]],
    "sequence_bias": [[[34], -1e6]],
    "exponential_decay_length_penalty": [1, 1e6],
    "guidance_scale": 3.0,
    "token_healing": True,
    "cache_implementation": "nowhere",
    "watermarking_config": {"what": 1},
    "penalty_alpha": 0.6,
    "validate": 3,  # a name that transformers uses itself, as one of its next year's settings might
}


def set_in(folder: Path, file: str = "generation_config.json", **settings: object) -> None:
    content = json.loads((folder / file).read_text())
    content.pop("_from_model_config", None)  # transformers passes over what it does not know in a file with it
    (folder / file).write_text(json.dumps(content | settings))


def check_greedy(folder: Path, model: PreTrainedModel, prompt: list[int], ends: tuple[int, ...]) -> None:
    published = open_published(find_published(str(folder)))
    completion = generate(published, " ".join(f"w{token}" for token in prompt), 20)
    expected = greedy(model, prompt, 20, ends)
    text = published.tokenizer.decode(expected, skip_special_tokens=True)
    assert (completion.text, completion.tokens) == (text, len(expected))


# One by one they say which of them is at fault.
@pytest.mark.parametrize("name", ["all of them", *(pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS)])
def test_a_models_own_settings_of_generation_do_not_count(name, lively):
    folder, model = lively("llama")
    whole = greedy(model, [5, 6, 7], 20)
    assert whole[0] == 34 and whole[10] not in whole[:10] and len(set(whole[:10])) < 10
    set_in(folder, eos_token_id=whole[10], **(SETTINGS if name == "all of them" else {name: SETTINGS[name]}))
    check_greedy(folder, model, [5, 6, 7], ends=(whole[10],))


def test_old_settings_in_config_json_do_not_count_either(lively):
    """transformers takes them from there where there is no generation_config.json, as in folders of old versions."""
    folder, model = lively("gpt_neox")
    (folder / "generation_config.json").unlink()
    old = {"do_sample": True, "num_beams": 3, "repetition_penalty": 5.0, "return_dict_in_generate": True}
    end = greedy(model, [5, 6, 7], 20)[12]
    set_in(folder, "config.json", eos_token_id=end, **old)
    check_greedy(folder, model, [5, 6, 7], ends=(end,))


def test_what_a_member_has_of_its_parent_does_not_count(lively, plrd_json, tmp_path):
    folder, _ = lively("llama")
    set_in(folder, **SETTINGS)
    plrd_json("factor", folder, tmp_path / "family", "--method", "svd", "--ratio", "1.5")
    member = tmp_path / "family" / "members" / "1.5x"
    assert (member / "generation_config.json").read_bytes() == (folder / "generation_config.json").read_bytes()
    shutil.copytree(member, tmp_path / "plain")
    (tmp_path / "plain" / "generation_config.json").unlink()  # with it transformers does not load the member
    check_greedy(member, AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), [7, 9], ends=(2,))


@pytest.mark.parametrize(
    ("ids", "end"),
    [
        (lambda written: written[3], 3),
        (lambda written: [written[5], written[3]], 3),
        (lambda written: [-1, 10**30, written[3]], 3),
        (lambda _: -1, None),
        (lambda _: [], None),
        (lambda _: None, None),
    ],
)
def test_the_text_ends_with_an_end_of_text_token(ids, end, lively):
    folder, model = lively("llama")
    whole = greedy(model, [7, 9], 20)
    assert len(set(whole[:6])) == 6
    set_in(folder, eos_token_id=ids(whole))
    set_in(folder, "config.json", eos_token_id=whole[1])  # counts where generation_config.json has no such key
    completion = generate(open_published(find_published(str(folder))), "w7 w9", 20)
    assert completion.tokens == (20 if end is None else end + 1)
    assert completion.text.split() == [f"w{token}" for token in whole[: completion.tokens]]


def test_samples_follow_seed_and_temperature(published):
    greedy = generate(published, "w7 w9", 12).text
    assert generate(published, "w7 w9", 12, temperature=1e-4, seed=3).text == greedy
    # A folder's own habits of sampling do not count.
    set_in(Path(published.folder), do_sample=True, top_k=1, top_p=0.01, temperature=0.1)
    published = open_published(find_published(published.folder))
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
