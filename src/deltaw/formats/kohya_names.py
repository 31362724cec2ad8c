"""The names of kohya's files ↔ modules of the base, as one table built from the real model: exact in both directions.

    lora_unet_down_blocks_0_attentions_0_proj_in     prefix of the part, then the path with every dot an underscore
    lora_te_text_model_encoder_layers_0_mlp_fc1      one text encoder; lora_te1_, lora_te2_ where the base has two
    lora_unet_input_blocks_1_1_proj_in               of SDXL's UNet the path in the original checkpoint (sgm), below
    lycoris_model_layers_0_mlp_up_proj               any other single model (LyCORIS' wrapper)

An underscore may be a dot or an underscore of a name: no rule takes it back, only the list of the modules there are.

    sgm                         diffusers                       n counts through all blocks
    input_blocks.0.0            conv_in
    input_blocks.n.0, n.1       down_blocks.i.resnets.j, attentions.j
    input_blocks.n.0.op         down_blocks.i.downsamplers.0.conv
    middle_block.0, 1, 2        mid_block.resnets.0, attentions.0, resnets.1
    output_blocks.n.0, n.1      up_blocks.i.resnets.j, attentions.j
    output_blocks.n.k.conv      up_blocks.i.upsamplers.0.conv, the last of n
    in_layers.2, emb_layers.1, out_layers.3, skip_connection      conv1, time_emb_proj, conv2, conv_shortcut of a resnet

Sources: kohya-ss/sd-scripts `networks/lora.py`, LyCORIS `lycoris/wrapper.py` (prefix), CompVis/Stability `openaimodel.py`.
"""

from collections.abc import Collection, Iterator, Mapping

from deltaw.core.errors import UseError
from deltaw.formats.foreign import Parts

PREFIXES: Mapping[str, tuple[str, ...]] = {
    "unet": ("lora_unet",),
    "transformer": ("lora_transformer", "lora_unet"),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2",),
    "text_encoder_3": ("lora_te3",),
    "model": ("lycoris",),
}
"""Role of a part → prefixes under which files hold it."""
CLIP = "text_model"
"""The level of a CLIP text encoder that every file has in its names; transformers 5 has it in some classes only."""
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_out": "out.2",
}
RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def table(parts: Parts) -> dict[str, list[tuple[str, str]]]:
    """Name in a file → (role, path) of every module that it may mean: one, unless the base's own names are ambiguous."""
    found: dict[str, list[tuple[str, str]]] = {}
    for role, layout in parts.items():
        prefixes = [*PREFIXES.get(role, ()), *(PREFIXES["model"] if len(parts) == 1 and role != "model" else ())]
        original = sgm(layout.entries) if role == "unet" else {}
        for path in {site.path: None for site in layout.specs}:
            inside = [path, *([original[path]] if path in original else []), *_clip(role, path)]
            for name in {f"{prefix}_{one}".replace(".", "_") for prefix in prefixes for one in inside}:
                found.setdefault(name, []).append((role, path))
    return found


def names(parts: Parts) -> dict[tuple[str, str], str]:
    """(role, path) → the name under which kohya's own tools write it. UseError where the model does not tell it."""
    unknown = [role for role in parts if role not in PREFIXES or role == "transformer"]
    if unknown:
        raise UseError(
            f"kohya's files name the layers of a {unknown[0]} as its original checkpoint does, which the model does not "
            "tell: write diffusers' layout instead (--to diffusers)"
        )
    two, result = "text_encoder_2" in parts, dict[tuple[str, str], str]()
    for role, layout in parts.items():
        prefix = PREFIXES[role][1 if two and role == "text_encoder" else 0]
        original = sgm(layout.entries) if role == "unet" and "add_embedding" in layout.entries else {}
        for path in {site.path: None for site in layout.specs}:
            first = next(_clip(role, path), path) if not path.startswith(CLIP + ".") else path
            result[role, path] = f"{prefix}_{original.get(path, first)}".replace(".", "_")
    return result


def _clip(role: str, path: str) -> Iterator[str]:
    """The path of a text encoder's module with the level `text_model` that it lacks, or without the one it has."""
    first = path.partition(".")[0]
    if role.startswith("text_encoder") and first in (CLIP, "encoder", "embeddings"):
        yield path.removeprefix(f"{CLIP}.") if first == CLIP else f"{CLIP}.{path}"


def sgm(entries: Collection[str]) -> dict[str, str]:
    """Path in diffusers' UNet → path in the original checkpoint, for all modules in blocks and those around them."""
    roots = dict(_blocks(set(entries)))
    result = {path: name for path, name in OUTSIDE.items() if path in entries}
    for path in entries:
        parts = path.split(".")
        root = next((".".join(parts[:k]) for k in range(len(parts), 0, -1) if ".".join(parts[:k]) in roots), None)
        if root is not None and path != root:
            rest = path.removeprefix(f"{root}.")
            result[path] = f"{roots[root]}.{RESNET.get(rest, rest) if '.resnets.' in f'.{root}.' else rest}"
        elif root is not None:
            result[path] = roots[root]
    return result


def _blocks(there: set[str]) -> Iterator[tuple[str, str]]:
    """Path of every resnet, transformer and sampler → its place in the original checkpoint."""

    def counted(form: str) -> list[str]:
        found: list[str] = []
        while (path := form.format(len(found))) in there:
            found.append(path)
        return found

    n = 1
    for block in counted("down_blocks.{}"):
        for j, resnet in enumerate(counted(f"{block}.resnets.{{}}")):
            yield resnet, f"input_blocks.{n}.0"
            yield f"{block}.attentions.{j}", f"input_blocks.{n}.1"
            n += 1
        if (down := f"{block}.downsamplers.0.conv") in there:
            yield down, f"input_blocks.{n}.0.op"
            n += 1
    yield from (("mid_block.resnets.0", "middle_block.0"), ("mid_block.attentions.0", "middle_block.1"))
    yield "mid_block.resnets.1", "middle_block.2"
    n = 0
    for block in counted("up_blocks.{}"):
        for j, resnet in enumerate(counted(f"{block}.resnets.{{}}")):
            yield resnet, f"output_blocks.{n}.0"
            yield f"{block}.attentions.{j}", f"output_blocks.{n}.1"
            n += 1
        attends = f"{block}.attentions.0" in there
        yield f"{block}.upsamplers.0.conv", f"output_blocks.{n - 1}.{2 if attends else 1}.conv"
