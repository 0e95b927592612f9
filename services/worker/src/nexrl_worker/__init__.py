"""Worker groups: an agent with slots, and the ranks it starts, which hold one sharded model and run
its operations together."""
