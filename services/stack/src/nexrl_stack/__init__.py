"""The ``nexrl`` command: runs the whole service on one machine and shows what it is doing."""
