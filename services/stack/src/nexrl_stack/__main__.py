"""``python -m nexrl_stack`` is the ``nexrl`` command."""

from nexrl_stack.cli import app

app(prog_name="nexrl")
