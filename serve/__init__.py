"""Answer for every task from one shared base model."""
