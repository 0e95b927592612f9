"""Where checkpoints lie: files that are wholly there or not, and the manifest that lists them."""
