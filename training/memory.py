"""What a LoRA training needs on a GPU, counted from the base's configs alone: no weights are read, nothing is computed.

The networks are built on torch's meta device and run on fake tensors, which have shapes and no contents. Every storage
that the run makes is counted from its birth to its end, so the peak is what an allocator without waste would hold.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from adapters.errors import FileError
from adapters.files import read_object

from . import single_file
from .architectures import FAMILIES, Architecture
from .config import LoraSettings
from .errors import TrainingError
from .hub import offline_if_unreachable
from .offload import BLOCKS
from .quantize import linear_bytes
from .sharding import local

__all__ = ["Needs", "architecture_of", "drawing_bytes", "needs"]

HALF = torch.bfloat16
TOKENS = 77  # of a caption
RANK = 16  # that activations are counted at; they hardly depend on it


class Peak(TorchDispatchMode):
    """Counts the bytes of all storages that are made while it is active, and their highest sum.

    Args:
        known: tensors that are there already; their views count for nothing.
    """

    def __init__(self, known: Sequence[Tensor] = ()):
        super().__init__()
        self.live: int = 0
        self.most: int = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:  # not packed for a CPU's kernels
                self._count(local(tensor).untyped_storage())
        return made

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes, for one picture at a time in bfloat16. Activations grow with the pictures of a batch."""

    unet: int
    """The U-net's frozen weights, in bfloat16."""
    int8: int
    """The same with linear layers in 8 bits, see `train.quantize`."""
    nf4: int
    """The same with linear layers in 4 bits."""
    outside: int
    """The U-net's frozen weights outside the blocks that `train.offload` keeps in main memory, in bfloat16."""
    brought: int
    """The two largest of these blocks, which may be on the GPU at once."""
    encoders: int
    """The text encoders' weights, in float32."""
    vae: int
    """The VAE's weights, in float32."""
    trained: int
    """Numbers that train at rank 1; they grow with the rank."""
    kept: int
    """Peak of forward and backward pass."""
    recomputed: int
    """The same with gradient checkpointing."""
    encoding: int
    """Peak of the VAE on a training picture, in float32."""
    predicting: int
    """Peak of the U-net on a guided step of sampling."""
    decoding: int
    """Peak of the VAE's decoder, in bfloat16."""
    guided: int
    """Peak of the U-net on a guided step for a picture of the training's size, as class images have it."""
    decoded: int
    """The same of the VAE's decoder, in bfloat16."""
    previewing: int
    """The larger of the two for a sample of validation, whose decoder is in float32: autocast rounds less of it than
    one may count on, a GPU's norms for example stay as they are."""

    def frozen(self, quantize: str | None, *, offload: bool = False) -> int:
        """The U-net's frozen weights as they are kept while training; with `offload`, they are not rounded."""
        if offload:
            return self.outside + self.brought
        return self.unet if quantize is None else self.int8 if quantize == "int8" else self.nf4


def architecture_of(base: str) -> Architecture:
    """The configs of a base: of a published model as they are known here, else from its folder or the hub.

    Raises:
        TrainingError: configs that are not there or describe no U-net of this kind.
    """
    known = next((found for found in FAMILIES.values() if found.base == base), None)
    if known is not None:
        return known
    file = single_file.inspect_file(base) if single_file.is_file(base) else None
    place = str(file.configs) if file else base
    try:
        index = _config(place, "model_index.json")
        encoders = [name for name in ("text_encoder", "text_encoder_2") if index.get(name, [None])[0]]
        unet, vae = _config(place, "unet/config.json"), _config(place, "vae/config.json")
        unet |= file.unet if file else {}
        return Architecture(
            title=base,
            base=base,
            resolution=int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1),
            unet=unet,
            text_encoders=tuple(_config(place, f"{name}/config.json") for name in encoders),
            vae=vae,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"base {base}: its configs are not those of a pipeline with a U-net ({error!r})") from error


def _config(base: str, name: str) -> dict[str, Any]:
    """One of a base's configs."""
    folder = Path(base).expanduser()
    path = folder / name
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download

        offline_if_unreachable(base)
        try:
            path = Path(hf_hub_download(base, name))
        except Exception as error:  # the hub client raises many unrelated kinds
            raise TrainingError(f"base {base} is neither a folder nor a reachable hub id: {error}") from error
    try:
        return read_object(path)
    except FileError as error:
        raise TrainingError(f"{error}; the base must be a diffusers pipeline folder") from error


def needs(base: Architecture, resolution: int, targets: str) -> Needs:
    """Runs the base's networks on fake tensors.

    Args:
        base: its configs.
        resolution: pixels of a side of the training pictures; sampling draws at the base's own.
        targets: preset of `lora.targets`.
    """
    from .lora import inject

    with torch.device("meta"):
        unet, vae, encoders = _networks(base)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    drawn, taught = base.resolution // factor, resolution // factor
    encoding = _peak(vae.encoder, torch.float32, lambda net: net(torch.empty(1, 3, resolution, resolution)))
    decoding = _peak(vae.decoder, HALF, lambda net: _decode(net, vae, side=drawn))
    predicting = _peak(unet, HALF, lambda net: _predict(net, batch=2, side=drawn))
    guided = predicting if taught == drawn else _peak(unet, HALF, lambda net: _predict(net, batch=2, side=taught))
    decoded = decoding if taught == drawn else _peak(vae.decoder, HALF, lambda net: _decode(net, vae, side=taught))
    shown = _peak(vae.decoder, torch.float32, lambda net: _decode(net, vae, side=taught, dtype=torch.float32))
    frozen = _count(unet)
    int8, nf4 = (2 * frozen + _saved(unet, kind) for kind in ("int8", "nf4"))
    blocks = sorted(2 * _count(module) for module in unet.modules() if isinstance(module, BLOCKS))
    inject(unet, LoraSettings(rank=RANK, targets=targets))  # type: ignore[arg-type]
    trained = _count(unet) - frozen
    peaks = []
    for recomputed in (False, True):
        if recomputed:
            unet.enable_gradient_checkpointing()
        unet.train()
        peaks.append(_peak(unet, HALF, lambda net: _predict(net, batch=1, side=taught), backward=True))
    return Needs(
        unet=2 * frozen,
        int8=int8,
        nf4=nf4,
        outside=2 * frozen - sum(blocks),
        brought=sum(blocks[-2:]),
        encoders=4 * sum(map(_count, encoders)),
        vae=4 * _count(vae),
        trained=trained // RANK,
        kept=peaks[0] - 4 * trained,
        recomputed=peaks[1] - 4 * trained,
        encoding=encoding,
        predicting=predicting,
        decoding=decoding,
        guided=guided,
        decoded=decoded,
        previewing=max(guided, shown),
    )


def drawing_bytes(base: Architecture, resolution: int, *, batch: int, dtype: torch.dtype) -> tuple[int, int]:
    """Weights of a pipeline that draws class images, and the larger of the peaks of a guided step and the decoder.

    Args:
        base: its configs.
        resolution: pixels of a side of the pictures.
        batch: pictures at once.
        dtype: of weights and activations.
    """
    with torch.device("meta"):
        unet, vae, encoders = _networks(base)
    side = resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    weights = sum(map(_count, (unet, vae, *encoders))) * dtype.itemsize
    guided = _peak(unet, dtype, lambda net: _predict(net, batch=2 * batch, side=side, dtype=dtype))
    decoded = _peak(vae.decoder, dtype, lambda net: _decode(net, vae, batch=batch, side=side, dtype=dtype))
    return weights, max(guided, decoded)


def _networks(base: Architecture) -> tuple[Any, Any, list[Any]]:
    """U-net, VAE and text encoders."""
    import transformers
    from diffusers import AutoencoderKL, UNet2DConditionModel

    own = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2, **base.unet}
    texts = [transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)) for text in base.text_encoders]
    unet: Any = UNet2DConditionModel.from_config(own)
    return unet.requires_grad_(False), AutoencoderKL.from_config(base.vae), texts


def _count(network: nn.Module) -> int:
    return sum(int(parameter.numel()) for parameter in network.parameters())


def _saved(network: nn.Module, kind: str) -> int:
    """What fewer bits add to bfloat16 weights, a negative number."""
    shapes = [layer.weight.shape for layer in network.modules() if type(layer) is nn.Linear]
    return sum(linear_bytes(kind, rows, columns) - 2 * rows * columns for rows, columns in shapes)


def _decode(decoder: Any, vae: Any, *, side: int, batch: int = 1, dtype: torch.dtype = HALF) -> Tensor:
    """The VAE's decoder on latents of `side` rows and columns."""
    found: Tensor = decoder(torch.empty(batch, vae.config.latent_channels, side, side, dtype=dtype))
    return found


def _predict(unet: Any, *, batch: int, side: int, dtype: torch.dtype = HALF) -> Tensor:
    """The U-net on latents of `side` rows and columns."""
    config = unet.config
    added = None
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": torch.empty(batch, pooled, dtype=dtype), "time_ids": torch.empty(batch, 6)}
    latents = torch.empty(batch, config.in_channels, side, side, dtype=dtype)
    words = torch.empty(batch, TOKENS, config.cross_attention_dim, dtype=dtype)
    times = torch.zeros(batch, dtype=torch.long)
    found: Tensor = unet(latents, times, words, added_cond_kwargs=added, return_dict=False)[0]
    return found


def _peak(network: nn.Module, dtype: torch.dtype, run: Callable[[Any], Tensor], *, backward: bool = False) -> int:
    """Peak bytes of a run beside the network's weights, gradients among them; frozen weights have the dtype."""
    before = [(module, dict(module._parameters), dict(module._buffers)) for module in network.modules()]
    with FakeTensorMode():
        for module in network.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    held = torch.empty(value.shape, dtype=value.dtype if value.requires_grad and backward else dtype)
                    module._parameters[name] = nn.Parameter(held, requires_grad=value.requires_grad and backward)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        seen = Peak(list(network.parameters()))
        with seen, torch.set_grad_enabled(backward):
            made = run(network)
            if backward:
                made.float().square().mean().backward()
    for module, parameters, buffers in before:
        module._parameters.update(parameters)
        module._buffers.update(buffers)
    return seen.most
