"""How the shipped pair of models was made; nothing else needs it."""
