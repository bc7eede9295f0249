"""What the two forward-pass services (reward, reference) share and the runtime may not know: torch and transformers."""
