"""What a user gets from `make serve`: a real model, real HTTP, compression that shows."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
import requests
from places import ROOT
from server import Server, in_parallel

from kara_sglang.trace.format import file_name

QUESTION = [{"role": "user", "content": "Tell me about the history of bread, in detail."}]


def chat(server: Server, *, tokens: int, **extra: object) -> requests.Response:
    body = {
        "model": "default",
        "messages": QUESTION,
        "max_tokens": tokens,
        "temperature": 0.7,
        "ignore_eos": True,
        "return_meta_info": True,
    }
    return server.post("/v1/chat/completions", body | extra)


def test_the_printed_curl_line_works(smollm2: Server) -> None:
    """The line that `make serve` prints is run as it stands; its answer shows windows."""
    line = re.search(r"^curl .*$", smollm2.log_text(), re.MULTILINE)
    assert line is not None, smollm2.log_text()[-2000:]
    answer = json.loads(subprocess.check_output(shlex.split(line[0]), timeout=300))
    report = answer["choices"][0]["meta_info"]["kv_compress"]
    # The model may end its answer early; every 64 kept tokens stand for a window of 128.
    assert report["logical_length"] == report["kv_slots_held"] + 64 * report["windows"]
    if answer["usage"]["completion_tokens"] > 250:
        assert report["windows"] >= 1


def documented(page: str) -> list[str]:
    """The words of the command with ``curl`` in a page."""
    (line,) = re.findall(r"^curl .*?\}'$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return shlex.split(line)


def test_the_readmes_request_and_the_report_beside_it(smollm2: Server) -> None:
    """Run as it stands but for the port: opted out; the same without that is compressed as printed."""
    words = [word.replace("http://127.0.0.1:30000", smollm2.url) for word in documented("README.md")]
    answer = json.loads(subprocess.check_output(words, timeout=300))
    report = answer["choices"][0]["meta_info"]["kv_compress"]
    assert report["windows"] == 0 and report["kv_slots_held"] == report["logical_length"]
    body = json.loads(words[-1])
    del body["custom_params"]
    answer = smollm2.post("/v1/chat/completions", body | {"ignore_eos": True}).json()
    printed = re.search(
        r"^```json\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert printed is not None
    assert answer["choices"][0]["meta_info"]["kv_compress"] == json.loads(printed[1])


def test_the_request_on_the_page_of_usage(smollm2: Server) -> None:
    words = [
        word.replace("http://127.0.0.1:30000", smollm2.url) for word in documented("docs/usage.md")
    ]
    answer = json.loads(subprocess.check_output(words, timeout=300))
    assert answer["meta_info"]["kv_compress"]["retained"] == 0.25


def test_long_chat_answer_is_compressed(smollm2: Server) -> None:
    """Windows in meta_info, in the log line and in /server_info."""
    before = smollm2.state()
    answer = chat(smollm2, tokens=400).json()["choices"][0]
    report = answer["meta_info"]["kv_compress"]
    assert report["windows"] == 2
    assert report["tokens_removed"] == 128
    assert report["retained"] == 0.5
    assert report["kv_slots_held"] == report["logical_length"] - 128
    after = smollm2.state()
    assert after["windows"] - before["windows"] == 2
    assert after["slots_freed"] - before["slots_freed"] == 128
    assert after["settings"]["window"] == 128
    assert after["kernels"] == "torch"
    assert re.search(
        r"Decode batch.*kv-compress: 0\.\d\d held \(#window: \d+, #without-queries: 0, #freed: \d+\)",
        smollm2.log_text(),
    )


def test_streaming_reports_in_the_last_chunk(smollm2: Server) -> None:
    body = {
        "text": "Once upon a time",
        "sampling_params": {
            "max_new_tokens": 220,
            "ignore_eos": True,
            "custom_params": {"kv_compress": {"selector": "recent", "retain": 0.25}},
        },
        "stream": True,
    }
    with smollm2.post("/generate", body, stream=True) as response:
        lines = [line[6:] for line in response.iter_lines(decode_unicode=True) if line]
    assert lines[-1] == "[DONE]"
    reports = [json.loads(line)["meta_info"].get("kv_compress") for line in lines[:-1]]
    assert reports[:-1] == [None] * (len(reports) - 1)
    assert reports[-1]["windows"] == 1
    assert reports[-1]["retained"] == 0.25


@pytest.mark.parametrize(
    ("option", "field"),
    [
        ({"retain": 1.5}, "kv_compress.retain"),
        ({"retain": "half"}, "kv_compress.retain"),
        ({"selector": "best"}, "kv_compress.selector"),
        ({"window": 64}, "kv_compress.window"),
        ("yes", "kv_compress"),
    ],
)
def test_bad_options_are_refused_with_400(smollm2: Server, option: object, field: str) -> None:
    """Every route says which field is wrong."""
    custom = {"kv_compress": option}
    routes = {
        "/generate": {"text": "a", "sampling_params": {"custom_params": custom}},
        "/v1/completions": {"model": "m", "prompt": "a", "custom_params": custom},
        "/v1/chat/completions": {"model": "m", "messages": QUESTION, "custom_params": custom},
    }
    for route, body in routes.items():
        response = smollm2.post(route, body)
        assert response.status_code == 400, route
        assert field in response.text, route
    streamed = smollm2.post("/generate", routes["/generate"] | {"stream": True})
    assert '"code":400' in streamed.text
    assert field in streamed.text


VOCAB = 49152  # of SmolLM2


@pytest.mark.parametrize("ident", [-1, VOCAB, 2**32 - 1, 2**32, 2**62])
def test_ids_that_are_no_tokens_are_refused_with_400(smollm2: Server, ident: int) -> None:
    """Wherever a client can send ids; SGLang itself does not look at them."""
    session = smollm2.post("/open_session", {"capacity_of_str_len": 1000}).json()
    two = {"max_new_tokens": 2}
    wrong = [5, ident, 5]
    routes = (
        ("/generate", {"input_ids": wrong, "sampling_params": two}),
        ("/generate", {"input_ids": [[5, 5], wrong], "sampling_params": two}),
        ("/generate", {"input_ids": wrong, "sampling_params": two | {"n": 2}}),
        ("/generate", {"input_ids": wrong, "sampling_params": two, "session_params": {"id": session}}),
        ("/v1/completions", {"model": "m", "prompt": wrong, "max_tokens": 2}),
        ("/v1/completions", {"model": "m", "prompt": [[5, 5], wrong], "max_tokens": 2}),
        ("/v1/chat/completions", {"model": "m", "messages": QUESTION, "input_ids": wrong}),
    )
    for route, body in routes:
        response = smollm2.post(route, body)
        assert response.status_code == 400, (route, body)
        assert f"input_ids (prompt on OpenAI routes) holds {ident} at position 1" in response.text
    assert smollm2.post("/close_session", {"session_id": session}).status_code == 200
    body = {"input_ids": [5, VOCAB - 1, 0], "sampling_params": two}
    assert smollm2.post("/generate", body).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {"text": ""},
        {"text": ["a", ""]},
        {"text": "", "sampling_params": {"n": 2}},
        {"input_ids": []},
        {"input_ids": [[5], []]},
        {"input_ids": [[]]},
    ],
)
def test_empty_prompts_are_refused_with_400(smollm2: Server, body: dict) -> None:
    """Without the check the CPU engine dies of one, stock SGLang's as well."""
    body = {"sampling_params": {"max_new_tokens": 2}} | body
    response = smollm2.post("/generate", body)
    assert (response.status_code, "empty" in response.text) == (400, True), response.text
    streamed = smollm2.post("/generate", body | {"stream": True})
    assert '"code":400' in streamed.text or streamed.status_code == 400


def test_empty_prompts_of_openais_route_hurt_nobody_else(smollm2: Server) -> None:
    for prompt in ("", [], [[5], []]):
        body = {"model": "m", "prompt": prompt, "max_tokens": 2}
        assert smollm2.post("/v1/completions", body).status_code == 400, prompt
    assert smollm2.post("/generate", {"text": "a"}).status_code == 200


def test_bad_request_hurts_nobody_else(smollm2: Server) -> None:
    """Good requests around a bad one are answered in full."""
    calls = [
        lambda: chat(smollm2, tokens=60),
        lambda: chat(smollm2, tokens=60, custom_params={"kv_compress": {"retain": -1}}),
        lambda: chat(smollm2, tokens=60, custom_params={"kv_compress": False}),
    ]
    good, bad, opted_out = in_parallel(calls)
    assert bad.status_code == 400
    for response in (good, opted_out):
        assert response.json()["usage"]["completion_tokens"] == 60


def test_openai_routes_take_options(smollm2: Server) -> None:
    answer = chat(smollm2, tokens=230, custom_params={"kv_compress": {"retain": 0.25}}).json()
    assert answer["choices"][0]["meta_info"]["kv_compress"]["retained"] == 0.25


def test_the_page_of_a_trace_shows_the_answer(smollm2: Server, logs: Path) -> None:
    """`python -m kara_sglang.trace show` finds the tokenizer by itself; its text is the answer's."""
    answer = chat(smollm2, tokens=400).json()
    path = logs / "smollm2-traces" / file_name(answer["id"])
    command = (sys.executable, "-m", "kara_sglang.trace", "show", str(path))
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    html = Path(shown.stdout.strip()).read_text()
    article = html.split("<article>")[1].split("</article>")[0]
    text = re.sub(r"<h2>.*?</h2>|<[^>]*>|(?<=</section>)\n", "", article).replace("\u21b5\n", "\n")
    special = r"<\|\w+\|>"
    content = answer["choices"][0]["message"]["content"]
    assert re.sub(special, "", content) in re.sub(special, "", unescape(text))
    assert article.count("<section class=window ") == 2


def test_metrics_agree_with_totals(smollm2: Server) -> None:
    """Prometheus says what /server_info says; idle gauges are back at zero."""
    chat(smollm2, tokens=230)
    chat(smollm2, tokens=60, custom_params={"kv_compress": False})
    text = requests.get(smollm2.url + "/metrics", timeout=60).text
    state = smollm2.state()

    def value(name: str) -> float:
        found = re.findall(rf"^sglang:kv_compress_{name}\{{.*\}} (\S+)$", text, re.MULTILINE)
        assert len(found) == 1, f"{name}: {found}"
        return float(found[0])

    assert value("passes_total") == state["passes"] > 0
    assert value("windows_total") == state["windows"] > 0
    assert value("slots_freed_total") == state["slots_freed"] > 0
    assert value("pass_seconds_total") == pytest.approx(state["pass_seconds"])
    assert value("recorders_in_use") == value("held_tokens") == value("logical_tokens") == 0
    assert 'reason="opt_out"' in text
    smollm2.assert_nothing_leaked()
