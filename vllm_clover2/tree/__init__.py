# SPDX-License-Identifier: Apache-2.0
"""Trees of drafted tokens as plain data: shapes, growth, masks, walk."""
