"""The two regimes by replay: the answers of ``quality.regimes``, without a server.

    python -m kara_sglang.benchmarks.research.regimes --out regimes.json --plot regimes.png

A server on a CPU gives these answers token by token; a replay computes all tokens between two
compressions at once, which is much faster.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from tqdm import tqdm

from kara_sglang.benchmarks.machine import origin
from kara_sglang.benchmarks.quality import regimes
from kara_sglang.benchmarks.quality.engine import EngineFailed
from kara_sglang.benchmarks.quality.script import cell_path
from kara_sglang.benchmarks.research.replay import Replay
from kara_sglang.benchmarks.research.tables import perform, plan_of
from kara_sglang.embedded_model import EmbeddedModelMissing

MODULE = "kara_sglang.benchmarks.research.regimes"


def main(arguments: list[str]) -> int:
    known = regimes.parser(__spec__, __doc__)
    known.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: %(default)s"
    )
    options = known.parse_args(arguments)
    try:
        run = regimes.Run(options)
        run.begin(dtype=options.dtype, by="replay")
    except (EmbeddedModelMissing, EngineFailed) as error:
        print(f"regimes: {error}", file=sys.stderr)
        return 1
    replay: Any = Replay(run.model, getattr(torch, options.dtype))
    with torch.no_grad():
        for script in tqdm(run.scripts, desc="regimes", unit="answer"):
            for row in run.rows:
                if not cell_path(run.folder, row.key, script.name).is_file():
                    perform(replay, script, plan_of(row)).save(run.folder, row.key, script.name)
            replay.forget()
    run.end(**origin(MODULE, arguments), dtype=options.dtype)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
