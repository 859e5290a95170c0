"""These tests run in a process of their own, started by ../test_interpreter.py: Triton decides at import whether its
kernels are compiled or interpreted. Elsewhere the folder is empty."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    import torch

    @pytest.fixture(autouse=True)
    def _triton_backend_and_poisoned_memory(monkeypatch):
        """Every operator runs its Triton kernels, and torch.empty holds NaN (or the largest integer)."""
        monkeypatch.setenv("FISHERTUNE_BACKEND", "triton")
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)

else:
    collect_ignore_glob = ["test_*.py"]
