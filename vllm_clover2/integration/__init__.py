# SPDX-License-Identifier: Apache-2.0
"""The only code of this project that imports vLLM.

``plugin`` is the entry point, ``compat`` holds every version-specific patch,
``runner`` is one step of the method on vLLM's Model Runner V1, and the other
modules are its parts: ``verify`` (what a target pass scores), ``sampling``
(which path is accepted), ``proposer`` and ``draft_model`` (the next drafts),
``attention`` (backends that understand trees), ``linear_cpu`` (products of few
rows). ``v2`` is the same step on Model
Runner V2, and ``step`` what a step means on either.
"""
