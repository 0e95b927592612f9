"""What runs with transformers 4.57, in a process of its own: makes model folders, and scores with
folders of others.

`make FOLDER` reads {name: configuration} from standard input and saves a random model of each under
FOLDER/name; `score IDS FOLDER...` prints, as JSON, the log-probabilities of a row of ids by each
folder's model. What a folder lacks or has too much of ends it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = Path(sys.executable).parents[1] / "transformers-4.57"  # `make setup` fills it


def run(*arguments: str, given: str = "") -> Any:
    """Run this file in that environment; its answer."""
    assert ENVIRONMENT.is_dir(), "transformers 4.57 is missing; run: make setup"
    environment = {"PYTHONPATH": str(ENVIRONMENT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, __file__, *arguments],
        input=given,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout)


def auto_class(config: Any) -> Any:
    """That of language models, or of those that read images too."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


def _make(folder: str) -> list[str]:
    import torch
    from transformers import CONFIG_MAPPING

    made = json.load(sys.stdin)
    for name, keys in made.items():
        torch.manual_seed(0)
        config = CONFIG_MAPPING[keys.pop("model_type")](**keys)
        auto_class(config).from_config(config).save_pretrained(Path(folder) / name)
    return sorted(made)


def _score(ids: str, *folders: str) -> dict[str, list[float]]:
    import torch
    from transformers import AutoConfig

    row, found = torch.tensor([json.loads(ids)]), {}
    for folder in folders:
        auto = auto_class(AutoConfig.from_pretrained(folder))
        loaded: Any = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        model, report = loaded
        assert not any(report.values()), (folder, report)
        with torch.no_grad():
            logs = torch.log_softmax(model.eval()(row).logits[0].double(), dim=-1)
        found[folder] = logs[:-1].gather(1, row[0, 1:, None])[:, 0].tolist()
    return found


if __name__ == "__main__":
    import transformers

    assert transformers.__version__.startswith("4.57."), transformers.__version__
    print(json.dumps({"make": _make, "score": _score}[sys.argv[1]](*sys.argv[2:])))  # noqa: T201
