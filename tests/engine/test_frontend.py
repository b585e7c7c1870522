"""Frontend programs on real servers: ids are kept, forks share, options arrive."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise

import pytest
import requests
import sglang as sgl
from places import ROOT
from server import Server
from sglang.lang.choices import unconditional_likelihood_normalized

from kara_sglang.benchmarks.reuse import modes
from kara_sglang.frontend.backend import EndpointError, KaraEndpoint, gen
from kara_sglang.frontend.records import Step
from kara_sglang.frontend.tokens import TokenText

EXAMPLES = ROOT / "frontend" / "examples"
QUESTION = "You may copy the work in any medium, provided that you keep this notice. Why is that so? "

# Servers on which reuse is tested, by fixture; what they promise is in their settings.
REUSE_SERVERS = ["kara", "compressed"]


@pytest.fixture
def connect(tiny_tokenizer) -> Callable[..., KaraEndpoint]:
    """An endpoint of a server with the tiny model, whose cache is empty."""

    def to(server: Server, **options: object) -> KaraEndpoint:
        server.flush()
        return KaraEndpoint(server.url, tokenizer=tiny_tokenizer, **options)

    return to


def ids(step: Step) -> tuple[int, ...]:
    """All that a step leaves to the next one."""
    return step.prompt_ids + step.output_ids


def assert_reuse(previous: Step, step: Step, settings: dict, page_size: int) -> None:
    """What ``step``, which goes on from ``previous``, finds in the prefix cache."""
    assert step.prompt_ids[: len(ids(previous))] == ids(previous)
    earlier = len(ids(previous))
    if settings["prefix_reuse"] == "compressed":
        assert step.cached_tokens > earlier - page_size - settings["window"]
        assert step.cached_tokens <= earlier
        assert step.reused_tokens > 0
        assert 0 < step.reused_slots < step.reused_tokens
    else:
        # So short an answer is computed again from its first window on.
        assert settings["prefix_reuse"] == "auto"
        assert step.cached_tokens == -(-len(previous.prompt_ids) // page_size) * page_size
        assert step.reused_tokens == step.reused_slots == 0


@sgl.function
def four_steps(s, question):
    s += question
    for number in range(4):
        s += f"\nStep {number}:" + gen(f"step {number}", 100, ignore_eos=True)


@pytest.mark.parametrize("server", REUSE_SERVERS)
def test_four_steps_keep_their_ids(server: str, request, connect, tiny_tokenizer) -> None:
    """Each prompt begins with all that came before; the cache finds what the server's mode promises."""
    endpoint = connect(request.getfixturevalue(server))
    state = four_steps.run(QUESTION, backend=endpoint, temperature=0, use_thread=False)
    steps = endpoint.ledger.steps
    assert [step.name for step in steps] == [f"step {number}" for number in range(4)]
    assert all(step.output_tokens == 100 and step.windows >= 1 for step in steps)
    assert steps[0].cached_tokens == 0
    page_size = endpoint.get_server_info()["page_size"]
    for previous, step in pairwise(steps):
        assert_reuse(previous, step, endpoint.settings, page_size)
    # Worth the trouble: the same text tokenised anew is another prompt.
    assert tuple(tiny_tokenizer.encode(state.text())) != ids(steps[-1])
    assert endpoint.ledger.totals.slots_held < endpoint.ledger.totals.logical_length


def test_answers_of_the_modes_are_compared(compressed: Server, connect) -> None:
    """The same prompts on one server: nothing differs before something compressed is reused, and what
    is reused makes a difference."""
    endpoint = connect(compressed)
    first, *later = modes.compare(endpoint, [QUESTION, "Why?", "And then?"], max_tokens=100)
    assert first.reused_tokens == 0
    assert first.alike == first.equal == first.tokens == 100
    for one in later:
        assert 0 < one.reused_slots < one.reused_tokens < one.prompt_tokens
        assert one.alike <= one.equal <= one.tokens == 100
    assert min(one.equal for one in later) < 100
    exact = [step for step in endpoint.ledger.steps if step.name.endswith("exact")]
    assert len(exact) == 3 and all(step.reused_tokens == 0 for step in exact)


def test_streaming_keeps_the_same_ids(kara: Server, connect) -> None:
    plain, streamed = connect(kara), connect(kara)
    expected = four_steps.run(QUESTION, backend=plain, temperature=0, use_thread=False)
    kara.flush()
    state = four_steps.run(QUESTION, backend=streamed, temperature=0, stream=True)
    assert "".join(state.text_iter()) == expected.text()
    assert [ids(step) for step in streamed.ledger.steps] == [ids(step) for step in plain.ledger.steps]


@pytest.mark.parametrize("server", REUSE_SERVERS)
def test_forks_share(server: str, request, connect) -> None:
    """One prefill of the common text, then each fork finds it; joined texts keep their ids."""

    @sgl.function
    def tree(s, question):
        s += question + gen("trunk", 100, ignore_eos=True)
        forks = s.fork(3)
        forks += lambda i: f" ({i})" + gen("branch", 20, ignore_eos=True)
        forks.join("concate_and_append")
        s += gen("end", 4, ignore_eos=True)

    endpoint = connect(request.getfixturevalue(server))
    tree.run(QUESTION, backend=endpoint, temperature=0, use_thread=False)
    page_size = endpoint.get_server_info()["page_size"]
    trunk, fork, *branches, end = endpoint.ledger.steps
    assert fork.kind == "fork" and fork.prompt_ids == ids(trunk)
    assert_reuse(trunk, fork, endpoint.settings, page_size)
    assert [step.name for step in branches] == ["branch"] * 3
    for branch in branches:
        assert branch.prompt_ids[: len(fork.prompt_ids)] == fork.prompt_ids
        assert branch.cached_tokens >= len(fork.prompt_ids) // page_size * page_size
    joined = ids(trunk) + sum((ids(b)[len(fork.prompt_ids) :] for b in sorted_by_text(branches)), ())
    assert end.prompt_ids == joined


def sorted_by_text(branches: list[Step]) -> list[Step]:
    """Forks finish in any order; their prompts end with (0), (1), (2)."""
    return sorted(branches, key=lambda step: step.prompt_ids)


def test_options_arrive_per_gen(kara: Server, connect) -> None:
    @sgl.function
    def program(s):
        s += QUESTION
        s += gen("default", 100, ignore_eos=True)
        s += gen("quarter", 100, ignore_eos=True, kv_compress={"retain": 0.25, "selector": "recent"})
        s += gen("off", 100, ignore_eos=True, kv_compress=False)
        s += sgl.gen("plain", 100, ignore_eos=True)

    endpoint = connect(kara, kv_compress={"retain": 0.75})
    program.run(backend=endpoint, temperature=0, use_thread=False)
    steps = endpoint.ledger.steps
    assert [(step.windows, step.tokens_removed) for step in steps] == [
        (1, 16),
        (1, 48),
        (0, 0),
        (1, 16),
    ]
    assert [step.name for step in steps] == ["default", "quarter", "off", ""]
    for step in steps:
        assert step.logical_length - step.slots_held == step.tokens_removed

    with pytest.raises(ValueError, match=r"kv_compress\.retain"):
        gen("x", kv_compress={"retain": 7})
    with pytest.raises(ValueError, match="needs a tokenizer in the server"):
        run_one(endpoint, gen("x", stop="\n"))
    with pytest.raises(ValueError, match=r"s\.fork\(2\) shares the prompt"):
        run_one(endpoint, gen("x", n=2))
    with pytest.raises(EndpointError, match="HTTP 400"):
        run_one(endpoint, gen("x", 4, top_p=7.0))


def test_select_and_fork_find_what_a_gen_with_options_left(compressed: Server, connect) -> None:
    """Compressed blocks are shared among equal options only, so those of the last gen are sent on, in
    forks as well; a gen without options goes back to the endpoint's."""

    @sgl.function
    def program(s):
        s += QUESTION + gen("trunk", 100, ignore_eos=True, kv_compress={"selector": "recent"})
        s += sgl.select("choice", [" you", " may"])
        forks = s.fork(2)
        forks += sgl.select("verdict", [" yes", " no"])
        forks.join("gather_variable")
        s += gen("last", 100, ignore_eos=True)
        s += sgl.select("end", [" you", " may"])

    endpoint = connect(compressed)
    program.run(backend=endpoint, temperature=0, use_thread=False)
    trunk, *scored, last, end = endpoint.ledger.steps
    assert trunk.windows >= 2
    assert [step.kind for step in scored] == ["select", "fork", "select", "select"]
    page_size = endpoint.get_server_info()["page_size"]
    for step in scored:
        assert_reuse(trunk, step, endpoint.settings, page_size)
    assert last.reused_tokens == 0
    assert_reuse(last, end, endpoint.settings, page_size)


def run_one(endpoint: KaraEndpoint, expression: object) -> None:
    @sgl.function
    def program(s):
        s += QUESTION + expression

    program.run(backend=endpoint, use_thread=False)


def test_select_takes_the_likeliest_and_keeps_its_ids(kara: Server, connect) -> None:
    choices = [" you", " may copy", " the License", " ab"]

    @sgl.function
    def program(s, method):
        s += QUESTION + gen("before", 10, ignore_eos=True)
        s += sgl.select("choice", choices, choices_method=method)
        s += gen("after", 4, ignore_eos=True)

    endpoint = connect(kara)
    state = program.run(sgl.token_length_normalized, backend=endpoint, temperature=0, use_thread=False)
    before, select, after = endpoint.ledger.steps
    assert select.prompt_ids == ids(before)
    means = []
    for choice in choices:
        tokens = endpoint.tokens.continuation(choice)
        scored = requests.post(
            kara.url + "/generate",
            json={
                "input_ids": [*select.prompt_ids, *tokens],
                "sampling_params": {"max_new_tokens": 0},
                "return_logprob": True,
                "logprob_start_len": 0,
            },
        ).json()["meta_info"]["input_token_logprobs"]
        means.append(sum(logprob for logprob, *_ in scored[-len(tokens) :]) / len(tokens))
    info = state.get_meta_info("choice")
    assert info["normalized_prompt_logprobs"] == pytest.approx(means, abs=1e-4)
    assert state["choice"] == choices[means.index(max(means))]
    assert isinstance(state["choice"], TokenText)
    assert select.output_ids == tuple(endpoint.tokens.continuation(state["choice"]))
    assert after.prompt_ids == ids(select)

    state = program.run(
        unconditional_likelihood_normalized, backend=endpoint, temperature=0, use_thread=False
    )
    assert state["choice"] in choices
    assert len(state.get_meta_info("choice")["normalized_unconditional_prompt_logprobs"]) == 4


def test_a_server_without_compression(stock: Server, connect) -> None:
    """The same programs run; options are refused instead of being ignored."""
    endpoint = connect(stock)
    assert endpoint.settings is None
    four_steps.run(QUESTION, backend=endpoint, temperature=0, use_thread=False)
    for previous, step in pairwise(endpoint.ledger.steps):
        # Stock SGLang reuses everything but the last, incomplete page.
        assert step.cached_tokens == (len(ids(previous)) - 1) // 16 * 16
        assert step.slots_held == step.logical_length
    with pytest.raises(ValueError, match="runs without --kv-compress and would ignore it"):
        run_one(endpoint, gen("x", kv_compress={"retain": 0.25}))
    with pytest.raises(ValueError, match="runs without --kv-compress and would ignore it"):
        connect(stock, kv_compress=False)


def test_chat_prompts_are_the_models_own(smollm2: Server) -> None:
    """As its tokenizer renders the talk, with a stop token and a stop string on the way."""

    @sgl.function
    def talk(s, stop):
        s += sgl.user("Name a colour.")
        s += sgl.assistant(gen("colour", 30))
        s += sgl.user("Tell me about the sea.")
        s += sgl.assistant(gen("sea", 20, stop=stop))
        s += sgl.user("Thank you.")
        s += sgl.assistant(gen("end", 4))

    endpoint = KaraEndpoint(smollm2.url)
    tokenizer = endpoint.tokens.tokenizer

    def run(stop: str | None) -> tuple[list[Step], list[dict], str]:
        endpoint.ledger.clear()
        state = talk.run(stop, backend=endpoint, temperature=0, use_thread=False)
        steps = endpoint.ledger.steps
        for previous, step in pairwise(steps):
            assert step.prompt_ids[: len(ids(previous))] == ids(previous)
        return steps, state.messages(), state["sea"]

    (first, second, third), messages, sea = run(stop=None)
    for turn, step in ((1, first), (3, second), (5, third)):
        rendered = tokenizer.apply_chat_template(
            messages[:turn], tokenize=False, add_generation_prompt=True
        )
        assert tokenizer.decode(step.prompt_ids) == rendered
    assert first.prompt_ids == tuple(tokenizer.encode(tokenizer.decode(first.prompt_ids)))
    assert first.finish == "stop" and ids(first)[-1] != tokenizer.eos_token_id

    # A stop string that begins inside a token.
    words = [tokenizer.decode([token]) for token in second.output_ids]
    at = next(
        number
        for number, word in enumerate(words)
        if number > 4 and len(word) > 3 and sea.find(word[2:]) == len("".join(words[:number])) + 2
    )
    _, stopped, after = run(stop=words[at][2:])[0]
    assert stopped.finish == "stop"
    assert stopped.output_ids == second.output_ids[:at]
    assert (
        tokenizer.decode(after.prompt_ids).count("".join(words[:at]) + words[at][:2] + "<|im_end|>")
        == 1
    )


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_examples_run(name: str, smollm2: Server, capsys) -> None:
    """Each as it stands, only shorter; the result is complete and typed."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    small = {"max_tokens": 24} | {"beam": {"depth": 2}, "self_consistency": {"chains": 3}}.get(name, {})
    result = example.main(smollm2.url, **small)
    assert result.question == example.QUESTION
    assert "Answer:" in capsys.readouterr().out
    if name == "plan_and_solve":
        assert result.plan and result.solution
    elif name == "self_consistency":
        assert len(result.chains) == 3
        assert sum(count for _, count in result.votes) == sum(
            c.answer is not None for c in result.chains
        )
    elif name == "reflect_and_revise":
        assert 1 <= len(result.rounds) <= 2
        assert [round.revision is None for round in result.rounds] == [
            r.accepted for r in result.rounds
        ]
        assert not any(round.accepted for round in result.rounds[:-1])
    else:
        assert len(result.paths) == 2
        assert all(1 <= len(path.steps) <= 2 and path.score < 0 for path in result.paths)


def command(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    return subprocess.run(
        (sys.executable, "-m", "kara_sglang.frontend", "solve", *arguments),
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )


def test_the_command_line(smollm2: Server) -> None:
    done = command(
        "What is 2 + 3?", "--endpoint", smollm2.url, "--chains", "2", "--max-tokens", "200", "--json"
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["program"] == "self-consistency"
    assert answer["settings"]["window"] == 128
    assert [step["kind"] for step in answer["steps"]] == ["fork", "gen", "gen"]
    assert len(answer["result"]["chains"]) == 2
    totals = answer["totals"]
    assert totals["logical_length"] == sum(step["logical_length"] for step in answer["steps"])
    assert totals["slots_held"] == totals["logical_length"] - 64 * totals["windows"]
    assert totals["output_tokens"] <= 400

    done = command(
        "Why?", "--endpoint", smollm2.url, "--program", "plan-and-solve", "--max-tokens", "8"
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^1 plan +\d+ +\d+ +8 +0 +\d+ +\d+ +\d+\.\d$", done.stdout, re.MULTILINE)
    assert "with compression" in done.stdout and "Answer: " in done.stdout


def test_the_documents_program(smollm2: Server, capsys) -> None:
    """It runs as it can be pasted, but for the address."""
    text = (ROOT / "docs" / "frontend.md").read_text()
    program = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert "http://127.0.0.1:30000" in program
    exec(program.replace("http://127.0.0.1:30000", smollm2.url), {"__name__": "document"})
    assert "KV slots" in capsys.readouterr().out
