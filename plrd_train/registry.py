"""Components by name: one folder a kind, one file a component, and nothing else to edit.

A kind is a `Registry` over a folder of this package. A plug-in is another package that is laid out alike and has an
entry point in the group `plrd_train`: its `compress/forms/mine.py` is the form `mine`, and its `conf/form/mine.yaml`
holds the settings. A file whose name begins with an underscore is a part of others, and no component.
"""

import functools
import importlib
import pkgutil
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from plrd_train.errors import UserError

GROUP = "plrd_train"


@functools.cache
def packages() -> dict[str, Path]:
    """{name: folder} of this package and of every plug-in. Raises UserError where one cannot be imported."""
    found = {}
    for name in (GROUP, *sorted({point.value for point in entry_points(group=GROUP)})):
        spec = find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"plug-in {name}: there is no package of that name; install it, or remove its entry point")
        found[name] = Path(next(iter(spec.submodule_search_locations)))
    return found


@dataclass(frozen=True)
class NoSettings:
    """The settings of a component that has none."""


@dataclass(frozen=True)
class Registry:
    """The components of one kind: the modules of `folder` (dotted, in each package). `kind` is the word for one, and
    `settings` the name of the dataclass of its settings, which its file may define."""

    kind: str
    folder: str
    settings: str = "Settings"

    def names(self) -> list[str]:
        """The names of all components, sorted."""
        return sorted(_modules(self))

    def get(self, name: str) -> Any:
        """The module of that component. Raises KeyError for an unknown name."""
        return importlib.import_module(_modules(self)[name])

    def settings_of(self, name: str) -> type:
        """The dataclass of that component's settings. Raises KeyError for an unknown name."""
        return getattr(self.get(name), self.settings, NoSettings)


@functools.cache
def _modules(registry: Registry) -> dict[str, str]:
    """{name: module}. Raises UserError where two packages have a component of the same name."""
    found: dict[str, str] = {}
    for package, root in packages().items():
        for file in pkgutil.iter_modules([str(root.joinpath(*registry.folder.split(".")))]):
            if file.name.startswith("_"):
                continue
            module = f"{package}.{registry.folder}.{file.name}"
            if file.name in found:
                raise UserError(f"{registry.kind} {file.name}: {found[file.name]} and {module}; rename one of them")
            found[file.name] = module
    return found
