"""What the service asks of the machine it runs on: processes, logs, memory, disks, GPUs, names."""
