"""``quartet-train``: one command for every stage. Settings are read before anything heavy is imported."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from quartet import tracing
from quartet.settings import Settings
from trainer.errors import TOLD, DistributedError, exit_code


@dataclass(frozen=True, kw_only=True)
class Command:
    """A stage: its one line of help, and where its settings and its main function are (``module:name``).

    ``shared``: several processes, started by torchrun, may do it together.
    """

    summary: str
    settings: str
    main: str
    shared: bool = False


COMMANDS = {
    "helpdesk": Command(
        summary="write the demonstration corpus: courteous and curt answers of a help desk",
        settings="trainer.config:HelpdeskSettings",
        main="trainer.helpdesk:main",
    ),
    "check": Command(
        summary="read data as the stages would, before anything is trained",
        settings="trainer.config:CheckSettings",
        main="trainer.check:main",
    ),
    "init": Command(
        summary="make a small model with random weights and a tokenizer for your texts",
        settings="trainer.config:InitSettings",
        main="trainer.init_model:main",
    ),
    "sft": Command(
        summary="fine-tune a model on demonstrations",
        settings="trainer.config:SftSettings",
        main="trainer.sft:main",
        shared=True,
    ),
    "reward": Command(
        summary="train a reward model on preferences",
        settings="trainer.config:RewardSettings",
        main="trainer.reward_model:main",
        shared=True,
    ),
    "dpo": Command(
        summary="train a policy on preferences directly",
        settings="trainer.config:DpoSettings",
        main="trainer.dpo:main",
        shared=True,
    ),
    "kto": Command(
        summary="train a policy on answers that were judged good or bad one by one",
        settings="trainer.config:KtoSettings",
        main="trainer.kto:main",
        shared=True,
    ),
    "ppo": Command(
        summary="train a policy by PPO against the running services",
        settings="trainer.ppo_config:PPOSettings",
        main="trainer.ppo:main",
        shared=True,
    ),
    "online-dpo": Command(
        summary="train a policy by DPO on its own best and worst answers, against the running services",
        settings="trainer.online_dpo_config:OnlineDpoSettings",
        main="trainer.online_dpo:main",
    ),
    "evaluate": Command(
        summary="compare policies on held-out prompts by their rewards",
        settings="trainer.ppo_config:EvaluateSettings",
        main="trainer.evaluate:main",
    ),
    "lineage": Command(
        summary="print where a model comes from: data, settings, code and the models before it",
        settings="trainer.config:LineageSettings",
        main="trainer.lineage:main",
    ),
    "report": Command(
        summary="write the report of a run, finished or not: one HTML file, and the same figures as JSON",
        settings="trainer.report_settings:ReportSettings",
        main="trainer.report:main",
    ),
}


def main(argv: list[str] | None = None) -> None:
    """Runs the stage named first; exits with 2 and one clear message where it was given something wrong."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(_usage())
        return
    name = arguments.pop(0)
    if name not in COMMANDS:
        sys.stderr.write(f"quartet-train: there is no command {name!r}; there are {', '.join(COMMANDS)}\n")
        sys.exit(2)
    command = COMMANDS[name]
    settings_class: type[Settings] = _load(command.settings)
    with _heard_once():
        settings = settings_class.from_command_line(arguments)
    try:
        with _processes(name):
            if os.environ.get("RANK", "0") == "0":
                tracing.start("quartet-train", getattr(settings, "otlp_endpoint", None))
            planned = getattr(settings, "dry_run", False)
            run: Callable[[Any], None] = _load("trainer.dry_run:main" if planned else command.main)
            run(settings)
    except TOLD as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"quartet-train {name}: {line}\n")
        sys.exit(exit_code(error))
    except KeyboardInterrupt as error:
        sys.stderr.write(f"quartet-train {name}: interrupted\n")
        sys.exit(exit_code(error))
    finally:
        tracing.stop()


@contextlib.contextmanager
def _heard_once() -> Iterator[None]:
    """What a command says of its arguments is said by one of the processes that torchrun has started on a machine."""
    with contextlib.ExitStack() as stack:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def _processes(name: str) -> contextlib.AbstractContextManager[None]:
    """The group of processes that torchrun has started this one in; nothing where it is alone.

    Raises:
        DistributedError: this command is for one process.
    """
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return contextlib.nullcontext()
    if COMMANDS[name].shared:
        group: contextlib.AbstractContextManager[None] = _load("trainer.distributed:processes")()
        return group
    if os.environ["WORLD_SIZE"] != "1":
        shared = ", ".join(other for other, command in COMMANDS.items() if command.shared)
        raise DistributedError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and {name} runs in one process: torchrun is for {shared}"
        )
    return contextlib.nullcontext()


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: quartet-train COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "quartet-train COMMAND --help lists its options. torchrun --nproc-per-node N -m trainer COMMAND ... runs "
            + " and ".join(", ".join(name for name, command in COMMANDS.items() if command.shared).rsplit(", ", 1)),
            "in N processes.",
            "",
        ]
    )


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    main()
