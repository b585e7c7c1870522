"""A beam of reasoning steps: ``python frontend/examples/beam.py [URL]`` beside ``make serve``."""

import sys

from kara_sglang.frontend.backend import KaraEndpoint
from kara_sglang.frontend.programs import Beam, beam

QUESTION = "A shirt costs 40 euros. It is reduced by 25 percent. What does it cost now?"


def main(url: str = "http://127.0.0.1:30000", **settings: int) -> Beam:
    endpoint = KaraEndpoint(url)
    result = beam(endpoint, QUESTION, **({"depth": 5} | settings))
    for path in result.paths:
        print(f"{path.score:.3f} {'finished' if path.finished else 'open'}")
        print("".join(f"  {step}\n" for step in path.steps))
    print(f"Answer: {result.answer}")
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
