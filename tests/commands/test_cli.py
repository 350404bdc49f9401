"""The `plrd` command on a family that the real pipeline made, against plain transformers."""

import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path

import plain
import pytest
import torch
from processes import run_ranks
from safetensors.torch import load_file, save_file
from tiny_family import write_parent
from tiny_parents import CONFIGS, save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from plrd_train.cli import main
from plrd_train.config.compose import compose
from plrd_train.pipeline import make_family
from plrd_train.run import Run
from plrd_train.runtime.stop import StopRequest

CONTEXT, TOKENS = 24, 500


def make(world, overrides: list[str]) -> None:
    (source,) = compose(overrides)
    run = Run(source, world, StopRequest())
    make_family(run)
    run.close()


def write_corpus(folder: Path, documents: int, seed: int) -> Path:
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    with (folder / "texts.jsonl").open("w") as file:
        for i in range(documents):
            text = " ".join(f"w{draw.randint(3, 63)}" for _ in range(draw.randint(1, 40)))
            file.write(json.dumps({"text": text, "meta": {"redpajama_set_name": ("Books", "Code")[i % 2]}}) + "\n")
    return folder


@pytest.fixture(scope="module")
def world_of_models(tmp_path_factory) -> Path:
    """A folder with a tiny parent, corpora and the families fp32/ (two members) and bf16/ (one), named after what the
    engine computed in."""
    root = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS["llama"]).save_pretrained(root / "parent")
    save_tokenizer(root / "parent")
    for name, documents in (("train", 80), ("validation", 60), ("other", 10)):
        write_corpus(root / name, documents, seed=documents)
    for dtype, ratios in (("fp32", "1.25,2"), ("bf16", "1.5")):
        overrides = {
            "experiment": "tinystories",
            "run_dir": root / dtype,
            "parent.path": root / "parent",
            "data.train": root / "train",
            "data.validation": root / "validation",
            "data.seq_len": 16,
            "stages.ratios": f"[{ratios}]",
            "stages.tokens": 256,
            "recover.global_batch_tokens": 64,
            "recover.micro_batch": 4,
            "evaluation.context": CONTEXT,
            "evaluation.tokens": TOKENS,
            "engine.dtype": dtype,
            "tracking.wandb.mode": "disabled",
        }
        run_ranks(1, make, [f"{key}={value}" for key, value in overrides.items()])
    return root


def reference(folder: Path, corpus: Path, context: int = CONTEXT, tokens: int = TOKENS) -> tuple[float, int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return plain.perplexity(model, AutoTokenizer.from_pretrained(folder), corpus, context, tokens)


def test_a_family_is_evaluated_as_its_run_did_and_as_transformers_does(world_of_models, plrd_json):
    family = json.loads((world_of_models / "fp32" / "family.json").read_text())
    result = plrd_json("evaluate", world_of_models / "fp32")
    assert list(result["members"]) == ["1.25x", "2x"]
    folders = {
        "parent": world_of_models / "parent",
        **{name: world_of_models / "fp32" / "members" / name for name in result["members"]},
    }
    kept = {"parent": family["parent"]["eval"], **{member["name"]: member["eval"] for member in family["members"]}}
    for name, measured in {"parent": result["parent"], **result["members"]}.items():
        ppl, tokens = reference(folders[name], world_of_models / "validation")
        assert measured["ppl"] == pytest.approx(ppl, rel=1e-5) == pytest.approx(kept[name]["ppl"], rel=1e-5)
        assert measured["nll_tokens"] == tokens == kept[name]["nll_tokens"] <= TOKENS
        assert measured["domains"] == pytest.approx(kept[name]["domains"], rel=1e-5) and set(measured["domains"]) == {
            "Books",
            "Code",
        }
        assert measured["tasks"] == {}


def test_a_family_of_a_bf16_engine_is_evaluated_in_bf16(world_of_models, plrd_json):
    (member,) = json.loads((world_of_models / "bf16" / "family.json").read_text())["members"]
    folder = world_of_models / "bf16" / "members" / "1.5x"
    in_bf16, in_fp32 = plrd_json("evaluate", folder)["ppl"], plrd_json("evaluate", folder, "--dtype", "fp32")["ppl"]
    assert in_bf16 == pytest.approx(member["eval"]["ppl"], rel=1e-5)
    assert in_fp32 == pytest.approx(reference(folder, world_of_models / "validation")[0], rel=1e-5) != in_bf16


def test_a_member_is_evaluated_on_its_familys_text_or_on_another(world_of_models, plrd_json):
    member = world_of_models / "fp32" / "members" / "2x"
    assert plrd_json("evaluate", member) == plrd_json("evaluate", world_of_models / "fp32")["members"]["2x"]
    for folder in (member, world_of_models / "parent"):
        measured = plrd_json(
            "evaluate", folder, "--data", world_of_models / "other", "--context", 7, "--tokens", 40, "--batch", 3
        )
        ppl, tokens = reference(folder, world_of_models / "other", 7, 40)
        assert (measured["ppl"], measured["nll_tokens"]) == (pytest.approx(ppl, rel=1e-5), tokens)


def test_what_lay_in_the_run_dir_is_found_where_the_family_was_moved(world_of_models, tmp_path, plrd_json):
    home = tmp_path / "moved"
    shutil.copytree(world_of_models / "fp32", home)
    for inside in ("parent", "validation"):
        shutil.copytree(world_of_models / inside, home / inside)
    for file in ("config.yaml", "family.json"):
        text = (home / file).read_text()
        for inside in ("parent", "validation"):
            text = text.replace(str(world_of_models / inside), f"gone/run/{inside}")
        (home / file).write_text(text.replace(f"run_dir: {world_of_models / 'fp32'}", "run_dir: gone/run"))
    assert plrd_json("evaluate", home) == plrd_json("evaluate", world_of_models / "fp32")


def test_text_that_a_family_was_trained_on_is_told(world_of_models, tmp_path, plrd):
    train, home = world_of_models / "train", world_of_models / "fp32"
    (tmp_path / "link").symlink_to(train)
    for model, data in ((home, train), (home / "members" / "2x", tmp_path / "link" / "*.jsonl")):
        status, out, err = plrd("evaluate", model, "--data", data, "--tokens", 40, "--json")
        (note,) = [line for line in err.splitlines() if line.startswith("note: ")]
        shard = train / "texts.jsonl" if data == train else tmp_path / "link" / "texts.jsonl"
        assert status == 0 and note == (
            f"note: trained on as well as evaluated on: 1 of 1 shards, {shard} among them; this perplexity is not "
            "held out"
        )
    for arguments in (
        (home, "--data", world_of_models / "other"),
        (home,),
        (world_of_models / "parent", "--data", train),
    ):
        status, out, err = plrd("evaluate", *arguments, "--tokens", 40)
        assert status == 0 and "note: " not in out + err


def test_home_is_written_out_in_every_argument(world_of_models, tmp_path, plrd, plrd_json, monkeypatch):
    monkeypatch.setenv("HOME", str(world_of_models))
    monkeypatch.chdir(tmp_path)
    assert plrd_json("show", "~/fp32") == plrd_json("show", world_of_models / "fp32")
    few = ("--tokens", 40)
    assert plrd_json("evaluate", "~/parent", "--data", "~/other", *few) == plrd_json(
        "evaluate", world_of_models / "parent", "--data", world_of_models / "other", *few
    )
    assert plrd_json("generate", "~/parent", "--prompt", "w3", "--max-tokens", 1)["tokens"] == 1
    (tmp_path / "parent").symlink_to(world_of_models / "parent")
    (tmp_path / "train").symlink_to(world_of_models / "train")
    monkeypatch.setenv("HOME", str(tmp_path))
    looking = ("--calibration", "~/train", "--data", "~/train", "data.seq_len=16", "factorizer.calibration_tokens=256")
    family = plrd_json("factor", "~/parent", "~/family", "--method", "whitened", "--ratio", 2, *looking)
    assert family["parent"]["path"] == str(tmp_path / "parent") and (tmp_path / "family" / "family.json").is_file()
    status, out, err = plrd("report", "~nobody_such/family")
    assert (status, out) == (2, "") and err.startswith(
        "error: argument FAMILY: ~nobody_such/family: ~nobody_such is no home folder"
    )
    assert not list(tmp_path.glob("~*"))


def test_evaluate_for_people(world_of_models, plrd):
    status, out, _ = plrd("evaluate", world_of_models / "fp32")
    ppl = reference(world_of_models / "parent", world_of_models / "validation")[0]
    (header, parent, *members) = out.splitlines()[-4:]
    assert status == 0 and header.split() == ["perplexity", "tokens", "Books", "Code"]
    assert parent.split()[:2] == ["parent", f"{ppl:#.4g}"]
    assert [line.split()[0] for line in members] == ["1.25x", "2x"]


def test_show(world_of_models, plrd, plrd_json, monkeypatch):
    monkeypatch.chdir(world_of_models)
    kept = json.loads(Path("fp32/family.json").read_text())
    shown = plrd_json("show", "fp32")
    for member in shown["members"]:
        assert (
            Path(member["absolute_path"]).is_absolute()
            and (Path(member.pop("absolute_path")) / "config.json").is_file()
        )
    assert shown == kept
    status, out, err = plrd("show", "fp32")
    assert status == 0 and "2x" in out and f"{kept['members'][1]['eval']['ppl']:.4g}" in out and not err


def test_what_is_no_number_shows_as_null(world_of_models, tmp_path, plrd_json):
    (tmp_path / "family.json").write_text(
        (world_of_models / "fp32" / "family.json").read_text().replace('"ppl": ', '"ppl": 1e999, "was": ')
    )
    assert [member["eval"]["ppl"] for member in plrd_json("show", tmp_path)["members"]] == [None, None]


def test_generate_writes_as_transformers_does(world_of_models, plrd, plrd_json):
    member = world_of_models / "fp32" / "members" / "1.25x"
    tokenizer, model = AutoTokenizer.from_pretrained(member), AutoModelForCausalLM.from_pretrained(member)
    ids = tokenizer("w9 w8", return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=15, do_sample=False)[0, ids.shape[1] :]
    result = plrd_json("generate", member, "--prompt", "w9 w8", "--max-tokens", 15)
    text = tokenizer.decode(written, skip_special_tokens=True)
    assert (result["text"], result["tokens"]) == (text, len(written))
    assert result["tokens_per_s"] == pytest.approx(result["tokens"] / result["seconds"])
    assert plrd("generate", member, "--prompt", "w9 w8", "--max-tokens", 15)[:2] == (0, text + "\n")
    sampled = [
        plrd_json("generate", member, "--prompt", "w9", "--temperature", 5, "--seed", seed)["text"]
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_report_is_written_again(world_of_models, tmp_path, plrd, plrd_json):
    home = tmp_path / "family"
    shutil.copytree(world_of_models / "fp32", home)
    shutil.rmtree(home / "report")
    page = home / "report" / "report.html"
    assert plrd_json("report", home) == {"report": str(page.resolve())}
    assert "2x" in page.read_text() and (home / "report" / "family.png").is_file()
    assert plrd("report", home)[:2] == (0, f"{page.resolve()}\n")


MISTAKES = {
    "": "COMMAND; see plrd --help",
    "shwo": "invalid choice: 'shwo'",
    "show": "FAMILY; see plrd show --help",
    "show nowhere": "nowhere: no family.json here",
    "show parent": "parent: no family.json here",
    "report nowhere": "nowhere: no family.json here",
    "report damaged": "damaged/family.json: not a family.json",
    "evaluate ./no/where": "no/where: no such folder",
    "evaluate train": "train: neither a model (no config.json here) nor a family",
    "evaluate fp32/members/3x": "fp32/members/3x: no such member here; there are",
    "evaluate lost": "lost/members/1.25x: no such member here; there are",
    "evaluate parent": "--data: parent is of no run",
    "evaluate parent --data nowhere/at/all": "nowhere/at/all: no such folder",
    "evaluate parent --data broken": "texts.jsonl, line 2: not JSON; mend the line, or skip and count bad ones with "
    "--skip-bad",
    "evaluate parent --data train --context 65": "--context: 65 tokens, but parent reads at most 64",
    "evaluate parent --data train --context 1": "--context: 1 is no whole number of at least 2",
    "evaluate parent --data train --tokens many": "--tokens: many is no whole number",
    "evaluate no_tokenizer --data train": "no_tokenizer: has no tokenizer",
    "evaluate no_weight --data train": "no_weight: its weights lack model.norm.weight",
    "evaluate fp32 --tokens 1": "no document of at least two tokens within 1 tokens",
    "generate fp32 --prompt w3": "fp32: a family; give one of its members: fp32/members/1.25x, fp32/members/2x",
    "generate parent": "--prompt; see plrd generate --help",
    "generate parent --prompt w3 --temperature -1": "--temperature: -1 is no number of at least 0",
    "generate parent --prompt w3 --max-tokens 0": "--max-tokens: 0 is no whole number of at least 1",
    f"generate parent --prompt {'w3,' * 70}": "tokens, but parent reads at most 64; shorten it",
}


@pytest.fixture(scope="module")
def mistakes(world_of_models, tmp_path_factory) -> Path:
    """`world_of_models` with things broken beside what is whole."""
    root = tmp_path_factory.mktemp("mistakes")
    for whole in ("parent", "train", "fp32"):
        (root / whole).symlink_to(world_of_models / whole)
    (root / "damaged").mkdir()
    (root / "damaged" / "family.json").write_text('{"parent"')
    shutil.copytree(world_of_models / "fp32", root / "lost")
    shutil.rmtree(root / "lost" / "members" / "1.25x")
    (root / "broken").mkdir()
    (root / "broken" / "texts.jsonl").write_text('{"text": "w3 w4"}\n{"text": \n')
    for name in ("no_tokenizer", "no_weight"):
        shutil.copytree(world_of_models / "parent", root / name)
    (root / "no_tokenizer" / "tokenizer.json").unlink()
    weights = load_file(root / "no_weight" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, root / "no_weight" / "model.safetensors", metadata={"format": "pt"})
    return root


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_told_in_one_line(arguments, mistakes, plrd, monkeypatch):
    monkeypatch.chdir(mistakes)
    status, out, err = plrd(*arguments.split())
    (line,) = [line for line in err.splitlines() if "tokens/s" not in line]
    assert status == 2 and line.startswith("error: ") and MISTAKES[arguments] in line
    assert not out


def test_bad_lines_are_skipped_where_asked(mistakes, plrd_json):
    measured = plrd_json("evaluate", mistakes / "parent", "--data", mistakes / "broken", "--skip-bad")
    assert measured["nll_tokens"] == 1 and math.isfinite(measured["ppl"])


def test_show_in_a_process_of_its_own_imports_little(world_of_models):
    code = "import sys; from plrd_train.cli import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, "show", str(world_of_models / "fp32"), "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert len(json.loads(done.stdout)["members"]) == 2
    assert not {"datasets", "hydra", "matplotlib", "wandb", "plrd_train.engine.fsdp"}.intersection(done.stderr.split())


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], *([command, "--help"] for command in ("show", "evaluate", "generate", "report"))],
)
def test_help_and_version(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0 and "plrd" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["", "--json"])
def test_a_reader_that_goes_away_is_told_nothing(world_of_models, option):
    command = f"{sys.executable} -m plrd_train.cli show {world_of_models / 'fp32'} {option} | true"
    assert subprocess.run(["bash", "-c", command], capture_output=True, text=True).stderr == ""


def test_documents_are_cut_to_the_positions_of_a_model_unless_told_otherwise(plrd, tmp_path):
    write_parent(tmp_path / "parent", "gptj")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "w3 w4 " * 50}) + "\n")
    call = ("evaluate", tmp_path / "parent", "--data", tmp_path / "text.jsonl", "--json")
    status, out, err = plrd(*call)
    assert status == 0 and "position embeddings for 64 tokens: it reads so many of each document" in err
    assert json.loads(out)["nll_tokens"] == 63 and json.loads(out) == json.loads(plrd(*call, "--context", 64)[1])
    status, _, err = plrd(*call, "--context", 65)
    assert status == 2 and "--context: 65 tokens" in err
