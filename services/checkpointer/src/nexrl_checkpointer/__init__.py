"""The checkpointer: takes finished saves from staging, verifies and publishes them while training
goes on. No torch."""
