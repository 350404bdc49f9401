"""Families that no command can use: family.json, and the folders of members that it names. The sound one has the
members 1.5x and 2x."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from malformed import (
    Bad,
    Spoil,
    bad,
    cut,
    edited,
    folder_instead,
    gone,
    holding,
    unreadable_json,
    with_key,
    without_key,
)

FAMILY = "family.json"
MEMBER = "members/2x"
CONFIG = f"{MEMBER}/config.json"
WEIGHTS = f"{MEMBER}/model.plrd.safetensors"


def member(key: str, value: Any) -> Spoil:
    """family.json with another value under the `key` of its second member."""
    return with_key(FAMILY, "members", 1, key, value=value)


def moved(path: Callable[[Path], str], link: bool = False) -> Spoil:
    """The second member lies outside the family, where family.json (or a link) says."""

    def spoil(folder: Path) -> None:
        shutil.move(folder / MEMBER, folder.parent / "outside")
        if link:
            (folder / MEMBER).symlink_to(path(folder))
        else:
            member("path", path(folder))(folder)

    return spoil


# Whatever reads a family refuses these: show, report, evaluate, factor.
FAMILIES: dict[str, Bad] = {
    **unreadable_json(FAMILY, FAMILY),
    "family: no parent": bad(without_key(FAMILY, "parent"), FAMILY),
    "family: no members": bad(without_key(FAMILY, "members"), FAMILY),
    "family: parent a string": bad(with_key(FAMILY, "parent", value="parent"), FAMILY, "parent"),
    "family: parent a list of pairs": bad(
        edited(FAMILY, lambda f: {**f, "parent": [*f["parent"].items()]}), FAMILY, "parent"
    ),
    "family: parent without a path": bad(without_key(FAMILY, "parent", "path"), FAMILY, "path"),
    "family: parent's path a number": bad(with_key(FAMILY, "parent", "path", value=3), FAMILY, "path"),
    "family: parent's params a string": bad(with_key(FAMILY, "parent", "params", value="7B"), FAMILY, "params"),
    "family: parent's eval a number": bad(with_key(FAMILY, "parent", "eval", value=3.5), FAMILY, "eval"),
    "family: parent's revision a number": bad(with_key(FAMILY, "parent", "revision", value=7), FAMILY, "revision"),
    "family: members a mapping": bad(with_key(FAMILY, "members", value={"2x": {}}), FAMILY, "members"),
    "family: members a string": bad(with_key(FAMILY, "members", value="2x"), FAMILY, "members"),
    "family: a member is null": bad(with_key(FAMILY, "members", 1, value=None), FAMILY, "members"),
    "family: a member is a string": bad(with_key(FAMILY, "members", 1, value="2x"), FAMILY, "members"),
    "family: a member is empty": bad(with_key(FAMILY, "members", 1, value={}), FAMILY, "members"),
    "family: a member without a name": bad(without_key(FAMILY, "members", 1, "name"), FAMILY, "name"),
    "family: a member without a path": bad(without_key(FAMILY, "members", 1, "path"), FAMILY, "path"),
    "family: a name is a number": bad(member("name", 2), FAMILY, "name"),
    "family: a name twice": bad(member("name", "1.5x"), FAMILY, "1.5x"),
    "family: a ratio is a string": bad(member("ratio", "2"), FAMILY, "ratio"),
    "family: a ratio is null": bad(member("ratio", None), FAMILY, "ratio"),
    "family: params are a list": bad(member("params", [1]), FAMILY, "params"),
    "family: params are negative": bad(member("params", -5), FAMILY, "params"),
    "family: ranks are a list": bad(member("ranks", [3]), FAMILY, "ranks"),
    "family: a rank is a string": bad(member("ranks", {"a": "3"}), FAMILY, "ranks"),
    "family: tokens are a string": bad(member("tokens_lineage", "many"), FAMILY, "tokens_lineage"),
    "family: eval is a list": bad(member("eval", [4.2]), FAMILY, "eval"),
    "family: a perplexity is a string": bad(member("eval", {"ppl": "low"}), FAMILY, "ppl"),
    "family: a perplexity is negative": bad(member("eval", {"ppl": -3.0}), FAMILY, "ppl"),
    "family: a perplexity is zero": bad(member("eval_factored", {"ppl": 0}), FAMILY, "ppl"),
    "family: a path is a number": bad(member("path", 3), FAMILY, "path"),
    "family: a path is empty": bad(member("path", ""), FAMILY, "path"),
    "family: a path is the family": bad(member("path", "."), FAMILY, "path"),
    "family: a path holds NUL": bad(member("path", "members/a\0b"), FAMILY, "path"),
    "family: a path leaves the folder": bad(moved(lambda folder: "../outside"), FAMILY, "../outside"),
    "family: a path leaves and comes back": bad(moved(lambda folder: "members/../../outside"), FAMILY, "outside"),
    "family: an absolute path": bad(moved(lambda folder: str(folder.parent / "outside")), FAMILY, "outside"),
    "family: a link leaves the folder": bad(moved(lambda folder: "../../outside", link=True), FAMILY, MEMBER),
}

# Whatever loads a member refuses these: generate, evaluate.
MEMBERS: dict[str, Bad] = {
    "member: no config.json": bad(gone(CONFIG), MEMBER),
    "member: config truncated": bad(cut(CONFIG, 50), "config.json"),
    "member: no weights": bad(gone(WEIGHTS), MEMBER),
    "member: weights cut": bad(cut(WEIGHTS, -100), "model.plrd.safetensors"),
    "member: weights a folder": bad(folder_instead(WEIGHTS), MEMBER),
    "member: weights of a dense name": bad(
        lambda folder: (folder / WEIGHTS).rename(folder / MEMBER / "pytorch_model.bin"), MEMBER
    ),
    "member: no ranks": bad(without_key(CONFIG, "plrd", "ranks"), "config.json", "ranks"),
    "member: plrd null": bad(with_key(CONFIG, "plrd", value=None), "config.json", "ranks"),
    "member: plrd a list": bad(with_key(CONFIG, "plrd", value=[1]), "config.json"),
    "member: ranks a list": bad(with_key(CONFIG, "plrd", "ranks", value=[3]), "config.json", "ranks"),
    "member: a rank is zero": bad(
        with_key(CONFIG, "plrd", "ranks", "model.layers.0.mlp.up_proj", value=0), "config.json", "ranks"
    ),
    "member: a rank is negative": bad(
        with_key(CONFIG, "plrd", "ranks", "model.layers.0.mlp.up_proj", value=-4), "config.json", "ranks"
    ),
    "member: a rank is a string": bad(
        with_key(CONFIG, "plrd", "ranks", "model.layers.0.mlp.up_proj", value="9"), "config.json", "ranks"
    ),
    "member: a rank is true": bad(
        with_key(CONFIG, "plrd", "ranks", "model.layers.0.mlp.up_proj", value=True), "config.json", "ranks"
    ),
    "member: a rank larger than the matrix": bad(
        with_key(CONFIG, "plrd", "ranks", "model.layers.0.mlp.up_proj", value=4000), "config.json"
    ),
    "member: a rank of another model": bad(
        with_key(CONFIG, "plrd", "ranks", "model.layers.0.mlp.up_proj", value=2), "config.json"
    ),
    "member: a rank of no Linear": bad(
        with_key(CONFIG, "plrd", "ranks", "model.layers.0.input_layernorm", value=3), "config.json", "layernorm"
    ),
    "member: a rank of nothing": bad(
        with_key(CONFIG, "plrd", "ranks", "model.layers.7.mlp.up_proj", value=3), "config.json"
    ),
    "member: a parent of no kind": bad(with_key(CONFIG, "parent_model_type", value="oracle"), "config.json", "oracle"),
    "member: a parent of a list": bad(with_key(CONFIG, "parent_model_type", value=["llama"]), "config.json"),
    "member: no parent": bad(without_key(CONFIG, "parent_model_type"), "config.json"),
    "member: of itself": bad(with_key(CONFIG, "parent_model_type", value="plrd"), "config.json"),
    "member: no tokenizer": bad(gone(f"{MEMBER}/tokenizer.json"), MEMBER, "tokenizer"),
    "member: tokenizer no JSON": bad(holding(f"{MEMBER}/tokenizer.json", b"{"), MEMBER, "tokenizer"),
}
