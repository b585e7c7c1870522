"""``python -m kara_sglang.trace``."""

from kara_sglang.trace.command import main

if __name__ == "__main__":
    raise SystemExit(main())
