"""Training of nano: corpora -> rows -> mix -> trainer.step -> export."""
