"""The three services, islands over one runtime."""
