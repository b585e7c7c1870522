"""SGLang's source as text: what a dotted path stands for, found without importing anything."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

from kara_sglang.compat.source import Source, body, parameters, required

MODULES = {
    "base.py": "class Base:\n    inherited: int = 0\n    @staticmethod\n    def plain(one): ...\n",
    "thing/__init__.py": (
        "from sglang.srt.base import Base as Known\n"
        "import torch\n"
        "if torch:\n    HERE = 1\nelse:\n    ELSE = 2\n"
        "class Thing(Known):\n"
        "    def __init__(self):\n        self.made, other.not_ours = 1, 2\n"
        "    def method(self, a, /, b=1, *, c, d=2): ...\n"
    ),
}


@pytest.fixture
def source() -> Source:
    return Source("0.0", MODULES.get)


@pytest.mark.parametrize(
    ("path", "module", "kind"),
    [
        ("base", "base", ast.Module),
        ("thing.Thing", "thing", ast.ClassDef),
        ("thing.Known", "base", ast.ClassDef),
        ("thing.torch", "thing", ast.Import),
        ("thing.HERE", "thing", ast.Assign),
        ("thing.ELSE", "thing", ast.Assign),
        ("thing.Thing.method", "thing", ast.FunctionDef),
        ("thing.Thing.made", "thing", ast.Attribute),
        ("thing.Thing.inherited", "base", ast.AnnAssign),
    ],
)
def test_what_a_path_stands_for(source: Source, path: str, module: str, kind: type[ast.AST]) -> None:
    """Names under conditions, of other modules, of bases, and those that methods set on ``self``."""
    found = source.find(path)
    assert found is not None and (found.module, type(found.node)) == (module, kind)


@pytest.mark.parametrize(
    "path", ["absent", "base.Nobody", "thing.Thing.not_ours", "thing.Thing.method.x", "thing.HERE.x"]
)
def test_what_is_not_there(source: Source, path: str) -> None:
    assert source.find(path) is None


def test_parameters_of_functions(source: Source) -> None:
    method, plain = source.find("thing.Thing.method"), source.find("thing.Thing.plain")
    assert method is not None and plain is not None
    assert method.method and not plain.method
    assert parameters(method.function) == ["self", "a", "b", "c", "d"]
    assert required(method.function) == ["self", "a", "c"]


def test_code_is_compared_without_words_and_layout() -> None:
    one, other = (
        ast.parse(text).body[0]
        for text in (
            'def f():\n    """Says."""\n    return (1,\n            2)\n',
            "def f():\n    return 1, 2",
        )
    )
    assert body(one) == body(other) == ["return (1, 2)"]


def test_a_wheel_and_an_installation_say_who_they_are(wheel: Callable[..., Path]) -> None:
    source = Source.wheel(wheel("0.5.99", "class Thing:\n    size = 1\n"))
    assert source.version == "0.5.99"
    assert source.find("things.Thing.size") is not None and source.find("things.Thing.sizes") is None
    assert Source.installed().find("managers.schedule_batch.Req.__init__") is not None
