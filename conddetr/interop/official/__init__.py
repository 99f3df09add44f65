"""The repository of the paper, Atten4Vis/ConditionalDETR: its weights, its model and its criterion."""
