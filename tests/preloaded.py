"""What the server of ``processes`` imports before it forks any."""

import trainer.dpo
import trainer.ppo
import trainer.report
import trainer.reward_model
import trainer.sft

__all__ = ["trainer"]
