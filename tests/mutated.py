"""Damage that every fuzzer does, whatever the file holds."""

from __future__ import annotations

import random


def mutate_bytes(data: bytes, dice: random.Random) -> bytes:
    """Bytes replaced, inserted and left out, and the rest cut off now and then."""
    mutated = bytearray(data)
    for _ in range(dice.randint(1, 6)):
        at = dice.randrange(len(mutated) or 1)
        mutated[at : at + dice.choice([0, 1, 4])] = dice.randbytes(dice.choice([0, 1, 4]))
    return bytes(mutated[: dice.randrange(len(mutated) + 1)]) if dice.random() < 0.3 else bytes(mutated)
