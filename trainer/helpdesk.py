"""``quartet-train helpdesk``: a corpus that anybody can judge at a glance, made here so that none has to be shipped.

Customers describe a problem with a product; the desk answers courteously, with a step that helps, or curtly. Products
times problems times phrasings make the prompts, openings times steps times closings the answers. Held-out prompts are
of (product, problem) pairs that no training row has.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quartet.fingerprint import derive_seed
from trainer.config import HelpdeskSettings
from trainer.errors import OutputError
from trainer.files import replace_folder, require_folder

FILES = ("sft.jsonl", "preferences.jsonl", "prompts.jsonl", "held_out_preferences.jsonl", "held_out_prompts.jsonl")
# Every so many-th (product, problem) pair is held out.
_HELD_OUT_EVERY = 4


@dataclass(frozen=True, kw_only=True)
class Topic:
    """Products of one kind, what goes wrong with them, and the step that helps with each."""

    products: tuple[str, ...]
    problems: tuple[tuple[str, str], ...]


TOPICS = (
    Topic(
        products=("router", "modem", "smart speaker", "video doorbell", "wireless printer"),
        problems=(
            ("keeps losing the connection", "move it closer to the window and restart it once"),
            ("shows a red light since this morning", "unplug it for a minute and plug it in again"),
            ("does not appear in the app", "turn on Bluetooth and add it again in the app"),
            ("is very slow in the evening", "switch it to the other channel in its settings"),
            ("asks for a password I never set", "use the code on the label underneath it"),
        ),
    ),
    Topic(
        products=("phone", "tablet", "laptop", "smart watch", "e-reader"),
        problems=(
            ("does not turn on any more", "hold the power button for twenty seconds"),
            ("loses its charge within an hour", "send it in for a new battery, free of charge"),
            ("has a crack across the screen", "bring it to a shop, where the glass is replaced the same day"),
            ("gets very hot while charging", "use the charger that came with it"),
            ("freezes whenever I open the camera", "install the update that came out this week"),
        ),
    ),
    Topic(
        products=("coffee machine", "blender", "vacuum cleaner", "toaster", "fan heater"),
        problems=(
            ("makes a loud grinding noise", "empty it and clean the filter"),
            ("arrived with a part missing", "expect the part by post within three days"),
            ("smells of burnt plastic", "unplug it now, and we collect it tomorrow"),
            ("stops after a few seconds", "let it cool down for ten minutes"),
            ("leaks water on the floor", "tighten the ring around the tank"),
        ),
    ),
    Topic(
        products=("parcel", "order", "delivery", "gift card", "return"),
        problems=(
            ("should have been here last week", "check the new date, this Friday, in your account"),
            ("went to the wrong address", "confirm your address, and we send it again today"),
            ("was charged twice", "look for the refund in your account within two days"),
            ("cannot be found under its number", "send us a picture of the receipt"),
            ("was cancelled without a word", "place it again, and we add a voucher"),
        ),
    ),
    Topic(
        products=("account", "subscription", "invoice", "newsletter", "user profile"),
        problems=(
            ("was locked after I moved house", "open the link that we just sent to you"),
            ("shows somebody else's name", "sign out once, and the right name comes back"),
            ("still has my old e-mail address", "change the address under settings, then contact"),
            ("went up in price without notice", "choose the former plan, which we keep for you"),
            ("cannot be cancelled on the website", "reply with the word cancel, and it ends today"),
        ),
    ),
)

QUESTIONS = (
    "My {product} {problem}. What can I do?",
    "Hello, my {product} {problem}. Can you help me?",
    "The {product} I got from you {problem}. I need this solved.",
    "I have a problem: my {product} {problem}.",
    "Why is it that my {product} {problem}? Please advise.",
    "Hi there. Since yesterday my {product} {problem}. Any idea?",
    "It is the second time that my {product} {problem}. What now?",
    "Good morning, it seems my {product} {problem}. How do I fix that?",
    "Your colleague said you could help: my {product} {problem}.",
    "I paid for this and now my {product} {problem}. Is there anything to be done?",
)
OPENINGS = (
    "I am sorry about your {product}.",
    "Thank you for telling us about the {product}.",
    "I understand how annoying that is.",
    "Thanks for your patience, and sorry for the trouble.",
    "That should not happen, my apologies.",
    "I am happy to help you with the {product}.",
    "",
)
STEPS = (
    "Please {step}.",
    "Could you please {step}?",
    "The best way is to {step}, please.",
    "Kindly {step}, and it should be fine.",
)
CLOSINGS = (
    "If that does not help, I am glad to call you.",
    "Please let me know how it goes.",
    "You are welcome to write to me at any time.",
    "I will stay with you until it works.",
    "Have a lovely day!",
    "",
    "",
)
CURT = (
    "Not our problem.",
    "Read the manual.",
    "Your {product} is old. Buy a new one.",
    "We are busy. Try again some other day.",
    "You must have broken it.",
    "No idea. Ask somebody else.",
    "That is what happens when people do not read.",
    "Everybody's {product} does that. Live with it.",
    "Look it up yourself.",
)
# Some rudeness is long, so that length alone does not tell the two kinds of answers apart.
RANTS = (
    "We get a hundred messages like this one every day, and I really do not see why yours should be any different.",
    "If you had only read the first page of the manual you would not be wasting my time with your {product} now.",
    "A {product} is not made for people who cannot use it, so stop writing to us and find somebody who can.",
    "There is nothing wrong with the {product}. You did something wrong, as everybody does, and now you blame us.",
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One product with one problem."""

    product: str
    problem: str
    step: str


def main(settings: HelpdeskSettings) -> None:
    """Writes the five files.

    Raises:
        OutputError: the folder holds something else, or more held-out prompts are asked for than there are.
    """
    require_folder("--output", settings.output)
    if settings.output.exists():
        held = sorted(path.name for path in settings.output.iterdir())
        if set(held) - set(FILES):
            raise OutputError(f"--output is {str(settings.output)!r}: it holds something else, such as {held[0]}")
    rows = make_rows(settings)
    with replace_folder(settings.output) as folder:
        for name in FILES:
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
    for name in FILES:
        sys.stdout.write(f"{settings.output / name}: {len(rows[name]):,} rows\n")


def make_rows(settings: HelpdeskSettings) -> dict[str, list[dict[str, str]]]:
    """The rows of each file, all of them decided by the seed."""
    train, held_out = split_cases(settings.seed)
    prompts_of_train, prompts_held_out = all_prompts(train), all_prompts(held_out)
    if settings.held_out > len(prompts_held_out):
        raise OutputError(
            f"--held-out is {settings.held_out}, must be at most {len(prompts_held_out)}: there are no more prompts"
        )
    draw = random.Random(derive_seed("helpdesk", settings.seed))
    demonstrations = []
    for index in range(settings.demonstrations):
        case, prompt = draw.choice(prompts_of_train)
        answer = courteous(case, draw) if index % 2 == 0 else curt(case, draw)
        demonstrations.append({"prompt": prompt, "completion": answer})
    draw.shuffle(demonstrations)
    return {
        "sft.jsonl": demonstrations,
        "preferences.jsonl": preferences(draw.choices(prompts_of_train, k=settings.preferences), draw),
        "prompts.jsonl": [{"prompt": prompt} for _, prompt in prompts_of_train],
        "held_out_preferences.jsonl": preferences(draw.choices(prompts_held_out, k=settings.held_out), draw),
        "held_out_prompts.jsonl": [{"prompt": p} for _, p in draw.sample(prompts_held_out, settings.held_out)],
    }


def split_cases(seed: int) -> tuple[list[Case], list[Case]]:
    """Cases to train on and held-out ones; every topic has some of both."""
    draw = random.Random(derive_seed("helpdesk-split", seed))
    train, held_out = [], []
    for topic in TOPICS:
        cases = [
            Case(product=product, problem=problem, step=step)
            for product, (problem, step) in itertools.product(topic.products, topic.problems)
        ]
        draw.shuffle(cases)
        held_out += cases[::_HELD_OUT_EVERY]
        train += [case for index, case in enumerate(cases) if index % _HELD_OUT_EVERY]
    return train, held_out


def all_prompts(cases: Iterable[Case]) -> list[tuple[Case, str]]:
    """Every phrasing of every case."""
    return [
        (case, f"Customer: {question.format(product=case.product, problem=case.problem)}\nAgent:")
        for case in cases
        for question in QUESTIONS
    ]


def courteous(case: Case, draw: random.Random) -> str:
    """An answer that is polite and helps."""
    parts = (draw.choice(OPENINGS), draw.choice(STEPS), draw.choice(CLOSINGS))
    return " " + " ".join(part for part in parts if part).format(product=case.product, step=case.step)


def curt(case: Case, draw: random.Random) -> str:
    """An answer that is neither."""
    parts = draw.sample(CURT, draw.choice((0, 1, 2)))
    if len(parts) < 2:
        parts.insert(0, draw.choice(RANTS))
    return " " + " ".join(parts).format(product=case.product)


def preferences(prompts: Sequence[tuple[Case, str]], draw: random.Random) -> list[dict[str, str]]:
    return [
        {"prompt": prompt, "chosen": courteous(case, draw), "rejected": curt(case, draw)} for case, prompt in prompts
    ]
