"""The LoRA start EVA (Paischer et al. 2024, https://arxiv.org/abs/2410.07170): A from what the training pictures send.

The down matrix A (r, in) of a linear layer becomes the r leading principal components of the layer's inputs, the right
singular vectors of the centered inputs. B stays zero: the LoRA has no effect at the start, and the base is unchanged.

The inputs come from the first batches of the run itself, cached latents and captions, so nothing is encoded for it. The
incremental SVD is peft's, its loop is not: `peft.get_eva_state_dict` never returns where a layer gets fewer inputs in a
batch than it has ranks (the projection of the timestep gets one a sample), exchanges ranks between layers even with
`rho=1` where layers of different ranks share their inputs, and asks for a PeftModel around one network.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from peft import EvaConfig
from peft.tuners.lora.eva import SVDHook
from torch import Tensor, nn

from .batch import Batch

__all__ = ["BATCHES", "begin_with_inputs"]

BATCHES = 64  # at most: layers whose components still turn then are those with nearly equal singular values
ROWS = 256  # inputs taken of a sample, drawn among its positions, which resemble one another
NOISE = 1e-5  # of the largest singular value; below, a component is rounding and no input has a part in it


def begin_with_inputs(
    models: Mapping[str, nn.Module], adapter: str, batches: Iterable[Batch], step: Callable[[Batch], Any]
) -> str:
    """Sets the down matrices of all linear LoRA layers in place; returns a line that says from what.

    Layers that get too few inputs, and ranks beyond the rank of the inputs, keep the default start. Convolutions do.

    Args:
        models: networks with adapters, by name.
        adapter: peft's name of the LoRA.
        batches: of the training; as many are taken as it takes, at most `BATCHES`.
        step: runs the networks on a batch; called without gradients.
    """
    layers = [
        layer
        for network in models.values()
        for layer in network.modules()
        if adapter in getattr(layer, "lora_A", {}) and isinstance(layer.get_submodule("base_layer"), nn.Linear)
    ]
    found = [_Inputs(layer.get_submodule(f"lora_A.{adapter}")) for layer in layers]
    handles = [layer.register_forward_pre_hook(inputs) for layer, inputs in zip(layers, found, strict=True)]
    taken = 0
    try:
        # Compiled code would keep the hooks that it was compiled with.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for batch in itertools.islice(batches, BATCHES):
                step(batch)
                taken += 1
                if all(inputs.settled for inputs in found):
                    break
    finally:
        for handle in handles:
            handle.remove()
    short = sum(not inputs.write() for inputs in found)
    kept = f"; {short} with fewer inputs than ranks keep the default start" if short else ""
    return f"lora.start eva: from the inputs of {len(found)} linear layers in {taken} batches{kept}"


class _Inputs:
    """Collects the inputs of a layer, and follows their principal components until these settle."""

    def __init__(self, down: nn.Module) -> None:
        self._down: Any = down
        self._rank = down.get_parameter("weight").shape[0]
        self._rows: list[Tensor] = []
        self._random = torch.Generator().manual_seed(0)
        self._hook = SVDHook(
            name="",
            n_components=self._rank,
            sim_thresh=EvaConfig(rho=1.0).tau,
            prepare_layer_inputs_fn=lambda rows, *_: rows,
            gather_distributed_inputs=False,  # every process looks at all batches
        )

    @property
    def settled(self) -> bool:
        """Whether the last inputs turned no component by more than peft's threshold."""
        return bool(self._hook.converged.all())

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        """inputs: (x,), x (B, in) or (B, …, in)."""
        if self.settled:
            return
        x = inputs[0].detach()
        x = x.reshape(len(x), -1, x.shape[-1])  # (B, positions, in)
        if x.shape[1] > ROWS:
            x = x[:, torch.randperm(x.shape[1], generator=self._random)[:ROWS].to(x.device)]
        self._rows.append(x.flatten(0, 1).float())
        if sum(map(len, self._rows)) >= 2 * self._rank:
            self._fit()

    def _fit(self) -> None:
        rows, self._rows = torch.cat(self._rows), []
        self._hook(None, rows, None)

    def write(self) -> bool:
        """Puts the components into the down matrix; False: there were fewer inputs than ranks."""
        if not hasattr(self._hook.svd, "components_"):
            if sum(map(len, self._rows)) < self._rank:
                return False
            self._fit()
        size = self._hook.svd.singular_values_
        kept = size > NOISE * size.max()
        weight = self._down.weight.data
        weight[kept] = self._hook.svd.components_[kept].to(weight)
        return True
