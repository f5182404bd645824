import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
