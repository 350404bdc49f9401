"""What the models of a family write after one prompt, each loaded from its own folder as anyone would load it."""

from collections.abc import Iterator

from transformers.utils import logging

from plrd_train.family import Family
from plrd_train.parents.generate import generate
from plrd_train.parents.published import find_published, open_published

MAX_TOKENS = 40


def continuations(family: Family, prompt: str, *, trust_remote_code: bool = False) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the parent and of each member, in the order of the table: the greedy continuation of
    `prompt` by at most MAX_TOKENS tokens.

    One model is in memory at a time. The code of a parent is run only where `trust_remote_code` says so. Raises
    UserError where a model does not load, and for a prompt that is longer than its context.
    """
    logging.disable_progress_bar()  # a bar for each model's weights would stand between table and text
    parent = find_published(family.parent.path, family.parent.revision or "main", trust_remote_code=trust_remote_code)
    yield "parent", generate(open_published(parent, trust_remote_code=trust_remote_code), prompt, MAX_TOKENS).text
    for member in family.members:
        published = open_published(find_published(str(family.member_folder(member.name))))
        yield member.name, generate(published, prompt, MAX_TOKENS).text
