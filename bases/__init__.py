"""Base models that this project makes itself, and the recipes that make them."""
