"""What keeps a command alive: devices, processes, signals, files, errors. Knows no model."""
