"""One family on 1, 2 and 3 ranks: the same losses and the same perplexities."""

import json

import pytest
from processes import run_job


@pytest.fixture(scope="module")
def made(command, tmp_path_factory) -> dict[int, tuple[dict, list[dict]]]:
    """ranks -> (family.json, the rows of metrics.jsonl). With 8 sequences a step and 6 streams the shares of 2 and 3 ranks are unequal."""
    found = {}
    for ranks in (1, 2, 3):
        run_dir = tmp_path_factory.mktemp("ranks") / "run"
        ended = run_job(ranks, command(run_dir, "data.streams=5"))
        assert (ended.status, ended.err) == (0, ""), ended.err
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        found[ranks] = (json.loads((run_dir / "family.json").read_text()), rows)
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_losses_of_two_stages_of_20_steps_are_the_same(made, ranks):
    (_, one), (_, several) = made[1], made[ranks]
    assert len(one) == len(several) == 40
    for name, tolerance in (("train/loss", 1e-4), ("train/grad_norm", 1e-3)):
        assert [row[name] for row in several] == pytest.approx([row[name] for row in one], abs=tolerance)
    counted = [name for name in one[0] if name.startswith(("data/", "tokens/")) or name in ("train/lr", "step")]
    assert [{name: row.get(name) for name in counted} for row in several] == [{name: row.get(name) for name in counted} for row in one]
    assert one[-1]["train/loss"] < one[0]["train/loss"] - 0.3  # something was learned, so something could differ


@pytest.mark.parametrize("ranks", [2, 3])
def test_perplexities_are_the_same(made, ranks):
    one, several = made[1][0], made[ranks][0]
    assert several["parent"]["eval"]["nll_tokens"] == one["parent"]["eval"]["nll_tokens"]
    assert several["parent"]["eval"]["ppl"] == pytest.approx(one["parent"]["eval"]["ppl"], rel=1e-6)
    for before, after in zip(one["members"], several["members"], strict=True):
        assert after["eval"]["ppl"] == pytest.approx(before["eval"]["ppl"], rel=1e-4)
        assert {**after, "world_size": 1}.keys() == before.keys() and after["ranks"] == before["ranks"]
    assert several["members"][0]["eval_factored"]["ppl"] == pytest.approx(one["members"][0]["eval_factored"]["ppl"], rel=1e-5)
