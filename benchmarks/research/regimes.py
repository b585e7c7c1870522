"""The two regimes by replay: the answers of ``quality.regimes``, without a server.

    python -m kara_sglang.benchmarks.research.regimes --out regimes.json --plot regimes.png

A server on a CPU gives these answers token by token; a replay computes all tokens between two
compressions at once, which is much faster.
"""

from __future__ import annotations

import sys

import torch

from kara_sglang.benchmarks.machine import origin
from kara_sglang.benchmarks.quality import regimes
from kara_sglang.benchmarks.quality.engine import EngineFailed
from kara_sglang.benchmarks.research.replay import Replay
from kara_sglang.benchmarks.research.tables import fill
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
        replay = Replay(run.model, getattr(torch, options.dtype))
        fill(replay, run.rows, run.scripts, run.folder, "regimes")
    except (EmbeddedModelMissing, EngineFailed) as error:
        print(f"regimes: {error}", file=sys.stderr)
        return 1
    run.end(**origin(MODULE, arguments), dtype=options.dtype)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
