"""SFT on every turn: which tokens are learned, against transformers' own masks and by hand, and what is refused.

Shapes: S tokens.
"""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from services.hosting.model import end_tokens
from tests.conftest import WORDS
from trainer.config import SftSettings
from trainer.data import Demonstration, Preference, load_demonstrations
from trainer.encoding import EncodedResponse, Encoder
from trainer.errors import DataError
from trainer.models import load_policy, load_tokenizer
from trainer.runs import rows_digest
from trainer.sft import SftTrainer
from trainer.sft import main as train_sft

Turn = tuple[str, str]

# A line with the role, the text, the end token; the second says what the assistant says.
PLAIN = (
    "{% for m in messages %}<bos>{{ m['role'] + '\\n' + m['content'] }}<eos>{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant{{ '\\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}<bos>{{ m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<eos>{% endgeneration %}{% else %}{{ m['content'] }}<eos>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant{{ '\\n' }}{% endif %}"
)
# Earlier answers are written without their first word, as some templates leave out their thoughts.
FORGETS = PLAIN.replace("m['content']", "(m['content'] if loop.last else m['content'].split(' ', 1)[-1])")
FORGETS_MARKED = MARKED.replace(
    "{% generation %}{{ m['content'] }}<eos>{% endgeneration %}",
    "{% generation %}{{ m['content'] if loop.last else m['content'].split(' ', 1)[-1] }}{% endgeneration %}<eos>",
)


def with_template(tokenizer: Any, template: str) -> Any:
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    return own


def messages_of(*turns: Turn) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def write(folder: Path, *rows: Any) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row if isinstance(row, dict) else {"messages": row}) + "\n" for row in rows))
    return str(path)


def encode(tokenizer: Any, source: str, max_tokens: int = 1000, **settings: Any) -> list[EncodedResponse]:
    encoder = Encoder(tokenizer, max_tokens=max_tokens, **settings)
    return encoder.demonstrations(load_demonstrations([source]), every_turn=True)


def random_conversations(count: int, *, seed: int = 0, longest: int = 4) -> list[list[dict[str, str]]]:
    draw = random.Random(seed)

    def words() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 3)))

    conversations = []
    for _ in range(count):
        system = [("system", words())] if draw.random() < 0.5 else []
        turns = [(role, words()) for _ in range(draw.randint(1, longest)) for role in ("user", "assistant")]
        conversations.append(messages_of(*system, *turns))
    return conversations


def learned_ids(row: EncodedResponse) -> list[list[int]]:
    return [row.ids[start:end].tolist() for start, end in row.learned]


def test_by_hand_every_answer_is_learned_with_its_end_token_and_nothing_else_is(tokenizer, tmp_path):
    own = with_template(tokenizer, PLAIN)
    turns = [("system", "please"), ("user", "hello"), ("assistant", "good"), ("user", "no"), ("assistant", "we can")]
    talk = messages_of(*turns)
    (row,) = encode(own, write(tmp_path, talk))

    def ids(text: str) -> list[int]:
        return own(text, add_special_tokens=False).input_ids

    before = ids("<bos>system\nplease<eos>\n<bos>user\nhello<eos>\n<bos>assistant\n")
    first, between = ids("good<eos>"), ids("\n<bos>user\nno<eos>\n<bos>assistant\n")
    last = ids("we can<eos>")
    assert row.ids.tolist() == [*before, *first, *between, *last]
    assert row.turns == (
        (len(before), len(before) + len(first)),
        (len(row.ids) - len(last), len(row.ids)),
    )
    assert learned_ids(row) == [first, last]
    assert row.prompt_tokens == len(before)
    # The last turn alone is what it was.
    (last_turn,) = Encoder(own, max_tokens=200).demonstrations(load_demonstrations([write(tmp_path, talk)]))
    assert last_turn.ids.tolist() == row.ids.tolist()
    assert learned_ids(last_turn) == [last]
    assert rows_digest([row]) != rows_digest([last_turn])


def test_what_is_learned_is_what_transformers_own_mask_says(tokenizer, tmp_path):
    """Oracle: return_assistant_tokens_mask on a template that marks what is generated, which is rendered the same."""
    talks = random_conversations(40)
    own, marked = (with_template(tokenizer, template) for template in (PLAIN, MARKED))
    rows = encode(own, write(tmp_path, *talks))
    assert [row.ids.tolist() for row in encode(marked, write(tmp_path, *talks))] == [row.ids.tolist() for row in rows]
    for talk, row in zip(talks, rows, strict=True):
        theirs = marked.apply_chat_template(
            talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
        )
        mask = [0] * len(theirs["input_ids"])
        for start, end in row.learned:
            mask[start:end] = [1] * (end - start)
        assert mask == theirs["assistant_masks"]
        # Of the whole, only what stands behind the last answer is left out.
        assert row.ids.tolist() == theirs["input_ids"][: len(row)]
        assert len(row.turns) == sum(message["role"] == "assistant" for message in talk)


def test_a_template_that_depends_on_what_follows_needs_its_own_marks(tokenizer, tmp_path):
    talk = messages_of(("user", "hello"), ("assistant", "hm good day"), ("user", "no"), ("assistant", "hm we can"))
    source = write(tmp_path, talk[:2], talk)
    with pytest.raises(DataError) as refused:
        encode(with_template(tokenizer, FORGETS), source)
    assert f"{source}, line 2: the model's chat template writes messages otherwise once others follow" in str(
        refused.value
    )
    assert "choose --train-on last-turn" in str(refused.value)
    # By its marks, which leave the end token out.
    marked = with_template(tokenizer, FORGETS_MARKED)
    _, row = encode(marked, source)
    assert [marked.decode(ids) for ids in learned_ids(row)] == ["good day<eos>", "hm we can<eos>"]
    assert marked.decode(row.ids).startswith("<bos>user\nhello<eos>\n<bos>assistant\ngood day<eos>\n<bos>user")


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (
            PLAIN,
            [("user", "a"), ("user", "b"), ("assistant", "c")],
            "message 2 has the role 'user', must be 'assistant': after the system's, where there is one, user and",
        ),
        (PLAIN, [("assistant", "a"), ("user", "b"), ("assistant", "c")], "message 1 has the role 'assistant', must be"),
        (
            PLAIN,
            [("system", "s"), ("user", "a"), ("system", "t"), ("assistant", "c")],
            "message 3 has the role 'system', must be 'assistant'",
        ),
        (PLAIN, [("user", "a"), ("tool", "b"), ("assistant", "c")], "message 2 has the role 'tool'"),
        (
            PLAIN.replace("<eos>", ""),
            [("user", "a"), ("assistant", "b")],
            "the model's chat template closes the assistant's turns by no end token",
        ),
        (
            FORGETS_MARKED.replace("{% endgeneration %}<eos>", "{% endgeneration %}"),
            [("user", "a"), ("assistant", "b c"), ("user", "a"), ("assistant", "d e")],
            "the model's chat template marks 2 turns by {% generation %} of the assistant's 2, or no end token closes",
        ),
        (None, [("user", "a"), ("assistant", "b")], "the prompt is chat messages, but the model's tokenizer has no"),
    ],
)
def test_conversations_that_can_not_be_told_apart_are_refused_by_file_and_line(
    template, turns, message, tokenizer, tmp_path
):
    source = write(tmp_path, messages_of(*turns))
    with pytest.raises(DataError) as refused:
        encode(with_template(tokenizer, template), source)
    assert f"{source}, line 1: {message}" in str(refused.value)


# Turns end by "<pad>", and only the whole by the end token, as Phi-3's template has it.
ENDS_OTHERWISE = PLAIN.replace("<eos>", "<pad>").replace(
    "{% if add", "{% if not add_generation_prompt %}<eos>{% endif %}{% if add"
)


@pytest.mark.parametrize("template", [PLAIN.replace("<eos>", "<pad>"), ENDS_OTHERWISE])
def test_one_conversation_ends_as_its_template_does_whatever_is_learned_of_it_which_is_told(
    template, tokenizer, tmp_path, capsys
):
    own = with_template(tokenizer, template)
    source = write(tmp_path, messages_of(("user", "a"), ("assistant", "b")))
    rows = []
    for every_turn in (False, True):
        encoder = Encoder(own, max_tokens=100)
        rows += [
            row
            for _ in range(2)
            for row in encoder.demonstrations(load_demonstrations([source]), every_turn=every_turn)
        ]
        told = capsys.readouterr().err
        assert told.count("warning") == 1
        assert "the chat template ends the assistant's turns by '<pad>', so answers to messages do, the " in told
        assert encoder.other_end_id == own.pad_token_id
    assert {tuple(row.ids.tolist()) for row in rows} == {tuple(rows[0].ids.tolist())}
    assert {own.decode(row.ids[start:end]) for row in rows for start, end in row.learned} == {"b<pad>"}
    # Preferences and judged answers end by it, too; answers to plain text never do.
    pair = Preference(prompt=messages_of(("user", "a")), chosen="b", rejected="c")
    (encoded,) = Encoder(own, max_tokens=100).preferences([pair])
    assert encoded.chosen.ids.tolist() == rows[0].ids.tolist()
    assert encoded.rejected.ids[-1] == own.pad_token_id
    (text,) = (encoder := Encoder(own, max_tokens=100)).demonstrations([Demonstration(prompt="a", completion="b")])
    assert text.ids[-1] == own.eos_token_id
    assert encoder.other_end_id is None


def test_a_template_that_ends_turns_by_no_token_leaves_answers_to_the_end_token(tokenizer, tmp_path, capsys):
    source = write(tmp_path, messages_of(("user", "a"), ("assistant", "b")))
    (row,) = Encoder(tokenizer, max_tokens=100).demonstrations(load_demonstrations([source]))
    assert row.ids[-1] == tokenizer.eos_token_id
    assert capsys.readouterr().err == ""


def test_who_serves_a_model_that_ends_turns_by_another_token_is_told_to_stop_at_it(make_policy, tokenizer, tmp_path):
    folder = make_policy(seed=3, with_tokenizer=False)
    with_template(tokenizer, ENDS_OTHERWISE).save_pretrained(folder)
    source = write(tmp_path, *random_conversations(16, longest=1))
    train_sft(settings_of(folder, source, tmp_path / "run", train_on="last-turn", held_out_fraction=0.0))
    config = AutoConfig.from_pretrained(tmp_path / "run" / "model")
    ends = end_tokens(tmp_path / "run" / "model", config, load_tokenizer(tmp_path / "run" / "model"))
    assert set(ends) == {tokenizer.eos_token_id, tokenizer.pad_token_id}


def test_long_conversations_are_refused_or_cut_and_what_is_left_of_each_turn_is_learned(tokenizer, tmp_path):
    own = with_template(tokenizer, PLAIN)
    turns = [("user", "hello"), ("assistant", "good day please"), ("user", "no"), ("assistant", "we can help")]
    talk = messages_of(*turns)
    source = write(tmp_path, talk)
    (whole,) = encode(own, source)
    (first_start, first_end), (last_start, last_end) = whole.turns
    with pytest.raises(DataError, match=rf"1 of 1 rows have more than {len(whole) - 1} tokens of messages: .* line 1 "):
        encode(own, source, len(whole) - 1)
    (row,) = encode(own, source, last_start + 1, truncation="right")
    assert row.turns == ((first_start, first_end), (last_start, last_start + 1))
    (row,) = encode(own, source, first_start + 2, truncation="right")
    assert (row.turns, row.truncated) == (((first_start, first_start + 2),), True)
    with pytest.raises(DataError, match="line 1: before the assistant's first answer there are"):
        encode(own, source, first_start, truncation="right")
    # The beginning of the first answer is gone; its first token has nothing before it any more.
    gone = first_start + 1
    (row,) = encode(own, source, len(whole) - gone, truncation="left")
    assert row.ids.tolist() == whole.ids[gone:].tolist()
    assert row.turns == ((0, first_end - gone), (last_start - gone, last_end - gone))
    assert row.learned[0] == (1, first_end - gone)


@pytest.fixture(scope="module")
def chat_policy(make_policy, tokenizer, tmp_path_factory):
    folder = make_policy(seed=8, scale=0.5, with_tokenizer=False)
    with_template(tokenizer, PLAIN).save_pretrained(folder)
    return folder


def settings_of(model: Path, data: str, output: Path, **changes: Any) -> SftSettings:
    values: dict[str, Any] = {"model": str(model), "data": (data,), "output": output, "learning_rate": 3e-3}
    return SftSettings(**(values | {"batch_size": 8, "train_on": "all-turns", "track": ("none",)} | changes))


@pytest.mark.parametrize("packing", ["on", "off"])
def test_gradients_are_those_of_the_mean_over_the_tokens_of_all_turns(packing, chat_policy, tmp_path):
    tokenizer = load_tokenizer(chat_policy)
    source = write(tmp_path, *random_conversations(6, longest=2))
    (plain := tmp_path / "plain").mkdir()
    rows = encode(tokenizer, source) + encode(tokenizer, write(plain, {"prompt": "hello", "completion": " thanks"}))
    assert sum(len(row.turns) > 1 for row in rows) > 1
    assert not rows[-1].turns
    naive = AutoModelForCausalLM.from_pretrained(chat_policy, dtype=torch.float64)
    nlls = []
    for row in rows:
        ids = torch.tensor(row.ids.tolist())
        table = naive(ids[None]).logits[0].log_softmax(-1)
        spans = row.turns or ((row.prompt_tokens, len(row)),)
        nlls += [-table[t - 1, ids[t]] for start, end in spans for t in range(start, end)]
    loss = torch.stack(nlls).mean()
    loss.backward()
    scale = max(float(p.grad.abs().max()) for p in naive.parameters())
    for micro_batch_tokens in (1, 90, 10_000):
        policy = load_policy(chat_policy, tokenizer)
        settings = settings_of(chat_policy, source, tmp_path, packing=packing, micro_batch_tokens=micro_batch_tokens)
        trainer = SftTrainer(policy, tokenizer, settings)
        assert trainer.answers.packed == (packing == "on")
        assert trainer.accumulate(rows)["loss"] == pytest.approx(loss.item(), rel=1e-5)
        for ours, theirs in zip(policy.parameters(), naive.parameters(), strict=True):
            assert float((ours.grad.double() - theirs.grad).abs().max()) < 1e-4 * scale
    assert trainer.evaluate(rows)["eval_tokens"] == len(nlls)


def test_a_run_learns_all_turns_and_counts_them(chat_policy, tmp_path, capsys):
    talks = random_conversations(40, seed=1, longest=2)
    source = write(tmp_path, *talks)
    train_sft(settings_of(chat_policy, source, tmp_path / "run", epochs=3, held_out_fraction=0.2))
    printed = capsys.readouterr().out
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["after"]["eval_loss"] < 0.8 * evaluation["before"]["eval_loss"]
    rows = encode(load_tokenizer(chat_policy), source)
    total = sum(len(ids) for row in rows for ids in learned_ids(row))
    assert 0.05 * total < evaluation["after"]["eval_tokens"] < 0.5 * total
    assert " answers in 32 demonstrations (0 of them cut to 128 tokens), 8 held out" in printed
