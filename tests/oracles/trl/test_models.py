"""DPO, KTO and reward training of whole models against TRL's, from token ids to the gradient of every weight.

Shapes: N answers, S tokens of prompt and answer.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.oracles import peers
from tests.oracles.batches import assert_agree
from tests.oracles.trl.stand_in import trainer_of_trl
from trainer.answers import Answers
from trainer.comparisons import Judgement
from trainer.config import DpoSettings, KtoSettings, RewardSettings
from trainer.dpo import DpoTrainer, with_reference
from trainer.encoding import EncodedComparison, EncodedPreference, EncodedResponse
from trainer.kto import Judged, KtoTrainer, mismatched
from trainer.kto import with_reference as with_reference_of_each
from trainer.models import load_policy, load_reward_model, load_tokenizer
from trainer.references import ModelReference
from trainer.reward_trainer import RewardTrainer

peers.require("trl")
trl: Any = importlib.import_module("trl.trainer")
add_fused_lm_head: Any = importlib.import_module("trl.trainer.utils").add_fused_lm_head


def random_pairs(seed: int) -> list[EncodedPreference]:
    """Six pairs of answers of 1 to 9 tokens to prompts of 1 to 5."""
    draw = np.random.default_rng(seed)

    def answer(prompt: np.ndarray[Any, Any]) -> EncodedResponse:
        ids = np.concatenate([prompt, draw.integers(3, 300, draw.integers(1, 10))]).astype(np.int32)
        return EncodedResponse(ids=ids, prompt_tokens=len(prompt), truncated=False)

    prompts = [draw.integers(3, 300, draw.integers(1, 6)) for _ in range(6)]
    return [EncodedPreference(chosen=answer(prompt), rejected=answer(prompt)) for prompt in prompts]


def collated(pairs: list[EncodedPreference]) -> dict[str, Tensor]:
    """As TRL's collator has it: all chosen, then all rejected answers, right-padded."""
    return padded([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs])


def padded(answers: list[EncodedResponse]) -> dict[str, Tensor]:
    width = max(len(answer) for answer in answers)
    rows = torch.arange(width).expand(len(answers), width)
    lengths, prompts = (
        torch.tensor(column)[:, None]
        for column in zip(*((len(answer), answer.prompt_tokens) for answer in answers), strict=True)
    )
    ids = [torch.tensor(answer.ids.tolist()) for answer in answers]
    return {
        "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
        "attention_mask": (rows < lengths).long(),
        "completion_mask": ((rows >= prompts) & (rows < lengths)).long(),
    }


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def test_dpo_of_a_model_and_all_its_gradients_agree(make_policy: Callable[..., Path], tmp_path: Path) -> None:
    """From token ids on: their fused head and live reference against our chunked log-probabilities, cut anew."""
    folder = make_policy(seed=3)
    tokenizer = load_tokenizer(folder)
    policy, reference = (load_policy(make_policy(seed=s), tokenizer, dtype=torch.float64) for s in (3, 4))
    pairs = random_pairs(0)
    settings = DpoSettings(model=str(folder), data=("-",), output=tmp_path, beta=0.1, micro_batch_tokens=40)
    ours = DpoTrainer(policy, tokenizer, settings, reference=None)  # type: ignore[arg-type]
    answers = [answer for pair in pairs for answer in (pair.chosen, pair.rejected)]
    sums = DpoTrainer(reference, tokenizer, settings, None).answers.all_sums(answers, 100)  # type: ignore[arg-type]
    policy.train()
    figures = ours.accumulate(with_reference(pairs, sums.numpy()))
    ours_of = gradients(policy)

    for model in (policy, reference):
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    trainer = trainer_of_trl(
        model=policy.eval(),
        ref_model=reference,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        beta=0.1,
        label_smoothing=0.0,
        use_weighting=False,
    )
    loss = trl.DPOTrainer._compute_loss(trainer, policy, collated(pairs), False)
    loss.backward()
    theirs_of = gradients(policy)
    assert_agree(figures["loss"], loss)
    assert figures["loss"] != pytest.approx(np.log(2), abs=0.01)
    logged = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
    assert_agree(figures["margin_mean"], logged["rewards/margins"])
    assert_agree(figures["chosen_reward_mean"], logged["rewards/chosen"])
    assert_agree(figures["accuracy"], logged["rewards/accuracies"])
    assert_agree(figures["rejected_logprob_mean"], logged["logps/rejected"])
    assert ours_of.keys() == theirs_of.keys()
    for name, gradient_of in ours_of.items():
        assert_agree(gradient_of, theirs_of[name])


def test_kto_of_a_model_and_all_its_gradients_agree(make_policy: Callable[..., Path], tmp_path: Path) -> None:
    """From token ids on, the reference point included, which is that of the whole batch however ours is cut."""
    folder = make_policy(seed=3)
    tokenizer = load_tokenizer(folder)
    policy, reference = (load_policy(make_policy(seed=s), tokenizer, dtype=torch.float64) for s in (4, 3))
    pairs = random_pairs(2)
    rows = [Judged(answer=pair.chosen, desirable=True) for pair in pairs[:4]]
    rows += [Judged(answer=pair.rejected, desirable=False) for pair in pairs[2:]]
    others = mismatched(rows, 100)
    settings = KtoSettings(
        model=str(folder),
        data=("-",),
        output=tmp_path,
        beta=0.2,
        desirable_weight=1.5,
        undesirable_weight=0.5,
        micro_batch_tokens=40,
    )
    of_reference = ModelReference(Answers(reference, tokenizer, "float32"), 100, "another model")
    known = iter(of_reference.sums([item.answer for item in (*rows, *others)]).tolist())
    rows, others = with_reference_of_each(rows, known), with_reference_of_each(others, known)
    policy.train()
    figures = KtoTrainer(Answers(policy, tokenizer, "float32"), settings, of_reference).accumulate(rows, others)
    ours_of = gradients(policy)

    for model in (policy, reference):
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    trainer = trainer_of_trl(
        model=policy.eval(),
        ref_model=reference,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        precompute_ref_logps=False,
        calculate_KL=True,
        loss_type="kto",
        beta=0.2,
        desirable_weight=1.5,
        undesirable_weight=0.5,
    )
    trainer._compute_kl_logps = functools.partial(trl.KTOTrainer._compute_kl_logps, trainer)
    inputs = padded([row.answer for row in rows]) | {"label": torch.tensor([row.desirable for row in rows])}
    inputs |= {f"KL_{name}": tensor for name, tensor in padded([item.answer for item in others]).items()}
    loss = trl.KTOTrainer._compute_loss(trainer, policy, inputs, False)
    loss.backward()
    theirs_of = gradients(policy)
    assert_agree(figures["loss"], loss)
    logged = {name: values[-1] for name, values in trainer._metrics["eval"].items() if isinstance(values, list)}
    assert figures["reference_point"] > 0.1
    assert_agree(figures["reference_point"], logged["kl"])
    assert_agree(figures["good_reward_mean"], logged["rewards/chosen"])
    assert_agree(figures["bad_logprob_mean"], logged["logps/rejected"])
    assert ours_of.keys() == theirs_of.keys()
    for name, gradient_of in ours_of.items():
        assert_agree(gradient_of, theirs_of[name])


def test_the_loss_of_a_reward_model_and_all_its_gradients_agree(
    make_reward_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_reward_model(seed=3)
    tokenizer = load_tokenizer(folder)
    model = load_reward_model(folder, tokenizer, dtype=torch.float64)
    model.score.double()  # Ours reads it in float32 either way; theirs wants one type throughout.
    pairs = random_pairs(1)
    settings = RewardSettings(
        model=str(folder), data=("-",), output=tmp_path, centering=0.1, score_l2=0.0, margin=0.5, micro_batch_tokens=40
    )
    first_wins = (Judgement(first=0, second=1),)
    rows = [
        EncodedComparison(answers=(pair.chosen, pair.rejected), judgements=first_wins, ranked=False) for pair in pairs
    ]
    figures = RewardTrainer(model, tokenizer, settings).accumulate(rows)
    ours_of = gradients(model)
    trainer = trainer_of_trl(model=model.eval(), args=SimpleNamespace(center_rewards_coefficient=0.1))
    inputs = {name: tensor for name, tensor in collated(pairs).items() if name != "completion_mask"}
    loss = trl.RewardTrainer.compute_loss(trainer, model, inputs | {"margin": torch.full((6,), 0.5)})
    loss.backward()
    theirs_of = gradients(model)
    assert_agree(figures["loss"], loss)
    assert_agree(figures["margin_mean"], trainer._metrics["eval"]["margin"][-1])
    assert ours_of.keys() == theirs_of.keys()
    for name, gradient_of in ours_of.items():
        assert_agree(gradient_of, theirs_of[name])
