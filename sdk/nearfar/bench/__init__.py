"""How fast the engine is on this machine, and how fast the machine would let it be: behind `nearfar bench`."""
