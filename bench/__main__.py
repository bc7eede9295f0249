"""``make bench``: all measurements of this machine in one run, and whether they are where they should be.

``python -m bench batcher`` measures what the batcher costs, alone and in seconds; ``python -m bench linear`` what the
trainer's linear layers save.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench import batcher, generation, linear, ppo_overhead
from bench.machine import machine

OUTPUT = Path(__file__).resolve().parent / "out" / "results.json"


def main() -> None:
    where = machine()
    print("; ".join(f"{name} {value}" for name, value in where.items()))
    if sys.argv[1:] == ["linear"]:
        print("\n".join(("", *linear.measure())))
        return
    if sys.argv[1:] == ["batcher"]:
        print("\n".join(("", *batcher.measure(batcher.Load()).lines())))
        return
    if sys.argv[1:]:
        sys.exit(f"bench: unknown measurement {' '.join(sys.argv[1:])!r}: say batcher or linear, or nothing for all")
    asked = generation.Load()
    print(
        f"\ngeneration: {asked.prompts} concurrent requests of {asked.prompt_tokens} + {asked.new_tokens} tokens",
        flush=True,
    )
    speed = generation.measure(asked)
    print("\n".join(speed.lines()))
    print("\na PPO step against three live services (some minutes)", flush=True)
    overhead = ppo_overhead.measure(ppo_overhead.Load())
    print("\n".join(overhead.lines()))

    verdicts = (
        (
            speed.ratio >= generation.TARGET,
            f"generation through the service / in process: {speed.ratio:.3f}, target at least {generation.TARGET:.2f}",
        ),
        (
            overhead.share <= ppo_overhead.TARGET,
            f"PPO step neither work nor waiting for it: {overhead.share:.2%}, target at most {ppo_overhead.TARGET:.0%}",
        ),
    )
    print("\n" + "\n".join(f"{'PASS' if held else 'MISS'}  {text}" for held, text in verdicts))
    OUTPUT.parent.mkdir(exist_ok=True)
    content = {"machine": where, "generation": speed.figures(), "ppo_step": overhead.figures()}
    OUTPUT.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
