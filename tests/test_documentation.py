"""The pages for people: the generated one is fresh and whole, links lead somewhere, lines are short."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml

from plrd_train.config.compose import compose

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / ".github").rglob("*.md"))]


def load_generate():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load_generate()


def test_the_page_of_the_configuration_is_fresh():
    assert generate.PAGE.read_text() == generate.page(), generate.STALE


def test_a_stale_page_is_told_with_the_mend(tmp_path, monkeypatch, capsys):
    stale = tmp_path / "configuration.md"
    stale.write_text(generate.page().replace("`stages.ratios`", "`stages.ratio`"))
    monkeypatch.setattr(generate, "PAGE", stale)
    assert generate.main(["--check"]) == 1
    assert "run `python docs/generate.py`" in capsys.readouterr().err
    assert generate.main([]) == 0 and generate.main(["--check"]) == 0


def test_every_key_has_a_meaning():
    assert generate.without_meaning() == []


@pytest.mark.parametrize("chosen", [[], ["engine=zero3"], ["factorizer=refined", "form=pifa"]])
def test_the_page_has_every_key_that_hydra_composes_with_its_default(chosen):
    (config,) = compose(["parent.path=x", *chosen])
    rows = re.findall(r"(?m)^\| `([\w.]+)` \| [^|]* \| `([^|]*)` \|", generate.PAGE.read_text())
    for key, value in leaves(config):
        if key in ("parent.path", "run_dir") or (key.endswith(".name") and key.count(".") == 1):
            continue  # given above, made of others, or the name of the file that was chosen
        assert value in [yaml_value(default) for name, default in rows if name == key], key


def leaves(mapping, prefix=""):
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def yaml_value(text):
    value = yaml.safe_load(text)
    try:  # YAML takes 1e-8 for text
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?s)```.*?```", "", page.read_text()))
    plain = (re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings)
    return {re.sub(r"\s", "-", heading.strip()) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"(?s)```.*?```|`[^`\n]*`", "", page.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if page.parent.name == "docs":  # the site has the pages of docs/ alone
            assert target.is_relative_to(ROOT / "docs"), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


def test_lines_are_at_most_120_wide():
    files = [*PAGES, *ROOT.glob("*.y*ml"), ROOT / ".ci" / "run", ROOT / "Makefile"]
    for folder in ("conf", "launch", ".github"):
        files += [file for file in (ROOT / folder).rglob("*") if file.suffix in (".yaml", ".yml", ".sh", ".sbatch")]
    long = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in files
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if len(line) > 120 and not line.lstrip().startswith("|")
    ]
    assert long == []


def test_the_navigation_of_the_site_has_every_page():
    navigation = re.sub(r"!!python/name:\S+", "null", (ROOT / "mkdocs.yml").read_text())
    listed = set(re.findall(r"[\w-]+\.md", json.dumps(yaml.safe_load(navigation)["nav"])))
    assert listed == {page.name for page in PAGES if page.parent.name == "docs"}
