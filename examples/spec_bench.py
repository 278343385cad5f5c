# SPDX-License-Identifier: Apache-2.0
"""Make the file of prompts that our figures are about from Spec-Bench's questions.

    python examples/spec_bench.py question.jsonl prompts.jsonl

`question.jsonl` is data/spec_bench/question.jsonl of github.com/hemingkx/Spec-Bench.
Taken are the first turns of 20 questions of each of its six tasks, which were drawn by
category and length before anything was measured.
"""

import json
import re
import sys
from pathlib import Path

QUESTIONS = """\
mt_bench: 83 88 96 97 102 108 110 111 115 116 121 125 128 134 136 142 144 145 152 153
translation: 162 163 164 166 169 172 174 177 179 181 185 189 190 194 195 217 218 219 221
  229
summarization: 242 249 259 260 265 266 270 273 282 283 285 288 290 291 292 303 307 315
  318 319
qa: 323 327 332 334 344 345 347 352 357 361 364 366 372 374 377 378 380 386 392 396
math: 401 406 407 409 416 418 423 424 426 427 439 440 445 447 457 461 465 475 478 480
rag: 486 489 492 497 499 503 506 513 517 521 527 531 534 539 542 543 544 548 550 556
"""


def prompts(questions: list[str]) -> list[dict]:
    """Lines of `--prompts`, from the lines of Spec-Bench's file."""
    known = {record["question_id"]: record for record in map(json.loads, questions)}
    return [
        {
            "id": str(number),
            "task": task,
            "messages": [{"role": "user", "content": known[number]["turns"][0]}],
        }
        for task, numbers in re.findall(r"(\w+):([\d\s]+)", QUESTIONS)
        for number in map(int, numbers.split())
    ]


def main() -> None:
    """Read one file and write the other."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, output = map(Path, sys.argv[1:])
    lines = [json.dumps(one) for one in prompts(source.read_text("utf-8").splitlines())]
    output.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
