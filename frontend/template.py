"""The model's own chat template, applied turn by turn as SGLang's frontend language asks for it.

SGLang's frontend knows some twenty templates by model name and has a default for all others. Every
instruction model ships its template (Jinja) with its tokenizer; here each role's prefix and suffix
are cut out of what that renders.
"""

from __future__ import annotations

from typing import Any

from sglang.lang.chat_template import (
    ChatTemplate,
    chat_template_registry,
    get_chat_template_by_model_path,
)


class TurnTemplate(ChatTemplate):
    """A tokenizer's chat template as SGLang's ``ChatTemplate``.

    Only what stands *around* a turn is taken from the template, never what it would make of earlier
    turns: text that has been sent stays as it is (some templates drop earlier reasoning, which would
    change the prompt's beginning and so lose the prefix cache).

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        With a ``chat_template``.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(
            "tokenizer", default_system_prompt=None, role_prefix_and_suffix={}, stop_str=[]
        )
        self._tokenizer = tokenizer

    def get_prefix_and_suffix(self, role: str, hist_messages: list[dict[str, Any]]) -> tuple[str, str]:
        """What stands before and after a turn of ``role`` behind ``hist_messages`` (roles count only).

        An assistant's prefix is the template's generation prompt: what the model sees when it is asked.

        Raises
        ------
        ValueError
            If the template refuses these roles, or writes an earlier turn's end differently once
            another turn follows.
        """
        roles = [message["role"] for message in hist_messages]
        before = self._after_last_turn(roles)
        turn = [*roles, role]
        if role == "assistant":
            opened = self._after_last_turn(roles, add_generation_prompt=True)
        else:
            opened = self._between(turn, len(roles))
        if not opened.startswith(before):
            raise ValueError(
                f"the model's chat template cannot be applied turn by turn (it changes the end of the "
                f"turn before {role!r}); choose one of SGLang's with chat_template=NAME"
            )
        return opened[len(before) :], self._after_last_turn(turn)

    def _after_last_turn(self, roles: list[str], **options: bool) -> str:
        if not roles and not options:
            return ""
        return self._render(roles, **options).rpartition(_mark(len(roles) - 1))[2]

    def _between(self, roles: list[str], turn: int) -> str:
        """What stands between the contents of turn ``turn - 1`` and ``turn``."""
        head = self._render(roles).partition(_mark(turn))[0]
        return head.rpartition(_mark(turn - 1))[2] if turn else head

    def _render(self, roles: list[str], **options: bool) -> str:
        messages = [{"role": role, "content": _mark(turn)} for turn, role in enumerate(roles)]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # Jinja's own, and whatever raise_exception() of a template raises
            raise ValueError(
                f"the model's chat template refuses the turns {roles}: {error}; change the program or "
                "choose one of SGLang's templates with chat_template=NAME"
            ) from error
        if messages and messages[-1]["content"] not in text:
            raise ValueError(
                f"the model's chat template leaves out the last of the turns {roles}; choose one of "
                "SGLang's with chat_template=NAME"
            )
        return text


def choose_template(name: str | None, tokenizer: Any, model_path: str) -> ChatTemplate:
    """SGLang's template ``name`` if given, else the tokenizer's, else SGLang's guess by model name."""
    if name is not None:
        if name not in chat_template_registry:
            known = ", ".join(sorted(chat_template_registry))
            raise ValueError(f"chat_template {name!r} is unknown; SGLang has {known}")
        return chat_template_registry[name]
    if tokenizer.chat_template:
        return TurnTemplate(tokenizer)
    return get_chat_template_by_model_path(model_path)


def _mark(turn: int) -> str:
    return f"@turn{turn}@"
