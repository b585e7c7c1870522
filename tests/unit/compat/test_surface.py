"""The table of what the plugin uses of SGLang: against SGLang, and against our own code."""

from __future__ import annotations

import argparse
import array
import ast
import inspect
import logging
import types
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import prometheus_client
import pytest
import torch
from places import ROOT
from sglang_uses import Ours, Reader, Use, collect

from kara_sglang.compat import surface
from kara_sglang.compat.flags import NEWER_FLAGS
from kara_sglang.compat.source import Source
from kara_sglang.compat.surface import SURFACE, Used, bare, signature

# Files in which SGLang's objects live. The commands below talk to a server and never hold one;
# `kara_sglang.plan` reads flags as the launcher does, and runs on every version (CORE in the Makefile).
_COMMANDS = {"serve.py", "embedded_model.py", "top.py"}
FILES = [
    path
    for path in (
        *(ROOT / "kara_sglang").glob("*.py"),
        *(ROOT / "kara_sglang" / "launcher").glob("*.py"),
        *(ROOT / "kara_sglang" / "scheduler").rglob("*.py"),
        ROOT / "kara_sglang" / "compat" / "attention_backends.py",
        ROOT / "kara_sglang" / "compat" / "kv_cache.py",
        ROOT / "kara_sglang" / "compat" / "sliding_window.py",
        *(ROOT / "radix_integration").glob("*.py"),
    )
    if path.name not in _COMMANDS
]

# Whose names an attribute may have where the reader does not know its owner.
_LIBRARIES = (
    *(
        str,
        bytes,
        int,
        float,
        list,
        dict,
        OrderedDict,
        set,
        tuple,
        memoryview,
        array.array,
        OSError,
        type,
    ),
    *(Path, argparse.ArgumentParser, logging.Logger, inspect.Signature, inspect.Parameter),
    *(types.FunctionType, types.CellType, np.ndarray, prometheus_client.Counter),
    *(prometheus_client.Gauge, torch.Tensor, torch.nn.Module, torch.cuda.Stream, torch.cuda),
)
_OTHERS = {
    *("architectures", "rope_parameters", "rope_scaling"),  # of a model's config in transformers
    *("name", "value", "_replace", "__dict__", "__slots__"),  # of SGLang's enums and named tuples
    *("__func__", "__wrapped__"),  # of Python's functions
    *("kv_compress", "kv_compress_config"),  # of our own flags, parsed
}


def short(owner: str) -> str:
    """The name under which the reader knows an owner."""
    name = owner.rpartition(".")[2]
    if name.endswith("TokenToKVPoolAllocator"):
        return "Allocator"
    return owner if name.islower() else name


def table() -> dict[str, dict[str, str]]:
    """Owner -> name -> entry."""
    rows: dict[str, dict[str, str]] = {}
    for used in SURFACE:
        rows.setdefault(short(used.owner), {}).update({bare(entry): entry for entry in used.names})
    rows["ServerArgs"] |= {flag: flag for flag in NEWER_FLAGS}
    return rows


TABLE = table()
OWNERS = {used.owner for used in SURFACE}


@pytest.fixture(scope="module")
def installed() -> Source:
    return Source.installed()


@pytest.fixture(scope="module")
def ours() -> Ours:
    folders = ("kara_sglang", "radix_integration", "kernels")
    return collect([path for folder in folders for path in (ROOT / folder).rglob("*.py")])


def missing(uses: list[Use], ours: Ours, sglang: Source) -> Iterator[Use]:
    """Those of ``uses`` that the table lacks."""
    known = {name for kind in _LIBRARIES for name in dir(kind)} | _OTHERS | ours.names
    known |= {name for names in TABLE.values() for name in names}
    full = {short(owner): owner for owner in OWNERS}
    for use in uses:
        names = TABLE.get(use.owner, {})
        if not use.owner:
            lacks = use.name not in known
        elif use.keyword == "def":  # of a class of ours: an override where SGLang's class has it, too
            listed = {*names, *_OTHERS}
            lacks = use.name not in listed and sglang.find(f"{full[use.owner]}.{use.name}") is not None
        elif use.keyword:
            lacks = use.keyword not in keywords(use, names)
        else:
            path = f"{use.owner}.{use.name}"
            is_module = (found := sglang.find(path)) is not None and isinstance(found.node, ast.Module)
            set_by_us = any(
                use.name in attributes
                for name, attributes in ours.attributes.items()
                if ours.bases.get(name) == use.owner
            )
            listed = use.name in names or use.name in _OTHERS or path in OWNERS
            lacks = not (listed or is_module or set_by_us)
        if lacks:
            yield use


def keywords(use: Use, names: dict[str, str]) -> set[str]:
    """Keywords that the table allows in a call; a class without ``__init__`` takes its fields."""
    entry = names.get(use.name, "")
    if use.name == "__init__" and not entry:
        return set(names)
    if "(" not in entry:
        return set()
    leading, named, more = signature(entry)
    return {*leading, *named, *({use.keyword} if more else ())}


# -- our code against the table ------------------------------------------------------------------------


def test_the_table_has_all_that_the_code_uses(ours: Ours, installed: Source) -> None:
    """Attributes, keywords, imports and overrides. A line here calls for a line in the table."""
    uses = [use for path in FILES for use in Reader(path, ours, set(TABLE)).read()]
    assert len(uses) > 500
    assert sorted(set(missing(uses, ours, installed))) == []


def test_the_code_uses_all_that_the_table_has() -> None:
    """An entry that nobody uses any more would refuse an SGLang for nothing."""
    words: set[str] = set()
    for path in [*FILES, *(ROOT / "kara_sglang" / "compat").glob("flags.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                words.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                words |= {node.value, node.value.upper()}  # a hook's kind is HookType's value
            elif isinstance(node, ast.ImportFrom):
                words |= {alias.name for alias in node.names}
            elif isinstance(node, ast.keyword) and node.arg:
                words.add(node.arg)
            elif isinstance(node, ast.FunctionDef):
                words.add(node.name)
            elif isinstance(node, ast.Assign):
                words |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    listed = {(used.owner, bare(entry)) for used in SURFACE for entry in used.names}
    assert sorted((owner, name) for owner, name in listed if name not in words) == []


@pytest.mark.parametrize(
    "code, expected",
    [
        ("def f(req: Req): return req.nonsense", ("Req", "nonsense", "")),
        ("def f(req: Req): return req.kv.nonsense", ("ReqKvInfo", "nonsense", "")),
        ("def f(req: Req | None): req.nonsense = 1", ("Req", "nonsense", "")),
        ("def f(b: ScheduleBatch): return [r.nonsense for r in b.reqs]", ("Req", "nonsense", "")),
        (
            "def f(b: ScheduleBatch):\n for i, r in enumerate(b.reqs): r.nonsense",
            ("Req", "nonsense", ""),
        ),
        ("def f(b: ScheduleBatch):\n r = b.reqs[0]\n return r.nonsense", ("Req", "nonsense", "")),
        ("def f(c: Coordinator): return c.scheduler.nonsense", ("Scheduler", "nonsense", "")),
        (
            "def f(s: Scheduler):\n a = s.token_to_kv_pool_allocator\n a.free_segment(1, force=True)",
            ("Allocator", "free_segment", "force"),
        ),
        (
            "class C(UnifiedRadixCache):\n def evict(self): ...",
            ("UnifiedRadixCache", "evict", "def"),
        ),
        (
            "class C(UnifiedRadixCache):\n def mine(self): self.nonsense",
            ("UnifiedRadixCache", "nonsense", ""),
        ),
        (
            "class C(UnifiedRadixCache):\n def mine(self): super().nonsense()",
            ("UnifiedRadixCache", "nonsense", ""),
        ),
        (
            "from sglang.srt.managers.schedule_batch import Nonsense",
            ("managers.schedule_batch", "Nonsense", ""),
        ),
        (
            "from sglang.srt.mem_cache.radix_cache import RadixKey\nRadixKey([], None, limit=3)",
            ("RadixKey", "__init__", "limit"),
        ),
        (
            "from sglang.srt.environ import envs\nenvs.SGLANG_NONSENSE.get()",
            ("Envs", "SGLANG_NONSENSE", ""),
        ),
        (
            "import dataclasses\ndef f(p: MatchPrefixParams): dataclasses.replace(p, nonsense=1)",
            ("MatchPrefixParams", "nonsense", ""),
        ),
        ("def f(req: Req): return getattr(req, 'nonsense', None)", ("Req", "nonsense", "")),
        ("def f(something): return something.nonsense", ("", "nonsense", "")),
        ("def f(something): return getattr(something, 'nonsense', 0)", ("", "nonsense", "")),
    ],
)
def test_a_use_that_the_table_lacks_is_found(
    code: str, expected: tuple[str, str, str], tmp_path: Path, ours: Ours, installed: Source
) -> None:
    path = tmp_path / "some.py"
    path.write_text(code)
    more = collect([path])
    for part in ("attributes", "bases", "methods"):
        getattr(more, part).update(getattr(ours, part))
    more.names = ours.names
    uses = Reader(path, more, set(TABLE)).read()
    found = [(use.owner, use.name, use.keyword) for use in missing(uses, more, installed)]
    assert found == [expected]


# -- the table against SGLang --------------------------------------------------------------------------


def test_the_installed_sglang_has_all_of_it(installed: Source) -> None:
    assert surface.problems(installed) == []


def test_the_table_is_well_formed() -> None:
    """Each name once per owner, in order; each signature in Python's syntax."""
    seen = [(used.owner, bare(entry)) for used in SURFACE for entry in used.names]
    assert len(set(seen)) == len(seen)
    for used in SURFACE:
        assert used.names and list(used.names) == sorted(used.names), used.owner
        for entry in used.names:
            if "(" in entry:
                signature(entry)


SGLANG = """
import threading
from sglang.srt.other import Base as B
from elsewhere import Strange
if threading:
    LIMIT = 3

def plain(a, b=1, *, c=None): ...

class Thing(B):
    field: int = 0
    left = right = None
    def __init__(self, params):
        self.made, self.pair = 1, 2
        self.annotated: int = 3
    def method(self, one, *, two): ...
    def open(self, **rest): ...
    @staticmethod
    def static(one): ...
    @property
    def shown(self): ...
"""
OTHER = "class Base:\n    def inherited(self): self.deep = 1\n"


@pytest.fixture
def fake() -> Source:
    return Source("1.0", {"area/thing.py": SGLANG, "other/__init__.py": OTHER}.get)


def problems(source: Source, owner: str, *names: str, **more: str) -> list[str]:
    return list(Used(owner, names, **more).problems(source))


def test_what_is_there_is_no_problem(fake: Source) -> None:
    """In the body, set on self, inherited from another module, under a condition, imported."""
    names = ("field", "left", "right", "made", "pair", "annotated", "shown", "inherited", "deep")
    assert problems(fake, "area.thing.Thing", *names) == []
    assert problems(fake, "area.thing", "LIMIT", "Thing", "B", "Strange", "threading") == []
    signatures = (
        *("method(one, *, two)", "method(one, **rest)", "open(*, anything)", "static(one)"),
        *("__init__(params)", "inherited()"),
    )
    assert problems(fake, "area.thing.Thing", *signatures) == []
    assert problems(fake, "area.thing", "plain(a)", "plain(a, b)", "plain(a, *, c)") == []


@pytest.mark.parametrize(
    "owner, entry, text",
    [
        ("area.thing.Thing", "gone", "sglang.srt.area.thing.Thing.gone is missing"),
        ("area.thing.Gone", "field", "sglang.srt.area.thing.Gone is missing"),
        ("area.gone.Thing", "field", "sglang.srt.area.gone.Thing is missing"),
        ("area.thing.Thing", "field()", "field is no function"),
        ("area.thing.Thing", "method(other)", "method takes (one, two), expected method(other)"),
        ("area.thing.Thing", "method(one, *, three)", "expected method(one, *, three)"),
        ("area.thing.Thing", "method(one)", "method asks for two as well, expected method(one)"),
        ("area.thing.Thing", "static()", "static asks for one as well"),
        ("area.thing", "plain(b)", "plain takes (a, b, c), expected plain(b)"),
    ],
)
def test_what_is_not_there_is_one_line(fake: Source, owner: str, entry: str, text: str) -> None:
    [line] = problems(fake, owner, entry)
    assert line.startswith("sglang.srt.") and text in line and "\n" not in line


def test_a_name_beside_a_hook_is_needed_only_with_it(fake: Source) -> None:
    assert problems(fake, "area.thing.Thing", "gone", beside="area.thing.Thing.other") == []
    assert problems(fake, "area.thing.Thing", "gone", beside="area.thing.Thing.method") != []


def test_fields_of_server_args_come_from_their_classes() -> None:
    """SGLang joins them into one class when it is imported."""
    texts = {
        "server_args.py": "from sglang.srt.fields import Memory\nclass ServerArgs: ...\n"
        "_INPUT_NAMESPACES = [Memory]\nServerArgs = joined(ServerArgs)",
        "fields.py": "class Memory:\n    page_size: int = 1",
    }
    source = Source("1.0", texts.get)
    assert problems(source, "server_args.ServerArgs", "page_size") == []
    assert problems(source, "server_args.ServerArgs", "window") != []
