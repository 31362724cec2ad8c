"""Rows of new tokens, trained beside a method's adapters: on the embedding, and on a head that is not tied to it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from deltaw.core.attach import adapters, attach, plan_of
from deltaw.core.host import host_of
from deltaw.core.plan import TargetPlan
from deltaw.data.kept import Tokens
from deltaw.methods.token_rows import TokenRows, TokenRowsAdapter, table_of
from deltaw.training.trainer import NAME


@torch.no_grad()
def readable(model: nn.Module, batch: Mapping[str, Any], tokens: Tokens) -> dict[str, Any]:
    """Inputs for a method that runs the model before it is attached (EVA), in which new tokens have their first rows.

    batch: input_ids [B, T] and more; of new tokens become inputs_embeds [B, T, dim]. Their rows themselves come after the
    method's adapters, so that a trained copy of a tied head goes first.
    """
    if not tokens.pieces:
        return dict(batch)
    embedding, ids = model.get_input_embeddings(), batch["input_ids"]  # type: ignore[operator]
    new = torch.isin(ids, torch.tensor(list(tokens.pieces), device=ids.device))
    embedded = embedding(torch.where(new, 0, ids))
    for token, pieces in tokens.pieces.items():
        embedded[ids == token] = embedding(torch.tensor(pieces, device=ids.device)).mean(0)
    return {**{key: value for key, value in batch.items() if key != "input_ids"}, "inputs_embeds": embedded}


def attach_rows(model: nn.Module, tokens: Tokens) -> TargetPlan | None:
    """Add rows for `tokens` to the adapter that is trained, and give the whole plan; None where there are no tokens.

    A new row begins as the mean of the rows that spelled the token before (tables [vocabulary, dim]).
    """
    if not tokens.ids:
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    untied = head is not None and head.weight is not embedding.weight
    paths = {id(module): path for path, module in model.named_modules()}
    targets = [paths[id(module)] for module in (embedding, *([head] if untied else []))]
    attach(model, TokenRows(tokens=tuple(tokens.ids.values())), targets=targets, name=NAME)
    for site, adapter in adapters(model, NAME).items():
        if isinstance(adapter, TokenRowsAdapter):
            table = table_of(host_of(model.get_submodule(site.path)))
            for place, token in enumerate(adapter.tokens):
                if token in tokens.pieces:
                    with torch.no_grad():
                        adapter.rows[place] = table[list(tokens.pieces[token])].float().mean(0)
    return plan_of(model, NAME)
