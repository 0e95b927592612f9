"""What `nexrl checkpoints` lists: every published checkpoint under the roots, and nothing else."""

from __future__ import annotations

import time
from pathlib import Path

from nexrl_checkpointer.publish import publish
from nexrl_storage.manifest import Export, published, write_manifest
from nexrl_storage.publish import Versions

from tests.helpers.toy_checkpoints import make_request, make_state, stage


def test_the_list_holds_what_is_published_once(tmp_path: Path) -> None:
    """Sharded and weight-sync ones by the path a user knows; neither staging, hidden versions, nor
    damaged ones."""
    publish(make_request(tmp_path, tmp_path / "run" / "ckpt" / "step_1", step=1), lambda: None)
    sync = Versions(tmp_path / "run" / "sync", "student")
    files = {
        "identifier": "student",
        "step": 0,
        "created": time.time() + 1,
        "files": (),
        "weight_version": 8,
    }
    write_manifest(sync.begin(), Export.model_validate(files))
    sync.commit()
    stage(tmp_path, "d" * 32, make_state())
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = published([tmp_path, tmp_path / "run", tmp_path / "nowhere"])
    assert [(item.path, item.checkpoint.kind) for item in found] == [
        (str(tmp_path / "run" / "ckpt" / "step_1"), "sharded"),
        (str(tmp_path / "run" / "sync"), "huggingface"),
    ]
    assert found[0].checkpoint.nbytes > 0 and isinstance(found[1].checkpoint, Export)
