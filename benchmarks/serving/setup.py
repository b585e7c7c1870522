"""What all servers of a comparison share: the model, the sizes, the machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kara_sglang import cpu_engine
from kara_sglang.benchmarks.serving.scenarios import Scale
from kara_sglang.benchmarks.tiny_model import add_word_tokenizer, make_tiny_llama
from kara_sglang.embedded_model import embedded_model_path

GPU_SCALE = Scale(window=512, delay=64, page_size=16, prompt=512, output=8192, requests=128, scarce=16)


@dataclass(frozen=True, slots=True)
class Setup:
    """What all servers of a comparison share.

    Attributes
    ----------
    model
        Folder or hub name.
    dtype
        ``--dtype``.
    window, delay
        Tokens.
    query_mem_gb
        GiB for recorded queries.
    page_size
        Tokens per page.
    pool
        KV slots, or None: what the engine takes by itself.
    server_args
        Further flags for every SGLang server.
    pythons
        Interpreter of each peer that lives in an environment of its own.
    cpu
        Whether there is no GPU.
    expects
        Tokens of an answer for which SGLang reserves room at most, or None: its own bound.
    """

    model: str
    dtype: str
    window: int
    delay: int
    query_mem_gb: float
    page_size: int
    pool: int | None = None
    server_args: tuple[str, ...] = ()
    pythons: dict[str, Path] = field(default_factory=dict)
    cpu: bool = field(default_factory=cpu_engine.is_installed)
    expects: int | None = None


def resolve_model(name: str, folder: Path, context: int = 8192) -> str:
    """The folder or hub name that servers get; ``tiny`` is written into ``folder``."""
    if name == "smollm2":
        return str(embedded_model_path())
    if name != "tiny":
        return name
    target = folder / "tiny"
    if not (target / "tokenizer.json").exists():
        add_word_tokenizer(make_tiny_llama(target, context=context))
    return str(target)
