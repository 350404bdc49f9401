"""A whole family by each method, through the real pipeline."""

import json

import pytest
from faults import kill_before
from processes import run_job

SLOW = pytest.mark.slow
ZERO3 = ("engine=zero3", "engine.dtype=fp32", "engine.activation_checkpointing=false")


def family(command, run_dir, size, method, *overrides):
    """The members of a family of two short stages by `method`."""
    chosen = (f"factorizer={method}", "factorizer.calibration_tokens=700", "stages.tokens=512", "evaluation.tokens=500")
    ended = run_job(size, command(run_dir, *chosen, *overrides))
    assert (ended.status, ended.err) == (0, "")
    return json.loads((run_dir / "family.json").read_text())["members"]


def calibration(run_dir):
    """The tokens of each calibration."""
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [event["calibration/tokens"] for event in events if event["kind"] == "calibration"]


@pytest.mark.parametrize("method", ["asvd", "fisher", "refined", "rom", "whitened"])
def test_a_family_by_each_method(command, tmp_path, method):
    found = family(command, tmp_path / "two", 2, method)
    assert [entry["name"] for entry in found] == ["1.25x", "1.6x"]
    assert calibration(tmp_path / "two") == [688, 688]  # whole sequences of 16 tokens, in each stage
    assert [entry["tokens_total"] for entry in found] == [512, 1024]  # apart from those that are trained on
    if method in ("refined", "rom", "whitened"):  # one of each way to factor
        alone = family(command, tmp_path / "one", 1, method, *ZERO3)
        for entry, other in zip(found, alone, strict=True):
            rel = 1e-2 if method == "refined" else 2e-3  # refined trains its blocks, too, which amplifies rounding
            assert entry["eval"]["ppl"] == pytest.approx(other["eval"]["ppl"], rel=rel)
        # Before any training.
        assert found[0]["eval_factored"]["ppl"] == pytest.approx(alone[0]["eval_factored"]["ppl"], rel=1e-4)


@pytest.mark.parametrize(
    ("method", "ranks"),
    [
        ("whitened", "energy"),
        pytest.param("whitened", "uniform", marks=SLOW),
        ("refined", "uniform"),
        pytest.param("rom", "energy", marks=SLOW),
    ],
)
def test_a_run_that_was_killed_while_it_factored_goes_on_with_what_it_had_kept(command, tmp_path, method, ranks):
    undisturbed = family(command, tmp_path / "undisturbed", 2, method, f"ranks={ranks}", "stages.ratios=[1.6]")
    arguments = command(
        tmp_path / "killed",
        f"factorizer={method}",
        "factorizer.calibration_tokens=700",
        "stages.tokens=512",
        "evaluation.tokens=500",
    )
    arguments += [f"ranks={ranks}", "stages.ratios=[1.6]"]
    assert run_job(2, arguments, kill_before, "plrd_train.compress.factor_cache:FactorCache.put", 5).status == -9
    assert len(list((tmp_path / "killed" / "factors").iterdir())) >= 5
    found = family(command, tmp_path / "killed", 2, method, f"ranks={ranks}", "stages.ratios=[1.6]")
    assert [{**entry, "seconds": None} for entry in found] == [{**entry, "seconds": None} for entry in undisturbed]
    assert not (tmp_path / "killed" / "factors").exists()


@pytest.mark.parametrize(
    ("method", "ranks"), [("refined", "energy"), pytest.param("rom", "sensitivity", marks=SLOW), ("svd", "sensitivity")]
)
def test_ranks_by_spectra_serve_every_method(command, tmp_path, method, ranks):
    texts = {"factorizer.calibration_tokens": 700} if method != "svd" else {}
    texts |= {"ranks.tokens": 500} if ranks == "sensitivity" else {}
    arguments = command(
        tmp_path / "run", f"factorizer={method}", f"ranks={ranks}", "stages.tokens=512", "evaluation.tokens=500"
    )
    ended = run_job(2, [*arguments, *(f"{key}={tokens}" for key, tokens in texts.items())])
    assert (ended.status, ended.err) == (0, "")
    for entry in json.loads((tmp_path / "run" / "family.json").read_text())["members"]:
        assert entry["ratio_requested"] <= entry["ratio"] < 1.03 * entry["ratio_requested"]
        # Uniform: all of them, and one rank for each of two shapes.
        assert len(entry["ranks"]) < 14 or len(set(entry["ranks"].values())) > 2
    # Each read once a stage.
    assert sorted(calibration(tmp_path / "run")) == sorted(2 * [tokens // 16 * 16 for tokens in texts.values()])


def test_calibration_text_of_less_than_a_sequence_is_refused(command, tmp_path):
    ended = run_job(1, command(tmp_path / "run", "factorizer=whitened", "factorizer.calibration_tokens=10"))
    assert ended.status == 2
    assert ended.err.strip() == "error: factorizer.calibration_tokens: 10 is less than one sequence (data.seq_len=16)"
