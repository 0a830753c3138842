"""What all tests share: devices, seeds, and memory that holds NaN before it is written."""

import pytest
import torch

from ferroflash import _ops


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        cuda = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
        metafunc.parametrize("device", ["cpu", cuda])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory of torch's is NaN, so that an element which no kernel writes does not go unseen.

    It is where algorithms are to be deterministic; those of ferroflash are to be so only in the tests of that.
    """
    monkeypatch.setattr(_ops, "are_deterministic_algorithms_enabled", lambda: False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return "cuda"
