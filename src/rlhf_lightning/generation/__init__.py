"""Answering prompts: what an engine is, and ours, in plain PyTorch."""
