"""The package's layout: nothing is shadowed in a checkout, a wheel is complete and drags nothing in."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from places import ROOT

SIBLINGS = ("kernels", "radix_integration", "frontend", "benchmarks")


def python(code: str, cwd: Path, **environment: str) -> str:
    """What ``code`` prints in a fresh interpreter whose first path entry is ``cwd``."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=env | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", SIBLINGS)
def test_no_sibling_is_a_package_at_its_top(name: str) -> None:
    """A regular package in the working directory would shadow others of its name."""
    assert (ROOT / name).is_dir() and not (ROOT / name / "__init__.py").exists()


def test_the_pypi_package_kernels_is_not_shadowed() -> None:
    """SGLang and transformers import it, also for commands run from the repository's root."""
    found = Path(python("import kernels; print(kernels.__file__)", ROOT))
    assert ROOT / "kernels" not in found.parents
    distribution = importlib.metadata.distribution("kernels")
    assert found == Path(str(distribution.locate_file("kernels/__init__.py"))).resolve()
    python("from kernels import get_kernel", ROOT)


def test_pytest_itself_sees_the_pypi_package() -> None:
    """pytest must not put the root in front of site-packages."""
    spec = importlib.util.find_spec("kernels")
    assert spec is not None and spec.origin is not None
    assert ROOT / "kernels" not in Path(spec.origin).parents


@pytest.mark.parametrize("folder", [ROOT, ROOT / "tests", Path("/")], ids=["root", "tests", "/"])
def test_siblings_are_imported_under_our_name(folder: Path) -> None:
    """From a checkout, wherever the command is run."""
    code = (
        "import kara_sglang.kernels.select as a, kara_sglang.radix_integration.exact as b\n"
        "import kara_sglang.kernels.selectors as c\n"
        "print(a.__file__, b.__file__, c.__file__, sep='\\n')"
    )
    files = [Path(line).resolve() for line in python(code, folder).splitlines()]
    assert files == [
        ROOT / "kernels" / "select.py",
        ROOT / "radix_integration" / "exact.py",
        ROOT / "kernels" / "selectors" / "__init__.py",
    ]


def test_arithmetic_runs_without_sglang() -> None:
    """Kernels, policy and settings take tensors and small records: no SGLang import."""
    code = (
        "import sys\n"
        "import kara_sglang.kernels.backend, kara_sglang.kernels.selectors\n"
        "import kara_sglang.config, kara_sglang.options\n"
        "import kara_sglang.scheduler.policy, kara_sglang.scheduler.ring.recorder\n"
        "import kara_sglang.radix_integration.row, kara_sglang.radix_integration.exact\n"
        "import kara_sglang.scheduler.coordinator\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('sglang', 'triton')])"
    )
    loaded = python(code, ROOT)
    assert "sglang" not in loaded, loaded


def test_the_trace_command_needs_neither_torch_nor_sglang() -> None:
    code = (
        "import sys, kara_sglang.trace.__main__\n"
        "print([name for name in ('torch', 'sglang', 'triton') if name in sys.modules])"
    )
    assert python(code, ROOT).strip() == "[]"


# -- the wheel -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with hatchling from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    # Where hatchling is installed no index is needed.
    isolated = importlib.util.find_spec("hatchling") is None
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(folder)]
    command += [] if isolated else ["--no-build-isolation"]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    return Parser().parsestr(about_the_wheel(wheel, "METADATA"))


def about_the_wheel(wheel: Path, file: str) -> str:
    """Of its own ``.dist-info``; the CPU engine's ``site/`` has one of a stand-in."""
    with zipfile.ZipFile(wheel) as archive:
        [path] = [
            name for name in archive.namelist() if re.fullmatch(rf"[^/]+\.dist-info/{file}", name)
        ]
        return archive.read(path).decode()


def test_the_wheel_holds_every_source_file(names: set[str]) -> None:
    """All of the package and of its siblings, under our name, and no cache or test."""
    tracked = subprocess.run(
        ["git", "ls-files", "kara_sglang", *SIBLINGS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    expected = {
        path if path.startswith("kara_sglang/") else f"kara_sglang/{path}"
        for path in tracked
        if (ROOT / path).is_file() and not path.startswith("benchmarks/results/")
    }
    assert {name for name in names if name.startswith("kara_sglang/")} == expected
    assert not [name for name in names if "results/" in name]
    for module in ("kernels/select.py", "kernels/selectors/kara.py", "radix_integration/exact.py"):
        assert f"kara_sglang/{module}" in names
    roots = {name.split("/")[0] for name in names}
    assert roots == {"kara_sglang", next(root for root in roots if root.endswith(".dist-info"))}
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_the_wheels_entry_point(wheel: Path) -> None:
    """The one that SGLang looks for, under the name that SGLANG_PLUGINS is checked against."""
    from kara_sglang.plugin import ENTRY_POINT

    text = about_the_wheel(wheel, "entry_points.txt")
    assert text.split() == ["[sglang.srt.plugins]", ENTRY_POINT, "=", "kara_sglang.plugin:register"]


def test_the_wheel_depends_on_nothing(metadata: Message) -> None:
    """``pip install .`` must not replace a user's torch or bring CUDA packages."""
    needed = [line for line in metadata.get_all("Requires-Dist") or [] if "extra ==" not in line]
    assert needed == []
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"


def test_one_version(metadata: Message) -> None:
    """pyproject.toml and the package say the same."""
    import kara_sglang

    assert metadata["Version"] == kara_sglang.__version__


def test_the_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Installed elsewhere, every module comes from there, and ``kernels`` is still PyPI's."""
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"),
            *("--target", str(tmp_path / "lib"), str(wheel)),
        ],
        check=True,
        capture_output=True,
    )
    code = (
        "import kara_sglang, kara_sglang.launcher.flags, kara_sglang.scheduler.coordinator, kernels\n"
        "import kara_sglang.kernels.select, kara_sglang.kernels.selectors.kara\n"
        "import kara_sglang.radix_integration.exact, kara_sglang.frontend.__main__, sys\n"
        "print(kernels.__file__)\n"
        "for name, module in list(sys.modules.items()):\n"
        "    if name.startswith('kara_sglang'):\n"
        "        print(getattr(module, '__file__', None) or list(module.__path__)[0])\n"
        "print(*kara_sglang.__path__)\n"
    )
    shadowed, *ours = python(code, tmp_path, PYTHONPATH=str(tmp_path / "lib")).splitlines()
    assert not {tmp_path, ROOT / "kernels"} & set(Path(shadowed).parents)
    assert len(ours) > 10
    for path in ours:
        assert (tmp_path / "lib" / "kara_sglang") in [Path(path), *Path(path).parents], path
