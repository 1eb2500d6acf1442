"""What lets one machine without a TPU run the whole system: a tiny model, its oracle, and a CPU engine."""
