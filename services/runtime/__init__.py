"""What every service shares: bootstrap, health, errors, interceptors, telemetry, batching. Knows no model library."""
