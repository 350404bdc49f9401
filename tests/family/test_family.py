"""family.json: read back as written, replaced at once, and named where it is damaged."""

import json

import pytest
from records import member

from plrd_train.errors import UserError
from plrd_train.family import Family, Member, ParentRecord, Scores

PARENT = {"path": "p", "params": 10, "eval": {"ppl": 3.5}}


def content(**more) -> str:
    return json.dumps({"parent": PARENT, "members": [member("2x"), member("3x")], **more})


def test_what_is_written_is_read_back(tmp_path):
    assert Family.find(tmp_path) is None
    family = Family(tmp_path, ParentRecord(path="p", params=10, eval=Scores(ppl=3.5)))
    family.members.append(Member(**member("2x", engine=None, eval=Scores(ppl=4.0, nll_tokens=5))))
    family.write()
    again = Family.read(tmp_path)
    assert again == family and again.has("2x") and not again.has("3x")
    assert again.member_folder("2x") == tmp_path / "members" / "2x"
    expected = member("2x", engine=None, eval={"ppl": 4.0, "nll_tokens": 5})  # what was not given is not there
    assert json.loads((tmp_path / "family.json").read_text()) == {"parent": PARENT, "members": [expected]}


def test_what_is_unknown_is_kept(tmp_path):
    eval_ = {"ppl": 4.0, "nll_tokens": 5, "mine": {"accuracy": 0.5}}
    kept = {
        "parent": {**PARENT, "licence": "free"},
        "members": [member("2x", note="by hand", eval=eval_)],
        "of": {"version": 7},
    }
    (tmp_path / "family.json").write_text(json.dumps(kept))
    Family.read(tmp_path).write()
    assert json.loads((tmp_path / "family.json").read_text()) == kept


def test_a_perplexity_that_is_not_finite_was_not_measured(tmp_path):
    text = content().replace("3.5", "1e999")
    (tmp_path / "family.json").write_text(text)
    assert Family.read(tmp_path).parent.ppl is None


def test_a_folder_without_one_is_no_family(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        Family.read(tmp_path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "JSON"),
        (content()[:40], "JSON"),
        ("[]", ""),
        ("[" * 9999, "JSON"),
        ('{"parent": {}}', "parent.path"),
        (content(parent=3), "parent"),
        (content(members=3), "members"),
        (content(members=[member("2x"), member("3x", params="many")]), "members[1].params"),
        (content(members=[member("2x", ranks={"a": True})]), "members[0].ranks.a"),
        (content(members=[member("2x", eval={"ppl": 0})]), "members[0].eval.ppl"),
        (content(members=[member("2x"), member("2x")]), "members[1]"),
        (content(members=[member("2x", path="../2x")]), "members[0]"),
    ],
)
def test_a_damaged_one_is_named(tmp_path, text, named):
    (tmp_path / "family.json").write_text(text)
    with pytest.raises(UserError) as caught:
        Family.find(tmp_path)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'family.json'}: not a family.json (") and named in said
    assert "\n" not in said and len(said) < 400
