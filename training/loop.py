"""The one training loop, for every method: accelerate for devices and processes, everything else in plain sight.

A step is a function of the settings and its number: order, noise and dropout are seeded by it, so an interrupted and
resumed run ends with the bits of an uninterrupted one, and a batch can be split over processes or micro-steps at will.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from adapters import files
from adapters.errors import FileError

from . import checkpoint, config, launcher, lock, offload, optim, precision, quantize, sharding, validate
from .batch import Batch, DrawnBatch, tensors
from .config import TrainSettings
from .data.batches import seed_of
from .data.cache import Region
from .data.crops import Views
from .dreambooth import Concept, Prior
from .errors import Stopped, TrainingError
from .estimate import Estimate
from .log import Log
from .method import Method, Stepper
from .networks import DTYPES, kernels
from .prepare import Prepared, announce, make_accelerator, prepare_run
from .ranks import state
from .sheet import write_sheet
from .signals import Signals

__all__ = ["Result", "train"]

SNAPSHOTS = "snapshots"
CONTENT = "content of "


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
    ema: optim.WeightAverage | None
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
    further: Sequence[Concept] = (),
    region: Region | None = None,
    cache: Literal["memory", "disk", "off"] = "memory",
    cache_folder: str | Path | None = None,
    say: Callable[[str], None] = print,
    estimated: Callable[[Estimate], None] | None = None,
) -> Result | None:
    """Trains and saves; returns None after a dry run.

    Args:
        method: what trains, from `lora.prepare`, `dreambooth.prepare` or `controlnet.prepare`.
        data: the pictures.
        settings: steps, batches, optimizer, precision, checkpoints and validation.
        out: receives `checkpoints/`, `samples/`, `log.jsonl` and the result in a folder named after the method.
        record: the recipe's resolved settings, saved beside every checkpoint and compared when resuming.
        prior: class images of DreamBooth.
        further: subjects besides that of `data` and `prior`, whose share is 1.
        region: mask of the subject per entry, see `cache.encode_views`; needs the cache.
        cache: where encoded pictures and captions are kept; "off": encoded in every step.
        cache_folder: of the cache on disk; None: `out/cache`.
        say: receives progress lines, on the main process only.
        estimated: receives what the run will take, on the main process, before its first step.

    Raises:
        TrainingError: settings, data or a loss that training cannot go on with, or another run in `out`; the last
            checkpoint is intact.
        Stopped: SIGTERM or SIGINT came; the step was finished and saved.
    """
    out, settings = Path(out), launcher.adopted(settings)
    optim.check_optimizer(settings)
    whole = method.whole and "unet" in method.models
    dora = any(".lora_magnitude_vector." in name for name in method.trainable())
    quantize.check_quantization(settings.quantize, whole=whole, adapter=method.name, dora=dora)
    offload.check_offload(settings, whole=whole)
    with contextlib.ExitStack() as alone:
        if not settings.dry_run and state().is_main_process:
            alone.enter_context(lock.held(out))
        record = record if record is not None else {"train": config.resolved(settings)}
        accelerator = make_accelerator(settings, out, say, record)
        tell = say if accelerator.is_main_process else _silent
        if settings.precision == precision.AUTO:
            settings = replace(settings, precision=_precision(method, settings, accelerator, data.sizes[0], out, tell))
        prepared = prepare_run(
            method,
            [Concept(name="data", views=data, prior=prior), *further],
            settings,
            accelerator,
            region=region,
            cache=cache,
            cache_folder=Path(cache_folder) if cache_folder else out / "cache",
            say=tell,
        )
        if method.begin is not None and not settings.dry_run and _kept(settings, out) is None:
            tell(_begun(method, prepared, settings))
        facts = _facts(method, prepared, _with_precision(record, settings))
        with kernels(method, settings, accelerator):
            run = _start(method, settings, accelerator, prepared, out, facts, tell)
            found = announce(method, accelerator.unwrap_model(run.model), settings, prepared, tell)
            if estimated is not None and accelerator.is_main_process:
                estimated(found)
            if settings.dry_run:
                _resumable(run, contents=False)
                return None
            _resume(run)
            return _loop(run)


def _silent(line: str) -> None:
    pass


def _kept(settings: TrainSettings, out: Path) -> tuple[Path, checkpoint.State] | None:
    """The checkpoint that `train.resume` names, if any; what is wrong with others is said when it is restored."""
    stop = settings.if_damaged == "stop"
    if not settings.resume:
        return None
    return checkpoint.find(settings.resume, out / "checkpoints", _silent, stop_if_damaged=stop)


def _begun(method: Method, prepared: Prepared, settings: TrainSettings) -> str:
    """Sets the weights that begin with what the first batches send through the networks, before they are divided."""
    assert method.begin is not None
    wanted = ("preserved", "inside")  # what the base would be asked beside; here nothing is trained yet

    def plain(drawn: DrawnBatch) -> Batch:
        batch = tensors(prepared.ready(drawn))
        return cast(Batch, {key: value for key, value in batch.items() if key not in wanted})

    batches = (plain(drawn) for drawn in prepared.feed.whole(settings.steps))
    return method.begin(batches, lambda batch: method.step(method.models, batch, prepared.dtype))


def _precision(
    method: Method,
    settings: TrainSettings,
    accelerator: Accelerator,
    size: tuple[int, int],
    out: Path,
    say: Callable[[str], None],
) -> Any:
    """What `train.precision: auto` is in this run: a checkpoint's, where there is one to go on from."""
    found = _kept(settings, out)
    kept = found[1].facts["settings"].get("train", {}).get("precision") if found else None
    if found and kept in DTYPES:
        say(f"train.precision auto: {kept}, as in {found[0]}")
        return kept
    return precision.of_training(method, settings, accelerator, size, say)


def _with_precision(record: dict[str, Any], settings: TrainSettings) -> dict[str, Any]:
    """The record with the precision that was computed in, which repeats the run where `auto` might not."""
    if record.get("train", {}).get("precision") != precision.AUTO:
        return record
    return {**record, "train": {**record["train"], "precision": settings.precision}}


def _facts(method: Method, prepared: Prepared, record: dict[str, Any]) -> dict[str, Any]:
    """What shapes the weights; a checkpoint keeps it, and resuming compares it."""
    return {
        "base model": method.parts.identity,
        "schedule of the base": {key: value for key, value in method.parts.scheduler.items() if key[0] != "_"},
        "training method": method.name,
        "samples per step": prepared.feed.per_step,
        **{f"{CONTENT}{what}": _digest(names) for what, names in prepared.names.items()},
        "settings": record,
    }


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
    for line in optim.rates_table(trainable, settings, method.factors):
        say(line)
    for name in optim.frozen(trainable, settings):  # still saved: it is a part of the result
        trainable[name].requires_grad_(False)
    if method.after_step is not None and settings.optimizer == "schedulefree":
        raise TrainingError(
            "lora.max_norm does not go with train.optimizer schedulefree, which keeps several points of which it would "
            "bound one"
        )
    stepper = Stepper(method, prepared.dtype, accelerator.device)
    if sharding.asked(accelerator):
        sharding.divide(method, settings, accelerator)
        now = method.parameters()  # other tensors, where networks train whole
        trainable = {name: now[name] for name in trainable}
        model, optimizer = stepper, optim.build_optimizer(trainable, settings, method.factors)
    else:
        model, optimizer = accelerator.prepare(stepper, optim.build_optimizer(trainable, settings, method.factors))
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
        ema=optim.WeightAverage(list(trainable.values()), settings.ema) if settings.ema else None,
        scaler=torch.amp.GradScaler(accelerator.device.type) if fp16 else None,
        say=say,
    )


def _resumable(run: _Run, *, contents: bool = True) -> tuple[Path, checkpoint.State] | None:
    """The checkpoint that `train.resume` names, if any, which fits this run.

    Args:
        run: that is to go on.
        contents: what the data holds is compared too; a dry run has not encoded it and knows it under other names.

    Raises:
        TrainingError: settings or data that shape the weights have changed, each named with both values.
    """
    resume, stop = run.settings.resume, run.settings.if_damaged == "stop"
    found = checkpoint.find(resume, run.out / "checkpoints", run.say, stop_if_damaged=stop) if resume else None
    if found is None:
        return None
    path, state = found
    if state.step > run.settings.steps:
        raise TrainingError(
            f"train.steps {run.settings.steps} is less than the {state.step} steps that {path} has; take more, another "
            "out, or --train.resume null to start anew"
        )
    # The number of steps is free unless the learning rate depends on it.
    free, before = ["train.steps"] if run.settings.schedule == "constant" else [], state
    if not contents:
        own = {name: value for name, value in run.facts.items() if name.startswith(CONTENT)}
        kept = {name: value for name, value in state.facts.items() if not name.startswith(CONTENT)}
        before = replace(state, facts=kept | own)
    checkpoint.refuse_changes(path, before, run.facts, free=free)
    return found


def _resume(run: _Run) -> None:
    """Restores the checkpoint that `train.resume` names, if any."""
    found = _resumable(run)
    if found is None:
        return
    path, state = found
    with torch.no_grad():
        for name, parameter in run.trainable.items():
            sharding.local(parameter).copy_(sharding.local(sharding.like(state.weights[name], parameter)))
    checkpoint.restore_optimizer(_bare(run.optimizer), state.optimizer)
    if run.ema is not None and state.ema is not None:
        run.ema.load([state.ema[name] for name in run.trainable], state.ema_updates)
    if run.scaler is not None and state.scaler is not None:
        run.scaler.load_state_dict(state.scaler)
    run.step, run.saved = state.step, path
    _check_snapshots(run)
    run.say(f"resumed from {path} at step {state.step}")


def _check_snapshots(run: _Run) -> None:
    """Those that this run will not write again are as they were written: tuning may choose one of them."""
    for folder in checkpoint.folders(run.out / SNAPSHOTS):
        if checkpoint.step_of(folder) > run.step:
            break
        try:
            files.verify_folder(folder)
        except FileError as error:
            raise TrainingError(f"a snapshot is damaged ({error}); delete {folder} to go on without it") from error


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    bare: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return bare


def _loop(run: _Run) -> Result:
    settings, accelerator = run.settings, run.accelerator
    log = Log(
        run.out / "log.jsonl",
        accelerator,
        run.say,
        step=run.step,
        steps=settings.steps,
        per_step=run.prepared.feed.per_step,
    )
    stop = Signals()
    began = time.perf_counter()
    parameters = list(run.trainable.values())
    ahead = run.prepared.feed.ahead(run.step, settings.steps, settings.workers)
    with stop, contextlib.closing(log), contextlib.closing(ahead) as batches:
        if _validation_due(run) and _unseen(run, log):  # a run may have been killed between a checkpoint and this
            _validate(run, log)
        for micros in batches:
            loss = _step(run, micros, parameters)
            run.step += 1
            log.add(loss)
            stopping = stop.agreed(accelerator, run.step)
            last = run.step == settings.steps
            saving = stopping or last or run.step % settings.save_every == 0
            if run.step % settings.log_every == 0 or saving:
                # Reads the loss, so that one that is not finite stops training before anything is saved.
                log.write(run.step, _bare(run.optimizer).param_groups[0]["lr"], run.saved)
            if settings.snapshot_every and run.step % settings.snapshot_every == 0:
                # Before the checkpoint, from which a run that is killed here would go on without it.
                _ship(run, run.out / SNAPSHOTS / f"{checkpoint.PREFIX}{run.step:06d}")
            if saving:
                _save(run)
            if _validation_due(run):
                _validate(run, log)
            if stopping and not last:
                raise _stopped(run)
        # Also one that came in the last step or while it was validated: what follows a training takes long.
        if stop.agreed(accelerator, 0):
            raise _stopped(run)
    seconds = time.perf_counter() - began
    folder = _ship(run, run.out / run.method.name)
    for tracker in accelerator.trackers:  # not end_training(), which also ends the process group: more may follow
        tracker.finish()
    return Result(folder=folder, checkpoint=run.saved, step=run.step, losses=log.losses, seconds=seconds)


def _stopped(run: _Run) -> Stopped:
    return Stopped(f"stopped after step {run.step}, saved {run.saved}; go on with --train.resume latest")


def _step(run: _Run, micros: list[DrawnBatch], parameters: list[nn.Parameter]) -> Tensor:
    """One optimizer step; returns its loss (), on the device, without waiting for it."""
    settings, accelerator, optimizer = run.settings, run.accelerator, _bare(run.optimizer)
    torch.manual_seed(seed_of(settings.seed, "dropout", run.step, accelerator.process_index))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * optim.rate(run.step, settings)
    total = torch.zeros((), device=accelerator.device)
    for number, micro in enumerate(micros):
        batch = run.prepared.ready(micro)
        last = number == len(micros) - 1
        sharding.sync(run.method, gradients=last)
        with contextlib.nullcontext() if last else accelerator.no_sync(run.model):
            loss = (run.model(batch) * batch["weight"]).mean() / len(micros)
            (loss if run.scaler is None else run.scaler.scale(loss)).backward()
        total += loss.detach()
    sharding.average(run.method, parameters)
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
    if run.method.after_step is not None:
        run.method.after_step()
    optimizer.zero_grad(set_to_none=True)
    if run.ema is not None:
        run.ema.update()
    return total


def _all_reached(run: _Run) -> None:
    """Every model that is to train gets a gradient in the first step, or training would silently leave it out."""
    for name in run.method.models:
        own = [value for key, value in run.trainable.items() if key.startswith(f"{name}.")]
        wanted = [value for value in own if value.requires_grad]  # train.rates may freeze all of a model
        if (wanted or not own) and all(value.grad is None for value in wanted):
            raise TrainingError(
                f"no gradient reaches {name}, it would not train; check what method {run.method.name} trains"
            )


def _save(run: _Run) -> None:
    """Writes a checkpoint from the main process; all processes learn whether that went well."""
    trouble: list[TrainingError] = []
    weights, optimizer = sharding.gathered(run.trainable), sharding.gathered(_bare(run.optimizer).state_dict())
    average = sharding.gathered(dict(zip(run.trainable, run.ema.average, strict=True))) if run.ema else None
    if run.accelerator.is_main_process:
        state = checkpoint.State(
            step=run.step,
            weights=weights,
            optimizer=optimizer,
            ema=average,
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


def _validation_due(run: _Run) -> bool:
    return run.step in (0, run.settings.steps) or run.step % run.settings.validation.every == 0


def _unseen(run: _Run, log: Log) -> bool:
    """Whether the validation of this step is missing, in part at least; all processes agree."""
    drawn = len(list(_samples_folder(run).glob("*.png")))
    missing = drawn < len(run.settings.validation.prompts) or bool(run.prepared.fixed and not log.validated)
    flag = torch.tensor(float(missing and run.accelerator.is_main_process), device=run.accelerator.device)
    return bool(run.accelerator.reduce(flag, "sum") > 0)


def _samples_folder(run: _Run) -> Path:
    return run.out / "samples" / f"{checkpoint.PREFIX}{run.step:06d}"


def _validate(run: _Run, log: Log) -> None:
    """Samples and the fixed-noise loss, with the averaged weights where there are any."""
    settings, prepared = run.settings, run.prepared
    if not settings.validation.prompts and not prepared.fixed:
        return
    divided, folder = sharding.asked(run.accelerator), _samples_folder(run)
    with _shipped(run):
        if settings.validation.prompts:
            validate.samples(
                run.method,
                settings.validation,
                prepared.texts,
                folder,
                device=run.accelerator.device,
                size=prepared.size,
                dtype=prepared.dtype,
                # Divided weights are gathered by all at once, so all draw every picture.
                rank=0 if divided else run.accelerator.process_index,
                processes=1 if divided else run.accelerator.num_processes,
                write=run.accelerator.is_main_process or not divided,
            )
        if prepared.fixed:
            bare = run.accelerator.unwrap_model(run.model)
            value = validate.fixed_loss(lambda batch: bare(prepared.ready(batch)), prepared.fixed, [bare])
            log.note(run.step, {"validation_loss": value})
    run.accelerator.wait_for_everyone()
    if settings.validation.prompts and run.accelerator.is_main_process:  # all have drawn their share
        write_sheet(folder.parent, settings.validation.prompts)
        log.pictures(run.step, sorted(folder.glob("*.png")))


@contextlib.contextmanager
def _shipped(run: _Run) -> Iterator[None]:
    """Within the context the networks hold the weights that would be shipped: an average, where there is one."""
    if run.ema is None:
        with optim.evaluated(_bare(run.optimizer), list(run.trainable.values())):
            yield
        return
    run.ema.swap()
    try:
        yield
    finally:
        run.ema.swap()


def _ship(run: _Run, folder: Path) -> Path:
    """Saves what was trained, averaged if there is an average, whole or not at all."""
    with _shipped(run):
        weights = {name: value.detach().clone() for name, value in sharding.gathered(run.trainable).items()}
    if run.accelerator.is_main_process:
        dtype = DTYPES[run.settings.save_precision]
        weights = {name: value.to(dtype) for name, value in run.method.result(weights).items()}
        metadata = {"settings": json.dumps(run.facts["settings"]), "step": str(run.step)}
        with checkpoint.atomic_folder(folder) as place:
            run.method.save(weights, place, metadata)
            config.write_settings(run.facts["settings"], place / "settings.yaml")
            rule = run.method.parts.text
            more = {} if rule.neutral else {"text": rule.to_config()}
            files.write_manifest(place, {"format": 1, "kind": run.method.name, "step": run.step, **more})
        run.say(f"saved {folder}")
    run.accelerator.wait_for_everyone()
    return folder
