"""In every step: the user's own step, mixed, and again on the partners' targets with the network replayed."""
