"""The runtime: loads an emitted program and trains it."""
