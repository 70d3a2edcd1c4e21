"""Shape annotations of the tensor modules are checked here, and only here.

The import hook must come before the first import of scfg. The modules that users' settings enter first (guidance,
attach) are left out, so that a bad value meets their own error, as it does outside pytest.
"""

from __future__ import annotations

import sys

import pytest
from jaxtyping import install_import_hook

TENSOR_MODULES = ["scfg.attention", "scfg.regions", "scfg.scale", "scfg.segment", "scfg.trace", "scfg.visualize"]

if "scfg" not in sys.modules:
    install_import_hook(TENSOR_MODULES, "beartype.beartype")


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
