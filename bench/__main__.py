"""``make bench``: all measurements of this machine in one run, and whether they are where they should be.

``python -m bench batcher`` measures what the batcher costs, alone and in seconds; ``python -m bench linear`` what the
trainer's linear layers save.
"""

from __future__ import annotations

import sys

from bench import batcher, generation, linear, ppo_overhead
from bench.machine import machine
from bench.outcome import Verdict, conclude


def main() -> None:
    print("; ".join(f"{name} {value}" for name, value in machine().items()))
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

    conclude(
        "bench",
        (
            Verdict(
                speed.ratio >= generation.TARGET,
                f"generation through the service / in process: {speed.ratio:.3f}, target at least "
                f"{generation.TARGET:.2f}",
            ),
            Verdict(
                overhead.share <= ppo_overhead.TARGET,
                f"PPO step neither work nor waiting for it: {overhead.share:.2%}, target at most "
                f"{ppo_overhead.TARGET:.0%}",
            ),
        ),
        {"generation": speed.figures(), "ppo_step": overhead.figures()},
    )


if __name__ == "__main__":
    main()
