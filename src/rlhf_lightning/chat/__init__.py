"""Dialogues to ids and back: messages, how they are written as text, and the tokens that text becomes."""
