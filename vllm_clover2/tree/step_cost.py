# SPDX-License-Identifier: Apache-2.0
"""What a step takes by what it does, measured at start and learned in service.

A linear model of seconds over a dozen properties of a step, kept up to date by
recursive least squares (a Kalman filter whose state drifts slowly). It starts from
passes measured at start-up, which miss attention, host work and what else goes on in a
running engine: the first steps that are seen scale all of them together, later ones
correct single row counts. A step that a busy machine held up counts for little.
"""

from dataclasses import dataclass

import numpy as np

_SCALE_ERROR = 0.4
"""How far off all measured passes may be together (standard deviation, relative)."""
_OWN_ERROR = 0.15
"""How far off a single one may be beside that, and the cost of a part of drafting."""
_DRIFT = 1e-4
"""Share of the first uncertainty that a step adds again: about a minute's memory."""
_NOISE = 0.05
"""Standard deviation of a step, relative, where nothing disturbs it."""
_OUTLIER = 3.0
"""Standard deviations beyond which an observation is doubted."""
_TABLE_AGE = 16
"""Observations after which the times by rows are computed anew."""


@dataclass(frozen=True)
class Work:
    """What one step did."""

    rows: int  # of the target's pass, prompts included
    prompt: int  # of these, rows of prompts, which need no output head
    context: int  # tokens with KV that the attention of all requests reads
    augmented: int = 0  # rows of the draft's augmenting block
    levels: int = 0  # of trees that were grown
    grown: int = 0  # nodes that the draft was asked about

    def properties(self) -> np.ndarray:
        """All but the rows of the pass, [_PROPERTIES] float64."""
        return np.array(
            [
                self.prompt,
                self.context,
                self.augmented > 0,
                self.augmented,
                self.levels,
                self.grown,
            ],
            dtype=np.float64,
        )


_PROPERTIES = len(Work(0, 0, 0).properties())


class StepCost:
    """Seconds of a step; see the module's text."""

    def __init__(
        self,
        rows: list[int],  # measured row counts, ascending, at least two
        seconds: list[float],  # of a pass over as many, output head included
        augment: tuple[float, float],  # seconds of one augmenting pass, and of a row
        grow: tuple[float, float],  # seconds of a level, and of a node in it
        max_rows: int,
    ) -> None:
        if len(rows) < 2 or len(rows) != len(seconds) or rows != sorted(set(rows)):
            raise ValueError(
                "a cost curve needs at least two ascending row counts with a time "
                f"each, found rows {rows} and {len(seconds)} times"
            )
        self.max_rows = max_rows
        self._knots = np.array(rows, dtype=np.float64)
        base = np.maximum.accumulate(np.array(seconds, dtype=np.float64))
        step = float(base[0])
        # The pass was measured with output head and without attention: what a row
        # without the one saves and a token of the other costs is for service to tell.
        extra = np.array([0.0, 0.0, *augment, *grow])
        spread = np.array([step * 1e-2, step * 1e-5, *augment, *grow])
        self._mean = np.concatenate([base, extra])
        scale = np.concatenate([base, np.zeros(_PROPERTIES)]) * _SCALE_ERROR
        own = np.concatenate([base, spread]) * _OWN_ERROR
        self._first = np.outer(scale, scale) + np.diag(own**2)
        self._covariance = self._first.copy()
        # Running size of how residuals differ from one to the next, seconds: what they
        # have in common is for the mean to learn and no noise.
        self._error = _NOISE * step
        self._residual = 0.0  # the last one
        self.version = 0  # rises with every observation
        self._passes: tuple[int, np.ndarray] | None = None  # version, by rows

    def seconds(self, work: Work) -> float:
        """Predicted time of a step."""
        return max(float(self._vector(work) @ self._mean), 1e-6)

    def milliseconds(self) -> dict[int, float]:
        """Predicted times of steps that only pass rows, by their number."""
        return {
            rows: 1e3 * self.seconds(Work(rows, 0, 0))
            for rows in (1, 2, 4, 8, 16, 26, 32, 61, 64, 128, 256)
            if rows <= self.max_rows
        }

    def table(self, work: Work, max_nodes: int) -> np.ndarray:
        """Seconds [n + 1] float64 of ``work`` with 0..n further rows, n <= max_nodes.

        They never fall: noise may make a larger step look quicker than a smaller one.
        """
        if self._passes is None or self.version - self._passes[0] >= _TABLE_AGE:
            hats = self._hats(np.arange(self.max_rows + 1))
            self._passes = self.version, hats @ self._mean[:-_PROPERTIES]
        rest = work.properties() @ self._mean[-_PROPERTIES:]
        passes = self._passes[1][work.rows : work.rows + max_nodes + 1]
        return np.maximum.accumulate(np.maximum(passes + rest, 1e-6))

    def drafting(self, rows: int, levels: int, nodes: int) -> float:
        """Seconds of augmenting so many rows and growing so many levels and nodes."""
        work = Work(0, 0, 0, rows, levels, nodes)
        return max(0.0, float(work.properties() @ self._mean[-_PROPERTIES:]))

    @property
    def row(self) -> float:
        """Seconds of a further row of an augmenting pass."""
        return max(0.0, float(self._mean[-3]))

    @property
    def level(self) -> float:
        """Seconds of a level of growth."""
        return max(0.0, float(self._mean[-2]))

    @property
    def node(self) -> float:
        """Seconds of a node that the draft is asked about."""
        return max(0.0, float(self._mean[-1]))

    def observe(self, work: Work, seconds: float) -> float:
        """Learn from a step; returns what the prediction was."""
        x = self._vector(work)
        predicted = float(x @ self._mean)
        residual = seconds - predicted
        limit = _OUTLIER * max(self._error, _NOISE * predicted)
        change = abs(residual - self._residual) / np.sqrt(2.0)
        self._error += 0.05 * (min(float(change), limit) - self._error)
        self._residual = residual
        # What is far off counts as noisier by as much: little, but if it goes on being
        # so, it is believed.
        doubt = max(1.0, abs(residual) / limit)
        self._covariance += _DRIFT * self._first
        toward = self._covariance @ x
        noise = max(self._error, _NOISE * predicted) ** 2 * doubt**2
        gain = toward / (float(x @ toward) + noise)
        self._mean += gain * residual
        self._covariance -= np.outer(gain, toward)
        self.version += 1
        return predicted

    def _vector(self, work: Work) -> np.ndarray:
        return np.concatenate([self._hats(np.array([work.rows]))[0], work.properties()])

    def _hats(
        self,
        rows: np.ndarray,  # [n]
    ) -> np.ndarray:
        """Weights [n, knots] of linear interpolation between the measured rows.

        Beyond the last the slope goes on.
        """
        right = np.searchsorted(self._knots, rows).clip(1, len(self._knots) - 1)
        left = right - 1
        width = self._knots[right] - self._knots[left]
        share = (rows - self._knots[left]) / width
        weights = np.zeros((len(rows), len(self._knots)))
        index = np.arange(len(rows))
        weights[index, left] = 1.0 - share
        weights[index, right] += share
        return weights
