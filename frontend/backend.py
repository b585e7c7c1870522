"""A backend for SGLang's frontend language that keeps token ids and passes ``kv_compress`` options.

::

    import sglang as sgl
    from kara_sglang.frontend.backend import KaraEndpoint, gen

    @sgl.function
    def poem(s, subject):
        s += sgl.user(f"Write a poem about {subject}.")
        s += sgl.assistant(gen("poem", max_tokens=300, kv_compress={"retain": 0.25}))

    endpoint = KaraEndpoint("http://127.0.0.1:30000")
    print(poem.run("bread", backend=endpoint)["poem"])
    print(endpoint.ledger.steps)

Everything that a program has sent or received stays as it was, token for token (``tokens.TokenText``),
so each step's prompt begins with the previous step's prompt and output, and the prefix cache finds
them. What is scored or computed behind a generated text (``select``, ``fork``) is asked for with the
options of the ``gen`` that wrote it: only then does it find the compressed blocks that this one left.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import requests
import sglang as sgl
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.choices import ChoicesDecision, ChoicesSamplingMethod
from sglang.lang.interpreter import StreamExecutor
from sglang.lang.ir import SglExpr, SglSamplingParams, SglSelect

from kara_sglang.config import KaraConfig
from kara_sglang.frontend.records import Ledger, Step
from kara_sglang.frontend.template import TurnTemplate, choose_template
from kara_sglang.frontend.tokens import Tokens, TokenText, decoding
from kara_sglang.options import KEY, RequestOptions

Options = bool | dict[str, Any]  # what the server takes as custom_params.kv_compress


class EndpointError(RuntimeError):
    """The server cannot be reached, or refuses a request: one line."""


@dataclass(frozen=True)
class _GenOptions:
    """What :func:`gen` adds to SGLang's ``gen``.

    SGLang copies a fixed list of sampling fields from an expression to the backend. ``dtype`` is the
    one that never reaches the server as it is, so the additions travel there.
    """

    dtype: type | str | None
    name: str
    kv_compress: Options | None


def gen(
    name: str | None = None,
    max_tokens: int | None = None,
    *,
    kv_compress: Options | None = None,
    **arguments: Any,
) -> SglExpr:
    """``sglang.gen`` with per-request compression options; the step is recorded under ``name``.

    Parameters
    ----------
    name, max_tokens, **arguments
        As for ``sglang.gen``.
    kv_compress : bool or dict, optional
        False leaves this step uncompressed; a dict has the fields that docs/configuration.md lists for
        a request, for example ``{"retain": 0.25}``. Replaces the endpoint's default.

    Raises
    ------
    ValueError
        As the server would with HTTP 400; the message names the field.
    """
    expression = sgl.gen(name, max_tokens, **arguments)
    if isinstance(expression, SglSelect):
        if kv_compress is not None:
            raise ValueError("gen(kv_compress=...) has no effect with choices: nothing is decoded")
        return expression
    params = expression.sampling_params
    params.dtype = _GenOptions(params.dtype, name or "", _checked(kv_compress))
    return expression


class KaraEndpoint(RuntimeEndpoint):
    """A running server, as a backend for programs of SGLang's frontend language.

    Works with any server of SGLang 0.5.22 or 0.5.23; :attr:`settings` is None where it runs without
    this plugin, and such a server refuses compression options here.

    Parameters
    ----------
    url : str
        For example ``http://127.0.0.1:30000``.
    kv_compress : bool or dict, optional
        Options of every ``gen`` that brings none of its own.
    tokenizer : str or transformers.PreTrainedTokenizerBase, optional
        The model's tokenizer, or its folder or hub name; default: the ``tokenizer_path`` that the
        server names, which must then be readable from here.
    chat_template : str, optional
        One of SGLang's templates by name instead of the tokenizer's own.
    api_key : str, optional
        Sent as bearer token.

    Attributes
    ----------
    ledger : Ledger
        What each step cost.
    settings : dict or None
        The plugin's settings on the server.

    Raises
    ------
    EndpointError
        If nobody answers, or not an SGLang server.
    ValueError
        For options, a tokenizer or a template that do not fit.
    """

    def __init__(
        self,
        url: str,
        *,
        kv_compress: Options | None = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        api_key: str | None = None,
    ) -> None:
        # RuntimeEndpoint.__init__ would choose a template by the model's name; its own parent does not.
        super(RuntimeEndpoint, self).__init__()
        self.base_url = url.rstrip("/")
        self.api_key, self.verify = api_key, None
        try:
            self.model_info = self._call("/model_info").json()
            server_info = self._call("/server_info").json()
            internal = server_info["internal_states"][0].get("kv_compress")
            self._has_tokenizer = not server_info["skip_tokenizer_init"]
            self._incremental = server_info["incremental_streaming_output"]
            path = self.model_info["tokenizer_path"]
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise EndpointError(
                f"{self.base_url} does not answer like a server of SGLang 0.5.22 or 0.5.23"
            ) from error
        self.settings: dict[str, Any] | None = internal["settings"] if internal else None
        self.kv_compress = self._accepted(_checked(kv_compress))
        if tokenizer is None or isinstance(tokenizer, str):
            tokenizer = _load_tokenizer(tokenizer or path, server_info.get("revision"))
        self.tokens = Tokens(tokenizer)
        self.chat_template = choose_template(chat_template, tokenizer, self.model_info["model_path"])
        self.ledger = Ledger()

    # -- what SGLang's interpreter calls -------------------------------------------------------------

    def generate(
        self, s: StreamExecutor, sampling_params: SglSamplingParams
    ) -> tuple[str, dict[str, Any]]:
        """One ``gen``: returns the text with its ids, and ``meta_info``."""
        name, body = self._body(s, sampling_params)
        start = time.perf_counter()
        with self.ledger.request(name):
            answer = self._call("/generate", body).json()
        return self._finished(name, s, body, answer, start), answer["meta_info"]

    def generate_stream(
        self, s: StreamExecutor, sampling_params: SglSamplingParams
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """One ``gen`` of a program run with ``stream=True``: yields new text and ``meta_info``."""
        name, body = self._body(s, sampling_params)
        prompt = s.text_
        text, meta_info = "", None
        ids: list[int] = []
        start = time.perf_counter()
        with self.ledger.request(name):
            for chunk in self._events(body | {"stream": True}):
                meta_info = chunk["meta_info"]
                ids = ids + chunk["output_ids"] if self._incremental else chunk["output_ids"]
                said = chunk.get("text", "")
                new = said if self._incremental else said[len(text) :]
                text += new
                yield new, meta_info
        if meta_info is None:
            raise EndpointError(f"{self.base_url} ended a stream without an answer")
        answer = {"output_ids": ids, "meta_info": meta_info} | (
            {"text": text} if self._has_tokenizer else {}
        )
        whole = self._finished(name, s, body, answer, start)
        if self._has_tokenizer:
            s.text_ = prompt + whole  # the interpreter put it together from the plain texts above
        else:
            yield whole, meta_info

    def select(
        self,
        s: StreamExecutor,
        choices: list[str],
        temperature: float,
        choices_method: ChoicesSamplingMethod,
    ) -> ChoicesDecision:
        """The likeliest of ``choices`` behind the text so far.

        Each choice is tokenised on its own and so are its ids if it wins: write a space that belongs to
        the choice into the choice.
        """
        if temperature > 1e-5:
            raise ValueError(f"select(temperature={temperature}) must be 0: it compares probabilities")
        if not all(choices):
            raise ValueError(f"select(choices={choices}) must not hold an empty choice")
        self._fix(s)
        prompt = s.text_.ids
        texts = [self.tokens.fixed(choice, start=False) for choice in choices]
        start = time.perf_counter()
        with self.ledger.request("select"):
            params = self._custom_params(s)
            first = self._scored(prompt, params)  # puts the prompt into the cache for all choices
            answers = self._scored(
                [prompt + text.ids for text in texts],
                params,
                logprob_start_len=len(prompt) - 1,
                return_text_in_logprobs=self._has_tokenizer,
            )
            logprobs = [
                answer["meta_info"]["input_token_logprobs"][-len(text.ids) :]
                for answer, text in zip(answers, texts, strict=True)
            ]
            unconditional = None
            if choices_method.requires_unconditional_logprobs:
                unconditional = [
                    answer["meta_info"]["input_token_logprobs"]
                    for answer in self._scored(
                        [text.ids for text in texts], params, logprob_start_len=0
                    )
                ]
        decision = choices_method(
            choices=texts,
            normalized_prompt_logprobs=[
                float(np.mean([token[0] for token in one])) for one in logprobs
            ],
            input_token_logprobs=logprobs,
            output_token_logprobs=[a["meta_info"]["output_token_logprobs"] for a in answers],
            unconditional_token_logprobs=unconditional,
        )
        self._record("select", "select", s, prompt, first, start, decision.decision.ids)
        return decision

    def commit_lazy_operations(self, s: StreamExecutor) -> None:
        """Before ``fork``: the common text is tokenised and computed once, for all forks."""
        self._fix(s)
        start = time.perf_counter()
        with self.ledger.request("fork"):
            answer = self._scored(s.text_.ids, self._custom_params(s))
        self._record("fork", "fork", s, s.text_.ids, answer, start, ())

    def cache_prefix(self, prefix_str: str) -> None:
        """Before ``run_batch``: computes a prefix that all programs of the batch share."""
        chat = isinstance(self.chat_template, TurnTemplate)
        self._scored(self.tokens.start(prefix_str, chat=chat), _params_of(self.kv_compress))

    # -- requests ------------------------------------------------------------------------------------

    def _fix(self, s: StreamExecutor) -> None:
        """Give all of the program's text its ids, for good."""
        if s.images_:
            raise ValueError("images cannot be sent as token ids; use sglang.RuntimeEndpoint for them")
        chat = isinstance(self.chat_template, TurnTemplate) and bool(s.messages_ or s.cur_role)
        s.text_ = self.tokens.fixed(s.text_, start=True, chat=chat)
        if not s.text_.pieces:
            raise ValueError("a program must write something before its first gen, select or fork")

    def _body(self, s: StreamExecutor, params: SglSamplingParams) -> tuple[str, dict[str, Any]]:
        """Name and request body of one ``gen``."""
        name, options = "", None
        if isinstance(params.dtype, _GenOptions):
            name, options = params.dtype.name, self._accepted(params.dtype.kv_compress)
            params.dtype = params.dtype.dtype
        if params.n > 1:
            raise ValueError(
                f"gen(n={params.n}) is one answer here; s.fork({params.n}) shares the prompt"
            )
        self._handle_dtype_to_regex(params)
        for field in ("stop", "stop_regex", "regex", "json_schema"):
            if getattr(params, field) and not self._has_tokenizer:
                raise ValueError(
                    f"gen({field}=...) needs a tokenizer in the server, which runs with "
                    "--skip-tokenizer-init"
                )
        self._fix(s)
        sampling = decoding() | params.to_srt_kwargs()
        if s.cur_role == "assistant":
            sampling["stop_token_ids"] = [*(params.stop_token_ids or ()), *self._end_of_turn(s)]
        options = self.kv_compress if options is None else options
        sampling |= {"custom_params": _params_of(options)}
        body = {"input_ids": s.text_.ids, "sampling_params": sampling}
        for field in (
            *("return_logprob", "logprob_start_len", "top_logprobs_num"),
            "return_text_in_logprobs",
        ):
            if (value := getattr(params, field)) is not None:
                body[field] = value
        return name, body

    def _end_of_turn(self, s: StreamExecutor) -> list[int]:
        """The special token with which the model's own template ends an assistant's turn."""
        if not isinstance(self.chat_template, TurnTemplate):
            return []
        _, suffix = self.chat_template.get_prefix_and_suffix("assistant", s.messages_)
        return [
            token for token in self.tokens.continuation(suffix)[:1] if self.tokens.is_special(token)
        ]

    def _custom_params(self, s: StreamExecutor) -> dict[str, Any]:
        """Of a request that generates nothing itself: those of the newest ``gen`` in the text."""
        written = s.text_.custom_params
        return _params_of(self.kv_compress) if written is None else written

    def _scored(self, input_ids: list[Any], custom_params: dict[str, Any], **fields: Any) -> Any:
        """Prefill without decoding; with fields, log-probabilities of the input."""
        sampling = {"max_new_tokens": 0, "temperature": 0, "custom_params": custom_params}
        body = {"input_ids": input_ids, "sampling_params": sampling}
        if fields:
            body |= {"return_logprob": True} | fields
        return self._call("/generate", body).json()

    def _finished(
        self, name: str, s: StreamExecutor, body: dict[str, Any], answer: dict[str, Any], start: float
    ) -> TokenText:
        """Record a ``gen``; returns what it wrote."""
        reason = answer["meta_info"]["finish_reason"]
        if reason["type"] == "abort":
            raise EndpointError(f"{self.base_url} aborted a request: {reason.get('message')}")
        prompt = body["input_ids"]
        text = self.tokens.generated(
            prompt,
            answer["output_ids"],
            answer.get("text"),
            reason.get("matched"),
            body["sampling_params"]["custom_params"],
        )
        kept = text.pieces[0].ids if text.pieces else None
        self._record("gen", name, s, prompt, answer, start, kept or ())
        return text

    def _record(
        self,
        kind: str,
        name: str,
        s: StreamExecutor,
        prompt: list[int],
        answer: dict[str, Any],
        start: float,
        output: Sequence[int],
    ) -> None:
        seconds = time.perf_counter() - start
        ids = {"prompt_ids": tuple(prompt), "output_ids": tuple(output)}
        self.ledger.add(Step.of(kind, name, s.sid, answer["meta_info"], seconds=seconds, **ids))

    def _accepted(self, options: Options | None) -> Options | None:
        if options is not None and self.settings is None:
            raise ValueError(
                f"kv_compress={options!r}: the server {self.base_url} runs without --kv-compress and "
                "would ignore it; start it with --kv-compress kara, or leave the option out"
            )
        return options

    def _events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with self._call("/generate", body, stream=True) as response:
            for line in response.iter_lines():
                if line.startswith(b"data:") and line != b"data: [DONE]":
                    event = json.loads(line[5:])
                    if "error" in event:
                        raise EndpointError(f"{self.base_url}: {event['error'].get('message', event)}")
                    yield event

    def _call(self, path: str, body: dict[str, Any] | None = None, **options: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        options |= {"headers": headers, "timeout": (10, None if body else 60)}
        try:
            if body is None:
                response = requests.get(self.base_url + path, **options)
            else:
                response = requests.post(self.base_url + path, json=body, **options)
        except (requests.RequestException, ValueError) as error:
            raise EndpointError(
                f"no server answers at {self.base_url} ({_reason(error)}); start one with `make "
                "serve`, or give its address (http://HOST:PORT)"
            ) from error
        if response.status_code != 200:
            hint = "; give the server's key as api_key" if response.status_code == 401 else ""
            raise EndpointError(
                f"{self.base_url}{path}: HTTP {response.status_code}: {_message(response)}{hint}"
            )
        return response


def _checked(options: Options | None) -> Options | None:
    RequestOptions.parse({KEY: options}, KaraConfig(prefix_reuse="compressed"))
    return options


def _params_of(options: Options | None) -> dict[str, Any]:
    """``custom_params`` of a request with these options; empty where the server's settings hold."""
    return {} if options is None else {KEY: options}


def _load_tokenizer(path: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer: nothing to load from {path!r} here ({str(error).splitlines()[0]}); give the "
            "folder or hub name of the model's tokenizer"
        ) from error


def _reason(error: Exception) -> str:
    """The innermost cause of a failed connection, without requests' wrapping."""
    while isinstance(inner := getattr(error, "reason", None) or (error.args or [None])[0], Exception):
        error = inner
    return str(error).rpartition(": ")[2] or type(error).__name__


def _message(response: requests.Response) -> str:
    try:
        error = response.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return response.text.strip()[:200] or "no message"
