"""Benchmarks of whole models and of training, including images, checkpoints and evaluation."""
