"""The shipped thing: weights, card, guider and measured gains, in and out. Imports nothing else of this project."""
