"""Q-Former attention: queries (B, Q, C) and tokens (B, N, C) -> attended tokens (B, Q, C).

Anomaly-OV, "Visual Token Selector". The published layer is plainer than BLIP-2's Q-Former: one
head, and the values are the raw tokens (no value and no output projection), so that what comes out
stays in the space of the image tower and fits the language model's projector.
"""

from torch import Tensor, nn


class QFormer(nn.Module):
    """Single-head cross attention with identity values (names as in the released file)."""

    def __init__(self, hidden_size: int, key_size: int) -> None:
        """Project queries and keys from `hidden_size` to `key_size` channels."""
        super().__init__()
        self.query_proj = nn.Linear(hidden_size, key_size)
        self.key_proj = nn.Linear(hidden_size, key_size)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Mean of `tokens` (B, N, C) for each of `queries` (B, Q, C), weighted by attention."""
        keys = self.key_proj(tokens)  # (B, N, K)
        attention = self.query_proj(queries) @ keys.transpose(1, 2) * keys.shape[-1] ** -0.5
        return attention.softmax(-1) @ tokens
