"""The Triton kernels in Triton's own interpreter: what they compute, not how fast."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deltaw.kernels import twins


def test_they_are_their_plain_twins() -> None:
    pytest.importorskip("triton", reason="Triton is for Linux alone", exc_type=ImportError)
    here = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, here / "in_triton.py"], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0 and "all kernels are their twins" in done.stdout, done.stderr[-3000:]
    assert "the Triton kernel ('product', 'silu'" in done.stderr and done.stderr.count("is not used") == 2


def test_nothing_is_asked_of_them_on_a_cpu() -> None:
    assert not twins.usable(torch.zeros(1))
