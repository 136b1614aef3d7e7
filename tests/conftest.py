"""The order of the test files: those that take longest come first, so that no worker is left alone with one of them in the end.

Property tests have no limit of time: how long drawing an example takes tells of the machine, not of the code.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

HEAVY = (
    "test_parity_chosen.py",
    "test_trainer_faults.py",
    "test_parity_matrix.py",
    "test_train_entry.py",
    "test_docs_commands.py",
    "test_plan_problem.py",
    "test_plan_sense.py",
    "test_context_parallel.py",
    "test_magi_attention.py",
    "test_plan_solver.py",
    "test_parity_training.py",
    "test_capture.py",
    "test_pipeline.py",
    "test_trainer_loop.py",
    "test_checkpoint_reshard.py",
    "test_determinism.py",
    "test_gpu_benchmarks.py",
)


def pytest_collection_modifyitems(items: list) -> None:
    """Heavy files first, the others as they are."""
    places = {name: place for place, name in enumerate(HEAVY)}
    items.sort(key=lambda item: places.get(item.path.name, len(HEAVY)))
