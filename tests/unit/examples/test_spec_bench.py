# SPDX-License-Identifier: Apache-2.0
"""Which of Spec-Bench's questions our figures are about."""

import json
from collections import Counter

from spec_bench import prompts


def test_first_turns_of_twenty_questions_of_each_task() -> None:
    questions = [
        json.dumps(
            {"question_id": number, "turns": [f"question {number}", "and then?"]}
        )
        for number in range(81, 561)  # as Spec-Bench numbers them, 80 of each task
    ]
    records = prompts(questions)
    assert set(Counter(record["task"] for record in records).values()) == {20}
    assert len({record["id"] for record in records}) == 120
    tasks = ["mt_bench", "translation", "summarization", "qa", "math", "rag"]
    for record in records:
        assert record["task"] == tasks[(int(record["id"]) - 81) // 80]
        (message,) = record["messages"]
        assert message == {"role": "user", "content": f"question {record['id']}"}
