"""The README.md of a published member: what it is, how it was made, how to load it, its limits."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

import yaml

from plrd_train.family import Member, ParentRecord, Scores

_TEXT = """---
{front_matter}
---

# {name}

A low-rank causal language model made from `{parent}` by progressive low-rank decomposition
(PLRD, [arXiv 2406.19995](https://arxiv.org/abs/2406.19995)) with plrd_train: the matrices
of its Linears are of low rank, in the form `{form}`; embeddings and output projection are whole.

| | parent | this member |
| --- | ---: | ---: |
{numbers}

Perplexity is exp(total negative log-likelihood / predicted tokens) over held-out documents taken one by one: the
tokenizer's own special tokens, only the first tokens of each (`evaluation.context`), no packing, measured on the
weights as they are published here. It is comparable only on the same documents.

## How it was made

- Factored from: {made_from}
- Ratio of parameters of the Linears, parent over member: {ratio_requested} asked for, {ratio} as it is
- Training tokens: {tokens_stage} in this stage, {tokens_total} by the run up to and including it,
  {tokens_lineage} seen by these very weights
- Ranks:

{ranks}

The settings of the run:

```yaml
{settings}
```

## Loading

With plrd_train installed:

```python
import plrd_train
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

Without it, by the code that lies in this folder (read its .py files first):

```python
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
```

Anything else raises; the weights are named so that no dense class finds them.

## Limits

Perplexity on the held-out text above is all that was measured when this card was written. Downstream
tasks, long contexts, other languages and domains, safety and bias were not evaluated; compression may have changed any
of them, and what holds of the parent need not hold here.

## Licence

The licence of the parent, and of the data that it was recovered on, apply.
"""


def member_card(member: Member, parent: ParentRecord, settings: Mapping[str, Any]) -> str:
    """README.md of a member, with YAML front matter.

    A parent with a revision is named as the hub id that its path is; of a local one only the folder's name is told.
    `settings` is the resolved config; of the paths in it only the last two parts are told.
    """
    tags = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["plrd", "low-rank", "compression"],
    }
    front_matter = ({"base_model": parent.path} if parent.revision else {}) | tags
    parent_name = f"{parent.path}@{parent.revision[:12]}" if parent.revision else PurePath(parent.path).name
    return _TEXT.format(
        front_matter="\n".join(f"{key}: {json.dumps(value)}" for key, value in front_matter.items()),
        name=member.name,
        parent=parent_name,
        numbers="\n".join(_numbers(member, parent)),
        made_from=f"`{parent_name if member.made_from == 'parent' else member.made_from}`",
        form=member.form,
        ratio_requested=member.ratio_requested,
        ratio=f"{member.ratio:.4g}",
        ranks="\n".join(_rank_table(member.ranks)),
        settings=yaml.safe_dump(_portable(settings), sort_keys=False, allow_unicode=True).strip(),
        tokens_stage=f"{member.tokens_stage:,}",
        tokens_total=f"{member.tokens_total:,}",
        tokens_lineage=f"{member.tokens_lineage:,}",
    )


def _portable(value: Any) -> Any:
    """`value` in plain YAML types, with absolute paths cut to their last two parts."""
    if isinstance(value, Mapping):
        return {key: _portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(item) for item in value]
    if isinstance(value, str) and value.startswith(("/", "~", "..")):
        return "/".join(("…", *PurePath(value).parts[-2:]))
    return value


def _numbers(member: Member, parent: ParentRecord) -> Iterator[str]:
    yield f"| parameters | {parent.params:,} | {member.params:,} |"
    yield f"| parameters of the Linears | | {member.linear_params:,} |"
    for when, scores in (
        ("straight after factoring", member.eval_factored),
        ("after recovery", member.eval),
    ):
        yield f"| perplexity {when} | {_perplexity(parent.eval)} | {_perplexity(scores)} |"


def _perplexity(scores: Scores | None) -> str:
    if scores is None:
        return "not measured"
    return "not finite" if scores.ppl is None else f"{scores.ppl:.4g}"


def _rank_table(ranks: Mapping[str, int]) -> Iterator[str]:
    """One row for each kind of Linear, by the last part of its name."""
    kinds = defaultdict(list)
    for name, rank in ranks.items():
        kinds[name.rpartition(".")[2]].append(rank)
    yield "| Linear | how many | rank |"
    yield "| --- | ---: | ---: |"
    for kind, values in kinds.items():
        yield (
            f"| {kind} | {len(values)} | {min(values)} to {max(values)} |"
            if min(values) < max(values)
            else f"| {kind} | {len(values)} | {values[0]} |"
        )
