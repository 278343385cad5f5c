# SPDX-License-Identifier: Apache-2.0
"""Every name of vLLM that ``integration`` uses exists in every supported release."""

import ast
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
import vllm
from stock_vllm import RELEASES, unpacked
from vllm_sources import Class, Function, Sources, Thing, own_members

import vllm_clover2.integration
from vllm_clover2.integration.compat import SUPPORTED_VLLM
from vllm_clover2.integration.compat.surface import (
    EXPECTED_CONFIG,
    EXPECTED_WORKER,
    EXPECTED_WORKER_V2,
)
from vllm_clover2.integration.request_sampling import STATES

PACKAGE = Path(vllm_clover2.integration.__file__).parent
# Ours are mixed in front of these.
MIXED_WITH = {
    "Clover2RunnerMixin": (
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner",
    ),
    "Clover2WorkerMixin": (
        "vllm.v1.worker.gpu_worker:Worker",
        "vllm.v1.worker.cpu_worker:CPUWorker",
    ),
    "TreeAttentionMixin": (
        "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl",
        "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl",
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl",
    ),
}
# Expressions whose type no annotation tells.
TYPED = {
    "self.input_batch": "vllm.v1.worker.gpu_input_batch:InputBatch",
    "batch.thinking_budget_state_holder": (
        "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder"
    ),
    "scheduler_output": "vllm.v1.core.sched.output:SchedulerOutput",
}


@pytest.fixture(scope="module", params=["installed", *RELEASES])
def sources(request: pytest.FixtureRequest) -> Sources:
    if request.param == "installed":
        return Sources(Path(vllm.__file__).parents[1])
    return Sources(unpacked(request.param))


class Usage:
    """What a file of ours uses of vLLM, checked against its sources."""

    def __init__(self, sources: Sources, text: str) -> None:
        self.sources = sources
        self.tree = ast.parse(text)
        self.imported: dict[str, Thing] = {}
        self.problems: list[str] = []
        self.checked = 0

    def check(self) -> list[str]:
        self._check_imports()
        self._check_scope(self.tree, dict(self.imported))
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ClassDef):
                self._check_class(node)
        return self.problems

    def _require(self, fulfilled: object, problem: str) -> None:
        self.checked += 1
        if not fulfilled:
            self.problems.append(problem)

    def _check_imports(self) -> None:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(
                "vllm."
            ):
                for alias in node.names:
                    path = f"{node.module}:{alias.name}"
                    thing = self.sources.find(path)
                    self._require(thing, f"import of {path}")
                    if thing is not None:
                        self.imported[alias.asname or alias.name] = thing

    def _check_scope(self, scope: ast.AST, known: dict[str, Thing]) -> None:
        """Uses of names whose type is known: imported ones, annotated arguments."""
        for node in ast.iter_child_nodes(scope):
            inner = known
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.args, *node.args.kwonlyargs]
                typed = {a.arg: self._annotated(a.annotation) for a in arguments}
                inner = {k: v for k, v in known.items() if k not in typed}
                inner |= {k: v for k, v in typed.items() if v is not None}
            elif isinstance(node, ast.Attribute):
                self._attribute(node, known)
            elif isinstance(node, ast.Call):
                self._check_keywords(node, known)
            self._check_scope(node, inner)

    def _annotated(self, annotation: ast.expr | None) -> Thing | None:
        name = ast.unparse(annotation).removesuffix(" | None") if annotation else ""
        thing = self.imported.get(name)
        return thing if isinstance(thing, Class) else None

    def _attribute(self, node: ast.expr, known: dict[str, Thing]) -> Thing | None:
        if (expression := ast.unparse(node)) in TYPED:
            return self.sources.find(TYPED[expression])
        if isinstance(node, ast.Name):
            return known.get(node.id)
        if not isinstance(node, ast.Attribute):
            return None
        owner = self._attribute(node.value, known)
        if owner is None:
            return None
        found = self.sources.attribute(owner, node.attr)
        self._require(found, f"line {node.lineno}: {ast.unparse(node)}")
        return found

    def _check_keywords(self, call: ast.Call, known: dict[str, Thing]) -> None:
        by_name = isinstance(call.func, ast.Name)  # an argument would be an object
        called = self._attribute(call.func, self.imported if by_name else known)
        taken = self.sources.keywords(called) if called else None
        for keyword in call.keywords:
            if taken is not None and keyword.arg is not None:
                self._require(
                    keyword.arg in taken,
                    f"line {call.lineno}: {ast.unparse(call.func)}({keyword.arg}=)",
                )

    def _check_class(self, node: ast.ClassDef) -> None:
        """``self`` and ``super()`` in a class that derives from vLLM's."""
        ours = set(own_members(Class("", node)))
        for base in self._bases(node):
            theirs = set(self.sources.members(base))
            for inner in ast.walk(node):
                if not isinstance(inner, ast.Attribute):
                    continue
                owner = ast.unparse(inner.value)
                known = theirs | ours if owner == "self" else theirs
                if owner in ("self", "super()"):
                    self._require(
                        inner.attr in known,
                        f"line {inner.lineno}: {owner}.{inner.attr} of a "
                        f"{base.node.name}",
                    )

    def _bases(self, node: ast.ClassDef) -> Iterator[Class]:
        things = [self._attribute(base, self.imported) for base in node.bases]
        things += [self.sources.find(path) for path in MIXED_WITH.get(node.name, ())]
        yield from (thing for thing in things if isinstance(thing, Class))


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize(
    "file", FILES, ids=[str(f.relative_to(PACKAGE)) for f in FILES]
)
def test_names_exist(file: Path, sources: Sources) -> None:
    usage = Usage(sources, file.read_text())
    assert usage.check() == []


def test_most_of_what_is_used_is_checked(sources: Sources) -> None:
    """The runner alone has some hundred uses."""
    usage = Usage(sources, (PACKAGE / "runner.py").read_text())
    usage.check()
    assert usage.checked > 100


@pytest.mark.parametrize("mixin", MIXED_WITH)
def test_mixed_in_classes_exist(mixin: str, sources: Sources) -> None:
    for path in MIXED_WITH[mixin]:
        assert isinstance(sources.find(path), Class), path


@pytest.mark.parametrize(("cls", "name"), STATES.items())
def test_states_of_processors_exist(cls: type, name: str, sources: Sources) -> None:
    processor = sources.find(f"{cls.__module__}:{cls.__name__}")
    assert isinstance(processor, Class)
    assert name in sources.members(processor)


EXPECTED = EXPECTED_CONFIG | EXPECTED_WORKER | EXPECTED_WORKER_V2


@pytest.mark.parametrize("path", EXPECTED)
def test_parameters_of_what_is_patched(path: str, sources: Sources) -> None:
    found = sources.find(path)
    assert isinstance(found, Function), path
    assert found.parameters == EXPECTED[path]


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("from vllm.v1.nowhere import Thing", "import of vllm.v1.nowhere:Thing"),
        ("from vllm.utils import torch_utils\ntorch_utils.gone", "torch_utils.gone"),
        (
            """
            def accept():
                from vllm.v1.outputs import SamplerOutput
                SamplerOutput(sampled_token_ids=1, colour=2)
            """,
            "line 4: SamplerOutput(colour=)",
        ),
        (
            """
            from vllm.v1.sample.metadata import SamplingMetadata
            def f(metadata: SamplingMetadata | None): metadata.all_greedy.x, metadata.y
            """,
            "line 3: metadata.y",
        ),
        (
            """
            class Clover2WorkerMixin:
                def load_model(self): self.model_runner, self.gone
            """,
            "self.gone of a Worker",
        ),
        ("def f(self): self.input_batch.gone", "self.input_batch.gone"),
        (
            """
            from vllm.v1.worker import gpu_worker
            class Mine(gpu_worker.Worker):
                def load_model(self): super().load_the_model()
            """,
            "super().load_the_model of a Worker",
        ),
    ],
    ids=["import", "module", "keyword", "argument", "self", "typed", "super"],
)
def test_what_is_gone_is_found(program: str, problem: str, sources: Sources) -> None:
    problems = Usage(sources, dedent(program)).check()
    assert problems
    assert all(problem in found or "CPUWorker" in found for found in problems)


def test_the_import_that_went_with_033() -> None:
    """It killed every start of a version that was written for 0.32."""
    program = "from vllm.utils.torch_utils import is_quantized_kv_cache"
    assert Usage(Sources(unpacked("0.32.0")), program).check() == []
    assert len(Usage(Sources(unpacked("0.33.0")), program).check()) == 1


def test_the_releases_are_the_supported_ones() -> None:
    assert tuple(r.rpartition(".")[0] for r in RELEASES) == SUPPORTED_VLLM
    assert vllm.__version__.startswith(SUPPORTED_VLLM)
