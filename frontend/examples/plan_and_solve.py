"""Plan, then solve: ``python frontend/examples/plan_and_solve.py [URL]`` beside ``make serve``."""

import sys

from kara_sglang.frontend.backend import KaraEndpoint
from kara_sglang.frontend.programs import PlanAndSolve, plan_and_solve

QUESTION = "A train runs 60 km in 40 minutes. How far does it run in 2 hours?"


def main(url: str = "http://127.0.0.1:30000", **settings: int) -> PlanAndSolve:
    endpoint = KaraEndpoint(url)
    result = plan_and_solve(endpoint, QUESTION, **settings)
    print(f"Plan:\n{result.plan}\n\nSolution:\n{result.solution}\n\nAnswer: {result.answer}")
    for step in endpoint.ledger.steps:
        print(f"{step.name}: {step.cached_tokens} of {step.prompt_tokens} prompt tokens from the cache")
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
