# SPDX-License-Identifier: Apache-2.0
"""Building blocks of Clover-2 that training and serving share.

Everything here is row-wise: no attention across positions, no cache.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from vllm_clover2 import ops
from vllm_clover2.ops import Int8Weight, pack_int8

__all__ = [
    "MakeProduct",
    "Product",
    "RMSNorm",
    "RecurrentHead",
    "RegressiveAttentionBlock",
    "int8_product",
    "plain_product",
]

Product = Callable[[torch.Tensor], torch.Tensor]
"""x [..., in] -> x W^T + b [..., out] with weights that do not change any more."""

MakeProduct = Callable[[torch.Tensor, torch.Tensor | None], Product]
"""Weight [out, in] and bias [out] -> product."""


def plain_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """PyTorch's own; a server may have a quicker one."""
    return functools.partial(F.linear, weight=weight, bias=bias)


def int8_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """With weights and rows rounded to int8, which halves what a CPU reads."""
    return functools.partial(ops.int8_product, weight=pack_int8(weight, bias))


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
        # As served: [M, H] -> query [M, H]; [M, H] -> key and value [M, 2H].
        self._products: tuple[Product, Product] | None = None

    def fuse(self, make_product: MakeProduct = plain_product) -> None:
        """Serve with fewer matrix products: key and value both read the token.

        Call after loading; later changes of the weights are not seen.
        """
        key, value = self.k_proj, self.v_proj
        key_value = make_product(
            torch.cat([key.weight, value.weight]).detach(),
            torch.cat([key.bias, value.bias]).detach(),
        )
        self._products = _product_of(self.q_proj, make_product), key_value

    def forward(
        self,
        z: torch.Tensor,  # [..., H] hidden state
        e: torch.Tensor,  # [..., H] embedding of the token that follows
    ) -> torch.Tensor:  # [..., H]
        normed = self.input_layernorm(z)
        if self._products is None:
            query, key, value = self.q_proj(normed), self.k_proj(e), self.v_proj(e)
        else:
            query_product, key_value_product = self._products
            query = query_product(normed)
            key, value = key_value_product(e).chunk(2, dim=-1)
        heads = (self.num_heads, -1)
        query, key, value = (x.unflatten(-1, heads) for x in (query, key, value))
        # cosine_similarity clamps each norm by eps on its own, outside autograd,
        # exactly as the original does.  float32: bf16 sums lose the small cosines.
        cosine = F.cosine_similarity(query.float(), key.float(), dim=-1, eps=self.eps)
        added = cosine.to(value.dtype).unsqueeze(-1) * value
        return z + added.flatten(-2).to(z.dtype)


class _Readout(nn.Linear):
    """A linear layer followed by the norm that all speculation steps share."""

    def __init__(self, in_features: int, out_features: int, norm: RMSNorm) -> None:
        super().__init__(in_features, out_features)
        # In a tuple, so that the norm stays registered once, with its owner.
        self._norm = (norm,)
        self._product: Product | None = None

    def fuse(self, make_product: MakeProduct) -> None:
        self._product = _product_of(self, make_product)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = super().forward if self._product is None else self._product
        return self._norm[0](product(x))


class LayerFusion(nn.Module):
    """Adds states from inside the target to its last layer's.

    EAGLE-3 (arXiv 2503.01840) reads several layers instead of the last alone, and
    EAGLE-3.1 norms each. The norms have no weights: those of `weight` follow. At zero,
    where training starts, nothing is added.
    """

    def __init__(self, hidden_size: int, num_layers: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        shape = hidden_size, num_layers * hidden_size
        self.weight = nn.Parameter(torch.zeros(shape))
        self._product: Product | None = None

    def fuse(self, make_product: MakeProduct = plain_product) -> None:
        """Serve with another product; call after loading, as the block's `fuse`."""
        self._product = make_product(self.weight.detach(), None)

    def forward(
        self,
        last: torch.Tensor,  # [..., H] the target's pre-norm state
        others: Sequence[torch.Tensor],  # L x [..., H] after earlier layers
    ) -> torch.Tensor:  # [..., H]
        normed = [F.rms_norm(one, one.shape[-1:], eps=self.eps) for one in others]
        inputs = torch.cat(normed, dim=-1)
        if self._product is not None:
            return last + self._product(inputs)
        return last + F.linear(inputs, self.weight)


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
        # Weights of clover2::recurrent_step, once `quantize` was called.
        self._int8: tuple[Int8Weight, Int8Weight, Int8Weight] | None = None

    def fuse(self, make_product: MakeProduct = plain_product) -> None:
        """Serve with fewer and quicker matrix products; see the block's `fuse`."""
        self.rab2.fuse(make_product)
        self.first.fuse(make_product)
        self.step.fuse(make_product)

    def quantize(self) -> None:
        """Serve with int8 weights and one op a step, on a CPU.

        Call after loading; later changes of the weights are not seen.
        """
        block, step = self.rab2, self.step
        of_state, of_embedding = step.weight.detach().chunk(2, dim=1)
        # The embedding is rounded by itself: it is far smaller than a state.
        tokens = (block.k_proj, block.v_proj)
        weight = torch.cat([*(x.weight.detach() for x in tokens), of_embedding])
        bias = torch.cat([*(x.bias.detach() for x in tokens), 0 * step.bias.detach()])
        self._int8 = (
            pack_int8(block.q_proj.weight.detach(), block.q_proj.bias.detach()),
            pack_int8(weight, bias),
            pack_int8(of_state, step.bias.detach()),
        )
        self.first.fuse(int8_product)

    def advance(
        self,
        g: torch.Tensor,  # [M, H] states
        e: torch.Tensor,  # [M, H] embeddings of the tokens chosen after them
    ) -> tuple[torch.Tensor, torch.Tensor]:  # next g [M, H], o [M, H]
        """One speculation step."""
        if self._int8 is not None:
            block = self.rab2
            return ops.recurrent_step(
                g, e, *self._int8, block.input_layernorm.weight, self.norm.weight,
                block.num_heads, block.eps,
            )  # fmt: skip
        g = self.rab2(g, e)
        return g, self.step(torch.cat([g, e.to(g.dtype)], dim=-1))


def _product_of(linear: nn.Linear, make_product: MakeProduct) -> Product:
    return make_product(linear.weight.detach(), linear.bias.detach())
