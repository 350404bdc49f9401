"""How many malformed inputs there are, by kind; those drawn at random come on top."""

import bad_configs
import bad_corpora
import bad_families
import bad_parents
import bad_runs

KINDS = {
    "corpus lines": bad_corpora.LINES,
    "shards and corpora": bad_corpora.SHARDS,
    "configs of parents": bad_parents.CONFIGS,
    "weights of parents": bad_parents.WEIGHT_FILES,
    "indices of shards": bad_parents.INDICES,
    "tokenizers": bad_parents.TOKENIZERS,
    "settings of generation": bad_parents.GENERATION_CONFIGS,
    "overrides": bad_configs.CASES,
    "flags": bad_configs.FLAGS,
    "family.json": bad_families.FAMILIES,
    "members": bad_families.MEMBERS,
    "run folders and checkpoints": bad_runs.RUNS,
}


def test_there_are_hundreds_and_each_has_its_test():
    print(*(f"| {kind} | {len(table)} |" for kind, table in KINDS.items()), sep="\n")
    assert sum(map(len, KINDS.values())) >= 400 and min(map(len, KINDS.values())) >= 8
