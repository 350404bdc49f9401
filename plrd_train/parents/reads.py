"""Find Linears whose weight is read in the source code of the module around them.

One forward does not take every branch: GPU kernels and training have their own."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn


def read_in_source(model: nn.Module, linears: Iterable[str]) -> Iterator[str]:
    """Yield the names in `linears` whose weight or bias the parent module reads as `self.NAME.weight`.

    Methods that initialise do not count. Nor do branches that the module's settings exclude, such as Bloom's
    `if self.pretraining_tp > 1`.
    """
    inside: dict[str, set[str]] = {}
    for name in linears:
        outer, _, leaf = name.rpartition(".")
        inside.setdefault(outer, set()).add(leaf)
    for outer, leaves in inside.items():
        module = model.get_submodule(outer)
        kind: Any = type(module)
        read = {leaf for method in _methods(kind) for leaf in _reads(method, module)}
        yield from (f"{outer}.{leaf}" if outer else leaf for leaf in leaves & read)


@functools.cache
def _methods(kind: type) -> tuple[ast.AST, ...]:
    """The parsed methods of a class, without those that initialise."""
    found = []
    for name, value in vars(kind).items():
        if inspect.isfunction(value) and "init" not in name and "reset" not in name:
            try:
                found.append(ast.parse(textwrap.dedent(inspect.getsource(value))))
            except (OSError, SyntaxError):  # its source is in no file
                continue
    return tuple(found)


def _reads(node: ast.AST, module: nn.Module) -> Iterator[str]:
    """NAME of each `self.NAME.weight` and `self.NAME.bias` below `node`."""
    match node:
        case ast.Attribute(value=ast.Attribute(value=ast.Name(id="self"), attr=name), attr="weight" | "bias"):
            yield name
        case ast.If(test=test, orelse=orelse) if _is_false(test, module):
            for other in orelse:
                yield from _reads(other, module)
            return
    for child in ast.iter_child_nodes(node):
        yield from _reads(child, module)


def _is_false(test: ast.expr, module: nn.Module) -> bool:
    """Whether a condition on nothing but settings of the module is false for this one."""
    parts = list(ast.walk(test))
    if any(isinstance(part, ast.Call) or (isinstance(part, ast.Name) and part.id != "self") for part in parts):
        return False
    if any(isinstance(part, ast.Attribute) and part.attr == "training" for part in parts):
        return False
    try:
        return not eval(compile(ast.Expression(test), "<condition>", "eval"), {"__builtins__": {}}, {"self": module})
    except Exception:  # a setting that this module lacks
        return False
