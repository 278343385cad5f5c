# SPDX-License-Identifier: Apache-2.0
"""Figures from rounds whose results are known."""

from dataclasses import replace

import pytest

from vllm_clover2.bench.figures import (
    MeasuredRequest,
    MeasuredRound,
    Steps,
    accepted_by_step,
    first_difference,
    summarise,
)

TASKS = ["qa", "code", "code"]


def request(
    content: str, first: float, decode: float, accepted: list[int] | None = None
) -> MeasuredRequest:
    steps = Steps.of(accepted_by_step(accepted or [], len(content)))
    return MeasuredRequest(content, len(content), first, decode, steps)


def measured(
    method: str, number: int, seconds: float, requests: list[MeasuredRequest], load=1
) -> MeasuredRound:
    steps = Steps.total([one.steps for one in requests if one.steps is not None])
    return MeasuredRound(method, load, number, seconds, requests, steps)


def plain_requests() -> list[MeasuredRequest]:
    return [request("aaaaa", 1.0, 4.0), request("bbb", 1.0, 2.0), request("c", 1.0, 0)]


def drafted_requests() -> list[MeasuredRequest]:
    return [
        request("aaaaa", 1.0, 1.0, [3]),  # one step of four tokens
        request("bbx", 1.0, 2.0, [0, 0]),
        request("c", 1.0, 0.0),
    ]


def two_rounds(load: int = 1) -> list[MeasuredRound]:
    return [
        measured("none", 1, 9.0, plain_requests(), load),
        measured("clover2", 1, 6.0, drafted_requests(), load),
        measured("none", 2, 18.0, plain_requests(), load),  # a busy moment
        measured("clover2", 2, 9.0, drafted_requests(), load),
    ]


@pytest.mark.parametrize(
    ("accepted", "num_tokens", "expected"),
    [
        ([2, 0, 1], 7, [2, 0, 1]),
        ([], 4, [0, 0, 0]),  # nothing was drafted
        ([1], 5, [1, 0, 0]),
        ([5], 4, [3]),  # the answer ends inside the last step's path
        ([2], 1, [0]),
    ],
    ids=["whole", "plain", "some steps without a draft", "cut", "no decoding"],
)
def test_steps_are_cut_and_completed(accepted, num_tokens, expected):
    assert accepted_by_step(accepted, num_tokens) == expected


def test_steps_reach_every_depth_up_to_their_length():
    assert Steps.of([0, 2, 1, 2]) == Steps(4, [3, 2])
    assert Steps.total([Steps(4, [3, 2]), Steps(1, [1]), Steps(0, [])]) == Steps(
        5, [4, 2]
    )


def test_ratios_are_of_rounds_of_one_number():
    (result,) = summarise(TASKS, two_rounds())
    figures = result["methods"]["clover2"]
    # Nine tokens by 6 and 9 seconds, against 9 and 18.
    assert figures["tokens_per_second_by_round"] == [1.5, 1.0]
    assert figures["tokens_per_second"] == 1.25
    assert figures["speedup"] == {"median": 1.75, "min": 1.5, "max": 2.0}
    assert result["methods"]["none"]["speedup"] == {"median": 1, "min": 1, "max": 1}


def test_one_at_a_time_decode_speed_is_summed_over_requests():
    figures = summarise(TASKS, two_rounds())[0]["methods"]["clover2"]
    assert figures["decode_tokens_per_second"] == 2.0  # six tokens in 3 seconds
    assert figures["decode_speedup"]["median"] == 2.0


def test_several_at_a_time_decode_speed_is_the_median_request():
    (result,) = summarise(TASKS, two_rounds(load=3))
    assert result["concurrency"] == 3
    figures = result["methods"]["clover2"]
    assert figures["decode_tokens_per_second"] == 2.5  # of 4 and 1; "c" has no speed


def test_decoding_gains_tokens_per_step_by_step_cost():
    figures = summarise(TASKS, two_rounds())[0]["methods"]["clover2"]
    assert figures["tokens_per_step"] == 2.0  # six tokens in three steps
    assert figures["step_seconds"] == 1.0
    assert figures["step_cost"]["median"] == 1.0
    gain = figures["tokens_per_step"] / figures["step_cost"]["median"]
    assert gain == figures["decode_speedup"]["median"]


def test_acceptance_is_the_share_of_steps_that_reach_a_depth():
    figures = summarise(TASKS, two_rounds())[0]["methods"]
    assert figures["clover2"]["acceptance_by_depth"] == [pytest.approx(1 / 3)] * 3
    assert figures["none"]["acceptance_by_depth"] == []
    assert figures["none"]["tokens_per_step"] == 1.0


def test_tasks_have_figures_of_their_own_and_equal_weight():
    figures = summarise(TASKS, two_rounds())[0]["methods"]["clover2"]
    qa, code = figures["by_task"]["qa"], figures["by_task"]["code"]
    assert (qa["prompts"], code["prompts"]) == (1, 2)
    assert (qa["tokens_per_step"], code["tokens_per_step"]) == (4.0, 1.0)
    assert qa["request_speedup"]["median"] == 2.5  # 5 seconds against 2
    assert code["request_speedup"]["median"] == 1.0
    assert figures["mean_over_tasks"]["request_speedup"] == 1.75
    assert figures["request_speedup"]["median"] == 1.5  # 9 seconds against 6


def test_time_to_the_first_token_is_the_median_request():
    rounds = two_rounds()[:2]
    slow = replace(rounds[1].requests[0], first_token_seconds=7.0)
    rounds[1] = replace(rounds[1], requests=[slow, *rounds[1].requests[1:]])
    figures = summarise(TASKS, rounds)[0]["methods"]["clover2"]
    assert figures["first_token_seconds"] == 1.0


def test_identical_means_in_every_round_as_plain_in_this_round():
    rounds = two_rounds()
    methods = summarise(TASKS, rounds)[0]["methods"]
    assert (methods["clover2"]["identical"], methods["none"]["identical"]) == (2, 3)
    # Both deviate in the second round, in the same way.
    for place in (2, 3):
        changed = replace(rounds[place].requests[0], content="other")
        kept = rounds[place].requests[1:]
        rounds[place] = replace(rounds[place], requests=[changed, *kept])
    methods = summarise(TASKS, rounds)[0]["methods"]
    assert (methods["clover2"]["identical"], methods["none"]["identical"]) == (2, 2)


def test_an_interrupted_round_is_left_out():
    methods = summarise(TASKS, two_rounds()[:3])[0]["methods"]
    assert methods["clover2"]["speedup"] == {"median": 1.5, "min": 1.5, "max": 1.5}
    assert len(methods["none"]["tokens_per_second_by_round"]) == 2


def test_answers_without_decoding_have_no_speed():
    single = [request("a", 1.0, 0.0)] * 3
    rounds = [measured("none", 1, 3.0, single), measured("ngram", 1, 3.0, single)]
    figures = summarise(TASKS, rounds)[0]["methods"]["ngram"]
    assert figures["speedup"]["median"] == 1.0
    assert figures["decode_speedup"] is None
    assert figures["tokens_per_step"] is None
    assert "decode_speedup" not in figures["mean_over_tasks"]


def test_loads_are_kept_apart_and_in_order():
    results = summarise(TASKS, two_rounds(load=8) + two_rounds(load=2))
    assert [result["concurrency"] for result in results] == [2, 8]


def test_requests_in_flight_are_counted_over_the_round():
    figures = summarise(TASKS, two_rounds())[0]["methods"]["none"]
    # Nine seconds of requests in 9, then in 18.
    assert figures["requests_in_flight"] == 0.75


@pytest.mark.parametrize(
    ("own", "plain", "position"),
    [([1, 2], [1, 2], None), ([1, 3], [1, 2], 1), ([1], [1, 2], 1), ("ab", "b", 0)],
)
def test_first_difference(own, plain, position):
    assert first_difference(own, plain) == position
