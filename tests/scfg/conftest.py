"""What the recorded outputs of the published method are compared on."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def tiny_sd(golden):
    """The recorded StableDiffusionPipeline (latent 32, 77 tokens)."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(golden / "tiny-sd", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def sd_reference(golden):
    from safetensors.torch import load_file

    return load_file(golden / "sd_reference.safetensors")


@pytest.fixture(scope="session")
def if_reference(golden):
    from safetensors.torch import load_file

    return load_file(golden / "if_reference.safetensors")
