"""From a path to uint8 batches: find images, decode them once, augment whole batches."""
