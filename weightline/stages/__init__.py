"""The rank program of the stages (sft, dpo, grpo) that accelerate launches, and its inputs: recipe and job."""
