"""Which module imports which, read from the sources: no circles, and each room of `compress` keeps to its own."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import plrd_train

ROOT = Path(plrd_train.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def imported(module: str) -> Iterator[str]:
    """Every module that the source names in an import, wherever that stands: in a function and under TYPE_CHECKING
    too."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield inside if inside in MODULES else str(node.module)


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: {name for name in imported(module) if name in MODULES} for module in MODULES}
    assert graph["plrd_train.pipeline"] and graph["plrd_train.compress.compressor"]  # the sources were found
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" imports ".join(reversed(error.args[1]))) from None


def test_the_algebra_imports_torch_alone():
    room = "plrd_train.compress.algebra"
    for module in (name for name in MODULES if name.startswith(room)):
        for name in imported(module):
            top = name.partition(".")[0]
            assert name.startswith(f"{room}.") or top == "torch" or top in sys.stdlib_module_names, (module, name)


def test_compress_knows_no_other_room_and_no_transformers():
    allowed = ("compress", "registry", "errors", "runtime")
    room = "plrd_train.compress"
    for module in (name for name in MODULES if f"{name}.".startswith(f"{room}.")):
        for name in imported(module):
            parts = name.split(".")
            assert parts[0] != "transformers", module
            assert parts[0] != "plrd_train" or parts[1] in allowed, (module, name)
