"""What a request gets, settled once: from its own options, the server's settings and what it is.

A request is asked for before its first decode step too: by the prefix cache when it is matched, and by
admission while it waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kara_sglang.config import KaraConfig
from kara_sglang.kernels.selectors import REGISTRY
from kara_sglang.options import RequestOptions
from kara_sglang.radix_integration.prefix import Sharing

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

TERMS = "kv_compress_terms"
"""Attribute of SGLang's ``Req`` that holds its :class:`Terms`. It survives a retraction."""


@dataclass(frozen=True, slots=True)
class Terms:
    """One request's.

    Attributes
    ----------
    skipped
        Why it is never compressed, or None.
    selector
        Name of its selector.
    kept
        R, KV slots that a window of it keeps.
    seed
        What it asked for; None: the server's.
    sharing
        Its part in compressed prefixes; None: it uses and leaves exact prefixes only.
    """

    skipped: str | None
    selector: str
    kept: int
    seed: int | None
    sharing: Sharing | None


class TermsOf:
    """Reads terms off requests, and leaves them there.

    Parameters
    ----------
    config : KaraConfig
    page_size : int
    """

    def __init__(self, config: KaraConfig, page_size: int) -> None:
        self.config = config
        self.page_size = page_size
        self._settings = config.to_json()

    def __call__(self, req: Req) -> Terms:
        terms: Terms | None = getattr(req, TERMS, None)
        if terms is None:
            terms = self._read(req)
            setattr(req, TERMS, terms)
        return terms

    def problem(self, req: Req) -> str | None:
        """What is wrong with the request's options, in one line. The launcher has said it, but with
        several tokenizer workers it sees no request."""
        try:
            RequestOptions.parse(req.sampling_params.custom_params, self.config)
        except ValueError as error:
            return str(error)
        return None

    def _read(self, req: Req) -> Terms:
        options = RequestOptions(enabled=False)  # of whom ends with its first token
        if self.problem(req) is None:
            options = RequestOptions.parse(req.sampling_params.custom_params, self.config)
        selector = options.selector or self.config.selector
        kept = self.config.kept_by(selector, self.page_size, options.retain)
        skipped = _kind(req) if options.enabled else "opt_out"
        shares = self.config.shares_prefixes and options.prefix != "exact"
        # A seed that is made from the prompt is left out: who continues a text has a longer prompt.
        seed = options.seed if REGISTRY[selector].seeded else None
        sharing = None
        shares = shares and skipped is None and self.config.may_share(kept)
        if shares and self.config.told_by_its_text(selector):
            settings = repr((self._settings, selector, kept, seed)).encode()
            sharing = Sharing(settings, 1 if options.prefix else self.config.least_gain)
        return Terms(skipped, selector, kept, options.seed, sharing)


def _kind(req: Req) -> str | None:
    """What a request is that is never compressed, or None."""
    if req.beam_group is not None:
        return "beam"
    if req.multimodal_inputs is not None:
        return "multimodal"
    return None
