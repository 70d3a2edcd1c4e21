"""Release folders and weights by command: `python -m adapters inspect | verify | convert | merge | extract`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import compose, files, keys
from .base import modules_of
from .errors import AdapterError, BaseMismatchError, FileError
from .injection import fit_to_model
from .machine import explain
from .measuring.verify import verify
from .source import MODEL_FILE, Source, open_source, read_adapter, read_guider
from .tokens import EMBEDS_FILE, write_tokens
from .writing import LORA_FILE, write_diffusers, write_kohya, write_peft

BASE = "pipeline folder, or with scfg-toolkit also a single-file checkpoint or pocket"
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


Opener = Callable[[str], Any]


def main(arguments: Sequence[str] | None = None, *, opener: Opener | None = None) -> int:
    """Run one command; 0 on success, 2 on an error that was explained on stderr.

    Args:
        arguments: of the command line.
        opener: gives the pipeline of a base that is no folder, such as a single-file checkpoint.
    """
    parser = _parser()
    parser.set_defaults(opener=opener)
    options = parser.parse_args(arguments)
    try:
        print(json.dumps(options.run(options), indent=2))
    except AdapterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m adapters", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="what a folder or file holds")
    inspect.add_argument("path")
    inspect.set_defaults(run=_inspect)
    check = commands.add_parser("verify", help="check hashes and recompute every number from per_image.csv")
    check.add_argument("path", help="release folder, or a zip of one")
    check.add_argument("--signer", help="file of public keys, by one of which the release must be signed")
    check.set_defaults(run=lambda options: verify(options.path, signers=options.signer))
    convert = commands.add_parser("convert", help="rewrite in other keys")
    convert.add_argument("path")
    convert.add_argument("out", type=Path, help="file to write; for peft a folder")
    convert.add_argument("--to", choices=("peft", "diffusers", "kohya"), required=True)
    convert.add_argument("--rank", type=int, help="approximate by a plain LoRA of this rank first")
    convert.add_argument("--base", help=f"{BASE}; needed with --rank for DoRA, LoHa and LoKr")
    convert.add_argument("--precision", choices=PRECISIONS, help="of the file; default: as it is")
    convert.set_defaults(run=_convert)
    merge = commands.add_parser("merge", help="into a base (--base) or, without it, several LoRAs into one")
    merge.add_argument("paths", nargs="+", metavar="PATH[=WEIGHT]")
    merge.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder (U-net; pipeline where text encoders change) or .safetensors",
    )
    merge.add_argument("--base", help=f"{BASE} that takes the adapters")
    merge.add_argument("--rank", type=int, help="without --base: cut the sum to this rank")
    merge.set_defaults(run=_merge)
    extract = commands.add_parser("extract", help="the LoRA nearest to the difference of two U-nets")
    extract.add_argument("base", help=f"U-net folder, {BASE}")
    extract.add_argument("tuned", help=f"U-net folder, {BASE}")
    extract.add_argument("--out", type=Path, required=True)
    extract.add_argument("--rank", type=int, required=True)
    extract.set_defaults(run=_extract)
    return parser


def _inspect(options: argparse.Namespace) -> dict[str, Any]:
    with files.understood(options.path):
        return _summary(open_source(options.path))


def _summary(source: Source) -> dict[str, Any]:
    summary: dict[str, Any] = {"path": str(source.path)}
    if source.manifest is not None:
        summary |= {name: source.manifest.get(name) for name in ("kind", "base", "versions")}
        summary["files"] = {name: entry["size"] for name, entry in source.manifest["files"].items()}
    if (guider := read_guider(source)) is not None:
        summary["guider"] = guider
    if source.file("config.json") is not None:
        return summary | {"model": files.read_object(source.path / "config.json").get("_class_name")}
    adapter = read_adapter(source)
    summary["kinds"] = adapter.kinds
    if adapter.tokens:
        summary["tokens"] = {token: sorted(own) for token, own in adapter.tokens.items()}
    for component in adapter.components:
        modules = adapter.part(component)
        summary[component] = {
            "modules": len(modules),
            "parameters": sum(t.numel() for m in modules.values() for t in m.tensors.values()),
            "ranks": sorted({m.rank for m in modules.values()}),
            "scales": sorted({round(m.scale, 6) for m in modules.values()}),
            "dtypes": sorted(
                {str(t.dtype).removeprefix("torch.") for m in modules.values() for t in m.tensors.values()}
            ),
        }
    return summary


def _convert(options: argparse.Namespace) -> dict[str, Any]:
    adapter, summary = read_adapter(open_source(options.path)), {"written": str(options.out)}
    if options.rank is not None:
        models = _models(options, adapter) if options.base is not None else None
        found = (
            compose.rerank(adapter, options.rank) if models is None else compose.to_lora(adapter, models, options.rank)
        )
        adapter, summary["relative_error"] = found.adapter, f"{found.error:.4g}"
    if options.precision is not None:
        adapter = adapter.to(PRECISIONS[options.precision])
    _write(adapter, options.out, options.to)
    return summary


def _write(adapter: keys.Adapter, out: Path, spelling: str) -> None:
    if spelling == "peft":
        with files.write_folder(out) as stage:
            write_peft(stage, adapter)
            if adapter.tokens:
                write_tokens(stage / EMBEDS_FILE, adapter.tokens)
        return
    if out.suffix != ".safetensors":
        raise FileError(f"{out}: give a file name that ends in .safetensors, such as {out / LORA_FILE}")
    out.parent.mkdir(parents=True, exist_ok=True)
    (write_kohya if spelling == "kohya" else write_diffusers)(out, adapter)
    if adapter.tokens:
        write_tokens(out.with_name(f"{out.stem}.{EMBEDS_FILE}"), adapter.tokens)


def _merge(options: argparse.Namespace) -> dict[str, Any]:
    weighted = [(read_adapter(open_source(path)), weight) for path, weight in map(_weighted, options.paths)]
    summary: dict[str, Any] = {"written": str(options.out), "weights": [weight for _, weight in weighted]}
    if options.base is None:
        total = compose.weighted_sum(weighted)
        if options.rank is not None:
            found = compose.rerank(total, options.rank)
            total, summary["relative_error"] = found.adapter, f"{found.error:.4g}"
        _write(total, options.out, "diffusers")
        return summary
    parts = {part for adapter, _ in weighted for part in adapter.components}
    models: dict[str, torch.nn.Module]
    if parts == {"unet"}:
        models, whole = {"unet": _unet(options.base, options.opener)}, None
    else:
        whole = _pipeline(options.base, options.opener)
        models = modules_of(whole)
    for adapter, weight in weighted:
        compose.merge(_fitted(adapter, models), models, weight=weight)
    with files.write_folder(options.out) as stage:
        saved: Any = whole or models["unet"]
        saved.save_pretrained(stage, safe_serialization=True)
    return summary | {"holds": "the whole pipeline" if whole else "the U-net"}


def _fitted(adapter: keys.Adapter, models: Mapping[str, torch.nn.Module]) -> keys.Adapter:
    if adapter.tokens:
        raise AdapterError(
            f"the learned token {next(iter(adapter.tokens))!r} is no change of weights; use adapters.load"
        )
    missing = [component for component in adapter.components if component not in models]
    if missing:
        raise BaseMismatchError(f"the adapter changes {missing[0]}, which the base has not")
    modules = {n: m for part in adapter.components for n, m in fit_to_model(models[part], adapter, part).items()}
    return replace(adapter, modules=modules)


def _weighted(text: str) -> tuple[str, float]:
    path, _, weight = text.rpartition("=")
    if not path:
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError as error:
        raise AdapterError(f"{text!r}: expected PATH or PATH=WEIGHT with a number") from error


def _extract(options: argparse.Namespace) -> dict[str, Any]:
    base, tuned = ({"unet": _unet(place, options.opener)} for place in (options.base, options.tuned))
    found = compose.extract(base, tuned, options.rank)
    _write(found.adapter, options.out, "diffusers")
    return {"written": str(options.out), "modules": len(found.adapter.modules), "relative_error": f"{found.error:.4g}"}


def _unet(base: str, opener: Opener | None) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    if not (folder := Path(base).expanduser()).is_dir():
        opened: torch.nn.Module = _pipeline(base, opener).unet
        return opened
    place = folder / "unet" if (folder / "unet").is_dir() else folder
    files.read_header(place / MODEL_FILE)
    unet: torch.nn.Module = UNet2DConditionModel.from_pretrained(place, use_safetensors=True)
    return unet


def _models(options: argparse.Namespace, adapter: keys.Adapter) -> dict[str, torch.nn.Module]:
    if adapter.components == ["unet"]:
        return {"unet": _unet(options.base, options.opener)}
    return modules_of(_pipeline(options.base, options.opener))


def _pipeline(base: str, opener: Opener | None) -> Any:
    from diffusers import DiffusionPipeline

    folder = Path(base).expanduser()
    if not folder.is_dir():
        if opener is None:
            raise FileError(f"{base}: no folder; `scfg-toolkit` reads other bases, such as single-file checkpoints")
        return opener(base)
    if not (folder / "model_index.json").is_file():
        raise FileError(f"{base}: no pipeline (model_index.json) in it; the adapter also changes text encoders")
    return DiffusionPipeline.from_pretrained(folder, use_safetensors=True)


if __name__ == "__main__":
    sys.exit(main())
