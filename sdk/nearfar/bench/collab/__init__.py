"""`nearfar bench collab`: ways to share an answer between two machines, on the same prompts and links."""
