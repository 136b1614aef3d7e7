"""seqloom: compile a language model into a distributed training program, then run it."""

__version__ = "0.1.0"
