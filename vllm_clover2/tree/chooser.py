# SPDX-License-Identifier: Apache-2.0
"""What a step drafts: for whom the head is asked, and how many nodes are verified.

A verified node costs time whether it is accepted or not, and so does asking the head.
With one request a target pass is bound by reading weights and more rows are nearly
free; with many every row counts, and the best choice may be to draft nothing. Every
step therefore maximises what it is expected to yield less what its time is worth:
candidates count with the probability that they are accepted, time is what
:class:`~vllm_clover2.tree.step_cost.StepCost` predicts, and a second is worth the
tokens that steps have lately brought in one. (To maximise each step's own tokens per
second would draft too much where little is to be gained and too little where much is:
the long-run rate is largest if every step has the same price of time, that rate;
Dinkelbach, 1967.) What the head would add is only known after it was asked, so it is
remembered from when it last was; while it is not asked it is probed now and then.
"""

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from vllm_clover2.tree.step_cost import StepCost, Work

_GAIN_MEMORY = 0.05
"""Share of a new observation in the running averages of what the head adds."""
_MARGIN = 0.01
"""A change of mind must be worth so much of a step: the head's KV is made up for when
it is asked again, and predictions are noisy."""
_PACE_MEMORY = 0.03
"""Share of the last step in the running average of what a second brings."""
FIRST_PROBE, LAST_PROBE = 16, 256
"""Steps without the head after which it is asked on trial, doubling while it loses."""
_PROBED = 4
"""Requests it is then asked for."""
_BACKLOG_STEPS = 8
"""Steps over which making up for missing KV is expected to pay."""
_LEAST_NET = 0.05
"""Where the head brings next to nothing it is still asked for a level, to be judged."""
_TRUST_MEMORY = 0.1
_TRUST_PRIOR = 2.0
"""Expected tokens for which a new request is taken to be like the others."""


@dataclass
class Probes:
    """When what does not pay is tried again."""

    _after: int = FIRST_PROBE
    _idle: int = 0  # steps without it

    def reset(self) -> None:
        """It pays."""
        self._after, self._idle = FIRST_PROBE, 0

    def due(self, possible: bool = True) -> bool:
        """Whether to try it in one more step in which it does not pay."""
        self._idle += 1
        if self._idle < self._after or not possible:
            return False
        self._idle = 0
        self._after = min(2 * self._after, LAST_PROBE)
        return True


@dataclass
class _HeadGain:
    """What asking the head brings, by unit of open probability, at some load."""

    tokens: float = 0.6  # expected accepted tokens
    net: float = 0.4  # the same less what verifying them takes, as tokens
    rows: float = 4.0  # nodes worth verifying
    levels: float = 3.0  # grown for the whole batch
    nodes: float = 8.0  # asked about, a request
    probes: Probes = field(default_factory=Probes)

    def learn(self, **observed: float) -> None:
        """Move the named averages toward what was seen."""
        for name, value in observed.items():
            old = getattr(self, name)
            setattr(self, name, old + _GAIN_MEMORY * (value - old))


@dataclass
class _Pace:
    """Tokens that steps gave, as seconds of steps without drafts, and their own."""

    earned: float = 0.0
    spent: float = 0.0

    def learn(self, earned: float, spent: float) -> None:
        """Take a step in."""
        self.earned += _PACE_MEMORY * (earned - self.earned)
        self.spent += _PACE_MEMORY * (spent - self.spent)


@dataclass(frozen=True)
class Plan:
    """The decision before anything is grown."""

    ask: np.ndarray  # [B] bool, requests that the head is asked for
    # Joint probability below which no node can pay; over 1: none.
    least: float
    level_mass: float  # open probability below which no level of growth can pay
    node_mass: float  # the same for one node that the head is asked about


class Chooser:
    """Decides, and learns from what became of its decisions."""

    def __init__(self, cost: StepCost) -> None:
        self.cost = cost
        # Both by the bit length of the batch size.
        self._gains: dict[int, _HeadGain] = {}
        self._paces: dict[int, _Pace] = {}
        self._asking = True
        self._trust: dict[str, np.ndarray] = {}  # by request: [expected, accepted]

    # What a request's drafts are worth beside those of others

    def trust(self, requests: list[str]) -> np.ndarray:
        """Accepted tokens by expected ones of each request [B], about 1."""
        counts = np.array([self._trust.get(r, (0.0, 0.0)) for r in requests])
        counts = counts.reshape(-1, 2) + _TRUST_PRIOR
        return (counts[:, 1] / counts[:, 0]).clip(0.25, 2.0)

    def accepted(self, request: str, expected: float, accepted: int) -> None:
        """Learn that a draft with so many expected tokens gave so many."""
        counts = self._trust.setdefault(request, np.zeros(2))
        counts *= 1.0 - _TRUST_MEMORY
        counts += (expected, accepted)

    def forget(self, request: str) -> None:
        """The request is gone."""
        self._trust.pop(request, None)

    # What a second is worth

    def rate(self, work: Work) -> float:
        """Tokens that a second is worth to the requests of a step without drafts.

        What it has lately brought batches of such a size; at least what steps without
        drafts bring.
        """
        requests = work.rows - work.prompt
        pace = self._paces.get(requests.bit_length())
        faster = pace.earned / pace.spent if pace is not None else 1.0
        return max(1.0, faster) * requests / self._plain_seconds(requests, work)

    def earned(self, requests: int, tokens: int, work: Work, seconds: float) -> None:
        """Learn that a step gave so many requests so many tokens.

        Steps with rows of prompts tell nothing: their time buys more than tokens.
        """
        if requests and not work.prompt:
            plain = self._plain_seconds(requests, work)
            pace = self._paces.setdefault(requests.bit_length(), _Pace(plain, plain))
            pace.learn(plain * tokens / requests, seconds)

    def _plain_seconds(self, requests: int, work: Work) -> float:
        return self.cost.seconds(Work(requests, 0, work.context))

    # Before growing

    def plan(
        self,
        requests: list[str],
        open_: np.ndarray,  # [B] probability that the context leaves the head at a root
        context: np.ndarray,  # [B, N] joint probabilities of context nodes, 0: none
        backlog: np.ndarray,  # [B] rows without draft KV, -1: cannot be made up for
        work: Work,  # of the next step without drafts
    ) -> Plan:
        """Whom to ask the head for."""
        gain = self._gain(len(requests))
        trust = self.trust(requests)
        times = self.cost.table(work, 64 * len(requests))
        rate = self.rate(work)
        expected, nodes = best_nodes(context * trust[:, None], times, rate)

        value = np.where(backlog >= 0, open_ * trust, 0.0)
        order = np.argsort(-value, kind="stable")
        count, more = self._best_count(
            value[order], backlog[order], gain, nodes, times, rate
        )
        margin = -_MARGIN if self._asking else _MARGIN
        self._asking = count > 0 and more > margin * rate * times[nodes]
        if not self._asking:
            useful = int((value > 0).sum())
            count = min(_PROBED, useful) if gain.probes.due(useful > 0) else 0
        else:
            gain.probes.reset()
        ask = np.zeros(len(requests), dtype=bool)
        ask[order[:count]] = True
        slopes = np.diff(times)
        least = rate * float(slopes.min()) if len(slopes) else 2.0
        per_mass = rate / max(gain.net, _LEAST_NET)
        return Plan(ask, least, self.cost.level * per_mass, self.cost.node * per_mass)

    def _gain(self, requests: int) -> _HeadGain:
        """Of batches of this size; a new size starts from the nearest smaller one."""
        size = requests.bit_length()
        if size not in self._gains:
            smaller = [s for s in self._gains if s < size]
            like = self._gains[max(smaller)] if smaller else _HeadGain()
            self._gains[size] = dataclasses.replace(like, probes=Probes())
        return self._gains[size]

    def _best_count(
        self,
        value: np.ndarray,  # [B] falling
        backlog: np.ndarray,  # [B]
        gain: _HeadGain,
        nodes: int,  # verified without the head
        times: np.ndarray,
        rate: float,
    ) -> tuple[int, float]:
        """Of how many requests to ask for, and the net gain in tokens."""
        useful = int((value > 0.0).sum())
        if not useful:
            return 0, 0.0
        counts = np.arange(1, useful + 1)
        mass = value[:useful].cumsum()
        rows = counts + backlog[:useful].cumsum() / _BACKLOG_STEPS
        cost = self.cost
        fixed = cost.drafting(1, 0, 0) - cost.row + gain.levels * cost.level
        draft = fixed + rows * cost.row + counts * gain.nodes * cost.node
        where = np.minimum(nodes + mass * gain.rows, len(times) - 1)
        passes = np.interp(where, np.arange(len(times)), times)
        more = mass * gain.tokens - rate * (passes - times[nodes] + draft)
        best = int(more.argmax())
        return best + 1, float(more[best])

    # After growing

    def sizes(
        self,
        requests: list[str],
        joint: np.ndarray,  # [B, N] probabilities of the nodes, falling; 0: none
        work: Work,  # of the next step without drafts
    ) -> np.ndarray:
        """Nodes to verify of each request [B] int64: a prefix of its list."""
        weighted = joint * self.trust(requests)[:, None]
        times = self.cost.table(work, joint.size)
        _, count = best_nodes(weighted, times, self.rate(work))
        if not count:
            return np.zeros(len(requests), dtype=np.int64)
        least = np.partition(weighted, -count, axis=None)[-count]
        return ((weighted >= least) & (joint > 0.0)).sum(axis=1)

    def learn_gain(
        self,
        plan: Plan,
        open_: np.ndarray,  # [B]
        context: np.ndarray,  # [B, N] joint probabilities without the head
        joint: np.ndarray,  # [B, M] and with it
        work: Work,
        levels: int,
        nodes: int,
    ) -> None:
        """Learn what asking the head has added."""
        times, rate = self.cost.table(work, joint.size), self.rate(work)
        before, rows_before = best_nodes(context, times, rate)
        after, rows = best_nodes(joint, times, rate)
        mass = float(open_[plan.ask].sum())
        if mass > 0.0:
            tokens = after - before
            self._gain(len(open_)).learn(
                tokens=tokens / mass,
                net=(tokens - rate * (times[rows] - times[rows_before])) / mass,
                rows=(rows - rows_before) / mass,
                levels=levels,
                nodes=nodes / int(plan.ask.sum()),
            )


def best_nodes(
    joint: np.ndarray,  # [B, N] probabilities that nodes are accepted, 0: none
    times: np.ndarray,  # [n + 1] seconds of a step with so many nodes
    rate: float,  # tokens that a second is worth
) -> tuple[float, int]:
    """Expected accepted tokens, and nodes, that are worth most beyond their time.

    Expected of a node is its probability.
    """
    candidates = np.sort(joint[joint > 0.0])[::-1][: len(times) - 1]
    expected = np.concatenate([[0.0], candidates.cumsum()])
    best = int((expected - rate * times[: len(expected)]).argmax())
    return float(expected[best]), best
