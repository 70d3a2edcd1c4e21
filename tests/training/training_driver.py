"""One small training described by a dictionary: called in a test's process, or run as a script by launcher tests."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from training import config, controlnet, dreambooth, loop, lora, models, sharding
from training.data import crops, images
from training.errors import exit_on_error
from training.ranks import state

METHODS = {
    "lora": lambda parts: lora.prepare(parts, config.LoraSettings(rank=2)),
    "lokr": lambda parts: lora.prepare(parts, config.LoraSettings(rank=2, kind="lokr")),
    "pissa": lambda parts: lora.prepare(parts, config.LoraSettings(rank=2, start="pissa")),
    "eva": lambda parts: lora.prepare(parts, config.LoraSettings(rank=2, start="eva")),
    "drops": lambda parts: lora.prepare(parts, config.LoraSettings(rank=2, rank_dropout=0.3, module_dropout=0.3)),
    "dropout": lambda parts: lora.prepare(parts, config.LoraSettings(rank=2, dropout=0.3)),
    "dora": lambda parts: lora.prepare(parts, config.LoraSettings(rank=2, dora=True)),
    "tokens": lambda parts: lora.prepare(parts, config.LoraSettings(rank=2, tokens={"<rex>": "d"})),
    "text": lambda parts: lora.prepare(parts, config.LoraSettings(rank=2, text_encoder=True)),
    "full": lambda parts: dreambooth.prepare(parts),
    "controlnet": lambda parts: controlnet.prepare(parts, config.ControlNetSettings(dropout=0.2)),
}


def train(
    asked: dict[str, Any], say: Callable[[str], None] = print, record: dict[str, Any] | None = None
) -> loop.Result | None:
    """Trains what `asked` says: `base`, `pictures`, `out`, `method`, `train`, and `class_folder` for a prior.

    With `shares`, what part of the weights lies in this process is said at the end.
    """
    parts = models.load_parts(asked["base"])
    method = METHODS[asked["method"]](parts)
    source = images.folder(asked["pictures"], conditioning=asked["pictures"], minimum=8)
    data = crops.Views(source, resolution=32, multiple=parts.multiple, flip=True)
    prior = None
    if asked.get("class_folder"):
        chosen = config.DreamBoothSettings(class_prompt="dog", class_images=3, steps=2)
        prior = dreambooth.prior(parts, chosen, data, folder=asked["class_folder"])
    validation = config.ValidationSettings(**asked.get("validation", {}))
    settings = config.TrainSettings(
        **{"validation": validation, "trackers": [], "log_every": 1, "learning_rate": 1e-2, **asked["train"]}
    )
    result = loop.train(method, data, settings, out=asked["out"], prior=prior, record=record, say=say)
    if asked.get("shares"):
        for name, trains in (("frozen", False), ("trained", True)):
            kept = [one.detach() for one in method.parameters().values() if one.requires_grad is trains]
            held = sum(sharding.local(one).numel() for one in kept) / sum(one.numel() for one in kept)
            say(f"share of {name} here: {held:.3f}")
            say(f"types of {name}: {sorted({str(one.dtype) for one in kept})}")
    return result


def main() -> None:
    """Also signals itself at a step, as an event from outside would."""
    asked = json.loads(sys.argv[1])

    def say(line: str) -> None:
        print(line, flush=True)
        if asked.get("signal") and line.startswith(f"step {asked['at']}/"):
            os.kill(os.getpid(), asked["signal"])

    with exit_on_error():
        if asked.get("processes"):
            count = state().num_processes
            assert count == asked["processes"], f"the launcher started {count} process(es)"
            say(f"processes: {count}")
        train(asked, say)


if __name__ == "__main__":
    main()
