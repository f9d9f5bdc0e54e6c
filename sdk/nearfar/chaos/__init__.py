"""Bad links and failing processes on purpose, the same ones again for the same seed.

`profiles` says how a link is, `schedule` what goes wrong when, `shrink` which of it matters.  Two tiers carry the
bytes: `proxy` (TCP, no root: stalls, resets, cuts, half-open) and `netns` (packets between two network namespaces).
"""
