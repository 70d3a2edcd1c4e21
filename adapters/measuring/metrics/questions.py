"""Questions to a model that reads pictures and text: VQAScore, and question-based accuracy.

* VQAScore (arXiv:2404.01291): P("Yes") for "Does this figure show ...?".
* TIFA (arXiv:2303.11897): share of a prompt's questions whose most likely choice is the right answer.
* Soft-TIFA of GenEval 2 (arXiv:2512.16853): the mean probability of the right answers instead.

The model may be any image-text-to-text model of transformers. Published figures hold for their own models only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from ...errors import FileError, GainsError
from ...files import read_json
from ..sample import Shot
from .phrases import said_in
from .pretrained import Pretrained

__all__ = ["Question", "QuestionAccuracy", "Reader", "VqaScore", "questions_of", "read_questions"]

YES_OR_NO = ("yes", "no")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a picture, its right answer, and what may be answered."""

    text: str
    answer: str = "yes"
    choices: tuple[str, ...] = YES_OR_NO

    def __post_init__(self) -> None:
        if self.answer not in self.choices or len(set(self.choices)) < 2:
            raise GainsError(f"question {self.text!r}: the answer {self.answer!r} is none of {self.choices}")


def questions_of(prompt: str) -> list[Question]:
    """One question for each thing that a prompt names, and one for each relation; see `phrases`."""
    said = said_in(prompt)
    asked = [
        f"Is there a {thing.phrase} in the picture?"
        if thing.count == 1
        else f"Are there exactly {thing.phrase}s in the picture?"
        for thing in said.things
    ]
    asked += [
        f"Is the {said.things[one].noun} {how} the {said.things[other].noun}?" for one, how, other in said.relations
    ]
    return [Question(text=text) for text in asked or [f'Does the picture show "{prompt}"?']]


def read_questions(file: Path) -> dict[str, list[Question]]:
    """Prompt -> questions, from JSON: {prompt: [{"question": ..., "answer": ..., "choices": [...]}]}.

    Raises:
        FileError: it is not that.
    """
    try:
        found = read_json(file)
        return {
            prompt: [
                Question(
                    text=one["question"],
                    answer=one.get("answer", "yes"),
                    choices=tuple(one.get("choices", YES_OR_NO)),
                )
                for one in asked
            ]
            for prompt, asked in found.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f'{file} must be JSON: prompt -> [{{"question", "answer", "choices"}}] ({error!r})') from error


@dataclass(kw_only=True)
class Reader(Pretrained):
    """An image-text-to-text model: probabilities of the first words of its answers."""

    model_class: ClassVar[str] = "AutoModelForImageTextToText"
    needs: ClassVar[str] = "one that answers in text about pictures (AutoModelForImageTextToText of transformers)"
    batch_size: int = 4

    @cached_property
    def _processor(self) -> Any:
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(self.name)
        processor.tokenizer.padding_side = "left"  # so that the last place is the answer's in every row
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        return processor

    def probabilities(self, images: Sequence[Image.Image], texts: Sequence[str]) -> torch.Tensor:
        """(n, vocabulary): of the next token after each question."""
        rows = []
        for start in range(0, len(texts), self.batch_size):
            part = slice(start, start + self.batch_size)
            given = self._processor(
                text=[self._asked(text) for text in texts[part]],
                images=[[image.convert("RGB")] for image in images[part]],
                padding=True,
                return_tensors="pt",
            ).to(self.device)
            with torch.no_grad():
                rows.append(self._model(**given).logits[:, -1].float().softmax(-1).cpu())
        return torch.cat(rows)

    def _asked(self, text: str) -> str:
        if not getattr(self._processor, "chat_template", None):
            return f"USER: {getattr(self._processor, 'image_token', '<image>')}\n{text} ASSISTANT:"
        content = [{"type": "image"}, {"type": "text", "text": text}]
        turn = [{"role": "user", "content": content}]
        prompt: str = self._processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return prompt

    def of(self, word: str) -> list[int]:
        """Tokens that an answer of this word can begin with: small or capital, after a space or not."""
        tokenizer = self._processor.tokenizer
        spelled = [word, word.capitalize(), f" {word}", f" {word.capitalize()}"]
        begins = [tokenizer(text, add_special_tokens=False).input_ids for text in spelled]
        return sorted({ids[0] for ids in begins if ids} - {tokenizer.unk_token_id})

    def begins(self, question: Question) -> dict[str, list[int]]:
        """Choice of a question -> the tokens that it can begin with, by which it is told from the others.

        Raises:
            GainsError: two choices begin with one token, or this model has no token for the beginning of one.
        """
        found = {choice: self.of(choice) for choice in question.choices}
        tokens = [token for own in found.values() for token in own]
        if len(set(tokens)) < len(tokens) or not all(found.values()):
            raise GainsError(
                f"question {question.text!r}: for this model its choices do not begin with different words"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class VqaScore:
    """P("yes") that a picture shows its prompt, 0 to 1."""

    reader: Reader
    prompt: Callable[[Shot], str] = lambda shot: shot.prompt
    name: str = "VQAScore"
    higher_is_better: bool = True

    def __call__(self, shots: Sequence[Shot]) -> np.ndarray:
        asked = [f'Does this figure show "{self.prompt(shot)}"? Please answer yes or no.' for shot in shots]
        found = self.reader.probabilities([shot.image for shot in shots], asked)
        return found[:, self.reader.of("yes")].sum(1).double().numpy()


@dataclass(frozen=True, kw_only=True)
class QuestionAccuracy:
    """Per picture, the share of its prompt's questions answered rightly (TIFA); or how probably (Soft-TIFA)."""

    reader: Reader
    questions: Mapping[str, Sequence[Question]]
    """By the prompt that `prompt` gives; one that is not there is read by `questions_of`."""
    prompt: Callable[[Shot], str] = lambda shot: shot.prompt
    soft: bool = False
    name: str = "question accuracy"
    higher_is_better: bool = True

    def __call__(self, shots: Sequence[Shot]) -> np.ndarray:
        asked = [self.questions.get(self.prompt(shot)) or questions_of(self.prompt(shot)) for shot in shots]
        flat = [(shot.image, question) for shot, own in zip(shots, asked, strict=True) for question in own]
        found = self.reader.probabilities(
            [image for image, _ in flat],
            [f"{question.text} Please answer {' or '.join(question.choices)}." for _, question in flat],
        )
        right = [self._right(row, question) for row, (_, question) in zip(found, flat, strict=True)]
        ends = np.cumsum([len(own) for own in asked])
        return np.array([np.mean(part) for part in np.split(np.array(right), ends[:-1])])

    def _right(self, row: torch.Tensor, question: Question) -> float:
        chances = {choice: float(row[own].sum()) for choice, own in self.reader.begins(question).items()}
        if self.soft:
            return chances[question.answer] / max(sum(chances.values()), 1e-12)
        return float(chances[question.answer] > max(v for c, v in chances.items() if c != question.answer))
