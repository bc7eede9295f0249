"""What the README names exists: files, commands, flags, shapes of data."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

import deploy.local
from quartet.settings import Settings
from trainer.__main__ import COMMANDS
from trainer.data import load_demonstrations, load_judged, load_preferences, load_prompts

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text()
SETTINGS = {
    "quartet-local": "deploy.local:LocalSettings",
    "quartet-policy": "services.policy.config:PolicySettings",
    "quartet-reward": "services.reward.config:RewardSettings",
    "quartet-reference": "services.reference.config:ReferenceSettings",
    "quartet-gateway": "services.gateway.config:GatewaySettings",
    "quartet-gateway new-key": "services.gateway.keys:NewKeySettings",
} | {f"quartet-train {name}": command.settings for name, command in COMMANDS.items()}
OF_MAKE = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def tree() -> list[str]:
    """Paths of the tree, which is indented by two spaces a level and may name several siblings on one line."""
    paths: list[str] = []
    parents: dict[int, str] = {}
    for line in section("Where is what").splitlines():
        if not line.startswith("    "):
            continue
        depth = (len(line) - len(line.lstrip()) - 4) // 2
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            path = parents.get(depth - 1, "") + name
            paths.append(path)
            if name.endswith("/"):
                parents[depth] = path
    return paths


def commands() -> list[list[str]]:
    """Command lines in indented blocks, with continuation lines joined and comments taken off; quartet-local's own."""
    text = re.sub(r"\\\n\s*", " ", f"{README}\n{deploy.local.__doc__}")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    words = [shlex.split(line, comments=True) for line in lines if line.startswith(("quartet-", "make "))]
    found = []
    for line in words:
        while "--" in line:  # quartet-local ... -- another command
            at = line.index("--")
            found.append(line[:at])
            line = line[at + 1 :]
        found.append(line)
    return found


def test_every_file_of_the_tree_exists():
    paths = tree()
    assert len(paths) > 30
    missing = [path for path in paths if "<" not in path and not (ROOT / path).exists()]
    assert missing == []


def test_every_link_leads_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(targets) > 5
    assert [target for target in targets if "://" not in target and not (ROOT / target).exists()] == []


@pytest.mark.parametrize("command", [command for command in commands() if command[0] != "make"], ids=" ".join)
def test_every_command_has_the_flags_that_the_readme_gives_it(command):
    name = two if (two := " ".join(command[:2])) in SETTINGS else command[0]
    module, _, attribute = SETTINGS[name].partition(":")
    settings: type[Settings] = getattr(importlib.import_module(module), attribute)
    known = {f"--{field.replace('_', '-')}" for field in settings.model_fields} | {"--config"}
    flags = {word.partition("=")[0] for word in command if word.startswith("--")}
    assert flags - known == set()
    required = {f"--{field.replace('_', '-')}" for field, info in settings.model_fields.items() if info.is_required()}
    assert required - flags == set()


def test_every_make_target_exists():
    named = {command[1] for command in commands() if command[0] == "make"}
    assert {"demo", "test"} <= named
    assert named - OF_MAKE == set()


def test_the_rows_shown_are_read_as_what_they_are_shown_for(tmp_path):
    shown = r"^\| (SFT|reward model, DPO|KTO|PPO, online DPO) \| `(\{.*?\})`(?:,| \|)"
    rows = re.findall(shown, section("On your own data"), re.MULTILINE)
    assert [kind for kind, _ in rows].count("SFT") == 4
    assert len(rows) == 9
    loaders = {
        "SFT": load_demonstrations,
        "reward model, DPO": load_preferences,
        "KTO": load_judged,
        "PPO, online DPO": load_prompts,
    }
    read = []
    for number, (kind, row) in enumerate(rows):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(row + "\n")
        (loaded,) = loaders[kind]([str(file)])
        answers = [getattr(loaded, name) for name in ("completion", "chosen", "rejected") if hasattr(loaded, name)]
        read.append((loaded.prompt, *answers))

    def asked(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    assert read == [
        ("How do I reset it?", " Hold the button for ten seconds."),
        (asked("Hello"), "Hi, how can I help?"),
        (asked("Translate to French.\n\ncheese"), "fromage"),
        ("", "A whole document, learned from its first token."),
        ("My order is late.", " I am sorry, let me look.", " So what?"),
        (asked("Greet me."), "Good morning!", "No."),
        (asked("Hi"), "Hello!", "What?"),
        ("My order is late.", " So what?"),
        ("My parcel is damaged.",),
    ]
