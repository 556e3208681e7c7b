"""Says how to turn a folder that holds weights in another format than safetensors into a checkpoint folder."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

#: Patterns of the names of files that a training wrote with torch for itself, and not for a model.
TRAINING_STATE = ("training_args.*", "optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*")

#: Patterns of the names of weights that transformers may load and save again as safetensors.
CONVERTIBLE_WEIGHTS = ("*.bin", "*.pth", "*.pt", "*.ckpt", "*.h5", "*.msgpack")

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
    *((pattern, _SAVE_AGAIN) for pattern in CONVERTIBLE_WEIGHTS),
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
    found = sorted(path.name for path in folder.iterdir())
    names = [name for name in found if not any(fnmatchcase(name, pattern) for pattern in TRAINING_STATE)]
    for pattern, remedy in _REMEDIES:
        name = next((name for name in names if fnmatchcase(name, pattern)), None)
        if name is not None:
            return remedy.format(folder=folder, name=name)
    return "name a checkpoint folder"
