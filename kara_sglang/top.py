"""A live view of a server in the terminal: ``python -m kara_sglang.top [--url URL]``.

All of it comes from ``/server_info``, so no flag of the server is needed. Rates are over the time since
the last look. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass
from typing import Any

BAR = 24
# Alternate screen without a cursor, and back.
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
HOME, END_OF_LINE, END_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


class NoView(Exception):
    """Why there is nothing to show, in one line."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at a server; counts are sums over its data-parallel schedulers.

    Attributes
    ----------
    seconds
        On a monotonic clock.
    settings
        Of the plugin.
    compression
        When it begins and whether it has.
    sums
        The plain numbers of ``internal_states[i].kv_compress``.
    skipped
        Requests left uncompressed, by reason.
    schedulers
        How many there are.
    graph
        Largest batch of which each scheduler has a decode graph; 0 where it has none.
    throughput
        Output tokens per second, as SGLang last logged it.
    """

    seconds: float
    settings: dict[str, Any]
    compression: str
    sums: Counter[str]
    skipped: Counter[str]
    schedulers: int
    graph: int
    throughput: float

    @classmethod
    def of(cls, info: dict[str, Any], seconds: float) -> Sample:
        """Read what ``/server_info`` says.

        Raises
        ------
        NoView
            Where it says nothing of compression.
        """
        states = info.get("internal_states") or []
        ours = [state["kv_compress"] for state in states if "kv_compress" in state]
        if not ours:
            raise NoView("this server runs without compression; start it with --kv-compress kara")
        sums: Counter[str] = Counter()
        skipped: Counter[str] = Counter()
        for state in ours:
            sums.update({key: n for key, n in state.items() if isinstance(n, int | float)})
            skipped.update(state["skipped"])
        return cls(
            seconds=seconds,
            settings=ours[0]["settings"],
            compression=max(ours, key=lambda state: state["windows"])["compression"],
            sums=sums,
            skipped=skipped,
            schedulers=len(ours),
            graph=max(state["largest_decode_graph"] for state in ours),
            throughput=sum(state.get("last_gen_throughput") or 0.0 for state in states),
        )


def look(url: str, key: str | None) -> Sample:
    """Ask the server at ``url``, with an API key where it wants one.

    Raises
    ------
    NoView
        Where nobody answers, or not as an SGLang server would.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        request = urllib.request.Request(f"{url.rstrip('/')}/server_info", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            info = json.load(answer)
    except urllib.error.HTTPError as error:
        way_out = "; give --api-key" if error.code == 401 else ""
        raise NoView(f"{url} answers {error.code} {error.reason}{way_out}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise NoView(f"{url} gives no answer ({reason}); say --url") from error
    return Sample.of(info, time.monotonic())


# -- one frame -------------------------------------------------------------------------------------


def frame(url: str, sample: Sample, before: Sample | None) -> list[str]:
    """The lines of one frame; ``before`` is the look that rates are counted from."""
    sums, settings = sample.sums, sample.settings
    pool = sums["pool_tokens"]
    used = pool - sums["pool_tokens_free"] - sums["pool_tokens_evictable"]
    held, logical = sums["running_held_tokens"], sums["running_logical_tokens"]
    several = f"{sample.schedulers} schedulers, " if sample.schedulers > 1 else ""
    lines = [
        f"{url}  {several}{time.strftime('%H:%M:%S')}",
        f"{settings['selector']}: {settings['kept']} of {settings['window']} tokens kept, "
        f"delay {settings['delay']}, policy {settings['policy']}, "
        f"prefix reuse {settings['prefix_reuse']}",
        sample.compression,
        "",
        f"{'requests':<12}{sums['running_requests']:,} running{_graphs(sample)}, "
        f"{sums['waiting_requests']:,} waiting, {sample.throughput:,.0f} output tokens/s",
        f"{'KV pool':<12}{_bar(used, pool)}  {used:,} of {pool:,} slots in use",
        f"{'held':<12}{_bar(held, logical)}  {held:,} slots for {logical:,} tokens of running requests",
        f"{'query ring':<12}{sums['recorders_in_use']:,} requests recorded, "
        f"{sums['recorder_pages_free']:,} pages free",
        "",
        f"{'':<24}{'per second':>12}{'since start':>16}",
    ]
    for label, name in (
        ("windows", "windows"),
        ("  without queries", "without_queries"),
        ("slots freed", "slots_freed"),
        ("passes", "passes"),
    ):
        lines.append(f"{label:<24}{_rate(sample, before, name):>12}{sums[name]:>16,}")
    lines.append(f"{'pass time':<24}{_busy(sample, before):>12}{sums['pass_seconds']:>14,.2f} s")
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(sample.skipped.items()))
    return [*lines, "", f"left uncompressed: {reasons or 'nobody'}"]


def _graphs(sample: Sample) -> str:
    if not sample.graph:
        return ""
    per_scheduler = sample.sums["running_requests"] / sample.schedulers
    beyond = " (larger batches run without one: slower)" if per_scheduler > sample.graph else ""
    return f", decode graphs up to {sample.graph}{beyond}"


def _bar(part: float, whole: float) -> str:
    share = part / whole if whole else 0.0
    filled = round(BAR * min(1.0, share))
    return f"[{'#' * filled}{'.' * (BAR - filled)}] {share:4.0%}"


def _since(sample: Sample, before: Sample | None, name: str) -> float | None:
    """By how much a counter has grown per second; None where that is not known."""
    if before is None or sample.seconds <= before.seconds:
        return None
    grown = sample.sums[name] - before.sums[name]
    return None if grown < 0 else grown / (sample.seconds - before.seconds)  # less: it was restarted


def _rate(sample: Sample, before: Sample | None, name: str) -> str:
    rate = _since(sample, before, name)
    return "" if rate is None else f"{rate:,.1f}"


def _busy(sample: Sample, before: Sample | None) -> str:
    share = _since(sample, before, "pass_seconds")
    return "" if share is None else f"{share / sample.schedulers:.1%}"


# -- the program -----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """0 once the user has seen enough; 2 and one line where there is nothing to see."""
    parser = argparse.ArgumentParser(
        prog="python -m kara_sglang.top", description=(__doc__ or "").partition(":")[0] + "."
    )
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="default: %(default)s")
    parser.add_argument("--api-key", metavar="KEY", help="of the server's --api-key")
    parser.add_argument(
        "--interval", type=float, default=2.0, metavar="S", help="seconds; default: %(default)s"
    )
    parser.add_argument(
        "--once", action="store_true", help="print one frame, with rates over S, and end"
    )
    options = parser.parse_args(argv)
    if options.interval <= 0:
        parser.error("--interval must be above 0")
    try:
        before = look(options.url, options.api_key)
        if options.once:
            time.sleep(options.interval)
            print("\n".join(frame(options.url, look(options.url, options.api_key), before)))
        else:
            _watch(options, before)
    except NoView as error:
        print(f"top: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


def _watch(options: argparse.Namespace, sample: Sample) -> None:
    """Frame after frame, until Ctrl-C; a server that goes away is waited for."""
    before: Sample | None = None
    notice = ""
    sys.stdout.write(ENTER)
    try:
        while True:
            _draw([*frame(options.url, sample, before), *([notice] if notice else [])])
            time.sleep(options.interval)
            try:
                before, sample = sample, look(options.url, options.api_key)
                notice = ""
            except NoView as error:
                before, notice = None, f"! {error}; the figures above are old"
    finally:
        sys.stdout.write(LEAVE)
        sys.stdout.flush()


def _draw(lines: list[str]) -> None:
    columns, rows = shutil.get_terminal_size()
    shown = [line[:columns] + END_OF_LINE for line in lines[:rows]]
    sys.stdout.write(HOME + "\r\n".join(shown) + END_OF_SCREEN)
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
