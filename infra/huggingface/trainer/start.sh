#!/bin/sh
# What the Job runs: one rank a GPU under ZeRO-3. docs/huggingface.md has the command that starts it.
set -eu
pip install --quiet "$(ls /dist/weightline-*.whl)[train]"
config() { python -c "from weightline.launch.command import accelerate_config; print(accelerate_config('$1'))"; }
exec accelerate launch --config_file "$(config zero3_gpu.yaml)" --deepspeed_config_file "$(config ds_zero3.json)" \
    --num_processes "$(nvidia-smi --list-gpus | wc -l)" /trainer/train.py
