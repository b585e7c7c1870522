"""A program's progress and costs in the terminal, with ``rich`` (the package's extra ``frontend``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

from kara_sglang.frontend.records import Ledger, Step


@contextmanager
def live(ledger: Ledger, console: Console) -> Iterator[None]:
    """Show finished steps and the requests under way while the body runs; they vanish at its end."""
    with Live(
        get_renderable=lambda: _progress(ledger), console=console, refresh_per_second=4, transient=True
    ):
        yield


def _progress(ledger: Ledger) -> RenderableType:
    running = [Spinner("dots", f"{name or 'gen'}: {seconds:.0f} s") for name, seconds in ledger.running]
    return Group(steps_table(ledger.steps), *running)


def steps_table(steps: list[Step]) -> Table:
    """One row per step: tokens, reused, slots, time."""
    table = Table(show_edge=False, pad_edge=False, box=None, header_style="bold")
    table.add_column("step")
    for title in ("prompt", "cached", "output", "windows", "slots", "uncompressed", "seconds"):
        table.add_column(title, justify="right")
    for number, step in enumerate(steps, 1):
        cached = f"{step.cached_tokens}"
        if step.reused_tokens:
            cached += f" ({step.reused_tokens} in {step.reused_slots} slots)"
        table.add_row(
            f"{number} {step.name or step.kind}",
            *(str(step.prompt_tokens), cached, str(step.output_tokens), str(step.windows)),
            *(str(step.slots_held), str(step.logical_length), f"{step.seconds:.1f}"),
        )
    return table


def summary(ledger: Ledger, wall_seconds: float) -> str:
    """In all: what was computed, what was reused, slots with and without compression."""
    totals = ledger.totals
    share = totals.slots_held / totals.logical_length if totals.logical_length else 1.0
    reused = (
        f", {totals.reused_tokens} of them compressed in {totals.reused_slots} slots"
        if totals.reused_tokens
        else ""
    )
    return (
        f"{totals.steps} steps in {wall_seconds:.1f} s: {totals.prefilled_tokens} tokens prefilled, "
        f"{totals.cached_tokens} found in the cache{reused}, {totals.output_tokens} generated\n"
        f"KV slots at the end of each step, summed: {totals.slots_held} with compression, "
        f"{totals.logical_length} without ({share:.0%})"
    )
