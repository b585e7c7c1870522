"""Programs for multi-step reasoning, in SGLang's frontend language.

Each is a ``sglang.function`` of a few lines that may be copied and changed, and a function that runs it
on a question and returns a typed result. Every later step goes on from the tokens of the earlier ones,
so its prompt is found in the prefix cache; ``endpoint.ledger`` says how much of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sglang as sgl
from sglang.lang.interpreter import ProgramState
from sglang.lang.ir import SglFunction

from kara_sglang.frontend.answers import extract, vote
from kara_sglang.frontend.backend import KaraEndpoint, gen

STEP_BY_STEP = "Think step by step. End with one line: 'Answer: ' and the final answer."


# -- plan and solve ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlanAndSolve:
    """Result of :func:`plan_and_solve`."""

    question: str
    plan: str
    solution: str
    answer: str | None  # parsed from the solution


@sgl.function
def _plan_and_solve(s: Any, question: str, max_tokens: int) -> None:
    s += sgl.user(f"{question}\n\nMake a short plan, as a numbered list of steps. Do not solve it yet.")
    s += sgl.assistant(gen("plan", max_tokens))
    s += sgl.user(f"Now carry out the plan. {STEP_BY_STEP}")
    s += sgl.assistant(gen("solution", max_tokens))


def plan_and_solve(
    endpoint: KaraEndpoint, question: str, *, max_tokens: int = 512, temperature: float = 0.6
) -> PlanAndSolve:
    """Plan first, then carry the plan out (Wang et al., arXiv 2305.04091)."""
    s = _run(_plan_and_solve, endpoint, temperature, question=question, max_tokens=max_tokens)
    return PlanAndSolve(question, s["plan"], s["solution"], extract(s["solution"]))


# -- self-consistency ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """One of several attempts at the same question."""

    text: str
    answer: str | None


@dataclass(frozen=True)
class SelfConsistency:
    """Result of :func:`self_consistency`."""

    question: str
    chains: tuple[Chain, ...]
    votes: tuple[tuple[str, int], ...]  # answer and its number of chains, most first
    answer: str | None  # None: no chain came to an answer


@sgl.function
def _self_consistency(s: Any, question: str, chains: int, max_tokens: int) -> None:
    s += sgl.user(f"{question}\n\n{STEP_BY_STEP}")
    forks = s.fork(chains)
    forks += sgl.assistant(gen("chain", max_tokens))
    s["chains"] = [_wait(fork, "chain") for fork in forks.states]


def self_consistency(
    endpoint: KaraEndpoint,
    question: str,
    *,
    chains: int = 5,
    max_tokens: int = 512,
    temperature: float = 0.7,
) -> SelfConsistency:
    """Several chains from one prompt, then a majority vote (Wang et al., arXiv 2203.11171)."""
    _at_least_one(chains=chains)
    numbers = {"chains": chains, "max_tokens": max_tokens}
    s = _run(_self_consistency, endpoint, temperature, question=question, **numbers)
    attempts = tuple(Chain(text, extract(text)) for text in s["chains"])
    votes = tuple(vote([chain.answer for chain in attempts]))
    return SelfConsistency(question, attempts, votes, votes[0][0] if votes else None)


# -- reflect and revise --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """One look at a solution."""

    critique: str
    accepted: bool  # the model itself held the solution to be right
    revision: str | None  # None when it was accepted


@dataclass(frozen=True)
class ReflectAndRevise:
    """Result of :func:`reflect_and_revise`."""

    question: str
    draft: str
    rounds: tuple[Round, ...]
    answer: str | None  # parsed from the last version


@sgl.function
def _reflect_and_revise(s: Any, question: str, rounds: int, max_tokens: int) -> None:
    s += sgl.user(f"{question}\n\n{STEP_BY_STEP}")
    s += sgl.assistant(gen("draft", max_tokens))
    s["rounds"] = []
    for _ in range(rounds):
        s += sgl.user("Check this solution line by line and name each mistake in it.")
        s += sgl.assistant(gen("critique", max_tokens))
        s += sgl.user("Is the solution right? Say yes or no.")
        s += sgl.assistant(sgl.select("verdict", ["yes", "no"]))
        accepted = s["verdict"] == "yes"
        if not accepted:
            s += sgl.user(f"Write a new solution without these mistakes. {STEP_BY_STEP}")
            s += sgl.assistant(gen("revision", max_tokens))
        s["rounds"].append(Round(s["critique"], accepted, None if accepted else s["revision"]))
        if accepted:
            break


def reflect_and_revise(
    endpoint: KaraEndpoint,
    question: str,
    *,
    rounds: int = 2,
    max_tokens: int = 512,
    temperature: float = 0.6,
) -> ReflectAndRevise:
    """Draft, criticise, revise, until the model accepts it (Self-Refine, arXiv 2303.17651)."""
    _at_least_one(rounds=rounds)
    numbers = {"rounds": rounds, "max_tokens": max_tokens}
    s = _run(_reflect_and_revise, endpoint, temperature, question=question, **numbers)
    versions = [s["draft"], *(round.revision for round in s["rounds"] if round.revision is not None)]
    return ReflectAndRevise(question, s["draft"], tuple(s["rounds"]), extract(versions[-1]))


# -- beam over reasoning steps -------------------------------------------------------------------------


@dataclass(frozen=True)
class Path:
    """A sequence of reasoning steps."""

    steps: tuple[str, ...]
    score: float  # mean log-probability of its tokens
    finished: bool  # the model ended it or stated an answer
    answer: str | None


@dataclass(frozen=True)
class Beam:
    """Result of :func:`beam`."""

    question: str
    paths: tuple[Path, ...]  # finished ones first, then by score
    answer: str | None  # of the first path


@dataclass(frozen=True)
class _Node:
    state: ProgramState
    steps: tuple[str, ...] = ()
    logprobs: tuple[float, ...] = ()
    finished: bool = False

    @property
    def score(self) -> float:
        return sum(self.logprobs) / len(self.logprobs) if self.logprobs else float("-inf")

    def grown(self, fork: ProgramState) -> _Node:
        """This path with the line that ``fork`` wrote."""
        step = _wait(fork, "step")
        info = fork.get_meta_info("step")
        logprobs = tuple(token[0] for token in info["output_token_logprobs"])
        reason = info["finish_reason"]
        ended = reason["type"] == "stop" and reason["matched"] != "\n"
        return _Node(fork, (*self.steps, step), self.logprobs + logprobs, ended or _states_answer(step))


@sgl.function
def _beam(s: Any, question: str, width: int, branch: int, depth: int, max_tokens: int) -> None:
    s += sgl.user(f"{question}\n\n{STEP_BY_STEP} Write each step on a line of its own.")
    s += sgl.assistant_begin()
    nodes = [_Node(s)]
    for _ in range(depth):
        forks = [(node, node.state.fork(branch)) for node in nodes if not node.finished]
        for _, group in forks:
            group += gen("step", max_tokens, stop="\n", return_logprob=True)
        grown = [node.grown(fork) for node, group in forks for fork in group.states]
        # An empty line is no step, unless there is nothing else.
        grown = [node for node in grown if node.steps[-1].strip()] or grown
        finished = [node for node in nodes if node.finished]
        nodes = sorted(finished + grown, key=lambda node: -node.score)[:width]
        for state in (node.state for node in nodes if not node.finished):
            state += "\n"
    s["nodes"] = nodes


def beam(
    endpoint: KaraEndpoint,
    question: str,
    *,
    width: int = 2,
    branch: int = 2,
    depth: int = 8,
    max_tokens: int = 128,
    temperature: float = 0.7,
) -> Beam:
    """Beam search over lines of reasoning (Xie et al., arXiv 2305.00633, without self-evaluation).

    At most ``depth`` times, each of ``width`` paths gets ``branch`` possible next lines of at most
    ``max_tokens``, and the ``width`` paths with the highest mean log-probability go on.
    """
    _at_least_one(width=width, branch=branch, depth=depth)
    numbers = {"width": width, "branch": branch, "depth": depth, "max_tokens": max_tokens}
    s = _run(_beam, endpoint, temperature, question=question, **numbers)
    paths = tuple(
        Path(node.steps, node.score, node.finished, extract("\n".join(node.steps)))
        for node in sorted(s["nodes"], key=lambda node: (not node.finished, -node.score))
    )
    return Beam(question, paths, paths[0].answer)


PROGRAMS: dict[str, Callable[..., Any]] = {
    "plan-and-solve": plan_and_solve,
    "self-consistency": self_consistency,
    "reflect-and-revise": reflect_and_revise,
    "beam": beam,
}


def _run(
    program: SglFunction, endpoint: KaraEndpoint, temperature: float, **arguments: Any
) -> ProgramState:
    """Run a program; what goes wrong in it is raised here.

    Without a thread of its own: SGLang's threads report an error as a missing variable. Forks have
    threads all the same, see :func:`_wait`.
    """
    if not arguments["question"].strip():
        raise ValueError("question is empty; ask something")
    return program.run(backend=endpoint, temperature=temperature, use_thread=False, **arguments)


def _wait(fork: ProgramState, name: str) -> str:
    """A fork's variable once it is there; raises what went wrong in the fork's thread."""
    try:
        return fork[name]
    except KeyError:
        raise fork.stream_executor.error_ or RuntimeError(f"a fork ended without {name!r}") from None


def _states_answer(step: str) -> bool:
    return "answer:" in step.lower() or "\\boxed{" in step


def _at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
