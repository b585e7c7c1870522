"""Draft and revise: ``python frontend/examples/reflect_and_revise.py [URL]`` beside ``make serve``."""

import sys

from kara_sglang.frontend.backend import KaraEndpoint
from kara_sglang.frontend.programs import ReflectAndRevise, reflect_and_revise

QUESTION = "Two pens and one book cost 9 euros; the book costs 5. What does a pen cost?"


def main(url: str = "http://127.0.0.1:30000", **settings: int) -> ReflectAndRevise:
    endpoint = KaraEndpoint(url)
    result = reflect_and_revise(endpoint, QUESTION, **settings)
    print(f"Draft:\n{result.draft}")
    for round in result.rounds:
        print(f"\nCritique:\n{round.critique}\n\n{'Accepted.' if round.accepted else round.revision}")
    print(f"\nAnswer: {result.answer}")
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
