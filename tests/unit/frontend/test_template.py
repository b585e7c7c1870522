"""``frontend.template``: turn by turn, the tokenizer's own chat template comes out."""

from __future__ import annotations

import pytest
from sglang.lang.chat_template import get_chat_template
from transformers import PreTrainedTokenizerFast

from kara_sglang.frontend.template import TurnTemplate, choose_template

LLAMA3 = (
    "{{ '<s>' }}{% for m in messages %}"
    "<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
# Drops the reasoning of earlier turns, and opens it for the next one: as Qwen3 and DeepSeek-R1 do.
THINKING = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "<A>{% if not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}<think></think>{{ m['content'] }}{% endif %}</A>"
    "{% else %}<U>{{ m['content'] }}</U>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "[{{ m['content'] }}]{% endfor %}"
)
END_ONLY_AT_THE_END = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}<END>"


def template(source: str, tokenizer: PreTrainedTokenizerFast) -> TurnTemplate:
    class Fixed:
        chat_template = source

        def apply_chat_template(self, messages: list, **options: bool) -> str:
            return tokenizer.apply_chat_template(messages, chat_template=source, **options)

    return TurnTemplate(Fixed())


def spoken(turns: TurnTemplate, messages: list[dict]) -> str:
    """As SGLang's interpreter writes it: prefix, content, suffix per turn."""
    text, history = "", []
    for message in messages:
        prefix, suffix = turns.get_prefix_and_suffix(message["role"], history)
        text += prefix + message["content"] + suffix
        history.append(message)
    return text


def talk(*roles: str) -> list[dict]:
    return [{"role": role, "content": f"{role} says {turn}"} for turn, role in enumerate(roles)]


@pytest.mark.parametrize("source", [LLAMA3, None], ids=["llama3", "default system prompt"])
@pytest.mark.parametrize(
    "roles", [("user", "assistant", "user", "assistant"), ("system", "user", "assistant", "user")]
)
def test_it_writes_what_the_template_writes(source, roles, tiny_tokenizer) -> None:
    turns = template(source or tiny_tokenizer.chat_template, tiny_tokenizer)
    expected = turns._tokenizer.apply_chat_template(talk(*roles), tokenize=False)
    assert spoken(turns, talk(*roles)) == expected


def test_the_generation_prompt_opens_the_assistants_turn(tiny_tokenizer) -> None:
    turns = template(THINKING, tiny_tokenizer)
    assert turns.get_prefix_and_suffix("assistant", talk("user")) == ("<A><think>\n", "</A>")
    # What has been said stays; the next turn is added behind it.
    assert turns.get_prefix_and_suffix("user", talk("user", "assistant")) == ("<U>", "</U>")


@pytest.mark.parametrize(
    ("source", "roles", "message"),
    [
        (NO_SYSTEM, ("system",), "no system role"),
        (END_ONLY_AT_THE_END, ("user", "user"), "cannot be applied turn by turn"),
        ("{{ messages[0]['content'] }}", ("user", "user"), "leaves out the last"),
    ],
)
def test_templates_that_do_not_fit_are_refused(source, roles, message, tiny_tokenizer) -> None:
    with pytest.raises(ValueError, match=rf"{message}.*chat_template=NAME"):
        spoken(template(source, tiny_tokenizer), talk(*roles))


def test_the_choice(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert isinstance(choose_template(None, tiny_tokenizer, "any"), TurnTemplate)
    assert choose_template("chatml", tiny_tokenizer, "any") is get_chat_template("chatml")
    with pytest.raises(ValueError, match=r"chat_template 'best' is unknown; SGLang has .*chatml"):
        choose_template("best", tiny_tokenizer, "any")

    class Base:
        chat_template = None

    assert choose_template(None, Base(), "org/llama-3-8b-instruct").name == "llama-3-instruct"
