# SPDX-License-Identifier: Apache-2.0
"""What people see of a token."""

from collections.abc import Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

__all__ = ["TokenTexts"]

# What bytes that are no character yet, or never will be, are decoded to.
_BROKEN = "\ufffd"
# Tokens that a character in UTF-8 can take.
_LONGEST_CHARACTER = 4
_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}


class TokenTexts:
    """Texts of tokens, spaces in front and special tokens included."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Alone, the tokens of some tokenizers lose the space in front of them.
        self._before = tokenizer("a", add_special_tokens=False).input_ids[-1:]

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            [*self._before, *ids],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        return str(text)

    def _after(self, ids: Sequence[int]) -> str:
        return self._decode(ids).removeprefix(self._decode([]))

    def of(self, token: int) -> str:
        """The token's text; its bytes, as <F0 9F>, if it is part of a character."""
        text = self._after([token])
        if _BROKEN not in text:
            return text
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        if any(character not in _BYTES for character in piece):
            return piece  # such as <0xF0>, where bytes have tokens of their own
        return "<" + " ".join(f"{_BYTES[character]:02X}" for character in piece) + ">"

    def added(self, tokens: Sequence[int]) -> list[str]:
        """What each token of a text adds to it.

        A character whose bytes are several tokens is added by the last of them; bytes
        that never become one are shown as such.
        """
        texts: list[str] = []
        waiting: list[int] = []
        for token in tokens:
            waiting.append(token)
            while waiting:
                text = self._after(waiting)
                if _BROKEN not in text:
                    texts += [""] * (len(waiting) - 1) + [text]
                    waiting.clear()
                elif text.endswith(_BROKEN) and len(waiting) < _LONGEST_CHARACTER:
                    break
                else:
                    texts.append(self.of(waiting.pop(0)))
        return texts + [self.of(token) for token in waiting]
