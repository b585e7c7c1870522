"""Checks an installed wheel: its files, its version, the doctor, and a server that compresses.

``make check-wheel`` runs it with the Python of an environment in which kara-sglang is the wheel's.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from server import Server, free_port, run, wait_until_ready

import kara_sglang
from kara_sglang.embedded_model import embedded_model_path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(kara_sglang.__file__).parent
FOLDERS = ("kara_sglang", "kernels", "radix_integration", "frontend", "benchmarks")


def check_files() -> str:
    """The wheel has what git has of the five folders, but for measured results, and nothing else."""
    listed = subprocess.run(
        ("git", "ls-files", "-z", *FOLDERS), cwd=ROOT, capture_output=True, text=True, check=True
    )
    expected = {}
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_dir() or name.startswith("benchmarks/results/"):  # a link to a sibling
            continue
        inside = name if name.startswith("kara_sglang/") else f"kara_sglang/{name}"
        expected[inside] = (ROOT / name).read_bytes()
    recorded = metadata.files("kara-sglang") or []
    found = {str(file) for file in recorded if file.parts[0] == "kara_sglang" and file.suffix != ".pyc"}
    assert found == set(expected), f"only in one of them: {sorted(found ^ set(expected))}"
    other = [name for name, text in expected.items() if (PACKAGE.parent / name).read_bytes() != text]
    assert not other, f"differ from the checkout: {other}"
    return f"{len(found)} files, as in the checkout"


def check_version() -> str:
    """One version everywhere, the changelog included."""
    version = kara_sglang.__version__
    top = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert top is not None
    assert version == metadata.version("kara-sglang") == top[1]
    return version


def check_doctor() -> str:
    """The environment can serve."""
    model = str(embedded_model_path())
    done = subprocess.run(
        (sys.executable, "-m", "kara_sglang.doctor", "--model-path", model),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def check_server() -> str:
    """A server starts, and compresses what it writes."""
    port = free_port()
    log = Path(tempfile.mkdtemp()) / "server.log"
    with run(("-m", "kara_sglang.serve", "--port", str(port)), log) as process:
        wait_until_ready(process, port, log, timeout=400)
        report = Server(process, port, log).generate([1, 2, 3], tokens=400)["meta_info"]["kv_compress"]
    assert report["windows"] > 0, report
    return str(report)


def main() -> None:
    """All checks, one line each; an assertion ends it."""
    assert ROOT / "kara_sglang" != PACKAGE, "this is the checkout; run make check-wheel"
    for check in (check_files, check_version, check_doctor, check_server):
        print(f"{check.__name__}: {check()}", flush=True)


if __name__ == "__main__":
    main()
