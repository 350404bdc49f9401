"""Factors that outlive a crash: given back as they were put, or not at all."""

import os

import pytest
import torch

from plrd_train.compress.factor_cache import FactorCache

FACTORS = {
    "up": torch.randn(4, 2, generator=torch.Generator().manual_seed(0)),
    "down": torch.ones(2, 3),
    "errors": torch.ones(2, dtype=torch.float64),
}


def same(found: dict[str, torch.Tensor] | None) -> bool:
    return (
        found is not None
        and found.keys() == FACTORS.keys()
        and all(torch.equal(found[part], tensor) for part, tensor in FACTORS.items())
    )


def test_what_was_put_is_given_back_under_its_key_alone(tmp_path):
    kept = FactorCache(tmp_path / "factors", torch.device("cpu"))
    assert kept.get("a", "key") is None
    kept.put("a", "key", FACTORS)
    assert same(FactorCache(tmp_path / "factors", torch.device("cpu")).get("a", "key"))
    assert kept.get("a", "other") is None and kept.get("b", "key") is None


def test_of_a_damaged_file_nothing_is_given_back(tmp_path):
    kept = FactorCache(tmp_path, torch.device("cpu"))
    kept.put("a", "key", FACTORS)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    data = len(whole) - sum(tensor.nbytes for tensor in FACTORS.values())
    for place in range(0, len(whole), 5):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        file.write_bytes(flipped)
        found = kept.get("a", "key")
        assert found is None or (place < data and same(found)), place  # the header's padding may hold anything
        file.write_bytes(whole[:place])
        assert kept.get("a", "key") is None
    file.write_bytes(whole)
    assert same(kept.get("a", "key"))


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_what_is_kept_for_a_restart_has_the_permissions_that_the_umask_leaves(tmp_path, umask):
    before = os.umask(umask)
    try:
        FactorCache(tmp_path / "factors", torch.device("cpu")).put("a", "key", FACTORS)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"factors": 0o777 & ~umask, "a.safetensors": 0o666 & ~umask}


def test_what_cannot_be_kept_is_said_in_one_line(tmp_path):
    (tmp_path / "factors").write_text("a file where the folder should be")
    with pytest.raises(
        OSError,
        match=rf"^{tmp_path}/factors/a\.part: this cannot be written \([^\n]*\); mend that, and the same command "
        rf"goes on$",
    ):
        FactorCache(tmp_path / "factors", torch.device("cpu")).put("a", "key", FACTORS)
