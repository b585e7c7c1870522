"""Runs scripts through ``sglang.Engine`` with the plugin, in a process of its own.

The parent writes an :class:`Order` and starts ``python -m kara_sglang.benchmarks.quality.engine FILE``;
one process is one server configuration, and all rows that differ only in a request's own options share
it. What is measured lands in the run folder, cell by cell, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kara_sglang import cpu_engine
from kara_sglang.benchmarks.output import write_json
from kara_sglang.benchmarks.processes import end_group
from kara_sglang.benchmarks.quality import instrument, variants
from kara_sglang.benchmarks.quality.script import (
    FOLDER_ENV,
    ROW_KEY,
    SCRIPT_KEY,
    VARIANTS_ENV,
    Script,
    cell_path,
)

PAGE_SIZE = 16
# What SGLang 0.5.23 can run without a GPU.
CPU_ARGUMENTS: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "sleep_on_idle": True,
    # The pool's size is given; this is of what others leave free, and a model must fit beside them.
    "mem_fraction_static": 0.95,
}


def engine_arguments() -> dict[str, Any]:
    """Arguments of ``sglang.Engine`` that this machine calls for.

    On a CPU distributions are float32; a GPU's attention takes the model's own dtype only, and the row
    ``identity`` shows what its rounding does.
    """
    base: dict[str, Any] = {"page_size": PAGE_SIZE}
    return base | CPU_ARGUMENTS | {"dtype": "float32"} if cpu_engine.is_installed() else base


@dataclass(frozen=True, slots=True)
class Order:
    """One server configuration and the cells that it is to fill.

    Attributes
    ----------
    model
        Folder or hub name.
    settings
        For :func:`kara_sglang.configure`, with ``selector``.
    engine
        Arguments of ``sglang.Engine`` on top of ours.
    requests
        ``(row, script, options, windows)`` in the order in which they are served: options is the
        request's ``kv_compress``, windows how many it must have compressed at its end.
    """

    model: str
    settings: dict[str, Any]
    engine: dict[str, Any]
    requests: list[tuple[str, str, Any, int]]

    def variants(self) -> list[str]:
        """Selectors of ``variants.py`` that the requests name."""
        options = (o for _, _, o, _ in self.requests if isinstance(o, dict))
        return sorted({o["selector"] for o in options if variants.PREFIX in o.get("selector", "")})


class EngineFailed(RuntimeError):
    """An engine did not start, ended early, or did not do what was asked; the message says which."""


def environment(folder: Path, order: Order, threads: int) -> dict[str, str]:
    """The environment of an instrumented process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_")}
    path = [str(instrument.install(folder)), os.environ.get("PYTHONPATH", "")]
    extra = {
        FOLDER_ENV: str(folder),
        VARIANTS_ENV: " ".join(order.variants()),
        "PYTHONPATH": os.pathsep.join(part for part in path if part),
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if cpu_engine.is_installed():
        extra[cpu_engine.SWITCH] = "1"
    return kept | extra


@contextlib.contextmanager
def start(order: Order, folder: Path, name: str, threads: int) -> Iterator[subprocess.Popen[Any]]:
    """Start the process that carries ``order`` out; it is ended with this context.

    ``folder/logs/<name>.log`` is its output.
    """
    write_json(folder / "orders" / f"{name}.json", dataclasses.asdict(order))
    log = folder / "logs" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(folder), name],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(folder, order, threads),
            start_new_session=True,
        )
    try:
        yield process
    finally:
        end_group(process)


def carry_out(folder: Path, name: str) -> None:
    """The child's side: build the engine and serve the order's requests."""
    import sglang

    import kara_sglang

    data = json.loads((folder / "orders" / f"{name}.json").read_text())
    order = Order(**data)
    variants.register(order.variants())  # requests are checked here, in the parent
    settings = dict(order.settings)
    kara_sglang.configure(settings.pop("selector"), **settings)
    started = time.monotonic()
    engine = sglang.Engine(
        model_path=order.model,
        # A prompt that is found in the prefix cache is computed in another batch shape: other bits.
        disable_radix_cache=True,
        skip_tokenizer_init=True,
        **(engine_arguments() | order.engine),
    )
    print(f"engine ready after {time.monotonic() - started:.0f} s", flush=True)
    try:
        # The reference first: the other rows compare with it while they run.
        for reference in (True, False):
            batch = [r for r in order.requests if (r[0] == instrument.REFERENCE_ROW) is reference]
            if batch:
                _serve(engine, folder, batch)
    finally:
        engine.shutdown()


def _serve(engine: Any, folder: Path, requests: list[tuple[str, str, Any, int]]) -> None:
    scripts = {name: Script.load(folder, name) for name in {name for _, name, _, _ in requests}}
    answers = engine.generate(
        input_ids=[scripts[name].prompt for _, name, _, _ in requests],
        sampling_params=[
            {
                "max_new_tokens": len(scripts[name].forced),
                "temperature": 0,
                "ignore_eos": True,
                "custom_params": {"kv_compress": options, SCRIPT_KEY: name, ROW_KEY: row},
            }
            for row, name, options, _ in requests
        ],
    )
    for (row, name, _, windows), answer in zip(requests, answers, strict=True):
        if answer["output_ids"] != scripts[name].forced:
            raise EngineFailed(f"{name} in {row}: the answer is not the forced one")
        path = cell_path(folder, row, name)
        report = answer["meta_info"].get("kv_compress") or {"windows": 0, "without_queries": 0}
        if report["windows"] != windows or report["without_queries"]:
            path.unlink()
            raise EngineFailed(
                f"{name} in {row}: {report['windows']} windows were compressed, "
                f"{report['without_queries']} of them for want of queries without, not {windows}"
            )


if __name__ == "__main__":
    carry_out(Path(sys.argv[1]), sys.argv[2])
