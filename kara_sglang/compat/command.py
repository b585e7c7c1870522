"""Says whether the plugin fits a release of SGLang, without installing it.

Run ``python -m kara_sglang.compat WHEEL_OR_VERSION ...``: a file, a version such as 0.5.24, or
``latest``. Versions are fetched from the package index by pip (some 40 MB each). The last line is
``supported``, ``likely`` or ``broken``; the exit code is 1 where a release is broken.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from kara_sglang.compat import report
from kara_sglang.compat.source import Source
from kara_sglang.compat.versions import NEWEST

LATEST = "latest"


def fetch(version: str, folder: Path) -> Path:
    """Download SGLang's wheel of a version, or of the newest one, and nothing else.

    Raises
    ------
    ValueError
        Where pip does not find or get it.
    """
    wanted = "sglang" if version == LATEST else f"sglang=={version}"
    place = Path(tempfile.mkdtemp(dir=folder))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(place), wanted], capture_output=True, text=True)
    wheels = list(place.glob("sglang-*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
        raise ValueError(f"pip cannot fetch {wanted}: {reason}")
    return wheels[0]


def source_of(release: str, folder: Path) -> Source:
    """The source of a wheel or version; of the installed one where that is the version.

    Raises
    ------
    ValueError
        Where there is no such wheel or version.
    """
    if release.endswith(".whl"):
        return Source.wheel(Path(release))
    try:
        installed = Source.installed()
    except ValueError:
        installed = None
    if installed is not None and installed.version == release:
        return installed
    return Source.wheel(fetch(release, folder))


def main(argv: list[str] | None = None) -> int:
    """Print a report for each release; 0, or 1 where one is broken, or 2 where one cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m kara_sglang.compat", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "release", nargs="+", metavar="WHEEL_OR_VERSION", help=f"file, version, or {LATEST}"
    )
    parser.add_argument(
        "--against",
        metavar="WHEEL_OR_VERSION",
        default=NEWEST,
        help="what code is compared with (default: %(default)s, the newest tested version)",
    )
    parser.add_argument("--markdown", action="store_true", help="one table instead of reports")
    options = parser.parse_args(argv)
    reports = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            against = source_of(options.against, Path(folder))
            for release in options.release:
                made = report.compare(source_of(release, Path(folder)), against)
                reports.append(made)
                if not options.markdown:
                    print(f"{made}\n" if len(options.release) > 1 else made, flush=True)
        except ValueError as error:
            print(f"kara_sglang.compat: {error}", file=sys.stderr)
            return 2
    if options.markdown:
        print(report.markdown(reports), end="")
    return int(any(made.compressed == report.BROKEN for made in reports))
