"""The contract of quartet, its typed clients, and the small foundations that every component shares."""
