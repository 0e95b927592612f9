"""What an operation takes: seconds, memory, and what a plan would take."""
