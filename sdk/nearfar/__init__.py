"""nearfar: a language model on the device that stops early where it is sure."""
