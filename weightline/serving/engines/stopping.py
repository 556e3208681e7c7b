"""Stop strings: end a row of a batch at the first of some texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria

#: Tokens that may stand for no character (special tokens, parts of a character) beside those of the stop string itself.
_SLACK_TOKENS = 8


def cut_at_stop(text: str, stop: Sequence[str]) -> str | None:
    """The text before the first stop string, or None when there is none in it."""
    found = [at for one in stop if (at := text.find(one)) >= 0]
    return text[: min(found)] if found else None


class StopStrings(StoppingCriteria):
    """Marks the rows whose new text contains a stop string. A token is at least a byte, so only the tail is decoded."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt_width: int) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._first = prompt_width
        self._window = max(len(one.encode()) for one in stop) + _SLACK_TOKENS

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        new = input_ids[:, max(self._first, input_ids.shape[1] - self._window) :]
        texts = self._tokenizer.batch_decode(new, skip_special_tokens=True)
        is_done = [cut_at_stop(text, self._stop) is not None for text in texts]
        return torch.tensor(is_done, dtype=torch.bool, device=input_ids.device)
