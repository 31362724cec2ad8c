"""Adapters whose modules have the names of another version of transformers, read under those of the model.

    transformers < 4.52                                     the model
    language_model.model.layers.0.self_attn.q_proj       →  model.language_model.layers.0.self_attn.q_proj
    vision_tower.vision_model.encoder.layers.0.mlp.fc1   →  model.vision_tower.encoder.layers.0.mlp.fc1
    visual.blocks.0.attn.qkv                             →  model.visual.blocks.0.attn.qkv

The table is transformers' own, by which it reads checkpoints of that time, asked for the model at hand. Only what the model
has no module for is looked up, and only what lands on one of its parameters is renamed.
"""

import dataclasses
from typing import Any

from torch import nn

from deltaw.core.base import base_parameters, by_path
from deltaw.core.method import Site
from deltaw.formats.directory import Stored
from deltaw.models.names import translator


def renamed(model: nn.Module, stored: Stored) -> Stored:
    """What a directory holds, under the names of `model`, with a note where one was changed."""
    modules, state = by_path(model), stored.state
    strange = list(dict.fromkeys(site for site in state.methods if site.path not in modules))
    if not strange or not hasattr(model, "base_model_prefix"):  # it is of transformers
        return stored
    memory = dict(base_parameters(model)) | dict(model.named_parameters(remove_duplicate=False))
    ask = translator(model, memory)
    new = {site: found for site in strange if (found := _site(site, ask)) is not None and found.path in modules}
    taken = [*new.values(), *(site for site in state.methods if site not in new)]
    if not new or len(set(taken)) < len(taken):  # two that would be one: said as they are called
        return stored
    tables = ({new.get(site, site): value for site, value in table.items()} for table in _tables(state))
    methods, tensors, specs = tables
    copies = {name if name in memory else ask(name) or name: copy for name, copy in stored.copies.items()}
    first, now = next(iter(new.items()))
    note = f"{len(new)} modules have names of another version of transformers: {first} is read as {now}, and so on"
    there = dataclasses.replace(state, methods=methods, tensors=tensors, specs=specs)
    return dataclasses.replace(stored, state=there, copies=copies, notes=[*stored.notes, note])


def _tables(state: Any) -> tuple[Any, Any, Any]:
    return state.methods, state.tensors, state.specs


def _site(site: Site, ask: Any) -> Site | None:
    """The site under the names of the model: by the slot if it is a parameter, else by the module's weight."""
    names = (ask(f"{site.path}.{slot}") for slot in dict.fromkeys((site.slot, "weight", "bias")))
    found = next((name for name in names if name is not None), None)
    return None if found is None else Site(found.rpartition(".")[0], site.slot)
