"""``python -m kara_sglang.compat``."""

from kara_sglang.compat.command import main

if __name__ == "__main__":
    raise SystemExit(main())
