"""From a plan to a program: readable PyTorch, its fingerprint, and the pipeline that makes them."""
