"""A campaign of faults (`python -m faults`): after each the same command is run again, and the family is that of a run
left in peace, to the bit."""

import pytest

from faults.campaign import Campaign


def campaign(folder, seed: int, count: int) -> None:
    folder.mkdir()
    made = Campaign(folder, seed)
    made.run(count)
    assert made.problems == [] and len(made.met) == count


def test_five_faults(tmp_path):
    campaign(tmp_path / "campaign", 5, 5)


@pytest.mark.faults
def test_forty_faults(tmp_path):
    campaign(tmp_path / "campaign", 7, 40)
