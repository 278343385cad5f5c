# SPDX-License-Identifier: Apache-2.0
"""vLLM's speculative configuration for the method ``clover2``.

This module is imported when a pickled ``VllmConfig`` is read in a new process, before
plugins are loaded there; it must not import workers, runners or models.
"""

from typing import Any, Literal

import vllm.envs as envs
from pydantic import ValidationError
from vllm.config import ModelConfig
from vllm.config.speculative import SpeculativeConfig
from vllm.config.utils import config
from vllm.logger import init_logger
from vllm.triton_utils import HAS_TRITON

from vllm_clover2.heads import NO_HEAD, find_head
from vllm_clover2.integration.linear_cpu import serves_packed
from vllm_clover2.model.config import Clover2Config
from vllm_clover2.tree.options import TreeOptions
from vllm_clover2.tree.widths import widths_at_start

logger = init_logger(f"vllm.{__name__}")


def head_for(target: ModelConfig) -> str:
    """Directory of the head that is registered, or shipped, for ``target``.

    Raises:
        ValueError: no head is known for this target; the message lists those known.

    """
    head = str(find_head(target.model, target.hf_config))
    logger.info("clover2: using the draft head %s for %s", head, target.model)
    return head


@config
class Clover2SpeculativeConfig(SpeculativeConfig):
    """``SpeculativeConfig`` with ``method="clover2"`` and the options of a tree.

    It takes vLLM's EAGLE path (``use_eagle()``): a draft with target hidden states as
    input and KV of its own, drafted after bookkeeping. With ``model="none"`` there is
    no head, and for vLLM it is like ``ngram``, without a draft model. The tree options
    are those of :class:`~vllm_clover2.tree.options.TreeOptions`, which also holds their
    defaults.
    """

    method: Literal["clover2"] = "clover2"  # type: ignore[assignment]
    tree: Any = None
    """``"dynamic"``, ``"static"``, ``"chain"`` or a list of paths."""
    top_k: int | None = None
    """Children considered per node, and nodes expanded per level (dynamic tree)."""
    depth: int | None = None
    """Levels of the tree."""
    top_p: float | None = None
    """Nucleus mass that a node's children must lie in (dynamic tree)."""
    min_ratio: float | None = None
    """Children under this share of their likeliest sibling are dropped (dynamic)."""
    context: bool | None = None
    """What followed the same words earlier in the request is drafted too."""
    context_depth: int | None = None
    """Levels that such continuations may reach."""
    context_min_match: int | None = None
    """Tokens that must agree."""
    context_max_match: int | None = None
    """Tokens that are compared."""
    adaptive: bool | None = None
    """Draft less, or nothing, where it costs more than it yields (dynamic, chain)."""

    def __post_init__(self) -> Any:
        if not self.has_head:
            self._check_without_a_head()
        self.num_speculative_tokens = self.tree_options().num_nodes
        if self.runs_on_v2 and self.num_speculative_tokens_per_batch_size is None:
            self.num_speculative_tokens_per_batch_size = self._widths_at_start()
        # On Model Runner V1 the drafter needs the accepted path on the host.
        self.disable_padded_drafter_batch = not self.runs_on_v2
        # The stock constructor knows a closed set of methods. "eagle" (rather than
        # "draft_model") keeps it from guessing a method from the directory's name;
        # "ngram" takes the target's config in place of a draft model's.
        self.method = "eagle" if self.has_head else "ngram"  # type: ignore[assignment]
        try:
            super().__post_init__()
        finally:
            self.method = "clover2"
        if not self.has_head:
            return self
        self._check_head_fits()
        # vLLM's runners read from here which hidden states the target shall return.
        # "Layer" n is the output of the last of n layers, before the final norm.
        self.draft_model_config.hf_config.eagle_aux_hidden_state_layer_ids = (
            *(self.head_config.aux_hidden_state_layers or ()),
            self.target_model_config.get_total_num_hidden_layers(),
        )
        return self

    def tree_options(self) -> TreeOptions:
        """The validated options; those the user left out have their defaults.

        Raises:
            ValueError: an option is out of range; names it and the allowed values.

        """
        given = {
            name: getattr(self, name)
            for name in TreeOptions.model_fields
            if getattr(self, name) is not None
        }
        try:
            return TreeOptions(**given)
        except ValidationError as error:
            details = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'options'}: {e['msg']}"
                for e in error.errors()
            )
            raise ValueError(
                f"speculative_config for clover2 is invalid: {details}"
            ) from error

    @property
    def head_config(self) -> Clover2Config:
        """The head's own config, out of the ``EAGLEConfig`` vLLM wraps it in."""
        config = self.draft_model_config.hf_config
        return getattr(config, "model", None) or config

    @property
    def runs_on_v2(self) -> bool:
        """Whether Model Runner V2 serves: as ``VLLM_USE_V2_MODEL_RUNNER`` says, else
        where vLLM would take it and nothing is asked for that V1 alone has.
        """
        wanted = envs.VLLM_USE_V2_MODEL_RUNNER
        if wanted is not None:
            return bool(wanted)
        return HAS_TRITON and not self.missing_on_v2()

    def missing_on_v2(self) -> list[str]:
        """What this configuration asks for and only our route on V1 has.

        In vLLM's words: "Model Runner V2 does not yet support ...".
        """
        from vllm.platforms import current_platform  # known once plugins are loaded

        parts = {
            "clover2 without CUDA": not current_platform.is_cuda(),
            # Ranks of other targets are engines of their own, each with size 1.
            "data parallelism of targets with experts with clover2": (
                self.target_parallel_config.data_parallel_size > 1
                and self.target_model_config.is_moe
            ),
            "a head of clover2 beside sliding windows": (
                self.has_head
                and self.target_model_config.get_sliding_window() is not None
            ),
            "prompt embeddings with clover2": (
                self.target_model_config.enable_prompt_embeds
            ),
        }
        return [part for part, wanted in parts.items() if wanted]

    @property
    def adapts_on_v2(self) -> bool:
        """Whether Model Runner V2 chooses how many nodes a step verifies.

        Not where vLLM's ``num_speculative_tokens_per_batch_size`` was given for that.
        """
        table = self._widths_at_start()
        return table is not None and table == self.num_speculative_tokens_per_batch_size

    def scheduled_widths(self) -> set[int]:
        """Nodes of a request that a step on Model Runner V2 may verify."""
        table = self.num_speculative_tokens_per_batch_size or []
        most = self.num_speculative_tokens
        return {min(width, most) for *_, width in table} or {most}

    @property
    def has_head(self) -> bool:
        """Whether there is a draft model; else the text is the only source."""
        return self.model != NO_HEAD

    def use_eagle(self) -> bool:
        return self.has_head

    def compute_hash(self) -> str:
        # Stock methods must not share a compilation cache entry with us: with a head
        # the target's graph returns one hidden state more than a plain EAGLE run's,
        # and layers may have our product.
        ours = "clover2-" * self.has_head + "packed-" * serves_packed()
        return ours + super().compute_hash()

    def __repr__(self) -> str:
        return (
            f"Clover2SpeculativeConfig(model={self.model!r}, {self.tree_options()!r})"
        )

    def _widths_at_start(self) -> list[tuple[int, int, int]] | None:
        options = self.tree_options()
        if options.has_fixed_shape or not options.adaptive:
            return None
        return widths_at_start(options.num_nodes)

    def _check_without_a_head(self) -> None:
        """The text must be drafted from, and nothing asked for that a head would do."""
        options = self.tree_options()
        if options.context_limits() is None:
            raise ValueError(
                f'Without a head ("model": "{NO_HEAD}") the text is the only source of '
                f'drafts: context must be true and tree "dynamic" or "chain", but '
                f"found context {options.context} and tree {options.tree!r}. Leave "
                f"them out, or name a head as the model."
            )
        of_a_head = ["top_k", "top_p", "min_ratio"]
        if options.tree != "chain":  # whose depth is its number of nodes
            of_a_head.append("depth")
        given = [name for name in of_a_head if getattr(self, name) is not None]
        if given:
            raise ValueError(
                f'Without a head ("model": "{NO_HEAD}") options must not shape what a '
                f"head grows: these have no effect: {', '.join(given)}. Leave them out "
                f"(num_speculative_tokens and context_depth bound trees of the text), "
                f"or name a head as the model."
            )

    def _check_head_fits(self) -> None:
        """Check the head's sizes against the target's; its files were checked."""
        draft = self.head_config
        target = self.target_model_config.hf_text_config
        for size in ("hidden_size", "vocab_size"):
            expected, found = getattr(target, size), getattr(draft, size)
            if expected != found:
                raise ValueError(
                    f"The draft's {size} must equal the target's {expected}, but the "
                    f"head {self.model} has {found}. Choose the head that was trained "
                    f"for {self.target_model_config.model}, or train one."
                )
        layers = self.target_model_config.get_total_num_hidden_layers()
        if (read := draft.aux_hidden_state_layers) and max(read) >= layers:
            raise ValueError(
                f"The head {self.model} reads the states after {read} of the target's "
                f"layers, which must lie in 1..{layers - 1}. Choose the head that was "
                f"trained for {self.target_model_config.model}, or train one."
            )
