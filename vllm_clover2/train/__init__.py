# SPDX-License-Identifier: Apache-2.0
"""Data generation, losses, training loop and offline evaluation of draft heads."""
