# SPDX-License-Identifier: Apache-2.0
"""Clover-2's draft on vLLM's layers.

The augmenting block is built from vLLM's own Llama layers: its KV lives in the paged
cache beside the target's and it runs tensor-parallel. The recurrent head has no
KV, is small, and is the same plain-PyTorch module that training uses, replicated on
every rank. Embeddings and output head are rows of the target's ``lm_head``.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import LlamaConfig
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, VllmConfig
from vllm.model_executor.layers import utils as layer_utils
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    maybe_prefix,
)
from vllm.platforms import current_platform

from vllm_clover2 import ops
from vllm_clover2.model.clover2 import Clover2Model
from vllm_clover2.model.config import Clover2Config
from vllm_clover2.model.head_files import (
    check_draft_vocab,
    check_tensor,
    expected_tensors,
)
from vllm_clover2.model.layers import (
    LayerFusion,
    Product,
    RecurrentHead,
    RegressiveAttentionBlock,
    int8_product,
    plain_product,
)
from vllm_clover2.ops import Int8Weight, pack_int8
from vllm_clover2.tree.types import TopK


class _DraftAttention(LlamaAttention):
    """vLLM's, over the whole text even if the target's layers have a window.

    So heads are trained. And a draft's KV may be written long after the target's: in a
    window its block could hold another request's by then.
    """

    def __init__(self, *, cache_config: CacheConfig, **kwargs: Any) -> None:
        whole = copy.copy(cache_config)
        whole.sliding_window = None
        super().__init__(cache_config=whole, **kwargs)


class _DraftDecoderLayer(LlamaDecoderLayer):
    """vLLM's layer with the plain weights that a head has, whatever its target has."""

    def get_quant_config(self, vllm_config: VllmConfig) -> None:
        return None


@support_torch_compile
class AugmentingBlock(nn.Module):
    """Refines target hidden states with the token that follows each of them.

    RAB1, then ``num_hidden_layers`` Llama layers, then a norm; the only part of the
    draft that attends, over committed positions only.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.speculative_config.head_config
        # Layer numbers go on after the target's: attention layers are known to vLLM
        # by these names, and the KV cache of each is found under its own.
        first_layer = vllm_config.model_config.get_num_layers(
            vllm_config.parallel_config
        )
        llama_config = _llama_config(config)
        self.rab1 = RegressiveAttentionBlock(
            config.hidden_size, config.num_attention_heads, config.rms_norm_eps
        )
        self.layers = nn.ModuleList(
            _DraftDecoderLayer(
                vllm_config,
                prefix=maybe_prefix(prefix, f"layers.{first_layer + i}"),
                config=llama_config,
                attn_layer_type=_DraftAttention,
            )
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if serves_int8(config, vllm_config.model_config.dtype):
            for module in self.layers.modules():
                if isinstance(module, LinearBase):
                    module.quant_method = Int8LinearMethod()

    def forward(
        self,
        positions: torch.Tensor,  # [rows] int64
        hidden_states: torch.Tensor,  # [rows, hidden] as `Clover2DraftModel.read`'s
        embeddings: torch.Tensor,  # [rows, hidden] of the token after each row
    ) -> torch.Tensor:  # [rows, hidden], "g" of the recurrent head
        hidden_states = self.rab1(hidden_states, embeddings)
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class Clover2DraftModel(nn.Module):
    """The draft as vLLM loads and runs it; grows trees through :meth:`first` and
    :meth:`advance`, the interface of ``vllm_clover2.tree.growth``.
    """

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".self_attn.q_proj": (".self_attn.qkv_proj", "q"),
            ".self_attn.k_proj": (".self_attn.qkv_proj", "k"),
            ".self_attn.v_proj": (".self_attn.qkv_proj", "v"),
            ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
            ".mlp.up_proj": (".mlp.gate_up_proj", 1),
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.speculative_config.head_config
        self.fusion: LayerFusion | None = None
        if layers := self.config.aux_hidden_state_layers:
            self.fusion = LayerFusion(
                self.config.hidden_size, len(layers), self.config.rms_norm_eps
            )
        self.model = AugmentingBlock(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model")
        )
        self.recurrent = RecurrentHead(
            self.config.hidden_size,
            self.config.num_attention_heads,
            self.config.rms_norm_eps,
        ).to(recurrent_dtype(self.config, vllm_config.model_config.dtype))
        self._int8 = serves_int8(self.config, vllm_config.model_config.dtype)
        size = self.config.draft_vocab_size
        self.draft_vocab_ids = None
        if size is not None:  # a parameter, because vLLM's loaders fill those
            ids = torch.zeros(size, dtype=torch.int64)
            self.draft_vocab_ids = nn.Parameter(ids, requires_grad=False)
        self._embeddings: VocabParallelEmbedding
        self._output: Product | None = None  # with a reduced draft vocabulary
        self._full_logits = LogitsProcessor(self.config.vocab_size)

    def bind_target(self, target: nn.Module) -> None:
        """Share the target's ``lm_head``, as embeddings and as output head.

        The rows of a reduced draft vocabulary are gathered once, on every rank.

        Raises:
            ValueError: the target has no ``lm_head`` whose rows can be looked up, or
                a quantised one.

        """
        lm_head = _lm_head(target)
        if not isinstance(lm_head, VocabParallelEmbedding):
            raise ValueError(
                f"clover2 shares the target's lm_head, a VocabParallelEmbedding; "
                f"{type(target).__name__} has {type(lm_head).__name__}. This target "
                f"is not supported."
            )
        method = lm_head.quant_method
        if not isinstance(method, UnquantizedEmbeddingMethod):
            raise ValueError(
                f"clover2 looks up rows of the target's lm_head, which must not be "
                f"quantised, but it has {type(method).__name__}. Use a checkpoint "
                f"whose other layers alone are quantised."
            )
        self._embeddings = lm_head
        if self.draft_vocab_ids is not None:
            weight = self.embed(self.draft_vocab_ids)
            make_product = int8_product if self._int8 else serving_product
            self._output = make_product(
                weight.to(self.recurrent.norm.weight.dtype), None
            )

    def read(
        self,
        states: Sequence[torch.Tensor],  # each [rows, hidden], the last layer's last
    ) -> torch.Tensor:  # [rows, hidden], what `forward` takes
        """The target's states, before its final norm, as one a row."""
        *inner, last = states
        return last if self.fusion is None else self.fusion(last, inner)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """``lm_head`` rows of target ids [n] -> [n, hidden], on every rank."""
        # ParallelLMHead.forward refuses to be called; its base class is the lookup.
        return VocabParallelEmbedding.forward(self._embeddings, token_ids)

    def forward(
        self,
        input_ids: torch.Tensor,  # [rows] the token after each row
        positions: torch.Tensor,  # [rows] int64
        hidden_states: torch.Tensor,  # [rows, hidden]
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:  # [rows, hidden]
        embeddings = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        return self.model(positions, hidden_states, embeddings)

    def first_top_k(
        self,
        hidden: torch.Tensor,  # [n, hidden]
        k: int,
    ) -> tuple[torch.Tensor, TopK]:  # [n, hidden], [n, k]
        """State and the k likeliest of the root's children; fewer if there are."""
        state = hidden.to(self.recurrent.norm.weight.dtype)
        return state, self._top_k(self.recurrent.first(state), k)

    def advance_top_k(
        self,
        state: torch.Tensor,  # [n, hidden]
        tokens: torch.Tensor,  # [n] target ids
        k: int,
    ) -> tuple[torch.Tensor, TopK]:
        """One recurrent step along ``tokens``; same outputs as :meth:`first_top_k`."""
        embeddings = self.embed(tokens).to(state.dtype)
        state, output = self.recurrent.advance(state, embeddings)
        return state, self._top_k(output, k)

    def token_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """Target ids of ids in the draft's vocabulary."""
        if self.draft_vocab_ids is None:
            return draft_ids
        return self.draft_vocab_ids[draft_ids]

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> logits over the draft's vocabulary [n, draft_vocab]."""
        if self._output is None:
            weight_dtype = self._embeddings.weight.dtype
            return self._full_logits(self._embeddings, hidden_states.to(weight_dtype))
        return self._output(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load every tensor of a head in our own format.

        Raises:
            ValueError: the file is damaged; or a tensor is missing, unknown, of a
                wrong shape, or holds NaN or infinity.

        """
        loader = AutoWeightsLoader(self)
        loaded = loader.load_weights(
            map(_into_model, _checked(weights, self.config)),
            mapper=self.hf_to_vllm_mapper,
        )
        expected = {name for name, _ in self.named_parameters()}
        if missing := sorted(expected - loaded):
            raise ValueError(
                f"The head's checkpoint must hold every draft weight, but "
                f"{len(missing)} are missing: {', '.join(missing[:5])}. Export the "
                f"head again, or convert it with 'vllm-clover2 convert'."
            )
        if self.fusion is not None:
            self.fusion.fuse(serving_product)
        if self._int8:
            self.recurrent.quantize()
            self.model.rab1.fuse(int8_product)
            return loaded
        self.recurrent.fuse(serving_product)
        if current_platform.is_cpu():
            # Elsewhere compiling the block is all that there is to gain.
            self.model.rab1.fuse(serving_product)
        return loaded

    def _top_k(self, output: torch.Tensor, k: int) -> TopK:
        logits = self.compute_logits(output)
        values, draft_ids = ops.top_k_log_probs(logits, min(k, logits.shape[-1]))
        return TopK(values, self.token_ids(draft_ids))


class Int8LinearMethod(UnquantizedLinearMethod):
    """vLLM's linear layers, loaded as they are, then rounded to int8."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        packed, scales, _ = pack_int8(layer.weight.detach())
        layer.weight = nn.Parameter(packed, requires_grad=False)
        layer.weight_scales = nn.Parameter(scales, requires_grad=False)

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return ops.int8_product(x, Int8Weight(layer.weight, layer.weight_scales, bias))


def recurrent_dtype(config: Clover2Config, target_dtype: torch.dtype) -> torch.dtype:
    """Dtype of growing trees: the target's, or the head's own if that is smaller.

    Under a float32 target a head stored in bf16 gains nothing from float32 here, and
    its output head is the largest thing that growing reads.
    """
    if target_dtype == torch.float32 and isinstance(config.dtype, torch.dtype):
        return config.dtype
    return target_dtype


def serves_int8(config: Clover2Config, target_dtype: torch.dtype) -> bool:
    """Whether the head's products have int8 weights: on CPU, below float32.

    There drafting takes as long as reading its weights. On 20 answers of SmolLM2-135M
    a step accepted 1.53 tokens in the paper's tree with bf16 and with int8 weights. A
    head that was stored in float32 for a float32 target is computed as it is.
    """
    dtype = recurrent_dtype(config, target_dtype)
    return current_platform.is_cpu() and dtype != torch.float32


def serving_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """``weight`` [out, in] as the quickest constant factor that vLLM has.

    On CPU that is a packed one. PyTorch's own product packs the weight anew in every
    call, which for the few rows of a growing tree takes as long as multiplying.
    """
    if weight.device.type != "cpu":
        return plain_product(weight, bias)
    layer: Any = nn.Module()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    layer_utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return lambda x: layer.cpu_linear(x, layer.weight, layer.bias)


def _lm_head(target: nn.Module) -> Any:
    """The target's; its embeddings where they are tied and have no second name."""
    lm_head = getattr(target, "lm_head", None)
    config = getattr(target, "config", None)
    if lm_head is None and getattr(config, "tie_word_embeddings", False):
        return target.model.embed_tokens
    return lm_head


def _llama_config(config: Clover2Config) -> LlamaConfig:
    """The augmenting layers in the terms of vLLM's Llama layers."""
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )


def _checked(
    weights: Iterable[tuple[str, torch.Tensor]], config: Clover2Config
) -> Iterable[tuple[str, torch.Tensor]]:
    """The tensors as they come, each of a name and shape that ``config`` implies.

    A head in a folder or on the hub was checked before this process started; one in
    object storage was not.
    """
    expected = expected_tensors(Clover2Model, config)
    try:
        for name, tensor in weights:
            check_tensor(name, tensor, expected)
            if name == "draft_vocab_ids":
                check_draft_vocab(tensor, config.vocab_size, "the head")
            yield name, tensor
    except SafetensorError as error:
        raise ValueError(
            f"The head's model.safetensors must be a whole safetensors file, but it "
            f"cannot be read ({error}). Copy or export the head again."
        ) from error


def _into_model(weight: tuple[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
    """Names of the augmenting block live under ``model.`` here."""
    name, tensor = weight
    if name.startswith(("rab1.", "layers.", "norm.")):
        name = f"model.{name}"
    return name, tensor
