"""Run folders that no run can go on from. The sound one is a run stopped for good after two members, with the
checkpoints of both stages."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from malformed import Bad, Spoil, bad, cut, folder_instead, gone, holding, unreadable_json, with_key, without_key
from safetensors.torch import load_file, save_file

LAST = "checkpoints/step-00000006-stage-2"
PROGRESS = f"{LAST}/progress.json"


def sealed(spoil: Spoil) -> Spoil:
    """Of all checkpoints but the last none is left, and its checksums are those of what `spoil` made of it, as an
    editor of it would write them."""

    def spoiled(folder: Path) -> None:
        for other in folder.glob("checkpoints/step-*"):
            if other != folder / LAST:
                shutil.rmtree(other)
        spoil(folder)
        files = sorted(path for path in (folder / LAST).iterdir() if path.is_file() and path.name != "sha256sums")
        lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
        (folder / LAST / "sha256sums").write_text("".join(lines))

    return spoiled


def every(name: str, change: Callable[[bytes], bytes]) -> Spoil:
    """The files of this name in all checkpoints."""

    def spoil(folder: Path) -> None:
        for path in folder.glob(f"checkpoints/step-*/{name}"):
            path.write_bytes(change(path.read_bytes()))

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Spoil:
    def spoil(folder: Path) -> None:
        (path,) = (folder / LAST).glob("*.safetensors")
        found = load_file(path)
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        change(found)
        save_file(found, path, metadata=header.get("__metadata__"))

    return spoil


def of_another_run(folder: Path) -> None:
    """Each tensor of another width, as the checkpoint of another parent has them."""
    tensors(
        lambda found: found.update(
            {name: torch.zeros([size + 8 for size in tensor.shape]) for name, tensor in found.items()}
        )
    )(folder)


def config(change: Callable[[dict], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        content = yaml.safe_load((folder / "config.yaml").read_text())
        change(content)
        (folder / "config.yaml").write_text(yaml.safe_dump(content))

    return spoil


def beside(path: str, content: str | None) -> Spoil:
    """A file, or a folder, that no run has written, in every checkpoint."""

    def spoil(folder: Path) -> None:
        for checkpoint in folder.glob("checkpoints/step-*"):
            if content is None:
                (checkpoint / path).mkdir()
            else:
                (checkpoint / path).write_text(content)

    return spoil


DAMAGED = ("checkpoints", "every checkpoint here is damaged")
RUNS: dict[str, Bad] = {
    **{
        f"run: {name}": bad(sealed(case.spoil), "progress.json")
        for name, case in unreadable_json(PROGRESS).items()
        if "folder" not in name
    },
    "run: config.yaml a list": bad(holding("config.yaml", b"[1, 2]"), "config.yaml"),
    "run: config.yaml empty": bad(holding("config.yaml", b""), "config.yaml"),
    "run: config.yaml no YAML": bad(holding("config.yaml", b"a: [1"), "config.yaml"),
    "run: config.yaml not UTF-8": bad(holding("config.yaml", b"a: \xff\xfe\xfa"), "config.yaml"),
    "run: config.yaml of control characters": bad(holding("config.yaml", b"a: \x00\x01"), "config.yaml"),
    "run: config.yaml nested without end": bad(holding("config.yaml", b"[" * 5000), "config.yaml"),
    "run: config.yaml with a Python object": bad(
        holding("config.yaml", b"a: !!python/object/apply:os.system ['touch ran']"), "config.yaml"
    ),
    "run: config.yaml a folder": bad(folder_instead("config.yaml"), "config.yaml"),
    "run: config.yaml without a parent": bad(config(lambda c: c.pop("parent")), "config.yaml"),
    "run: config.yaml with a parent of text": bad(config(lambda c: c.update(parent="tiny")), "config.yaml"),
    "run: config.yaml without a revision": bad(config(lambda c: c["data"].pop("revision")), "config.yaml"),
    "run: config.yaml of another seed": bad(config(lambda c: c.update(seed=9)), "seed"),
    "run: config.yaml with a key of old": bad(config(lambda c: c.update(old=1)), "config.yaml", "old"),
    "run: family.json is gone": bad(gone("family.json"), "family.json"),
    "run: family.json is truncated": bad(cut("family.json", -30), "family.json"),
    "run: family.json is a folder": bad(folder_instead("family.json"), "family.json"),
    "run: a member leaves the folder": bad(
        with_key("family.json", "members", 1, "path", value="../2x"), "family.json", "../2x"
    ),
    "run: metrics without steps": bad(holding("metrics.jsonl", b'{"loss": 1}\n'), "metrics.jsonl"),
    "run: metrics with steps of text": bad(
        holding("metrics.jsonl", b'{"step": "one", "tokens/total": 1}\n'), "metrics.jsonl"
    ),
    "run: metrics without tokens": bad(holding("metrics.jsonl", b'{"step": 0}\n'), "metrics.jsonl"),
    "run: events without steps": bad(holding("events.jsonl", b'{"kind": 1}\n'), "events.jsonl"),
    "run: metrics is a folder": bad(folder_instead("metrics.jsonl"), "metrics.jsonl"),
    "run: progress without counters": bad(sealed(without_key(PROGRESS, "counters")), "progress.json"),
    "run: progress with a key of next year": bad(sealed(with_key(PROGRESS, "more", value=1)), "progress.json"),
    "run: progress with stages of text": bad(sealed(with_key(PROGRESS, "stages", value="two")), "progress.json"),
    "run: progress with steps of text": bad(
        sealed(with_key(PROGRESS, "counters", "steps", value="six")), "progress.json"
    ),
    "run: progress with steps of another": bad(
        sealed(with_key(PROGRESS, "counters", "steps", value=600)), "progress.json"
    ),
    "run: progress with ranks of a list": bad(sealed(with_key(PROGRESS, "ranks", value=[3])), "progress.json"),
    "run: progress with a rank of another": bad(
        sealed(with_key(PROGRESS, "ranks", "model.layers.0.mlp.up_proj", value=2)), "step-00000006"
    ),
    "run: progress with a rank of nothing": bad(
        sealed(with_key(PROGRESS, "ranks", "model.layers.9.mlp.up_proj", value=2)), "progress.json"
    ),
    "run: progress with an entry of no name": bad(sealed(without_key(PROGRESS, "entry", "name")), "progress.json"),
    "run: progress with an entry of text": bad(sealed(with_key(PROGRESS, "entry", value="2x")), "progress.json"),
    "run: progress with a position of text": bad(sealed(with_key(PROGRESS, "position", value="here")), "progress.json"),
    "run: progress without a cursor": bad(sealed(without_key(PROGRESS, "position", "cursors", "3")), "progress.json"),
    "run: progress with a short cursor": bad(
        sealed(with_key(PROGRESS, "position", "cursors", "3", value=[0, 1])), "progress.json"
    ),
    "run: progress of another corpus": bad(
        sealed(with_key(PROGRESS, "position", "corpus", value="0123456789abcdef")), "data.train"
    ),
    "run: progress of another tokenizer": bad(
        sealed(with_key(PROGRESS, "position", "tokenizer", value="0123456789abcdef")), "parent.path"
    ),
    "run: a checkpoint of another run": bad(sealed(of_another_run), "step-00000006"),
    "run: a checkpoint without tensors": bad(sealed(tensors(lambda found: found.clear())), "step-00000006"),
    "run: a checkpoint without one tensor": bad(sealed(tensors(lambda found: found.pop(min(found)))), "step-00000006"),
    "run: a checkpoint without its tensors' file": bad(
        sealed(lambda folder: [path.unlink() for path in (folder / LAST).glob("*.safetensors")]), "step-00000006"
    ),
    "run: a checkpoint of a pickle": bad(
        sealed(
            lambda folder: [
                path.write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.") for path in (folder / LAST).glob("*.safetensors")
            ]
        ),
        "step-00000006",
    ),
    "run: checkpoints cut": bad(every("*.safetensors", lambda whole: whole[:-9]), *DAMAGED),
    "run: checkpoints with a flipped bit": bad(
        every("*.safetensors", lambda whole: whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]), *DAMAGED
    ),
    "run: checkpoints without checksums": bad(every("sha256sums", lambda whole: b""), *DAMAGED),
    "run: checksums of other files": bad(
        every("sha256sums", lambda whole: whole + b"00  ../../family.json\n"), *DAMAGED
    ),
    "run: checksums not UTF-8": bad(every("sha256sums", lambda whole: b"\xff\xfe" * 40), *DAMAGED),
    "run: checkpoints with a file more": bad(beside("more", "?"), *DAMAGED),
    "run: checkpoints with a folder more": bad(beside("more", None), *DAMAGED),
    "run: checkpoints is a file": bad(
        lambda folder: [shutil.rmtree(folder / "checkpoints"), holding("checkpoints", b"")(folder)], "checkpoints"
    ),
    "run: a checkpoint is a file": bad(
        lambda folder: [[shutil.rmtree(path), path.write_text("")] for path in folder.glob("checkpoints/step-*")],
        "checkpoints",
    ),
    "run: the lock is a folder": bad(lambda folder: (folder / ".lock").mkdir(), ".lock"),
}
