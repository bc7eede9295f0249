"""The trainer's exceptions: one tree, so that a command can turn any of them into one clear line."""

from __future__ import annotations


class TrainerError(Exception):
    """Base of everything the trainer raises on purpose. Its message is written for the person who started the run."""
