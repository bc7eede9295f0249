"""The reward service: scores responses with a reward model."""
