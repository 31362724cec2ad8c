"""What every test shares: a seed, two threads in all, and the third-party inputs that lie beside the repository."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    threads = int(os.environ.get("OMP_NUM_THREADS", "2"))
    torch.set_num_threads(max(1, threads // workers))  # more than cores make tiny products a thousand times slower


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of third-party inputs; a user's clone has none, our own checks must."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        reason = f"needs the third-party inputs in {path.name}/ beside the repository"
        if os.environ.get("DELTAW_REQUIRE_SHARED") == "1":
            pytest.fail(f"DELTAW_REQUIRE_SHARED=1, but this test {reason}")
        pytest.skip(reason)
    return path
