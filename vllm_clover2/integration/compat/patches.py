# SPDX-License-Identifier: Apache-2.0
"""Everything that touches private parts of vLLM, one function per patch."""

import argparse
import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

from vllm_clover2.heads import NO_HEAD
from vllm_clover2.integration.compat import DOCTOR_HINT

METHOD = "clover2"
"""Name of the speculative method, as the user writes it."""

CPU_WORKER = "vllm_clover2.integration.worker_cpu.Clover2CPUWorker"
GPU_WORKER = "vllm_clover2.integration.worker_gpu.Clover2GPUWorker"
CONTEXT_DRAFTER = "vllm_clover2.integration.drafter.ContextDrafter"


def install() -> None:
    """Apply all patches of the configuration side (idempotence: ``plugin``)."""
    _register_draft_model()
    _accept_method_in_engine_args()
    _refuse_unsupported_engine_configs()
    _extend_command_line()
    _keep_to_model_runner_v1()
    _hear_of_workers()
    _accept_sampling_parameters()


def _register_draft_model() -> None:
    """Teach vLLM the head's config and architecture (public registries).

    ``SpeculativeConfig`` wraps an EAGLE-like draft config in ``EAGLEConfig``, which
    prefixes the architecture's name; hence both names.
    """
    from vllm import ModelRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from vllm_clover2.model.config import Clover2Config

    _CONFIG_REGISTRY[Clover2Config.model_type] = Clover2Config
    implementation = "vllm_clover2.integration.draft_model:Clover2DraftModel"
    for prefix in ("", "Eagle"):
        ModelRegistry.register_model(f"{prefix}Clover2DraftModel", implementation)


def _accept_method_in_engine_args() -> None:
    """Patch ``EngineArgs.create_speculative_config``.

    ``SpeculativeConfig.method`` is a closed ``Literal`` and no registry of methods
    exists (vLLM RFC 36219 would remove this patch), so our subclass is swapped in
    while the stock method runs. The worker class is set here because this object is
    the one that ends up in ``VllmConfig``, and platforms only replace ``"auto"``.
    """
    from vllm.engine import arg_utils

    stock = arg_utils.EngineArgs.create_speculative_config

    @functools.wraps(stock)
    def create_speculative_config(
        self: Any, target_model_config: Any, target_parallel_config: Any
    ) -> Any:
        options = self.speculative_config or {}
        if METHOD not in (self.spec_method, options.get("method")):
            return stock(self, target_model_config, target_parallel_config)

        from vllm_clover2.integration import engine_args
        from vllm_clover2.integration.compat import surface
        from vllm_clover2.integration.speculative_config import (
            Clover2SpeculativeConfig,
        )

        surface.check_signatures(surface.EXPECTED_CONFIG)
        stock_config = arg_utils.SpeculativeConfig
        arg_utils.SpeculativeConfig = Clover2SpeculativeConfig
        try:
            engine_args.choose_head(self, target_model_config)
            config = stock(self, target_model_config, target_parallel_config)
            engine_args.refuse_async_scheduling(self, config)
        except ValueError as error:
            error.add_note(DOCTOR_HINT)
            raise
        finally:
            arg_utils.SpeculativeConfig = stock_config
        engine_args.choose_attention_backend(self, target_model_config, config)
        if target_parallel_config.worker_cls == "auto":
            from vllm.platforms import current_platform

            is_cpu = current_platform.is_cpu()
            target_parallel_config.worker_cls = CPU_WORKER if is_cpu else GPU_WORKER
        if config.runs_on_v2:
            # Until the whole configuration is made, see `named_for_async`.
            config.method = _name_for_async(config)
        return config

    arg_utils.EngineArgs.create_speculative_config = create_speculative_config


def _refuse_unsupported_engine_configs() -> None:
    """Patch ``EngineArgs.create_engine_config``: the first place where the whole
    configuration is known, and the last one before any process or model starts.
    """
    from vllm.engine.arg_utils import EngineArgs

    stock = EngineArgs.create_engine_config

    @functools.wraps(stock)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = stock(self, *args, **kwargs)
        if _uses_clover2(vllm_config):
            from vllm_clover2.integration.limits import refuse_unsupported

            vllm_config.speculative_config.method = METHOD
            refuse_unsupported(vllm_config)
        return vllm_config

    EngineArgs.create_engine_config = create_engine_config


class _SpeculativeModel(argparse.Action):
    """``--speculative-model clover2``, or the path of a draft model for vLLM."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if values == NO_HEAD:
            raise argparse.ArgumentError(
                self,
                f"to speculate without a head, write --speculative-model {METHOD} "
                f"--spec-model {NO_HEAD}; not to speculate, leave the option out",
            )
        destination = "spec_method" if values == METHOD else "spec_model"
        setattr(namespace, destination, values)


def _extend_command_line() -> None:
    """Patch ``EngineArgs.add_cli_args``: the choices of ``--spec-method`` come from
    the closed ``Literal``, and vLLM has no hook for a plugin's own flags.
    """
    from vllm.engine.arg_utils import EngineArgs

    stock = EngineArgs.add_cli_args

    @functools.wraps(stock)
    def add_cli_args(parser: Any) -> Any:
        parser = stock(parser)
        for action in parser._actions:
            if action.dest == "spec_method" and action.choices is not None:
                action.choices = [*action.choices, METHOD]
        parser.add_argument(
            "--speculative-model",
            action=_SpeculativeModel,
            dest="speculative_model",
            default=argparse.SUPPRESS,
            metavar="clover2|MODEL",
            help="'clover2' speculates with the Clover-2 head registered for the "
            "target ('vllm-clover2 heads list'), or with that of --spec-model ('none': "
            "without a head); anything else is --spec-model.",
        )
        parser.add_argument(
            "--num-speculative-tokens",
            dest="spec_tokens",
            type=int,
            default=argparse.SUPPRESS,
            help="Same as --spec-tokens; for clover2 the nodes of a token tree.",
        )
        return parser

    EngineArgs.add_cli_args = staticmethod(add_cli_args)


def _keep_to_model_runner_v1() -> None:
    """Patch ``VllmConfig._get_v2_model_runner_unsupported_features``.

    Where there is Triton vLLM takes Model Runner V2 unless a feature is on this list,
    which it logs. Goes away when our route on V2 does all that the one on V1 does.
    """
    from vllm.config.vllm import VllmConfig

    stock = VllmConfig._get_v2_model_runner_unsupported_features

    @functools.wraps(stock)
    def unsupported_features(self: Any) -> list[str]:
        features = stock(self)
        # Who sets the variable to 1 does without them: vLLM would refuse to start.
        if _uses_clover2(self) and not self.speculative_config.runs_on_v2:
            features += self.speculative_config.missing_on_v2()
        return features

    VllmConfig._get_v2_model_runner_unsupported_features = unsupported_features


def _hear_of_workers() -> None:
    """Patch ``Scheduler.update_from_output``, ``SpecDecodingLogging.observe``, and the
    class of ``PrometheusStatLogger`` for counters of speculation.

    vLLM has no way for figures of a plugin from a worker to ``/metrics``; module
    ``stats`` tells why it is this one. What a worker wants of the scheduler comes the
    same way (``scheduling``).
    """
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.metrics.loggers import PrometheusStatLogger
    from vllm.v1.spec_decode.metrics import SpecDecodingLogging

    from vllm_clover2.integration import metrics, scheduling, stats

    stock_update = Scheduler.update_from_output
    stock_observe = SpecDecodingLogging.observe

    @functools.wraps(stock_update)
    def update_from_output(
        self: Any, scheduler_output: Any, model_runner_output: Any
    ) -> Any:
        outputs = stock_update(self, scheduler_output, model_runner_output)
        stats.pass_on(self, model_runner_output, outputs.values())
        scheduling.follow(self, model_runner_output)
        return outputs

    @functools.wraps(stock_observe)
    def observe(self: Any, spec_decoding_stats: Any) -> None:
        metrics.observe_for_log(stock_observe, self, spec_decoding_stats)

    Scheduler.update_from_output = update_from_output
    SpecDecodingLogging.observe = observe
    PrometheusStatLogger._spec_decoding_cls = metrics.Clover2Prom


def _accept_sampling_parameters() -> None:
    """Patch ``SamplingParams._validate_spec_decode``.

    It refuses ``min_p`` and ``logit_bias`` with any speculation, because vLLM's
    rejection sampler does not know them. Ours take what the stock sampler picks.
    """
    from vllm.sampling_params import SamplingParams

    stock = SamplingParams._validate_spec_decode

    @functools.wraps(stock)
    def validate_spec_decode(self: Any, speculative_config: Any) -> None:
        if getattr(speculative_config, "method", None) != METHOD:
            stock(self, speculative_config)

    SamplingParams._validate_spec_decode = validate_spec_decode


@contextlib.contextmanager
def all_logits_processors() -> Iterator[None]:
    """Let ``GPUModelRunner.__init__`` build the logits processors of plain vLLM.

    With speculation ``build_logitsprocs`` leaves out those of ``min_p`` and
    ``logit_bias`` and raises for custom ones. Goes away with a hook for the sampler.
    """
    from vllm.v1.worker import gpu_model_runner

    stock = gpu_model_runner.build_logitsprocs

    @functools.wraps(stock)
    def build_logitsprocs(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        plain = copy.copy(vllm_config)
        plain.speculative_config = None
        return stock(plain, *args, **kwargs)

    gpu_model_runner.build_logitsprocs = build_logitsprocs
    try:
        yield
    finally:
        gpu_model_runner.build_logitsprocs = stock


@contextlib.contextmanager
def packed_cpu_linears() -> Iterator[None]:
    """Give float32 layers that are loaded meanwhile our product, where it serves.

    ``dispatch_cpu_unquantized_gemm`` chooses the product of every unquantised layer
    after its weights are loaded. Goes away with a registry of CPU products.
    """
    from vllm.model_executor.layers import utils

    from vllm_clover2.integration import linear_cpu

    if not linear_cpu.serves_packed():
        yield
        return
    stock = utils.dispatch_cpu_unquantized_gemm

    @functools.wraps(stock)
    def dispatch(layer: Any, remove_weight: bool) -> None:
        if linear_cpu.can_be_packed(layer.weight):
            linear_cpu.pack_layer(layer, remove_weight)
        else:
            stock(layer, remove_weight)

    utils.dispatch_cpu_unquantized_gemm = dispatch
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = stock


@contextlib.contextmanager
def named_for_async(speculative: Any) -> Iterator[None]:
    """Give the method a name with which vLLM 0.32 schedules asynchronously.

    ``VllmConfig.__post_init__`` has a closed list; 0.33 asks on Model Runner V1 only.
    Goes away with 0.32.
    """
    speculative.method = _name_for_async(speculative)
    try:
        yield
    finally:
        speculative.method = METHOD


def _name_for_async(speculative: Any) -> str:
    return "eagle" if speculative.has_head else "ngram_gpu"


@contextlib.contextmanager
def let_runner_make(speculative: Any) -> Iterator[None]:
    """Let ``GPUModelRunner.__init__`` make the drafter of a config without a head.

    It chooses the drafter by the method's name and raises for one it does not know;
    "custom_class" is its name for a drafter that is a class, whose path is the model.
    With a head it takes ``use_eagle()``. Goes away with a registry of methods.
    """
    if speculative.has_head:
        yield
        return
    names = speculative.method, speculative.model
    speculative.method, speculative.model = "custom_class", CONTEXT_DRAFTER
    try:
        yield
    finally:
        speculative.method, speculative.model = names


def forget_selected_backends() -> None:
    """Clear the cache of ``vllm.v1.attention.selector:_cached_get_attn_backend``.

    vLLM remembers its choice for the life of the process, so after a plain engine in
    the same process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``) our overrides would go
    unseen. Goes away when ``register_backend`` clears the cache itself.
    """
    from vllm.v1.attention import selector

    selector._cached_get_attn_backend.cache_clear()


def _uses_clover2(vllm_config: Any) -> bool:
    if vllm_config.speculative_config is None:
        return False
    from vllm_clover2.integration.speculative_config import Clover2SpeculativeConfig

    return isinstance(vllm_config.speculative_config, Clover2SpeculativeConfig)
