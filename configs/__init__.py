"""Descriptions that ship with the project: model architectures in `models/`, machines in `hardware/`."""
