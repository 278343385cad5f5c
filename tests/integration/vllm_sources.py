# SPDX-License-Identifier: Apache-2.0
"""What a vLLM offers, read from its source files without importing them."""

import ast
import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Module:
    """A module of vLLM."""

    name: str


@dataclass(frozen=True)
class Class:
    """A class of vLLM, with the module in which its bases are looked up."""

    module: str
    node: ast.ClassDef


@dataclass(frozen=True)
class Function:
    node: ast.FunctionDef | ast.AsyncFunctionDef

    @property
    def parameters(self) -> str:
        a = self.node.args
        found = [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]
        return " ".join(p.arg for p in found if p is not None)


@dataclass(frozen=True)
class External:
    """Something of another package, as a real object; unknown: not importable here."""

    value: Any = None


@dataclass(frozen=True)
class Value:
    """A variable; what it has is not known."""


Thing = Module | Class | Function | External | Value


class Sources:
    """The sources of one vLLM, below ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @functools.cache  # noqa: B019 (one object a release)
    def module(self, name: str) -> dict[str, Thing | str] | None:
        """What the module defines; names that it imports, as "module:name"."""
        path = self.root.joinpath(*name.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not file.exists():
            return {} if path.is_dir() else None
        tree = ast.parse(file.read_text())
        package = name if path.is_dir() else name.rpartition(".")[0]
        # Names that are imported for type checkers only are there at run time if the
        # module is lazy.
        lazy = "def __getattr__(" in file.read_text()
        names: dict[str, Thing | str] = {}
        for node in _statements(tree.body, lazy):
            names.update(_defined(node, name, package))
        return names

    def find(self, path: str) -> Thing | None:
        """``module:name.attribute`` or ``module``; None if it does not exist."""
        module, _, attributes = path.partition(":")
        thing: Thing | None = self._module(module)
        for name in attributes.split(".") if attributes else ():
            thing = self.attribute(thing, name) if thing else None
        return thing

    def attribute(self, thing: Thing, name: str) -> Thing | None:
        """``thing.name``; None if it does not exist."""
        match thing:
            case Module():
                found = (self.module(thing.name) or {}).get(name)
                if found is None:
                    return self._module(f"{thing.name}.{name}")
                return self.find(found) if isinstance(found, str) else found
            case Class():
                return self.members(thing).get(name)
            case External() if thing.value is not None:
                found = getattr(thing.value, name, None)
                return External(found) if hasattr(thing.value, name) else None
            case _:
                return Value()

    def members(self, cls: Class) -> dict[str, Thing]:
        """Attributes of a class and of its instances, those of its bases included."""
        names: dict[str, Thing] = {}
        for base in reversed(cls.node.bases):
            thing = self._expression(base, cls.module)
            if isinstance(thing, Class):
                names.update(self.members(thing))
            elif isinstance(thing, External) and thing.value is not None:
                names.update(dict.fromkeys(dir(thing.value), Value()))
        return names | own_members(cls)

    def keywords(self, thing: Thing) -> set[str] | None:
        """Names of the arguments that a call takes; None if not known."""
        if isinstance(thing, Function):
            return None if thing.node.args.kwarg else set(thing.parameters.split())
        if not isinstance(thing, Class):
            return None
        init = self.members(thing).get("__init__")
        if isinstance(init, Function):
            return self.keywords(init)
        return set(self.members(thing))  # a dataclass: its fields

    def _module(self, name: str) -> Thing | None:
        if name.split(".")[0] == "vllm":
            return Module(name) if self.module(name) is not None else None
        try:
            return External(importlib.import_module(name))
        except ImportError:
            return External()

    def _expression(self, node: ast.expr, module: str) -> Thing | None:
        if isinstance(node, ast.Name):
            return self.attribute(Module(module), node.id)
        if isinstance(node, ast.Attribute):
            owner = self._expression(node.value, module)
            return owner and self.attribute(owner, node.attr)
        return None


def own_members(cls: Class) -> dict[str, Thing]:
    """What the class itself defines; instance attributes are assigned to ``self``."""
    names: dict[str, Thing] = {
        node.attr: Value()
        for node in ast.walk(cls.node)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and ast.unparse(node.value) == "self"
    }
    for node in _statements(cls.node.body, True):
        for name, thing in _defined(node, cls.module, "").items():
            names[name] = Value() if isinstance(thing, str) else thing
    return names


def _statements(body: list[ast.stmt], type_checking: bool) -> Iterator[ast.stmt]:
    """The statements of a block, those inside ``if``, ``try`` and ``with`` included."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            blocks = [node.orelse, *([node.body] if type_checking else [])]
        elif isinstance(node, ast.If | ast.Try | ast.With):
            blocks = [getattr(node, name, []) for name in ("body", "orelse")]
            blocks += [handler.body for handler in getattr(node, "handlers", [])]
        else:
            continue
        for block in blocks:
            yield from _statements(block, type_checking)


def _defined(node: ast.stmt, module: str, package: str) -> dict[str, Thing | str]:
    """Names that a statement binds."""
    match node:
        case ast.ClassDef():
            return {node.name: Class(module, node)}
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return {node.name: Function(node)}
        case ast.Import():
            return {
                alias.asname or alias.name.split(".")[0]: (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                for alias in node.names
            }
        case ast.ImportFrom():
            parents = package.split(".")
            above = parents[: len(parents) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            return {a.asname or a.name: f"{source}:{a.name}" for a in node.names}
        case ast.Assign():
            targets = [t for target in node.targets for t in ast.walk(target)]
            return {t.id: Value() for t in targets if isinstance(t, ast.Name)}
        case ast.AnnAssign() if isinstance(node.target, ast.Name):
            return {node.target.id: Value()}
    return {}
