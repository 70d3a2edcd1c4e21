"""DreamBooth, LoRA and ControlNet on one resumable loop, and the embedded pocket base model."""
