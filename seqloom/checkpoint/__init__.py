"""Checkpoints: write, read under any plan, merge, exchange with Hugging Face. docs/checkpoints.md describes the format.

Role in the pipeline: the trainer saves and loads tensors by name through `write.save_checkpoint` and `read.load_checkpoint`; the merger
streams a checkpoint into one file or a Hugging Face folder through `merge`. Everything on disk is safetensors or JSON.
"""

from seqloom.checkpoint.huggingface import HFReader, write_hf_folder
from seqloom.checkpoint.read import find_checkpoint, load_checkpoint
from seqloom.checkpoint.write import save_checkpoint

__all__ = ["HFReader", "find_checkpoint", "load_checkpoint", "save_checkpoint", "write_hf_folder"]
