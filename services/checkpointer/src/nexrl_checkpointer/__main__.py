"""``python -m nexrl_checkpointer``: consume the checkpoint queue until SIGTERM or SIGINT, after the
job at hand."""

from __future__ import annotations

import logging
import signal

from nexrl_checkpointer.service import Checkpointer, Settings


def main() -> None:
    """Read the settings, own the signals, run."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    checkpointer = Checkpointer(Settings.from_env())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: checkpointer.stop())
    checkpointer.run()


if __name__ == "__main__":
    main()
