"""Seconds and bytes of a machine that need not be present: hardware descriptions, compute, communication and MFU."""
