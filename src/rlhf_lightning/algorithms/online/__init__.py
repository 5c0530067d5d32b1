"""What algorithms share that learn from scores of their policy's own answers: PPO, RLOO, GRPO."""
