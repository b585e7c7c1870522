"""``python -m kara_sglang.benchmarks.serving``."""

from kara_sglang.benchmarks.serving.command import main

if __name__ == "__main__":
    raise SystemExit(main())
