"""``make bench``: all measurements of this machine in one run, and whether they are where they should be."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

from bench import generation, ppo_overhead

OUTPUT = Path(__file__).resolve().parent / "out" / "results.json"


def main() -> None:
    print("== generation: policy service against AsyncLLM in process", flush=True)
    speed = generation.measure(generation.Load())
    print("\n== a PPO step against three live services", flush=True)
    overhead = ppo_overhead.measure()
    print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    print("\n".join(["", *speed.lines(), "", *overhead.lines(), ""]))
    verdicts = {
        f"service / in process at least {generation.TARGET:.2f}: {speed.ratio:.3f}": speed.ratio >= generation.TARGET,
        f"overhead of a step at most {ppo_overhead.TARGET:.0%}: {overhead.share:.1%}": overhead.share
        <= ppo_overhead.TARGET,
    }
    for text, held in verdicts.items():
        print(f"{'PASS' if held else 'MISS'}  {text}")
    OUTPUT.parent.mkdir(exist_ok=True)
    content = {
        "generation": {"service": speed.service, "in_process": speed.in_process, "ratio": speed.ratio},
        "ppo_step": vars(overhead) | {"share": overhead.share},
    }
    OUTPUT.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
