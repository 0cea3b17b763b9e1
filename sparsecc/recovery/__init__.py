"""What is left makes up for what went: updates of weights from second moments of what layers read."""
