"""Proximal policy optimisation against a reward, with a KL penalty to the SFT model."""
