"""``python -m kara_sglang.frontend``."""

from kara_sglang.frontend.command import main

if __name__ == "__main__":
    raise SystemExit(main())
