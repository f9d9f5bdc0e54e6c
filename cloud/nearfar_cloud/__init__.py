"""The cloud side of nearfar.  Today: training of the models that the project ships."""
