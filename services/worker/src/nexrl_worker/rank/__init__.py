"""One rank of a worker group: its loop, its operations, and how it talks with the others."""
