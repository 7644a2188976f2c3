"""What a run stands on and survives: processes, signals, collectives, checkpoints, ZeRO, steps and samples that are bad."""
