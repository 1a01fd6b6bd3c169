"""Pictures and numbers of a trained network: compute (pure), draw (a figure), callback (when)."""
