"""What an adapter is and what it has learnt, as text, values and figures."""
