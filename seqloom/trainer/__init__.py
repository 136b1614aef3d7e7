"""The trainer: from flags to a finished run. It calls compile, runtime, data and checkpoint; it computes nothing itself."""
