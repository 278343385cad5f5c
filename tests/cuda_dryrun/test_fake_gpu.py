# SPDX-License-Identifier: Apache-2.0
"""The fake device tells host from device, refuses to mix them, counts waits, and
replays CUDA graphs.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DEVICES = {
    program: "cuda"
    for program in (
        "device[1:]",
        "device.view(2, 2).T",
        "device + 1",
        "device * host[1]",
        "device.cos()",
        "host.cuda()",
        "host.to(device)",
        "torch.nn.functional.linear(device, device[None])",
        "torch.tensor([1, 2], device='cuda')",
        "torch.as_tensor(device)",
        "torch.stack([device, device])",
        "torch.empty_like(device)",
    )
} | {
    "host[1:]": "cpu",
    "device.cpu()": "cpu",
    "device.to('cpu', torch.int32)": "cpu",
    "torch.empty_like(device, device='cpu')": "cpu",
}
MIXED = [
    "device + host",
    "torch.where(device > 1, device, host)",
    "torch.cat([host, device])",
    "torch.nn.Linear(4, 4)(device)",
    "host[device.long()]",
    "device.index_put_([device.long()], host)",
    "torch.nn.functional.embedding(device.long(), torch.ones(4, 2))",
]
COUNTS = {  # waits of the host, copies from memory that is not pinned
    "device + 1": (0, 0),
    "device[device.long()]": (0, 0),
    "device.sum().item()": (1, 0),
    "bool((device > 1).any())": (1, 0),
    "int(device[1]), float(device[1]), range(4)[device.int()[1]]": (3, 0),
    "device.tolist()": (1, 0),
    "device.cpu()": (1, 0),
    "host.to('cuda')": (1, 0),
    "host.to('cuda', non_blocking=True)": (0, 1),
    "host.pin_memory().to('cuda', non_blocking=True)": (0, 0),
    "device.copy_(host)": (1, 0),
    "device.copy_(host, non_blocking=True)": (0, 1),
    "device[device > 1]": (1, 0),
    "device[host.long()]": (1, 0),
    "device.nonzero()": (1, 0),
    "device.repeat_interleave(device.long())": (1, 0),
    "device.repeat_interleave(device.long(), output_size=6)": (0, 0),
    "device.repeat_interleave(2)": (0, 0),
    "torch.cuda.Event().synchronize()": (1, 0),
    "torch.cuda.synchronize()": (1, 0),
}
NUMPY = "device.numpy()"
CHILD = """
import json, sys
import fake_gpu, torch
fake_gpu.install()
fake_gpu.transfers.counting = True
results = {}
for program in json.loads(sys.argv[1]):
    try:
        # As vLLM runs; shortcuts that torch takes then must be seen as well.
        with torch.inference_mode():
            host, device = torch.arange(4.0), torch.arange(4.0, device="cuda")
            fake_gpu.transfers.counts.clear()
            result = eval(program)
        where = result.device.type if isinstance(result, torch.Tensor) else None
        counts = [fake_gpu.transfers.total(kind) for kind in ("wait", "staged")]
        results[program] = where, counts
    except Exception as error:
        results[program] = str(error)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """Device and counts, or the error, of every program, all run by one process."""
    programs = [*DEVICES, *MIXED, *COUNTS, NUMPY]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(programs)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("program", DEVICES)
def test_device_of_a_result(program: str, results: dict[str, Any]) -> None:
    assert results[program][0] == DEVICES[program]


@pytest.mark.parametrize("program", MIXED)
def test_mixing_raises(program: str, results: dict[str, Any]) -> None:
    assert "Expected all tensors to be on the same device" in results[program]


def test_device_memory_cannot_be_read(results: dict[str, Any]) -> None:
    assert "can't convert cuda:0 device type tensor to numpy" in results[NUMPY]


@pytest.mark.parametrize("program", COUNTS)
def test_what_waits(program: str, results: dict[str, Any]) -> None:
    assert tuple(results[program][1]) == COUNTS[program]


GRAPHS = """
import fake_gpu, torch
fake_gpu.install()

def captured(part):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = part()
    return graph, result

def refused(do, *args):
    try:
        do(*args)
    except RuntimeError as error:
        return str(error)

with torch.inference_mode():
    buffer, host = torch.zeros(2, device="cuda"), 1
    graph, result = captured(lambda: (buffer * 2 + host).cumsum(0)[1:])
    # What another graph makes of it lies in memory that both use.
    after, last = captured(lambda: result + 1)
    buffer.fill_(3)
    host = 5
    graph.replay()
    after.replay()
    assert (result.item(), last.item()) == (14, 15)  # on the memory, not on the host

    fresh = buffer + 1
    graph, _ = captured(lambda: fresh * 2)
    graph.replay()
    del fresh
    assert "was freed after its capture" in refused(graph.replay)

    while_captured = "while a CUDA graph is captured"
    for part in (
        lambda: buffer.sum().item(),
        lambda: buffer[buffer > 1],
        lambda: torch.tensor([1.0], device="cuda"),
        lambda: buffer.copy_(torch.ones(2).pin_memory(), non_blocking=True),
        lambda: torch.cuda.synchronize(),
    ):
        assert while_captured in refused(captured, part), part
"""


def test_graphs_run_on_memory_alone() -> None:
    """A replay sees what is in the buffers; not what was freed, nor the host."""
    done = subprocess.run(
        [sys.executable, "-c", GRAPHS],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
