"""Lets a model with bf16 weights compute in fp32, on a CPU: for training and for the embedded engine alike.

A CPU without bf16 instructions multiplies bf16 matrices 30 to 100 times slower than fp32 ones (measured on AVX2:
0.8-3 against 70-87 Gflop/s). Every bf16 value is an fp32 value, so reading the weights as fp32 is exact: their bits
stay as they are, and only activations become more precise. Where trainer and replica both do it, their logprobs agree.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class Float32Linear(nn.Linear):
    """A linear layer whose stored weight may be narrower than fp32. Gradients arrive in the weight's own dtype."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return functional.linear(x.float(), self.weight.float(), bias)


class Float32Embedding(nn.Embedding):
    """An embedding that returns fp32 rows, so that all activations after it are fp32."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).float()


def compute_in_float32(model: nn.Module) -> bool:
    """Makes `model` compute in fp32, in place. Parameters, names and hooks stay unchanged. Safe to repeat.

    Returns False, and does not change the model, when it has parameters in modules other than linear layers, embeddings
    and RMS norms, which are known to accept fp32 activations with bf16 weights.
    """
    owners = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    if not all(type(owner) in _COUNTERPARTS or _is_rms_norm(owner) for owner in owners):
        return False
    for owner in owners:
        owner.__class__ = _COUNTERPARTS.get(type(owner), type(owner))
    return True


_COUNTERPARTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Float32Linear,
    nn.Embedding: Float32Embedding,
    Float32Linear: Float32Linear,
    Float32Embedding: Float32Embedding,
}


def _is_rms_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm")
