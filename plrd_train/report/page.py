"""The report of a run: family.png, losses.png, and a report.html with both pictures inside."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from jinja2 import Environment
from matplotlib.figure import Figure

from plrd_train.config import resolved
from plrd_train.family import Family, Member
from plrd_train.report.plots import family_figure, losses_figure
from plrd_train.report.signatures import Sign, signs
from plrd_train.runtime.files import write_atomically
from plrd_train.tracking.rows import Row, read_rows
from plrd_train.tracking.table import HEADERS, count, family_rows, number

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.lead { color: #555; margin-top: .3rem; }
img { width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid #dde1e5; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #888; font-weight: 600; }
pre { background: #f4f6f8; padding: 1rem; overflow-x: auto; font-size: .85rem; }
dt { font-weight: 600; margin-top: .6rem; } dd { margin-left: 0; }
summary { cursor: pointer; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="lead">{{ lead }}</p>
<h2>The family</h2>
<img alt="Perplexity against parameters, parent and members" src="data:image/png;base64,{{ family_png }}">
<div class="wide"><table>
<thead><tr>{% for cell in headers %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in table %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</tbody>
</table></div>
{% if losses_png %}
<h2>The training</h2>
<img alt="Loss against tokens, with the stages and the token budget" src="data:image/png;base64,{{ losses_png }}">
{% else %}
<p>These members were made without training, or its record is not here.</p>
{% endif %}
{% if facts %}
<div class="wide"><table><tbody>{% for name, value in facts %}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}
</tbody></table></div>
{% endif %}
{% if signs %}
<h2>What to look at</h2>
<ul>{% for words in signs %}
<li>{{ words }}.</li>{% endfor %}
</ul>
{% endif %}
<h2>How to read it</h2>
<dl>
<dt>perplexity</dt>
<dd>exp(sum of nll / predicted tokens) over held-out documents one by one, the first {{ context }} tokens of
each, without packing, on the weights as published (rounded to the published type). It says how well a model predicts
this text, and nothing about tasks. Perplexities of models with other tokenizers do not compare.</dd>
<dt>ratio</dt>
<dd>parameters of all eligible Linears of the parent over the parameters of what stands in their place; embeddings and
lm_head stay whole, so a member of ratio 2 keeps more than half of the parent's parameters.</dd>
<dt>straight after factoring, after recovery</dt>
<dd>the same member before and after its stage's fine-tuning.</dd>
<dt>tokens seen</dt>
<dd>training tokens that this member's own weights have seen since the parent, earlier stages included. Calibration
and evaluation tokens are not among them.</dd>
<dt>training loss</dt>
<dd>what the objective minimized on packed sequences, one value an optimizer step (thin) and its moving mean (thick).
It is measured on other text and in other contexts than the held-out loss; with an objective other than cross-entropy
it is another quantity altogether.</dd>
</dl>
{% if settings %}
<h2>Settings</h2>
<details><summary>config.yaml</summary><pre>{{ settings }}</pre></details>
{% endif %}
</body>
</html>
"""


def write_report(run_dir: Path) -> tuple[Path, list[Sign]]:
    """Write family.png, losses.png and report.html in `run_dir`/report from what `run_dir` holds. Returns the path of
    the page, and the signs that it lists.

    family.json is needed; metrics.jsonl, events.jsonl and config.yaml may be absent, and without metrics.jsonl there is
    no losses.png. Each file is replaced atomically. Raises UserError where family.json is missing or damaged.
    """
    family = Family.read(run_dir)
    rows, events = read_rows(run_dir / "metrics.jsonl"), read_rows(run_dir / "events.jsonl")
    config = resolved.read(run_dir) or {}
    settings = (run_dir / "config.yaml").read_text(encoding="utf-8") if config else ""
    folder = run_dir / "report"
    folder.mkdir(exist_ok=True)

    family_png = _png(family_figure(family))
    write_atomically(folder / "family.png", family_png)
    losses = losses_figure(family.parent, rows, events)
    losses_png = _png(losses) if losses else b""
    if losses_png:
        write_atomically(folder / "losses.png", losses_png)
    found = signs(family.parent, family.members, rows)
    page = (
        Environment(autoescape=True)
        .from_string(_PAGE)
        .render(
            title=f"A family of {Path(family.parent.path).name}",
            lead=f"{len(family.members)} {'member' if len(family.members) == 1 else 'members'} made from one parent of "
            f"{count(family.parent.params)} parameters.",
            family_png=base64.b64encode(family_png).decode(),
            losses_png=base64.b64encode(losses_png).decode(),
            headers=HEADERS,
            table=family_rows(family.parent, family.members),
            facts=_facts(family.members, rows),
            signs=[sign.words for sign in found],
            context=(config.get("evaluation") or {}).get("context", 256),
            settings=settings,
        )
    )
    path = folder / "report.html"
    write_atomically(path, page)
    return path, found


def _facts(members: Sequence[Member], rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Names and values of what the training cost."""
    if not rows:
        return []

    def values(name: str) -> list[float]:
        return [row[name] for row in rows if row.get(name) is not None]

    facts = [("optimizer steps", f"{len(rows):,}")]
    if tokens := values("tokens/total"):
        facts.append(("tokens trained on", f"{tokens[-1]:,.0f}"))
    if budget := values("tokens/budget"):
        facts.append(("token budget", f"{budget[-1]:,.0f}"))
    facts += [
        (f"tokens in the stage of {member.name}", f"{member.tokens_stage:,}")
        for member in members
        if member.tokens_stage
    ]
    facts += [
        (f"tokens from {name.removeprefix('data/').removesuffix('_tokens')}", f"{value:,.0f}")
        for name, value in rows[-1].items()
        if name.startswith("data/") and name.endswith("_tokens") and value is not None
    ]
    if speed := values("perf/tokens_per_s"):
        facts.append(("tokens per second, median", number(median(speed))))
    if skipped := values("train/skipped")[-1:]:
        facts.append(("steps left out", f"{skipped[0]:,.0f}"))
    if mfu := values("perf/mfu"):
        facts.append(("model FLOPs utilization, median", f"{100 * median(mfu):.1f}%"))
    if memory := values("perf/memory_gib"):
        facts.append(("memory, peak", f"{max(memory):.1f} GiB"))
    return facts


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
