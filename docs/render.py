"""Writes the tables that say what the code has: ``python docs/render.py``.

``make tables`` writes those of committed results, too. A table stands between the lines
``<!-- NAME -->`` and ``<!-- end of NAME -->``.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

from kara_sglang import hooks
from kara_sglang.benchmarks.marked import fill
from kara_sglang.config import KaraConfig
from kara_sglang.launcher import flags, refusals

DOCS = Path(__file__).resolve().parent


def gone_table() -> str:
    """What would make each hook needless, stand-ins for other versions included, in Markdown."""
    targets: dict[str, list[str]] = {}
    for hook in hooks.ALL_HOOKS:
        for one in (hook, *hook.otherwise):
            targets.setdefault(one.gone, []).append(f"`{one.target}`")
    lines = ["| gone when | hooked functions |", "|---|---|"]
    lines += [f"| {gone} | {', '.join(names)} |" for gone, names in targets.items()]
    return "\n".join(lines) + "\n"


def refusal_table() -> str:
    """Flags that do not go with compression, by group, in Markdown."""
    groups = {group: [flag for flag, _ in flags] for group, flags in refusals.FLAGS.items()}
    groups["Environment variables"] = [f"{name}=1" for name in refusals.ENVIRONMENT]
    lines = ["| group | refused |", "|---|---|"]
    for group, names in groups.items():
        shown = (re.sub(r"^(\S+)", r"`\1`", name) for name in names)
        lines.append(f"| {group} | {', '.join(shown)} |")
    return "\n".join(lines) + "\n"


def settings_table(*, experiments: bool) -> str:
    """All that is said of the settings, in Markdown."""
    lines = ["| setting | how to give it | unit | default | meaning |", "|---|---|---|---|---|"]
    for one in dataclasses.fields(KaraConfig):
        about, default = one.metadata, json.dumps(one.default).strip('"')
        if about["experiment"] is experiments:
            given = f"`{about['flag']}`" if about["flag"] else "key"
            meaning = f"{about['text']} {about['more']}".strip()
            cells = (f"`{one.name}`", given, about["unit"], f"`{default}`", meaning)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def flags_table() -> str:
    """The flags, with the first sentence about each."""
    lines = ["| flag | unit | default | meaning |", "|---|---|---|---|"]
    for one in dataclasses.fields(KaraConfig):
        about = one.metadata
        if about["flag"]:
            first = flags.plain(re.split(r"(?<=\.) ", about["text"])[0])
            default = "none" if one.name == "selector" else about["absent"] or one.default
            lines.append(f"| `{about['flag']}` | {about['unit']} | {default} | {first} |")
    lines.append(
        "| `--kv-compress-config` | JSON object or file | | everything else, for example "
        "`'{\"delay\": 32}'` |"
    )
    return "\n".join(lines) + "\n"


TABLES = (
    (DOCS / "configuration.md", "settings", settings_table(experiments=False)),
    (DOCS / "configuration.md", "experiments", settings_table(experiments=True)),
    (DOCS.parent / "README.md", "flags", flags_table()),
    (DOCS / "upgrading-sglang.md", "gone", gone_table()),
    (DOCS / "limits.md", "refusals", refusal_table()),
)


if __name__ == "__main__":
    for path, kind, made in TABLES:
        path.write_text(fill(path.read_text(), kind, lambda _name, made=made: made))
