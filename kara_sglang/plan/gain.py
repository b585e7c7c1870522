"""What compression gains on a GPU: a projection from datasheets, not a measurement.

The arithmetic of a step is that of ``benchmarks/serving/projection.py``. Here a load is steady: as many
requests run as fit, each at another place of its answer, so the mean of what one holds counts.
"""

from __future__ import annotations

from kara_sglang.benchmarks.arithmetic import Settings, pass_floor
from kara_sglang.benchmarks.models import Model
from kara_sglang.benchmarks.serving.projection import CARDS, Card, prompt_seconds, step_seconds
from kara_sglang.plan.load import Held, Load


def nearest(memory: float) -> Card:
    """The card of which a datasheet is at hand and whose memory is nearest to ``memory`` bytes."""
    return min(CARDS, key=lambda card: abs(card.memory - memory))


def rate(
    model: Model, card: Card, load: Load, held: Held, pool: int, settings: Settings | None
) -> float:
    """Output tokens per second at most.

    Parameters
    ----------
    model, card
        Shapes of one rank, and its GPU.
    load, held
    pool
        KV slots.
    settings
        Of the windows; None without compression.

    Raises
    ------
    ValueError
        Where not even one request fits.
    """
    running = min(load.running, held.fitting(pool))
    if not running:
        raise ValueError(f"a request holds {held.most:,} KV slots, the pool has {pool:,}")
    seconds = load.answer * step_seconds(model, card.gpu, running, running * held.mean)
    seconds += prompt_seconds(model, card.gpu, running * load.prompt)
    if settings is not None:
        seconds += running * held.windows * pass_floor(model, settings, card.gpu)
    return running * load.answer / seconds
