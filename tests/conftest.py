"""Fixtures that every test may use. The only place under tests/ that knows where the real parents and corpora lie."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real parents, corpora and evaluation sets (`PLRD_ASSETS`, by default `../shared`); the test is skipped where it is absent."""
    folder = Path(os.environ.get("PLRD_ASSETS", ROOT.parent / "shared")).resolve()
    if not (folder / "parents").is_dir():
        pytest.skip(f"no test assets in {folder} (set PLRD_ASSETS)")
    return folder
