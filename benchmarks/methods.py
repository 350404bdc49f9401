"""Held-out perplexity of untrained members, over the parent's: each method, allocation and form against plain SVD with
uniform ranks as pairs of factors, of the same parent, on the same text. It needs the test assets (PLRD_ASSETS)."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import Row

ASSETS = Path(os.environ.get("PLRD_ASSETS", "../shared"))
PARENT, CORPUS = ASSETS / "parents" / "stories3m", ASSETS / "data" / "tinystories"
RATIOS = (1.25, 1.5, 1.85, 2.25)
SETTINGS = (
    "data.seq_len=256",
    "data.streams=8",
    "data.append_eos=false",
    "evaluation.tokens=50000",
    "evaluation.batch=16",
)
CHOICES = (
    *(("svd", ranks) for ranks in ("uniform", "energy", "sensitivity")),
    ("asvd", "uniform"),
    ("fisher", "uniform"),
    *(("whitened", ranks) for ranks in ("uniform", "energy", "sensitivity")),
    *(("rom", ranks) for ranks in ("uniform", "energy")),
    *(("refined", ranks) for ranks in ("uniform", "energy", "sensitivity")),
)
# int8 has the ranks of lowrank, and all that it adds is rounding: one row shows how much.
FORMS = {"lowrank": CHOICES, "pifa": CHOICES, "int8": (("whitened", "energy"),)}


def rows() -> Iterator[Row]:
    if not PARENT.is_dir():
        print(f"methods: no test assets in {ASSETS} (set PLRD_ASSETS)")
        return
    plain: dict[float, float] = {}
    for form, choices in FORMS.items():
        for method, ranks in choices:
            for ratio, multiple in _multiples(form, method, ranks).items():
                plain.setdefault(ratio, multiple)  # the first of the choices
                yield Row(
                    f"perplexity over the parent's: {form}, {method}, {ranks}",
                    multiple,
                    plain[ratio],
                    "x",
                    f"stories3m at {ratio:g}x",
                )


def _multiples(form: str, method: str, ranks: str) -> dict[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        ratios = ",".join(map(str, RATIOS))
        chosen = ["--form", form, "--method", method, "--ranks", ranks, "--ratio", ratios]
        options = [*chosen, "--calibration", CORPUS, "--data", CORPUS, *SETTINGS, "--json"]
        command = [sys.executable, "-m", "plrd_train.cli", "factor", PARENT, f"{folder}/family", *options]
        family = json.loads(
            subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout
        )
    base = family["parent"]["eval"]["ppl"]
    return {member["ratio_requested"]: member["eval"]["ppl"] / base for member in family["members"]}
