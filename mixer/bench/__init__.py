"""What a model costs: time, memory, FLOPs, measured in fresh processes."""
