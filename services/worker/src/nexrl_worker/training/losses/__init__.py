"""Losses as formulas: pure functions of tensors per token, what adds them up, and nothing of models
or ranks."""
