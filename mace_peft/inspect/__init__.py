"""What an adapter is, what it has learnt and how good it is, as text, values and figures."""
