"""Run as a program: ``sglang.Engine`` with tensor parallelism 2, switched on by configure()."""

from __future__ import annotations

import json
import sys
from array import array
from typing import Any

from server import prompt

from kara_sglang import plugin
from kara_sglang.radix_integration.keys import Text, physical_key, seed_of
from kara_sglang.radix_integration.row import Window


def forge(engine: Any, prompt: list[int]) -> dict[str, Any]:
    """A continued answer without an attack, and with forged keys that get past the launcher's check.

    More than one rank looks ids up in a part of the vocabulary each, and does not fail of one that is
    in nobody's part.
    """
    tail, greedy = [9] * 50, {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}

    def ask(ids: list[int], tokens: int) -> dict:
        return engine.generate(input_ids=ids, sampling_params=greedy | {"max_new_tokens": tokens})

    engine.flush_cache()
    first = ask(prompt, 300)["output_ids"]
    text = prompt + first
    honest = ask(text + tail + [7], 8)

    windows = [Window(16 + 64 * k, 16 + 32 * k, 64, 32, "all") for k in range(4)]
    config = plugin.active()
    seed = seed_of(repr((config.to_json(), "kara", 32, None)).encode(), None, None)
    fake = physical_key(Text(seed, memoryview(array("q", text[:-1]))), windows).tolist() + tail
    try:
        refusal = ask(fake, 1)
    except ValueError as error:
        refusal = str(error)
    engine.flush_cache()
    launched = plugin.launched()
    plugin.set_launched(None)  # the launcher lets everything through
    forged = [ask(fake, 1)]  # before anybody has written the windows
    again = ask(prompt, 300)["output_ids"]
    forged.append(ask(fake, 1))  # and after
    plugin.set_launched(launched)
    attacked = ask(text + tail + [7], 8)
    cached = [answer["meta_info"]["cached_tokens"] for answer in forged]
    return {"refusal": refusal, "cached": cached, "stories": [[first, honest], [again, attacked]]}


def main(model: str, traces: str, more: str) -> None:
    """``more`` are further arguments of the engine, in JSON."""
    import sglang

    import kara_sglang

    kara_sglang.configure(
        "kara",
        window=64,
        delay=16,
        policy="periodic",
        query_mem_gb=0.05,
        prefix_reuse="compressed",
        debug_checks=True,
        trace=traces,
    )
    engine = sglang.Engine(
        model_path=model,
        tp_size=2,
        skip_tokenizer_init=True,
        device="cpu",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        grammar_backend="none",
        page_size=16,
        max_total_tokens=4096,
        dtype="float32",
        **json.loads(more),
    )
    prompts = [prompt(length, seed) for seed, length in enumerate((5, 37, 64, 100))]
    greedy = {"max_new_tokens": 300, "temperature": 0, "ignore_eos": True}
    options = [None, {"selector": "identity"}, {"selector": "random", "retain": 0.25}, False]
    answers = engine.generate(
        input_ids=prompts,
        sampling_params=[
            greedy if o is None else greedy | {"custom_params": {"kv_compress": o}} for o in options
        ],
    )
    follow_up = engine.generate(
        input_ids=prompts[0] + answers[0]["output_ids"] + [7],
        sampling_params=greedy | {"max_new_tokens": 8},
    )
    try:
        engine.generate(
            input_ids=prompts[0], sampling_params={"custom_params": {"kv_compress": {"retain": 7}}}
        )
        error = None
    except ValueError as raised:
        error = str(raised)
    attacked = forge(engine, prompts[0])
    states = [state["kv_compress"] for state in engine.get_server_info()["internal_states"]]
    engine.shutdown()
    result = {"answers": answers, "follow_up": follow_up, "states": states, "error": error}
    result |= attacked
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
