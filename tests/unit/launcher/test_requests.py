"""What the launcher looks at in each request: its options, and the ids of its prompt."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from kara_sglang import plugin
from kara_sglang.config import KaraConfig
from kara_sglang.launcher import requests
from kara_sglang.options import KEY

CONFIG = KaraConfig()


def test_the_parent_checks_only_where_compression_is_on() -> None:
    """A stock server ignores the key; a compressing one refuses what is wrong with it."""

    class Params:
        custom_params: ClassVar = {KEY: {"retain": 7}}

    requests.verify_sampling_params(None, Params(), 32000)
    plugin.activate(CONFIG)  # for a server that is not launched yet
    requests.verify_sampling_params(None, Params(), 32000)
    plugin.set_launched(CONFIG)
    plugin.activate(None)  # too late for the server that runs
    with pytest.raises(ValueError, match=r"kv_compress\.retain must be a share"):
        requests.verify_sampling_params(None, Params(), 32000)


MANAGER = SimpleNamespace(model_config=SimpleNamespace(vocab_size=100))


def check_input(ids: Any, given: Any = None, session: Any = None) -> None:
    """As SGLang's tokenizer manager calls it: ``ids`` of the prompt, ``given`` by the client."""
    requests.check_input(MANAGER, SimpleNamespace(input_ids=given, session_params=session), ids)


@pytest.mark.parametrize("mode", ["exact", "compressed", "auto"])
@pytest.mark.parametrize(
    "ids,shown",
    [
        ([0, 100], "holds 100 at position 1; the tokens of this model are 0 to 99"),
        ([-1], "holds -1 at position 0"),
        ([5, 2**32, -7], "holds 4294967296 at position 1"),
        ([2**63], "holds something else than token ids"),
        ([1.0], "holds something else than token ids"),
        ([1, [2]], "holds something else than token ids"),
        ([1, "2"], "holds something else than token ids"),
    ],
)
def test_ids_that_are_no_tokens_are_refused(mode: str, ids: list, shown: str) -> None:
    """In one line that names the field; on a server without compression SGLang decides alone."""
    check_input(ids, ids)
    plugin.set_launched(KaraConfig(prefix_reuse=mode))
    with pytest.raises(ValueError, match=r"^input_ids \(prompt on OpenAI routes\) ") as raised:
        check_input(ids, ids)
    assert shown in str(raised.value)


def test_tokens_pass() -> None:
    """What a client sends as ids, and what the tokenizer has made of a text."""
    plugin.set_launched(KaraConfig())
    for ids in ([0], [99, 0, 99], np.arange(100)):
        check_input(ids, ids)
    check_input([5, 7])
    check_input(None)  # embeddings, without ids


def test_empty_prompts_are_refused_unless_a_session_fills_them() -> None:
    plugin.set_launched(KaraConfig())
    for sent in (None, []):
        with pytest.raises(ValueError, match="empty"):
            check_input([], sent)
        with pytest.raises(ValueError, match="empty"):
            check_input([], sent, {"id": None})
        check_input([], sent, {"id": "s"})
