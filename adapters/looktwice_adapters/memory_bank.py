"""Memory bank: patch tokens of normal images -> how far a query's tokens are from the nearest.

AnomalyGPT (AAAI 2024), few-shot: a patch's anomaly is one minus its best cosine
similarity with the bank, a level at a time, and the mean over levels. A bank that outgrows its
budget is thinned by PatchCore's greedy k-centre coreset (Roth et al., CVPR 2022, section 3.2).
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
    """Unit-length tokens of the reference images, and which image each of them is from."""

    levels: tuple[Tensor, ...]  # L of (M, C_l), of unit length
    owners: Tensor  # (M,) index of the reference image; augmented copies have their image's

    @classmethod
    def of(
        cls,
        images: Sequence[list[Tensor]],
        owners: Sequence[int] | None = None,
        *,
        size: int | None = None,
        seed: int = 0,
    ) -> "MemoryBank":
        """The tokens of some images: all of them, or a greedy k-centre coreset.

        Beyond `CANDIDATES` times the size the coreset is of a random part of the tokens, and only
        that part is converted from half precision. The same images and seed give the same bank.

        Args:
            images: of each its levels, L tensors (B, N, C_l).
            owners: of each which reference it belongs to, where some are another's copies.
            size: most tokens that the bank may have.
            seed: of the random part, and of the projection in which distances are measured.
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
        bank = cls(levels, of.repeat_interleave(torch.tensor(counts))[kept])
        return bank if size is None else bank._coreset(size, draw)

    def __len__(self) -> int:
        """M, the number of tokens."""
        return len(self.owners)

    @property
    def nbytes(self) -> int:
        """Memory of the tokens in bytes."""
        return sum(level.nbytes for level in self.levels)

    def select(self, rows: Tensor) -> "MemoryBank":
        """The tokens at `rows`, indices or a mask."""
        return MemoryBank(tuple(level[rows] for level in self.levels), self.owners[rows])

    def without(self, image: int) -> "MemoryBank":
        """The bank as if one reference image had not been given, its copies neither."""
        return self.select(self.owners != image)

    def to(
        self, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> "MemoryBank":
        """The bank on another device or in another precision."""
        levels = tuple(level.to(device=device, dtype=dtype) for level in self.levels)
        return MemoryBank(levels, self.owners)

    def _coreset(self, size: int, draw: torch.Generator) -> "MemoryBank":
        """At most `size` tokens that leave no other far away (greedy k-centre).

        Distances are measured over all levels at once, so that a token stays or goes on all of
        them, in a random projection.
        """
        if len(self) <= size:
            return self
        tokens = torch.zeros(len(self), PROJECTED)
        for level in self.levels:
            axes = torch.randn(level.shape[1], PROJECTED, generator=draw) * PROJECTED**-0.5
            tokens += level.cpu() @ axes
        return self.select(k_centres(tokens, size))

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


def best_similarity(query: Tensor, tokens: Tensor, budget: int) -> Tensor:
    """Each query's highest inner product with any of the tokens: (Q, C), (M, C) -> (Q,).

    0 where there are no tokens, as of a reference whose only companion the coreset left out.

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
