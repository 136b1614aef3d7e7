"""Data: corpora of text, the tokenizer, packing into rows of equal length, and loading them in a resumable order."""
