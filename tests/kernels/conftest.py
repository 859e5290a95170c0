"""What the kernel tests share: each check runs once per CPU backend, over memory that holds NaN until it is written."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("project", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("project")


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Forces one backend; ``torch.empty`` gives NaN meanwhile, so a kernel that leaves gaps is seen."""
    if request.param == "native":
        from fishertune_kernels import native

        if not native.available():
            pytest.skip(native.why_not())
    monkeypatch.setenv("FISHERTUNE_BACKEND", request.param)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
