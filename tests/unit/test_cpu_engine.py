"""The CPU engine: the ``sgl_kernel`` stand-in, torchvision's mend, and their installation."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from cpu_site import load

from kara_sglang.cpu_engine import install

SITE_PACKAGES = sysconfig.get_paths()["purelib"]


def bare_python(code: str, *arguments: str | Path) -> str:
    """Run ``code`` in an interpreter that reads no ``.pth`` file; return what it prints."""
    command = [sys.executable, "-S", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_page_table_rows_receive_their_slots(index_dtype: torch.dtype) -> None:
    assign = load("sgl_kernel").assign_req_to_token_pool_cpu
    table = torch.full((6, 12), -1, dtype=torch.int32)
    rows, starts, ends = [4, 0, 3, 5], [2, 0, 7, 11], [6, 12, 7, 12]  # the third interval is empty
    slots = torch.randperm(500, generator=torch.Generator().manual_seed(0))[:17]
    expected = table.clone()
    expected[4, 2:6], expected[0, :], expected[5, 11] = slots[:4], slots[4:16], slots[16]

    def index(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=index_dtype)

    assign(index(rows), table, index(starts), index(ends), slots, table.shape[1])
    assert torch.equal(table, expected.to(torch.int32))


def test_no_operator_lures_sglang_away_from_the_native_torch_path() -> None:
    load("sgl_kernel")
    assert not hasattr(torch.ops.sgl_kernel, "convert_weight_packed")


def test_torchvision_can_be_imported_with_the_mend() -> None:
    out = bare_python(
        "import sys; sys.path += sys.argv[1:]\n"
        "import kara_cpu_torchvision\n"
        "assert 'torch' not in sys.modules, 'heavy import at interpreter start'\n"
        "import torchvision; print(torchvision.__version__)",
        SITE_PACKAGES,
        install.SOURCE,
    )
    assert out.strip()


def test_operators_that_exist_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    finder = load("kara_cpu_torchvision").DeclareTorchvisionOperators()
    for _ in range(2):  # to define an operator twice would raise
        assert finder.find_spec("torchvision._meta_registrations") is None
    assert hasattr(torch.ops.torchvision, "nms") and hasattr(torch.ops.torchvision, "qnms")


def test_sglang_keeps_k_and_v_in_fp8() -> None:
    """What refuses it is told that this is no CPU, and nobody else is."""
    out = bare_python(
        "import os, sys; sys.path += sys.argv[1:]; os.environ['SGLANG_USE_CPU_ENGINE'] = '1'\n"
        "import kara_cpu_torchvision, kara_cpu_kv_cache\n"
        "assert 'torch' not in sys.modules, 'heavy import at interpreter start'\n"
        "import torch\n"
        "from sglang.srt.platforms import current_platform as platform\n"
        "from sglang.srt.mem_cache import kv_cache_configurator, kv_cache_dtype\n"
        "print(*kv_cache_dtype.configure_kv_cache_dtype(server_args_kv_cache_dtype='fp8_e5m2',\n"
        "    model=None, model_dtype=torch.float32, is_draft_worker=False, is_dflash=False,\n"
        "    speculative_draft_attention_backend=''))\n"
        "told = kv_cache_configurator.current_platform\n"
        "print(platform.is_cpu(), told.is_cpu(), told.device_type == platform.device_type)",
        SITE_PACKAGES,
        install.SOURCE,
    )
    assert out.split() == ["None", "torch.float8_e5m2", "True", "False", "True"]


def test_who_is_told_so_asks_about_fp8_only() -> None:
    """An SGLang whose modules ask for anything else is found here."""
    asked = []
    for module in load("kara_cpu_kv_cache").MODULES:
        lines = Path(importlib.util.find_spec(module).origin).read_text().splitlines()
        asked += [
            " ".join(lines[number - 1 : number + 1])
            for number, line in enumerate(lines)
            if "is_cpu()" in line
        ]
    assert len(asked) == 3 and all("e4m3" in place or "e5m2" in place for place in asked)


def test_installed_helpers_are_found_and_removed_again(tmp_path: Path) -> None:
    find = (
        "import importlib.util, site, sys; site.addsitedir(sys.argv[1])\n"
        "from importlib.metadata import entry_points\n"
        "spec = importlib.util.find_spec('sgl_kernel')\n"
        "plugins = entry_points(group='sglang.srt.plugins').names\n"
        "print(spec and spec.origin, 'kara_cpu_torchvision' in sys.modules, *sorted(plugins))"
    )
    install.install(tmp_path)
    (tmp_path / install.NAME / "left_over.py").touch()
    install.install(tmp_path)
    assert not (tmp_path / install.NAME / "left_over.py").exists()
    origin = tmp_path / install.NAME / "sgl_kernel" / "__init__.py"
    assert bare_python(find, tmp_path).split() == [
        *(str(origin), "True", "kara_cpu_speculation", "kara_cpu_windows")
    ]

    install.remove(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert bare_python(find, tmp_path).split() == ["None", "False"]
    install.remove(tmp_path)


class _Distribution:
    version = "9.9"


def _no_virtual_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)


def _real_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "distribution", lambda name: _Distribution)


def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize(
    ("situation", "reason"),
    [
        (_no_virtual_environment, "not in a virtual environment"),
        (_real_kernels, "sglang-kernel 9.9 is installed"),
        (_gpu, "torch sees a CUDA device"),
    ],
)
def test_refusals(situation, reason, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(sys, "prefix", "/somewhere/a/virtual/environment")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(install, "distribution", _missing)
    assert install.main([]) == 0
    assert install.main(["--remove"]) == 0
    capsys.readouterr()

    situation(monkeypatch)
    assert install.main([]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def _missing(name: str) -> None:
    raise install.PackageNotFoundError(name)
