"""Capture: from a model's config to its graph."""

from seqloom.capture.pipeline import Captured, capture

__all__ = ["Captured", "capture"]
