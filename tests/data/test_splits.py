"""Which shards are of which split, against what `datasets` makes of the same folders."""

from itertools import product

import pytest
from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS, get_data_patterns, resolve_pattern

from plrd_train.data.splits import SEPARATORS, WORDS, narrow_to_split
from plrd_train.errors import UserError

LAYOUTS = {
    "files": ["train.jsonl", "validation.jsonl", "test.jsonl"],
    "files by other words": ["my_training-set.jsonl.gz", "dev.jsonl", "eval.jsonl"],
    "files with numbers": ["c4-train.00000.jsonl", "c4-train.00001.jsonl", "c4-val.00000.jsonl"],
    "files in folders of no split": ["en/valid_0.jsonl", "de/valid_0.jsonl", "en/train_0.jsonl"],
    "folders": ["train/chunk1/a.jsonl.zst", "train/chunk2/a.jsonl.zst", "valid/chunk1/a.jsonl"],
    "folders of SlimPajama": [
        "train/chunk1/example_train_0.jsonl.zst",
        "validation/chunk1/example_holdout_0.jsonl.zst",
        "test/chunk1/example_holdout_0.jsonl.zst",
    ],
    "folders with more in their names": ["my-train-2/a.jsonl", "evaluation set/a.jsonl", "val.v2/a.jsonl"],
    "folders below others": ["c4/train/a.jsonl", "books/train/a.jsonl", "c4/validation/a.jsonl"],
    "folders and files that agree": ["train/train-0.jsonl", "test/test.jsonl", "dev/validation.jsonl"],
    "numbered": [*(f"data/train-0000{i}-of-00002.jsonl.gz" for i in range(2)), "data/validation-00000-of-00001.jsonl"],
    "numbered, with other splits": ["data/train_sft-00000-of-00001.jsonl", "data/test_sft-00000-of-00001-abc.jsonl"],
    "numbered, with one of another name": ["data/train-00000-of-00001.jsonl", "data/unsupervised-00000-of-00001.jsonl"],
    "one split": ["training/a.jsonl", "training/b.jsonl"],
    "no validation": ["train.jsonl", "test.jsonl"],
    "test alone": ["sub/test.jsonl"],
    "no split": ["a.jsonl", "b/c.jsonl"],
    "what only looks like a split": [
        "arxiv-contest.jsonl",
        "devel/retrain.jsonl",
        "evalx/Train.jsonl",
        "latest.jsonl",
        "trainer.jsonl",
    ],
}


@pytest.fixture
def by_datasets(tmp_path):
    """by_datasets(names) -> {split: those of the names that `datasets` reads for it}, in a folder with all of them."""

    def read(names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        patterns = get_data_patterns(str(tmp_path))
        found = {str(split): {one for pattern in some for one in resolved(pattern)} for split, some in patterns.items()}
        return {split: {one.removeprefix(f"{tmp_path}/") for one in files} for split, files in found.items()}

    def resolved(pattern):
        try:
            return resolve_pattern(pattern, str(tmp_path))
        except FileNotFoundError:
            return []

    return read


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_are_those_of_datasets(by_datasets, layout, split):
    names = LAYOUTS[layout]
    expected = by_datasets(names)
    if expected == {"train": set(names)} and layout != "one split":  # what it answers where no name tells of a split
        assert narrow_to_split("corpus", names, split, "corpus") == names
    elif split in expected:
        assert set(narrow_to_split("corpus", names, split, "corpus")) == expected[split]
    else:
        there = " and ".join(sorted(expected))
        with pytest.raises(
            UserError, match=f"^corpus: has {there} but no {split}; give the folder, file or glob to use"
        ):
            narrow_to_split("corpus", names, split, "corpus")


def test_words_and_what_may_stand_around_them_are_those_of_datasets(by_datasets):
    assert {str(split): tuple(words) for split, words in SPLIT_KEYWORDS.items()} == WORDS
    assert SEPARATORS == NON_WORDS_CHARS
    forms = ("{}", "{}.v1", "x-{}", "x.{}_2", "1{}0", "x {} y", "{}s", "x{}", "re{}-2", "{}+x", "{}é")
    names = [f"{form.format(word)}.jsonl" for form, words in product(forms, WORDS.values()) for word in words]
    expected = by_datasets(names)
    for name in names:
        told = {split for split, files in expected.items() if name in files}
        beside = [name, "train/a.jsonl", "dev/a.jsonl"]
        if told:
            ours = {
                split for split in ("train", "validation") if name in narrow_to_split("corpus", beside, split, None)
            }
            assert ours == told - {"test"}
        else:
            with pytest.raises(UserError, match="as no split"):
                narrow_to_split("corpus", beside, "train", None)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/a.jsonl", "dev/a.jsonl", "b.jsonl"], "train/a.jsonl is named as train, but b.jsonl as no split"),
        (["part-0.jsonl", "part-1.jsonl", "test.jsonl"], "test.jsonl is named as test, but part-0.jsonl as no split"),
        (["data/train-00000-of-00001.jsonl", "extra.jsonl"], "but extra.jsonl as no split"),
        (["train/dev-0.jsonl", "train/0.jsonl"], "train/dev-0.jsonl is named as train and as validation"),
        (["test/train/a.jsonl"], "test/train/a.jsonl is named as test and as train"),
        (["train-eval.jsonl", "train.jsonl"], "train-eval.jsonl is named as test and as train"),
    ],
)
@pytest.mark.parametrize(
    ("folder", "mend"),
    [("corpus", "give the folder, file or glob to use as train data"), (None, "download it, and give a glob")],
)
def test_what_cannot_be_told_apart_is_refused(names, message, folder, mend):
    with pytest.raises(UserError) as error:
        narrow_to_split("a/b", names, "train", folder)
    assert str(error.value).startswith("a/b: ") and message in str(error.value)
    assert mend in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_is_named_as_a_split_is_meant_as_it_is():
    names = ["chunk1/example_train_0.jsonl.zst", "chunk2/example_train_0.jsonl.zst"]
    assert narrow_to_split("/data/train", names, "validation", "train") == names
    for others, folder in ((names, "corpus"), ([*names, "test.jsonl"], "train_test"), (names, None)):
        with pytest.raises(UserError, match="train but no validation"):
            narrow_to_split("/data/train", others, "validation", folder)
    mixed = [*names, "dev.jsonl"]  # where the names of the files tell more than that of the folder
    assert narrow_to_split("/data/train", mixed, "validation", "train") == ["dev.jsonl"]
