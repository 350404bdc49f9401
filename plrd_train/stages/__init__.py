"""The parts of `plrd_train.pipeline`, one file each. Each takes the open `Run` and is a collective."""
