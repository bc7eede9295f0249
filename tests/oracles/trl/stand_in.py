"""What stands in for TRL's trainers."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch


def trainer_of_trl(**settings: Any) -> SimpleNamespace:
    """What the methods read of their trainer, as in evaluation on one process."""
    return SimpleNamespace(
        **{
            "model": SimpleNamespace(training=False),
            "accelerator": SimpleNamespace(
                device=torch.device("cpu"),
                gather=lambda x: x,
                gather_for_metrics=lambda x: x,
                reduce=lambda x, reduction: x,
                num_processes=1,
            ),
            "args": SimpleNamespace(),
            "aux_loss_enabled": False,
            "_metrics": {"eval": defaultdict(list)},
            "_total_train_tokens": 0,
        }
        | settings
    )
