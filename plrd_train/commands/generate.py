"""`plrd generate`: what a model writes after a prompt."""

from __future__ import annotations

import argparse
from typing import Any

from plrd_train.commands._arguments import add_remote_code, given_path, number, whole
from plrd_train.commands._models import find
from plrd_train.tracking import console

HELP = "continue a prompt, greedily unless told otherwise"
EXAMPLES = ('plrd generate runs/quickstart/members/2.25x --prompt "Return the"',)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models = "a member's folder, or any other model (folder or hub id)"
    parser.add_argument("model", metavar="MEMBER|PARENT", type=given_path, help=models)
    parser.add_argument("--prompt", metavar="P", required=True, help="the text to continue")
    parser.add_argument(
        "--max-tokens",
        metavar="N",
        type=whole(1),
        default=128,
        help="tokens to write, fewer where text or context ends (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=number(),
        default=0.0,
        help="0: always the likeliest token; above: sample from softmax(logits / temperature)",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the sampling (default: %(default)s)")
    add_remote_code(parser)


def run(given: argparse.Namespace) -> dict[str, Any]:
    from plrd_train.parents.generate import generate
    from plrd_train.parents.published import open_published

    files = find(given.model, remote_code=given.trust_remote_code)
    model = open_published(files, trust_remote_code=given.trust_remote_code)
    completion = generate(model, given.prompt, given.max_tokens, given.temperature, given.seed)
    if not given.json:
        console.say(completion.text)
    return completion.to_dict()
