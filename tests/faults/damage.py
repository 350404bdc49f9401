"""Damage to the files that a restart goes on from, and which checkpoints are whole, by their checksums."""

import hashlib
import random
from pathlib import Path

FILES = ("*.safetensors", "*.safetensors", "progress.json", "sha256sums")  # the tensors are nearly all of it


def whole_checkpoints(run_dir: Path) -> list[Path]:
    """Newest first."""
    return [folder for folder in sorted(run_dir.glob("checkpoints/step-*[0-9]"), reverse=True) if _is_whole(folder)]


def _is_whole(folder: Path) -> bool:
    sums = folder / "sha256sums"
    expected = (
        dict(reversed(line.split("  ", 1)) for line in sums.read_text(errors="replace").split("\n") if "  " in line)
        if sums.exists()
        else {}
    )
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "sha256sums"
    }
    return bool(expected) and found == expected


def damage(kind: str, folder: Path, patterns: tuple[str, ...], seed: int) -> tuple[Path, bytes] | None:
    """Flip a byte of a file of `folder`, or cut it short. Returns the file, and what it held; None where there is
    none."""
    dice = random.Random(seed)
    files = sorted(folder.glob(dice.choice(patterns)))
    if not files:
        return None
    file = dice.choice(files)
    before = file.read_bytes()
    if kind == "a flipped byte":
        # In a digest: one in the name of a file changes nothing of value.
        place = dice.randrange(64 if file.name == "sha256sums" else len(before))
        content = bytearray(before)
        content[place] ^= 1 << dice.randrange(7)
    else:
        content = bytearray(before[: -dice.randint(2, len(before))])
    file.write_bytes(content)
    return file, before
