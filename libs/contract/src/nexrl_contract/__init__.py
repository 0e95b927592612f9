"""What the client, the gateway, the workers and the checkpointer agree on; no torch, no FastAPI, no
RQ."""
