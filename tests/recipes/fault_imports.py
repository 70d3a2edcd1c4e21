"""What the whole pipeline imports, so that a process forked from one that has this imports next to nothing."""

import pkgutil
from importlib import import_module

import accelerate
import diffusers
import docstring_parser
import jsonargparse
import peft
import PIL.Image
import scipy.stats
import transformers

import adapters
import recipes.common
import scfg
import training.data

ROOMS = (adapters, adapters.measuring, adapters.measuring.metrics, recipes.common, scfg, training, training.data)
for package in ROOMS:
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
for name in ("__main__", "dreambooth_lora", "tune", "measure", "ship"):
    import_module(f"recipes.{name}")
PIL.Image.init()
# These come through lazy modules.
LAZY = (
    accelerate.Accelerator,
    docstring_parser.parse,
    jsonargparse.ArgumentParser,
    diffusers.AutoencoderKL,
    diffusers.DDIMScheduler,
    diffusers.DDPMScheduler,
    diffusers.DiffusionPipeline,
    diffusers.StableDiffusionPipeline,
    diffusers.UniPCMultistepScheduler,
    diffusers.UNet2DConditionModel,
    peft.LoraConfig,
    scipy.stats.t,
    transformers.CLIPTextModel,
    transformers.CLIPTokenizer,
)
