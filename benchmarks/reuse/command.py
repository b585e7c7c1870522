"""What the reuse of a chain of thought saves: prefill, time to first token, and room for forks.

``python -m kara_sglang.benchmarks.reuse`` compares stock SGLang, which keeps every answer exactly, the
plugin with exact reuse, which keeps prompts only, and the plugin with compressed reuse, in one run:

* **steps**: programs of several steps run side by side; each step sends all tokens so far and some
  more, and generates. Counted per step: prompt tokens that had to be computed; measured: time to
  first token.
  In an ample pool everybody could keep everything; in a scarce one what is kept must be small.
* **forks**: one long chain of thought, then more forks of it than fit. Counted: forks that ran at once.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path

from kara_sglang import cpu_engine
from kara_sglang.benchmarks import command_line
from kara_sglang.benchmarks.machine import heading, origin
from kara_sglang.benchmarks.output import write_json
from kara_sglang.benchmarks.reuse.measure import Sizes, measure
from kara_sglang.benchmarks.reuse.report import draw, markdown
from kara_sglang.benchmarks.serving.rows import STOCK
from kara_sglang.benchmarks.serving.server import end_on_sigterm
from kara_sglang.benchmarks.serving.setup import Setup, resolve_model


def main(argv: list[str] | None = None) -> int:
    parser = command_line.parser(__spec__, __doc__)
    parser.add_argument(
        "--model", type=command_line.model, default="tiny", help="tiny, smollm2, a folder or a hub name"
    )
    parser.add_argument(
        "--dtype", choices=command_line.DTYPES, help="default: float32 for tiny, else bfloat16"
    )
    parser.add_argument("--out", type=Path, help="JSON file; .md and .png are written beside it")
    parser.add_argument("--dir", type=Path, help="for logs and the tiny model; default: a new one")
    for field in dataclasses.fields(Sizes):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=command_line.whole(), help=f"default: {field.default}")
    options = parser.parse_args(argv)
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(Sizes)}
    sizes = Sizes(**{name: value for name, value in given.items() if value is not None})
    folder = options.dir or Path(tempfile.mkdtemp(prefix="kara-reuse-"))
    cpu = cpu_engine.is_installed()
    setup = Setup(
        model=resolve_model(options.model, folder),
        dtype=options.dtype or ("float32" if options.model == "tiny" else "bfloat16"),
        window=sizes.window,
        delay=sizes.delay,
        query_mem_gb=0.25 if cpu else 2.0,
        page_size=sizes.page_size,
    )
    end_on_sigterm()
    found = measure(setup, sizes, folder)
    forks = found["forks"]
    answer = {
        **origin("kara_sglang.benchmarks.reuse", argv or sys.argv[1:]),
        "model": options.model,
        "sizes": dataclasses.asdict(sizes),
        "forks_ratio": forks["compressed"]["peak_running"] / forks[STOCK]["peak_running"],
        **found,
    }
    text = markdown(found, sizes)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, answer, indent=1)
        options.out.with_suffix(".md").write_text(heading(answer) + text)
        draw(found, sizes, options.out.with_suffix(".png"))
    return 0
