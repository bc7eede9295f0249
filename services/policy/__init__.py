"""The policy service: generation from the model being trained, and replacement of its weights."""
