"""Says in plain words whether this environment can serve with compression.

Run ``python -m kara_sglang.doctor [--model-path M]``; the exit code is 0 when it can and 1 when it
cannot, and the last line says what to do. Nothing is installed, changed or loaded onto a device.
The settings looked at are those of the environment variable ``SGLANG_KV_COMPRESS``, else the
defaults.
"""

from __future__ import annotations

import argparse
import os
import pkgutil
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata, util
from types import SimpleNamespace
from typing import Any

from kara_sglang import __version__, cpu_engine, hooks, plugin, prefix_reuse, serve
from kara_sglang.compat import kv_cache, sliding_window, surface, versions
from kara_sglang.compat.quiet import quiet
from kara_sglang.compat.source import Source
from kara_sglang.config import KaraConfig
from kara_sglang.launcher import refusals
from kara_sglang.radix_integration.row import Geometry
from kara_sglang.scheduler import graphs, policy, window_pool
from kara_sglang.scheduler.ring.recorder import cheapest
from kara_sglang.scheduler.ring.served import Served

OK, NOTE, BAD = "ok", "note", "BAD"
_LONG = 4096  # tokens of an answer that is taken as an example


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes
    ----------
    level
        ``ok``, ``note`` (works, but worth knowing) or ``BAD`` (cannot serve).
    topic, text
        What was looked at and what was seen.
    way_out
        What to do about a ``BAD`` one.
    """

    level: str
    topic: str
    text: str
    way_out: str = ""

    def __str__(self) -> str:
        end = f"; {self.way_out}" if self.way_out else ""
        return f"{self.level:<5}{self.topic:<12}{self.text}{end}"


@dataclass(slots=True)
class Plan:
    """What the checks learn, for each other and for the command that the verdict proposes."""

    model_path: str | None = None
    config: KaraConfig = field(default_factory=KaraConfig)
    cpu: bool = False
    gpu_memory: float | None = None  # MiB; None on a CPU
    options: list[str] = field(default_factory=list)

    def command(self) -> str:
        if self.cpu and cpu_engine.is_installed():
            # Adds what SGLang wants on a CPU, the environment variable included.
            words = ["python", "-m", "kara_sglang.serve"]
            return shlex.join([*words, "--model", self.model_path] if self.model_path else words)
        words = ["python", "-m", "sglang.launch_server", "--model-path", self.model_path or "MODEL"]
        command = shlex.join([*words, "--kv-compress", self.config.selector, *self.options])
        return f"{cpu_engine.SWITCH}=1 {command}" if self.cpu else command


Check = Callable[[Plan], Iterable[Finding]]


def installed(distribution: str) -> str | None:
    """The installed version of ``distribution``, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def one_line(error: BaseException) -> str:
    """An exception as ``Type: first line of its message``."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# -- the checks, in the order of the report --------------------------------------------------------


def check_packages(_plan: Plan) -> Iterator[Finding]:
    """SGLang in one of the versions that the plugin was tested with, and torch."""
    torch, sglang = installed("torch"), installed("sglang")
    tested = " and ".join(versions.TESTED)
    if sglang is None:
        way_out = f"pip install sglang=={versions.NEWEST} (without a GPU: make venv)"
        yield Finding(BAD, "SGLang", "is not installed", way_out)
    elif lines := versions.of_version(_settings_or_default()):
        yield from (Finding(BAD, "SGLang", line) for line in lines)
    elif versions.is_tested(sglang):
        yield Finding(OK, "SGLang", f"{sglang} (tested: {tested})")
    else:
        yield Finding(NOTE, "SGLang", f"{sglang} was not tested with this plugin ({tested} were)")
    if torch is None:
        yield Finding(BAD, "torch", "is not installed", "install SGLang, which brings it")
    else:
        yield Finding(OK, "torch", torch)


def _settings_or_default() -> KaraConfig:
    try:
        return plugin.active() or KaraConfig()
    except ValueError:
        return KaraConfig()  # check_settings says what is wrong


def check_plugin(_plan: Plan) -> Iterator[Finding]:
    """SGLang must find the entry point and be allowed to load it."""
    lines = plugin.invisible()
    yield from (Finding(BAD, "plugin", line) for line in lines)
    if not lines:
        yield Finding(OK, "plugin", f"entry point {plugin.ENTRY_POINT} of SGLang's plugins is there")


def check_settings(plan: Plan) -> Iterator[Finding]:
    """The settings that a server without flags would use."""
    try:
        config = plugin.active()
    except ValueError as error:
        yield Finding(BAD, "settings", str(error), "mend or unset SGLANG_KV_COMPRESS")
        return
    source = "of SGLANG_KV_COMPRESS" if config else "by default"
    plan.config = config = config or plan.config
    yield Finding(
        OK,
        "settings",
        f"{source}: {config.selector}, window {config.window}, retain {config.retain:g}, "
        f"delay {config.delay}, query memory {_query_memory(config)}",
    )
    yield Finding(OK, "policy", f"{config.policy}: {policy.begins(config)}")
    if config.selector != "identity" and config.retain < 1:
        text = f"one at a time may outgrow the KV pool, up to about {1 / config.retain:.2g} times"
        yield Finding(OK, "answers", f"{text}; /server_info says how long (longest_answer)")


def _query_memory(config: KaraConfig) -> str:
    if config.query_mem_gb is not None:
        return f"{config.query_mem_gb:g} GiB"
    return "as needed" if config.keeps_queries else "0 GiB"


def check_device(plan: Plan) -> Iterator[Finding]:
    """The GPU or the CPU engine, ``sgl_kernel``, and our kernels."""
    import torch

    plan.cpu = not torch.cuda.is_available()
    if plan.cpu:
        yield Finding(OK, "device", "CPU (torch sees no GPU)")
        if not os.environ.get(cpu_engine.SWITCH):
            text = f"SGLang runs on a CPU with {cpu_engine.SWITCH}=1 only; kara_sglang.serve sets it"
            yield Finding(NOTE, "device", text)
            os.environ[cpu_engine.SWITCH] = "1"  # main() puts it back
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", torch.cuda.current_device())
        plan.gpu_memory = torch.cuda.mem_get_info(device)[1] / 2**20
        yield Finding(OK, "device", torch.cuda.get_device_name(device))
    yield _sgl_kernel(plan.cpu)
    from kara_sglang.kernels.dispatch import pick

    kernels, why = pick(device)
    yield Finding(OK, "kernels", f"{kernels.name}: {why}")


def _sgl_kernel(cpu: bool) -> Finding:
    spec = util.find_spec("sgl_kernel")
    if spec is None and cpu:
        way_out = "python -m kara_sglang.cpu_engine.install (make venv does it)"
        return Finding(BAD, "sgl_kernel", "is not installed and has no stand-in", way_out)
    if spec is None:
        way_out = f"pip install sglang=={versions.NEWEST}"
        return Finding(BAD, "sgl_kernel", "is not installed", way_out)
    stand_in = cpu_engine.is_installed() and "kara_cpu_engine" in (spec.origin or "")
    if stand_in and not cpu:
        way_out = "python -m kara_sglang.cpu_engine.install --remove"
        return Finding(BAD, "sgl_kernel", "is the CPU engine's stand-in", way_out)
    return Finding(OK, "sgl_kernel", "the CPU engine's stand-in" if stand_in else "present")


def check_hooks(_plan: Plan) -> Iterator[Finding]:
    """Every place where the plugin touches SGLang, one line each."""
    way_out = f"pip install sglang=={versions.NEWEST}"
    for listed in hooks.ALL_HOOKS:
        try:
            looked_at = [(hook, hook.problem()) for hook in hooks.fitting((listed,))]
        except Exception as error:  # whatever SGLang's modules raise when they are imported
            looked_at = [(listed, f"{listed.path} cannot be imported ({one_line(error)})")]
        for hook, problem in looked_at:
            if problem is not None:
                yield Finding(BAD, "hook", problem, way_out)
                continue
            yield Finding(OK, "hook", f"{hook.target}: {hook.why}")
            module, function = hook.handler.split(":")
            try:
                pkgutil.resolve_name(f"kara_sglang.{module}:{function}")
            except Exception as error:
                text = f"kara_sglang.{hook.handler} cannot be imported ({one_line(error)})"
                yield Finding(BAD, "hook", text, "install kara-sglang again")


def check_surface(_plan: Plan) -> Iterator[Finding]:
    """What else the plugin uses of SGLang, one line for each class or module."""
    way_out = f"pip install sglang=={versions.NEWEST}"
    source = Source.installed()
    for used in surface.SURFACE:
        lacking = list(used.problems(source))
        yield from (Finding(BAD, "uses", line, way_out) for line in lacking)
        if not lacking:
            yield Finding(OK, "uses", f"{used.owner}: {', '.join(used.names)}")


def check_backend(plan: Plan) -> Iterator[Finding]:
    """Flags and variables that are on without anyone asking, and the attention backend."""
    from sglang.srt.arg_groups.model_override_base import get_default_attn_backend
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.server_args import ServerArgs

    if plan.model_path is not None:
        return  # check_model asks SGLang about this very model
    record = ServerArgs(model_path="dummy")
    yield from (Finding(BAD, "flags", line) for line in refusals.of_flags(resolving_view(record)))
    if plan.cpu:
        yield Finding(OK, "attention", "torch_native or intel_amx on a CPU")
        return
    plain = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=[]),
        has_attention_sinks=False,
        has_asymmetric_kv=False,
    )
    yield _attention(plan, get_default_attn_backend(record, False, plain))


def _attention(plan: Plan, backend: str | None) -> Finding:
    if backend in refusals.ATTENTION_BACKENDS:
        return Finding(OK, "attention", f"SGLang chooses {backend} here")
    plan.options += ["--attention-backend", "triton"]
    text = f"SGLang chooses {backend} here, which --kv-compress does not support; pass one of "
    return Finding(NOTE, "attention", text + ", ".join(refusals.ATTENTION_BACKENDS))


def check_model(plan: Plan) -> Iterator[Finding]:
    """Whether the model is one of those that are supported, and what its queries cost."""
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.server_args import ServerArgs

    if plan.model_path is None:
        yield Finding(NOTE, "model", "not checked; add --model-path")
        return
    # The verdict proposes kara_sglang.serve on a CPU, so look at the page size that it passes.
    served = plan.cpu and cpu_engine.is_installed()
    page_size = {"page_size": int(serve.CPU_OPTIONS["--page-size"])} if served else {}
    record = ServerArgs(model_path=plan.model_path, **page_size)
    try:
        model = model_config_of(record)
    except Exception as error:
        text = f"SGLang cannot read the config of {plan.model_path} ({one_line(error)})"
        yield Finding(BAD, "model", text, "give a model folder or a name that the hub knows")
        return
    refused = refusals.of_model_config(model) or refusals.of_rotary(model, plan.config)
    yield from (Finding(BAD, "model", line) for line in refused)
    if refused:
        return
    yield Finding(
        OK,
        "model",
        f"{', '.join(model.hf_config.architectures)}: {model.num_hidden_layers} layers, "
        f"{model.num_attention_heads} query and {model.get_total_num_kv_heads()} KV heads of "
        f"{model.head_dim}",
    )
    if window := sliding_window.longest(model):
        plan.config = plan.config.reaching(window)
        yield Finding(
            OK,
            "window",
            f"a pass works over the {sliding_window.full_layers(model)} layers with full attention"
            + ("; " if model.is_hybrid_swa else " and frees the same slots in all; ")
            + f"the delay is {plan.config.delay} tokens, because the others have a sliding window of "
            f"{window}" + (" and a KV pool of their own" if model.is_hybrid_swa else ""),
        )
    try:
        record.resolve_once()
    except Exception as error:
        yield Finding(BAD, "flags", f"SGLang refuses this model here ({one_line(error)})")
        return
    resolved = resolving_view(record)
    backend = resolved.decode_attention_backend or resolved.attention_backend
    yield _attention(plan, backend)
    yield _graphs(model, plan.config, resolved)
    if plan.config.keeps_queries:
        yield _query_ring(plan, model, resolved)
    lines = refusals.of_flags(resolved) + refusals.of_sharing(resolved, plan.config)
    for line in lines + refusals.of_window_pool(resolved, model, plan.config):
        if "attention-backend" not in line:  # said above, with what to pass instead
            yield Finding(BAD, "flags", line)
    settled = prefix_reuse.settled(plan.config, resolved, model)
    yield Finding(OK, "reuse", prefix_reuse.in_words(settled, resolved, model))
    try:
        plan.config.check_page_size(resolved.page_size)
        plan.config.check_context(model.context_len, resolved.page_size)
    except ValueError as error:
        yield Finding(BAD, "window", str(error))


def _graphs(model: Any, config: KaraConfig, resolved: Any) -> Finding:
    """The largest decode graph, and the KV memory that lets more requests run than it is for."""
    largest = graphs.captured(resolved)
    if not largest:
        return Finding(OK, "graphs", "SGLang decodes without graphs here")
    page = resolved.page_size
    geometry = Geometry(page, config.window, config.delay)
    slots = graphs.slots_of(geometry, config.kept(page), _LONG)
    slot = 2 * window_pool.layers_per_slot(resolved, model)
    slot *= model.get_total_num_kv_heads() * model.head_dim
    stored = kv_cache.planned_dtype(resolved.kv_cache_dtype, model)
    slot *= stored.itemsize / 2**30 * largest
    return Finding(
        OK,
        "graphs",
        f"SGLang captures decode graphs for up to {largest} requests and decodes more without "
        f"one. So many answers of {_LONG:,} tokens take {slots * slot:.1f} GiB of KV, "
        f"{_LONG * slot:.1f} uncompressed; where the pool is larger, {graphs.FLAG} captures more",
    )


def _query_ring(plan: Plan, model: Any, resolved: Any) -> Finding:
    """The ring of a server without tensor parallelism, as the plan reckons it."""
    from kara_sglang.plan import memory
    from kara_sglang.plan.launch import Launch

    config = plan.config
    launch = Launch([], resolved, model, config, plan.gpu_memory)
    weights = None
    if plan.gpu_memory is not None and config.query_mem_gb is None:
        try:
            assert plan.model_path is not None
            weights = memory.weight_bytes(plan.model_path, model)
        except ValueError:
            text = "the size of the ring is not known, as that of the weights is not; ask "
            return Finding(NOTE, "queries", f"{text}python -m kara_sglang.plan")
    ring = memory.ring_of(launch, memory.Rank.of(launch), weights)
    heads = cheapest(ring.shape.group, config.query_heads)
    if not ring.serves(heads):
        least = ring.most_bytes(heads)
        text = f"--kv-compress-query-mem-gb {config.query_mem_gb:g} has no room for one request, which "
        way_out = f"raise it to {least / 2**30:.3f} or more"
        return Finding(BAD, "queries", f"{text}takes {least:,} bytes", way_out)
    served = Served.of(ring, config.query_heads)
    return Finding(
        OK,
        "queries",
        f"{served.all_heads_bytes:,} bytes a request with all query heads, "
        f"{served.mean_bytes:,} with their mean, without tensor parallelism; a ring of "
        f"{served.bytes / 2**30:.2f} GiB ({served.why}) has room for {served.in_words()}",
    )


CHECKS: tuple[Check, ...] = (
    check_packages,
    check_plugin,
    check_settings,
    check_device,
    check_hooks,
    check_surface,
    check_backend,
    check_model,
)


# -- the report ------------------------------------------------------------------------------------


def examine(plan: Plan) -> Iterator[Finding]:
    """Run the checks in turn; without SGLang or torch the rest has nothing to look at."""
    for check in CHECKS:
        with quiet():
            try:
                findings = list(check(plan))
            except Exception as error:
                name = check.__name__.removeprefix("check_")
                text = f"the check broke off ({one_line(error)})"
                findings = [Finding(BAD, name, text)]
        yield from findings
        absent = any(f.level == BAD and f.text.startswith("is not installed") for f in findings)
        if check is check_packages and absent:
            return


def verdict(findings: list[Finding], plan: Plan) -> str:
    """The last line: one sentence that says what to do."""
    bad = [finding for finding in findings if finding.level == BAD]
    if not bad:
        return f"This environment can serve with compression: {plan.command()}"
    first = bad[0]
    more = f" ({len(bad) - 1} more above)" if len(bad) > 1 else ""
    way_out = f"; {first.way_out}" if first.way_out else ""
    trouble = f"{first.topic}: {first.text}{way_out}{more}"
    return f"This environment cannot serve with compression: {trouble}"


def main(argv: list[str] | None = None) -> int:
    """Print the report; 0 when this environment can serve with compression, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m kara_sglang.doctor", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--model-path", metavar="M", help="folder or name on a model hub; this model is checked, too"
    )
    plan = Plan(model_path=parser.parse_args(argv).model_path)
    print(f"kara-sglang {__version__}; importing SGLang takes some seconds\n", flush=True)
    findings = []
    with cpu_engine.switch_put_back():
        for finding in examine(plan):
            findings.append(finding)
            print(finding, flush=True)
    print(f"\n{verdict(findings, plan)}")
    return int(any(finding.level == BAD for finding in findings))


if __name__ == "__main__":
    raise SystemExit(main())
