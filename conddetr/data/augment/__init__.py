"""The parts of an augmentation: each is planned from a generator alone, and applied later."""
