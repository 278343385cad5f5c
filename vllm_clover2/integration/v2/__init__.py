# SPDX-License-Identifier: Apache-2.0
"""Clover-2 on vLLM's Model Runner V2, which never waits for the device in a step.

``runner`` puts the parts in place: ``speculator`` drafts, ``trees`` keeps what was
drafted on the device, ``model_state`` shows the target the trees and commits what was
accepted, ``sampling`` decides what that is.
"""
