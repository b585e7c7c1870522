"""Run as a program: ``sglang.Engine`` with tensor parallelism 2, switched on by configure()."""

from __future__ import annotations

import json
import sys


def main(model: str, traces: str) -> None:
    import sglang
    from conftest import prompt

    import kara_sglang

    kara_sglang.configure(
        "kara",
        window=64,
        delay=16,
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
    states = [state["kv_compress"] for state in engine.get_server_info()["internal_states"]]
    engine.shutdown()
    result = {"answers": answers, "follow_up": follow_up, "states": states, "error": error}
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
