"""Train, judge, promote and deploy one adapter per task over a shared base model."""
