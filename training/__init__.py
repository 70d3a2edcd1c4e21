"""DreamBooth, LoRA and ControlNet on one resumable loop, and the embedded pocket base model.

Importing this package loads neither torch nor diffusers: the modules below are imported by name where they are used.
"""

from __future__ import annotations
