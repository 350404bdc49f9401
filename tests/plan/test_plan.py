"""`plrd plan` on the parents that it is for, against the figures that follow from their public sizes."""

import json
import math

import pytest
import torch
from huggingface_hub import constants
from large_parents import LLAMA2_70B, MISTRAL_7B
from tiny_parents import CONFIGS
from transformers import LlamaConfig, MistralConfig

from plrd_train.cli import main
from plrd_train.compress.algebra.metrics import whitened_peak_bytes
from plrd_train.compress.algebra.truncate import peak_bytes
from plrd_train.compress.methods import METHODS as FACTORIZERS
from plrd_train.compress.ranks import Shape
from plrd_train.parents.models import build_model

LARGE = {"mistral": MISTRAL_7B, "llama_70b": LLAMA2_70B, "tiny": CONFIGS["llama"]}
LARGE["llama_70b_8_blocks"] = LlamaConfig(**{**LLAMA2_70B.to_dict(), "num_hidden_layers": 8})
LARGE["four_blocks"] = MistralConfig(**{**LARGE["mistral"].to_dict(), "num_hidden_layers": 4, "layer_types": None})
ONE_STAGE = "stages.ratios=[2.25]"


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """A folder with a folder for each of LARGE, which holds its config.json and nothing else."""
    root = tmp_path_factory.mktemp("configs")
    for name, config in LARGE.items():
        config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
        config.save_pretrained(root / name)
    return root


@pytest.fixture
def plan(configs, capsys):
    """plan(parent, *arguments) -> the object that `plrd plan --json` prints."""

    def call(parent, *arguments):
        capsys.readouterr()
        status = main(
            ["plan", "experiment=mistral_7b", f"parent.path={configs / parent}", *map(str, arguments), "--json"]
        )
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return json.loads(captured.out)

    return call


def phase(plan, stage, name):
    (found,) = (entry for entry in plan["memory"]["phases"] if (entry["stage"], entry["phase"]) == (stage, name))
    return found


@pytest.mark.parametrize(("engine", "bytes_each"), [("fsdp", 16), ("zero3", 18)])
def test_mistral_7b_fits_on_8_gpus_of_80_gb(plan, engine, bytes_each):
    made = plan("mistral", f"engine={engine}", "--world-size", 8, "--device-memory", 80, ONE_STAGE)
    memory, (member,) = made["memory"], made["members"]
    assert (
        memory["fits"]
        and memory["device_bytes"] < 80e9
        and memory["why"].startswith("it fits")
        and memory["peak"]["stage"] in memory["why"]
    )
    assert not memory["would_fit"]
    assert made["parent"]["params"] == pytest.approx(7.24e9, rel=0.001) and member["params"] == pytest.approx(
        3.36e9, rel=0.005
    )
    assert member["ranks"]["q_proj"] == [910, 910] and member["ranks"]["down_proj"] == [1415, 1415]
    assert member["bytes"] == 2 * member["params"] and member["dtype"] == "bfloat16"
    update = phase(made, "2.25x", "update")["device"]
    states = update["parameters"] + update["gradients"] + update["optimizer"]
    share = member["params"] / 8
    # What the step computes in, and ZeRO-3's bucket.
    assert bytes_each * share <= states <= (bytes_each + 8.5) * share + 4 * 5e7
    assert memory["peak"]["device_bytes"] == max(entry["device_bytes"] for entry in memory["phases"])
    assert all(
        entry["device_bytes"] == pytest.approx(sum(entry["device"].values()), abs=10) for entry in memory["phases"]
    )


def test_what_does_not_fit_is_told_what_would_make_it_fit(plan):
    arguments = (
        "tiny",
        "data.seq_len=64",
        "stages.ratios=[1.25]",
        "recover.micro_batch=8",
        "engine.activation_checkpointing=false",
        "engine.replicas=8",
    )
    arguments = (*arguments, "recover.global_batch_tokens=8192", "--world-size", 16)

    def needed(*overrides):
        return plan(*arguments, *overrides)["memory"]["device_bytes"]

    whole, small_batch = needed(), needed("recover.micro_batch=1")
    assert small_batch < whole
    memory = plan(*arguments, "--device-memory", (whole + small_batch) / 2e9)["memory"]
    assert not memory["fits"] and memory["why"].startswith("it does not fit")
    assert memory["would_fit"][0] == {"change": "recover.micro_batch=1", "device_bytes": small_batch}
    lightest = min(
        needed(
            "recover.micro_batch=1", "evaluation.batch=1", "engine.replicas=1", "engine.activation_checkpointing=true"
        ),
        small_batch,
    )
    memory = plan(*arguments, "--device-memory", 1.0001 * lightest / 1e9)["memory"]
    for mend in memory["would_fit"]:
        more = (
            ("--world-size", mend["change"].split()[0]) if mend["change"].endswith(" ranks") else mend["change"].split()
        )
        assert needed(*more) == mend["device_bytes"] <= 1.0001 * lightest
    assert memory["would_fit"]
    assert plan(*arguments, "--device-memory", 1e-3)["memory"]["would_fit"] == []


@pytest.mark.slow
def test_a_large_model_that_does_not_fit(plan):
    """Alone on 80 GB, Mistral-7B at 1.25x has 16 bytes a parameter to hold, 12 of them for the optimizer's step."""
    memory = plan("mistral", "stages.ratios=[1.25]", "--world-size", 1)["memory"]
    assert not memory["fits"] and memory["device_bytes"] > 16 * 5.84e9
    offloaded, spread = memory["would_fit"]
    assert offloaded["change"] == "engine=zero3 engine.offload_optimizer=cpu" and spread["change"] == "2 ranks"
    assert offloaded["device_bytes"] < spread["device_bytes"] < 80e9


def test_time_and_disk_follow_from_what_is_assumed(plan):
    slow, fast = (
        plan("tiny", "data.seq_len=64", ONE_STAGE, "--mfu", mfu, "--disk-gb-per-s", disk)
        for mfu, disk in ((0.2, 1), (0.4, 10))
    )
    (member,), sizes = slow["members"], LARGE["tiny"]
    attention = sizes.num_hidden_layers * sizes.hidden_size * 64
    assert member["flops"] == pytest.approx(6 * (member["params"] + attention) * 250e6)
    assert member["hours"] == pytest.approx(member["flops"] / (0.2 * 989e12 * 8) / 3600)
    assert slow["hours"] == pytest.approx(2 * fast["hours"]) and slow["flops"] > member["flops"]
    assert (slow["machine"]["mfu"], slow["machine"]["peak_flops_per_s"]) == (0.2, 989e12)
    assert slow["checkpoints"]["bytes"] == 12 * member["params"]
    assert slow["checkpoints"]["seconds"] == pytest.approx(10 * fast["checkpoints"]["seconds"])
    branched = plan("tiny", "data.seq_len=64", ONE_STAGE, "schedule.branch=0.2")
    assert branched["checkpoints"]["bytes"] == 16 * member["params"]
    # Two that are kept, the one that is written, the stage's end.
    published = slow["checkpoints"]["run_dir_bytes"] - (3 * 12 + 4) * member["params"]
    assert published in (2 * member["params"], 4 * member["params"])


@pytest.mark.parametrize(
    ("parent", "params"), [("llama_70b_8_blocks", 7.37e9), pytest.param("llama_70b", 68.98e9, marks=pytest.mark.slow)]
)
def test_a_70b_parent_on_8_nodes(plan, parent, params):
    made = plan(parent, ONE_STAGE, "--world-size", 64, "--nodes", 8)
    assert made["parent"]["params"] == pytest.approx(params, rel=0.001)
    assert made["memory"]["fits"]
    assert phase(made, "parent", "evaluate")["device"]["parameters"] == pytest.approx(
        4 * made["parent"]["params"] / 64, rel=0.01
    )
    saved = made["checkpoints"]
    assert saved["bytes"] == 12 * made["members"][0]["params"]
    assert saved["stop_lead_seconds"] > 2 * saved["seconds"] + 60  # and the steps; one may be under way


def test_what_makes_a_step_larger_and_smaller(plan):
    def step(*overrides):
        sizes = ("stages.ratios=[1.5]", "data.seq_len=64", "recover.global_batch_tokens=8192", "recover.micro_batch=4")
        return phase(plan("tiny", *sizes, *overrides), "1.5x", "forward and backward")

    base = step()
    for larger in (
        "engine.activation_checkpointing=false",
        "recover.micro_batch=8",
        "engine.dtype=fp32",
        "engine.replicas=4",
    ):
        assert step(larger)["device_bytes"] > base["device_bytes"], larger
    assert step("--world-size", 4)["device_bytes"] > base["device_bytes"]
    on_host = step("engine=zero3", "engine.offload_optimizer=cpu")
    assert "optimizer" not in on_host["device"] and on_host["host"]["optimizer"] > 0


def test_a_plan_for_people_says_what_it_assumes_on_a_screen(configs, capsys):
    arguments = [
        "plan",
        "--mfu",
        "0.35",
        "experiment=mistral_7b",
        "--world-size",
        "4",
        f"parent.path={configs / 'tiny'}",
        "data.seq_len=64",
    ]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    text = " ".join(" ".join(lines).split())
    for said in (
        "It fits:",
        "the most is in",
        "1.25x",
        "2.25x",
        "35% of 989 TFLOP/s",
        "10% of the tensors",
        "1 GB/s for all ranks",
        "signal 70 s before the limit (Slurm: sbatch --signal=B:USR1@70 …)",
    ):
        assert said in text
    assert len(lines) <= 45 and max(map(len, lines[2:])) <= 120
    assert main([*arguments, ONE_STAGE, "--device-memory", "0.1"]) == 0
    assert "It does not fit:" in (text := capsys.readouterr().out) and "would make it fit" in text


# The passes over text that come before factoring, and what the largest Linear takes beside itself.
METHODS = {
    "factorizer=svd": ([], peak_bytes),
    "factorizer=whitened": (["calibrate"], whitened_peak_bytes),
    "factorizer=asvd": (["calibrate"], peak_bytes),
    "factorizer=fisher": (["calibrate"], peak_bytes),
    "factorizer=rom": ([], whitened_peak_bytes),
    "factorizer=refined": ([], whitened_peak_bytes),
    "factorizer=whitened ranks=energy": (["calibrate"], whitened_peak_bytes),
    "factorizer=asvd ranks=sensitivity": (["calibrate", "measure"], peak_bytes),
}
IN, OUT = 14336, 4096  # of down_proj


def test_every_method_is_planned():
    assert {f"factorizer={name}" for name in FACTORIZERS.names()} <= set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_factoring_takes_what_its_method_does(plan, method):
    passes, working = METHODS[method]
    made = plan("four_blocks", *method.split(), ONE_STAGE)
    phases = {entry["phase"]: entry["device"] for entry in made["memory"]["phases"] if entry["stage"] == "2.25x"}
    assert [name for name in phases if name in ("calibrate", "measure")] == passes
    assert phases["factor"]["factorization"] >= 4 * IN * OUT + working(Shape(OUT, IN))


def test_what_calibration_keeps(plan):
    """q, k and v share an input, and so do gate and up; Fisher information needs the whole backward of a sequence,
    without checkpointing."""
    moments, magnitudes, gradients = (
        phase(plan("four_blocks", f"factorizer={name}", ONE_STAGE), "2.25x", "calibrate")["device"]
        for name in ("whitened", "asvd", "fisher")
    )
    assert moments["factorization"] == 4 * 4 * (3 * OUT**2 + IN**2) and magnitudes["factorization"] == 4 * 4 * (
        3 * OUT + IN
    )
    assert gradients["activations"] > 4 * 2048 * (8 * OUT + 3 * IN) * 2 > 2 * magnitudes["activations"]


def test_a_parent_that_is_still_to_be_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "experiment=quickstart", "--device", "cpu", "--world-size", "2", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [entry["phase"] for entry in made["memory"]["phases"]][:2] == ["forward and backward", "update"]
    assert made["hours"] is None and made["memory"]["fits"] is None and made["tokens"] == 400_000
    assert not list(tmp_path.iterdir())


def test_a_tied_and_low_rank_parent_counts_once(tmp_path, capsys):
    with torch.device("meta"):
        model = build_model(CONFIGS["llama_tied_scaled_rope"], {"model.layers.0.mlp.up_proj": 8})
    model.config.save_pretrained(tmp_path)
    assert (
        main(
            [
                "plan",
                "experiment=mistral_7b",
                f"parent.path={tmp_path}",
                "stages.ratios=[2]",
                "data.seq_len=16",
                "--json",
            ]
        )
        == 0
    )
    made = json.loads(capsys.readouterr().out)
    assert made["parent"]["params"] == model.num_parameters()
    assert made["members"][0]["ratio"] == pytest.approx(2, rel=0.1)


MISTAKES = {
    "": "required: KEY=VALUE; see plrd plan --help",
    "experiment=mistral": "mistral",
    "experiment=mistral_7b parent.path=nowhere/at/all": "parent nowhere/at/all: no such folder, and not a valid hub id",
    "experiment=mistral_7b parent.path=empty": "parent empty: has no config.json",
    "experiment=mistral_7b parent.path=tiny stages.ratio=[2]": "stages.ratio: unknown key",
    "experiment=mistral_7b parent.path=tiny --device H1000": "--device: H1000 is not known; choose one of H100,",
    "experiment=mistral_7b parent.path=tiny --nodes 3": "--nodes: 3 nodes cannot share out 8 ranks",
    "experiment=mistral_7b parent.path=tiny --world-size 65": "data.streams: 64 streams cannot feed 65 ranks",
    "experiment=mistral_7b parent.path=tiny engine.replicas=3": "engine.replicas=3 does not divide the 8 ranks",
    "experiment=mistral_7b parent.path=tiny --mfu 1.5": "1.5 is no number above 0 and at most 1",
    "experiment=mistral_7b parent.path=tiny linears.exclude=[.*]": "linears: no Linear of tiny is left",
    "experiment=mistral_7b parent.path=tiny ranks.multiple=64": "ranks.multiple: at 1.25x every rank is below 64",
    "--multirun experiment=mistral_7b parent.path=tiny seed=1,2": "--multirun",
    "experiment=mistral_7b parent.path=tiny seed=1,2": "seed",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_told_in_one_line(arguments, configs, capsys, monkeypatch):
    monkeypatch.chdir(configs)
    (configs / "empty").mkdir(exist_ok=True)
    assert main(["plan", *arguments.split()]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and MISTAKES[arguments] in line and not captured.out


def test_a_hub_that_cannot_be_reached_is_told_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert main(["plan", "experiment=mistral_7b"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: parent mistralai/Mistral-7B-v0.1: its config.json cannot be reached (")
    assert line.endswith("; give parent.path=FOLDER of a copy of that file")


def test_sizes_are_finite_at_any_shape(plan):
    # More ranks than rows of some weights.
    made = plan("tiny", "--world-size", 64, "--nodes", 8, "data.seq_len=16", ONE_STAGE)
    assert all(math.isfinite(entry["device_bytes"]) and entry["device_bytes"] > 0 for entry in made["memory"]["phases"])
