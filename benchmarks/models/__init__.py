"""Benchmarks of whole models and of training, and of what training waits for: images, checkpoints, evaluation."""
