"""Memory bank: patch tokens of normal images -> how far a query's tokens are from the nearest.

AnomalyGPT (AAAI 2024), few-shot: a patch's anomaly is one minus its best cosine
similarity with the bank, a level at a time, and the mean over levels. A bank that outgrows its
budget is thinned by PatchCore's greedy k-centre coreset (Roth et al., CVPR 2022, section 3.2), and
each centre then becomes the mean of the tokens that are nearest to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

SEARCH_BYTES = 64 * 2**20
CANDIDATES = 8  # tokens that the coreset chooses from, as multiples of its size
PROJECTED = 64  # dimensions in which the coreset measures distances


@dataclass(frozen=True)
class MemoryBank:
    """Tokens of normal images, of unit length."""

    levels: tuple[Tensor, ...]  # L of (M, C_l)

    @classmethod
    def of(
        cls, images: Sequence[list[Tensor]], *, size: int | None = None, seed: int = 0
    ) -> "MemoryBank":
        """The bank of some images, as `ReferenceTokens.of` describes them."""
        return ReferenceTokens.of(images, size=size, seed=seed).bank()

    def __len__(self) -> int:
        """M, the number of tokens."""
        return len(self.levels[0])

    @property
    def nbytes(self) -> int:
        """Memory of the tokens in bytes."""
        return sum(level.nbytes for level in self.levels)

    def to(
        self, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> "MemoryBank":
        """The bank on another device or in another precision."""
        return MemoryBank(tuple(level.to(device=device, dtype=dtype) for level in self.levels))

    def distances(self, levels: list[Tensor], budget: int = SEARCH_BYTES) -> Tensor:
        """Mean over levels of one minus the best cosine similarity: (B, N) in [0, 2].

        Args:
            levels: L tensors (B, N, C_l) of the query's crops.
            budget: bytes that the search may take beside bank and query. Similarities are made in
                blocks; all of them at once (B * N, M) never exist.
        """
        total = torch.zeros(levels[0].shape[:2], device=levels[0].device)
        for level, tokens in zip(levels, self.levels, strict=True):
            query = normalize(level.float().flatten(0, 1), dim=-1)
            total += 1 - best_similarity(query, tokens, budget).view_as(total)
        return total / len(levels)


@dataclass(frozen=True)
class ReferenceTokens:
    """What banks are made of: the images' tokens, whose each is, and their clusters.

    A bank has a token for each cluster, the mean of its members. Without an image it is the mean
    of the others' tokens: nothing of it is left in them, though the clusters were made with it.
    """

    levels: tuple[Tensor, ...]  # L of (n, C_l), of unit length
    owners: Tensor  # (n,) index of the reference image; augmented copies have their image's
    clusters: Tensor  # (n,) which each belongs to, in [0, size)
    size: int

    @classmethod
    def of(
        cls,
        images: Sequence[list[Tensor]],
        owners: Sequence[int] | None = None,
        *,
        size: int | None = None,
        seed: int = 0,
    ) -> "ReferenceTokens":
        """Each token by itself, or as many clusters as a bank may have tokens.

        A cluster is of the tokens nearest to a centre of a greedy k-centre coreset. Beyond
        `CANDIDATES` times the size both are of a random part of the tokens, and only that part is
        converted from half precision. The same images and seed give the same clusters.

        Args:
            images: of each its levels, L tensors (B, N, C_l).
            owners: of each which reference it belongs to, where some are another's copies.
            size: most tokens that the bank may have.
            seed: of the random part, and of the projection in which centres are chosen.
        """
        draw = torch.Generator().manual_seed(seed)
        counts = [image[0].shape[0] * image[0].shape[1] for image in images]
        kept = torch.ones(sum(counts), dtype=torch.bool)
        if size is not None and len(kept) > CANDIDATES * size:
            kept[torch.randperm(len(kept), generator=draw)[CANDIDATES * size :]] = False
        masks = kept.split(counts)
        levels = tuple(
            normalize(
                torch.cat([p.flatten(0, 1)[m] for p, m in zip(parts, masks, strict=True)]).float(),
                dim=-1,
            )
            for parts in zip(*images, strict=True)
        )
        of = torch.arange(len(images)) if owners is None else torch.tensor(owners)
        of = of.repeat_interleave(torch.tensor(counts))[kept]
        if size is None or len(of) <= size:
            return cls(levels, of, torch.arange(len(of)), len(of))
        return cls(levels, of, nearest(levels, coreset(levels, size, draw)), size)

    def bank(self, left_out: int | None = None) -> MemoryBank:
        """The bank of all images, or as if one, with its copies, had not been given."""
        used = torch.ones_like(self.clusters, dtype=torch.bool)
        if left_out is not None:
            used = self.owners != left_out
        clusters = self.clusters[used]
        filled = torch.bincount(clusters, minlength=self.size) > 0
        sums = (
            level.new_zeros(self.size, level.shape[1]).index_add_(0, clusters, level[used])
            for level in self.levels
        )
        return MemoryBank(tuple(normalize(one[filled], dim=-1) for one in sums))


def coreset(levels: Sequence[Tensor], size: int, draw: torch.Generator) -> Tensor:
    """Indices (size,) of tokens that leave no other far away: greedy k-centres.

    Distances are measured over all levels at once, so that centres are the same on all of them, in
    a random projection.
    """
    tokens = torch.zeros(len(levels[0]), PROJECTED)
    for level in levels:
        axes = torch.randn(level.shape[1], PROJECTED, generator=draw) * PROJECTED**-0.5
        tokens += level.cpu() @ axes
    return k_centres(tokens, size)


def nearest(levels: Sequence[Tensor], centres: Tensor) -> Tensor:
    """Of each token (n,) which of the centres, indices of tokens, is the most like it."""
    found = []
    for rows in torch.arange(len(levels[0])).split(1024):
        similarity = torch.zeros(len(rows), len(centres))
        for level in levels:
            similarity += level[rows] @ level[centres].T
        found.append(similarity.argmax(1))
    return torch.cat(found)


def best_similarity(query: Tensor, tokens: Tensor, budget: int) -> Tensor:
    """Each query's highest inner product with any of the tokens: (Q, C), (M, C) -> (Q,).

    0 where there are no tokens, as of a reference whose only companion is not among the candidates.

    Args:
        query: (Q, C), float32.
        tokens: (M, C), float32 or half precision, which is converted a block at a time.
        budget: bytes for a block of similarities and a block of converted tokens.
    """
    if not len(tokens):
        return query.new_zeros(len(query))
    width = query.shape[1] + min(len(query), 1024)  # floats a token of a block costs
    rows = max(1, budget // (4 * width))
    best = query.new_full((len(query),), -torch.inf)
    for block in tokens.split(rows):
        columns = block.to(query.dtype).T
        for part, found in zip(query.split(1024), best.split(1024), strict=True):
            torch.maximum(found, (part @ columns).amax(1), out=found)
    return best


def k_centres(points: Tensor, size: int) -> Tensor:
    """Indices (size,) of greedy k-centres of points (n, D): each the farthest from those before.

    The first is the point nearest to the mean.
    """
    square = points.square().sum(1)
    distance = (points - points.mean(0)).square().sum(1)
    chosen = [int(distance.argmin())]
    distance.fill_(torch.inf)
    for _ in range(size - 1):
        centre = points[chosen[-1]]
        new = torch.addmv(square + centre.square().sum(), points, centre, alpha=-2)
        torch.minimum(distance, new, out=distance)
        chosen.append(int(distance.argmax()))
    return torch.tensor(chosen)
