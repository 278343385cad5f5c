# SPDX-License-Identifier: Apache-2.0
"""Where tensors of the original implementation are: two cases here, others outside."""

import os
from pathlib import Path

GOLDEN = Path(__file__).with_name("golden")


def case_folders(file: str = "forward.safetensors") -> list[Path]:
    """The cases of this repository, and those of a folder outside that it lacks.

    Only those that have such a file.

    That folder is CLOVER2_GOLDEN_DIR, or `shared/golden` beside the checkout.
    """
    named = os.environ.get("CLOVER2_GOLDEN_DIR")
    beside = Path(__file__).resolve().parents[3] / "shared" / "golden"
    outside = Path(named) if named else beside
    if named and not outside.is_dir():
        raise ValueError(f"CLOVER2_GOLDEN_DIR must name a folder, found {named}")
    cases = {
        found.parent.name: found.parent
        for folder in (outside, GOLDEN)  # the later one counts
        for found in folder.glob(f"*/{file}")
    }
    return [cases[name] for name in sorted(cases)]
