"""What of a run against services is not the algorithm: folder, models, prompts, services, checkpoints."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from quartet import tracing
from quartet.client import NotReadyError, QuartetError, UnavailableError, request_ids
from quartet.fingerprint import safetensors_fingerprint
from quartet.model_folder import ModelFolderError, find_model
from trainer.adapter_weights import AdapterWeights
from trainer.ahead import RolloutsAhead, pack, unpack
from trainer.batching import RowStream
from trainer.checkpoint import checkpoint_path, latest_checkpoint, load_checkpoint, save_checkpoint
from trainer.critic import Critic
from trainer.data import PromptRow, load_prompts, shared_groups, split_held_out
from trainer.distributed import is_first, led
from trainer.encoding import Encoder
from trainer.errors import CheckpointError, DataError, ModelError, ServicesError
from trainer.evaluate import ask, different_prompts, longest_prompt, make_tasks
from trainer.judging import JudgeService, open_judge
from trainer.lineage import Origin, origin
from trainer.loop_thread import LoopThread
from trainer.lora import Adapter, adapter_of
from trainer.models import load_policy, load_tokenizer, longest_sequence
from trainer.monitoring import PolicyMonitor
from trainer.optimisation import choose_device
from trainer.ppo_config import PPOSettings, RunSettings
from trainer.ppo_evaluation import AFTER, BEFORE, Evaluations, best_folder, keep_only_best
from trainer.publishing import Published
from trainer.rollout import PromptTask, Rollout, ServiceInfo, Services, prompt_seed
from trainer.runs import MODEL_FOLDER, SETTINGS_FILE, ids_digest, open_output, require_same_data, write_json
from trainer.saving import ADAPTER_FOLDER, save_adapter, save_model
from trainer.scaling import prepare
from trainer.stop_rule import StopRule

_NOT_IN_IDS = re.compile(r"[^A-Za-z0-9_-]")

SettingsT = TypeVar("SettingsT", bound=RunSettings)


class Stateful(Protocol):
    """What changes from step to step, as JSON values."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a checkpoint keeps of the learner. ``states``: controllers and statistics, by name."""

    modules: Mapping[str, nn.Module]
    optimisers: Mapping[str, Optimizer]
    states: Mapping[str, Stateful]


class PPORun(Generic[SettingsT]):
    """One run in one folder, from its settings to its report. Use it as a context manager.

    ``step`` counts the steps done, ``episodes`` the responses learned from.

    Of several processes the first alone talks to the services: a rollout is asked for once, whatever their number, in
    the order and with the seeds of one process, and who else would publish weights? The others get what it got
    (``distributed.led``), learn from their share of it, and know all that follows from it as well as the first.
    """

    def __init__(self, settings: SettingsT, loop: LoopThread) -> None:
        """Waits for the services, whose calls run in ``loop``.

        Raises:
            TrainerError, ModelFolderError: a file, a folder or a setting can't be used; the message says what.
        """
        self.settings = settings
        self.step = 0
        self.episodes = 0
        self._adapter_name = ""  # Of the adapter published last, where one is trained.
        self._loop = loop
        self.stop_rule = StopRule(
            gold=settings.gold,
            when_worse=settings.stop_when_worse,
            above_kl=settings.stop_above_kl,
            below_unique=settings.stop_below_unique,
        )
        self._ahead = RolloutsAhead(self._begin, steps=settings.steps, staleness=settings.staleness)
        self._started_s = time.monotonic()
        self._checkpoint = open_output(
            settings.output, resume=settings.resume, decisive=settings.decisive, leftovers=(BEFORE, AFTER)
        )
        self.resumed_step = None if self._checkpoint is None else self._checkpoint.step
        self._saved_step = self.resumed_step or 0
        # What is quick to refuse comes before what takes long to load, and both before waiting for services.
        folder = find_model(settings.model)
        rows, held_out = _read_prompts(settings)
        self.device = choose_device()
        self.tokenizer = load_tokenizer(folder)
        torch.manual_seed(settings.seed)  # Nothing is drawn from it while dropout is off; checkpoints keep its state.
        self.policy = prepare(load_policy(folder, self.tokenizer), settings, seed=settings.seed)
        self._open_services()
        self._judge: JudgeService | None = None
        try:
            self._info = self._connect()
            self._open_judge()
            # Scores of several services come normalised, each by its own statistics.
            self.normalisation = None if settings.rewards else self._info.reward.normalised_by
            self._judges = _judges(self._info, self._judge)
            self._check_judges(folder)
            self.critic: Critic | None = None
            if isinstance(settings, PPOSettings) and settings.has_critic:
                self.critic = self._load_critic(folder, settings)
            if self.critic is not None:
                prepare(self.critic.body, settings, seed=settings.seed)
            self._encode(rows, held_out)
            self._origin = self._trace_origin(_write_settings(settings, self._info, self._judge))
            self.evaluations = Evaluations(
                settings,
                self.tokenizer,
                self._watch_policy(),
                self.stop_rule,
                ask=self._ask,
                keep=self._keep_model,
            )
        except BaseException:
            self.close()
            raise
        self._stream = RowStream(len(self._tasks), seed=settings.seed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._ahead.cancel()
        if is_first():
            self._loop.run(self._services.__aexit__())
        if self._judge is not None:
            self._loop.run(self._judge.close())

    @property
    def newest_checkpoint(self) -> Path:
        """Folder of the newest checkpoint, or of the run when there is none."""
        return latest_checkpoint(self.settings.output) or self.settings.output

    # Services ------------------------------------------------------------------------------------------------------

    @led
    def _open_services(self) -> None:
        self._services = self._loop.run(_open_services(self.settings, self.tokenizer))

    @led
    def _connect(self) -> ServiceInfo:
        settings = self.settings
        sys.stderr.write(
            f"waiting for policy {settings.policy}, reward {', '.join(settings.addresses_of_rewards.values())}, "
            f"reference {settings.reference}\n"
        )
        try:
            return self._loop.run(self._services.connect())
        except QuartetError as error:
            raise ServicesError(str(error)) from error

    @led
    def _open_judge(self) -> None:
        try:
            self._judge = self._loop.run(open_judge(self.settings, self.tokenizer))
        except QuartetError as error:
            raise ServicesError(f"--judge {self.settings.judge}: {error}") from error

    @led
    def _check_judges(self, policy_folder: Path) -> None:
        """
        Raises:
            CheckpointError: a resumed run would be rewarded, or held near a policy, other than before.
            ServicesError: an adapter would be held near another model than the one that it is above, such as the base
                of an SFT model that was an adapter itself.
        """
        if self._checkpoint is not None:
            kept = self._checkpoint.state["judges"]
            if other := [name for name, value in self._judges.items() if kept.get(name) != value]:
                named = "; ".join(f"{name}: was {kept.get(name)}, is {self._judges[name]}" for name in other)
                raise CheckpointError(
                    f"{self.newest_checkpoint} was written with other models behind the services ({named}): the "
                    "rewards would mean something else; start the services with the former models"
                )
        elif self._info.reference.served_by.weights_fingerprint != safetensors_fingerprint(policy_folder):
            other_reference = (
                f"the reference service hosts {self._info.reference.served_by.model_id!r}, whose weights are not those "
                f"of --model {self.settings.model!r}"
            )
            if self.settings.lora_rank:
                raise ServicesError(
                    f"{other_reference}: an adapter (--lora-rank {self.settings.lora_rank}) is held near the model "
                    "that it is above and nothing else, least of all the base of that model; start the reference "
                    "service with --model's folder, or train all weights"
                )
            sys.stderr.write(f"warning: {other_reference}: KL is to the reference, and doesn't start at 0\n")

    @contextlib.contextmanager
    def as_step(self) -> Iterator[None]:
        """What is done within belongs to the next step, in traces and in the logs of the services, which name the
        requests of step 7 of runs/ppo ``ppo.step7.*``."""
        attributes: tracing.Attributes = {"quartet.run": self._name, "quartet.step": self.step + 1}
        with request_ids(f"{self._name}.step{self.step + 1}"), tracing.phase("step", attributes):
            yield

    @property
    def _name(self) -> str:
        return _NOT_IN_IDS.sub("-", self.settings.output.resolve().name)[:40] or "ppo"

    @led
    @tracing.traced("publish")
    def publish(self, weights: Published) -> None:
        """Makes every policy replica serve ``weights``."""
        self._loop.run(self._services.publish(weights))
        self._adapter_name = weights.name if isinstance(weights, AdapterWeights) else ""

    def adapter_weights(self, adapter: Adapter) -> AdapterWeights:
        """The adapter as it is now, under names that no other run has."""
        return AdapterWeights.of(
            adapter, stem=self._adapter_stem, version=self.step, base=(self._origin.parent or {})["weights"]
        )

    @functools.cached_property
    def _adapter_stem(self) -> str:
        """The same after a break, so that what a killed run has left in the service is taken out."""
        known_by = [self.settings.decisive, self._data, str(self.settings.output.resolve())]
        return f"{self._name}-{hashlib.sha256(json.dumps(known_by).encode()).hexdigest()[:8]}"

    @led
    def collect(self) -> Rollout:
        """The rollout of the next step; with --staleness, that of a later step is begun.

        Raises:
            ServicesError: too many samples failed.
            QuartetError: a service stayed away.
        """
        return self._ahead.next(self.step)

    @led
    def finish_rollout(self) -> float:
        """Waits for the rollout that is under way, which is of the weights published last; returns the seconds.

        Raises:
            ServicesError, QuartetError: as ``collect``.
        """
        return self._ahead.finish()

    def _begin(self, step: int) -> Future[Rollout]:
        """Begins the rollout of ``step``; its prompts and seeds follow from the step alone."""
        settings = self.settings
        self._stream.position = step * settings.prompts_per_step
        drawn = [self._tasks[row] for row in self._stream.draw(settings.prompts_per_step)]
        tasks = [
            replace(task, seed=prompt_seed(settings.seed, "rollout", step, p, s))
            for p, task in enumerate(drawn)
            for s in range(settings.samples_per_prompt)
        ]
        with request_ids(f"{self._name}.step{step + 1}"):
            return self._loop.start(self._sample(tasks, step, self.step))

    async def _sample(self, tasks: Sequence[PromptTask], step: int, weights_step: int) -> Rollout:
        settings = self.settings
        with tracing.phase("rollout"):
            rollout = await self._services.collect(tasks, settings, top_p=settings.top_p, top_k=settings.top_k)
        failed = len(rollout.failures)
        if failed > settings.max_failed_fraction * len(tasks) or len(rollout.samples) < 2:
            raise ServicesError(
                f"{failed} of the {len(tasks)} samples of step {step + 1} failed, more than "
                f"--max-failed-fraction {settings.max_failed_fraction:g}; the first: {rollout.failures[0]}"
            )
        return replace(rollout, weights_step=weights_step)

    def interrupted(self, error: Exception, trained: Trained) -> ServicesError:
        """Saves what is done and returns the error to raise: what went wrong, and how to go on."""
        saved = ""
        if self.step > 0 and not led(self._ahead.complete)(self.step):
            # The weights that the missing one was to be sampled with are no longer there.
            newest = latest_checkpoint(self.settings.output)
            saved = f"; a rollout that was ahead is missing, so the run goes on from {newest or 'its beginning'}"
        elif self.step > 0:
            try:
                self.save(trained)
                saved = f"; saved in {self.newest_checkpoint}"
            except CheckpointError as unsaved:
                saved = f"; {unsaved}"
        passes = isinstance(error, (UnavailableError, NotReadyError))
        return ServicesError(
            f"{error}\nstopped after step {self.step} of {self.settings.steps}{saved}. When "
            + ("the services are well" if passes else "that is mended")
            + ", give the same command again with --resume"
        )

    # Models and prompts --------------------------------------------------------------------------------------------

    def _load_critic(self, policy_folder: Path, settings: PPOSettings) -> Critic:
        if settings.critic == "policy":
            return Critic.from_policy(policy_folder, self.tokenizer, head=settings.critic_head, seed=settings.seed)
        named = settings.critic
        if named == "reward":
            named = self._info.reward.model.served_by.model_id
            if not self._info.reward.takes_tokens:
                raise ModelError(
                    f"--critic is reward, but the reward model {named!r} reads other tokens than the policy writes: "
                    "choose --critic policy"
                )
        try:
            return Critic.from_reward_model(named, self.tokenizer, head=settings.critic_head, seed=settings.seed)
        except ModelFolderError as error:
            raise ModelError(
                f"--critic is {settings.critic}: the critic starts from the reward model, which can't be loaded here "
                f"({error}); name a folder that is here, or choose --critic policy"
            ) from error

    def _encode(self, rows: Sequence[PromptRow], held_out: Sequence[PromptRow]) -> None:
        """
        Raises:
            DataError: a prompt can't be used.
            CheckpointError: a resumed run would go on with other prompts.
        """
        settings = self.settings
        own = [longest_sequence(self.policy), *([] if self.critic is None else [longest_sequence(self.critic.body)])]
        limit = longest_prompt(self._info, settings.max_new_tokens, *own)
        advice = (
            f"lower --max-new-tokens {settings.max_new_tokens}, which the models' longest sequence includes; or choose "
            "--truncation left"
        )
        encoder = Encoder(self.tokenizer, max_tokens=limit, truncation=settings.truncation, advice=advice)
        self._tasks = [
            PromptTask(prompt=row.prompt, ids=tuple(int(token) for token in ids), seed=0, where=row.where)
            for row, ids in zip(rows, encoder.prompts(rows), strict=True)
        ]
        self._eval_tasks = make_tasks(
            different_prompts(held_out, settings.max_eval_prompts),
            encoder,
            seed=settings.seed,
            samples=settings.eval_samples,
        )
        self._data = ids_digest([task.ids for task in self._tasks], [task.ids for task in self._eval_tasks])
        require_same_data(settings.output, self._checkpoint, self._data, "--prompts or --eval-prompts")

    def _trace_origin(self, hosted: Mapping[str, Mapping[str, Any]]) -> Origin:
        settings = self.settings
        return origin(
            settings.stage,
            settings.model_dump(mode="json"),
            parent=settings.model,
            sources=(*settings.prompts, *settings.eval_prompts),
            digest=self._data,
            judges={
                name: {key: said[key] for key in ("model", "weights")}
                for name, said in hosted.items()
                if name != "policy"
            },
        )

    # Evaluation ----------------------------------------------------------------------------------------------------

    def _watch_policy(self) -> PolicyMonitor:
        """KL is exact where the reference is the model that training starts from, which is here."""
        settings = self.settings
        start = self._origin.parent or {}
        is_here = self._info.reference.served_by.weights_fingerprint == start.get("weights")
        return PolicyMonitor(
            settings,
            self.policy,
            self.tokenizer,
            max_tokens=longest_sequence(self.policy),
            reference=find_model(settings.model) if settings.exact_kl and is_here else None,
            before=settings.output / BEFORE,
            resumed_step=self.resumed_step or 0,
        )

    def _keep_model(self, folder: Path) -> None:
        """Saves the policy as it is, or its adapter."""
        save = save_model if adapter_of(self.policy) is None else save_adapter
        save(self.policy, self.tokenizer, folder, origin=self._origin, step=self.step)

    @led
    def _ask(self) -> tuple[Rollout, Sequence[float | None] | None]:
        return self._loop.run(ask(self._services, self._eval_tasks, self.settings, judge=self._judge))

    def finish(self) -> None:
        """Exports the model, writes the report, and says where everything is."""
        output = self.settings.output
        save_model(self.policy, self.tokenizer, output / MODEL_FOLDER, origin=self._origin, step=self.step)
        from trainer.report import write_report

        report = led(write_report)(output)
        sys.stdout.write(
            f"{self.evaluations.outcome()}model: {output / MODEL_FOLDER}\n{self._adapter_line()}"
            f"{self.evaluations.best_line(self.step)}report: {report}\n"
        )

    def _adapter_line(self) -> str:
        if not self._adapter_name:
            return ""
        return f"adapter: {self.settings.output / ADAPTER_FOLDER}, in the policy service {self._adapter_name}\n"

    # Progress and checkpoints --------------------------------------------------------------------------------------

    def advance(self, rollout: Rollout) -> dict[str, float]:
        """One more step is done; returns which, and what went into it."""
        self.step += 1
        self.episodes += len(rollout.samples)
        return {
            "step": self.step,
            "episodes": self.episodes,
            "elapsed_s": self._elapsed_s(),
            "samples/failed": len(rollout.failures),
            "weights/version": rollout.weights_version,
            "weights/version_min": min(sample.weights_version for sample in rollout.samples),
            "weights/staleness": self.step - 1 - rollout.weights_step,
        }

    def _elapsed_s(self) -> float:
        before = 0.0 if self._checkpoint is None else float(self._checkpoint.state["elapsed_s"])
        return before + time.monotonic() - self._started_s

    def restore(self, trained: Trained) -> None:
        """Brings everything to where the checkpoint left it that the run goes on from, if it does."""
        if self._checkpoint is None:
            return
        path = checkpoint_path(self.settings.output, self._checkpoint.step)
        restored = load_checkpoint(path, modules=trained.modules, optimisers=trained.optimisers)
        try:
            for name, state in self._states(trained).items():
                state.load_state_dict(restored.state[name])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        self.step, self.episodes = restored.step, int(restored.state["episodes"])
        if is_first():
            self._ahead.waiting.extend(unpack(restored.state["rollouts"], restored.tensors))

    def save(self, trained: Trained) -> float:
        """Writes a checkpoint unless this step has one; returns the seconds it took."""
        if self.step == self._saved_step:
            return 0.0
        start_s = time.perf_counter()
        rollouts, tensors = pack(self._ahead.waiting)
        save_checkpoint(
            self.settings.output,
            step=self.step,
            modules=trained.modules,
            optimisers=trained.optimisers,
            state={
                "settings": self.settings.decisive,
                "episodes": self.episodes,
                "elapsed_s": self._elapsed_s(),
                "rollouts": rollouts,
                **{name: state.state_dict() for name, state in self._states(trained).items()},
                "judges": self._judges,
                "data": self._data,
            },
            tensors=tensors,
            keep=self.settings.keep_checkpoints,
        )
        self._saved_step = self.step
        if self.stop_rule.best is not None:
            # Not before a checkpoint names the new one.
            led(keep_only_best)(self.settings.output, self.stop_rule.best.step)
        return time.perf_counter() - start_s

    def save_when_due(self, trained: Trained) -> float:
        """``save`` at the steps that ask for it; returns the seconds it took."""
        every = self.settings.save_every
        new_best = self.settings.keep_best and led(best_folder(self.settings.output, self.step).is_dir)()
        return self.save(trained) if new_best or (every and self.step % every == 0) else 0.0

    def _states(self, trained: Trained) -> dict[str, Stateful]:
        return {**trained.states, "stop_rule": self.stop_rule}


async def _open_services(settings: RunSettings, tokenizer: Any) -> Services:
    # gRPC's channels belong to the loop they are made in.
    return Services(settings, tokenizer, policy_admin=settings.policy_admin, admin_security=settings.admin_security)


def _judges(info: ServiceInfo, judge: JudgeService | None) -> dict[str, object]:
    """What decides rewards and judgements besides the settings, as JSON values: the same when a run goes on."""
    judges: dict[str, object] = {"reference": info.reference.served_by.result_fingerprint}
    for reward in info.rewards:
        judges |= reward.as_judge()
    return judges if judge is None else judges | {"judge": judge.served_by.result_fingerprint}


def _write_settings(settings: RunSettings, info: ServiceInfo, judge: JudgeService | None) -> dict[str, dict[str, Any]]:
    """Settings and what answered, for the report and for people. Returns what answered."""
    hosted = {
        name: {
            "model": model.served_by.model_id,
            "weights": model.served_by.weights_fingerprint,
            "engine": model.engine,
            "dtype": model.dtype,
        }
        for name, model in (
            ("policy", info.policy),
            *((f"reward {reward.name}".rstrip(), reward.model) for reward in info.rewards),
            ("reference", info.reference),
            *([("judge", judge.info)] if judge else []),
        )
    }
    content = settings.model_dump(mode="json") | {"services": hosted, "torch": torch.__version__}
    write_json(settings.output / SETTINGS_FILE, content)
    return hosted


def _read_prompts(settings: RunSettings) -> tuple[list[PromptRow], list[PromptRow]]:
    rows = load_prompts(settings.prompts)
    if not settings.eval_prompts:
        rows, held_out = split_held_out(rows, settings.held_out_fraction, seed=settings.seed)
        if len(held_out) < 2:
            raise DataError(
                f"{', '.join(settings.prompts)}: --held-out-fraction {settings.held_out_fraction:g} of "
                f"{len(rows) + len(held_out)} prompts sets {len(held_out)} apart: an interval needs at least 2; raise "
                "it, or name --eval-prompts"
            )
        return rows, held_out
    held_out = load_prompts(settings.eval_prompts)
    if shared := shared_groups(rows, held_out):
        sys.stderr.write(f"warning: {shared} of the {len(held_out)} held-out prompts are also trained on\n")
    return rows, held_out
