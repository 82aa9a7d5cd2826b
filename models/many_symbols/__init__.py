"""How the model of FrozenLake with many symbols was made: several letters stand for holes, several for frozen tiles, so
one attempt shows only part of what they mean."""
