"""How far answers on compressed prefixes are from those on exact ones: same server, same prompts.

``python -m kara_sglang.benchmarks.reuse.modes tea bees`` runs a talk of several turns on each on a
server with ``--kv-compress-prefix-reuse compressed``, then asks each turn's very prompt again with
``{"prefix": "exact"}``. Greedy decoding, so what differs is what the prefix lost.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sglang as sgl

from kara_sglang.benchmarks import command_line
from kara_sglang.benchmarks.machine import origin
from kara_sglang.benchmarks.markdown import grid
from kara_sglang.benchmarks.output import write_json
from kara_sglang.frontend.backend import EndpointError, KaraEndpoint, gen
from kara_sglang.frontend.records import Step

TURNS = (
    "Write a long essay about {}.",
    "Now tell me about the history of it, in detail.",
    "What would a child want to know about it? Answer at length.",
)


@dataclass(frozen=True)
class Difference:
    """One turn in both modes."""

    turn: int
    prompt_tokens: int
    reused_tokens: int  # of the prompt, those whose KV came from compressed blocks
    reused_slots: int  # that held them
    tokens: int  # of the answer on the compressed prefix
    alike: int  # of them, before the first one that the exact prefix would not have given
    equal: int  # of them, those that the other answer has at the same place


@sgl.function
def _both_modes(s: Any, turns: Sequence[str], max_tokens: int) -> None:
    twins = []
    for number, turn in enumerate(turns):
        s += sgl.user(turn)
        s += sgl.assistant_begin()
        twins += s.fork().states
        s += gen(f"{number} compressed", max_tokens)
        s += sgl.assistant_end()
    # Not before: the exact KV of an earlier answer would be there then, and it wins.
    for number, twin in enumerate(twins):
        twin += gen(f"{number} exact", max_tokens, kv_compress={"prefix": "exact"})
        twin.sync()  # one after the other: in a batch, rounding alone may choose other tokens
        if error := twin.error():
            raise error


def compare(endpoint: KaraEndpoint, turns: Sequence[str], max_tokens: int) -> list[Difference]:
    """A talk, one difference per turn; the endpoint's records are cleared."""
    endpoint.ledger.clear()
    _both_modes.run(turns, max_tokens, backend=endpoint, temperature=0, use_thread=False)
    steps = {step.name: step for step in endpoint.ledger.steps}
    return [
        _difference(number, steps[f"{number} compressed"], steps[f"{number} exact"])
        for number in range(len(turns))
    ]


def _difference(turn: int, compressed: Step, exact: Step) -> Difference:
    equal = [a == b for a, b in zip(compressed.output_ids, exact.output_ids, strict=False)]
    return Difference(
        turn=turn + 1,
        prompt_tokens=compressed.prompt_tokens,
        reused_tokens=compressed.reused_tokens,
        reused_slots=compressed.reused_slots,
        tokens=len(compressed.output_ids),
        alike=[*equal, False].index(False),
        equal=sum(equal),
    )


def markdown(found: Sequence[tuple[str, Difference]]) -> str:
    """A row per text and turn."""
    lines = []
    for subject, one in found:
        reused = f"{one.reused_tokens} in {one.reused_slots} slots" if one.reused_tokens else "none"
        share = one.equal / one.tokens if one.tokens else 1.0
        tokens = [str(one.turn), str(one.prompt_tokens), reused, str(one.tokens), str(one.alike)]
        lines.append([subject, *tokens, f"{share:.0%}"])
    columns = ["text", "turn", "prompt", "of it compressed", "answer", "alike until", "equal"]
    return grid(columns, lines).rstrip("\n")


def of_json(turns: Sequence[dict[str, Any]]) -> list[tuple[str, Difference]]:
    """What ``--out`` has written under ``turns``."""
    fields = [field.name for field in dataclasses.fields(Difference)]
    return [(one["text"], Difference(**{name: one[name] for name in fields})) for one in turns]


def main(argv: list[str] | None = None) -> int:
    parser = command_line.parser(__spec__, __doc__)
    parser.add_argument("subjects", nargs="+", metavar="SUBJECT", help="what a talk is about: tea")
    parser.add_argument(
        "--endpoint", default="http://127.0.0.1:30000", metavar="URL", help="default: %(default)s"
    )
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument(
        "--max-tokens", type=command_line.whole(), default=256, metavar="N", help="per answer"
    )
    options = parser.parse_args(argv)
    try:
        endpoint = KaraEndpoint(options.endpoint)
        if (endpoint.settings or {}).get("prefix_reuse") != "compressed":
            raise ValueError(
                f"the server {options.endpoint} does not take every compressed prefix; start it with "
                "--kv-compress-prefix-reuse compressed"
            )
        found = [
            (subject, one)
            for subject in options.subjects
            for one in compare(endpoint, [turn.format(subject) for turn in TURNS], options.max_tokens)
        ]
    except (EndpointError, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(markdown(found))
    if options.out:
        about = origin("kara_sglang.benchmarks.reuse.modes", sys.argv[1:] if argv is None else argv)
        turns = [{"text": subject} | dataclasses.asdict(one) for subject, one in found]
        write_json(options.out, about | {"settings": endpoint.settings, "turns": turns}, indent=1)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
