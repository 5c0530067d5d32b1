"""What the folder of a run holds, and what it promises to whoever finds it."""
