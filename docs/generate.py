"""Write docs/configuration.md from conf/ and the schema.

Types come from the dataclasses of `plrd_train.config.schema` and of the components, defaults from conf/. The meaning of
a key is the first of these that there is: the comment on the key in conf/, the comment on the field in its dataclass,
the sentence of the dataclass's docstring that names the key.

    python docs/generate.py           write the page
    python docs/generate.py --check   end with status 1 where the page is not what would be written
"""

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from plrd_train.config import schema
from plrd_train.config.compose import CONF
from plrd_train.evaluate import EVALUATORS

PAGE = Path(__file__).with_name("configuration.md")
# The groups of which several files may be chosen: `evaluation=[perplexity,speed]`. Each beyond the first says in its
# first line, `# @package evaluation.speed`, where its keys stand.
FURTHER = {"evaluation": EVALUATORS}
STALE = "docs/configuration.md: not what conf/ and the schema say; run `python docs/generate.py` (or `make docs`)"

INTRO = """# Configuration

<!-- Written by docs/generate.py from conf/ and the schema. Change those, and run `make docs`. -->

A run is described by one mapping. `conf/config.yaml` names a file for each group; `key=value` behind any command
overrides a key, `group=file` chooses another file of a group, and `experiment=NAME` a set of such changes:

```
python -m plrd_train experiment=tinystories factorizer=whitened ranks=energy stages.ratios=[1.5,2.25] …
```

An unknown key, a wrong type and an impossible value each end the command before any work, in one line that names the
key. What a run was started with lies in `run_dir/config.yaml`. Where a value holds `=`, a comma, a bracket or a quote,
quote it for Hydra and for the shell: `'run_dir="runs/a=b"'`. `--cfg job` prints the composed mapping, `--help` the
groups. A default of `???` has to be given; `${…}` takes the value of another key.
"""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A key of a YAML file: its value as it is written there, and its comment."""

    value: str
    comment: str


@dataclasses.dataclass(frozen=True)
class File:
    """A YAML file of conf/: where its keys stand (`# @package`; empty: in its group), the comment at its top, its keys
    (dotted), and the files of its group that it is based on."""

    name: str
    package: str
    about: str
    entries: dict[str, Entry]
    bases: list[str]


def read(path: Path) -> File:
    """The file at `path`, with the keys of the files that it is based on beneath its own."""
    about, entries, above = [], {}, []
    parents: list[tuple[int, str]] = []
    text = path.read_text()
    for line in text.splitlines():
        if re.match(r"\s*(# @package\b|$)", line):
            continue
        if line.lstrip().startswith("#"):
            (above if entries or parents else about).append(line.strip(" #"))
            continue
        found = re.match(r"( *)([\w./ -]+):(?:\s+([^#\s].*?))??\s*(?:#\s*(.*))?$", line)
        if not found:
            above = []
            continue
        indent, key, value, comment = len(found[1]), found[2], found[3] or "", found[4] or ""
        parents = [*((at, name) for at, name in parents if at < indent), (indent, key)]
        dotted = ".".join(name for _, name in parents)
        entries[dotted] = Entry(value, " ".join([*above, comment]).strip())
        above = []
    bases = [base for base in (yaml.safe_load(text) or {}).get("defaults", []) if isinstance(base, str)]
    for base in bases:
        if (beneath := path.with_name(f"{base}.yaml")).is_file():
            below = read(beneath).entries
            for key, entry in entries.items():  # a value that is set anew keeps the meaning of the one beneath
                told = entry.comment or below.get(key, entry).comment
                below[key] = Entry(entry.value, told)
            entries = below
    entries.pop("defaults", None)
    package = re.match(r"# @package (\S+)", text)
    return File(path.stem, package[1] if package else "", " ".join(about), entries, bases)


def kind_in_words(kind: Any) -> str:
    """A type annotation for people."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return kind_in_words(arguments[0]) + "".join(_bounds(arguments[1:]))
    if origin in (Union, types.UnionType):
        return " or ".join(kind_in_words(argument) for argument in arguments)
    if origin is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin is tuple:
        several = arguments[-1] is Ellipsis
        each = [kind_in_words(argument) for argument in arguments[:1] if argument is not Ellipsis]
        return f"list ({each[0]})" if several else f"list of {len(arguments)} ({each[0]})"
    words = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`", types.NoneType: "`null`"}
    return words.get(kind) or ("mapping" if origin is dict else getattr(kind, "__name__", str(kind)))


def _bounds(metadata: tuple[Any, ...]) -> Iterator[str]:
    bounds = [bound for item in metadata for bound in getattr(item, "metadata", [item])]
    for signs in ({"ge": "≥", "gt": ">"}, {"le": "≤", "lt": "<"}):
        limits = [(sign, getattr(bound, name, None)) for bound in bounds for name, sign in signs.items()]
        # The last one is the tightest: a type is narrowed by what is written around it.
        for sign, limit in [(sign, limit) for sign, limit in limits if limit is not None][-1:]:
            yield f" {sign} {limit:g}"


def fields(kind: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted key, type, meaning as the dataclass tells it) of each field, those of the dataclasses in it too."""
    hints, comments = get_type_hints(kind, include_extras=True), field_comments(kind)
    for field in dataclasses.fields(kind):
        kinds = hints[field.name]
        inner = [k for k in (kinds, *get_args(kinds)) if inspect.isclass(k) and dataclasses.is_dataclass(k)]
        key = f"{prefix}{field.name}"
        if inner:
            if get_args(kinds):
                yield key, "mapping or `null`", comments.get(field.name) or plain(inspect.getdoc(inner[0]) or "")
            yield from fields(inner[0], f"{key}.")
        else:
            yield key, kinds, comments.get(field.name, "")


def field_comments(kind: type) -> dict[str, str]:
    """The comment on each field of a dataclass; or the sentence of its docstring that has the name in backticks."""
    source = textwrap.dedent(inspect.getsource(kind))
    lines = source.splitlines()
    found = {}
    sentences = re.split(r"(?<=[.;])\s+(?=[A-Z`])", plain(_docstring(kind)))
    for node in ast.parse(source).body[0].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        name, above, at = node.target.id, [], node.lineno - 2
        while lines[at].lstrip().startswith("#"):
            above.insert(0, lines[at].strip(" #"))
            at -= 1
        behind = lines[node.end_lineno - 1][node.end_col_offset :].partition("#")[2].strip()
        named = [sentence for sentence in sentences if f"`{name}`" in sentence]
        found[name] = " ".join([*above, behind]).strip() or " ".join(named)
    return found


def _docstring(kind: type) -> str:
    text = inspect.getdoc(kind) or ""
    return "" if text.startswith(f"{kind.__name__}(") else text  # which `dataclass` writes where there is none


def plain(text: str) -> str:
    return " ".join(text.split())


def wrapped(text: str) -> str:
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def escaped(text: str) -> str:
    return text.replace("|", "\\|")


def settings_of(group: str, file: File) -> tuple[type | None, str]:
    """The dataclass of the settings of that file, and what its component says of itself."""
    registry = FURTHER[group] if is_further(group, file) else schema._PLUGINS.get(group)
    if registry is not None:
        about = plain((inspect.getdoc(registry.get(file.name)) or "").partition("\n\n")[0])
        about = re.sub(r"^`[^`]*`: *", "", about)
        return registry.settings_of(file.name), about
    kind = get_type_hints(schema.Config).get(group)
    return (kind if dataclasses.is_dataclass(kind) else None), ""


def is_further(group: str, file: File) -> bool:
    """Whether the file is of a component that may be chosen beside the group's default."""
    return group in FURTHER and file.package == f"{group}.{file.name}"


def keys(group: str, file: File) -> Iterator[tuple[str, str, str, str]]:
    """(dotted key, type, default, meaning) of each key that the file's settings have. A key that only another file of
    the group sets has that one's comment."""
    kind, _ = settings_of(group, file)
    alike = [other for other in group_files(group, "") if other.package == file.package]
    others = {key: entry.comment for other in alike for key, entry in other.entries.items()}
    for key, hint, told in fields(kind) if kind else ():
        entry = file.entries.get(key, Entry("", ""))
        if key == "name" and entry.value == file.name:  # which file was chosen
            continue
        words = hint if isinstance(hint, str) else kind_in_words(hint)
        place = file.package if is_further(group, file) else group
        yield f"{place}.{key}", words, entry.value, entry.comment or others.get(key, "") or told


def group_files(group: str, default: str) -> list[File]:
    """The files of that group, the default first."""
    found = [read(path) for path in sorted((CONF / group).glob("*.yaml"))]
    return sorted(found, key=lambda file: file.name != default)


def groups() -> dict[str, str]:
    """Each group of conf/config.yaml, and the file that it takes by default."""
    listed = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    pairs = [next(iter(item.items())) for item in listed if isinstance(item, dict)]
    return {group: file for group, file in pairs if (CONF / group).is_dir()}


def table(rows: list[tuple[str, ...]], *head: str) -> str:
    lines = ["| " + " | ".join(escaped(cell) for cell in row) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], "|" + " --- |" * len(head), *lines[1:]])


def rows_of(group: str, file: File) -> list[tuple[str, ...]]:
    return [
        (f"`{key}`", words, f"`{default}`" if default else "", meaning)
        for key, words, default, meaning in keys(group, file)
    ]


def section(group: str, default: str) -> str:
    """One group of the page."""
    files = group_files(group, default)
    parts = [f"## {group}"]
    if group in schema._PLUGINS or all(settings_of(group, file)[0] is None for file in files):
        listed = []
        for file in files:
            name = f"`{group}={file.name}`" + (" (default)" if file.name == default else "")
            listed.append((name, " ".join(filter(None, [settings_of(group, file)[1], file.about]))))
        parts.append(table(listed, "file", "what it is"))
        rows = [(file, rows_of(group, file)) for file in files]
        for file, its in rows:
            if its:
                parts += [f"### {group}={file.name}", table(its, "key", "type", "default", "meaning")]
        return "\n\n".join(parts)
    first = files[0]
    kind, _ = settings_of(group, first)
    about = [text for text in (first.about, plain(_docstring(kind)) if kind else "") if text]
    parts += [wrapped(text) for text in about]
    parts.append(table(rows_of(group, first), "key", "type", "default", "meaning"))
    further = [file for file in files if is_further(group, file)]
    if others := [file for file in files[1:] if file not in further]:
        listed = []
        for file in others:
            changed = [
                f"`{key}={entry.value}`"
                for key, entry in file.entries.items()
                if entry.value and entry.value != first.entries.get(key, Entry("", "")).value and key != "name"
            ]
            listed.append((f"`{group}={file.name}`", file.about, ", ".join(changed)))
        parts.append(table(listed, "other file", "what it is", "what it sets"))
    for file in further:
        parts += [f"### {group}=[{default},{file.name}]", wrapped(settings_of(group, file)[1]), wrapped(file.about)]
        parts.append(table(rows_of(group, file), "key", "type", "default", "meaning"))
    return "\n\n".join(parts)


def page() -> str:
    """The whole page."""
    top = read(CONF / "config.yaml")
    hints = get_type_hints(schema.Config, include_extras=True)
    rows = [
        (f"`{key}`", kind_in_words(hints[key]), f"`{entry.value}`", entry.comment)
        for key, entry in top.entries.items()
        if key in hints
    ]
    parts = [INTRO.strip(), "## The run", table(rows, "key", "type", "default", "meaning")]
    parts += [section(group, default) for group, default in groups().items()]
    return "\n\n".join(parts) + "\n"


def without_meaning() -> list[str]:
    """The keys that neither conf/ nor the schema explains."""
    found = [key for key, entry in read(CONF / "config.yaml").entries.items() if "." not in key and not entry.comment]
    found = [key for key in found if key != "hydra"]
    for group, default in groups().items():
        for file in group_files(group, default):
            found += [f"conf/{group}/{file.name}.yaml: {key}" for key, *_, meaning in keys(group, file) if not meaning]
    return sorted(set(found))


def main(arguments: list[str]) -> int:
    if "--check" in arguments:
        if PAGE.read_text() == page():
            return 0
        print(STALE, file=sys.stderr)
        return 1
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
