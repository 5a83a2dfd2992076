"""Memory tokens: k learned vectors after a text, and how their states become one embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

# Which of the memory tokens come first when some of them stand for the text: those from the last
# on, so that one of them is plain last-token pooling. Encoders of earlier versions: from the first.
Order = Literal["last", "first"]


class MemoryTokens(nn.Module):
    """`vectors_KD`, float32, as input embeddings, the paper's m_1..m_k.

    Texts are left-padded, so memory stands at the end.
    """

    def __init__(self, vectors_KD: Tensor) -> None:
        super().__init__()
        self.vectors_KD = nn.Parameter(vectors_KD.detach().clone().float())

    @classmethod
    def like(cls, embeddings_VD: Tensor, count: int, seed: int, scale: float = 1.0) -> MemoryTokens:
        """Fresh vectors with the mean and spread of an embedding table's rows, per dimension.

        `scale`: what the LM's embedding module multiplies these rows by (`embedding_scale`).
        """
        rows = embeddings_VD.detach().float()
        generator = torch.Generator().manual_seed(seed)
        noise_KD = torch.randn(count, rows.shape[1], generator=generator).to(rows.device)
        return cls(scale * (rows.mean(0) + rows.std(0) * noise_KD))

    def begin_as(self, rows_ND: Tensor) -> None:
        """The last N ≤ K of the vectors become these input embeddings (a prompt's, say)."""
        with torch.no_grad():
            self.vectors_KD[-len(rows_ND) :] = rows_ND.to(self.vectors_KD)

    @property
    def count(self) -> int:
        """K."""
        return self.vectors_KD.shape[0]

    def append(self, x_BTD: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Texts' input embeddings (left-padded) with the memory behind them: x_BSD, mask_BS."""
        rows = x_BTD.shape[0]
        memory_BKD = self.vectors_KD.to(x_BTD.dtype).expand(rows, -1, -1)
        return torch.cat([x_BTD, memory_BKD], 1), torch.cat(
            [mask_BT, mask_BT.new_ones(rows, self.count)], 1
        )


def mean_weights(count: int) -> Tensor:
    """The paper's pooling: every memory token weighs 1/k."""
    return torch.full((count,), 1.0 / count)


def prefix_of(memory_BKD: Tensor, size: int, order: Order) -> Tensor:
    """The `size` memory states that come first in an order: memory_BKD with fewer K."""
    return memory_BKD[:, :size] if order == "first" else memory_BKD[:, -size:]


def prefix_weights(count: int, size: int, order: Order) -> Tensor:
    """Weights of `count` memory tokens for the mean of a prefix: 1 / size in it, 0 elsewhere."""
    inside, outside = mean_weights(size), torch.zeros(count - size)
    return torch.cat([inside, outside] if order == "first" else [outside, inside])


def embedding_from_memory(memory_BKD: Tensor, weights_K: Tensor) -> Tensor:
    """Weighted mean over the memory states, in float32: embedding_BD. `weights_K` sums to 1."""
    return torch.einsum("bkd,k->bd", memory_BKD.float(), weights_K.float())


def prefix_embeddings(memory_BKD: Tensor, prefixes: Sequence[int], order: Order) -> Tensor:
    """Mean over each of P prefixes, named by their sizes, in float32: embeddings_BPD."""
    count = memory_BKD.shape[1]
    weights_PK = torch.stack([prefix_weights(count, size, order) for size in prefixes])
    return torch.einsum("bkd,pk->bpd", memory_BKD.float(), weights_PK.to(memory_BKD.device))


def new_projection(inside: int, outside: int, seed: int) -> nn.Linear:
    """Linear map after the pooled state, with bias as LLM2Vec-Gen has it, float32.

    arXiv 2603.10913.

    It begins as the identity; between two widths as a random rotation (rows or columns
    orthonormal), fixed by the seed. The bias begins as 0. As the weights of memory tokens sum to 1,
    the map of their mean is the mean of their maps.
    """
    projection = nn.Linear(inside, outside, device="cpu")
    nn.init.zeros_(projection.bias)
    if inside == outside:
        nn.init.eye_(projection.weight)
    else:
        nn.init.orthogonal_(projection.weight, generator=torch.Generator().manual_seed(seed))
    return projection


def maxsim(query_BKD: Tensor, document_CKD: Tensor) -> Tensor:
    """Late interaction (ColBERT): over the query's states, the sum of best dot products, scores_BC.

    arXiv 2004.12832.
    """
    return torch.einsum("bkd,cld->bckl", query_BKD, document_CKD).amax(-1).sum(-1)
