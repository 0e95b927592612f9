"""``python -m nexrl_worker.agent`` is the agent."""

from nexrl_worker.agent.agent import main

main()
