"""``python -m kara_sglang.plan``."""

from kara_sglang.plan.command import main

if __name__ == "__main__":
    raise SystemExit(main())
