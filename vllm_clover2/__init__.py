# SPDX-License-Identifier: Apache-2.0
"""Clover-2 speculative decoding for vLLM."""

__version__ = "0.1.0"
