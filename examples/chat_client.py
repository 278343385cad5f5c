# SPDX-License-Identifier: Apache-2.0
"""Stream two chats at the same time through the ordinary ``openai`` client.

    python examples/chat_client.py [http://localhost:8000/v1]

Nothing here knows about speculation: any OpenAI client works unchanged.
"""

import asyncio
import sys

from openai import AsyncOpenAI

QUESTIONS = {
    "France": "What is the capital of France? Explain in two sentences.",
    "tea": "Explain in three sentences how to make a good cup of tea.",
}


async def chat(client: AsyncOpenAI, model: str, name: str, question: str) -> str:
    """Stream one answer, printing each piece as it comes."""
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0.0,
        max_tokens=100,
        stream=True,
    )
    pieces = []
    async for event in stream:
        if piece := event.choices[0].delta.content:
            pieces.append(piece)
            print(f"{name:>8} | {piece!r}", flush=True)
    return "".join(pieces)


async def chat_about_all(base_url: str) -> dict[str, str]:
    """Ask all questions at once; their answers."""
    async with AsyncOpenAI(base_url=base_url, api_key="unused") as client:
        model = (await client.models.list()).data[0].id
        answers = await asyncio.gather(
            *(chat(client, model, *question) for question in QUESTIONS.items())
        )
    return dict(zip(QUESTIONS, answers))


def main() -> None:
    """Ask, and print the whole answers."""
    base_url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1"
    answers = asyncio.run(chat_about_all(base_url))
    for name, answer in answers.items():
        print(f"\n{QUESTIONS[name]}\n{answer}")


if __name__ == "__main__":
    main()
