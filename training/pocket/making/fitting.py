"""What every fit of a pocket part shares: pictures as tensors, learning rate, optimizer, average of weights, state."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from adapters.files import read_tensors, understood, write_tensors

__all__ = [
    "FitAverage",
    "MuonAdamW",
    "add_up",
    "image_batch",
    "learning_rate",
    "load_state",
    "processes",
    "save_state",
    "seeded",
]


def image_batch(images: Iterable[np.ndarray]) -> Tensor:
    """Pictures (S, S, 3) uint8 as one tensor (B, 3, S, S) float32 in [-1, 1]."""
    return torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2).float() / 127.5 - 1


def seeded(seed: int, step: int) -> torch.Generator:
    """All randomness of a step is a function of (seed, step), so that a resumed run needs no stored random state."""
    return torch.Generator().manual_seed((seed << 40) + step)


def learning_rate(
    step: int, steps: int, peak: float, warmup: int = 200, tail: float = 0.35, settle: int | None = None
) -> float:
    """Linear warm-up, flat, then a cosine over the last ``tail`` of ``steps``; the flat part can be continued later.

    With ``settle`` the rate falls as the root of that step over the current one, which does not depend on ``steps``.

    Args:
        step: from 0.
        steps: in all.
        peak: the rate after the warm-up.
        warmup: steps of linear growth.
        tail: share of `steps` in which the rate falls.
        settle: step from which the flat part falls too; None: it stays flat.
    """
    start = (1 - tail) * steps
    rate = peak if settle is None else peak * min(1.0, (settle / (step + 1)) ** 0.5)
    if step < warmup:
        return peak * (step + 1) / warmup
    if step < start:
        return rate
    return rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min((step - start) / (steps - start), 1))))


def processes() -> tuple[int, int]:
    """Rank of this process, and how many share the fit."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def add_up(tensors: list[Tensor]) -> None:
    """Over the processes, in place; in one message, since there are hundreds of small ones."""
    if not dist.is_initialized():
        return
    together = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(together)
    for tensor, piece in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(piece.view_as(tensor))


class FitAverage:
    """Exponential average of a module's parameters, its decay growing with the steps so that the start is forgotten."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - decay)
            else:
                self.average[name].copy_(value)


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) on hidden matrices and convolutions, AdamW on everything else, in one optimizer.

    Muon replaces the momentum of a weight, as a matrix (out, in * kernel), by the nearest orthogonal matrix, found by
    five Newton-Schulz steps. torch's own ``Muon`` refuses convolutions, which are most of the weights here.

    Args:
        modules: what to fit; embeddings, norms and biases go to AdamW.
        peak: rate of the Muon part at the top of the schedule; AdamW's is ``peak * adam_ratio``.
        adam_ratio: AdamW's rate over Muon's.
        weight_decay: of the Muon part.
        keep_norm: put every weight of the Muon part back to the norm it began with after its step, so that a rate is an
            angle and no path grows over the others (the forced normalization of Karras et al. 2024, EDM2).
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        peak: float,
        adam_ratio: float = 0.05,
        weight_decay: float = 0.01,
        keep_norm: bool = False,
    ) -> None:
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        for module in modules:
            tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
            for parameter in module.parameters():
                hidden = parameter.ndim >= 2 and id(parameter) not in tables
                (matrices if hidden else others).append(parameter)
        groups = [
            {"params": matrices, "muon": True, "ratio": 1.0},
            {"params": others, "muon": False, "ratio": adam_ratio},
        ]
        super().__init__(groups, {"lr": peak, "weight_decay": weight_decay})
        self.keep_norm = keep_norm

    def set_rate(self, rate: float) -> None:
        """Set the Muon part's rate and, by the ratio, AdamW's."""
        for group in self.param_groups:
            group["lr"] = rate * group["ratio"]

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["muon"]:
                self._muon(parameters, group["lr"], group["weight_decay"])
            else:
                for parameter in parameters:
                    self._adam(parameter, self.state[parameter], group["lr"])

    def _muon(self, parameters: list[Tensor], rate: float, decay: float) -> None:
        ahead = [self._ahead(parameter) for parameter in parameters]
        # Orthogonalising is most of the time of a step that processes would all do alike: each does its share.
        owner = _shares([matrix.shape for matrix in ahead])
        rank, _ = processes()
        changes = [_orthogonal(m) if who == rank else torch.zeros_like(m) for m, who in zip(ahead, owner, strict=True)]
        add_up(changes)
        for parameter, change in zip(parameters, changes, strict=True):
            rows, columns = change.shape
            if self.keep_norm and "norm" not in self.state[parameter]:
                self.state[parameter]["norm"] = parameter.norm()
            scale = -rate * max(1.0, rows / columns) ** 0.5
            parameter.mul_(1 - rate * decay).add_(change.reshape(parameter.shape), alpha=scale)
            if self.keep_norm:
                parameter.mul_(self.state[parameter]["norm"] / parameter.norm())

    def _ahead(self, parameter: Tensor) -> Tensor:
        """Nesterov's momentum as a matrix (out, in * kernel)."""
        assert parameter.grad is not None
        momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
        momentum.mul_(0.95).add_(parameter.grad)
        direction: Tensor = (parameter.grad + 0.95 * momentum).reshape(len(parameter), -1)
        return direction

    def _adam(self, parameter: Tensor, state: dict[str, Tensor], rate: float) -> None:
        assert parameter.grad is not None
        if not state:
            state |= {
                "first": torch.zeros_like(parameter),
                "second": torch.zeros_like(parameter),
                "count": torch.zeros(()),
            }
        state["count"] += 1
        count = state["count"].item()
        state["first"].lerp_(parameter.grad, 0.1)
        state["second"].lerp_(parameter.grad.square(), 0.01)
        spread = (state["second"] / (1 - 0.99**count)).sqrt_().add_(1e-8)
        parameter.addcdiv_(state["first"], spread, value=-rate / (1 - 0.9**count))


def _shares(shapes: list[torch.Size]) -> list[int]:
    """Which process orthogonalises which matrix: the most work first, to whoever has least so far."""
    work = [min(shape) ** 2 * (2 * max(shape) + 17 * min(shape)) for shape in shapes]
    load, owner = [0] * processes()[1], [0] * len(shapes)
    for index in sorted(range(len(shapes)), key=lambda i: -work[i]):
        owner[index] = load.index(min(load))
        load[owner[index]] += work[index]
    return owner


def _orthogonal(matrix: Tensor) -> Tensor:
    """Nearly the orthogonal factor of ``matrix`` (R, C): quintic Newton-Schulz with Muon's coefficients.

    Every iterate is a polynomial in the Gram matrix times the first one, so the iteration runs on Gram matrices
    (R, R) and touches the long side twice in all: three times faster at 256 x 2304, equal to 3e-6.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix) / (matrix.norm() + 1e-7)
    one = torch.eye(len(x), device=x.device)
    gram, product = x @ x.T, None
    for last in (False, False, False, False, True):
        factor = 3.4445 * one - 4.7750 * gram + 2.0315 * gram @ gram
        product = factor if product is None else factor @ product
        gram = gram if last else factor @ gram @ factor
    orthogonal: Tensor = product @ x
    return orthogonal.T if tall else orthogonal


def save_state(
    path: Path, modules: dict[str, nn.Module], emas: dict[str, FitAverage], optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Everything a resumed fit needs, in one safetensors file that is there whole or not at all.

    Args:
        path: of the file.
        modules: name -> what is fitted.
        emas: name -> its averaged weights.
        optimizer: of all modules.
        step: the number of steps made.
    """
    tensors: dict[str, Tensor] = {}
    for part, module in modules.items():
        tensors |= {f"{part}/{name}": value for name, value in module.state_dict().items()}
    for part, ema in emas.items():
        tensors |= {f"ema.{part}/{name}": value for name, value in ema.average.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": value for name, value in state.items()}
    write_tensors(path, tensors, {"state": json.dumps({"step": step})})


def load_state(
    path: Path, modules: dict[str, nn.Module], emas: dict[str, FitAverage], optimizer: torch.optim.Optimizer
) -> int:
    """Restore what ``save_state`` wrote and return its step.

    Args:
        path: of the file.
        modules: name -> what is fitted; filled in place.
        emas: name -> averaged weights; filled in place.
        optimizer: of all modules; filled in place.

    Raises:
        FileError: it is damaged, or no such state; delete it to begin again.
    """
    with understood(path):
        tensors, metadata = read_tensors(path)
        step: int = json.loads(metadata["state"])["step"]
    for part, module in modules.items():
        module.load_state_dict(
            {name.removeprefix(f"{part}/"): v for name, v in tensors.items() if name.startswith(f"{part}/")}
        )
    for part, ema in emas.items():
        for name in ema.average:
            ema.average[name].copy_(tensors[f"ema.{part}/{name}"])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/")
            like = parameters[int(index)]
            # An update may read weight and moments in the order they lie in memory: moments take the weight's layout.
            state.setdefault(int(index), {})[key] = (
                torch.empty_like(like).copy_(value) if value.shape == like.shape else value
            )
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return step
