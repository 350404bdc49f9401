"""The report of a made-up family: pictures that show something, and a page that needs nothing and trusts nothing."""

import base64
import html.parser
import io
import json
import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import records
from matplotlib.text import Annotation

from plrd_train.errors import UserError
from plrd_train.family import Family, Member, ParentRecord
from plrd_train.report.page import write_report
from plrd_train.report.plots import family_figure

PARENT = {"path": "parents/a & b", "params": 3_100_000, "eval": {"ppl": 4.1}}
RATIOS = [1.25, 1.5, 1.85, 2.25]


def member(ratio: float, factored: float = 8.0, recovered: float = 1.2, **more) -> dict:
    made = {
        "ratio_requested": ratio,
        "ratio": ratio,
        "params": int(3.1e6 * (0.15 + 0.85 / ratio)),
        "eval_factored": {"ppl": 4.1 * factored * ratio},
        "eval": {"ppl": 4.1 * recovered * ratio},
        "tokens_stage": 5000,
        "tokens_lineage": 5000,
    }
    return records.member(f"{ratio:g}x", **made | more)


def write_family(run_dir, members) -> None:
    (run_dir / "family.json").write_text(
        json.dumps(
            {"parent": PARENT, "members": [{**member, "path": f"members/{i}"} for i, member in enumerate(members)]}
        )
    )


def write_metrics(run_dir, stages=RATIOS, steps=20) -> None:
    with (run_dir / "metrics.jsonl").open("w") as file:
        for step in range(steps * len(stages)):
            stage = step // steps
            row = {
                "step": step,
                "train/loss": 1.5 + math.exp(-(step % steps) / 5),
                "tokens/total": 250 * (step + 1),
                "tokens/budget": 40_000,
            }
            row |= {
                "stage/index": stage + 1,
                "stage/ratio": stages[stage],
                "perf/tokens_per_s": 900.0,
                "data/<i>Docs_tokens": 100,
            }
            file.write(json.dumps(row) + "\n")
        file.write('{"step": 80, "train/lo')
    with (run_dir / "events.jsonl").open("w") as file:
        for stage in range(len(stages)):
            for when, loss, tokens in (("straight after factoring", 3.0, stage), ("after recovery", 1.7, stage + 1)):
                row = {
                    "kind": "evaluation",
                    "when": when,
                    "val/loss": loss,
                    "tokens/total": 5000 * tokens,
                    "stage/index": stage + 1,
                }
                file.write(json.dumps(row) + "\n")


def colours(png: bytes) -> set[tuple[int, ...]]:
    image = matplotlib.image.imread(io.BytesIO(png), format="png")
    assert image.shape[0] > 400 and image.shape[1] > 800
    return set(map(tuple, np.unique((image[..., :3] * 255).round().astype(int).reshape(-1, 3), axis=0).tolist()))


BLUE, VERMILLION = (0, 114, 178), (213, 94, 0)


class Page(html.parser.HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: set[str] = set()
        self.images: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            assert name not in ("href", "srcset", "onload")
            if name == "src":
                self.images.append(value)


def test_a_family_of_four(tmp_path):
    write_family(tmp_path, [member(ratio) for ratio in RATIOS])
    write_metrics(tmp_path)
    (tmp_path / "config.yaml").write_text("evaluation:\n  context: 128\nrun_dir: <b>here</b>\n")
    path, _ = write_report(tmp_path)
    assert path == tmp_path / "report" / "report.html"
    assert sorted(file.name for file in path.parent.iterdir()) == ["family.png", "losses.png", "report.html"]
    for name in ("family.png", "losses.png"):
        assert {BLUE, VERMILLION} <= colours((path.parent / name).read_bytes())
    text = path.read_text()
    page = Page(text)
    assert "http" not in text and "<b>here" not in text and "<i>Docs" not in text
    assert "&lt;b&gt;here" in text and "A family of a &amp; b" in text and "first 128 tokens" in text
    assert [base64.b64decode(image.removeprefix("data:image/png;base64,")) for image in page.images] == [
        (path.parent / name).read_bytes() for name in ("family.png", "losses.png")
    ]
    assert "<td>20,000</td>" in text and "<td>40,000</td>" in text  # tokens trained on, and the budget
    assert not {"script", "link", "iframe"} & page.tags


@pytest.mark.parametrize(
    "members",
    [
        [],
        [member(1.25)],
        [member(1.25, factored=1.3)],
        [member(1.25, eval={"ppl": math.inf}), member(1.5, eval=None)],
        [records.member("<script>alert(1)</script> $x_$", params=10)],
        [{**member(ratio), "eval": member(ratio)["eval_factored"]} for ratio in RATIOS],  # made without training
    ],
    ids=["none", "one", "one, near", "not finite", "bare", "untrained"],
)
def test_families_without_training_records(tmp_path, members):
    write_family(tmp_path, members)
    path, _ = write_report(tmp_path)
    assert sorted(file.name for file in path.parent.iterdir()) == ["family.png", "report.html"]
    assert len(colours((path.parent / "family.png").read_bytes())) > 10
    page = Page(path.read_text())
    assert len(page.images) == 1 and "script" not in page.tags


def test_a_report_is_written_again(tmp_path):
    write_family(tmp_path, [member(1.25)])
    before = write_report(tmp_path)[0].read_text()
    write_family(tmp_path, [member(1.25), member(1.5)])
    assert write_report(tmp_path)[0].read_text() != before


def test_a_folder_without_a_family_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"family\.json"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("factored", [1.5, 8.0])
@pytest.mark.parametrize("ratios", [RATIOS, [1.2, 1.25, 1.3, 1.5, 1.85, 2, 2.25]])
def test_labels_do_not_cover_each_other(ratios, factored):
    members = [Member(**member(ratio, factored=factored)) for ratio in ratios]
    figure = family_figure(Family(Path("runs/family"), ParentRecord(**PARENT), members))
    figure.canvas.draw()
    boxes = [
        child.get_window_extent()
        for axes in figure.axes
        for child in axes.get_children()
        if isinstance(child, Annotation)
    ]
    assert len(boxes) == 1 + 2 * len(ratios)
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)
