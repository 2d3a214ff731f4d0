"""Ours against a peer, interleaved in one run: see README.md."""
