"""What a chat and an agent's loop find of their own earlier answers, turn by turn.

``python -m kara_sglang.benchmarks.reuse.chats --out chats.json`` lets a small real model (SmolLM2) hold
three talks at a time over HTTP: with stock SGLang, and with each way of prefix reuse. Before each turn
the client puts the whole talk into the chat template and tokenises it, as the route for chats does.
Counted per turn: prompt tokens that no cache had, and those whose KV came from compressed windows;
measured: time to first token. Talks:

* **kept**: five turns; all that was answered is sent back.
* **removed**: five turns; three quarters of each answer are taken for its reasoning, which the client
  removes before it goes on, as chat templates of reasoning models do.
* **agent**: five steps; each answer is sent back whole, and the result of a tool behind it.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kara_sglang.benchmarks import command_line
from kara_sglang.benchmarks.machine import heading, origin
from kara_sglang.benchmarks.markdown import grid
from kara_sglang.benchmarks.output import write_json
from kara_sglang.benchmarks.quality import texts
from kara_sglang.benchmarks.reuse.measure import REUSE, ROWS, Client, start_row
from kara_sglang.benchmarks.serving.rows import Row
from kara_sglang.benchmarks.serving.server import end_on_sigterm
from kara_sglang.benchmarks.serving.setup import Setup, resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST, POOL = 100, 8192
WINDOW, DELAY, PAGE = 64, 16, 16

STOCK, EXACT, COMPRESSED = ROWS
AUTO = (REUSE, f"auto:{LEAST}")
CHAT_ROWS = (
    STOCK,
    EXACT,
    Row(
        "auto",
        f"answers are reused where they reach {LEAST} tokens farther",
        "sglang",
        "kara",
        flags=AUTO,
    ),
    COMPRESSED,
)
"""Windows are compressed as they fall due, though their pool holds all."""

TURNS = (
    "Write a long essay about the history of {}.",
    "Now tell me how it came to this country, in detail.",
    "How do people in other countries see it? Answer at length.",
    "What would a child want to know about it?",
    "Thank you. Which of all that matters most?",
)
TASK = "Find out what this debugger can do, and write a guide to it. Read its manual in parts."
TOOL_CHARACTERS = 900
"""Of a tool's result: some 200 tokens."""


@dataclass(frozen=True, slots=True)
class Talk:
    """One kind of talk.

    Attributes
    ----------
    name
    asked
        Message before each answer, with its role.
    answers
        Tokens of each answer.
    sent_back
        Share of an answer, from its end on, that the following turns hold.
    """

    name: str
    asked: tuple[tuple[str, str], ...]
    answers: tuple[int, ...]
    sent_back: float = 1.0


def talks() -> list[Talk]:
    """All of them."""
    tea, glass = (tuple(("user", turn.format(about)) for turn in TURNS) for about in ("tea", "glass"))
    manual = next(text.content for text in texts.load("development") if text.name == "doc-pdb")
    parts = [manual[k * TOOL_CHARACTERS :][:TOOL_CHARACTERS] for k in range(4)]
    steps = (("user", TASK), *(("tool", part) for part in parts))
    return [
        Talk("kept", tea, (48, 96, 128, 144, 8)),
        Talk("removed", glass, (96, 96, 96, 96, 8), 0.25),
        Talk("agent", steps, (96, 96, 96, 96, 8)),
    ]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn has found and taken."""

    prompt_tokens: int
    cached_tokens: int
    reused_tokens: int  # of the cached ones, those of compressed windows and behind them
    ttft_ms: float

    @property
    def computed(self) -> int:
        return self.prompt_tokens - self.cached_tokens


def hold(talk: Talk, client: Client, tokenizer: PreTrainedTokenizerBase) -> list[Turn]:
    """The whole talk."""
    messages: list[dict[str, Any]] = []
    turns = []
    for (role, content), tokens in zip(talk.asked, talk.answers, strict=True):
        messages.append({"role": role, "content": content})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        # An answer that ends early would end differently with each row.
        written, meta, first = client.generate(ids, tokens, min_new_tokens=tokens)
        reused = meta.get("kv_compress", {}).get("reused_tokens", 0)
        turns.append(Turn(len(ids), meta["cached_tokens"], reused, 1e3 * first))
        back = written[-round(talk.sent_back * tokens) :]
        messages.append({"role": "assistant", "content": tokenizer.decode(back)})
    return turns


Found = dict[str, dict[str, list[Turn]]]
"""Turns by the talk's name and the row's."""


def measure(setup: Setup, kinds: Sequence[Talk], folder: Path) -> Iterator[Found]:
    """All talks with all rows, one server at a time; what is found so far after each."""
    from transformers import AutoTokenizer

    # Each its own, as threads cannot share one.
    tokenizers = [AutoTokenizer.from_pretrained(setup.model) for _ in kinds]
    found: Found = {talk.name: {} for talk in kinds}
    for row in CHAT_ROWS:
        server = start_row(row, setup, POOL, folder)
        try:
            client = Client(server)
            client.generate([3] * 512, 2)  # what a first request alone would pay for
            with concurrent.futures.ThreadPoolExecutor(len(kinds)) as pool:
                held = pool.map(hold, kinds, [client] * len(kinds), tokenizers)
                for talk, turns in zip(kinds, held, strict=True):
                    found[talk.name][row.name] = turns
        finally:
            server.stop()
        yield found


def markdown(found: Found) -> str:
    """A table per talk: prompt tokens computed, of how many, and time to first token."""
    lines = []
    for name, rows in found.items():
        longest = max(len(turns) for turns in rows.values())
        shown = [
            [str(number + 1), *(_cell(turns[number]) for turns in rows.values())]
            for number in range(longest)
        ]
        columns = (f"{row}: computed, TTFT" for row in rows)
        lines += [f"### {name}", "", grid(["turn", *columns], shown)]
    return "\n".join(lines)


def _cell(turn: Turn) -> str:
    reused = f" ({turn.reused_tokens:,} compressed)" if turn.reused_tokens else ""
    return f"{turn.computed:,} of {turn.prompt_tokens:,}{reused}, {turn.ttft_ms:,.0f} ms"


def _plain(found: Found) -> dict[str, dict[str, list[dict[str, Any]]]]:
    return {
        name: {row: [dataclasses.asdict(turn) for turn in turns] for row, turns in rows.items()}
        for name, rows in found.items()
    }


def of_json(result: dict[str, Any]) -> Found:
    """What ``--out`` has written under ``talks``."""
    return {
        name: {row: [Turn(**turn) for turn in turns] for row, turns in rows.items()}
        for name, rows in result["talks"].items()
    }


def main(argv: list[str] | None = None) -> int:
    parser = command_line.parser(__spec__, __doc__)
    parser.add_argument("--out", type=Path, help="JSON file; .md is written beside it")
    parser.add_argument("--dir", type=Path, help="for logs; default: a new one")
    options = parser.parse_args(argv)
    folder = options.dir or Path(tempfile.mkdtemp(prefix="kara-chats-"))
    model = resolve_model("smollm2", folder)
    setup = Setup(model, "bfloat16", WINDOW, DELAY, query_mem_gb=0.25, page_size=PAGE)
    end_on_sigterm()
    kinds = talks()
    about = {
        **origin("kara_sglang.benchmarks.reuse.chats", sys.argv[1:] if argv is None else argv),
        "window": WINDOW,
        "delay": DELAY,
        "least": LEAST,
        "answers": {talk.name: talk.answers for talk in kinds},
    }
    for found in measure(setup, kinds, folder):
        if options.out:
            write_json(options.out, about | {"talks": _plain(found)}, indent=1)
            options.out.with_suffix(".md").write_text(heading(about) + markdown(found))
    print(markdown(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
