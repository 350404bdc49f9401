"""`speed`: what it times is what it says, beside the parent."""

import json
import time

import pytest
import torch

from plrd_train.data.documents import EvalDocument
from plrd_train.errors import UserError
from plrd_train.evaluate import Subject
from plrd_train.evaluate.speed import Evaluator
from plrd_train.parents.published import find_published, open_published

SHAPE = {"prompt": 10, "tokens": 4, "batch": 2, "repeats": 3}


@pytest.fixture
def model(tiny):
    return open_published(find_published(str(tiny / "parent")), torch.float32)


def slowed(model, seconds: float, log: list) -> None:
    """Each forward takes at least `seconds`, and what it is given goes into `log`."""

    def wait(module, args, given):
        log.append(given["input_ids"].clone())
        time.sleep(seconds)

    model.model.register_forward_pre_hook(wait, with_kwargs=True)


def test_the_time_of_a_forward_is_the_latency_and_slower_parents_show(model, tiny):
    parent, seen, seen_of_parent = open_published(find_published(str(tiny / "parent")), torch.float32), [], []
    slowed(model, 0.02, seen)
    slowed(parent, 0.06, seen_of_parent)
    ids = torch.arange(3, 10).tolist()
    subject = Subject(model, model.tokenizer, [EvalDocument(ids, "C4")], lambda: parent)
    result = Evaluator(**SHAPE)(subject)
    assert 0.02 <= result["prefill"]["seconds"] < 0.05 and 0.02 <= result["decode"]["seconds_per_step"] < 0.05
    assert result["prefill"]["tokens_per_s"] == pytest.approx(20 / result["prefill"]["seconds"])
    assert result["decode"]["tokens_per_s"] == pytest.approx(2 / result["decode"]["seconds_per_step"])
    assert all(1.7 < times < 3.3 for times in result["against_parent"].values())
    assert (result["device"], result["shape"]["dtype"]) == ("cpu", "float32")
    assert json.loads(json.dumps(result)) == result
    assert [given.shape for given in seen] == 4 * [(2, 10), *4 * [(2, 1)]] == [given.shape for given in seen_of_parent]
    assert seen[0].flatten().tolist() == (3 * ids)[:20]
    with torch.no_grad():  # greedily, with no cache to go wrong
        whole = model.model.generate(seen[0], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(torch.cat(seen[:5], 1), whole)


def test_more_tokens_than_the_context_are_refused(model):
    subject = Subject(model, model.tokenizer, [EvalDocument([3, 4, 5], "C4")])
    with pytest.raises(UserError, match=r"60 \+ 5, exceed the 64 tokens"):
        Evaluator(prompt=60, tokens=5, batch=1, repeats=1)(subject)


def test_a_family_beside_its_parent(plrd_json, plrd, tiny, tmp_path):
    home = tmp_path / "family"
    plrd_json("factor", tiny / "parent", home, "--method", "svd", "--ratio", 2)
    options = ("--data", tiny / "corpus", "--tokens", 50, "--with", "speed", "speed.prompt=8", "speed.tokens=3")
    result = plrd_json("evaluate", home, *options)
    assert result["parent"]["speed"]["against_parent"] is None
    member = result["members"]["2x"]["speed"]
    assert member["shape"] == {"batch": 1, "prompt": 8, "tokens": 3, "dtype": "float32"}
    assert all(times > 0 for times in member["against_parent"].values())
    assert plrd_json("evaluate", home / "members" / "2x", *options)["speed"]["against_parent"]
    assert plrd_json("evaluate", tiny / "parent", *options)["speed"]["against_parent"] is None
    status, out, _ = plrd("evaluate", home, *options)
    assert status == 0 and "decode tokens_per_s" in out and "against_parent prefill" in out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--with", "sped"], "--with: there is no evaluator sped; choose of "),
        (["--with", "speed", "speed.prompts=3"], "evaluation.speed.prompts: unknown key; did you mean prompt?"),
        (["--with", "speed", "speed.prompt=many"], "evaluation.speed.prompt"),
        (["--with", "speed", "speed.prompt=["], "speed.prompt=[: this value cannot be read"),
        (["speed.prompt=3"], "speed.prompt=3: no setting of what --with names"),
    ],
)
def test_a_mistake_is_told_in_one_line(plrd, tiny, options, named):
    status, _, err = plrd("evaluate", tiny / "parent", "--data", tiny / "corpus", "--tokens", 50, *options)
    assert status == 2 and named in err and err.count("\n") == 1


def test_a_run_cannot_choose_it(command, tmp_path):
    from processes import run_job

    ended = run_job(1, command(tmp_path / "run", "evaluation=[perplexity,speed]"))
    assert ended.status == 2 and "evaluation.speed: it measures published models alone" in ended.err
