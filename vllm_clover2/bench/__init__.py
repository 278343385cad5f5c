# SPDX-License-Identifier: Apache-2.0
"""Measures what speculation brings, at every load, on the machine at hand."""
