"""What a device and whoever runs its upper layers share: messages, codecs, sessions, fingerprints, the door out.

Ground floor: nothing here computes a layer.  `rpc.py` and the generated stubs are the only files that know gRPC.
"""
