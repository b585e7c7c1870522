"""Both tables against a release of SGLang: what it lacks, and which code behind them changed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field

from kara_sglang import hooks
from kara_sglang.compat import surface
from kara_sglang.compat.source import Source, body, parameters
from kara_sglang.compat.versions import is_tested
from kara_sglang.hooks import Hook

SUPPORTED, LIKELY, BROKEN = "supported", "likely", "broken"

_MEANING = {
    SUPPORTED: "the engine tests pass on this version",
    LIKELY: "all that the plugin uses is there; whether it still does the same, the engine tests say",
    BROKEN: "the plugin refuses to start",
}


@dataclass(frozen=True, slots=True)
class Change:
    """A function that the plugin hooks, calls or overrides, and whose code is not the same.

    Attributes
    ----------
    path
        Below ``sglang.srt``.
    lines
        That differ; comments and docstrings are not looked at.
    """

    path: str
    lines: int


@dataclass(frozen=True, slots=True)
class Findings:
    """One of the two tables against a release.

    Attributes
    ----------
    entries
        How many the table has.
    unfit
        One line for each that does not fit and that every server needs.
    changes
        Functions with other code.
    unfit_sharing
        Those that only compressed prefixes need.
    """

    entries: int
    unfit: list[str]
    changes: list[Change]
    unfit_sharing: list[str] = field(default_factory=list)

    @property
    def lacking(self) -> int:
        """How many entries do not fit."""
        return len(self.unfit) + len(self.unfit_sharing)

    @property
    def fit(self) -> str:
        return f"{self.entries - self.lacking} of {self.entries}"

    @property
    def changed(self) -> str:
        lines = sum(change.lines for change in self.changes)
        return f"{len(self.changes)} ({lines} lines)" if self.changes else "0"


@dataclass(frozen=True, slots=True)
class Report:
    """What there is to say of one release.

    Attributes
    ----------
    version, against
        The release, and the one that its code is compared with.
    hooks, uses
        The table of hooks, and that of all else.
    """

    version: str
    against: str
    hooks: Findings
    uses: Findings

    @property
    def exact(self) -> str:
        """The verdict on servers whose prefix cache holds exact KV only."""
        return self._verdict(bool(self.hooks.unfit or self.uses.unfit))

    @property
    def compressed(self) -> str:
        """The verdict on servers that share compressed prefixes."""
        return BROKEN if self.uses.unfit_sharing else self.exact

    @property
    def verdict(self) -> str:
        """The verdict on the plugin, which checks both tables as a whole."""
        return self.compressed

    def _verdict(self, unfit: bool) -> str:
        if unfit:
            return BROKEN
        return SUPPORTED if is_tested(self.version) else LIKELY

    def __str__(self) -> str:
        tables = {"hook": self.hooks, "uses": self.uses}
        unfit = [
            f"{BROKEN:<9}{name:<6}{line}"
            for name, found in tables.items()
            for line in (*found.unfit, *found.unfit_sharing)
        ]
        changed = [
            f"changed  {name:<6}{change.path}: {change.lines} lines"
            for name, found in tables.items()
            for change in found.changes
        ]
        summary = [
            f"hooks: {self.hooks.fit} fit, {self.hooks.changed} with other code than in {self.against}",
            f"attributes, functions, registries: {self.uses.fit} fit, {self.uses.changed} with other "
            "code",
            f"exact prefixes: {self.exact}; compressed prefixes: {self.compressed}",
        ]
        end = f"{self.verdict}: {_MEANING[self.verdict]}"
        return "\n".join([f"SGLang {self.version}", *unfit, *changed, *summary, end])


def compare(source: Source, against: Source) -> Report:
    """Look at ``source``; its code is compared with that of ``against``."""
    hook_paths = [hook.target for hook in _fitting(source, hooks.ALL_HOOKS)]
    function_paths = [
        f"{used.owner}.{surface.bare(entry)}"
        for used in surface.SURFACE
        for entry in used.names
        if "(" in entry
    ]
    return Report(
        version=source.version,
        against=against.version,
        hooks=Findings(
            len(hooks.ALL_HOOKS),
            _unfit(source, hooks.ALL_HOOKS),
            list(_changes(source, against, hook_paths)),
        ),
        uses=Findings(
            sum(len(used.names) for used in surface.SURFACE),
            [line for used in surface.SURFACE if not used.sharing for line in used.problems(source)],
            list(_changes(source, against, function_paths)),
            [line for used in surface.SURFACE if used.sharing for line in used.problems(source)],
        ),
    )


def markdown(reports: list[Report]) -> str:
    """A table with a row for each report."""
    lines = [
        "| SGLang | hooks missing | hooked functions with other code | attributes, functions, "
        "registries missing | used functions with other code | exact prefixes | compressed prefixes |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {made.version} | {made.hooks.lacking} | {made.hooks.changed} | {made.uses.lacking} "
        f"| {made.uses.changed} | {made.exact} | {made.compressed} |"
        for made in reports
    ]
    return "\n".join(lines) + "\n"


def _fitting(source: Source, table: tuple[Hook, ...]) -> tuple[Hook, ...]:
    return hooks.fitting(table, lambda hook: source.find(hook.target) is not None)


def _unfit(source: Source, table: tuple[Hook, ...]) -> list[str]:
    """One line for each hook of ``table`` for which ``source`` has no place."""
    lines = []
    for hook in table:
        misfits = [_misfit(source, one) for one in _fitting(source, (hook,))]
        lines += [line for line in misfits if line is not None][:1]
    return lines


def _misfit(source: Source, hook: Hook) -> str | None:
    found = source.find(hook.target)
    if found is None:
        return f"{hook.path} is missing"
    if found.function is None:
        return f"{hook.path} is no function"
    names = tuple(parameters(found.function))
    if names[: len(hook.parameters)] != hook.parameters:
        return f"{hook.path} takes {names}, expected it to begin with {hook.parameters}"
    return None


def _changes(source: Source, against: Source, paths: list[str]) -> Iterator[Change]:
    """Of ``paths``, those that are functions in both and whose code differs."""
    for path in paths:
        found = [each.find(path) for each in (against, source)]
        functions = [each.function for each in found if each is not None and each.function is not None]
        if len(functions) < 2:
            continue
        old, new = (body(function) for function in functions)
        matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
        lines = sum(
            max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in matcher.get_opcodes() if tag != "equal"
        )
        if lines:
            yield Change(path, lines)
