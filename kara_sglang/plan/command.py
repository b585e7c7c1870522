"""Says what a server will hold and gain, before memory is bought or a model is loaded.

``python -m kara_sglang.plan --model FOLDER --gpu-memory 80 --prompt 1000 --answer 8000 --running 128``
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

from kara_sglang import cpu_engine
from kara_sglang.compat.quiet import quiet
from kara_sglang.config import environment_settings
from kara_sglang.plan.launch import read
from kara_sglang.plan.load import Load
from kara_sglang.plan.memory import weight_bytes
from kara_sglang.plan.report import Plan
from kara_sglang.scheduler import graphs


def main(argv: list[str] | None = None) -> int:
    """Print the plan; 2 and one line where there is none."""
    parser = argparse.ArgumentParser(
        prog="python -m kara_sglang.plan",
        description=(__doc__ or "").partition("\n")[0],
        allow_abbrev=False,
        epilog="All other options are those of sglang.launch_server, as the server will get them.",
    )
    parser.add_argument(
        "--model",
        "--model-path",
        required=True,
        metavar="M",
        help="folder, config.json, or hub name",
    )
    parser.add_argument(
        "--gpu-memory",
        type=_number,
        metavar="GIB",
        help="memory of one GPU as nvidia-smi says (an H100: 79.6); default: this machine's GPU",
    )
    parser.add_argument("--tp", type=_whole, default=1, help="GPUs (--tp-size); default: %(default)s")
    parser.add_argument("--prompt", type=_whole, required=True, help="tokens of a prompt")
    parser.add_argument("--answer", type=_whole, required=True, help="tokens of an answer")
    parser.add_argument("--running", type=_whole, required=True, help="requests at once")
    parser.add_argument("--retain", metavar="SHARE", help="as --kv-compress-retain")
    parser.add_argument("--window", metavar="TOKENS", help="as --kv-compress-window")
    parser.add_argument(
        "--weights-gb",
        type=_number,
        metavar="GB",
        help="size of the weights; default: by the model's files, or its config",
    )
    parser.add_argument("--json", action="store_true", help="print all figures as a JSON object")
    arguments = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--"]
    options, extra = parser.parse_known_args(arguments)
    if options.model.endswith("/config.json"):
        options.model = str(Path(options.model).parent)
    load = Load(options.prompt, options.answer, options.running)
    try:
        with cpu_engine.switch_put_back(), quiet():
            plan = _plan(options, extra, load)
    except ValueError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    print(json.dumps(plan.as_json(), indent=2) if options.json else plan.as_text())
    return 0


def _plan(options: argparse.Namespace, extra: list[str], load: Load) -> Plan:
    import torch

    gpu_here = torch.cuda.is_available()
    if not gpu_here:
        os.environ.setdefault(cpu_engine.SWITCH, "1")  # SGLang is imported on a CPU with it only
    on_cpu = _value(extra, "--device") == "cpu"
    memory = None if options.gpu_memory is None else options.gpu_memory * 1024
    if memory is None and not gpu_here and not on_cpu:
        raise ValueError("this machine has no GPU; say --gpu-memory GIB, or --device cpu")
    if memory is not None and on_cpu:
        raise ValueError("--gpu-memory and --device cpu contradict each other; leave out one")
    words = _words(options, extra)
    launch = read(words, memory)
    weights = None
    if not on_cpu:
        counted = options.weights_gb and round(options.weights_gb * 1e9)
        weights = counted or weight_bytes(options.model, launch.model)
    asked = launch.captured
    plan = Plan.of(launch, asked, load, weights)
    chosen = any(word.startswith("--cuda-graph-") for word in extra)
    if asked and not chosen and plan.running[1] > asked:
        # Larger graphs take memory from the pool, so everything is reckoned anew.
        launch = read([*words, graphs.FLAG, str(plan.running[1])], memory)
        plan = Plan.of(launch, asked, load, weights)
    return plan


def _words(options: argparse.Namespace, extra: list[str]) -> list[str]:
    """The server's arguments."""
    words = ["--model-path", options.model]
    if options.tp != 1:
        words += ["--tp-size", str(options.tp)]
    if _value(extra, "--kv-compress") is None and environment_settings() is None:
        words += ["--kv-compress", "kara"]
    for name in ("window", "retain"):
        if (value := getattr(options, name)) is not None:
            words += [f"--kv-compress-{name}", value]
    return words + extra


def _value(words: list[str], flag: str) -> str | None:
    """What ``words`` say of ``flag``."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, dest="value")
    return parser.parse_known_args(words)[0].value


def _whole(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _number(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
