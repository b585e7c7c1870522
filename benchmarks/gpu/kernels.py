"""Times every kernel on a GPU against its floor, after checking what it computes.

Needs torch, triton and this package, no SGLang::

    python -m kara_sglang.benchmarks.gpu.kernels --output kernels.json

Data are random and new in every run. Each kernel is compared with the torch reference on the GPU
first, then timed by CUDA events around replays of a CUDA graph. The floor is the kernel's work
(``arithmetic.py``) at the bandwidth and matrix rate that are measured here first.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import torch

from kara_sglang.benchmarks import arithmetic, command_line
from kara_sglang.benchmarks.arithmetic import DATASHEET, Gpu, Settings, Work
from kara_sglang.benchmarks.gpu.case import KARA, KEYS, RING_DTYPES, Case
from kara_sglang.benchmarks.gpu.checks import check, stress_compact
from kara_sglang.benchmarks.gpu.timing import launch_times, measured_ceilings, seconds, timed, versions
from kara_sglang.benchmarks.models import MODELS, Model
from kara_sglang.benchmarks.output import write_json
from kara_sglang.kernels.record import FP8

OTHER_CASES = (
    (Model("head_dim 64", 1, 12, 4, 64, 0), torch.float16, 8),
    (Model("head_dim 64", 1, 12, 4, 64, 0), torch.bfloat16, 4),
    (Model("head_dim 80", 1, 4, 4, 80, 0), torch.bfloat16, 8),
    (Model("head_dim 80", 1, 4, 4, 80, 0), torch.float16, 4),
    (Model("head_dim 96", 1, 14, 2, 96, 0), torch.bfloat16, 16),
    (Model("head_dim 128", 1, 32, 2, 128, 0), FP8, 8),
    (Model("head_dim 128", 1, 32, 2, 128, 0), FP8, 4),
    (Model("head_dim 128", 1, 8, 2, 128, 0), torch.float16, 16),
    (Model("head_dim 192", 1, 6, 2, 192, 0), torch.bfloat16, 8),
    (Model("head_dim 192", 1, 6, 2, 192, 0), torch.bfloat16, 4),
    (Model("head_dim 256", 1, 16, 8, 256, 0), FP8, 16),
    (Model("head_dim 256", 1, 16, 8, 256, 0), torch.bfloat16, 4),
)
"""Model shapes, dtype of K and V, bits of a recorded number: checked, not timed."""


def goals(gpu: Gpu, results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was aimed at beside what was measured by :func:`measure`."""
    found = {
        "compact, share of the measured copy bandwidth": (
            0.8,
            results["compact"]["bytes_per_s"] / gpu.bandwidth,
        ),
        "score, share of its floor": (0.5, results["score"]["of_floor"]),
        "pass, share of decode at batch 64, at most": (0.01, results["pass"]["share_of_decode_floor"]),
    }
    return {
        name: {"goal": goal, "got": got, "met": got <= goal if "at most" in name else got >= goal}
        for name, (goal, got) in found.items()
    }


def measure(case: Case, gpu: Gpu) -> dict[str, Any]:
    """Time of each kernel over all layers and windows, beside its floor."""
    results: dict[str, Any] = {}
    moving = (
        (case.kept != torch.arange(case.settings.kept, device=case.slots.device)).float().mean().item()
    )
    for name in ("record", "weights", "score", "select", "compact"):
        work: Work = getattr(arithmetic, name)(case.model, case.settings) * case.num_jobs
        before = Work()
        if name == "score":
            before = arithmetic.prepare(case.model, case.settings) * case.num_jobs
        if name == "compact":  # rows that stay are not touched
            case.score()  # the replays of select have blended its scores again and again
            case.select()
            work = dataclasses.replace(work, bytes=round(work.bytes * moving))
        took = seconds(getattr(case, name))
        floor = gpu.floor(before) + gpu.floor(work)
        results[name] = {
            "us": took * 1e6,
            "floor_us": floor * 1e6,
            "of_floor": floor / took,
            "bytes_per_s": work.bytes / took,
            "flop_per_s": work.flops / took,
        }
        print(f"  {name:8} {took * 1e6:9.1f} us, floor {floor * 1e6:9.1f} us, {floor / took:6.1%}")
    kernels = case.kernels()
    step = gpu.floor(arithmetic.decode_step(case.model, 64, 4096))
    steps = case.settings.window - case.settings.kept
    for name, selector in (("pass", KARA), ("pass without queries", KEYS)):
        jobs = case.jobs(selector)
        found: dict[str, Any] = {}
        for prefix, some in (("one_window_", jobs[:1]), ("", jobs)):
            call = functools.partial(kernels.compress, case.pool, some)
            found[f"{prefix}us"] = timed(call, before=case.mix) * 1e6
            case.mix()
            found[f"{prefix}launches_us"] = launch_times(call, repeats=1)
            for kernel, took_us in list(found[f"{prefix}launches_us"].items())[:8]:
                print(f"    {kernel[:40]:40} {took_us:9.1f} us of a {name} over {len(some)}")
        share = found["us"] / 1e6 / case.num_jobs * 64 / (steps * step)
        results[name] = {**found, "share_of_decode_floor": share}
        print(
            f"  {name}, launched from the host: {found['us']:.1f} us, {share:.2%} of decode's floor; "
            f"over one window {found['one_window_us']:.1f} us"
        )
    return results


def main() -> None:
    parser = command_line.parser(__spec__, __doc__)
    parser.add_argument(
        "--models",
        nargs="+",
        choices=[model.name for model in MODELS],
        default=[model.name for model in MODELS],
        help="default: all",
    )
    parser.add_argument(
        "--windows",
        type=command_line.whole(),
        nargs="+",
        default=[512, 1024],
        help="sizes in tokens; default: 512 1024",
    )
    parser.add_argument(
        "--bits", type=int, nargs="+", choices=RING_DTYPES, default=[8, 4], help="of recorded numbers"
    )
    parser.add_argument("--jobs", type=int, default=8, help="windows in one pass")
    parser.add_argument("--moves", type=int, default=2000, help="of the stress test of compact")
    parser.add_argument("--output", type=Path, help="write the results there as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("kernels.py: no CUDA GPU here, nothing was measured")

    torch.seed()  # fresh data in every run
    gpu = measured_ceilings()
    print(
        f"{gpu.name}: copies {gpu.bandwidth / 1e12:.2f} TB/s, bf16 {gpu.flop_rate / 1e12:.0f} TFLOP/s"
    )
    report: dict[str, Any] = {
        "gpu": dataclasses.asdict(gpu),
        "datasheet": [dataclasses.asdict(known) for known in DATASHEET],
        "versions": versions(),
        "seed": torch.initial_seed(),
        "checks": [],
        "runs": [],
    }
    stress_compact(Case(MODELS[0], Settings(), 8, layers=2), arguments.moves)
    print(f"compact: {arguments.moves} moves by one row, none wrong")
    report["checks"].append({"case": "compact", "moves": arguments.moves})
    write_json(arguments.output, report, indent=2)
    for model, key_dtype, query_bits in OTHER_CASES:
        settings = Settings(window=176, kept=80, delay=29, query_bits=query_bits)
        checks = check(Case(model, settings, 3, layers=2, key_dtype=key_dtype))
        name = f"{model.name}, {key_dtype}, queries of {query_bits} bits"
        print(f"{name}: correct: {checks}")
        report["checks"].append({"case": name, **checks})
        write_json(arguments.output, report, indent=2)
    for model in (model for model in MODELS if model.name in arguments.models):
        for window, bits, mean in itertools.product(arguments.windows, arguments.bits, (False, True)):
            settings = Settings(window=window, kept=window // 2, mean=mean, query_bits=bits)
            print(f"{model.name}, W {window}, {'mean' if mean else 'all'} heads, {bits} bits")
            # As many layers as make a whole launch that records, and one of another size.
            checks = check(Case(model, settings, min(arguments.jobs, 2), layers=10))
            print(f"  correct: {checks}")
            case = Case(model, settings, arguments.jobs, layers=model.layers)
            case.score()
            case.select()
            measured = measure(case, gpu)
            report["runs"].append(
                {
                    "model": model.name,
                    "settings": dataclasses.asdict(settings),
                    "jobs": arguments.jobs,
                    "checks": checks,
                    "kernels": measured,
                    "goals": goals(gpu, measured),
                }
            )
            write_json(
                arguments.output, report, indent=2
            )  # what is done stays, should the next case crash
            del case
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
