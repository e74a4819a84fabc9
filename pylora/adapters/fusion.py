"""The attention of AdapterFusion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# The start of the value matrix is the identity plus this, as in the `adapters` library.
_NEAR_ZERO = 1e-6


class AdapterFusion(nn.Module):
    """Attention, for each token, over what several adapters add to the hidden states.

        p_i = softmax_i(query(x) . key(change_i)),    y = sum_i p_i value(change_i)

    forward(x [..., hidden], changes: each [..., hidden]) returns y in x.dtype. It computes in the
    dtype of its parameters. The value matrix starts as the identity, so that the first output is a
    mean of the changes.
    Source: Pfeiffer et al. 2021, arXiv:2005.00247; names and start are those of the `adapters`
    library.
    """

    def __init__(
        self,
        hidden_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.query = nn.Linear(hidden_size, hidden_size, dtype=dtype, device=device)
        self.key = nn.Linear(hidden_size, hidden_size, dtype=dtype, device=device)
        self.value = nn.Linear(hidden_size, hidden_size, bias=False, dtype=dtype, device=device)
        with torch.no_grad():
            for layer in (self.query, self.key):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
            nn.init.constant_(self.value.weight, _NEAR_ZERO)
            self.value.weight.fill_diagonal_(1.0)

    def forward(self, x: Tensor, changes: Sequence[Tensor]) -> Tensor:
        dtype = self.query.weight.dtype
        stacked = torch.stack([change.to(dtype) for change in changes], dim=-2)
        scores = self.key(stacked) @ self.query(x.to(dtype)).unsqueeze(-1)
        weights = scores.squeeze(-1).softmax(-1).unsqueeze(-2)
        return (weights @ self.value(stacked)).squeeze(-2).to(x.dtype)
