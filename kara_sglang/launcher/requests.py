"""The launcher's side of requests: checks them, and puts ``meta_info.kv_compress`` into answers."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kara_sglang import handshake, hooks, plugin
from kara_sglang.options import KEY, RequestOptions
from kara_sglang.radix_integration.keys import first_stranger

if TYPE_CHECKING:
    from sglang.srt.sampling.sampling_params import SamplingParams


def verify_sampling_params(_result: None, params: SamplingParams, *_args: Any) -> None:
    """AFTER ``SamplingParams.verify``: a ``ValueError`` here becomes HTTP 400."""
    config = plugin.launched()
    if config is not None:
        RequestOptions.parse(params.custom_params, config)


def check_input(manager: Any, obj: Any, input_ids: list[int] | None) -> None:
    """BEFORE ``TokenizerManager._validate_one_request``: every prompt passes here, whatever
    route it came by. A ``ValueError`` becomes HTTP 400.

    SGLang takes any number as a token id. One that is none is a stranger in the prefix cache
    (``radix_integration/keys.py``), and out of the embedding's bounds where it is computed.
    """
    if plugin.launched() is None:
        return
    in_session = (getattr(obj, "session_params", None) or {}).get("id")  # its history comes before
    if input_ids is not None and not len(input_ids) and not in_session:
        raise ValueError("the prompt (text or input_ids) is empty; it must have at least one token")
    if obj.input_ids is None:
        return
    vocab_size = manager.model_config.vocab_size
    try:
        ids = array("q", obj.input_ids)
        position = first_stranger(ids, vocab_size)
        shown = None if position is None else f"holds {ids[position]} at position {position}"
    except (TypeError, OverflowError):
        shown = "holds something else than token ids"
    if shown is not None:
        raise ValueError(
            f"input_ids (prompt on OpenAI routes) {shown}; the tokens of this model are 0 to "
            f"{vocab_size - 1}"
        )


def check_children(infos: list[dict[str, Any]], *_args: Any) -> None:
    """AFTER ``engine._wait_for_scheduler_ready``: every scheduler must run the plugin."""
    config = plugin.launched()
    if config is None:
        return
    for info in infos:
        said = handshake.told(info)
        if said != hooks.digest(hooks.scheduler_hooks()):
            why = said or (
                "a scheduler process runs without the plugin; is kara-sglang installed in the "
                "environment that SGLang's processes use?"
            )
            raise RuntimeError(f"kv-compress: error: {why}")


def update_request_meta_info(
    original: Callable[..., None],
    manager: Any,
    meta_info: dict[str, Any],
    state: Any,
    customized_info: dict[str, list[Any]],
    index: int,
    finish_reason: dict[str, Any] | None,
) -> None:
    """AROUND ``TokenizerManager.update_request_meta_info``.

    SGLang makes a list of what comes; ours is set as it is, and only when there is one.
    """
    others = {key: values for key, values in customized_info.items() if key != KEY}
    original(manager, meta_info, state, others, index, finish_reason)
    reports = customized_info.get(KEY)
    if reports is not None and reports[index]:
        [meta_info[KEY]] = reports[index]
