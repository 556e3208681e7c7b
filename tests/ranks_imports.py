"""What the process that ranks are forked from imports, once: all that the rank programs of the tests need.

Nothing here starts a thread or opens a connection: a forked rank would have neither.
"""

import gc

import accelerate
import datasets
import deepspeed.module_inject.auto_ep_layer
import deepspeed.ops.op_builder.all_ops
import deepspeed.runtime.superoffload.superoffload_stage3
import deepspeed.runtime.zero.muon.muon_optimizer
import numpy as np
import peft
import torch.distributed.fsdp
import torch.distributed.tensor
import transformers.models.qwen3.modeling_qwen3
import transformers.models.qwen3_moe.modeling_qwen3_moe

import weightline.stages.training
import weightline.trainer.callback
from weightline.codec.digest import tensor_digest
from weightline.codec.kernels import geometric, grouping, lanes, scan
from weightline.types import Segment, TensorSpec

__all__ = [
    "accelerate", "datasets", "deepspeed", "geometric", "grouping", "lanes", "peft", "scan", "torch", "transformers",
    "weightline",
]  # fmt: skip

# Numba imports half of itself when it first loads a compiled function.
tensor_digest(Segment(TensorSpec("x", "BF16", (1,)), 0, 1), np.zeros(1, np.uint16))
# A collection in a rank would write to, and so copy, every page of what was imported.
gc.collect()
gc.freeze()
