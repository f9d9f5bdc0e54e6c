"""Several engines, each in a process of its own, that serve as one."""
