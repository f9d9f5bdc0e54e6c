"""The cloud side of nearfar: the serving core, no server around it yet, and the training of the shipped models."""
