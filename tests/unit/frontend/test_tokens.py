"""``frontend.tokens``: a text that carries its ids through all that SGLang's interpreter does to it."""

from __future__ import annotations

import copy
import json
import random

import pytest
from transformers import PreTrainedTokenizerFast

from kara_sglang.frontend.tokens import Piece, Tokens, TokenText


def sent(text: str, *ids: int) -> TokenText:
    return TokenText(pieces=[Piece(text, ids)])


@pytest.fixture(scope="module")
def tokens(tiny_tokenizer: PreTrainedTokenizerFast) -> Tokens:
    return Tokens(tiny_tokenizer)


def test_it_is_a_str() -> None:
    text = sent("ab", 1) + "cd"
    assert text == "abcd" and hash(text) == hash("abcd") and len(text) == 4
    assert json.dumps(text) == '"abcd"'
    assert type(f"{text}!") is str and type(text.strip()) is str


def test_ids_go_where_the_interpreter_carries_the_text() -> None:
    """The operations of ``StreamExecutor``: +=, str(), text_ = "" + ..., deep copies."""
    text = "" + sent("ab", 1, 2)
    text += "x"
    text += "y"
    text += sent("cd", 3)
    assert text.pieces == (Piece("ab", (1, 2)), Piece("xy", None), Piece("cd", (3,)))
    assert str(text) is text
    assert copy.deepcopy(text).pieces == text.pieces
    with pytest.raises(ValueError, match="not tokenised yet"):
        _ = text.ids


def test_expressions_of_the_language_take_over() -> None:
    import sglang as sgl

    expression = sent("ab", 1) + sgl.gen("x")
    assert [type(part).__name__ for part in expression.expr_list] == ["SglConstantText", "SglGen"]
    assert expression.expr_list[0].value.ids == [1]


def test_slices_keep_whole_pieces() -> None:
    text = sent("abc", 1, 2) + "de" + sent("fg", 3)
    assert text[:3].pieces == (Piece("abc", (1, 2)),)
    assert text[5:].pieces == (Piece("fg", (3,)),)
    assert text[1:6].pieces == (Piece("bcdef", None),)
    assert text[-2:].ids == [3]
    assert text[::2] == "aceg" and type(text[0]) is str


def test_what_a_part_was_asked_for_with_goes_with_it(tokens: Tokens) -> None:
    """The newest generated part decides, also where it was asked for with nothing."""
    ids = tokens.continuation("may")
    one = tokens.generated([5], ids, "may", None, {"kv_compress": False})
    other = tokens.generated([5], ids, "may", None, {})
    assert ("You " + one + " copy").custom_params == {"kv_compress": False}
    assert tokens.fixed("You " + one + " copy", start=True).custom_params == {"kv_compress": False}
    assert ("You " + one + other).custom_params == {}
    assert ("You " + other + one)[4:].custom_params == {"kv_compress": False}
    assert tokens.fixed("You may", start=True).custom_params is None


def test_slices_are_those_of_str() -> None:
    rng = random.Random(0)
    for _ in range(500):
        text = TokenText()
        for _ in range(rng.randrange(5)):
            part = "abcdefgh"[: rng.randrange(4)]
            text += sent(part, *range(len(part))) if rng.random() < 0.5 else part
        start, stop = (rng.choice([None, rng.randrange(-9, 20)]) for _ in range(2))
        assert text[start:stop] == str.__str__(text)[start:stop]
        assert "".join(piece.text for piece in text[start:stop].pieces) == text[start:stop]


def test_ids_once_given_stay(tokens: Tokens) -> None:
    """What the model wrote is sent back as it was, not as the tokenizer would write it."""
    word = tokens.continuation("license")
    spelled = [token for letter in "license" for token in tokens.continuation(letter)]
    assert word != spelled
    text = tokens.fixed("The " + sent("license", *spelled) + " is", start=True)
    first, last = tokens.continuation("The "), tokens.continuation(" is")
    assert text.ids == first + spelled + last
    assert tokens.fixed(text + " free", start=True).ids[: len(text.ids)] == text.ids


def test_a_prompt_starts_like_on_the_server(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    from tokenizers.processors import TemplateProcessing

    adding = copy.deepcopy(tiny_tokenizer)
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokens = Tokens(adding)
    assert tokens.start("You may", chat=False) == adding.encode("You may")
    assert tokens.start("You may", chat=False)[0] == 1
    assert tokens.start("<s>You may", chat=False).count(1) == 1
    assert tokens.start("You may", chat=True) == tokens.continuation("You may")


def test_continuations_of_sentencepiece_get_no_space() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = ["<unk>", "\n", "▁", "▁a", "a", "b", "▁b"]
    model = models.Unigram([(token, -1.0 - len(token) / 9) for token in vocabulary], unk_id=0)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    tokens = Tokens(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    text = tokens.fixed(tokens.fixed("a", start=True) + "b a", start=True)
    assert [vocabulary[token] for token in text.ids] == ["▁a", "b", "▁a"]
    assert tokens.generated(text.ids, [6], None, None, {}) == " b"


def test_a_stop_token_is_cut_off(tokens: Tokens) -> None:
    ids = tokens.continuation("You may")
    for text in ("You may", None):
        kept = tokens.generated([5], [*ids, 2], text, 2, {})
        assert kept.pieces == (Piece("You may", tuple(ids), {}),)
    # A length limit cuts nothing, even behind the same token.
    assert tokens.generated([5], [*ids, 2], "You may", None, {}).ids == [*ids, 2]


def test_a_stop_string_inside_a_token_leaves_its_beginning_open(tokens: Tokens) -> None:
    ids = tokens.continuation("any License")
    *before, last = ids
    token = tokens.tokenizer.decode([last])
    assert len(token) > 1
    kept = "any License".removesuffix(token)
    text = tokens.generated([5], ids, kept + token[0], token[1:], {})
    assert text.pieces == (Piece(kept, tuple(before), {}), Piece(token[0], None))
    assert tokens.fixed(text + "!", start=False).ids[: len(before)] == before


def test_half_a_character_before_a_stop_string(tokens: Tokens) -> None:
    """A token that only begins a character decodes to a replacement sign, which is in no text."""
    two = tokens.continuation("é")
    assert len(two) == 2
    text = tokens.generated([5], [*tokens.continuation("a"), two[0]], "a", "é", {})
    assert text.pieces == (Piece("a", tuple(tokens.continuation("a")), {}),)
