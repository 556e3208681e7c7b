"""Draws the tokens of transformers' `generate` and keeps their logprobs: every sample by a seed of its own.

A sample depends on its prompt, its seed and the weights, and not on the other rows of its batch. The logprobs are those
of the distribution that was drawn from: after temperature and top_p, by a log-softmax in float32. They take the memory
of one step's logits, however long the samples become.

Legend: B rows of a batch, L tokens so far, V tokens of the vocabulary, T new tokens, K most likely tokens of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LogitsProcessor

#: Below it sampling is greedy, as in vLLM: the division would overflow.
_LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True)
class Draw:
    """The seed of one sample: the request's for its prompt, and the sample's number among those of the prompt."""

    seed: int
    number: int

    def uniforms(self, num_tokens: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """Returns one number in [0, 1) a token. The same on every machine."""
        key = np.array([self.seed, self.number], np.uint64)
        return np.random.Generator(np.random.Philox(key=key)).random(num_tokens, np.float32)


class Sampler(LogitsProcessor):
    """A processor that decides the token itself: it leaves one token in each row, which a greedy `generate` takes.

    `num_top` is the number of most likely tokens whose logprobs are kept for every step, None for no logprobs at all.
    """

    def __init__(
        self, temperature: float, top_p: float, draws: Sequence[Draw], max_tokens: int, num_top: int | None
    ) -> None:
        is_greedy = temperature < _LEAST_TEMPERATURE
        self._temperature, self._top_p = (1.0, 1.0) if is_greedy else (temperature, top_p)
        self._uniforms_BT = (
            None if is_greedy else torch.from_numpy(np.stack([draw.uniforms(max_tokens) for draw in draws]))
        )
        self._num_top = num_top
        self._step = 0
        self._logprobs_TB: list[torch.Tensor] = []
        self._top_TBK: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids_BL: torch.LongTensor, scores_BV: torch.FloatTensor) -> torch.FloatTensor:
        """Returns scores in which the drawn token of every row has 0 and every other token minus infinity."""
        logprobs_BV = self._processed(scores_BV.float()).log_softmax(-1)
        tokens_B = self._drawn(logprobs_BV)
        if self._num_top is not None:
            self._logprobs_TB.append(logprobs_BV.gather(1, tokens_B[:, None])[:, 0])
        if self._num_top:
            values_BK, ids_BK = logprobs_BV.topk(min(self._num_top, logprobs_BV.shape[1]))
            self._top_TBK.append((ids_BK, values_BK))
        self._step += 1
        return torch.full_like(scores_BV, -torch.inf).scatter_(1, tokens_B[:, None], 0.0)  # type: ignore[return-value]

    def logprobs(self) -> list[list[float]]:
        """Returns the logprob of every drawn token, by row. Rows of finished samples go on: the caller cuts them."""
        return torch.stack(self._logprobs_TB, 1).tolist() if self._logprobs_TB else []

    def top_logprobs(self) -> list[list[dict[int, float]]]:
        """Returns the most likely tokens of every step with their logprobs, by row, most likely first.

        Tokens that top_p left out are not among them.
        """
        if not self._top_TBK:
            return []
        steps = [(ids_BK.tolist(), values_BK.tolist()) for ids_BK, values_BK in self._top_TBK]
        num_rows = len(steps[0][0])
        return [[_finite(ids[row], values[row]) for ids, values in steps] for row in range(num_rows)]

    def _processed(self, scores_BV: torch.Tensor) -> torch.Tensor:
        """Returns the scores after temperature and top_p: of the rest, minus infinity."""
        scores_BV = scores_BV / self._temperature
        if self._top_p >= 1:
            return scores_BV
        sorted_BV, order_BV = scores_BV.sort(-1, descending=True)
        probs_BV = sorted_BV.softmax(-1)
        # A token stays when those before it do not reach top_p yet. The first one always does.
        is_left_out_BV = probs_BV.cumsum(-1) - probs_BV >= self._top_p
        is_left_out_BV[:, 0] = False
        return scores_BV.masked_fill(is_left_out_BV.scatter(1, order_BV, is_left_out_BV), -torch.inf)

    def _drawn(self, logprobs_BV: torch.Tensor) -> torch.Tensor:
        """Returns a token a row, by inversion of the distribution."""
        if self._uniforms_BT is None:
            return logprobs_BV.argmax(-1)
        # In float64, so that the sum over a large vocabulary keeps the small probabilities. Metal has no float64.
        dtype = torch.float32 if logprobs_BV.device.type == "mps" else torch.float64
        sums_BV = logprobs_BV.to(dtype).exp().cumsum(-1)
        uniforms_B = self._uniforms_BT[:, self._step].to(logprobs_BV.device, dtype)
        tokens_B1 = torch.searchsorted(sums_BV, uniforms_B[:, None] * sums_BV[:, -1:], right=True)
        return tokens_B1[:, 0].clamp_(max=logprobs_BV.shape[1] - 1)


def _finite(ids_K: Sequence[int], values_K: Sequence[float]) -> dict[int, float]:
    return {token: value for token, value in zip(ids_K, values_K, strict=True) if value > -torch.inf}
