"""Running someone's script for its evidence: in processes of its own, and in an overlay of its files."""
