"""New tokens with their own trained embeddings (textual inversion, here trained together with a LoRA: pivotal tuning).

Only the new rows train: the base's embedding table stays frozen and the rows live in a parameter beside it. Saved is
`learned_embeds.safetensors`, which `adapters.load` and, for one text encoder, `pipe.load_textual_inversion` read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .errors import TrainingError
from .models import Parts

__all__ = ["NewRows", "add_tokens", "trained_tokens"]


class NewRows(nn.Module):
    """An embedding table with further rows that train: ids below the table's length read it, the rest the new rows."""

    def __init__(self, table: nn.Embedding, rows: Tensor):
        super().__init__()
        self.table = table
        self.rows = nn.Parameter(rows)

    @property
    def weight(self) -> Tensor:
        """The table's weight, which transformers looks at for dtype and device."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> embeddings (B, T, D)."""
        known = self.table.num_embeddings
        old = self.table(ids.clamp(max=known - 1))
        new = nn.functional.embedding((ids - known).clamp(min=0), self.rows)
        return torch.where((ids >= known)[..., None], new.to(old.dtype), old)


def add_tokens(parts: Parts, tokens: dict[str, str]) -> None:
    """Adds each token to the tokenizers and gives it the (mean) embedding of the word it starts from.

    Raises:
        TrainingError: a token the tokenizer has already, or a word of which it knows nothing.
    """
    for tokenizer, encoder in zip(parts.tokenizers, parts.text_encoders, strict=True):
        known = tokenizer.get_vocab()
        taken = [token for token in tokens if token in known]
        if taken:
            raise TrainingError(f"lora.tokens: {', '.join(taken)} is in the vocabulary already; choose other names")
        table = encoder.get_input_embeddings()
        rows = []
        for word in tokens.values():
            ids = tokenizer(word, add_special_tokens=False).input_ids
            if not ids:
                raise TrainingError(
                    f"lora.tokens: the tokenizer knows nothing of the word {word!r}; start from another"
                )
            rows.append(table.weight[ids].detach().float().mean(0))
        tokenizer.add_tokens(list(tokens))
        numbers = tokenizer.convert_tokens_to_ids(list(tokens))
        expected = list(range(table.num_embeddings, table.num_embeddings + len(tokens)))
        if numbers != expected:
            raise TrainingError(
                f"lora.tokens: the tokenizer numbers new tokens {numbers}, the embedding table ends at {expected[0]}"
            )
        encoder.set_input_embeddings(NewRows(table, torch.stack(rows)))


def trained_tokens(weights: Mapping[str, Tensor], tokens: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """Token -> text encoder -> its trained vector (1, D), out of the trained weights by name."""
    rows = {key.partition(".")[0]: value for key, value in weights.items() if key.endswith("token_embedding.rows")}
    return {
        token: {encoder: values[number : number + 1] for encoder, values in rows.items()}
        for number, token in enumerate(tokens)
    }
