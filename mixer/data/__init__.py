"""From a path to uint8 batches: find and decode images, pack them once, augment whole batches."""
