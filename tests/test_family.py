"""family.json: read back as written, replaced at once, and named where it is damaged."""

import json

import pytest

from plrd_train.errors import UserError
from plrd_train.family import Family


def test_what_is_written_is_read_back(tmp_path):
    family = Family.read(tmp_path, must_exist=False)
    assert (family.parent, family.members, family.has("2x")) == ({}, [], False)
    family.parent = {"path": "p", "params": 10, "eval": {"ppl": 3.5}}
    family.members.append({"name": "2x", "path": "members/2x", "ranks": {"a.b": 3}, "eval": {"ppl": 4.0}})
    family.write()
    again = Family.read(tmp_path)
    assert (again.parent, again.members) == (family.parent, family.members)
    assert again.has("2x") and not again.has("3x") and again.member_folder("2x") == tmp_path / "members" / "2x"
    assert json.loads((tmp_path / "family.json").read_text()) == {"parent": family.parent, "members": family.members}


def test_a_folder_without_one_is_no_family(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        Family.read(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", '{"parent": {}, "mem', "[]", '{"parent": {}}', '{"parent": 3, "members": []}', '{"parent": {}, "members": 3}'],
)
def test_a_damaged_one_is_named(tmp_path, content):
    (tmp_path / "family.json").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path / "family.json")) as caught:
        Family.read(tmp_path, must_exist=False)
    assert "\n" not in str(caught.value)
