"""`plrd factor`: members without training, against float64 algebra on plain transformers, and against the main job's
own factoring."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import run_job, started
from safetensors.torch import load_file, save_file
from tiny_family import write_parent
from tiny_parents import VOCABULARY
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import plrd_train
from plrd_train.cli import main
from plrd_train.compress.budget import last_blocks
from plrd_train.compress.factor_cache import FactorCache
from plrd_train.compress.ranks import Shape
from plrd_train.data.calibration import calibration_batches
from plrd_train.data.corpus import resolve_corpus

assert plrd_train  # it registers the low-rank classes
TEXT = ("data.seq_len=16", "data.streams=6", "recover.micro_batch=4", "evaluation.tokens=500")
EPOCHS = ("factorizer.epochs=1", "factorizer.batch_tokens=64")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """A parent with biases."""
    folder = tmp_path_factory.mktemp("qwen") / "parent"
    write_parent(folder, "qwen2")
    return folder


def looking(tiny: Path, tokens: int = 700) -> list[object]:
    """The options of a method that looks at text."""
    return ["--calibration", tiny / "corpus", f"factorizer.calibration_tokens={tokens}", *TEXT]


def moments(model, parent: Path, corpus: Path, tokens: int) -> dict[str, torch.Tensor]:
    """E[x x^T] of what each Linear is given of the text, in float64, by plain transformers."""
    text = {
        "tokens": tokens,
        "seq_len": 16,
        "streams": 6,
        "seed": 0,
        "append_eos": True,
        "rank": 0,
        "world_size": 1,
        "batch": 4,
    }
    batches = calibration_batches(resolve_corpus(str(corpus), "train"), AutoTokenizer.from_pretrained(parent), **text)
    sums: dict[str, torch.Tensor] = {}

    def hook(name):
        def add(module, given):
            x = given[0].flatten(0, -2).double()
            sums[name] = sums.get(name, 0) + x.T @ x / sum(batch.numel() for batch in batches)

        return add

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return sums


def test_svd_gives_the_nearest_pairs_and_leaves_all_else(plrd_json, qwen, tmp_path):
    found = plrd_json("factor", qwen, tmp_path / "out", "--method", "svd", "--ratio", "2,1.25")
    assert [member["name"] for member in found["members"]] == ["1.25x", "2x"]
    parent = AutoModelForCausalLM.from_pretrained(qwen).eval()
    for entry in found["members"]:
        member = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / entry["path"]).eval()
        assert sum(parameter.numel() for parameter in member.parameters()) == entry["params"]
        for name, rank in entry["ranks"].items():
            whole, pair = parent.get_submodule(name), member.get_submodule(name)
            assert pair.rank == rank
            best = torch.linalg.svdvals(whole.weight.double())[rank:].square().sum().sqrt()
            assert (whole.weight - pair.up.weight @ pair.down.weight).norm() <= 1.0005 * best
            assert (whole.bias is None and pair.up.bias is None) or torch.equal(whole.bias, pair.up.bias)
        ours = dict(member.named_parameters())
        assert all(torch.equal(parameter, ours[name]) for name, parameter in parent.named_parameters() if name in ours)
        assert any(parameter.ndim == 1 and "bias" in name for name, parameter in ours.items())


def test_whitened_gives_the_nearest_outputs_on_the_text(plrd_json, tiny, tmp_path):
    (entry,) = plrd_json(
        "factor", tiny / "parent", tmp_path / "out", "--method", "whitened", "--ratio", 1.6, *looking(tiny)
    )["members"]
    parent = AutoModelForCausalLM.from_pretrained(tiny / "parent").eval()
    member = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / entry["path"]).eval()
    for name, moment in moments(parent, tiny / "parent", tiny / "corpus", 700).items():
        values, vectors = torch.linalg.eigh(moment)
        root = vectors * values.clamp_min(0).sqrt()
        weight, pair = parent.get_submodule(name).weight.double(), member.get_submodule(name)
        best = torch.linalg.svdvals(weight @ root)[entry["ranks"][name] :].square().sum().sqrt()
        assert ((weight - pair.up.weight.double() @ pair.down.weight.double()) @ root).norm() <= 1.001 * best


@pytest.mark.parametrize(
    "chosen", [["fisher"], ["refined", *EPOCHS], ["whitened", "ranks=sensitivity"]], ids=lambda chosen: chosen[0]
)
def test_the_main_job_factors_its_first_stage_so(plrd_json, command, tiny, tmp_path, chosen):
    """The other way to the same factors: an engine over two ranks, from which all is gathered."""
    method, *settings = chosen
    allocation = [setting.removeprefix("ranks=") for setting in settings if setting.startswith("ranks=")]
    own = [setting for setting in settings if setting.startswith("factorizer.")]
    measured = ["ranks.tokens=320"] if allocation == ["sensitivity"] else []
    tokens = ["factorizer.calibration_tokens=700"]
    options = [
        "--method",
        method,
        "--ratio",
        1.6,
        "--ranks",
        *(allocation or ["uniform"]),
        "--calibration",
        tiny / "corpus",
        *TEXT,
    ]
    once = plrd_json(
        "factor", tiny / "parent", tmp_path / "out", *options, "--data", tiny / "corpus", *own, *measured, *tokens
    )
    (entry,) = once["members"]
    arguments = command(
        tmp_path / "run",
        f"factorizer={method}",
        *settings,
        *measured,
        *tokens,
        "stages.ratios=[1.6]",
        "stages.tokens=128",
    )
    ended = run_job(2, [*arguments, "evaluation.tokens=500", "data.append_eos=true"])
    assert ended.status == 0, ended.err
    family = json.loads((tmp_path / "run" / "family.json").read_text())
    (other,) = family["members"]
    assert once["parent"]["eval"]["ppl"] == pytest.approx(family["parent"]["eval"]["ppl"], rel=1e-6)
    if measured:  # losses that hardly grow give way to rounding
        assert entry["ranks"].keys() == other["ranks"].keys() and entry["params"] == pytest.approx(
            other["params"], rel=0.01
        )
        assert all(abs(rank - other["ranks"][name]) <= 2 for name, rank in entry["ranks"].items())
    else:
        assert [entry[key] for key in ("ranks", "params", "linear_params")] == [
            other[key] for key in ("ranks", "params", "linear_params")
        ]
        assert entry["eval"]["ppl"] == pytest.approx(other["eval_factored"]["ppl"], rel=1e-3)


def test_text_that_is_calibrated_and_evaluated_on_is_told(plrd, tiny, tmp_path):
    shard = tiny / "corpus" / "train" / "chunk1" / "example_train_1.jsonl.zst"
    note = (
        f"note: calibrated on as well as evaluated on: 1 of 1 shards, {shard} among them; this perplexity is not "
        "held out"
    )
    # svd looks at no text.
    for method, options, told in (("whitened", looking(tiny), 1), ("svd", [*looking(tiny)[:2], *TEXT], 0)):
        status, out, err = plrd(
            "factor", tiny / "parent", tmp_path / method, "--method", method, "--ratio", 2, *options, "--data", shard
        )
        assert (status, err) == (0, "") and out.splitlines().count(note) == told == out.count("note: ")


def test_several_ratios_at_once_are_those_of_one_each(plrd_json, tiny, tmp_path):
    options = ["--method", "whitened", "--ranks", "energy", *looking(tiny)]
    plrd_json("factor", tiny / "parent", tmp_path / "both", "--ratio", "1.25,1.6", *options)
    plrd_json("factor", tiny / "parent", tmp_path / "one", "--ratio", "1.6", *options)
    both, one = (load_file(tmp_path / name / "members" / "1.6x" / "model.plrd.safetensors") for name in ("both", "one"))
    assert both.keys() == one.keys() and all(torch.equal(both[name], tensor) for name, tensor in one.items())


def test_a_budget_is_kept_by_the_last_blocks_alone(plrd_json, tiny, tmp_path):
    (entry,) = plrd_json(
        "factor", tiny / "parent", tmp_path / "out", "--method", "rom", "--budget", 0.8, *looking(tiny)
    )["members"]
    parent = AutoModelForCausalLM.from_pretrained(tiny / "parent")
    whole, blocks = sum(parameter.numel() for parameter in parent.parameters()), parent.config.num_hidden_layers
    assert 0.75 * whole < entry["params"] <= 0.8 * whole
    factored = {int(name.split(".")[2]) for name in entry["ranks"]}
    assert factored == set(range(min(factored), blocks)) and 0 not in factored


def test_budgets_of_llama_7b_are_about_those_of_the_paper():
    shapes = {
        f"model.layers.{i}.{linear}": Shape(*size)
        for i in range(32)
        for linear, size in ((f"self_attn.{one}_proj", (4096, 4096)) for one in "qkvo")
    }
    shapes |= {f"model.layers.{i}.mlp.{one}_proj": Shape(11008, 4096) for i in range(32) for one in ("gate", "up")}
    shapes |= {f"model.layers.{i}.mlp.down_proj": Shape(4096, 11008) for i in range(32)}
    blocks = [f"model.layers.{i}" for i in range(32)]
    for budget, count, module in ((0.9, 8, 0.60), (0.8, 12, 0.46), (0.5, 24, 0.33)):
        ranks = last_blocks(shapes, blocks, 6_738_415_616, budget)
        assert {int(name.split(".")[2]) for name in ranks} == set(range(32 - count, 32))
        inside = [shapes[name] for name in ranks]
        kept = sum(shapes[name].params(rank) for name, rank in ranks.items())
        assert kept / sum(shape.dense_params for shape in inside) == pytest.approx(module, abs=0.03)
        saved = sum(shape.dense_params for shape in inside) - kept
        assert (6_738_415_616 - saved) / 6_738_415_616 == pytest.approx(budget, abs=2e-4)


def test_the_same_command_adds_what_is_not_there_and_touches_nothing_else(plrd_json, plrd, tiny, tmp_path):
    out = tmp_path / "out"
    plrd_json("factor", tiny / "parent", out, "--method", "svd", "--ratio", 2)
    weights = out / "members" / "2x" / "model.plrd.safetensors"
    before = weights.stat()
    (out / "members" / ".1.5x.part").mkdir()  # as a run that was killed leaves it
    found = plrd_json("factor", tiny / "parent", out, "--method", "svd", "--ratio", "2,1.5")
    assert [member["name"] for member in found["members"]] == ["2x", "1.5x"] and weights.stat() == before
    assert sorted(path.name for path in (out / "members").iterdir()) == ["1.5x", "2x"]
    status, _, err = plrd("factor", tiny / "parent", out, "--method", "whitened", "--ratio", 2, *looking(tiny))
    assert status == 2 and "2x that was made otherwise" in err
    assert "eval" not in found["members"][1]
    assert plrd("show", out)[0] == 0


def test_a_parent_in_bf16_gives_members_in_bf16_and_a_member_can_be_factored_on(plrd_json, tmp_path):
    write_parent(tmp_path / "parent", dtype=torch.bfloat16)
    plrd_json("factor", tmp_path / "parent", tmp_path / "first", "--method", "svd", "--ratio", 1.25)
    first = tmp_path / "first" / "members" / "1.25x"
    (entry,) = plrd_json("factor", first, tmp_path / "second", "--method", "svd", "--ratio", 2)["members"]
    parent, member = (
        AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        for path in (first, tmp_path / "second" / entry["path"])
    )
    assert {parameter.dtype for parameter in member.parameters()} == {torch.bfloat16}
    for name, rank in entry["ranks"].items():
        old, new = (one.get_submodule(name) for one in (parent, member))
        product = old.up.weight.double() @ old.down.weight.double()
        best = torch.linalg.svdvals(product)[rank:].square().sum().sqrt()
        assert (
            product - new.up.weight.double() @ new.down.weight.double()
        ).norm() <= 1.01 * best  # the factors are rounded


def broken(tiny: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "broken"
    write_parent(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "svd"], "--ratio"),
        (["--method", "svd", "--ratio", "1"], "--ratio"),
        (["--method", "svd", "--ratio", "2,x"], "--ratio"),
        (["--method", "svd", "--ratio", "2", "--budget", "0.5"], "--budget"),
        (["--method", "svd", "--budget", "0.01"], "--budget: a budget of 0.01"),
        (["--method", "svd", "--budget", "0.8", "--ranks", "energy"], "--budget: LLM-ROM's ranks are uniform"),
        (["--method", "qr", "--ratio", "2"], "factorizer/qr"),
        (["--method", "svd", "--ratio", "2", "--ranks", "best"], "ranks/best"),
        (["--method", "whitened", "--ratio", "2"], "--calibration: --method whitened looks at text"),
        (["--method", "whitened", "--ratio", "2", "--calibration", "/no/where"], "/no/where"),
        (["--method", "svd", "--ratio", "2", "engine=zero3"], "engine=zero3: means nothing here"),
        (["--method", "svd", "--ratio", "500"], "ranks.multiple: at 500x every rank is below 1"),
        (["--method", "svd", "--ratio", "2", "linears.include=[nothing]"], "linears: no Linear"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(plrd, tiny, tmp_path, arguments, said):
    status, out, err = plrd("factor", tiny / "parent", tmp_path / "out", *arguments)
    assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert not list((tmp_path / "out").glob("members/*"))


def test_nan_in_the_parent_is_named_and_no_half_a_member_stays(plrd, tiny, tmp_path):
    parent = broken(tiny, tmp_path)
    status, _, err = plrd("factor", parent, tmp_path / "out", "--method", "svd", "--ratio", "2")
    assert (
        status == 2
        and err.splitlines()[-1].startswith("error: ")
        and "model.layers.1.mlp.up_proj.weight" in err
        and "NaN" in err
    )
    assert not list((tmp_path / "out").glob("members/*")) and not list((tmp_path / "out").glob("members/.*"))


@pytest.mark.parametrize("room", [3000, 40_000])
def test_a_full_disk_is_one_line_and_no_half_a_member_stays(plrd, tiny, tmp_path, room):
    """The first file that is larger is one of the code beside config.json, or the weights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        status, _, err = plrd("factor", tiny / "parent", tmp_path / "out", "--method", "svd", "--ratio", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2 and err.splitlines()[-1].startswith(f"error: {tmp_path / 'out'}/") and "Traceback" not in err
    assert not [*tmp_path.glob("out/members/*"), *tmp_path.glob("out/members/.*")]


def test_a_folder_that_is_no_family_is_left_alone(plrd, tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    status, _, err = plrd("factor", tiny / "parent", tmp_path / "out", "--method", "svd", "--ratio", "2")
    assert status == 2 and "exists, and is no family" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def factor_counted(limit: int, arguments: list[str]) -> None:
    """The command in this process, which ends as if killed in place of one more than `limit` factors that it keeps; it
    prints how many those were."""
    put, puts = FactorCache.put, 0

    def counted(*given) -> None:
        nonlocal puts
        if puts == limit:
            os._exit(9)
        puts += 1
        put(*given)

    FactorCache.put = counted  # type: ignore[method-assign]
    status = main(arguments)
    print(puts)
    sys.exit(status)


def test_a_member_in_order_goes_on_from_its_finished_blocks(tiny, tmp_path):
    """Killed in the second of two blocks, of seven Linears each."""

    def factor(name: str, limit: int) -> tuple[int, str]:
        arguments = ["factor", tiny / "parent", tmp_path / name, "--method", "rom", "--ratio", "1.6", *looking(tiny)]
        with started(1, factor_counted, limit, list(map(str, arguments))) as job:
            (status,) = job.statuses(60)
            return status, job.out.splitlines()[-1] if job.out else ""

    assert factor("undisturbed", 100) == (0, "14")
    assert factor("out", 10)[0] == 9 and len(list((tmp_path / "out" / "factors").glob("*.safetensors"))) == 10
    assert factor("out", 100) == (0, "7")
    one, other = (
        load_file(tmp_path / name / "members" / "1.6x" / "model.plrd.safetensors") for name in ("undisturbed", "out")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], tensor) for name, tensor in other.items())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "undisturbed").iterdir()
    }


MEASURED = """
import sys, threading, time
from pathlib import Path
peak = 0
def watch():
    global peak
    while True:
        status = Path("/proc/self/status").read_text()
        peak = max(peak, int(status.split("RssAnon:")[1].split()[0]))
        time.sleep(0.01)
from plrd_train.cli import main
import plrd_train.oneshot
base = int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])
threading.Thread(target=watch, daemon=True).start()
status = main(sys.argv[1:])
print((peak - base) * 1024)
sys.exit(status)
"""


@pytest.mark.slow  # ten minutes on two cores, and 8 GB of disk
def test_rom_holds_no_more_than_two_layers_and_their_activations(tiny, tmp_path):
    """Of 16 layers of 2048 / 5632, 3.3 GB, on 32 sequences of 128 tokens. What the files map is not counted: it is the
    cache of the file system."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=16,
        num_attention_heads=16,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "parent")
    for file in (tiny / "parent").glob("*token*"):
        shutil.copy(file, tmp_path / "parent")
    options = [
        "--method",
        "rom",
        "--budget",
        "0.8",
        "--calibration",
        tiny / "corpus",
        "factorizer.calibration_tokens=4096",
        "data.streams=6",
    ]
    command = [sys.executable, "-c", MEASURED, "factor", tmp_path / "parent", tmp_path / "out", *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    layer, tokens = 4 * (4 * 2048**2 + 3 * 2048 * 5632), 4096
    activations = 4 * tokens * (2 * 2048 + 2 * 5632)  # the hidden states before and after it, and inside its MLP
    assert int(done.stdout.splitlines()[-1]) < 2 * layer + activations


@pytest.mark.parametrize("name", ['größer [1], a=b\'s "${c}" {d} \\ ~', "x=${run_dir} (é)"])
def test_any_path_will_do(name, tiny, tmp_path, plrd_json):
    """Parent, corpus and family in folders whose names mean something to Hydra."""
    parent, corpus, out = (tmp_path / f"{kind} {name}" for kind in ("parent", "corpus", "family"))
    shutil.copytree(tiny / "parent", parent)
    shutil.copytree(tiny / "corpus", corpus)
    options = ["--method", "whitened", "--ratio", 2, *looking(tiny)[2:], "--calibration", corpus]
    made = plrd_json("factor", parent, out, *options)
    assert made["parent"]["path"] == str(parent) and [member["path"] for member in made["members"]] == ["members/2x"]
    assert AutoModelForCausalLM.from_pretrained(out / "members" / "2x").num_parameters() == made["members"][0]["params"]
    assert {*tmp_path.iterdir()} == {parent, corpus, out}


@pytest.mark.parametrize(
    ("method", "named"),
    [("a=b", "factorizer/a=b"), ("3", "factorizer/3"), ("svd,rom", "factorizer/svd,rom"), ("", "factorizer")],
)
def test_a_method_that_is_none_is_named_as_given(method, named, tiny, tmp_path, plrd):
    status, _, err = plrd("factor", tiny / "parent", tmp_path / "out", "--method", method, "--ratio", 2)
    assert (status, err.count("\n")) == (2, 1) and named in err and "++" not in err, err
