"""One in-memory form of a LoRA-like adapter, and its three spellings on disk: peft, diffusers, kohya / LyCORIS.

| | LoRA, DoRA | LoHa, LoKr | where alpha is |
|---|---|---|---|
| peft | `base_model.model.MODULE.lora_A.weight` | `….hada_w1_a`, `….lokr_w1` | `adapter_config.json` |
| diffusers | `unet.MODULE.lora_A.weight` | not defined | header `lora_adapter_metadata` |
| kohya | `lora_unet_MO_DU_LE.lora_down.weight` | `….hada_w1_a`, `….lokr_w1` | tensor `….alpha` |

`reading` takes any of them in, `spelling` writes them.
"""

from __future__ import annotations

from .adapter import COMPONENTS, Adapter, Module
from .reading import from_any
from .spelling import to_diffusers, to_kohya, to_peft

__all__ = ["COMPONENTS", "Adapter", "Module", "from_any", "to_diffusers", "to_kohya", "to_peft"]
