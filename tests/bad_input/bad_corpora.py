"""Lines, shards and corpora that are no text. The shard spoiled is the sound one's held-out shard, of 60 plain
lines."""

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import zstandard
from malformed import Bad, Spoil, bad

HELD_OUT = "validation/chunk1/example_holdout_0.jsonl"
PLACE = f"{HELD_OUT}, line 3"

# What stands in the third line -> what skipping calls it.
LINES: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"{oops", "not JSON"),
    "plain text": (b"Once upon a time", "not JSON"),
    "half a line": (b'{"text": "w3 w4', "not JSON"),
    "two objects": (b'{"text": "w3"}{"text": "w4"}', "not JSON"),
    "single quotes": (b"{'text': 'w3 w4'}", "not JSON"),
    "a comma too many": (b'{"text": "w3 w4",}', "not JSON"),
    "a comment": (b'// {"text": "w3"}', "not JSON"),
    "NUL bytes": (bytes(40), "not JSON"),
    "a control character": (b'{"text": "w3\x01w4"}', "not JSON"),
    "nested without end": (b"[" * 200_000, "not JSON"),
    "objects without end": (b'{"text":' * 100_000, "not JSON"),
    "a number of 5000 digits": (b"9" * 5000, "not JSON"),
    "UTF-16": ('{"text": "w3"}'.encode("utf-16"), "invalid UTF-8"),
    "Latin-1": ('{"text": "caf\u00e9"}'.encode("latin-1"), "invalid UTF-8"),
    "half a letter": (b'{"text": "\xe6\x9d"}', "invalid UTF-8"),
    "a surrogate in bytes": (b'{"text": "\xed\xa0\x80"}', "invalid UTF-8"),
    "a list": (b'["w3 w4"]', "not a JSON object"),
    "a string": (b'"w3 w4"', "not a JSON object"),
    "a number": (b"3", "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "NaN": (b"NaN", "not a JSON object"),
    "no text": (b'{"txt": "w3 w4"}', "`text`"),
    "an empty object": (b"{}", "`text`"),
    "text is null": (b'{"text": null}', "`text`"),
    "text is a number": (b'{"text": 3}', "`text`"),
    "text is a list": (b'{"text": ["w3", "w4"]}', "`text`"),
    "text is an object": (b'{"text": {"text": "w3"}}', "`text`"),
    "text is true": (b'{"text": true}', "`text`"),
    "a lone surrogate": (b'{"text": "w3 \\ud800 w4"}', "surrogate"),
    "a pair the wrong way": (b'{"text": "\\udc00\\ud800"}', "surrogate"),
}


def line(content: bytes) -> Spoil:
    def spoil(folder: Path) -> None:
        lines = (folder / HELD_OUT).read_bytes().splitlines()
        (folder / HELD_OUT).write_bytes(b"\n".join([*lines[:2], content, *lines[3:]]) + b"\n")

    return spoil


def shard(suffix: str, change: Callable[[bytes], bytes]) -> Spoil:
    """The shard compressed by its suffix, and its bytes changed."""

    def spoil(folder: Path) -> None:
        whole = (folder / HELD_OUT).read_bytes()
        (folder / HELD_OUT).unlink()
        pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}[suffix]
        (folder / (HELD_OUT + suffix)).write_bytes(change(pack(whole)))

    return spoil


def only(name: str, content: bytes | None) -> Spoil:
    """This file (None: folder) is all there is."""

    def spoil(folder: Path) -> None:
        shutil.rmtree(folder)
        path = folder / name
        path.parent.mkdir(parents=True)
        path.mkdir() if content is None else path.write_bytes(content)

    return spoil


def flipped(at: float) -> Callable[[bytes], bytes]:
    """One byte inverted, at this share of all."""
    return lambda whole: bytes(byte ^ 0xFF if i == int(at * len(whole)) else byte for i, byte in enumerate(whole))


def linked_to_itself(folder: Path) -> None:
    (folder / HELD_OUT).unlink()
    (folder / HELD_OUT).symlink_to(folder / HELD_OUT)


SHARDS: dict[str, Bad] = {
    **{
        f"corpus: {suffix} {way}": bad(shard(suffix, change), HELD_OUT + suffix)
        for suffix in (".gz", ".zst")
        for way, change in {
            "cut by a byte": lambda whole: whole[:-1],
            "cut by half": lambda whole: whole[: len(whole) // 2],
            "cut to three bytes": lambda whole: whole[:3],
            "with another magic number": flipped(0),
            "with a flipped byte": flipped(0.5),
            "with a flipped checksum": lambda whole: whole[:-5] + bytes([whole[-5] ^ 0xFF]) + whole[-4:],
            "with text behind": lambda whole: whole + b"and so on",
            "that is text": lambda whole: b'{"text": "w3 w4"}\n',
        }.items()
    },
    "corpus: no shards": bad(only("validation/readme.txt", b"nothing"), "corpus", "no shards"),
    "corpus: an empty folder": bad(only("validation", None), "corpus", "no shards"),
    "corpus: an empty shard": bad(only("validation/a.jsonl", b""), "corpus", "empty corpus"),
    "corpus: empty lines": bad(only("validation/a.jsonl", b"\n\n\n"), "corpus", "no document"),
    "corpus: empty texts": bad(only("validation/a.jsonl", b'{"text": ""}\n' * 9), "corpus", "no document"),
    "corpus: texts of one token": bad(only("validation/a.jsonl", b'{"text": "w3"}\n' * 9), "corpus", "no document"),
    "corpus: a shard is a folder": bad(only("validation/a.jsonl", None), "corpus", "no shards"),
    "corpus: another split alone": bad(only("train/a.jsonl", b'{"text": "w3 w4"}\n'), "corpus", "no validation"),
    "corpus: a shard beside the splits": bad(
        lambda folder: (folder / "a.jsonl").write_text('{"text": "w3 w4"}\n'), "corpus", "a.jsonl as no split"
    ),
    "corpus: a shard twice": bad(lambda folder: (folder / f"{HELD_OUT}.gz").touch(), "corpus", "the same documents"),
    "corpus: a shard of two splits": bad(
        lambda folder: (folder / "train/valid.jsonl").touch(), "corpus", "valid.jsonl"
    ),
    "corpus: shards of parquet": bad(only("validation/a.parquet", b"PAR1"), "corpus", "no"),
    "corpus: a link to itself": bad(linked_to_itself, "corpus"),
}
