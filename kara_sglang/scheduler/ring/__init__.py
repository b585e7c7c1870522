"""The ring of recorded queries: how large it is, who gets which part of it, and for how long."""
