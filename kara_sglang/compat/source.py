"""SGLang's source as text, of an installation or in a wheel: parsed, never imported.

Instance attributes exist in no class object, and a wheel cannot be imported. So both are looked up in
the syntax tree, in the same way.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

_FIELD_CLASSES = "_INPUT_NAMESPACES"
"""The list in ``server_args.py`` of the classes whose fields SGLang joins into ``ServerArgs``."""

_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Definition:
    """What a name stands for.

    Attributes
    ----------
    module
        Below ``sglang.srt``.
    node
        The class, the function, or the statement that binds the name.
    method
        Whether it is a function whose first parameter is bound by the attribute access.
    """

    module: str
    node: ast.AST
    method: bool = False

    @property
    def function(self) -> _Function | None:
        return self.node if isinstance(self.node, _Function) else None


class Source:
    """One release of SGLang.

    Parameters
    ----------
    version : str
    read : callable
        Path below ``sglang/srt`` (``managers/scheduler.py``) -> its text; None where there is none.
    """

    def __init__(self, version: str, read: Callable[[str], str | None]) -> None:
        self.version = version
        self._read = read
        self._module = functools.cache(self._parse)
        self._names = functools.cache(self._bindings)

    @classmethod
    def installed(cls) -> Source:
        """The SGLang of this environment.

        Raises
        ------
        ValueError
            Where none is installed.
        """
        spec = importlib.util.find_spec("sglang")
        if spec is None or not spec.submodule_search_locations:
            raise ValueError("SGLang is not installed in this environment")
        root = Path(spec.submodule_search_locations[0]) / "srt"

        def read(path: str) -> str | None:
            file = root / path
            return file.read_text() if file.is_file() else None

        return cls(metadata.version("sglang"), read)

    @classmethod
    def wheel(cls, path: Path) -> Source:
        """The SGLang in a wheel.

        Raises
        ------
        ValueError
            Where the file is no wheel of SGLang.
        """
        named = re.match(r"sglang-([^-]+)-.*\.whl$", path.name)
        if named is None or not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is no wheel of SGLang")
        archive = zipfile.ZipFile(path)
        files = set(archive.namelist())

        def read(inner: str) -> str | None:
            name = f"sglang/srt/{inner}"
            return archive.read(name).decode() if name in files else None

        return cls(named[1], read)

    def find(self, path: str) -> Definition | None:
        """What a dotted path below ``sglang.srt`` stands for; None where there is nothing.

        A class has its own names, its bases', and those that its methods set on ``self``.
        """
        parts = path.split(".")
        for count in range(len(parts), 0, -1):
            module = ".".join(parts[:count])
            tree = self._module(module)
            if tree is not None:
                found: Definition | None = Definition(module, tree)
                for name in parts[count:]:
                    found = self._member(found, name) if found is not None else None
                return found
        return None

    def _parse(self, module: str) -> ast.Module | None:
        path = module.replace(".", "/")
        text = self._read(f"{path}.py") or self._read(f"{path}/__init__.py")
        return ast.parse(text) if text is not None else None

    def _member(self, owner: Definition, name: str) -> Definition | None:
        if isinstance(owner.node, ast.Module):
            return self._in_module(owner.module, name)
        if isinstance(owner.node, ast.ClassDef):
            return self._in_class(owner, name)
        return None

    def _in_module(self, module: str, name: str) -> Definition | None:
        node = self._names(module).get(name)
        if not isinstance(node, ast.ImportFrom):
            return Definition(module, node) if node is not None else None
        if node.module is None or not node.module.startswith("sglang.srt") or node.level:
            return Definition(module, node)  # from elsewhere: it is there, and nothing more is known
        original = next(a.name for a in node.names if name in (a.asname, a.name))
        origin = f"{node.module.removeprefix('sglang.srt')}.{original}".lstrip(".")
        return self.find(origin)

    def _bindings(self, module: str) -> dict[str, ast.AST]:
        """The names of a module and, for each, the first statement that binds it."""
        names: dict[str, ast.AST] = {}
        tree = self._module(module)
        for statement in _statements(tree.body if tree is not None else ()):
            for name in _bound(statement):
                names.setdefault(name, statement)
        return names

    def _in_class(self, owner: Definition, name: str) -> Definition | None:
        node = owner.node
        assert isinstance(node, ast.ClassDef)
        for statement in _statements(node.body):
            if name in _bound(statement):
                return Definition(owner.module, statement, method=not _is_static(statement))
        for inner in ast.walk(node):
            if (
                isinstance(inner, ast.Attribute)
                and inner.attr == name
                and isinstance(inner.ctx, ast.Store)
                and isinstance(inner.value, ast.Name)
                and inner.value.id == "self"
            ):
                return Definition(owner.module, inner)
        for base in self._bases(owner):
            if base.node is not node and (found := self._member(base, name)) is not None:
                return found
        return None

    def _bases(self, owner: Definition) -> Iterator[Definition]:
        assert isinstance(owner.node, ast.ClassDef)
        names = [base.id for base in owner.node.bases if isinstance(base, ast.Name)]
        if owner.node.name == "ServerArgs":
            fields = self._names(owner.module).get(_FIELD_CLASSES)
            if isinstance(fields, ast.Assign) and isinstance(fields.value, ast.List):
                names += [item.id for item in fields.value.elts if isinstance(item, ast.Name)]
        for name in names:
            base = self._in_module(owner.module, name)
            if base is not None and isinstance(base.node, ast.ClassDef):
                yield base


def parameters(function: _Function) -> list[str]:
    """Names of all parameters that can be given by name or position, in order."""
    a = function.args
    return [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)]


def required(function: _Function) -> list[str]:
    """Names of the parameters without a default."""
    a = function.args
    positional = [*a.posonlyargs, *a.args]
    without = positional[: len(positional) - len(a.defaults)]
    keyword = [arg for arg, default in zip(a.kwonlyargs, a.kw_defaults, strict=True) if default is None]
    return [arg.arg for arg in (*without, *keyword)]


def body(function: _Function) -> list[str]:
    """The function's code in lines of one form: without comments and its docstring."""
    statements = function.body
    if ast.get_docstring(function) is not None:
        statements = statements[1:]
    return [line for statement in statements for line in ast.unparse(statement).splitlines()]


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """All statements of a module's or class's body, also those under conditions."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            for part in ("body", "handlers", "orelse", "finalbody"):
                yield from _statements(getattr(statement, part, ()))


def _bound(statement: ast.stmt) -> Iterator[str]:
    """Names that a statement binds."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Import | ast.ImportFrom):
        for alias in statement.names:
            yield alias.asname or alias.name.partition(".")[0]
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
            for node in ast.walk(target):
                if isinstance(node, ast.Name):
                    yield node.id


def _is_static(statement: ast.stmt) -> bool:
    decorators = getattr(statement, "decorator_list", ())
    return any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in decorators)
