# SPDX-License-Identifier: Apache-2.0
"""Building blocks of Clover-2 that training and serving share.

Everything here is row-wise: no attention across positions, no cache.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

__all__ = [
    "MakeProduct",
    "Product",
    "RMSNorm",
    "RecurrentHead",
    "RegressiveAttentionBlock",
    "plain_product",
]

Product = Callable[[torch.Tensor], torch.Tensor]
"""x [..., in] -> x W^T + b [..., out] with weights that do not change any more."""

MakeProduct = Callable[[torch.Tensor, torch.Tensor | None], Product]
"""Weight [out, in] and bias [out] -> product."""


class RMSNorm(nn.Module):
    """x * weight / sqrt(mean(x^2) + eps), statistics in float32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(
        self,
        x: torch.Tensor,  # [..., H]
    ) -> torch.Tensor:  # [..., H]
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * (x32 * scale).to(x.dtype)


class RegressiveAttentionBlock(nn.Module):
    """Adds a token's embedding to a hidden state by cosine attention.

    Per head the new token's value is added with the cosine between the
    state's query and the token's key as weight.  There is no softmax, no
    scaling, no output projection and no mixing across positions.  The token
    embedding is used as it is, without a norm.
    """

    def __init__(self, hidden_size: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(hidden_size, eps)
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.num_heads = num_heads
        self.eps = eps

    def forward(
        self,
        z: torch.Tensor,  # [..., H] hidden state
        e: torch.Tensor,  # [..., H] embedding of the token that follows
    ) -> torch.Tensor:  # [..., H]
        query = self.q_proj(self.input_layernorm(z))
        return self.combine(z, query, self.k_proj(e), self.v_proj(e))

    def combine(
        self,
        z: torch.Tensor,  # [..., H] hidden state
        query: torch.Tensor,  # [..., H] of the state
        key: torch.Tensor,  # [..., H] of the token
        value: torch.Tensor,  # [..., H] of the token
    ) -> torch.Tensor:  # [..., H]
        """The block after its projections."""
        heads = (*z.shape[:-1], self.num_heads, -1)
        # cosine_similarity clamps each norm by eps on its own, outside autograd,
        # exactly as the original does.  float32: bf16 sums lose the small cosines.
        cosine = F.cosine_similarity(
            query.view(heads).float(), key.view(heads).float(), dim=-1, eps=self.eps
        )
        added = cosine.to(value.dtype).unsqueeze(-1) * value.view(heads)
        return z + added.reshape(z.shape).to(z.dtype)


class _Readout(nn.Linear):
    """A linear layer followed by the norm that all speculation steps share."""

    def __init__(self, in_features: int, out_features: int, norm: RMSNorm) -> None:
        super().__init__(in_features, out_features)
        # In a tuple, so that the norm stays registered once, with its owner.
        self._norm = (norm,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._norm[0](super().forward(x))


class _Products(NamedTuple):
    """The products of one step as they are served, grouped by what they read."""

    query: Product  # [M, H] -> [M, H]
    token: Product  # [M, H] -> [M, 3H]: key, value and token part of `step`
    state: Product  # [M, H] -> [M, H]: state part of `step`


def plain_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """PyTorch's own; a server may have a quicker one."""
    return functools.partial(F.linear, weight=weight, bias=bias)


class RecurrentHead(nn.Module):
    """The recurrent part of Clover-2: grows the draft token by token.

    `g` is the recurrent state and `o` imitates the target's final (post-norm)
    hidden state: `lm_head.weight @ o` are the draft's logits.  Weights are
    shared by all steps, so any depth can be drafted.
    """

    def __init__(self, hidden_size: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden_size, eps)
        self.rab2 = RegressiveAttentionBlock(hidden_size, num_heads, eps)
        self.first = _Readout(hidden_size, hidden_size, self.norm)  # g [M, H] -> o
        self.step = _Readout(2 * hidden_size, hidden_size, self.norm)
        self._products: _Products | None = None

    def advance(
        self,
        g: torch.Tensor,  # [M, H] states
        e: torch.Tensor,  # [M, H] embeddings of the tokens chosen after them
    ) -> tuple[torch.Tensor, torch.Tensor]:  # next g [M, H], o [M, H]
        """One speculation step."""
        if self._products is not None:
            return self._advance_fused(g, e, self._products)
        g = self.rab2(g, e)
        return g, self.step(torch.cat([g, e.to(g.dtype)], dim=-1))

    def fuse(self, make_product: MakeProduct = plain_product) -> None:
        """Serve with fewer matrix products a step.

        Key, value and the embedding's half of `step` all read `e`, so they
        become one product.  Call after loading; later changes of the weights
        are not seen.  Rounds differently by one addition order.
        """
        hidden_size = self.norm.weight.numel()
        rab2, step = self.rab2, self.step
        token_part = step.weight[:, hidden_size:]
        token_weight = torch.cat([rab2.k_proj.weight, rab2.v_proj.weight, token_part])
        token_bias = torch.cat([rab2.k_proj.bias, rab2.v_proj.bias, step.bias])
        state_weight = step.weight[:, :hidden_size].contiguous()
        self._products = _Products(
            query=make_product(rab2.q_proj.weight.detach(), rab2.q_proj.bias.detach()),
            token=make_product(token_weight.detach(), token_bias.detach()),
            state=make_product(state_weight.detach(), None),
        )

    def _advance_fused(
        self, g: torch.Tensor, e: torch.Tensor, products: _Products
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key, value, token_part = products.token(e).chunk(3, dim=-1)
        query = products.query(self.rab2.input_layernorm(g))
        # chunk() returns strided views, combine() splits them into heads.
        g = self.rab2.combine(g, query, key.contiguous(), value.contiguous())
        return g, self.norm(products.state(g) + token_part)
