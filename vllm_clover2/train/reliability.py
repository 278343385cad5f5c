# SPDX-License-Identifier: Apache-2.0
"""Whether drafted nodes are accepted as often as was predicted, by source."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vllm_clover2.tree.types import Source

__all__ = ["Reliability", "draw"]

_EDGES = np.array([0.0, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97])


@dataclass
class Reliability:
    """Nodes by source and predicted (joint) probability, and those accepted."""

    # [sources, bins, 3] nodes, the sum of their predictions, accepted ones
    counts: np.ndarray = field(
        default_factory=lambda: np.zeros((len(Source), len(_EDGES), 3))
    )

    def add(
        self,
        predicted: np.ndarray,  # [n] joint probabilities
        sources: np.ndarray,  # [n] see Source
        accepted: np.ndarray,  # [n] bool
    ) -> None:
        bins = np.searchsorted(_EDGES, predicted, side="right") - 1
        place = (sources.astype(np.int64), bins)
        for column, values in enumerate((1.0, predicted, accepted)):
            np.add.at(self.counts[..., column], place, values)

    def merge(self, other: "Reliability") -> "Reliability":
        return Reliability(self.counts + other.counts)

    def summary(self) -> dict[str, dict[str, object]]:
        """By source: nodes, accepted ones, and the bins that are not empty."""
        result: dict[str, dict[str, object]] = {}
        for source in Source:
            nodes, predicted, accepted = self.counts[source].T
            if not nodes.sum():
                continue
            result[source.name.lower()] = {
                "nodes": int(nodes.sum()),
                "accepted": int(accepted.sum()),
                "bins": [
                    {
                        "nodes": int(n),
                        "predicted": round(p / n, 4),
                        "accepted": round(a / n, 4),
                    }
                    for n, p, a in zip(nodes, predicted, accepted)
                    if n
                ],
            }
        return result


def draw(by_tree: dict[str, dict[str, dict[str, object]]], path: Path) -> None:
    """Predicted against accepted, one panel a tree, one line a source, as a PNG.

    ``by_tree`` holds what `Reliability.summary` returns.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(by_tree), 4), layout="constrained")
    panels = figure.subplots(1, len(by_tree), squeeze=False)[0]
    for panel, (tree, sources) in zip(panels, by_tree.items()):
        panel.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        for source, entry in sources.items():
            bins = entry["bins"]
            panel.plot(
                [one["predicted"] for one in bins],
                [one["accepted"] for one in bins],
                marker="o",
                label=source,
            )
        panel.set(title=tree, xlabel="predicted", ylabel="accepted")
        panel.legend()
    figure.savefig(path, dpi=120)
