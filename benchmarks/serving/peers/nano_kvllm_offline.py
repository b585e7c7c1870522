"""nano-kvllm, the engine of Kara's authors: offline only, CUDA only.

Run by the benchmark as a script of its own, with the interpreter of nano-kvllm's environment: it must
not import anything of this package.
"""

from __future__ import annotations

import argparse
import json
import random
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--output", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--pool", type=int, help="KV slots; default: what the engine takes")
    parser.add_argument("--window", type=int, required=True, help="tokens, in blocks of 256")
    parser.add_argument("--no-compression", action="store_true")
    arguments = parser.parse_args()

    from nanokvllm import LLM, SamplingParams

    block = 256
    blocks = max(1, arguments.window // block)
    settings = {
        "kv_compress_enabled": not arguments.no_compression,
        "kv_compress_window_blocks": blocks,
        "kv_compress_keep_blocks": max(1, blocks // 2),
        "max_model_len": arguments.prompt + arguments.output,
    }
    if arguments.pool is not None:
        settings["num_kvcache_blocks"] = arguments.pool // block
    llm = LLM(arguments.model, **settings)
    rng = random.Random(arguments.seed)
    prompts = [
        [rng.randrange(1000, 30000) for _ in range(arguments.prompt)] for _ in range(arguments.requests)
    ]
    sampling = SamplingParams(temperature=1.0, max_tokens=arguments.output, ignore_eos=True)
    started = time.perf_counter()
    answers = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - started
    tokens = sum(len(answer["token_ids"]) for answer in answers)
    print(json.dumps({"duration": seconds, "total_output_tokens": tokens, "completed": len(answers)}))


if __name__ == "__main__":
    main()
