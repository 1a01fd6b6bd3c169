"""Architectures: plain ``torch.nn`` networks, split into blocks where mixing is natural."""
