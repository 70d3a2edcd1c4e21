"""Which tokens are one word, which words one phrase, and that phrases compete where they are asked to."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import scfg_tiny as tiny
import torch

from adapters.text import TextRule, ruled
from scfg import ScfgError, SemanticCFG, Word, attach, place_of, prompt_phrases, prompt_words


def phrases(prompt: str) -> list[str]:
    return [phrase.text for phrase in prompt_phrases([Word(text, (i,)) for i, text in enumerate(prompt.split())])]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red dog and a blue cat on the grass", ["red dog", "blue cat", "grass"]),
        ("A small boat to the left of a fish", ["small boat", "fish"]),
        ("a left shoe , an old wooden clock", ["left shoe", "old wooden clock"]),
        ("dog", ["dog"]),
        ("on the", ["on", "the"]),  # nothing else could compete
    ],
)
def test_phrases_lie_between_joining_words(prompt, expected):
    assert phrases(prompt) == expected


def test_a_phrase_has_its_words_positions():
    assert prompt_phrases([Word("red", (1,)), Word("dachshund", (2, 3))]) == [Word("red dachshund", (1, 2, 3))]


def test_phrases_compete_instead_of_words():
    pipe = tiny.sd(**tiny.text_parts())
    call = tiny.SIZE | {"latents": tiny.noise(), "prompt": "a red cat and a dog"}
    with attach(pipe, SemanticCFG(tokens="phrases"), record=["regions"]) as attached:
        latents = tiny.run_latents(pipe, **call)
    assert attached.trace[0].norms.area.shape == (1, 2)
    assert attached.trace[0].regions.max() < 2
    with attach(pipe, SemanticCFG(tokens="prompt")):
        assert not torch.equal(tiny.run_latents(pipe, **call), latents)


LONG = "red dog a b c d e f red g dog"  # eleven tokens, where a chunk has ten
CHUNKED = 2 * tiny.TEXT


def test_words_of_a_long_prompt_lie_in_their_chunks():
    words = prompt_words(tiny.text_parts()["tokenizer"], LONG, CHUNKED)
    assert [word.text for word in words] == LONG.split()
    assert [word.positions for word in words] == [(n,) for n in (*range(1, 11), tiny.TEXT + 1)]
    spelt = prompt_words(tiny.text_parts()["tokenizer"], "a b c d e f g h i cat", CHUNKED)
    assert spelt[-1] == Word("cat", (10, tiny.TEXT + 1, tiny.TEXT + 2))  # a word may lie across the border
    cut = prompt_words(tiny.text_parts()["tokenizer"], LONG, tiny.TEXT)
    assert [word.text for word in cut] == LONG.split()[:-1]


def test_words_of_a_long_prompt_compete():
    pipe = tiny.sd(**tiny.text_parts())
    call = tiny.SIZE | {"latents": tiny.noise(), "prompt": LONG}
    with attach(pipe, SemanticCFG(tokens="prompt"), record=["regions"]) as cut:
        tiny.run_latents(pipe, **call)
    with ruled(pipe, TextRule(chunks=2)), attach(pipe, SemanticCFG(tokens="prompt"), record=["regions"]) as attached:
        tiny.run_latents(pipe, **call)
        assert [word.text for word in attached.words[0]] == LONG.split()
    assert attached.trace[0].norms.area.shape == (1, len(LONG.split()))
    assert cut.trace[0].norms.area.shape == (1, len(LONG.split()) - 1)


def test_a_word_of_a_further_chunk_has_a_place():
    pipe, prompt, maps = tiny.sd(**tiny.text_parts()), "a b c d e f g h i j red dog", {}
    with ruled(pipe, TextRule(chunks=2)), torch.no_grad():
        call = unet_call(pipe, prompt)
        for word in ("dog", "a"):
            with place_of(pipe, word, soft=True)(call) as found:
                pipe.unet(call.sample, 500, call.context)
                maps[word] = found()
    assert not torch.equal(maps["dog"], maps["a"])
    with pytest.raises(ScfgError, match="none of the words 'dog'"):
        place_of(pipe, "dog")(unet_call(pipe, prompt)).__enter__()


def unet_call(pipe, prompt):
    context, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
    noise = tiny.noise()
    return SimpleNamespace(
        unet=pipe.unet,
        sample=torch.cat([noise, noise]),
        context=torch.cat([context, context]),
        images=1,
        prompts=[prompt],
    )
