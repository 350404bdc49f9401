"""Malformed parents and tokenizers, each given to the commands that read one."""

import bad_parents
import pytest
from malformed import Bad

ONE_FILE = bad_parents.CONFIGS | bad_parents.WEIGHT_FILES | bad_parents.TOKENIZERS | bad_parents.GENERATION_CONFIGS
KIND_AND_CASE = [*(("parent", name) for name in ONE_FILE), *(("sharded", name) for name in bad_parents.INDICES)]


# What only those notice who read the weights themselves.
READ = [(kind, name) for kind, name in KIND_AND_CASE if name in bad_parents.READ]


def case_of(kind: str, name: str) -> Bad:
    return (ONE_FILE if kind == "parent" else bad_parents.INDICES)[name]


@pytest.mark.parametrize(("kind", "name"), KIND_AND_CASE, ids=[name for _, name in KIND_AND_CASE])
def test_a_malformed_parent_is_refused(kind, name, spoiled, refused):
    case = case_of(kind, name)
    refused(case.named, "generate", spoiled(kind, case), "--prompt", "w3 w9", "--max-tokens", "3")


@pytest.mark.parametrize(("kind", "name"), READ, ids=[name for _, name in READ])
def test_none_is_factored(kind, name, spoiled, refused, tmp_path):
    case = case_of(kind, name)
    refused(case.named, "factor", spoiled(kind, case), tmp_path / "out", "--method", "svd", "--ratio", "2")
    assert not [*tmp_path.glob("out/members/*")]


ONE_OF_EACH = (f"{bad_parents.GENERATION}: a list", f"{bad_parents.GENERATION}: empty", "the end of text is a token")


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_what_generation_alone_reads_is_no_matter_for_evaluation(name, spoiled, sound, plrd_json):
    folder = spoiled("parent", bad_parents.GENERATION_CONFIGS[name])
    measure = ("--data", sound / "corpus", "--tokens", 100)
    assert plrd_json("evaluate", folder, *measure) == plrd_json("evaluate", sound / "parent", *measure)
