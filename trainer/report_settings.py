"""Settings of ``quartet-train report``, apart from the report itself: reading them imports no plotting."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field
from pydantic_settings import CliPositionalArg

from quartet.settings import PositiveFloat, Settings

# KL beyond which a policy has left the neighbourhood in which its reward model can be trusted, nats a response.
KL_BUDGET = 20.0


class ReportSettings(Settings):
    """Writes report.html and report.json into a run's folder, be the run finished or not."""

    command: ClassVar[str] = "quartet-train report"

    run_dir: CliPositionalArg[Path] = Field(description="folder of the run")
    kl_budget: PositiveFloat | None = Field(
        None, description="nats of KL per response above which there is an alarm; default the run's own --alarm-kl"
    )
