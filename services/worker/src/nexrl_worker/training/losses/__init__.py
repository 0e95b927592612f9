"""Losses as pure functions of tensors per token, and what adds them up; no models, no ranks."""
