"""From what the user names to the list of shards: folders, globs, a hub (the real client against a small server), and
each way to get it wrong."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

from plrd_train.data.corpus import Corpus, overlap, resolve_corpus
from plrd_train.errors import UserError


@pytest.fixture
def slimpajama(tmp_path, write_shard, records):
    """A corpus of both splits, with what else lies about in a downloaded folder."""
    root = tmp_path / "slimpajama"
    for name in (
        "train/chunk2/example_train_0",
        "train/chunk1/example_train_1",
        "train/chunk1/example_train_0",
        "validation/chunk1/example_holdout_0",
    ):
        write_shard(root / f"{name}.jsonl.zst", records(range(3)))
    write_shard(root / "train/.cache/chunk1/example_train_9.jsonl.zst", records(range(3)))
    (root / "README.md").write_text("text")
    return root


def relative(corpus, root):
    return [os.path.relpath(shard, root) for shard in corpus.shards]


def test_a_folder_is_listed_in_order_and_narrowed_to_its_split(slimpajama, monkeypatch):
    train = [
        "train/chunk1/example_train_0.jsonl.zst",
        "train/chunk1/example_train_1.jsonl.zst",
        "train/chunk2/example_train_0.jsonl.zst",
    ]
    assert relative(resolve_corpus(str(slimpajama), "train"), slimpajama) == train
    assert relative(resolve_corpus(str(slimpajama / "train"), "train"), slimpajama) == train
    # The user named that folder.
    assert relative(resolve_corpus(str(slimpajama / "train"), "validation"), slimpajama) == train
    assert relative(resolve_corpus(str(slimpajama), "validation"), slimpajama) == [
        "validation/chunk1/example_holdout_0.jsonl.zst"
    ]
    monkeypatch.chdir(slimpajama.parent)
    assert resolve_corpus("slimpajama", "train").shards == resolve_corpus(str(slimpajama), "train").shards


def test_any_depth_and_each_suffix_is_taken(tmp_path, write_shard, records):
    names = ["a.jsonl", "b/c.jsonl.gz", "d/e/f/g.jsonl.zst"]
    for name in [*names, "h.json", "i.zst"]:
        write_shard(tmp_path / name, records([1]))
    assert relative(resolve_corpus(str(tmp_path), "train"), tmp_path) == names


def test_a_glob_and_a_file_are_taken_as_they_are(slimpajama):
    one = slimpajama / "train" / "chunk1" / "example_train_1.jsonl.zst"
    assert relative(resolve_corpus(str(slimpajama / "*" / "chunk1" / "*_0.jsonl.zst"), "train"), slimpajama) == [
        "train/chunk1/example_train_0.jsonl.zst",
        "validation/chunk1/example_holdout_0.jsonl.zst",
    ]
    assert (
        resolve_corpus(str(slimpajama / "train" / "chunk*"), "train").shards
        == resolve_corpus(str(slimpajama), "train").shards
    )
    assert resolve_corpus(str(one), "train").shards == (str(one),)


def test_splits_are_told_apart_before_documents_are_compared(tmp_path, write_shard, records):
    """The same documents twice in the split that is not asked for do no harm."""
    for name in ("train.jsonl", "test.jsonl", "test.jsonl.zst"):
        write_shard(tmp_path / "flat" / name, records([1]))
    assert relative(resolve_corpus(str(tmp_path / "flat"), "train"), tmp_path) == ["flat/train.jsonl"]


def test_shards_in_two_corpora_are_told(slimpajama, tmp_path, write_shard, records):
    train, held_out = (resolve_corpus(str(slimpajama), split) for split in ("train", "validation"))
    assert overlap(train, held_out, "trained on") is None
    linked = tmp_path / "linked"
    linked.mkdir()
    write_shard(linked / "own.jsonl", records([9]))
    (linked / "other.jsonl.zst").symlink_to(train.shards[1])
    note = overlap(train, resolve_corpus(str(linked), "validation"), "trained on")
    assert f"trained on as well as evaluated on: 1 of 2 shards, {linked / 'other.jsonl.zst'} among them" in note
    plain = write_shard(slimpajama / "train/chunk1/example_train_0.jsonl", records(range(3)))  # compressed beside it
    note = overlap(train, resolve_corpus(str(plain), "validation"), "trained on")
    assert f"1 of 1 shards, {plain} among them" in note
    all_of_it = resolve_corpus(str(slimpajama / "train" / "chunk2"), "train")
    assert f"1 of 3 shards, {all_of_it.shards[0]} among them" in overlap(all_of_it, train, "calibrated on")


def test_a_corpus_survives_json(slimpajama):
    corpus = resolve_corpus(str(slimpajama), "train")
    assert Corpus.from_dict(json.loads(json.dumps(corpus.to_dict()))) == corpus
    assert corpus.revision is None and corpus.spec == str(slimpajama)


def test_the_fingerprint_follows_content_and_not_place(slimpajama, tmp_path, write_shard, records):
    before = resolve_corpus(str(slimpajama), "train").fingerprint
    moved = shutil.move(slimpajama, tmp_path / "elsewhere")
    assert resolve_corpus(str(moved), "train").fingerprint == before
    write_shard(moved / "train/chunk1/example_train_1.jsonl.zst", records(range(4)))
    grown = resolve_corpus(str(moved), "train").fingerprint
    (moved / "train/chunk2/example_train_0.jsonl.zst").unlink()
    assert len({before, grown, resolve_corpus(str(moved), "train").fingerprint}) == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{root}/missing", "{root}/missing: no such folder"),
        ("./missing/folder", "./missing/folder: no such folder"),
        ("{root}/missing/*.jsonl", "glob matches nothing"),
        ("{root}/other", "{root}/other: no shards here"),
        ("{root}/other/notes.txt", "no shards here"),
        ("{root}/zero", "empty corpus"),
        ("{root}/mixed", "train/a.jsonl is named as train, but stray.jsonl as no split; give the folder, file or glob"),
        ("{root}/held", "has validation but no train"),
        ("{root}/twice", "{root}/twice/a.jsonl and {root}/twice/a.jsonl.gz hold the same documents"),
        ("{root}/twice/*.jsonl*", "{root}/twice/a.jsonl and {root}/twice/a.jsonl.gz hold the same documents"),
        ("{root}/linked", "{root}/linked/a/0.jsonl and {root}/linked/latest/0.jsonl hold the same documents"),
    ],
)
def test_a_mistake_gives_one_line_that_names_it(tmp_path, write_shard, records, spec, message):
    for name in ("mixed/train/a.jsonl", "mixed/stray.jsonl", "held/validation/a.jsonl"):
        write_shard(tmp_path / name, records([1]))
    for name in ("twice/a.jsonl", "twice/a.jsonl.gz", "linked/a/0.jsonl"):
        write_shard(tmp_path / name, records([1]))
    (tmp_path / "linked" / "latest").symlink_to("a")
    write_shard(tmp_path / "zero" / "a.jsonl", [])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("text")
    with pytest.raises(UserError) as error:
        resolve_corpus(spec.format(root=tmp_path), "train")
    assert message.format(root=tmp_path) in str(error.value) and "\n" not in str(error.value)


COMMIT = "0123456789abcdef0123456789abcdef01234567"
CLIENT = """
import sys
from plrd_train.data.corpus import resolve_corpus
from plrd_train.data.documents import read_documents
from plrd_train.errors import UserError

for spec, revision in [("owner/pile", None), ("owner/pile", "v9"), ("owner/nothing", None)]:
    try:
        corpus = resolve_corpus(spec, "validation", revision)
        texts = [d.text for shard in corpus.shards for d in read_documents(shard)]
        print(repr((corpus.revision, corpus.fingerprint, corpus.shards, texts)))
    except UserError as error:
        print(error)
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as listing and streaming a dataset takes; `files` maps a path in the dataset
    to its bytes."""

    files: dict[str, bytes]

    def answer(self, code, body, **headers):
        self.send_response(code)
        for name, value in {
            "Content-Length": str(len(body)),
            "X-Repo-Commit": COMMIT,
            "ETag": '"1"',
            **headers,
        }.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def entries(self, paths):
        return [
            {"type": "file", "path": path, "size": len(self.files[path]), "oid": "0" * 40}
            for path in paths
            if path in self.files
        ]

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        head = f"/datasets/owner/pile/resolve/{COMMIT}/"
        if path == "/api/datasets/owner/pile" or path == f"/api/datasets/owner/pile/revision/{COMMIT}":
            self.answer(200, json.dumps({"id": "owner/pile", "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith(tree := f"/api/datasets/owner/pile/tree/{COMMIT}"):
            folder = path.removeprefix(tree).lstrip("/")
            self.answer(200, json.dumps(self.entries(name for name in self.files if name.startswith(folder))).encode())
        elif path.startswith(head):
            data = self.files[path.removeprefix(head)]
            first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            part = data[int(first) : int(last) + 1 if last else None]
            self.answer(
                206 if "Range" in self.headers else 200,
                part,
                Content_Range=f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}",
            )
        else:
            missing = "RevisionNotFound" if path.startswith("/api/datasets/owner/pile/revision/") else "RepoNotFound"
            self.answer(404, b"{}", X_Error_Code=missing)

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer(200, json.dumps(self.entries(asked["paths"])).encode())

    def log_message(self, *_):
        pass


def run_client(endpoint, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
    return subprocess.run(
        [sys.executable, "-c", CLIENT], env=environment, capture_output=True, text=True, check=True, timeout=120
    ).stdout.splitlines()


def test_a_hub_dataset_is_pinned_and_streamed(tmp_path, write_shard, records, stories):
    names = ["train/chunk1/a.jsonl.zst", "validation/chunk1/b.jsonl.zst", "validation/chunk1/a.jsonl", "README.md"]
    Hub.files = {
        name: write_shard(tmp_path / name, records(range(i, i + 3))).read_bytes() for i, name in enumerate(names)
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        found, no_revision, no_dataset = run_client(f"http://127.0.0.1:{server.server_port}", tmp_path)
    finally:
        server.shutdown()
        server.server_close()
    shards = tuple(f"hf://datasets/owner/pile@{COMMIT}/validation/chunk1/{name}" for name in ("a.jsonl", "b.jsonl.zst"))
    assert found == repr((COMMIT, COMMIT, shards, [stories(n) for n in (2, 3, 4, 1, 2, 3)]))
    assert no_revision == "owner/pile: this Hugging Face dataset has no revision v9"
    assert no_dataset.startswith("owner/nothing: neither a folder here nor a dataset")


def test_a_hub_out_of_reach_is_said_in_one_line(tmp_path):
    lines = run_client("http://127.0.0.1:9", tmp_path)  # the discard port: nothing listens there
    assert len(lines) == 3 and all(
        "no such folder here, and the Hugging Face hub could not be asked" in line for line in lines
    )
