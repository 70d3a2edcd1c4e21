"""Module names between dots and kohya's underscores.

kohya writes `lora_unet_` + the module's path with `_` for `.`, which cannot be undone by rule alone (`to_q`,
`ff_net_0`): the words below are those of the SD-1.x / 2.x / SDXL U-nets and CLIP text encoders. SDXL files of
sd-scripts and LyCORIS name the original (sgm) blocks instead; these are translated for two layers per block, which all
these models have.
"""

from __future__ import annotations

import re

from .errors import FormatError

__all__ = ["fits_sdxl", "from_sgm_path", "kohya_name", "module_name"]

_WORDS = (
    *("down_blocks", "up_blocks", "mid_block", "resnets", "attentions", "downsamplers", "upsamplers"),
    *(
        "transformer_blocks",
        "attn1",
        "attn2",
        "to_q",
        "to_k",
        "to_v",
        "to_out",
        "ff",
        "net",
        "proj",
        "proj_in",
        "proj_out",
    ),
    *("conv", "conv1", "conv2", "conv_in", "conv_norm_out", "conv_out", "conv_shortcut"),
    *("norm", "norm1", "norm2", "norm3", "layer_norm1", "layer_norm2", "final_layer_norm"),
    *("time_emb_proj", "time_embedding", "add_embedding", "linear_1", "linear_2"),
    *(
        "encoder",
        "layers",
        "self_attn",
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
        "mlp",
        "fc1",
        "fc2",
        "text_projection",
    ),
)
_WORD = re.compile("|".join(sorted((*_WORDS, r"\d+"), key=len, reverse=True)))
_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
    "lycoris_te1_": "text_encoder",
    "lycoris_te2_": "text_encoder_2",
    "lycoris_te_": "text_encoder",
    "lycoris_unet_": "unet",
    "lycoris_": "unet",
}
_SGM_PLAIN = {
    "input_blocks_0_0": "conv_in",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
_SGM_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_TO_SGM_PLAIN = {new: old for old, new in _SGM_PLAIN.items()}
_TO_SGM_RESNET = {new: old for old, new in _SGM_RESNET.items()}
_SGM_WORDS = ("input_blocks", "output_blocks", "middle_block", "out", "time_embed", "label_emb")
_SDXL_BLOCK = r"(norm|proj_in|proj_out|transformer_blocks\.{}\..+)"
_SDXL = re.compile(
    r"conv_in|conv_norm_out|conv_out|(time|add)_embedding\.linear_[12]"
    r"|down_blocks\.[01]\.downsamplers\.0\.conv|up_blocks\.[01]\.upsamplers\.0\.conv"
    r"|(down_blocks\.[012]\.resnets\.[01]|up_blocks\.[012]\.resnets\.[012]|mid_block\.resnets\.[01])\..+"
    r"|(down_blocks\.1\.attentions\.[01]|up_blocks\.1\.attentions\.[012])\."
    + _SDXL_BLOCK.format("[01]")
    + r"|(down_blocks\.2\.attentions\.[01]|up_blocks\.0\.attentions\.[012]|mid_block\.attentions\.0)\."
    + _SDXL_BLOCK.format(r"\d")
)


def module_name(flat: str) -> str:
    """`lora_unet_mid_block_attentions_0_proj_in` -> `unet.mid_block.attentions.0.proj_in`."""
    prefix = next((p for p in _PREFIXES if flat.startswith(p)), None)
    if prefix is None:
        raise FormatError(f"{flat!r}: known prefixes are {', '.join(_PREFIXES)}")
    component, rest = _PREFIXES[prefix], flat.removeprefix(prefix)
    rest = _from_sgm(rest) if component == "unet" else rest.removeprefix("text_model_")
    words, position = [], 0
    while position < len(rest):
        match = _WORD.match(rest, position)
        end = match.end() if match else position
        if match is None or rest[end : end + 1] not in ("", "_"):
            raise FormatError(f"{flat!r}: {rest[position : position + 40]!r} is no layer of an SD or SDXL model")
        words.append(match.group())
        position = end + 1
    if not words or rest.endswith("_"):
        raise FormatError(f"{flat!r} names no layer")
    return ".".join([component, *words])


def kohya_name(name: str, *, sdxl: bool, sgm: bool = False) -> str:
    """The inverse; text encoders get `lora_te_`, in SDXL `lora_te1_` and `lora_te2_`.

    Args:
        name: `component.module`.
        sdxl: the base has two text encoders.
        sgm: name the U-net's layers as the original SDXL code does, which sd-scripts and LyCORIS follow.
    """
    component, _, path = name.partition(".")
    if component == "unet":
        if sgm:
            return "lora_unet_" + _to_sgm(path)
        # The one module family whose diffusers spelling diffusers' own kohya reader garbles.
        path = path.replace("add_embedding.linear_1", "label_emb.0.0").replace(
            "add_embedding.linear_2", "label_emb.0.2"
        )
        return "lora_unet_" + path.replace(".", "_")
    prefix = "lora_te2_" if component == "text_encoder_2" else "lora_te1_" if sdxl else "lora_te_"
    middle = "" if path == "text_projection" else "text_model_"
    flat = prefix + middle + path.replace(".", "_")
    return flat


def from_sgm_path(path: str) -> str:
    """A U-net module's diffusers path where it is spelt as the original code has it; others come back as they are."""
    if path.split(".")[0] not in _SGM_WORDS:
        return path
    return module_name("lora_unet_" + path.replace(".", "_")).partition(".")[2]


def fits_sdxl(path: str) -> bool:
    """Whether SDXL's U-net has such a module; the original names are defined for these alone."""
    return _SDXL.fullmatch(path) is not None


def _from_sgm(rest: str) -> str:
    if rest in _SGM_PLAIN:
        return _SGM_PLAIN[rest]
    if match := re.fullmatch(r"middle_block_([012])_(.+)", rest):
        place = ("resnets_0", "attentions_0", "resnets_1")[int(match[1])]
        return f"mid_block_{place}_{_SGM_RESNET.get(match[2], match[2])}"
    if match := re.fullmatch(r"(input|output)_blocks_(\d+)_([012])_(.+)", rest):
        side, index, inner, tail = match[1], int(match[2]), int(match[3]), match[4]
        block, layer = divmod(index - 1, 3) if side == "input" else divmod(index, 3)
        blocks = "down_blocks" if side == "input" else "up_blocks"
        if tail in ("op", "conv"):  # an sgm level ends in its sampler, at whatever inner index is next
            sampler = "downsamplers_0_conv" if tail == "op" else "upsamplers_0_conv"
            return f"{blocks}_{block}_{sampler}"
        return f"{blocks}_{block}_{('resnets', 'attentions')[min(inner, 1)]}_{layer}_{_SGM_RESNET.get(tail, tail)}"
    return rest


def _to_sgm(path: str) -> str:
    flat = path.replace(".", "_")
    if flat in _TO_SGM_PLAIN:
        return _TO_SGM_PLAIN[flat]
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", path):
        inner = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block_{inner}_{_sgm_tail(match[3])}"
    if match := re.fullmatch(r"(down|up)_blocks\.(\d)\.(down|up)samplers\.0\.conv", path):
        block = int(match[2])
        return f"input_blocks_{3 * block + 3}_0_op" if match[1] == "down" else f"output_blocks_{3 * block + 2}_2_conv"
    if match := re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.+)", path):
        index = 3 * int(match[2]) + int(match[4])
        side = f"input_blocks_{index + 1}" if match[1] == "down" else f"output_blocks_{index}"
        return f"{side}_{int(match[3] == 'attentions')}_{_sgm_tail(match[5])}"
    raise FormatError(f"unet.{path} is no layer of SDXL's U-net")


def _sgm_tail(tail: str) -> str:
    return _TO_SGM_RESNET.get(tail, tail.replace(".", "_"))
