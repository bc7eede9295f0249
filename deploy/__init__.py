"""Starting quartet on one machine, and what an image needs."""
