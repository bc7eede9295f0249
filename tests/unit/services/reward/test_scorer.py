"""Scores against transformers called directly, one sequence at a time, in float64.

Shapes: S tokens of a sequence, D hidden size.
"""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification

from quartet.model_folder import write_metadata
from services.hosting.model import Hosting
from services.reward.scorer import Encoding, ScorerItem, TransformersScorer
from services.runtime.errors import StartError

TOLERANCE = 2e-5
TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=1, model_max_length=128)
SMALL = {"vocab_size": 300, "num_labels": 1, "pad_token_id": 0}


def hosting(dtype: torch.dtype = torch.float32) -> Hosting:
    return Hosting(device=torch.device("cpu"), dtype=dtype)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> TransformersScorer:
    return TransformersScorer(folder, hosting=hosting(dtype), tokenizer=TOKENIZER)


def scores_of(scorer: TransformersScorer, sequences: Sequence[Sequence[int]]) -> list[float]:
    return [score for (score,) in scorer.score([ScorerItem(sequence) for sequence in sequences])]


def ragged(count: int = 9, seed: int = 1) -> list[list[int]]:
    """Of 1 to 128 tokens; some begin alike, as responses to one prompt do."""
    draw = torch.Generator().manual_seed(seed)
    sequences = [torch.randint(3, 300, (n,), generator=draw).tolist() for n in (1, 2, 128, 17, 64, 3)]
    prompt = torch.randint(3, 300, (40,), generator=draw).tolist()
    return [*sequences, *([*prompt, 7 + i, *range(30, 30 + 9 * i)] for i in range(3))][:count]


@torch.inference_mode()
def direct(folder: Path, sequences: Sequence[Sequence[int]]) -> list[float]:
    """Each alone and without padding, so that there is nothing to mask; float64 throughout."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    model.config.pad_token_id = None  # Else transformers takes a pad token at the end for padding.
    return [model(input_ids=torch.tensor([list(ids)])).logits[0, 0].item() for ids in sequences]


@pytest.fixture(scope="module")
def folders(make_reward_model, tmp_path_factory) -> dict[str, Path]:
    """A reward model of each kind: rotary decoder, decoder with learned positions and a head with a bias, encoder."""
    torch.manual_seed(5)
    gpt2 = transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, **SMALL)
    )
    bert = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            **SMALL,
        )
    )
    found = {"llama": make_reward_model()}
    for kind, model in (("gpt2", gpt2), ("bert", bert)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))  # Biases that matter, scores far apart.
        found[kind] = tmp_path_factory.mktemp(kind)
        model.save_pretrained(found[kind])
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_batch_of_any_lengths_has_the_scores_that_transformers_gives_each_alone(folders, kind):
    expected = direct(folders[kind], ragged())
    scorer = load(folders[kind])
    assert scores_of(scorer, ragged()) == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
    gaps = [abs(x - y) for x, y in itertools.combinations(expected, 2)]
    assert min(gaps) > 2 * TOLERANCE  # They tell the sequences apart.
    assert (scorer.vocab_size, scorer.max_sequence_tokens) == (300, 128)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_no_companion_and_no_padding_changes_a_score(folders, kind):
    scorer = load(folders[kind])
    alone = [scores_of(scorer, [sequence])[0] for sequence in ragged()]
    for batch in (ragged(), ragged()[::-1], [*ragged(), *ragged(seed=2)]):
        for sequence, score in zip(batch, scores_of(scorer, batch), strict=True):
            if sequence in ragged():
                assert score == pytest.approx(alone[ragged().index(sequence)], rel=TOLERANCE, abs=TOLERANCE)
    # What padding is filled with makes no difference, not in a single bit.
    padded = scores_of(scorer, ragged())
    scorer.pad_id = 299
    if scorer.is_decoder:
        scorer.hidden_states.pad_id = 299
    assert scores_of(scorer, ragged()) == padded


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_decoder_that_has_to_be_padded_gives_the_same_scores(folders, kind):
    expected = direct(folders[kind], ragged())
    scorer = load(folders[kind])
    scorer.hidden_states.packed = False
    scorer.model.set_attn_implementation("sdpa")
    assert scores_of(scorer, ragged()) == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_pad_and_end_tokens_in_a_sequence_are_tokens_like_others(folders, kind):
    """Their place is told by the lengths, not by the ids: transformers itself would score [5, 6, 0] at 6."""
    sequences = [[5, 6], [5, 6, 0], [5, 6, 0, 0], [0], [0, 0, 7], [5, 1, 6, 1], [5, 1]]
    scores = scores_of(load(folders[kind]), sequences)
    assert scores == pytest.approx(direct(folders[kind], sequences), rel=TOLERANCE, abs=TOLERANCE)
    assert len({round(x, 3) for x in scores}) == len(sequences)


def test_in_half_precision_the_score_itself_is_not_rounded(folders):
    """bfloat16 keeps eight bits: scores of a pair that are near each other would be equal."""
    folder = folders["llama"]
    scorer = load(folder, torch.bfloat16)
    head: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16).score
    weight_D = head.weight[0].detach().double()
    with torch.inference_mode():
        hidden_BD = scorer.hidden_states(ragged(), [range(len(tokens) - 1, len(tokens)) for tokens in ragged()])
    assert hidden_BD.dtype == torch.bfloat16
    exact = (hidden_BD.double() @ weight_D).tolist()
    assert scores_of(scorer, ragged()) == pytest.approx(exact, rel=TOLERANCE, abs=TOLERANCE)
    # Nor is it far from the score of the model in full precision.
    assert scores_of(scorer, ragged()) == pytest.approx(direct(folder, ragged()), abs=0.1 * max(map(abs, exact)))
    scores = torch.tensor(scores_of(scorer, ragged()))
    assert (scores != scores.bfloat16().float()).float().mean() > 0.8


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DebertaV2"])
def test_in_half_precision_an_encoders_head_rounds_nothing_either(kind, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, f"{kind}Config")(**sizes, max_position_embeddings=160, **SMALL)
    torch.manual_seed(5)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    scorer = load(tmp_path, torch.bfloat16)
    seen: list[Any] = []
    scorer.model.base_model.register_forward_hook(lambda body, inputs, output: seen.append(output))
    scores_B = torch.tensor(scores_of(scorer, ragged())).double()

    # What each class does after its body, in float64 from the bfloat16 weights.
    named = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ named[f"{name}.weight"].double().T + named[f"{name}.bias"].double()

    first_BD = seen[0].last_hidden_state[:, 0]
    assert first_BD.dtype == torch.bfloat16
    exact_B1 = {
        "Bert": lambda: linear("classifier", seen[0].pooler_output.double()),
        "Roberta": lambda: linear("classifier.out_proj", linear("classifier.dense", first_BD.double()).tanh()),
        "DebertaV2": lambda: linear("classifier", torch.nn.functional.gelu(linear("pooler.dense", first_BD.double()))),
    }[kind]()
    assert (scores_B - exact_B1[:, 0]).abs().max() < 1e-6
    assert (exact_B1.bfloat16().double() - exact_B1).abs().max() > 1e-5


# How text is seen -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "metadata", "expected"),
    [
        ("llama", {}, Encoding(pair=False, end_token_id=1)),
        ("llama", {"append_eos": True}, Encoding(pair=False, end_token_id=1)),
        ("llama", {"append_eos": False}, Encoding(pair=False, end_token_id=None)),
        ("llama", {"encoding": "pair"}, Encoding(pair=True, end_token_id=None)),
        ("bert", {}, Encoding(pair=True, end_token_id=None)),
        ("bert", {"encoding": "concatenate"}, Encoding(pair=False, end_token_id=1)),
        ("bert", {"encoding": "concatenate", "append_eos": False}, Encoding(pair=False, end_token_id=None)),
    ],
)
def test_text_is_seen_as_the_metadata_say_else_as_is_the_custom_of_the_architecture(
    folders, kind, metadata, expected, tmp_path, tokenizer
):
    if metadata:
        write_metadata(tmp_path, kind="reward", **metadata)
    assert load(folders[kind]).encoding(tmp_path, tokenizer) == replace(expected, characters_per_token=5)


def test_an_end_token_that_is_to_be_appended_must_exist(folders, tmp_path, tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    scorer = load(folders["llama"])
    with pytest.raises(StartError, match=r"has no end token to append .*\"append_eos\": false in quartet\.json"):
        scorer.encoding(tmp_path, endless)
    write_metadata(tmp_path, kind="reward", append_eos=False)
    assert scorer.encoding(tmp_path, endless).end_token_id is None
    assert load(folders["bert"]).encoding(folders["bert"], endless).pair


# What cannot be hosted --------------------------------------------------------------------------------------------


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_off(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def of_no_known_kind(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "nothing-known"}')


@pytest.mark.parametrize("damage", [without_weights, cut_off, of_no_known_kind])
def test_a_folder_that_does_not_load_is_refused_in_one_line(folders, tmp_path, damage: Callable[[Path], None]):
    shutil.copytree(folders["llama"], tmp_path / "broken")
    damage(tmp_path / "broken")
    with pytest.raises(StartError, match=r"model '.*broken' does not load as a sequence classifier: "):
        load(tmp_path / "broken")


def test_what_is_no_reward_model_is_refused(make_policy, make_reward_model):
    with pytest.raises(StartError, match=r"is not a reward model: its checkpoint lacks score\.weight; train one with"):
        load(make_policy())
    with pytest.raises(StartError, match="num_labels is 3, must be 1"):
        load(make_reward_model(num_labels=3))


def test_padding_is_the_models_own_else_the_tokenizers_else_the_first_token(make_reward_model, tmp_path):
    folder = make_reward_model()
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path)
    for tokenizer_pad, expected in ((7, 7), (None, 0), (0, 0)):
        tokenizer = SimpleNamespace(pad_token_id=tokenizer_pad, model_max_length=128)
        assert TransformersScorer(tmp_path, hosting=hosting(), tokenizer=tokenizer).pad_id == expected
    model.config.pad_token_id = 5
    model.save_pretrained(tmp_path)
    assert load(tmp_path).pad_id == 5
