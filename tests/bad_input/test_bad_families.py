"""Malformed families and members, each given to the commands that read one."""

import bad_families
import pytest


@pytest.mark.parametrize("name", bad_families.FAMILIES)
def test_a_malformed_family_is_refused(name, sound, spoiled, refused):
    case = bad_families.FAMILIES[name]
    family = spoiled("family", case)
    for arguments in (
        ("show", family),
        ("show", family, "--json"),
        ("report", family),
        ("evaluate", family, "--data", sound / "corpus"),
        ("factor", sound / "parent", family, "--method", "svd", "--ratio", "3"),
    ):
        refused(case.named, *arguments)


@pytest.mark.parametrize("name", bad_families.MEMBERS)
def test_a_malformed_member_is_refused(name, sound, spoiled, refused):
    case = bad_families.MEMBERS[name]
    family = spoiled("family", case)
    refused(case.named, "generate", family / "members" / "2x", "--prompt", "w3")
    refused(case.named, "evaluate", family, "--data", sound / "corpus", "--tokens", "50")
