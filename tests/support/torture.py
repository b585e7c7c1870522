"""What clients and operators can do to a server, all at once, drawn from a seed.

Requests of all kinds come from several clients while an operator pauses, aborts, flushes and loads
weights. What must hold for each answer alone is checked as it comes; answers that must be stock's are
kept for :func:`assert_as_stock`.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from server import Server, in_parallel, prompt
from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

from kara_sglang.benchmarks.tiny_model import VOCAB

CLIENTS = 8
LONGEST = 1300  # tokens of a prompt; the pools hold 1,536 (conftest.launch_small)
# What the plugin must leave as it is, and what it may change.
EXACT = (False, {"selector": "identity"}, {"retain": 1.0})
CHANGED = (
    *[None] * 4,
    *(True, {"retain": 0.25}, {"selector": "recent"}, {"selector": "snapkv"}, {"selector": "random"}),
    *({"selector": "random", "seed": 3}, {"prefix": "exact"}),
)
BAD_OPTIONS = ("odd", 0, [], {"retain": 0}, {"retain": "half"}, {"selector": "no"}, {"window": 32})
BAD_PARAMS = ({"temperature": -1}, {"top_p": 2}, {"max_new_tokens": -1}, {"stop_token_ids": "odd"})
# Empty; no tokens of this model; longer than the context; longer than the pool.
BAD_PROMPTS = ([], [VOCAB], [5, -1], [2**32 + 5], [3] * 9000, [3] * 1600)
# All requests with this processor must name the same ids.
PROCESSOR = {"custom_logit_processor": DisallowedTokensLogitsProcessor.to_str()}
FORBIDDEN = {"token_ids": [7, 11, 13]}
CLOSE = 1e-3  # the float32 noise of other batches is far below; two tokens closer than that may swap


class Torture:
    """``count`` requests to ``server``, and all that an operator can do meanwhile.

    Attributes
    ----------
    seen : Counter
        How often each kind of thing happened.
    exact : list
        Pairs of a body that stock SGLang understands and an answer that must be stock's.
    """

    def __init__(self, server: Server, weights: Path, seed: int, count: int) -> None:
        self.server, self.weights, self.seed, self.count = server, weights, seed, count
        self.seen: Counter[str] = Counter()
        self.acts: tuple[str, ...] = ()  # of the operator
        self.exact: list[tuple[dict[str, Any], dict[str, Any]]] = []
        # Texts to begin with, of which the first four stay, and how their last part was written.
        self.texts = [(prompt(length, seed + length), None) for length in (20, 64, 100, 190)]
        self.left = list(range(count))
        self.busy = CLIENTS
        self.lock = threading.Lock()

    def run(self) -> None:
        """All clients and the operator; raises what the first of them raises."""
        in_parallel([self.client] * CLIENTS + [self.sessions, self.operator])

    def saw(self, what: str) -> None:
        with self.lock:
            self.seen[what] += 1

    # Clients

    def client(self) -> None:
        try:
            while self.left:
                with self.lock:
                    index = self.left.pop() if self.left else None
                if index is not None:
                    rng = random.Random(f"{self.seed}/{index}")
                    (self.bad if rng.random() < 0.1 else self.good)(rng, index)
        finally:
            with self.lock:
                self.busy -= 1

    def bad(self, rng: random.Random, index: int) -> None:
        """Refused, and hurts nobody."""
        params: dict[str, Any] = {"max_new_tokens": 9}
        body: dict[str, Any] = {"input_ids": prompt(30, index), "sampling_params": params}
        kind = rng.randrange(3)
        if kind == 0:
            params["custom_params"] = {"kv_compress": rng.choice(BAD_OPTIONS)}
        elif kind == 1:
            params |= rng.choice(BAD_PARAMS)
        else:
            body["input_ids"] = rng.choice(BAD_PROMPTS)
        body["stream"] = rng.random() < 0.3
        response = self.server.post("/generate", body)
        said = response.text[:300]
        # A stream says it in an event; what waited to be refused may have been aborted first.
        refused = response.status_code == 400 or '"error"' in said or '"type":"abort"' in said
        assert refused, (index, response.status_code, said)
        self.saw("bad")

    def text(self, rng: random.Random, index: int) -> tuple[list[int], Any]:
        """New, tiny, long, shared with others, or going on from an answer; and that answer's option."""
        with self.lock:
            text, option = rng.choice(self.texts[rng.choice([0, -4]) :])
        chance = rng.random()
        if chance < 0.05:
            text = text[:1]
        elif chance < 0.08:
            text = prompt(rng.randrange(LONGEST - 400, LONGEST), index)
        elif chance < 0.2:
            text = text[: rng.randrange(1, len(text) + 1)]
        elif chance < 0.6:
            text = [*text[:400], *prompt(rng.randrange(1, 60), index)]
        return text[:LONGEST], option

    def good(self, rng: random.Random, index: int) -> None:
        """A request of any kind: what comes back is right, or says that it was aborted."""
        text, option = self.text(rng, index)
        if rng.random() < 0.5:
            option = rng.choice(EXACT if rng.random() < 0.5 else CHANGED)
        ask, extra = odd(rng, index)
        params = ask["sampling_params"]
        texts = [text]
        if rng.random() < 0.1:
            texts.append(self.text(rng, index + 1)[0])
        copies = rng.choice([2, 3]) if rng.random() < 0.1 else 1
        if copies == len(texts) == 1:
            extra["rid"] = f"torture-{self.seed}-{index}"

        sent = params | ({"n": copies} if copies > 1 else {})
        sent["custom_params"] = params.get("custom_params", {}) | {"kv_compress": option}
        if ask.get("logprob_start_len", -1) >= min(map(len, texts)):
            ask["logprob_start_len"] = 0
        body = ask | extra | {"sampling_params": sent}
        body["input_ids"] = texts[0] if len(texts) == 1 else texts
        answers = self.answers(rng, body)
        for kind in (*ask, *extra, *params, *({"n"} & sent.keys())):
            self.saw(kind)
        for number, answer in answers.items():
            text = texts[number // copies]
            self.check(ask | {"input_ids": text}, answer, option)
            # Which tokens SGLang counts for a penalty depends on the steps in flight, also without us.
            steady = not params["temperature"] and "frequency_penalty" not in params
            if steady and option in EXACT:
                self.exact.append((ask | {"input_ids": text}, answer))
            with self.lock:
                self.texts[4:] = [*self.texts[4:][-20:], (text + answer["output_ids"], option)]
        if len(answers) == 1 and rng.random() < 0.3:
            self.next_turn(text + answer["output_ids"] + prompt(9, index), option)

    def next_turn(self, text: list[int], option: Any) -> None:
        """The client goes on at once, before an operator can flush what is to be reused."""
        params = {"max_new_tokens": 50, "temperature": 0, "ignore_eos": True}
        asked = {"input_ids": text[:LONGEST], "sampling_params": params}
        sent = params | {"custom_params": {"kv_compress": option}}
        response = self.server.post("/generate", asked | {"sampling_params": sent})
        assert response.status_code == 200, response.text[:300]
        self.check(asked, response.json(), option)
        if option in EXACT:
            self.exact.append((asked, response.json()))
        self.saw("next turn")

    def answers(self, rng: random.Random, body: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """All answers by their place in the request; none where the client hangs up."""
        patience = rng.randrange(1, 60) if rng.random() < 0.25 else None
        if "stream" not in body:
            try:
                wait = 300 if patience is None else patience / 40
                response = requests.post(self.server.url + "/generate", json=body, timeout=wait)
            except requests.ReadTimeout:
                self.saw("hang-up without a stream")
                return {}
            assert response.status_code == 200, (body, response.text[:500])
            found = response.json()
            return dict(enumerate(found if isinstance(found, list) else [found]))
        latest: dict[int, dict[str, Any]] = {}
        with self.server.post("/generate", body, stream=True) as response:
            for count, line in enumerate(response.iter_lines()):
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[len(b"data: ") :])
                    assert "error" not in chunk, (body, chunk)
                    latest[chunk.get("index", 0)] = chunk
                if count == patience and "rid" in body and patience % 2:
                    self.server.post("/abort_request", {"rid": body["rid"]})
                    self.saw("abort by name")
                elif count == patience:
                    self.saw("hang-up in a stream")
                    return {}
        return latest

    def check(self, asked: dict[str, Any], answer: dict[str, Any], option: Any) -> None:
        """What holds for any answer, compressed or not."""
        meta, length = answer["meta_info"], len(answer["output_ids"])
        end, report = meta["finish_reason"]["type"], meta.get("kv_compress")
        self.saw(f"ended by {end}")
        assert end in ("length", "stop", "abort"), meta
        assert length <= asked["sampling_params"]["max_new_tokens"], meta
        if end == "abort":
            return
        if end == "length":
            assert length == asked["sampling_params"]["max_new_tokens"], meta
        # The last token's KV is computed only where the step in flight was not stopped in time.
        tokens = len(asked["input_ids"]) + length
        assert report["logical_length"] in (tokens - 1, tokens), (asked, report)
        removed = report["logical_length"] - report["kv_slots_held"]
        reused = report["reused_tokens"] - report["reused_slots"]
        if not meta["num_retractions"]:  # reused tokens are counted before, and hold for no other row
            assert removed == report["tokens_removed"] + reused, (asked, report)
        assert removed >= 0, (asked, report)
        if option in EXACT:
            assert removed == 0, (asked, report)
        with self.lock:
            self.seen["windows"] += report["windows"]
            self.seen["reused"] += reused > 0
            self.seen["retractions"] += meta["num_retractions"]
        if asked.get("return_logprob"):
            assert len(meta["output_token_logprobs"]) == length, (asked, meta)
            start = asked["logprob_start_len"]
            inputs = len(asked["input_ids"]) - start if start >= 0 else 0
            assert len(meta["input_token_logprobs"]) == inputs, (asked, meta)
        if asked.get("return_hidden_states"):
            assert len(meta["hidden_states"]) == length, asked

    def sessions(self) -> None:
        """Conversations that the server keeps, one after the other."""
        rng = random.Random(f"{self.seed}/sessions")
        while self.busy:
            session = self.server.post("/open_session", {"capacity_of_str_len": 10000}).json()
            option, text, rid = rng.choice([False, None]), [], None
            for _ in range(3):
                more = prompt(rng.randrange(1, 50), rng.randrange(1000))
                params = {"max_new_tokens": 50, "temperature": 0, "ignore_eos": True}
                custom = {"custom_params": {"kv_compress": option}}
                place = {"id": session, "rid": rid, "replace": False}
                response = self.server.post(
                    "/generate",
                    {"input_ids": more, "sampling_params": params | custom, "session_params": place},
                )
                assert response.status_code == 200, response.text[:300]
                answer = response.json()
                text = text + more
                asked = {"input_ids": text, "sampling_params": params}
                self.check(asked, answer, option)
                if option in EXACT:
                    self.exact.append((asked, answer))
                if answer["meta_info"]["finish_reason"]["type"] == "abort":
                    break
                text, rid = text + answer["output_ids"], answer["meta_info"]["id"]
                self.saw("turn of a session")
            self.server.post("/close_session", {"session_id": session})

    # The operator

    def operator(self) -> None:
        """An act for every tenth request, each once before any comes again."""
        rng = random.Random(f"{self.seed}/operator")
        acts: dict[str, Callable[[], None]] = {
            "abort all": self.abort_all,
            "flush": self.flush,
            "new weights": self.load,  # waits until all have ended, and holds up who comes
            "look": self.look,
            "pause abort": lambda: None,
            "pause abort, new weights": self.load,
        }
        for mode in ("retract", "in_place"):
            acts |= {
                f"pause {mode}": lambda: None,
                f"pause {mode}, abort all": self.abort_all,
                f"pause {mode}, flush": self.flush,
                # What runs on keeps its KV, so the cache cannot be flushed.
                f"pause {mode}, new weights": lambda flush=mode == "retract": self.load(flush),
            }
        self.acts = tuple(acts)
        deck: list[str] = []
        next_act = self.count - 10
        while self.busy:
            if len(self.left) > next_act:
                time.sleep(0.01)
                continue
            next_act -= 10
            deck = deck or rng.sample(sorted(acts), len(acts))
            name = deck.pop()
            if not name.startswith("pause"):
                acts[name]()
            else:
                mode = name.split(",")[0].removeprefix("pause ")
                try:
                    self.done("/pause_generation", mode=mode)
                    time.sleep(rng.random() / 2)
                    acts[name]()
                finally:
                    self.done("/continue_generation")
            self.saw(name)

    def done(self, path: str, **body: Any) -> None:
        response = self.server.post(path, body)
        assert response.status_code == 200, (path, body, response.text[:300])

    def abort_all(self) -> None:
        self.done("/abort_request", abort_all=True)

    def flush(self) -> None:
        """Refused while requests run, and nothing happens then."""
        assert self.server.post("/flush_cache", {}).status_code in (200, 400)

    def load(self, flush: bool = True) -> None:
        """Without a flush where the request of a client who has hung up still runs: SGLang waits for
        clients only (``TokenizerManager.model_update_lock``)."""
        body = {"model_path": str(self.weights), "flush_cache": flush}
        response = self.server.post("/update_weights_from_disk", body)
        unflushed = flush and "the cache was not flushed because" in response.text
        assert response.status_code == 200 or unflushed, response.text[:300]

    def look(self) -> None:
        for path in ("/health", "/server_info", "/v1/models"):
            assert requests.get(self.server.url + path, timeout=120).status_code == 200, path


def odd(rng: random.Random, index: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A request without its text: what decides the answer, and what only says how it is handled."""
    params: dict[str, Any] = {
        "max_new_tokens": rng.choice([1, 2, 30, 39, 40, 41, 60, 100, 150]),
        "temperature": rng.choice([0, 0, 0, 1.0]),
        "ignore_eos": rng.random() < 0.7,
    }
    ask: dict[str, Any] = {"sampling_params": params}
    if rng.random() < 0.2:
        params["stop_token_ids"] = prompt(5, index)
    if rng.random() < 0.1:
        params["frequency_penalty"] = 0.5
    if rng.random() < 0.1:
        params["logit_bias"] = {"5": 1.0}
    if rng.random() < 0.4:
        ask["return_logprob"] = True
        ask["logprob_start_len"] = rng.choice([-1, 0, 5])
        ask["top_logprobs_num"] = rng.choice([0, 3])
        if rng.random() < 0.5:
            ask["token_ids_logprob"] = [3, 4, 5]
    if rng.random() < 0.1:
        ask["return_hidden_states"] = True
    if rng.random() < 0.1:
        ask |= PROCESSOR
        params["custom_params"] = FORBIDDEN
    extra: dict[str, Any] = {}
    if rng.random() < 0.7:
        extra["priority"] = rng.randrange(80)
    if rng.random() < 0.05:
        extra["extra_key"] = rng.choice("ab")
    if rng.random() < 0.05:
        extra["cache_salt"] = rng.choice("ab")
    if rng.random() < 0.4:
        extra["stream"] = True
    return ask, extra


def assert_as_stock(stock: Server, exact: list[tuple[dict[str, Any], dict[str, Any]]]) -> int:
    """Every answer is what stock SGLang answers to the same body, as far as the answer goes and up to
    the first token that rounding can turn into another. Returns the tokens compared."""
    stock.flush()

    def ask(body: dict[str, Any]) -> dict[str, Any]:
        more = {"return_logprob": True, "top_logprobs_num": max(2, body.get("top_logprobs_num", 0))}
        response = stock.post("/generate", body | more)
        assert response.status_code == 200, (body, response.text[:300])
        return response.json()

    compared = 0
    for start in range(0, len(exact), CLIENTS):
        part = exact[start : start + CLIENTS]
        truths = in_parallel([lambda body=body: ask(body) for body, _ in part])
        for (body, answer), truth in zip(part, truths, strict=True):
            compared += compare(body, answer, truth)
    return compared


def compare(body: dict[str, Any], answer: dict[str, Any], truth: dict[str, Any]) -> int:
    ours, theirs = answer["meta_info"], truth["meta_info"]
    tops = theirs["output_top_logprobs"]
    close = [step for step, (first, second, *_) in enumerate(tops) if first[0] - second[0] < CLOSE]
    safe = min([*close, len(tops)])
    length = min(safe, len(answer["output_ids"]))
    assert answer["output_ids"][:length] == truth["output_ids"][:length], (body, answer, truth)
    aborted = ours["finish_reason"]["type"] == "abort"
    if safe == len(tops) and not aborted:
        assert answer["output_ids"] == truth["output_ids"], (body, answer, truth)
        assert ours["finish_reason"] == theirs["finish_reason"]
    if aborted:
        return length
    if body.get("return_logprob"):
        fields = ["token_logprobs"]
        fields += ["token_ids_logprobs"] * ("token_ids_logprob" in body)
        fields += ["top_logprobs"] * (body["top_logprobs_num"] > 0)
        for field in fields:
            for side, end in (("input", None), ("output", length)):
                name = f"{side}_{field}"
                mine, stocks = values(ours[name][:end]), values(theirs[name][:end])
                assert mine == pytest.approx(stocks, abs=CLOSE), (name, body)
    if body.get("return_hidden_states"):
        for step in range(length):
            mine, stocks = (last_state(meta["hidden_states"][step]) for meta in (ours, theirs))
            assert mine == pytest.approx(stocks, abs=CLOSE), (step, body)
    return length


def last_state(states: list) -> list[float]:
    """The hidden state that gave a token: a prefill, also that of a retracted request, has many."""
    return states[-1] if isinstance(states[0], list) else states


def values(entries: list) -> list[float]:
    """The log-probabilities in nested ``[value, id, text]``; a prompt's first token has none."""
    found: list[float] = []
    for entry in entries:
        if entry is not None and isinstance(entry[0], list):
            found += values(entry)
        elif entry is not None and entry[0] is not None:
            found.append(entry[0])
    return found
