"""Infrastructure of the commands: devices, processes, signals, files, errors. No model."""
