"""EVA: A starts as the main directions of the layer's inputs, and ranks go where they explain most.

Paischer et al. 2024, arXiv 2410.07170. For every layer an incremental PCA of its input vectors over some batches (Ross et
al. 2008: mean, the k largest singular values S and right-singular vectors V of what was seen so far, total variance):

    [S·V; batch − its mean; √(n·b/(n + b))·(mean − its mean)] → SVD → S, V        n rows before, b rows in the batch

It stops when each direction in use is the one before to a cosine of τ. Then the explained shares of variance S²/total of
all layers are sorted, and the Σr highest get a rank each: at most ρ·r a layer, at least one (PEFT leaves out layers that
get none). A = the first rᵢ rows of V, orthonormal; B = 0, so the model is unchanged. Layers that are called in turn with
one and the same tensor (q, k, v; gate, up) share a PCA. Padding, where an attention mask says so, is left out.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.errors import UseError
from deltaw.core.method import Site


class PCA:
    """Of the rows seen so far, at most `most` directions."""

    def __init__(self, most: int):
        self.most, self.rows, self.total = most, 0, 0.0
        self.vectors = self.values = self.mean = torch.empty(0)
        self.same = torch.empty(0)
        """Cosines between each direction and the one before the last update."""

    @property
    def shares(self) -> Tensor:
        """Explained shares of the variance, falling."""
        return self.values.square() / max(self.total, 1e-30)

    def update(self, x: Tensor) -> None:
        """x: [rows, in]"""
        x, before = x.float(), self.vectors
        n, b, mean = self.rows, len(x), x.float().mean(0)
        parts = [x - mean]
        if n:
            parts += [self.values[:, None] * before, ((n * b / (n + b)) ** 0.5 * (self.mean - mean))[None]]
        else:
            self.mean = torch.zeros_like(mean)
        self.total += sum(float(part.square().sum()) for part in (parts[0], *parts[2:]))
        self.rows, self.mean = n + b, (n * self.mean + b * mean) / (n + b)
        self.values, self.vectors = _svd(torch.cat(parts), self.most)
        if n:
            shared = min(len(before), len(self.vectors))
            self.same = (before[:shared] * self.vectors[:shared]).sum(1).abs()


def _svd(x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The largest singular values and their right-singular vectors: exact where small, else randomised (seeded)."""
    if min(x.shape) <= 8 * most:
        _, s, vt = torch.linalg.svd(x, full_matrices=False)
        return s[:most], vt[:most]
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(0)
        _, s, v = torch.svd_lowrank(x, q=2 * most, niter=4)
    return s[:most], v.T[:most]


@torch.no_grad()
def eva(
    model: nn.Module, ranks: Mapping[Site, int], batches: Iterable[Any] | None, *, rho: float = 2.0, tau: float = 0.99
) -> dict[Site, Tensor]:
    """First A of every site, [rᵢ, in], from the model's inputs `batches`; the sum of the ranks stays what it was."""
    if batches is None:
        raise UseError(
            "init: eva starts from the model's activations: attach(model, method, …, batches=some of its inputs)"
        )
    most = round(rho * max(ranks.values()))
    pcas: dict[Site, PCA] = {}
    leaders: dict[Site, Site] = {}  # the site whose PCA counts, where several read one tensor
    chosen = dict(ranks)
    mask: list[Tensor | None] = [None]
    last: list[Any] = [None, None]  # the tensor that was read last, and the site that counts for it

    def watch(site: Site) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if site not in leaders:
                leaders[site] = last[1] if x is last[0] else site
            last[:] = x, leaders[site]
            if leaders[site] == site:
                kept = mask[0]
                rows = x[kept.bool()] if kept is not None and x.shape[:-1] == kept.shape else x.flatten(0, -2)
                pcas.setdefault(site, PCA(most)).update(rows)

        return hook

    hooks = [model.get_submodule(site.path).register_forward_pre_hook(watch(site), with_kwargs=True) for site in ranks]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            mask[0] = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            model(**batch) if isinstance(batch, Mapping) else model(batch)
            last[:] = None, None
            silent = [str(site) for site in ranks if site not in leaders]
            if silent:
                raise UseError(
                    f"init: eva: {', '.join(silent[:4])} did not run, so that nothing is known of its inputs"
                )
            chosen = _share(ranks, {site: pcas[leaders[site]] for site in ranks}, rho)
            if all(_settled(pcas[leaders[site]], rank, tau) for site, rank in chosen.items()):
                break
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    few = [site for site, rank in chosen.items() if site not in leaders or len(pcas[leaders[site]].vectors) < rank]
    if few or sum(chosen.values()) < sum(ranks.values()):
        raise UseError("init: eva needs more rows than ranks: give more or larger batches")
    return {site: pcas[leaders[site]].vectors[:rank].clone() for site, rank in chosen.items()}


def _settled(pca: PCA, rank: int, tau: float) -> bool:
    return len(pca.same) >= rank and bool((pca.same[:rank] >= tau).all())


def _share(ranks: Mapping[Site, int], pcas: Mapping[Site, PCA], rho: float) -> dict[Site, int]:
    """Σr ranks to the directions that explain most, over all sites."""
    given = []
    for site, rank in ranks.items():
        shares = pcas[site].shares[: round(rho * rank)].tolist()
        given += [(share if number else float("inf"), -number, site) for number, share in enumerate(shares)]
    given.sort(key=lambda one: one[:2], reverse=True)
    chosen = dict.fromkeys(ranks, 0)
    for _, _, site in given[: sum(ranks.values())]:
        chosen[site] += 1
    return chosen
