"""The worker's half of checkpoints: shards into staging, Hugging Face folders, weight-sync
publishing, loading.

Nothing here is collective except :func:`nexrl_worker.checkpoint.huggingface.export`, which drains a
collective stream; everything else is one rank's own file work, so that the ranks can vote after it.
"""
