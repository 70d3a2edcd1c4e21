"""The one training loop, for every method: accelerate for devices and processes, everything else in plain sight.

A step is a function of the settings and its number: order, noise and dropout are seeded by it, so an interrupted and
resumed run ends with the bits of an uninterrupted one, and a batch can be split over processes or micro-steps at will.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from . import checkpoint, config, optim, validate
from .cache import Region
from .config import TrainSettings
from .dreambooth import Prior
from .errors import Stopped, TrainingError
from .feed import seed_of
from .method import Method
from .setup import Prepared, announce, make_accelerator, prepare
from .views import Views

__all__ = ["Result", "train"]

AGREE_EVERY = 8  # steps between the looks of several processes at each other's stop signals; each look waits for all


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a finished training left behind."""

    folder: Path
    """What was trained, to be loaded: a LoRA, a ControlNet or a pipeline."""
    checkpoint: Path | None
    step: int
    losses: list[float]
    """Mean loss of every log interval of this run."""
    seconds: float
    """Time in the loop, without preparing."""


class _Stepper(nn.Module):
    """All that trains in one module, whose forward is the method's step; accelerate wraps it for several processes."""

    def __init__(self, method: Method, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.models = nn.ModuleDict(method.models)
        self._step, self._dtype, self._device = method.step, dtype, device
        self._autocast = method.autocast and dtype != torch.float32

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Losses per sample (B,)."""
        if not self._autocast:
            return self._step(self.models, batch, self._dtype)
        with torch.autocast(self._device.type, self._dtype):
            return self._step(self.models, batch, self._dtype)


@dataclass(kw_only=True)
class _Run:
    """The mutable state of one training."""

    settings: TrainSettings
    accelerator: Accelerator
    method: Method
    prepared: Prepared
    out: Path
    facts: dict[str, Any]
    model: Any
    optimizer: Any
    trainable: dict[str, nn.Parameter]
    ema: optim.Ema | None
    scaler: torch.amp.GradScaler | None
    say: Callable[[str], None]
    step: int = 0
    saved: Path | None = None


def train(
    method: Method,
    data: Views,
    settings: TrainSettings,
    *,
    out: str | Path,
    record: dict[str, Any] | None = None,
    prior: Prior | None = None,
    region: Region | None = None,
    cache: Literal["memory", "disk", "off"] = "memory",
    cache_folder: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> Result | None:
    """Trains and saves; returns None after a dry run.

    Args:
        out: receives `checkpoints/`, `samples/`, `log.jsonl` and the result in a folder named after the method.
        record: the recipe's resolved settings, saved beside every checkpoint and compared when resuming.
        prior: class images of DreamBooth.
        region: mask of the subject per entry, see `cache.encode_views`; needs the cache.
        say: receives progress lines, on the main process only.

    Raises:
        TrainingError: settings, data or a loss that training cannot go on with; the last checkpoint is intact.
        Stopped: SIGTERM or SIGINT came; the step was finished and saved.
    """
    out = Path(out)
    accelerator = make_accelerator(settings, out, say)
    tell = say if accelerator.is_main_process else _silent
    prepared = prepare(
        method,
        data,
        settings,
        accelerator,
        prior=prior,
        region=region,
        cache=cache,
        cache_folder=Path(cache_folder) if cache_folder else out / "cache",
        say=tell,
    )
    facts = {
        "method": method.name,
        "samples_per_step": prepared.feed.per_step,
        "data": _digest(prepared.names),
        "settings": record if record is not None else {"train": config.resolved(settings)},
    }
    run = _start(method, settings, accelerator, prepared, out, facts, tell)
    announce(method, accelerator.unwrap_model(run.model), settings, prepared, tell)
    if settings.dry_run:
        return None
    _resume(run)
    return _loop(run)


def _silent(line: str) -> None:
    pass


def _digest(names: list[str]) -> str:
    return hashlib.blake2b("\n".join(names).encode(), digest_size=16).hexdigest()


def _start(
    method: Method,
    settings: TrainSettings,
    accelerator: Accelerator,
    prepared: Prepared,
    out: Path,
    facts: dict[str, Any],
    say: Callable[[str], None],
) -> _Run:
    trainable = method.trainable()
    if not trainable:
        raise TrainingError(f"nothing trains in method {method.name}")
    stepper = _Stepper(method, prepared.dtype, accelerator.device)
    optimizer = optim.build(trainable, settings)
    model, optimizer = accelerator.prepare(stepper, optimizer)
    fp16 = settings.precision == "fp16"
    return _Run(
        settings=settings,
        accelerator=accelerator,
        method=method,
        prepared=prepared,
        out=out,
        facts=facts,
        model=model,
        optimizer=optimizer,
        trainable=trainable,
        ema=optim.Ema(list(trainable.values()), settings.ema) if settings.ema else None,
        scaler=torch.amp.GradScaler(accelerator.device.type) if fp16 else None,
        say=say,
    )


def _resume(run: _Run) -> None:
    """Restores the checkpoint that `train.resume` names, if any, after checking that it fits.

    Raises:
        TrainingError: settings or data that shape the weights have changed, each named with both values.
    """
    path = checkpoint.find(run.settings.resume, run.out / "checkpoints") if run.settings.resume else None
    if path is None:
        if run.settings.resume:
            run.say(f"train.resume latest: no checkpoint in {run.out / 'checkpoints'} yet, starting anew")
        return
    state = checkpoint.load(path)
    free = list(checkpoint.FREE)
    # How a step's samples are split is free as long as their number stays (`samples_per_step`); the number of steps is,
    # unless the learning rate depends on it.
    free += ["train.batch_size", "train.accumulation"]
    free += ["train.steps"] if run.settings.schedule == "constant" else []
    changed = checkpoint.differences(
        {**state.facts, **state.facts["settings"], "settings": None},
        {**run.facts, **json.loads(json.dumps(run.facts["settings"])), "settings": None},
        free=tuple(free),
    )
    if changed:
        raise TrainingError(
            f"cannot resume from {path}, these have changed: {'; '.join(changed)}; take the old values "
            f"({path / 'settings.yaml'}) or start anew with another out"
        )
    with torch.no_grad():
        for name, parameter in run.trainable.items():
            parameter.copy_(state.weights[name])
    checkpoint.restore_optimizer(_bare(run.optimizer), state.optimizer)
    if run.ema is not None and state.ema is not None:
        run.ema.load([state.ema[name] for name in run.trainable], state.ema_updates)
    if run.scaler is not None and state.scaler is not None:
        run.scaler.load_state_dict(state.scaler)
    run.step, run.saved = state.step, path
    run.say(f"resumed from {path} at step {state.step}")


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def _loop(run: _Run) -> Result:
    settings, accelerator = run.settings, run.accelerator
    log = _Log(run)
    stop = _Signals()
    began = time.perf_counter()
    parameters = list(run.trainable.values())
    with stop, contextlib.closing(run.prepared.feed.ahead(run.step, settings.steps, settings.workers)) as batches:
        if run.step == 0:
            _validate(run, log)
        for micros in batches:
            loss = _step(run, micros, parameters)
            run.step += 1
            log.add(loss)
            stopping = _agreed(run, stop.number)
            last = run.step == settings.steps
            saving = stopping or last or run.step % settings.save_every == 0
            if run.step % settings.log_every == 0 or saving:
                log.write()  # reads the loss, so a loss that is not finite stops training before anything is saved
            if saving:
                _save(run)
            if last or run.step % settings.validation.every == 0:
                _validate(run, log)
            if stopping and not last:
                raise Stopped(f"stopped after step {run.step}, saved {run.saved}; go on with --train.resume latest")
    seconds = time.perf_counter() - began
    folder = _ship(run)
    log.close()
    accelerator.end_training()
    return Result(folder=folder, checkpoint=run.saved, step=run.step, losses=log.losses, seconds=seconds)


def _step(run: _Run, micros: list[dict[str, Any]], parameters: list[nn.Parameter]) -> Tensor:
    """One optimizer step; returns its loss (), on the device, without waiting for it."""
    settings, accelerator, optimizer = run.settings, run.accelerator, _bare(run.optimizer)
    torch.manual_seed(seed_of(settings.seed, "dropout", run.step, accelerator.process_index))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * optim.rate(run.step, settings)
    total = torch.zeros((), device=accelerator.device)
    for number, micro in enumerate(micros):
        batch = run.prepared.ready(micro)
        last = number == len(micros) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(run.model):
            loss = (run.model(batch) * batch["weight"]).mean() / len(micros)
            (loss if run.scaler is None else run.scaler.scale(loss)).backward()
        total += loss.detach()
    if run.step == 0:
        _all_reached(run)
    if run.scaler is not None:
        run.scaler.unscale_(optimizer)
    if settings.clip is not None:
        accelerator.clip_grad_norm_(parameters, settings.clip)
    if run.scaler is None:
        optimizer.step()
    else:
        run.scaler.step(optimizer)
        run.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if run.ema is not None:
        run.ema.update()
    return total


def _all_reached(run: _Run) -> None:
    """Every model that is to train gets a gradient in the first step, or training would silently leave it out."""
    for name in run.method.models:
        gradients = [value.grad for key, value in run.trainable.items() if key.startswith(f"{name}.")]
        if all(gradient is None for gradient in gradients):
            raise TrainingError(
                f"no gradient reaches {name}, it would not train; check what method {run.method.name} trains"
            )


def _agreed(run: _Run, signalled: int) -> bool:
    """Whether to stop now; several processes stop at the same step, whichever of them was signalled."""
    if run.accelerator.num_processes == 1:
        return bool(signalled)
    if run.step % AGREE_EVERY:
        return False
    flag = torch.tensor(float(signalled), device=run.accelerator.device)
    return bool(run.accelerator.reduce(flag, "sum") > 0)


def _save(run: _Run) -> None:
    """Writes a checkpoint from the main process; all processes learn whether that went well."""
    trouble: list[TrainingError] = []
    if run.accelerator.is_main_process:
        names = list(run.trainable)
        state = checkpoint.State(
            step=run.step,
            weights=dict(run.trainable),
            optimizer=_bare(run.optimizer).state_dict(),
            ema=dict(zip(names, run.ema.average, strict=True)) if run.ema else None,
            ema_updates=run.ema.updates if run.ema else 0,
            scaler=run.scaler.state_dict() if run.scaler else None,
            facts=run.facts,
        )
        try:
            run.saved = checkpoint.save(run.out / "checkpoints", state, keep=run.settings.keep)
        except TrainingError as error:
            trouble.append(error)
    failed = run.accelerator.reduce(torch.tensor(float(len(trouble)), device=run.accelerator.device), "sum")
    if bool(failed > 0):
        raise trouble[0] if trouble else TrainingError("the main process could not save a checkpoint, see its message")


def _validate(run: _Run, log: _Log) -> None:
    """Samples and the fixed-noise loss, with the averaged weights where there are any."""
    settings, prepared = run.settings, run.prepared
    if not settings.validation.prompts and not prepared.fixed:
        return
    if run.ema is not None:
        run.ema.swap()
    try:
        if prepared.fixed:
            bare = run.accelerator.unwrap_model(run.model)
            value = validate.fixed_loss(lambda batch: bare(prepared.ready(batch)), prepared.fixed, [bare])
            log.note({"validation_loss": value})
        if settings.validation.prompts:
            validate.samples(
                run.method,
                settings.validation,
                prepared.texts,
                run.out / "samples" / f"step-{run.step:06d}",
                device=run.accelerator.device,
                size=prepared.size,
                dtype=prepared.dtype,
                rank=run.accelerator.process_index,
                processes=run.accelerator.num_processes,
            )
    finally:
        if run.ema is not None:
            run.ema.swap()
    run.accelerator.wait_for_everyone()


def _ship(run: _Run) -> Path:
    """Saves the result, averaged if there is an average, whole or not at all."""
    folder = run.out / run.method.name
    if run.accelerator.is_main_process:
        tensors = run.ema.average if run.ema else run.trainable.values()
        weights: dict[str, Tensor] = dict(zip(run.trainable, tensors, strict=True))
        metadata = {"settings": json.dumps(run.facts["settings"]), "step": str(run.step)}
        with checkpoint.atomic_folder(folder) as place:
            run.method.save(weights, place, metadata)
            config.write(run.facts["settings"], place / "settings.yaml")
        run.say(f"saved {folder}")
    run.accelerator.wait_for_everyone()
    return folder


class _Signals:
    """Notes SIGTERM and SIGINT while in the context; a second one goes the ordinary way."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.number = number
        signal.signal(number, self._before[number])

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Log:
    """Loss and speed as lines, `log.jsonl` and tracker values; reads the device only when it writes."""

    def __init__(self, run: _Run):
        self.run, self.losses = run, []  # type: ignore[var-annotated]
        self._sum: Tensor | None = None
        self._since, self._steps = time.perf_counter(), 0
        self._file = _reopened(run.out / "log.jsonl", run.step) if run.accelerator.is_main_process else None

    def add(self, loss: Tensor) -> None:
        self._sum = loss if self._sum is None else self._sum + loss
        self._steps += 1

    def write(self) -> None:
        """Writes the interval's mean.

        Raises:
            TrainingError: it is not finite.
        """
        if self._sum is None:
            return
        run, settings = self.run, self.run.settings
        loss = float(run.accelerator.reduce(self._sum / self._steps, "mean"))
        if loss != loss or loss in (float("inf"), float("-inf")):
            kept = f"the last good checkpoint is {run.saved}" if run.saved else "there is no checkpoint yet"
            raise TrainingError(
                f"the loss became {loss} between steps {run.step - self._steps + 1} and {run.step}; {kept}. "
                "Lower train.learning_rate, or use train.precision fp32 or bf16"
            )
        self.losses.append(loss)
        seconds = (time.perf_counter() - self._since) / self._steps
        values = {"loss": loss, "images_per_second": run.prepared.feed.per_step / seconds}
        self.note({**values, "learning_rate": _bare(run.optimizer).param_groups[0]["lr"]})
        left = (settings.steps - run.step) * seconds
        memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else ""
        run.say(
            f"step {run.step}/{settings.steps}  loss {loss:.4f}  {values['images_per_second']:.1f} images/s  "
            f"{left / 60:.1f} min left{memory}"
        )
        self._sum, self._steps, self._since = None, 0, time.perf_counter()

    def note(self, values: dict[str, float]) -> None:
        """Writes values of the current step to the file and the trackers."""
        if self._file is not None:
            print(json.dumps({"step": self.run.step, **values}), file=self._file, flush=True)
        if self.run.accelerator.trackers:
            self.run.accelerator.log(values, step=self.run.step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _reopened(path: Path, step: int) -> Any:
    """The log opened for appending, without lines of steps that will be trained again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines() if path.is_file() and step else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    path.write_text("".join(f"{line}\n" for line in kept))
    return path.open("a")
