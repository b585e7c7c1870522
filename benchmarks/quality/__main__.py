"""``python -m kara_sglang.benchmarks.quality``."""

import sys

from kara_sglang.benchmarks.quality.command import main
from kara_sglang.benchmarks.serving.server import end_on_sigterm

if __name__ == "__main__":
    end_on_sigterm()
    raise SystemExit(main(sys.argv[1:]))
