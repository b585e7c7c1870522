"""Chains and a vote: ``python frontend/examples/self_consistency.py [URL]`` beside ``make serve``."""

import sys

from kara_sglang.frontend.backend import KaraEndpoint
from kara_sglang.frontend.programs import SelfConsistency, self_consistency

QUESTION = "Anna has 3 boxes with 8 pencils each and gives 5 pencils away. How many are left?"


def main(url: str = "http://127.0.0.1:30000", **settings: int) -> SelfConsistency:
    endpoint = KaraEndpoint(url, kv_compress={"retain": 0.25})
    result = self_consistency(endpoint, QUESTION, **({"chains": 4} | settings))
    for chain in result.chains:
        print(f"{chain.answer!r:12} from {len(chain.text)} characters")
    print(f"Votes: {result.votes}\nAnswer: {result.answer}")
    totals = endpoint.ledger.totals
    print(f"KV slots: {totals.slots_held} instead of {totals.logical_length}")
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
