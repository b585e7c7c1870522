"""``python -m kara_sglang.benchmarks.reuse``."""

from kara_sglang.benchmarks.reuse.command import main

if __name__ == "__main__":
    raise SystemExit(main())
