"""A real parent and real text: one command, four members, and everything that the contract says a run leaves behind."""

import json
import re
from pathlib import Path

import pytest
import torch
from plain import perplexity
from processes import draw, run_job
from safetensors.torch import load_file
from tracking.wandb_log import history, runs
from transformers import AutoModelForCausalLM, AutoTokenizer

import plrd_train  # noqa: F401, members load after it

RATIOS = [1.25, 1.5, 1.85, 2.25]
TOKENS, BATCH, SEQ_LEN, EVALUATED = 8192, 1024, 128, 3000
PROMPT = "Once upon a time"
MEMBER_KEYS = {
    "name",
    "ratio_requested",
    "ratio",
    "params",
    "linear_params",
    "ranks",
    "tokens_stage",
    "tokens_total",
    "tokens_lineage",
}
MEMBER_KEYS |= {"eval_factored", "eval", "path", "made_from", "engine", "world_size", "seconds"}
STEP_METRICS = {
    "train/loss",
    "train/lr",
    "train/grad_norm",
    "tokens/stage",
    "tokens/total",
    "tokens/budget",
    "stage/index",
    "stage/ratio",
}
STEP_METRICS |= {"perf/tokens_per_s", "perf/memory_gib"}


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def parent(assets) -> Path:
    return assets / "parents" / "stories260k"


@pytest.fixture(scope="module")
def corpus(assets) -> Path:
    return assets / "data" / "tinystories"


@pytest.fixture(scope="module")
def made(parent, corpus, tmp_path_factory) -> tuple[Path, str]:
    """(run_dir, what was said on standard output)."""
    run_dir = tmp_path_factory.mktemp("runs") / "family"
    ended = run_job(
        2,
        [
            "experiment=tinystories",
            f"parent.path={parent}",
            f"data.train={corpus / 'train'}",
            f"data.validation={corpus / 'validation'}",
            f"run_dir={run_dir}",
            f"stages.ratios={RATIOS}".replace(" ", ""),
            f"stages.tokens={TOKENS + 100}",
            f"data.seq_len={SEQ_LEN}",
            f"recover.global_batch_tokens={BATCH}",
            f"evaluation.tokens={EVALUATED}",
            f"evaluation.prompt={PROMPT}",
            "tracking.wandb.mode=offline",
        ],
        draw,
    )
    assert (ended.status, ended.err) == (0, ""), ended.out + ended.err
    return run_dir, ended.out


@pytest.fixture(scope="module")
def run_dir(made) -> Path:
    return made[0]


@pytest.fixture(scope="module")
def family(run_dir) -> dict:
    return json.loads((run_dir / "family.json").read_text())


def linear_params(folder: Path) -> int:
    """Parameters of all Linears of the blocks of a Llama, whole or in two factors, as they lie in its file."""
    (file,) = folder.glob("*.safetensors")
    return sum(tensor.numel() for name, tensor in load_file(file).items() if "_proj." in name)


def test_family_json_has_the_keys_of_the_contract(family, run_dir):
    assert family["parent"].keys() >= {"path", "params", "eval"}
    assert [member["name"] for member in family["members"]] == ["1.25x", "1.5x", "1.85x", "2.25x"]
    assert [member["ratio_requested"] for member in family["members"]] == RATIOS
    assert [member["made_from"] for member in family["members"]] == ["parent", "1.25x", "1.5x", "1.85x"]
    for member in family["members"]:
        assert member.keys() >= MEMBER_KEYS
        assert member["eval"].keys() >= {"ppl", "nll_tokens"} and member["eval_factored"].keys() >= {"ppl"}
        assert (member["engine"], member["world_size"]) == ("fsdp", 2)
        assert all(seconds > 0 for seconds in member["seconds"].values())
        assert (run_dir / member["path"] / "config.json").is_file()


def test_parameters_fall_and_are_those_in_the_files(family, parent, run_dir):
    before = family["parent"]["params"]
    assert before == 260_032
    for member in family["members"]:
        folder = run_dir / member["path"]
        in_file = sum(tensor.numel() for tensor in load_file(folder / "model.plrd.safetensors").values())
        assert member["params"] == in_file < before
        assert member["linear_params"] == linear_params(folder)
        assert member["ratio"] == pytest.approx(linear_params(parent) / linear_params(folder), rel=1e-12)
        assert member["ratio"] == pytest.approx(member["ratio_requested"], rel=0.04)  # ranks are whole numbers
        before = in_file


def test_recovery_recovers(family):
    for member in family["members"]:
        assert member["eval"]["ppl"] < member["eval_factored"]["ppl"] / 1.2
    assert family["members"][0]["eval_factored"]["ppl"] > 10 * family["parent"]["eval"]["ppl"]


def test_perplexities_are_those_of_plain_transformers(family, parent, corpus, run_dir):
    tokenizer = AutoTokenizer.from_pretrained(parent)
    for found, folder in [
        (family["parent"], parent),
        *((member, run_dir / member["path"]) for member in family["members"]),
    ]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected, tokens = perplexity(model, tokenizer, corpus / "validation", context=256, tokens=EVALUATED)
        assert found["eval"]["ppl"] == pytest.approx(expected, rel=1e-4)
        assert found["eval"]["nll_tokens"] == tokens > EVALUATED - 256


def test_members_bring_the_parents_tokenizer(family, parent, corpus, run_dir):
    text = "Once upon a time, there was a little girl named Lily."
    for member in family["members"]:
        assert AutoTokenizer.from_pretrained(run_dir / member["path"])(text) == AutoTokenizer.from_pretrained(parent)(
            text
        )


def test_token_counts(family):
    for i, member in enumerate(family["members"], 1):
        assert TOKENS + 100 - BATCH < member["tokens_stage"] <= TOKENS + 100
        assert member["tokens_total"] == member["tokens_lineage"] == i * member["tokens_stage"]


def test_each_step_is_recorded_once_under_the_contracts_names(family, run_dir):
    steps = rows(run_dir / "metrics.jsonl")
    per_stage = TOKENS // BATCH
    assert [row["step"] for row in steps] == list(range(4 * per_stage))
    for i, row in enumerate(steps):
        stage, step = divmod(i, per_stage)
        assert row.keys() >= STEP_METRICS
        assert (row["stage/index"], row["stage/ratio"]) == (stage + 1, RATIOS[stage])
        assert (row["tokens/stage"], row["tokens/total"]) == ((step + 1) * BATCH, (i + 1) * BATCH)
        assert row["tokens/budget"] == 4 * (TOKENS + 100)
        domains = [value for name, value in row.items() if name.startswith("data/") and name.endswith("_tokens")]
        assert sum(domains) == row["tokens/total"]
        assert row["train/grad_norm"] > 0 and row["train/lr"] > 0
    events = rows(run_dir / "events.jsonl")
    for name in ("factor/rel_error", "factor/seconds"):
        assert sum(name in row for row in events) == 4 * 5 * 7  # 5 blocks of 7 Linears, four times
    ppl = [row["val/ppl"] for row in events if "val/ppl" in row]
    expected = [member[key]["ppl"] for member in family["members"] for key in ("eval_factored", "eval")]
    assert ppl == pytest.approx([family["parent"]["eval"]["ppl"], *expected], rel=1e-6)


def test_wandb_holds_the_same_rows(run_dir):
    (log,) = runs(run_dir)
    found = [row for row in history(log) if "train/loss" in row]
    assert found == rows(run_dir / "metrics.jsonl")


def test_the_report_and_the_config_are_there(made):
    run_dir, said = made
    for name in ("family.png", "losses.png"):
        assert (run_dir / "report" / name).read_bytes().startswith(b"\x89PNG")
    page = (run_dir / "report" / "report.html").read_text()
    # It needs nothing beside it.
    assert "2.25x" in page and 'src="data:image/png;base64' in page and not re.search(r"(src|href)=\W*http", page)
    assert (run_dir / "config.yaml").is_file()
    assert str(run_dir / "report" / "family.png") in said and "2.25x" in said


def test_beneath_the_table_each_model_continues_the_prompt(made, parent, family):
    run_dir, out = made
    told = out.partition(f"after '{PROMPT}':\n")[2].splitlines()
    folders = {"parent": parent, **{member["name"]: run_dir / member["path"] for member in family["members"]}}
    for line, (name, folder) in zip(told[: len(folders)], folders.items(), strict=True):
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
        ids = tokenizer(PROMPT, return_tensors="pt").input_ids
        written = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
        assert line.split(maxsplit=1) == [name, repr(tokenizer.decode(written, skip_special_tokens=True))]
    assert not told[len(folders)].startswith(" ")
