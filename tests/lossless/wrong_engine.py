# SPDX-License-Identifier: Apache-2.0
"""The program of ``bench.engine`` with a clover2 that says something else at times.

Of the tokens that a step emits for a request the last becomes another one, in every
fourth step. An engine without speculation is as it always is.
"""

import json
import sys
from typing import Any

from vllm_clover2.bench import engine
from vllm_clover2.integration import runner
from vllm_clover2.integration.sampling import AcceptedPaths

_stock = runner.accept_paths
_steps = 0


def accept_paths(*args: Any) -> AcceptedPaths:
    global _steps
    accepted = _stock(*args)
    _steps += 1
    if _steps % 4 == 0:
        tokens = accepted.output.sampled_token_ids
        for row in tokens:
            if count := int((row >= 0).sum()):
                row[count - 1] = (row[count - 1] + 1) % 512
    return accepted


if __name__ == "__main__":
    runner.accept_paths = accept_paths
    engine._serve(json.loads(sys.argv[1]))
