"""What the tests of loading share."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import make_transformer


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """A text-to-video transformer whose widths are whole blocks of every quantised format."""
    torch.manual_seed(1)
    made = make_transformer("wan2.1-t2v", attention_head_dim=128, ffn_dim=512)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return made.requires_grad_(False)
