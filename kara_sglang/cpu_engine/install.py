"""Install the CPU engine's helpers into the current virtual environment, or remove them.

Run ``python -m kara_sglang.cpu_engine.install [--remove]``, or this file by its path.

The folder ``site/`` is **copied** into site-packages and a ``.pth`` file beside it names the copy.
Referring to the original would be shorter, but an environment made from an editable checkout would
break when the checkout moves or changes its branch. The price: after an edit of ``site/`` install
again (``make`` does so by itself).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

NAME = "kara_cpu_engine"
SOURCE = Path(__file__).resolve().parent / "site"
# The path is relative to site-packages; `site` executes lines that begin with "import".
PTH = f"{NAME}\nimport kara_cpu_torchvision, kara_cpu_kv_cache\n"


class Refusal(Exception):
    """Why the helpers must not be installed here, in one line."""


def check_environment() -> None:
    """Raise :class:`Refusal` in a system Python and where a stand-in would hide the real thing."""
    if sys.prefix == sys.base_prefix:
        raise Refusal(
            "not in a virtual environment; make one (python3 -m venv .venv) and use its python"
        )
    for name in ("sglang-kernel", "sgl-kernel"):
        try:
            version = distribution(name).version
        except PackageNotFoundError:
            continue
        raise Refusal(f"{name} {version} is installed and needs no stand-in; leave everything as it is")
    try:
        import torch
    except ModuleNotFoundError:
        return  # The order of installation does not matter.
    if torch.cuda.is_available():
        raise Refusal("torch sees a CUDA device; use SGLang's own packages: pip install sglang==0.5.23")


def remove(site_packages: Path) -> None:
    """Delete the ``.pth`` file and the copy, if they are there."""
    (site_packages / f"{NAME}.pth").unlink(missing_ok=True)
    shutil.rmtree(site_packages / NAME, ignore_errors=True)


def install(site_packages: Path) -> None:
    """Put a fresh copy of ``site/`` and its ``.pth`` file into ``site_packages``."""
    remove(site_packages)
    shutil.copytree(SOURCE, site_packages / NAME, ignore=shutil.ignore_patterns("__pycache__"))
    (site_packages / f"{NAME}.pth").write_text(PTH)


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 when done, 2 when refused."""
    parser = argparse.ArgumentParser(
        prog="python -m kara_sglang.cpu_engine.install",
        description="CPU stand-ins for SGLang in this environment.",
    )
    parser.add_argument("--remove", action="store_true", help="undo the installation")
    arguments = parser.parse_args(argv)
    site_packages = Path(sysconfig.get_paths()["purelib"])
    if arguments.remove:
        remove(site_packages)
        print(f"CPU engine helpers removed from {site_packages}")
        return 0
    try:
        check_environment()
    except Refusal as refusal:
        print(f"CPU engine helpers not installed: {refusal}", file=sys.stderr)
        return 2
    install(site_packages)
    print(f"CPU engine helpers installed in {site_packages / NAME}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
