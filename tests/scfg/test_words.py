"""Which tokens are one word, which words one phrase, and that phrases compete where they are asked to."""

from __future__ import annotations

import pytest
import scfg_tiny as tiny
import torch

from scfg import SemanticCFG, Word, attach, prompt_phrases


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
