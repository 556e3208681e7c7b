"""The rank programs that accelerate launches (sft, dpo, grpo), and what describes them: recipe, job, launch."""
