"""`PYTHONPATH=tests python -m faults --seed S --count N [--table FILE.md]`, in the root of the repository: a campaign
of N faults.

With `--family F` only the family of that number, whose faults follow from the seed and that number; and with `--only I`
no fault but its I-th: so each one can be replayed from what the campaign printed. What is timed by seconds, and what
threads do meanwhile, differs a little each time.

Where this user may mount one, all happens on a small tmpfs, which a full disk then is. Ends with status 1 where
something was not as it must be, and keeps the families that show it.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from faults.campaign import Campaign
from faults.table import as_json, table

ROOM = "96m"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, default=0)
    parser.add_argument("--family", type=int)
    parser.add_argument("--only", type=int)
    parser.add_argument("--table", type=Path)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "faults", folder], capture_output=True
    ).returncode
    began = time.monotonic()
    try:
        campaign = Campaign(folder, given.seed, lambda line: print(line, flush=True))
        campaign.run(given.count) if given.family is None else campaign.family(given.family, only=given.only)
        if campaign.problems:
            shutil.copytree(folder, kept := tempfile.mkdtemp(prefix="problems-"), dirs_exist_ok=True)
            print(f"the families with problems are kept in {kept}")
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)
        shutil.rmtree(folder)
    minutes = (time.monotonic() - began) / 60
    summary = (
        f"Seed {given.seed}: {len(campaign.met)} faults in {campaign.families} families and {campaign.starts} starts, "
        f"{len(campaign.problems)} problems, {minutes:.0f} minutes."
    )
    print(f"{summary}\n\n{table(campaign.met)}")
    if given.table:
        given.table.write_text(f"{summary}\n\n{table(campaign.met)}")
        given.table.with_suffix(".json").write_text(json.dumps(as_json(campaign.met), indent=1))
    return bool(campaign.problems)


if __name__ == "__main__":
    sys.exit(main())
