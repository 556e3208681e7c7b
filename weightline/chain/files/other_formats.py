"""Says how to turn a folder that holds weights in another format than safetensors into a checkpoint folder."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

#: Beginnings of names of files that torch wrote for a training, not for a model.
_TRAINING_STATE = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states")

_SAVE_AGAIN = (
    "{name} is weights in another format; convert them with "
    "AutoModelForCausalLM.from_pretrained('{folder}', dtype='auto').save_pretrained('NEW'), then name NEW"
)

#: Pattern of a name in the folder, and the remedy. The first that fits counts.
_REMEDIES = (
    (
        "adapter_model.bin",
        "{name} is an adapter in another format; convert it with safetensors.torch.save_file("
        "torch.load('{folder}/{name}', weights_only=True), '{folder}/adapter_model.safetensors')",
    ),
    ("*.bin", _SAVE_AGAIN),
    ("*.pth", _SAVE_AGAIN),
    ("*.pt", _SAVE_AGAIN),
    ("*.ckpt", _SAVE_AGAIN),
    ("*.h5", _SAVE_AGAIN),
    ("*.msgpack", _SAVE_AGAIN),
    ("*.gguf", "{name} was made from a checkpoint in safetensors; name that one"),
    (
        "zero_to_fp32.py",
        "it holds shards of DeepSpeed; join them with "
        "'python {folder}/zero_to_fp32.py {folder} NEW --safe_serialization', then name NEW",
    ),
    (
        "pytorch_model_fsdp_*",
        "it holds shards of FSDP; join them with 'accelerate merge-weights {folder}/{name} NEW', then name NEW",
    ),
    ("checkpoint-*", "name one of the checkpoints in it, such as {folder}/{name}"),
)


def remedy_for(folder: Path) -> str:
    """Returns what to do about a folder without safetensors, as the rest of a sentence."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith(_TRAINING_STATE))
    for pattern, remedy in _REMEDIES:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if found:
            return remedy.format(folder=folder, name=found[0])
    return "name a checkpoint folder"
