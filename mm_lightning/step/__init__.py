"""In every step: the user's own step on mixed hidden states, and again on the partners' targets with the network replayed."""
