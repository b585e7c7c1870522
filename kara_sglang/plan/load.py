"""What a load of equal requests holds, and how many of them run at once."""

from __future__ import annotations

from dataclasses import dataclass

from kara_sglang.config import KaraConfig
from kara_sglang.radix_integration.row import Geometry, ceil_align
from kara_sglang.scheduler import policy
from kara_sglang.scheduler.forecast import Forecast
from kara_sglang.scheduler.pace import PLAIN, Pace


@dataclass(frozen=True, slots=True)
class Load:
    """``running`` requests at once, each with ``prompt`` tokens and an answer of ``answer``."""

    prompt: int
    answer: int
    running: int


@dataclass(frozen=True, slots=True)
class Held:
    """KV slots of one request.

    Attributes
    ----------
    most
        What SGLang reserves for it, prompt and answer: no request is retracted while all that run
        find so much.
    mean
        Over the steps of its answer.
    windows
        That are compressed.
    """

    most: int
    mean: float
    windows: int

    def fitting(self, pool: int) -> int:
        """Requests that a pool of so many slots holds."""
        return pool // self.most


def uncompressed(load: Load, page_size: int) -> Held:
    """As stock SGLang serves it."""
    return Held(
        most=ceil_align(load.prompt + load.answer, page_size),
        mean=load.prompt + load.answer / 2,
        windows=0,
    )


def compressed(load: Load, config: KaraConfig, page_size: int, pace: Pace = PLAIN) -> Held:
    """With compression."""
    kept = config.kept_by(config.selector, page_size)
    decides = policy.build(config)
    forecast = Forecast(decides, Geometry(page_size, config.window, config.delay), pace)
    start = ceil_align(load.prompt, page_size)
    grown = forecast.reserve(load.answer, load.prompt, start, kept, load.running)
    in_time = forecast.in_time(load.running)
    # Tokens of the answer when its first window is due; a request whose last one is on its way is left.
    first = max(start + config.window + forecast.latest.delay, decides.floor) - load.prompt
    windows = max(0, (load.answer - 3 - first) // config.window + 1)
    freed = config.window - kept
    # Each window is missing from its compression to the end.
    missing = sum(load.answer - first - i * config.window for i in range(windows)) * freed
    return Held(
        most=ceil_align(load.prompt + round(grown), page_size),
        mean=load.prompt + load.answer / 2 - in_time * missing / load.answer,
        windows=windows,
    )
