"""Memory tokens: k learned vectors put behind a text, and how their final states become one embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MemoryTokens(nn.Module):
    """`vectors_KD`, float32, as input embeddings (METHOD 1: m_1..m_k). Texts are left-padded, so memory stands at the end."""

    def __init__(self, vectors_KD: Tensor) -> None:
        super().__init__()
        self.vectors_KD = nn.Parameter(vectors_KD.detach().clone().float())

    @classmethod
    def like(cls, embeddings_VD: Tensor, count: int, seed: int) -> MemoryTokens:
        """Fresh vectors drawn with the mean and spread that the rows of an embedding table have, dimension by dimension."""
        rows = embeddings_VD.detach().float()
        generator = torch.Generator().manual_seed(seed)
        noise_KD = torch.randn(count, rows.shape[1], generator=generator).to(rows.device)
        return cls(rows.mean(0) + rows.std(0) * noise_KD)

    @property
    def count(self) -> int:
        """K."""
        return self.vectors_KD.shape[0]

    def append(self, x_BTD: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Texts' input embeddings (left-padded) with the memory behind them: x_BSD, mask_BS."""
        rows = x_BTD.shape[0]
        memory_BKD = self.vectors_KD.to(x_BTD.dtype).expand(rows, -1, -1)
        return torch.cat([x_BTD, memory_BKD], 1), torch.cat([mask_BT, mask_BT.new_ones(rows, self.count)], 1)

    def gather(self, states_BSD: Tensor) -> Tensor:
        """States at the memory positions, memory_BKD."""
        return states_BSD[:, -self.count :]


def mean_weights(count: int) -> Tensor:
    """The paper's pooling: every memory token weighs 1/k."""
    return torch.full((count,), 1.0 / count)


def embedding_from_memory(memory_BKD: Tensor, weights_K: Tensor) -> Tensor:
    """Weighted mean over the memory states, in float32: embedding_BD. `weights_K` sums to 1."""
    return torch.einsum("bkd,k->bd", memory_BKD.float(), weights_K.float())
