"""A small GPT that learns Python's own sources: an example to copy, and what the quick start runs.

`python -m forgather_ckpt.demo` trains; `.compare` compares two runs, bit for bit; `.damage` spoils a checkpoint.
"""
