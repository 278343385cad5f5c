# SPDX-License-Identifier: Apache-2.0
"""One answer as a web page: the tree of every step, and what became of it."""
